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
    stored_chain_of(zoo, seed, "EAFAFH").await
}

/// The same of blocks by the first letters of their kinds.
pub(super) async fn stored_chain_of(zoo: &Zoo, seed: u8, kinds: &str) -> Chain {
    let mut blocks = Vec::new();
    for (index, kind) in (0..).zip(kinds.chars()) {
        blocks.push(zoo.put_block(&block(kind, 16 * u32::from(seed) + index)).await.unwrap().0);
    }
    chain(blocks)
}

/// A block of width 4 and 1,000 elements by the first letter of its kind, distinct by seed.
pub(super) fn block(kind: char, seed: u32) -> Block {
    let norm = json!({"kind": "rms", "eps": 1e-6, "weight_offset": 0.0});
    let (params, shapes) = match kind {
        'E' => (json!({"kind": "embed", "scale": 1.0}), json!({"token.weight": [250, 4]})),
        'A' => (
            json!({"kind": "attention", "norm": norm, "heads": 1, "kv_heads": 1, "head_dim": 62, "scale": 1.0, "rope": null, "window": null,
                "softcap": null, "qk_norm": null, "post_norm": null}),
            json!({"norm.weight": [4], "q.weight": [62, 4], "k.weight": [62, 4], "v.weight": [62, 4], "o.weight": [4, 62], "o.bias": [4]}),
        ),
        'F' => (
            json!({"kind": "feed_forward", "norm": norm, "activation": "silu", "inner": 124, "gated": false, "post_norm": null}),
            json!({"norm.weight": [4], "up.weight": [124, 4], "down.weight": [4, 124], "down.bias": [4]}),
        ),
        'S' => (json!({"kind": "stitch", "to": 4}), json!({"map.weight": [4, 4]})),
        _ => (json!({"kind": "head", "norm": norm, "softcap": null, "scale": 1.0}), json!({"norm.weight": [4], "output.weight": [249, 4]})),
    };
    let tensor = |(role, shape): (&String, &serde_json::Value)| {
        let digest = Digest::of(format!("{seed} {role}").as_bytes());
        (role.clone(), json!({"digest": digest, "dtype": "f32", "shape": shape}))
    };
    let tensors: serde_json::Map<_, _> = shapes.as_object().unwrap().iter().map(tensor).collect();
    serde_json::from_value(json!({"width": 4, "params": params, "tensors": tensors})).unwrap()
}
