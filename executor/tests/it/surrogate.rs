//! Surrogates: what a cut block says is what the whole one says without the columns that went, what is planted dead is what goes, and a refit on the
//! calibration text brings the model nearer to what it was.

use std::sync::Arc;

use crate::checkpoints::{self, Checkpoint, D, HEAD_DIM, INNER};
use ashlar_executor::model::alone::{Alone, AloneLimits};
use ashlar_executor::model::surrogate::{Calibration, CutBlock, SurrogateError, make};
use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::format::{Dtype, dequantise};
use ashlar_kernels::ops::{Bf16Compute, KvFormat};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::draft::ChainDraft;
use ashlar_zoo::ingest::{AddOptions, Recipe, Silent, add};
use ashlar_zoo::manifest::{Chain, TensorRef};
use ashlar_zoo::store::{Compression, Zoo};
use ashlar_zoo::surrogate::{Plan, Units};
use ashlar_zoo::tensor_file;

const PROMPTS: [&[u32]; 2] = [&[5, 100, 17, 204, 9], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]];

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: 1, isa: None, bf16_compute: Bf16Compute::F32 }))
}

fn plan(feed_forward: Option<&str>, heads: Option<&str>) -> Plan {
    Plan { feed_forward: feed_forward.map(|s| s.parse().unwrap()), heads: heads.map(|s| s.parse().unwrap()), blocks: None }
}

/// Tokens that repeat themselves here and there.
fn windows(vocab: u32) -> Vec<Vec<u32>> {
    (0..6u32).map(|w| (0..64u32).map(|t| (w * 31 + t * t * 7 + t % 5) % vocab).collect()).collect()
}

async fn zoo_of(checkpoint: &Checkpoint, recipe: Recipe) -> (tempfile::TempDir, Zoo, Digest) {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    checkpoint.write(&dir.path().join("a"));
    let chain = checkpoints::add_dir(&zoo, &dir.path().join("a"), "demo/a", recipe).await.unwrap().chain;
    (dir, zoo, chain)
}

/// Makes and stores a surrogate of demo/a.
async fn surrogate(zoo: &Zoo, plan: Plan, calibration: Option<Calibration>, name: &str) -> Result<(Digest, Vec<CutBlock>), SurrogateError> {
    let name = name.parse().unwrap();
    let source = zoo.resolve(&"demo/a".parse().unwrap()).await.unwrap();
    let counts = plan.counts(&source.blocks).unwrap();
    let mut draft = ChainDraft::new(zoo, source, Some(&name)).await.unwrap();
    let made = make(&cpu(), &mut draft, &counts, calibration, &Silent).await?;
    assert_eq!(made.iter().map(|block| (block.index, block.kept.len())).collect::<Vec<_>>(), counts.into_iter().collect::<Vec<_>>());
    Ok((draft.store(&name, 1, None).await.unwrap(), made))
}

