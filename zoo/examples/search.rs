//! How long the nearest relative takes to find among many models: makes so many names and sketches in a temporary zoo (10,000 by default, of
//! 30 layers with seven matrices, as SmolLM2 has) and searches. `cargo run --release -p ashlar-zoo --example search [COUNT]`.
#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, clippy::print_stdout, reason = "a measurement, printed")]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Instant;

use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::Activation;
use ashlar_zoo::canonical;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::{Assets, Block, BlockKind, ModelName, Norm, TensorRef};
use ashlar_zoo::relatives::{Candidates, SAMPLE_COUNT, Samples, Search, Sketch, Viewer, survey};
use ashlar_zoo::store::{Domains, Zoo};
use half::bf16;

const LAYERS: usize = 30;
const WIDTH: u64 = 576;
const INNER: u64 = 1536;
/// Bases of which the models are fine-tunes.
const BASES: u64 = 50;

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Nearly normal, of a number.
fn normal(of: u64) -> f32 {
    let uniform = |part: u64| (mix(of.wrapping_mul(7).wrapping_add(part)) >> 40) as f32 / (1u64 << 24) as f32;
    (0..4).map(uniform).sum::<f32>() - 2.0
}

/// The blocks of a model whose tensors are all its own.
fn blocks(model: u64) -> Vec<Block> {
    let norm = Norm::Rms { eps: 1e-5, weight_offset: 0.0 };
    let mut number = 0u64;
    let mut block = |params: BlockKind, tensors: &[(&str, Vec<u64>)]| {
        let tensors = tensors.iter().map(|(role, shape)| {
            number += 1;
            let digest = Digest::of(&[model.to_le_bytes(), number.to_le_bytes()].concat());
            ((*role).to_owned(), TensorRef { digest, dtype: Dtype::Bf16, shape: shape.clone() })
        });
        Block { width: WIDTH as u32, params, tensors: tensors.collect::<BTreeMap<_, _>>() }
    };
    let attention = BlockKind::Attention {
        norm,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
        rope: None,
        window: None,
        softcap: None,
        qk_norm: None,
        post_norm: None,
    };
    let feed_forward = BlockKind::FeedForward { norm, activation: Activation::Silu, inner: INNER as u32, gated: true, post_norm: None };
    let mut blocks = vec![block(BlockKind::Embed { scale: 1.0 }, &[("token.weight", vec![49_152, WIDTH])])];
    for _ in 0..LAYERS {
        let (wide, narrow, norm) = (vec![WIDTH, WIDTH], vec![192, WIDTH], ("norm.weight", vec![WIDTH]));
        let roles = [("q.weight", wide.clone()), ("k.weight", narrow.clone()), ("v.weight", narrow), ("o.weight", wide), norm.clone()];
        blocks.push(block(attention.clone(), &roles));
        let (up, down) = (vec![INNER, WIDTH], vec![WIDTH, INNER]);
        blocks.push(block(feed_forward.clone(), &[("gate.weight", up.clone()), ("up.weight", up), ("down.weight", down), norm]));
    }
    let head = [("norm.weight", vec![WIDTH]), ("output.weight", vec![49_152, WIDTH])];
    blocks.push(block(BlockKind::Head { norm, softcap: None, scale: 1.0 }, &head));
    blocks
}

/// A fine-tune of a base, moved by `by` of the size of its weights.
fn sketch(model: u64, base: u64, by: f32) -> Sketch {
    let blocks = blocks(model);
    let blocks: Vec<(Digest, &Block)> = blocks.iter().map(|block| (canonical::digest(block), block)).collect();
    let mut at = 0u64;
    let samples = |_: usize, _: &str| {
        let values: [u16; SAMPLE_COUNT] = std::array::from_fn(|_| {
            at += 1;
            let value = normal(base * 1_000_003 + at) + by * normal((BASES + model).wrapping_mul(1_000_003).wrapping_add(at));
            bf16::from_f32(0.05 * value).to_bits()
        });
        Ok::<_, Infallible>(Samples(values))
    };
    Sketch::new(&blocks, &[], &Assets::default(), samples).unwrap_or_else(|never| match never {})
}

#[tokio::main]
async fn main() {
    let count: u64 = std::env::args().nth(1).map_or(10_000, |count| count.parse().expect("COUNT is a number"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let zoo = Zoo::create_dir(folder.path()).await.expect("a new zoo");
    let (names, sketches) = (folder.path().join("models/t"), folder.path().join("sketches"));
    std::fs::create_dir_all(&names).and_then(|()| std::fs::create_dir_all(&sketches)).expect("folders");
    let (mut held, mut bytes) = (Vec::new(), 0);
    for model in 0..count {
        let sketch = sketch(model, model % BASES, if model == count / 3 { 0.001 } else { 0.02 });
        let chain = Digest::of(&model.to_le_bytes());
        let name = ModelName { chain, created_ms: 0, parent: None, history: Vec::new(), loaded: false };
        // Not through the zoo: it syncs each file, which is not what is measured.
        std::fs::write(names.join(format!("m{model}.json")), canonical::to_bytes(&name)).expect("a name");
        let file = sketch.to_bytes();
        bytes += file.len();
        std::fs::write(sketches.join(chain.to_string()), file).expect("a sketch");
        held.push((model, sketch));
    }
    println!("{count} models of {BASES} bases, {} bytes a sketch", bytes / held.len());
    let wanted = sketch(u64::MAX / 2, (count / 3) % BASES, 0.0);

    let start = Instant::now();
    let mut search = Search::new(&wanted);
    held.iter().for_each(|(model, sketch)| search.see(*model, sketch));
    let (nearest, _) = search.finish();
    println!("in memory: {:.3} s, nearest {:?}", start.elapsed().as_secs_f64(), nearest.expect("a relative"));
    drop(held);

    let viewer = Viewer::new("t", Domains::default());
    for round in ["from files, just written", "again"] {
        let start = Instant::now();
        let found = survey(&zoo, &viewer, &wanted, None, Candidates::All).await.expect("a sound zoo");
        let (id, _, rank) = found.nearest.expect("a relative");
        println!("{round}: {:.3} s, {} models seen, nearest {id} at {}", start.elapsed().as_secs_f64(), found.visible_count, rank.distance);
        assert_eq!(id.name(), format!("m{}", count / 3));
    }
}
