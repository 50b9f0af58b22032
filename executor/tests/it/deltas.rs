//! Fine-tunes as base and compressed differences: they give the tokens of the same sum in whole f32 matrices, and are nearer to the fine-tune
//! than the base is.

use std::path::Path;
use std::sync::Arc;

use crate::summed::summed;
use ashlar_executor::model::alone::{Alone, AloneLimits};
use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::{Bf16Compute, KvFormat};
use ashlar_zoo::ingest::{AddOptions, Silent, add};
use ashlar_zoo::relatives::{Kept, compress};
use ashlar_zoo::store::Zoo;

const PROMPTS: [&[u32]; 3] = [&[5, 300, 17, 1204, 9], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], &[2047, 1000]];

#[tokio::test]
async fn tokens_are_those_of_base_plus_difference_in_f32() {
    let folder = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(folder.path()).await.unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo");
    for name in ["base", "shakespeare-top"] {
        add(&zoo, &demo.join(name), &AddOptions::new(format!("demo/{name}").parse().unwrap()), &Silent).await.unwrap();
    }
    let viewer = zoo.viewer("demo").await.unwrap();
    let [base, tuned] = ["demo/base", "demo/shakespeare-top"].map(|id| id.parse().unwrap());
    let (of_base, of_tuned) = (zoo.read_model(&base).await.unwrap().chain, zoo.read_model(&tuned).await.unwrap().chain);
    let ops = Arc::new(Cpu::new(CpuOptions { threads: 1, isa: None, bf16_compute: Bf16Compute::F32 }));
    let limits = AloneLimits { chunk_tokens_max: 16, tokens_max: 64, page_tokens: 16, kv_format: KvFormat::F32 };
    // Activations that meet one-bit differences are quantised to 8 bits; those that meet factors are not.
    for (method, tolerance) in [("svd:8", 1e-4), ("bitdelta", 0.02)] {
        let how = (method.parse().unwrap(), Kept::default());
        let compressed = compress(&zoo, ("demo", &viewer), &tuned, None, how).await.unwrap();
        let chain = compressed.adapted.store(&zoo, &format!("demo/{}", method.replace(':', "-")).parse().unwrap(), 1, None).await.unwrap();
        let mut models = Vec::new();
        for chain in [chain, summed(&zoo, chain).await, of_tuned, of_base] {
            models.push(Alone::load(Arc::clone(&ops), &zoo, chain, limits).await.unwrap());
        }
        let mut apart = [0.0f64; 3];
        for prompt in PROMPTS {
            let [compressed, others @ ..] = models.as_mut_slice() else { unreachable!("four models") };
            let expected = compressed.greedy(prompt, 24, 16).tokens;
            assert_eq!(others[0].greedy(prompt, 24, 16).tokens, expected, "{method}, {prompt:?}");
            compressed.restart();
            let row = compressed.feed(prompt, 16, 1).remove(0);
            let rows = others.iter_mut().map(|other| {
                other.restart();
                other.feed(prompt, 16, 1).remove(0)
            });
            let rows: Vec<Vec<f32>> = rows.collect();
            let squares = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            apart[0] += squares(&row, &rows[0]);
            apart[1] += squares(&row, &rows[1]);
            apart[2] += squares(&rows[2], &rows[1]);
        }
        let [sum, tuned, base] = apart.map(f64::sqrt);
        println!("{method}: {sum:.2e} from the sum, {tuned:.2e} from the fine-tune, which is {base:.2e} from the base");
        assert!(sum < tolerance * base, "{method}: {sum} of {base} from the sum in f32");
        // Eight of 128 singular values leave most of the logits' distance, yet not all.
        assert!(tuned < 0.9 * base, "{method}: {tuned} from the fine-tune, which is {base} from its base");
    }
}
