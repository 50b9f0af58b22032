//! Chains for the tests of this folder: blocks without payloads, which nothing here reads.

use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::{Assets, Block, Chain, Defaults, Tokens};
use ashlar_zoo::store::Zoo;
use serde_json::json;

/// A chain of these blocks, which need not be there.
pub(super) fn chain(blocks: Vec<Digest>) -> Chain {
    Chain {
        format: 1,
        architecture: "llama".to_owned(),
        width: 4,
        vocab: 1000,
        context_tokens: 64,
        blocks,
        adapters: vec![],
        assets: Assets::default(),
        tokens: Tokens::default(),
        defaults: Defaults::default(),
        licence: None,
        source: "test".to_owned(),
    }
}

/// A chain of two layers whose descriptors are in the zoo; blocks are distinct by seed, of 4,000 bytes each.
pub(super) async fn stored_chain(zoo: &Zoo, seed: u8) -> Chain {
    let mut blocks = Vec::new();
    for index in 0..6u8 {
        let tensor = json!({"digest": Digest::of(&[seed, index]), "dtype": "f32", "shape": [250, 4]});
        let block = json!({"width": 4, "params": {"kind": "embed", "scale": 1.0}, "tensors": {"token.weight": tensor}});
        let block: Block = serde_json::from_value(block).unwrap();
        blocks.push(zoo.put_block(&block).await.unwrap().0);
    }
    chain(blocks)
}
