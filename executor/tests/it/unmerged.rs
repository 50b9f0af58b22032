//! A merged LoRA that the zoo unmerged: base and adapters give the tokens of the same sum in whole f32 matrices, and say what the merged
//! model says.

use std::path::Path;
use std::sync::Arc;

use crate::summed::summed;
use ashlar_executor::model::alone::{Alone, AloneLimits};
use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::{Bf16Compute, KvFormat};
use ashlar_zoo::ingest::{AddOptions, Silent, add};
use ashlar_zoo::relatives::propose;
use ashlar_zoo::store::Zoo;

const PROMPTS: [&[u32]; 3] = [&[5, 300, 17, 1204, 9], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], &[2047, 1000]];

#[tokio::test]
async fn unmerged_tokens_are_those_of_base_plus_adapter_in_f32_and_of_the_merged_model() {
    let folder = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(folder.path()).await.unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo");
    for name in ["base", "math-lora"] {
        add(&zoo, &demo.join(name), &AddOptions::new(format!("demo/{name}").parse().unwrap()), &Silent).await.unwrap();
    }
    let viewer = zoo.viewer("demo").await.unwrap();
    let model = "demo/math-lora".parse().unwrap();
    let proposal = propose(&zoo, ("demo", &viewer), &model, None, 64).await.unwrap();
    let unmerged = proposal.adapted.store(&zoo, &"demo/unmerged".parse().unwrap(), 1, None).await.unwrap();
    let sum = summed(&zoo, unmerged).await;
    let [base, merged] = ["demo/base", "demo/math-lora"].map(|id| id.parse().unwrap());
    let (base, merged) = (zoo.read_model(&base).await.unwrap().chain, zoo.read_model(&merged).await.unwrap().chain);

    let ops = Arc::new(Cpu::new(CpuOptions { threads: 1, isa: None, bf16_compute: Bf16Compute::F32 }));
    let limits = AloneLimits { chunk_tokens_max: 16, tokens_max: 64, page_tokens: 16, kv_format: KvFormat::F32 };
    let mut models = Vec::new();
    for chain in [unmerged, sum, merged, base] {
        models.push(Alone::load(Arc::clone(&ops), &zoo, chain, limits).await.unwrap());
    }
    let mut farthest = [0.0f32; 3];
    for prompt in PROMPTS {
        let [unmerged, others @ ..] = models.as_mut_slice() else { unreachable!("four models") };
        let expected = unmerged.greedy(prompt, 24, 16);
        assert_eq!(others[0].greedy(prompt, 24, 16).tokens, expected.tokens, "base + adapter in f32, {prompt:?}");
        assert_eq!(others[1].greedy(prompt, 24, 16).tokens, expected.tokens, "merged, {prompt:?}");
        for (farthest, other) in farthest.iter_mut().zip(others) {
            other.restart();
            unmerged.restart();
            let (a, b) = (unmerged.feed(prompt, 16, 1).remove(0), other.feed(prompt, 16, 1).remove(0));
            *farthest = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(*farthest, f32::max);
        }
    }
    // The sum differs by the order of additions alone, the merged model by the rounding of its weights; the base is another model.
    let [sum, merged, base] = farthest;
    assert!(sum < 1e-4 && merged < 0.05 && base > 4.0 * merged, "{farthest:?}");
}
