//! Tiny models of every family against Hugging Face transformers, and tiny adapters over them against PEFT (scripts/goldens/golden.py says how the goldens were taken), and the
//! promise of docs/numerics.md: the same bits from every backend, whatever the chunks, the pages and the cuts of the chain.

use std::collections::BTreeSet;
use std::path::Path;

use crate::support::{Home, argmax, cpu, cuda, data, read_json};
use ashlar_executor::model::alone::{Alone, AloneLimits};
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa};
use ashlar_kernels::ops::{Bf16Compute, KvFormat, Ops};
use ashlar_kernels::reference::Reference;
use ashlar_zoo::ingest::Recipe;

/// Largest difference from a golden logit where weights are computed as floats. Logits have a deviation of about 2.
const TOLERANCE: f32 = 1e-3;
/// The same where weights stay integers and activations are quantised to 8 bits (docs/numerics.md, rule 3).
const TOLERANCE_INTEGER: f32 = 1.0;

/// The same between activations as bf16 and as f32.
const TOLERANCE_BF16: f32 = 0.25;

/// golden.json.
#[derive(serde::Deserialize)]
struct Golden {
    prompt: Vec<u32>,
    decode: Vec<u32>,
    margins: Vec<f32>,
    /// Of an adapter, the family that it is over.
    base: Option<String>,
    #[serde(skip)]
    rows: Vec<Vec<f32>>,
}

