//! Chains with adapters of random factors, made of a chain in a zoo.

use ashlar_kernels::format::{Dtype, quantise};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::{Adapter, AdapterRef, Chain, Change, TensorRef};
use ashlar_zoo::store::{Compression, Zoo};
use ashlar_zoo::tensor_file;

/// What an adapter is to change in every layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe {
    /// Of the attention block.
    pub(crate) attention: &'static [&'static str],
    /// Of the feed-forward block.
    pub(crate) feed_forward: &'static [&'static str],
    pub(crate) rank: u64,
    pub(crate) scale: f32,
    pub(crate) dtype: Dtype,
    /// The first layer.
    pub(crate) from_layer: usize,
    /// Other factors for each.
    pub(crate) salt: u64,
}

/// Stores adapters over a chain of the zoo, and the chain that has them.
pub(crate) async fn adapted(zoo: &Zoo, chain: Digest, recipe: Recipe) -> Digest {
    let mut chain: Chain = zoo.read_chain(chain).await.unwrap();
    for index in 1 + 2 * recipe.from_layer..chain.blocks.len() - 1 {
        let roles = if index % 2 == 1 { recipe.attention } else { recipe.feed_forward };
        if roles.is_empty() {
            continue;
        }
        let block = zoo.read_block(chain.blocks[index]).await.unwrap();
        let mut adapter = Adapter { changes: Default::default() };
        for (number, role) in (0..).zip(roles) {
            let [outputs, inputs] = block.tensors[*role].shape[..] else { panic!("{role} is no matrix") };
            let salt = (recipe.salt * 1000 + index as u64) * 16 + 2 * number;
            let a = factor(zoo, recipe.dtype, [recipe.rank, inputs], salt, 1.0 / (inputs as f32).sqrt()).await;
            let b = factor(zoo, recipe.dtype, [outputs, recipe.rank], salt + 1, 0.3).await;
            adapter.changes.insert((*role).to_owned(), Change::LowRank { scale: recipe.scale, a, b });
        }
        let (digest, _) = zoo.put_adapter(&adapter).await.unwrap();
        chain.adapters.push(AdapterRef { block_index: index as u32, digest });
    }
    zoo.put_chain(&chain).await.unwrap().0
}

async fn factor(zoo: &Zoo, dtype: Dtype, shape: [u64; 2], salt: u64, size: f32) -> TensorRef {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let value = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * size
    };
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(value).collect();
    let bytes = quantise(dtype, shape[0] as usize, shape[1] as usize, &values).unwrap();
    let tensor = TensorRef { digest: tensor_file::digest(dtype, &shape, &bytes), dtype, shape: shape.to_vec() };
    zoo.put_tensor(&tensor, bytes.into(), Compression::Off).await.unwrap();
    tensor
}