/// The source with zeros in the columns of the second layers that went, as f32.
async fn zeroed(zoo: &Zoo, chain: Digest, made: &[CutBlock]) -> Digest {
    let mut chain: Chain = zoo.read_chain(chain).await.unwrap();
    for cut in made {
        let mapped = zoo.map_block(chain.blocks[cut.index]).await.unwrap();
        let mut block = mapped.block.clone();
        let units = Units::of(&block.params).unwrap();
        let (kept, tensor) = (units.inputs(&cut.kept), &mapped.tensors[units.second]);
        let mut values = dequantise(&tensor.view());
        for (at, value) in values.iter_mut().enumerate() {
            if kept.binary_search(&(at % tensor.cols())).is_err() {
                *value = 0.0;
            }
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = block.tensors[units.second].shape.clone();
        let reference = TensorRef { digest: tensor_file::digest(Dtype::F32, &shape, &bytes), dtype: Dtype::F32, shape };
        zoo.put_tensor(&reference, bytes.into(), Compression::Off).await.unwrap();
        block.tensors.insert(units.second.to_owned(), reference);
        chain.blocks[cut.index] = zoo.put_block(&block).await.unwrap().0;
    }
    zoo.put_chain(&chain).await.unwrap().0
}

/// The last logits of each prompt.
async fn logits(zoo: &Zoo, chain: Digest) -> Vec<Vec<f32>> {
    let limits = AloneLimits { chunk_tokens_max: 16, tokens_max: 64, page_tokens: 16, kv_format: KvFormat::F32 };
    let mut model = Alone::load(cpu(), zoo, chain, limits).await.unwrap();
    let mut last = |prompt: &&[u32]| {
        model.restart();
        model.feed(prompt, 16, 1).remove(0)
    };
    PROMPTS.iter().map(&mut last).collect()
}

/// How far logits are from others, as a share of what these are.
fn apart(a: &[Vec<f32>], of: &[Vec<f32>]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let difference = squares(&mut a.iter().flatten().zip(of.iter().flatten()).map(|(a, b)| a - b));
    (difference / squares(&mut of.iter().flatten().copied())).sqrt()
}

#[tokio::test]
async fn a_cut_block_says_what_the_whole_one_says_with_zeros_in_the_columns_that_went() {
    let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny");
    for (family, heads) in
        [("llama", Some("0.5")), ("qwen3", Some("0.5")), ("gemma2", Some("0.5")), ("gpt2", Some("0.5")), ("llama-bias", None)]
    {
        let dir = tempfile::tempdir().unwrap();
        let zoo = Zoo::create_dir(dir.path()).await.unwrap();
        let options = AddOptions { recipe: Recipe::F32, ..AddOptions::new("demo/a".parse().unwrap()) };
        let source = add(&zoo, &tiny.join(family), &options, &Silent).await.unwrap().chain;
        let vocab = zoo.read_chain(source).await.unwrap().vocab;
        let prompts_fit = PROMPTS.iter().all(|prompt| prompt.iter().all(|token| *token < vocab));
        assert!(prompts_fit, "{family} knows {vocab} tokens");
        for (name, calibration) in [("demo/weights", None), ("demo/text", Some(Calibration { windows: windows(vocab), refits: false }))] {
            let (chain, made) = surrogate(&zoo, plan(Some("0.6"), heads), calibration, name).await.unwrap();
            let whole = zeroed(&zoo, source, &made).await;
            let (cut, whole, of_source) = (logits(&zoo, chain).await, logits(&zoo, whole).await, logits(&zoo, source).await);
            // The sums are the same but for where they are rounded.
            assert!(apart(&cut, &whole) < 1e-5, "{family} {name}: {}", apart(&cut, &whole));
            assert!(apart(&cut, &of_source) > 1e-3, "{family} {name}: {}", apart(&cut, &of_source));
        }
    }
}

#[tokio::test]
async fn columns_and_heads_that_are_planted_dead_are_the_ones_that_go_and_nothing_changes() {
    let mut checkpoint = Checkpoint::llama(3);
    // Every third column of 96, and in each layer one of two key-value heads with its two query heads.
    let is_dead = |column: usize| column % 3 == 1;
    for layer in 0..2 {
        let up = checkpoint.tensors.get_mut(&format!("model.layers.{layer}.mlp.up_proj.weight")).unwrap();
        up.1.chunks_mut(D).enumerate().filter(|(row, _)| is_dead(*row)).for_each(|(_, row)| row.fill(0.0));
        let values = checkpoint.tensors.get_mut(&format!("model.layers.{layer}.self_attn.v_proj.weight")).unwrap();
        values.1[layer * HEAD_DIM * D..(layer + 1) * HEAD_DIM * D].fill(0.0);
    }
    for recipe in [Recipe::Keep, Recipe::Bf16] {
        let (_dir, zoo, source) = zoo_of(&checkpoint, recipe).await;
        let expected = logits(&zoo, source).await;
        let text = |refits| Some(Calibration { windows: windows(200), refits });
        for (name, calibration) in [("demo/weights", None), ("demo/text", text(false)), ("demo/refit", text(true))] {
            let (chain, made) = surrogate(&zoo, plan(Some("0.67"), Some("0.5")), calibration, name).await.unwrap();
            let live: Vec<usize> = (0..INNER).filter(|column| !is_dead(*column)).collect();
            let kept: Vec<(usize, Vec<usize>, f64)> = made.into_iter().map(|block| (block.index, block.kept, block.lost_share)).collect();
            assert_eq!(kept, [(1, vec![1], 0.0), (2, live.clone(), 0.0), (3, vec![0], 0.0), (4, live, 0.0)], "{name}");
            let logits = logits(&zoo, chain).await;
            assert!(apart(&logits, &expected) < 1e-5, "{recipe:?} {name}: {}", apart(&logits, &expected));
        }
        let blocks = |name: &str| {
            let (zoo, name) = (zoo.clone(), name.parse().unwrap());
            async move { zoo.resolve(&name).await.unwrap().chain.blocks }
        };
        // There is nothing to make up for, so not a bit of what stays moves.
        assert_eq!(blocks("demo/text").await, blocks("demo/refit").await);
    }
}

#[tokio::test]
async fn a_refit_brings_a_model_nearer_to_what_it_was_than_either_choice() {
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/base");
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(dir.path()).await.unwrap();
    let source = add(&zoo, &demo, &AddOptions::new("demo/a".parse().unwrap()), &Silent).await.unwrap().chain;
    let expected = logits(&zoo, source).await;
    let (mut errors, windows) = (Vec::new(), windows(zoo.read_chain(source).await.unwrap().vocab));
    let text = |refits| Some(Calibration { windows: windows.clone(), refits });
    for (name, calibration) in [("demo/weights", None), ("demo/text", text(false)), ("demo/refit", text(true))] {
        let (chain, _) = surrogate(&zoo, plan(Some("0.5"), Some("0.5")), calibration, name).await.unwrap();
        errors.push(apart(&logits(&zoo, chain).await, &expected));
    }
    // Which choice alone is the nearer one depends on the tokens: errors of blocks add up otherwise than those of one block.
    assert!(errors[2] < 0.9 * errors[0].min(errors[1]), "by weights, calibrated, refitted: {errors:?}");
}

#[tokio::test]
async fn a_quantised_source_is_cut_in_the_form_that_it_has() {
    let (_dir, zoo, source) = zoo_of(&Checkpoint::llama(5), Recipe::Int8).await;
    let calibration = Some(Calibration { windows: windows(200), refits: false });
    let (chain, made) = surrogate(&zoo, plan(Some("0.67"), Some("0.5")), calibration, "demo/half").await.unwrap();
    for cut in &made {
        let block = zoo.read_block(zoo.read_chain(chain).await.unwrap().blocks[cut.index]).await.unwrap();
        let matrices = block.tensors.values().filter(|tensor| tensor.shape.len() == 2);
        assert!(matrices.map(|tensor| tensor.dtype).all(|dtype| dtype == Dtype::Int8 { group: 32 }), "{:?}", block.tensors);
    }
    // Weights and the inputs that meet them are rounded to eight bits in other groups.
    let whole = zeroed(&zoo, source, &made).await;
    let (cut, whole, source) = (logits(&zoo, chain).await, logits(&zoo, whole).await, logits(&zoo, source).await);
    assert!(apart(&cut, &whole) < 0.2 * apart(&cut, &source), "{} {}", apart(&cut, &whole), apart(&cut, &source));
}
