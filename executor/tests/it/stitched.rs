//! Chains of two models of other widths with a map between (docs/stitch.md), served by a real executor beside these models: in any company, cut
//! at either side of the stitch, also over two executors. And that the map which is fitted between a model and itself changes nothing.

use std::sync::Arc;

use ashlar_executor::io::executor::ExecutorHandle;
use ashlar_executor::io::service::Service;
use ashlar_executor::model::alone::{Alone, AloneLimits};
use ashlar_executor::model::block::LoadedBlock;
use ashlar_executor::model::outputs::Outputs;
use ashlar_executor::model::quality::{Tally, Windows};
use ashlar_executor::model::stitch::fit;
use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::{Bf16Compute, KvFormat};
use ashlar_registry::ChainDigest;
use ashlar_registry::record::SpanAssignment;
use ashlar_wire::v1;
use ashlar_wire::v1::executor_server::ExecutorServer;
use ashlar_zoo::digest::lineages;
use ashlar_zoo::stitch::Seam;
use tokio_stream::StreamExt;

use crate::stitches;
use crate::together::{Family, admission, eight_together_in_any_chunks, family_of, limits, start, start_with, tokens};

/// Where the stitch is in the chains of [`family`].
const STITCHES: [Option<usize>; 5] = [None, None, Some(5), Some(7), Some(7)];

/// Two models of other widths, and stitches from the one to the other and back. The last two part behind the stitch.
async fn family() -> Family {
    let mut family = family_of("../../demo", &[]).await;
    let [base, other] = stitches::models(&family.zoo).await;
    let narrowing = stitches::stitched(&family.zoo, ("demo/base", 3), ("demo/other", 1), 1).await;
    let widening = stitches::stitched(&family.zoo, ("demo/other", 2), ("demo/base", 5), 2).await;
    // Behind `embed, 3 layers, stitch` come the other model's layers 1 and 2: the feed-forward block of the last becomes that of its first.
    let parted = stitches::parted(&family.zoo, narrowing, 11, other, 2).await;
    for chain in [base, other, widening, narrowing, parted] {
        family.push(chain).await;
    }
    family
}

fn one_thread() -> CpuOptions {
    CpuOptions { threads: 1, ..CpuOptions::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_together_through_stitches_give_the_tokens_of_each_alone() {
    eight_together_in_any_chunks(&family().await, KvFormat::F32, Bf16Compute::F32).await;
}

/// A chain that is cut on either side of its stitch gives the bits of one that is not; the engine gives its tokens, and shares what lies before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_may_be_cut_at_its_stitch_and_models_share_what_lies_before() {
    let family = family().await;
    let prompt: Vec<u32> = (0..50).map(|t| (t * 37) % 2000).collect();
    let handle = start(&family, limits(), CpuOptions { threads: 2, ..CpuOptions::default() }).await;
    let mut seen = Vec::new();
    for (model, stitch) in STITCHES.into_iter().enumerate() {
        let ops = Arc::new(Cpu::new(one_thread()));
        let alone = AloneLimits { chunk_tokens_max: 64, tokens_max: 80, page_tokens: 16, kv_format: KvFormat::F32 };
        let mut alone = Alone::load(ops, &family.zoo, family.chains[model].0, alone).await.unwrap();
        let expected = alone.greedy(&prompt, 24, 64);
        for cut in stitch.into_iter().flat_map(|stitch| [stitch - 1, stitch, stitch + 1]) {
            alone.cut_at(cut);
            assert!(alone.greedy(&prompt, 24, 7) == expected, "model {model} cut at {cut}");
        }
        let mut events = handle.run(admission(&family, model as u64, model, prompt.clone(), v1::Sampling::default()));
        let (mut tokens, mut cached) = (Vec::new(), 0);
        while let Some(event) = events.next().await {
            match event {
                v1::sequence_event::Event::Started(started) => cached = started.cached_tokens,
                v1::sequence_event::Event::Token(token) => tokens.push(token.token),
                v1::sequence_event::Event::Failed(failed) => panic!("{}: {}", failed.code, failed.message),
                v1::sequence_event::Event::Finished(_) => {}
            }
        }
        assert_eq!(tokens, expected.tokens, "model {model}");
        assert!(!seen.contains(&expected.rows), "model {model} is like another");
        seen.push(expected.rows);
        // Three pages are full. What a model shares with one before it, of its 13 blocks: five, seven, and all attention blocks.
        let shared = [0, 0, 48 * 5 / 13, 48 * 7 / 13, 48];
        assert_eq!(cached, shared[model], "model {model}");
    }
    handle.check_integrity().await.unwrap();
}

/// Rows cross the link in the width that they have there: in front of the stitch the one, behind it the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_over_two_executors_is_cut_on_either_side_of_its_stitch() {
    let family = family().await;
    let whole = start(&family, limits(), one_thread()).await;
    for (model, cut) in [(2, 5), (2, 6), (3, 7), (3, 8)] {
        let (chain, count, _) = &family.chains[model];
        let part = |from: usize, to: usize| vec![SpanAssignment { chain: ChainDigest(chain.0), from: from as u32, to: to as u32 }];
        let first = start_with(&family.zoo, "exe_first", part(0, cut), limits(), one_thread()).await;
        let second = start_with(&family.zoo, "exe_second", part(cut, *count), limits(), one_thread()).await;
        let address = serve(second.clone()).await;

        let lineages = lineages(&family.zoo.read_chain(*chain).await.unwrap().blocks, &[]);
        let lineage = |end: usize| end.checked_sub(1).map_or_else(Vec::new, |last| lineages[last].0.to_vec());
        let hop = |from: usize, to: usize, id: &str, address: String| v1::Hop {
            span: Some(v1::Span {
                chain: chain.0.to_vec(),
                from: from as u32,
                to: to as u32,
                lineage_from: lineage(from),
                lineage_to: lineage(to),
            }),
            executor_id: id.to_owned(),
            address,
        };
        let prompt: Vec<u32> = (0..40).map(|t| (t * 37) % 2000).collect();
        let sampling = v1::Sampling { logprobs: true, ..v1::Sampling::default() };
        let request = admission(&family, cut as u64, model, prompt, sampling);
        let route = vec![hop(0, cut, "exe_first", String::new()), hop(cut, *count, "exe_second", address)];
        let apart = tokens(&first, v1::Admission { route, ..request.clone() }).await;
        assert_eq!(apart.len(), 24);
        assert_eq!(apart, tokens(&whole, request).await, "model {model} cut at {cut}");
    }
}

