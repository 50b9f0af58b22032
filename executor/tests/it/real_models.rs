//! Real models against Hugging Face transformers: 64 greedy tokens of each prompt, weights as f32 (scripts/goldens/real.py says how
//! the goldens were taken). They run where `ASHLAR_MODELS` names the folder that scripts/fetch-models.sh filled; the two larger
//! models only by scripts/test-real-models.sh.

use std::path::PathBuf;

use crate::support::{Home, argmax, cpu, data, read_json};
use ashlar_executor::model::alone::AloneLimits;
use ashlar_kernels::ops::KvFormat;
use ashlar_zoo::ingest::Recipe;

/// A token may differ from the golden one only where the two best logits are this close there.
const MARGIN: f32 = 1e-3;

/// real/<model>.json, as far as it is needed here.
#[derive(serde::Deserialize)]
struct Golden {
    /// Name of the model file.
    file: String,
    prompts: Vec<Prompt>,
}

#[derive(serde::Deserialize)]
struct Prompt {
    name: String,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    /// Best minus second best logit where each token was chosen.
    margins: Vec<f32>,
}

/// Where the model file is; `None`, with a line, where the environment does not ask for real models.
fn model_file(name: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("ASHLAR_MODELS").filter(|folder| !folder.is_empty()) else {
        println!("skipped: ASHLAR_MODELS is not set");
        return None;
    };
    let path = PathBuf::from(folder).join(name);
    assert!(path.is_file(), "ASHLAR_MODELS is set, but {} is not there: run scripts/fetch-models.sh", path.display());
    Some(path)
}

/// Every step is fed the golden token, so that one close call does not hide what comes after it.
fn check(model: &str) {
    let golden: Golden = read_json(&data("real").join(format!("{model}.json")));
    let Some(path) = model_file(&golden.file) else {
        return;
    };
    let tokens_max = golden.prompts.iter().map(|p| p.prompt.len() + p.greedy.len()).max().unwrap();
    let home = Home::of(&path, Recipe::F32);
    let mut alone = home.load(cpu(), AloneLimits { chunk_tokens_max: 64, tokens_max, page_tokens: 16, kv_format: KvFormat::F32 });
    let (mut excused, mut wrong) = (Vec::new(), Vec::new());
    for prompt in &golden.prompts {
        alone.restart();
        let mut row = alone.feed(&prompt.prompt, 64, 1).remove(0);
        for (step, (token, margin)) in std::iter::zip(&prompt.greedy, &prompt.margins).enumerate() {
            let ours = argmax(&row);
            if ours != *token {
                let gap = row[ours as usize] - row[*token as usize];
                let line = format!("{}: step {step}: ours {ours} by {gap:.1e}, golden {token} by {margin:.1e}", prompt.name);
                if *margin < MARGIN { excused.push(line) } else { wrong.push(line) }
            }
            row = alone.feed(&[*token], 1, 1).remove(0);
        }
    }
    let tokens: usize = golden.prompts.iter().map(|p| p.greedy.len()).sum();
    println!("{model}: {tokens} tokens, {} excused {excused:#?}", excused.len());
    assert!(wrong.is_empty(), "{model}: {wrong:#?}");
}

#[test]
fn smollm2_gives_the_tokens_of_transformers() {
    check("smollm2");
}

#[test]
#[ignore = "large: run by scripts/test-real-models.sh"]
fn gemma3_gives_the_tokens_of_transformers() {
    check("gemma3");
}

#[test]
#[ignore = "large: run by scripts/test-real-models.sh"]
fn qwen2_5_coder_gives_the_tokens_of_transformers() {
    check("qwen2.5-coder");
}
