//! The engine over the CUDA device: whatever the batches, chunks and pages, the tokens are those of the CPU, to the last bit of their
//! log probabilities. The card is emulated, so that what is proven is the device and its kernels' logic, on any machine.

use ashlar_executor::state::limits::Limits;
use ashlar_kernels::cpu::{CpuOptions, Isa};
use ashlar_kernels::ops::{Bf16Compute, KvFormat};

use crate::support::cuda;
use crate::together::{Family, adapted_family, compressed_family, family, limits, requests, start, start_on, tokens, whole};

/// Several at once on the card against each alone on the CPU. A few of the requests, as a lane takes as long here as a core.
async fn together_on_a_card(family: &Family, kv_format: KvFormat) {
    let limits = || Limits { kv_format, ..limits() };
    let scalar = CpuOptions { threads: 1, isa: Some(Isa::Scalar), bf16_compute: Bf16Compute::F32 };
    let alone = start(family, Limits { prefix_cache: false, ..limits() }, scalar).await;
    let few = || {
        requests(family).into_iter().step_by(3).map(|mut request| {
            request.generated_tokens_max = 4;
            request
        })
    };
    let mut golden = Vec::new();
    for request in few() {
        golden.push(tokens(&alone, request).await);
    }
    let Some(card) = cuda() else { return };
    let card = start_on(&family.zoo, "exe_test", whole(family), Limits { chunk_tokens_max: 16, ..limits() }, Bf16Compute::F32, card).await;
    // Twice: the second round meets a warm prefix cache.
    for round in 0..2 {
        let all = few().map(|mut request| {
            request.sequence_id += 100 * round;
            let card = card.clone();
            tokio::spawn(async move { tokens(&card, request).await })
        });
        let together = futures::future::join_all(all.collect::<Vec<_>>()).await;
        for (i, (tokens, golden)) in together.into_iter().zip(&golden).enumerate() {
            assert_eq!(&tokens.unwrap(), golden, "round {round}, sequence {i}");
        }
    }
    card.check_integrity().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_card_gives_the_tokens_of_the_cpu() {
    together_on_a_card(&family().await, KvFormat::F32).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_card_with_bf16_pages_gives_the_tokens_of_the_cpu() {
    together_on_a_card(&family().await, KvFormat::Bf16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_card_with_int8_pages_and_adapters_gives_the_tokens_of_the_cpu() {
    together_on_a_card(&adapted_family().await, KvFormat::Int8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_card_with_compressed_differences_gives_the_tokens_of_the_cpu() {
    together_on_a_card(&compressed_family().await, KvFormat::F32).await;
}
