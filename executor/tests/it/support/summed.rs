//! A chain with adapters as one of whole f32 matrices.

use ashlar_kernels::format::{Dtype, dequantise};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::{Chain, TensorRef};
use ashlar_zoo::store::{Compression, MappedChange, Zoo};
use ashlar_zoo::tensor_file;

/// The chain that has the sum of each matrix and its adapter, as f32: what peft's `merge_and_unload` makes of a model in f32.
pub(crate) async fn summed(zoo: &Zoo, chain: Digest) -> Digest {
    let chain: Chain = zoo.read_chain(chain).await.unwrap();
    let mut blocks = Vec::new();
    for (index, digest) in chain.blocks.iter().enumerate() {
        let mapped = zoo.map_block(*digest).await.unwrap();
        let mut block = mapped.block.clone();
        let adapter = match chain.adapters.iter().find(|adapter| adapter.block_index as usize == index) {
            Some(adapter) => Some(zoo.map_adapter(adapter.digest).await.unwrap()),
            None => None,
        };
        for (role, tensor) in &mut block.tensors {
            let view = mapped.tensors[role].view();
            let mut values = dequantise(&view);
            match adapter.as_ref().and_then(|adapter| adapter.changes.get(role)) {
                None => {}
                Some(MappedChange::LowRank { scale, a, b }) => {
                    let (rank, cols) = (a.rows(), a.cols());
                    let (a, b) = (dequantise(&a.view()), dequantise(&b.view()));
                    for (at, value) in values.iter_mut().enumerate() {
                        *value += scale * (0..rank).map(|r| b[at / cols * rank + r] * a[r * cols + at % cols]).sum::<f32>();
                    }
                }
                Some(MappedChange::OneBit { signs }) => {
                    values.iter_mut().zip(dequantise(&signs.view())).for_each(|(value, d)| *value += d);
                }
            }
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let digest = tensor_file::digest(Dtype::F32, &tensor.shape, &bytes);
            *tensor = TensorRef { digest, dtype: Dtype::F32, shape: tensor.shape.clone() };
            zoo.put_tensor(tensor, bytes.into(), Compression::Off).await.unwrap();
        }
        blocks.push(zoo.put_block(&block).await.unwrap().0);
    }
    zoo.put_chain(&Chain { blocks, adapters: Vec::new(), ..chain }).await.unwrap().0
}