/// Serves an executor to others on a port of its own, which it returns.
async fn serve(executor: ExecutorHandle) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder().add_service(ExecutorServer::new(Service::new(executor)));
    tokio::spawn(server.serve_with_incoming(incoming));
    address
}

/// The best map from a model to itself at one cut is none at all, and so the chain says what the model says; at another cut it does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_stitched_to_itself_at_one_cut_says_the_same() {
    let family = family_of("../../demo", &["base"]).await;
    let model = family.zoo.resolve(&"demo/base".parse().unwrap()).await.unwrap();
    let ops = Arc::new(Cpu::new(CpuOptions { threads: 2, ..CpuOptions::default() }));
    let window = |seed: u32, length: u32| -> Vec<u32> { (0..length).map(|t| (t * t * 31 + t * seed * 7 + seed) % 2000).collect() };
    let windows: Vec<Vec<u32>> = (0..10).map(|seed| window(seed, 100)).collect();
    let mut kls = Vec::new();
    for to in [4, 6] {
        let seam = Seam::new(model.clone(), model.clone(), 4, to).unwrap();
        let mut passed = 0;
        let fitted = fit(&ops, &family.zoo, &seam, &windows, 1e-9, || passed += 1).await.unwrap();
        assert_eq!((passed, fitted.row_count, fitted.held_count), (10, 800, 200));
        assert!(if to == 4 { fitted.error < 1e-6 } else { (1e-3..1.0).contains(&fitted.error) }, "{to}: {}", fitted.error);
        let stitched = seam.joined(&fitted.map).unwrap();
        let (outputs, mut blocks) = (Outputs::default(), Vec::new());
        for index in (0..stitched.blocks().len()).rev() {
            let mapped = stitched.map_block(&family.zoo, index).await.unwrap();
            blocks.push(LoadedBlock::load(&*ops, &mapped.block, &mapped, &outputs).unwrap());
        }
        blocks.reverse();
        let cut = Windows { window_tokens: 64, begin: None };
        let limits = cut.limits(16, KvFormat::F32);
        let mut stitched = Alone::new(Arc::clone(&ops), blocks, limits).unwrap();
        let mut exact = Alone::load(Arc::clone(&ops), &family.zoo, family.chains[0].0, limits).await.unwrap();
        let mut tally = Tally::default();
        for window in [window(11, 64), window(12, 64)] {
            tally.add_window(cut, &window, &cut.logits(&mut exact, &window), &cut.logits(&mut stitched, &window));
        }
        kls.push(tally.sum_up().unwrap().divergence.mean);
    }
    assert!(kls[0] < 1e-5 && kls[1] > 1e-2, "{kls:?}");
}
