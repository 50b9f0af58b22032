//! Models of two widths with one tokenizer, and chains of both with random maps between.

use std::path::Path;

use ashlar_zoo::digest::Digest;
use ashlar_zoo::ingest::{AddOptions, Silent, add};
use ashlar_zoo::manifest::{Chain, ModelName};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::stitch::{LinearMap, Seam};
use ashlar_zoo::store::Zoo;

use crate::checkpoints::Checkpoint;

/// Adds the demo family's base (128 wide, 8 layers) as `demo/base`, and a model of three layers with its tokenizer, 96 wide, as `demo/other`.
pub(crate) async fn models(zoo: &Zoo) -> [Digest; 2] {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/base");
    let mut other = Checkpoint::sized(5, [96, 3, 2048]);
    other.files.insert("tokenizer.json".to_owned(), std::fs::read(base.join("tokenizer.json")).unwrap());
    // As small as weights of trained models are.
    other.tensors.values_mut().filter(|(shape, _)| shape.len() == 2).for_each(|(_, data)| data.iter_mut().for_each(|w| *w *= 0.2));
    let folder = tempfile::tempdir().unwrap();
    other.write(folder.path());
    let mut chains = Vec::new();
    for (name, path) in [("base", base.as_path()), ("other", folder.path())] {
        chains.push(add(zoo, path, &AddOptions::new(ModelId::new("demo", name).unwrap()), &Silent).await.unwrap().chain);
    }
    [chains[0], chains[1]]
}

/// Stores layers `0..from` of one model, a map whose numbers are a function of `salt`, and layers `to..` of the other.
pub(crate) async fn stitched(zoo: &Zoo, (a, from): (&str, usize), (b, to): (&str, usize), salt: u64) -> Digest {
    let (a, b) = (zoo.resolve(&a.parse().unwrap()).await.unwrap(), zoo.resolve(&b.parse().unwrap()).await.unwrap());
    let seam = Seam::new(a, b, from, to).unwrap();
    let [inputs, outputs] = seam.widths();
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut values = |count: usize, size: f32| -> Vec<f32> {
        let value = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * size
        };
        (0..count).map(value).collect()
    };
    let weight = values(inputs * outputs, 2.0 / (inputs as f32).sqrt());
    let map = LinearMap { inputs, outputs, weight, bias: values(outputs, 0.2), position: values(outputs, 1.0) };
    seam.joined(&map).unwrap().store(zoo, &format!("demo/stitch-{salt}").parse().unwrap(), 1, None).await.unwrap()
}

/// The same chain with the feed-forward block at `index` as another chain has it at `other_index`.
pub(crate) async fn parted(zoo: &Zoo, chain: Digest, index: usize, other: Digest, other_index: usize) -> Digest {
    let other = zoo.read_chain(other).await.unwrap().blocks[other_index];
    let mut chain: Chain = zoo.read_chain(chain).await.unwrap();
    assert_ne!(std::mem::replace(&mut chain.blocks[index], other), other, "another block");
    let digest = zoo.put_chain(&chain).await.unwrap().0;
    let name = ModelName { chain: digest, created_ms: 1, parent: None, history: Vec::new(), loaded: false };
    zoo.set_model(&"demo/parted".parse().unwrap(), None, &name).await.unwrap();
    digest
}