impl Golden {
    fn read(folder: &Path) -> Self {
        let mut golden: Self = read_json(&folder.join("golden.json"));
        let bytes = std::fs::read(folder.join("logits.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let logits = file.tensor("logits").unwrap();
        let values: Vec<f32> = logits.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        golden.rows = values.chunks_exact(logits.shape()[1]).map(<[f32]>::to_vec).collect();
        golden
    }

    /// Rows of logits: for the last tokens of the prompt and every decoded one.
    fn compute<B: Ops>(&self, alone: &mut Alone<B>, chunk: usize) -> Vec<Vec<f32>> {
        alone.restart();
        let prompt_rows = self.rows.len() - self.decode.len();
        let mut rows = alone.feed(&self.prompt, chunk, prompt_rows);
        for token in &self.decode {
            rows.extend(alone.feed(&[*token], 1, 1));
        }
        rows
    }

    /// The same rows with prompt and decoded tokens in one go, cut in chunks.
    fn compute_at_once<B: Ops>(&self, alone: &mut Alone<B>, chunk: usize) -> Vec<Vec<f32>> {
        alone.restart();
        alone.feed(&[&self.prompt[..], &self.decode].concat(), chunk, self.rows.len())
    }
}

/// Runs one family.
fn check(family: &str, recipe: Recipe, tolerance: f32) {
    let folder = data("tiny").join(family);
    let gguf = folder.join("model.gguf");
    let home = Home::of(if gguf.is_file() { &gguf } else { &folder }, recipe);
    check_home(&format!("{family} {recipe:?}"), &Golden::read(&folder), &home, tolerance);
}

/// Runs one adapter over its base, which the recipe is for.
fn check_adapter(name: &str, recipe: Recipe, tolerance: f32) {
    let folder = data("adapters").join(name);
    let golden = Golden::read(&folder);
    let base = data("tiny").join(golden.base.as_ref().expect("an adapter has a base"));
    check_home(&format!("{name} {recipe:?}"), &golden, &Home::of_last(&[&base, &folder], recipe), tolerance);
}

/// Runs one model; prints and bounds its largest difference.
fn check_home(family: &str, golden: &Golden, home: &Home, tolerance: f32) {
    let limits = |page_tokens| AloneLimits { chunk_tokens_max: 64, tokens_max: 80, page_tokens, kv_format: KvFormat::F32 };

    let mut reference = home.load(Reference::default(), limits(16));
    let truth = golden.compute(&mut reference, 64);
    let difference = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        assert_eq!(a.len(), b.len(), "{family}: vocabulary");
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    let worst = truth.iter().zip(&golden.rows).map(difference).fold(0.0, f32::max);
    println!("{family}: largest logit difference {worst:.2e}");
    assert!(worst < tolerance, "{family}: largest logit difference {worst:.2e}");
    let first = golden.rows.len() - golden.decode.len() - 1;
    for (step, token) in golden.decode.iter().enumerate() {
        let ours = argmax(&truth[first + step]);
        assert!(ours == *token || golden.margins[step] < 2.0 * worst, "{family}: step {step} chose {ours}, golden {token}");
    }

    let same = |rows: Vec<Vec<f32>>, what: &str| {
        let bits = |rows: &[Vec<f32>]| rows.iter().flatten().map(|x| x.to_bits()).collect::<Vec<u32>>();
        assert!(bits(&rows) == bits(&truth), "{family}: bits differ: {what}");
    };
    let mut fast = home.load(cpu(), limits(32));
    let count = reference.block_count();
    for chunk in [1, 7, 16, 64] {
        same(golden.compute(&mut fast, chunk), &format!("cpu, chunks of {chunk}"));
        same(golden.compute_at_once(&mut fast, chunk), &format!("cpu, at once in chunks of {chunk}"));
    }
    same(golden.compute(&mut reference, 7), "reference, chunks of 7");
    if let Some(cuda) = cuda() {
        same(golden.compute(&mut home.load(cuda, limits(32)), 7), "cuda emulated, chunks of 7");
    }
    // Behind each kind of block once.
    for at in [1, count / 2, count / 2 + 1, count - 1] {
        fast.cut_at(at);
        same(golden.compute(&mut fast, 16), &format!("cpu, cut before block {at}"));
    }
}

macro_rules! families {
    ($($test:ident $family:literal)*) => {
        $(#[test]
        fn $test() {
            check($family, Recipe::Keep, TOLERANCE);
        })*

        const FAMILIES: &[&str] = &[$($family),*];
    };
}

macro_rules! adapters {
    ($($test:ident $adapter:literal)*) => {
        $(#[test]
        fn $test() {
            check_adapter($adapter, Recipe::Keep, TOLERANCE);
        })*

        const ADAPTERS: &[&str] = &[$($adapter),*];
    };
}

macro_rules! gguf_families {
    ($($test:ident $family:literal)*) => {
        $(#[test]
        fn $test() {
            check($family, Recipe::F32, TOLERANCE);
            check($family, Recipe::Keep, TOLERANCE_INTEGER);
        })*

        const GGUF_FAMILIES: &[&str] = &[$($family),*];
    };
}

families! {
    gemma2_matches_transformers "gemma2"
    gemma3_matches_transformers "gemma3"
    gemma3_with_softcaps_matches_transformers "gemma3-softcap"
    gpt2_matches_transformers "gpt2"
    llama_matches_transformers "llama"
    llama_with_biases_matches_transformers "llama-bias"
    llama_in_f16_shards_matches_transformers "llama-f16-sharded"
    llama3_matches_transformers "llama3"
    mistral_matches_transformers "mistral"
    phi3_matches_transformers "phi3"
    qwen2_matches_transformers "qwen2"
    qwen3_matches_transformers "qwen3"
    qwen3_with_windows_matches_transformers "qwen3-window"
}

adapters! {
    adapter_on_conv1d_matches_peft "gpt2-fused"
    adapter_with_biases_and_a_head_matches_peft "llama-bias-whole"
    adapter_with_patterns_matches_peft "llama-patterns"
    adapter_on_q_and_v_matches_peft "llama-qv"
    adapter_on_fused_matrices_matches_peft "phi3-fused"
    adapter_on_one_layer_matches_peft "qwen2-layer"
}

gguf_families! {
    gguf_gemma3_matches_transformers "gguf-gemma3"
    gguf_gpt2_matches_transformers "gguf-gpt2"
    gguf_llama_matches_transformers "gguf-llama"
    gguf_llama_in_k_quants_matches_transformers "gguf-llama-k"
    gguf_phi3_matches_transformers "gguf-phi3"
    gguf_qwen2_matches_transformers "gguf-qwen2"
    gguf_qwen3_matches_transformers "gguf-qwen3"
}

/// Runs one ready-quantised checkpoint: as f32 its weights are those of the golden, kept they are the same with activations of 8 bits.
fn check_quantised(name: &str, kept: f32) {
    let folder = data("quantised").join(name);
    let golden = Golden::read(&folder);
    for (recipe, tolerance) in [(Recipe::F32, TOLERANCE), (Recipe::Keep, kept)] {
        check_home(&format!("{name} {recipe:?}"), &golden, &Home::of(&folder, recipe), tolerance);
    }
}

macro_rules! quantised {
    ($($test:ident $name:literal $kept:ident)*) => {
        $(#[test]
        fn $test() {
            check_quantised($name, $kept);
        })*

        const QUANTISED: &[&str] = &[$($name),*];
    };
}

quantised! {
    awq_matches_its_dequantised_weights "awq-phi3" TOLERANCE_INTEGER
    compressed_int4_matches_its_dequantised_weights "ct-gemma3-int4" TOLERANCE_INTEGER
    compressed_int8_matches_its_dequantised_weights "ct-mistral-int8" TOLERANCE_INTEGER
    compressed_fp8_matches_its_dequantised_weights "ct-qwen3-fp8" TOLERANCE
    fp8_of_one_scale_matches_its_dequantised_weights "fp8-llama3-tensor" TOLERANCE
    fp8_in_blocks_matches_its_dequantised_weights "fp8-qwen3-blocks" TOLERANCE
    gptq_matches_its_dequantised_weights "gptq-llama" TOLERANCE_INTEGER
    gptq_of_conv1d_matches_its_dequantised_weights "gptq-gpt2" TOLERANCE_INTEGER
    gptq_in_the_order_of_activations_matches_its_dequantised_weights "gptq-qwen2-order" TOLERANCE
}

/// Nothing to compare the numbers with: weights lose bits here. What must hold is that every backend loses the same.
#[test]
fn quantised_recipes_have_the_same_bits_everywhere() {
    for recipe in [Recipe::Int8, Recipe::Int4, Recipe::Bf16] {
        check("llama", recipe, f32::INFINITY);
        check("gemma3", recipe, f32::INFINITY);
        check_adapter("llama-patterns", recipe, f32::INFINITY);
    }
}

/// Activations lose bits too: every instruction set loses the same, in any chunks, and how many is bounded.
#[test]
fn bf16_activations_have_the_same_bits_everywhere() {
    for family in ["llama", "gemma3", "qwen2"] {
        let golden = Golden::read(&data("tiny").join(family));
        let home = Home::of(&data("tiny").join(family), Recipe::Bf16);
        let limits = AloneLimits { chunk_tokens_max: 64, tokens_max: 80, page_tokens: 16, kv_format: KvFormat::F32 };
        let bits = |rows: &[Vec<f32>]| rows.iter().flatten().map(|x| x.to_bits()).collect::<Vec<u32>>();
        let reference = |bf16_compute| golden.compute(&mut home.load(Reference { bf16_compute }, limits), 64);
        let (truth, from_f32) = (reference(Bf16Compute::Bf16), reference(Bf16Compute::F32));
        let worst = truth.iter().flatten().zip(from_f32.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{family}: activations as bf16 change a logit by {worst:.2e} at most");
        assert!(0.0 < worst && worst < TOLERANCE_BF16, "{family}: {worst:.2e}");
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let mut fast = home.load(Cpu::new(CpuOptions { threads: 2, isa: Some(isa), bf16_compute: Bf16Compute::Bf16 }), limits);
            for chunk in [1, 7, 64] {
                assert!(bits(&golden.compute(&mut fast, chunk)) == bits(&truth), "{family}: bits differ: {isa:?}, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn every_golden_is_listed() {
    let families: Vec<&str> = FAMILIES.iter().chain(GGUF_FAMILIES).copied().collect();
    for (folder, listed) in [("tiny", families.as_slice()), ("adapters", ADAPTERS), ("quantised", QUANTISED)] {
        let listed: BTreeSet<String> = listed.iter().map(|name| (*name).to_owned()).collect();
        let entries = std::fs::read_dir(data(folder)).unwrap().map(|entry| entry.unwrap());
        let found: BTreeSet<String> =
            entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name().into_string().unwrap()).collect();
        assert_eq!(listed, found);
    }
}
