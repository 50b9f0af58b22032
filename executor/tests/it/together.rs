//! A real executor over the demo family: eight sequences of several models at once, in chunks of any size, with and without
//! a prefix cache, give the tokens that each gives alone. Level 1 of docs/numerics.md, on the real device thread.

use std::sync::Arc;
use std::time::Duration;

use crate::adapters;
use ashlar_executor::io::executor::{self, ExecutorHandle, Identity};
use ashlar_executor::io::hosting::Hosting;
use ashlar_executor::io::metrics::ExecutorMetrics;
use ashlar_executor::io::service::Operator;
use ashlar_executor::model::alone::{Alone, AloneLimits};
use ashlar_executor::model::surrogate::make;
use ashlar_executor::state::limits::Limits;
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa};
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::{Bf16Compute, KvFormat, KvShape, Ops};
use ashlar_registry::record::{ExecutorRecord, Plan, SpanAssignment, to_value};
use ashlar_registry::{ChainDigest, Registry, Session, key};
use ashlar_wire::id::ExecutorId;
use ashlar_wire::v1;
use ashlar_wire::v1::operator_server::Operator as _;
use ashlar_zoo::digest::{Digest, lineages};
use ashlar_zoo::draft::ChainDraft;
use ashlar_zoo::ingest::{AddOptions, Silent, add};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::quantise::{Draft, Recipe};
use ashlar_zoo::relatives::{Kept, compress};
use ashlar_zoo::store::Zoo;
use ashlar_zoo::surrogate;
use tokio_stream::StreamExt;
use tonic::Request;

use crate::support::crate_folder;

const MODELS: [&str; 4] = ["base", "shakespeare-top", "math-lora", "japanese-full"];

pub(crate) struct Family {
    _folder: tempfile::TempDir,
    pub(crate) zoo: Zoo,
    pub(crate) chains: Vec<(Digest, usize, Vec<u8>)>,
}

pub(crate) async fn family() -> Family {
    family_of("../../demo", &MODELS).await
}

pub(crate) async fn family_of(models: &str, names: &[&str]) -> Family {
    let folder = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(folder.path()).await.unwrap();
    let models = crate_folder().join(models);
    let mut family = Family { _folder: folder, zoo, chains: Vec::new() };
    for name in names {
        let options = AddOptions::new(ModelId::new("demo", name).unwrap());
        let report = add(&family.zoo, &models.join(name), &options, &Silent).await.unwrap();
        family.push(report.chain).await;
    }
    family
}

impl Family {
    pub(crate) async fn push(&mut self, digest: Digest) {
        let chain = self.zoo.read_chain(digest).await.unwrap();
        let adapters: Vec<(u32, Digest)> = chain.adapters.iter().map(|adapter| (adapter.block_index, adapter.digest)).collect();
        let lineage = lineages(&chain.blocks, &adapters).last().unwrap().0.to_vec();
        self.chains.push((digest, chain.blocks.len(), lineage));
    }
}

/// One base, and models that differ in adapters alone: on two matrices, on all, and on some of the upper layers.
pub(crate) async fn adapted_family() -> Family {
    let mut family = family_of("../../demo", &["base"]).await;
    let all = ["q.weight", "k.weight", "v.weight", "o.weight"].as_slice();
    let feed = ["gate.weight", "up.weight", "down.weight"].as_slice();
    let recipe = |attention, feed_forward, rank, scale, dtype, from_layer, salt| adapters::Recipe {
        attention,
        feed_forward,
        rank,
        scale,
        dtype,
        from_layer,
        salt,
    };
    for recipe in [
        recipe(&["q.weight", "v.weight"], &[], 4, 2.0, Dtype::F32, 0, 1),
        recipe(all, feed, 8, 1.0, Dtype::Bf16, 0, 2),
        recipe(&["k.weight", "o.weight"], feed, 3, 4.0 / 3f32.sqrt(), Dtype::F16, 5, 3),
    ] {
        let chain = adapters::adapted(&family.zoo, family.chains[0].0, recipe).await;
        family.push(chain).await;
    }
    family
}

/// One base, and over it random factors, fine-tunes as one-bit differences and as singular values, and a fine-tune as it is.
pub(crate) async fn compressed_family() -> Family {
    let mut family = adapted_family().await;
    family.chains.truncate(2);
    let models = crate_folder().join("../../demo");
    let viewer = family.zoo.viewer("demo").await.unwrap();
    for (tuned, method) in [("japanese-full", "bitdelta"), ("math-lora", "svd:4"), ("shakespeare-top", "bitdelta")] {
        let model = ModelId::new("demo", tuned).unwrap();
        let source = add(&family.zoo, &models.join(tuned), &AddOptions::new(model.clone()), &Silent).await.unwrap().chain;
        let base = ModelId::new("demo", "base").unwrap();
        let how = (method.parse().unwrap(), Kept::default());
        let compressed = compress(&family.zoo, ("demo", &viewer), &model, Some(&base), how).await.unwrap();
        let name = ModelId::new("demo", &format!("{tuned}-small")).unwrap();
        let chain = compressed.adapted.store(&family.zoo, &name, 1, None).await.unwrap();
        family.push(chain).await;
        if tuned == "shakespeare-top" {
            family.push(source).await;
        }
    }
    family
}

/// One base, and forms of it: fewer columns and heads in the upper half, half of the heads everywhere (so that pages are of two shapes), and
/// eight-bit floats.
pub(crate) async fn cheaper_family() -> Family {
    let mut family = family_of("../../demo", &["base"]).await;
    let (ops, source) = (Arc::new(Cpu::new(CpuOptions::default())), family.zoo.resolve(&"demo/base".parse().unwrap()).await.unwrap());
    for (name, feed_forward, heads, blocks) in [("upper", Some("0.5"), "0.5", Some("9..17")), ("heads", None, "0.5", None)] {
        let name = ModelId::new("demo", name).unwrap();
        let plan = surrogate::Plan {
            feed_forward: feed_forward.map(|share| share.parse().unwrap()),
            heads: Some(heads.parse().unwrap()),
            blocks: blocks.map(|blocks| blocks.parse().unwrap()),
        };
        let mut draft = ChainDraft::new(&family.zoo, source.clone(), Some(&name)).await.unwrap();
        make(&ops, &mut draft, &plan.counts(&source.blocks).unwrap(), None, &Silent).await.unwrap();
        let chain = draft.store(&name, 1, None).await.unwrap();
        family.push(chain).await;
    }
    let (name, recipe) =
        (ModelId::new("demo", "fp8").unwrap(), Recipe { linear: "fp8".parse().unwrap(), table: "fp8-g64".parse().unwrap() });
    let mut draft = Draft::new(&family.zoo, source, recipe, Some(&name)).await.unwrap();
    for index in 0..draft.blocks().len() {
        draft.round(index).await.unwrap();
    }
    let chain = draft.store(&name, 1, None).await.unwrap();
    family.push(chain).await;
    family
}

/// An executor that hosts all chains of a family, whole.
pub(crate) async fn start(family: &Family, limits: Limits, options: CpuOptions) -> ExecutorHandle {
    start_with(&family.zoo, "exe_test", whole(family), limits, options).await
}

/// All chains of a family, each as one span.
pub(crate) fn whole(family: &Family) -> Vec<SpanAssignment> {
    let whole = |(chain, count, _): &(Digest, usize, Vec<u8>)| SpanAssignment { chain: ChainDigest(chain.0), from: 0, to: *count as u32 };
    family.chains.iter().map(whole).collect()
}

/// An executor that hosts these spans.
pub(crate) async fn start_with(zoo: &Zoo, id: &str, spans: Vec<SpanAssignment>, limits: Limits, options: CpuOptions) -> ExecutorHandle {
    start_on(zoo, id, spans, limits, options.bf16_compute, Cpu::new(options)).await
}

/// The same on any device, which computes bf16 weights so.
pub(crate) async fn start_on<B: Ops>(
    zoo: &Zoo,
    id: &str,
    spans: Vec<SpanAssignment>,
    limits: Limits,
    bf16_compute: Bf16Compute,
    ops: B,
) -> ExecutorHandle {
    let registry: Arc<dyn Registry> = ashlar_registry::open("memory:").await.unwrap();
    let (id, span_count) = (ExecutorId(id.to_owned()), spans.len());
    let plan = Plan { generation: 1, assignments: [(id.clone(), spans)].into(), ..Plan::default() };
    registry.put(key::PLAN, &to_value(&plan), None).await.unwrap();
    let record = ExecutorRecord {
        id: id.clone(),
        address: String::new(),
        device: String::new(),
        profiled_on: String::new(),
        numeric_class: limits.numeric_class(bf16_compute.cpu_class()),
        memory_bytes: 1 << 30,
        kv_bytes: limits.kv_bytes,
        threads: 1,
        spans: Vec::new(),
        plan_generation: 0,
        draining: false,
        incarnation: 1,
    };
    let session = Arc::new(Session::start(Arc::clone(&registry), key::executor(&id), record, Duration::from_secs(5)));
    let ops = Arc::new(ops);
    let metrics = ExecutorMetrics::new(&prometheus::Registry::new()).unwrap();
    let identity = Identity { executor_id: id.0, device: "cpu".to_owned(), numeric_class: limits.numeric_class(bf16_compute.cpu_class()) };
    let pages = limits.pages();
    let (handle, commands) = executor::start(Arc::clone(&ops), limits, &identity, metrics.clone()).unwrap();
    let mut hosting = Hosting::new(ops, zoo.clone(), commands, handle.events(), metrics, 1 << 30, pages);
    tokio::spawn(async move { hosting.follow(registry, session).await });
    while handle.status().spans.len() < span_count {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    handle
}

pub(crate) fn admission(family: &Family, number: u64, model: usize, prompt: Vec<u32>, sampling: v1::Sampling) -> v1::Admission {
    let (chain, count, lineage) = &family.chains[model];
    let span = v1::Span { chain: chain.0.to_vec(), from: 0, to: *count as u32, lineage_from: Vec::new(), lineage_to: lineage.clone() };
    v1::Admission {
        router_id: "rtr_test".to_owned(),
        sequence_id: number,
        cache_domain: vec![3; 32],
        numeric_class: String::new(),
        seed: 11,
        route: vec![v1::Hop { span: Some(span), executor_id: "exe_test".to_owned(), address: String::new() }],
        prompt,
        generated_tokens_max: 24,
        sampling: Some(sampling),
        ..v1::Admission::default()
    }
}

pub(crate) async fn tokens(handle: &ExecutorHandle, admission: v1::Admission) -> Vec<(u32, u32)> {
    let mut events = handle.run(admission);
    let mut tokens = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            v1::sequence_event::Event::Token(token) => tokens.push((token.token, token.logprob.to_bits())),
            v1::sequence_event::Event::Failed(failed) => panic!("{}: {}", failed.code, failed.message),
            v1::sequence_event::Event::Started(_) | v1::sequence_event::Event::Finished(_) => {}
        }
    }
    tokens
}

pub(crate) fn requests(family: &Family) -> Vec<v1::Admission> {
    (0..8u64)
        .map(|i| {
            // The first tokens are common, so that the cache has something to find; lengths cross page borders.
            let prompt: Vec<u32> = (0..30 + i as u32 * 5).map(|t| if t < 20 { 100 + t } else { (t * 37 + i as u32 * 11) % 2000 }).collect();
            let temperature = if i % 2 == 0 { 0.0 } else { 0.8 };
            let sampling = v1::Sampling { temperature, top_p: 0.95, logprobs: true, repetition_penalty: 1.1, ..v1::Sampling::default() };
            admission(family, i, i as usize % family.chains.len(), prompt, sampling)
        })
        .collect()
}

pub(crate) fn limits() -> Limits {
    Limits { kv_bytes: 64 << 20, ..Limits::default() }
}

pub(crate) async fn eight_together_in_any_chunks(family: &Family, kv_format: KvFormat, bf16_compute: Bf16Compute) {
    let limits = || Limits { kv_format, ..limits() };
    let scalar = CpuOptions { threads: 1, isa: Some(Isa::Scalar), bf16_compute };
    let alone = start(family, Limits { prefix_cache: false, ..limits() }, scalar).await;
    let mut golden = Vec::new();
    for request in requests(family) {
        golden.push(tokens(&alone, request).await);
    }
    assert!(golden.iter().all(|tokens| tokens.len() == 24));
    let cases = [
        ("one chunk", limits(), 2),
        ("chunks of 7", Limits { chunk_tokens_max: 7, ..limits() }, 1),
        ("chunks of 1, pages of 32", Limits { chunk_tokens_max: 1, page_tokens: 32, ..limits() }, 2),
        ("pages touched before", Limits { kv_touch_bytes: 8 << 20, ..limits() }, 2),
        ("little memory", Limits { chunk_tokens_max: 16, kv_bytes: 1 << 20, ..limits() }, 2),
        ("no hidden states kept", Limits { chunk_tokens_max: 30, boundary_bytes: 0, ..limits() }, 2),
        ("one batch in flight", Limits { chunk_tokens_max: 7, batches_in_flight_max: 1, ..limits() }, 2),
        ("four batches in flight", Limits { chunk_tokens_max: 7, batches_in_flight_max: 4, ..limits() }, 2),
        ("four batches in flight, little memory", Limits { batches_in_flight_max: 4, kv_bytes: 1 << 20, ..limits() }, 2),
    ];
    for (name, limits, threads) in cases {
        let handle = start(family, limits, CpuOptions { threads, isa: None, bf16_compute }).await;
        // Twice: the second round meets a warm prefix cache.
        for round in 0..2 {
            let all = requests(family).into_iter().map(|mut request| {
                request.sequence_id += 100 * round;
                let handle = handle.clone();
                tokio::spawn(async move { tokens(&handle, request).await })
            });
            let together = futures::future::join_all(all.collect::<Vec<_>>()).await;
            for (i, (tokens, golden)) in together.into_iter().zip(&golden).enumerate() {
                assert_eq!(&tokens.unwrap(), golden, "{name}, round {round}, sequence {i}");
            }
        }
        handle.check_integrity().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_together_in_any_chunks_give_the_tokens_of_each_alone() {
    eight_together_in_any_chunks(&family().await, KvFormat::F32, Bf16Compute::F32).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_together_over_bf16_pages_give_the_tokens_of_each_alone() {
    eight_together_in_any_chunks(&family().await, KvFormat::Bf16, Bf16Compute::F32).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_together_over_int8_pages_give_the_tokens_of_each_alone() {
    eight_together_in_any_chunks(&family().await, KvFormat::Int8, Bf16Compute::F32).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_together_with_other_adapters_give_the_tokens_of_each_alone() {
    eight_together_in_any_chunks(&adapted_family().await, KvFormat::F32, Bf16Compute::F32).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_together_with_compressed_differences_give_the_tokens_of_each_alone() {
    eight_together_in_any_chunks(&compressed_family().await, KvFormat::F32, Bf16Compute::F32).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_together_through_cheaper_blocks_give_the_tokens_of_each_alone() {
    eight_together_in_any_chunks(&cheaper_family().await, KvFormat::F32, Bf16Compute::F32).await;
}

/// Each model with adapters gives what its chain gives without an engine, and pages of the base serve up to the first of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_are_those_of_the_chain_and_share_what_lies_before_them() {
    let family = adapted_family().await;
    let prompt: Vec<u32> = (0..100).map(|t| (t * 37) % 2000).collect();
    let handle = start(&family, limits(), CpuOptions { threads: 2, ..CpuOptions::default() }).await;
    let mut seen = Vec::new();
    for (model, (chain, ..)) in family.chains.iter().enumerate() {
        let ops = Arc::new(Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() }));
        let alone = AloneLimits { chunk_tokens_max: 64, tokens_max: 128, page_tokens: 16, kv_format: KvFormat::F32 };
        let expected = Alone::load(ops, &family.zoo, *chain, alone).await.unwrap().greedy(&prompt, 24, 64).tokens;
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
        assert_eq!(tokens, expected, "model {model}");
        assert!(!seen.contains(&tokens), "model {model} is like another");
        seen.push(tokens);
        // Six pages are full. The last model has adapters from layer 5 on: 11 of the blocks lie before.
        let blocks = family.chains[0].1 as u32;
        assert_eq!(cached, if model == 3 { 96 * 11 / blocks } else { 0 }, "model {model}");
    }
    handle.check_integrity().await.unwrap();
}

/// The same prompt for one model after another: what they share is computed once, and no token changes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_another_model_has_seen_is_computed_from_the_fork() {
    let family = family().await;
    let prompt: Vec<u32> = (0..200).map(|t| (t * 37) % 2000).collect();
    let request =
        |number, model| admission(&family, number, model, prompt.clone(), v1::Sampling { logprobs: true, ..v1::Sampling::default() });
    let cold = start(&family, Limits { prefix_cache: false, ..limits() }, CpuOptions { threads: 1, ..CpuOptions::default() }).await;
    let warm = start(&family, Limits { chunk_tokens_max: 64, ..limits() }, CpuOptions { threads: 2, ..CpuOptions::default() }).await;
    let mut cached = Vec::new();
    for (number, model) in [(0, 0), (1, 1), (2, 0), (3, 1)] {
        let mut events = warm.run(request(number, model));
        let mut warm_tokens = Vec::new();
        while let Some(event) = events.next().await {
            match event {
                v1::sequence_event::Event::Started(started) => cached.push(started.cached_tokens),
                v1::sequence_event::Event::Token(token) => warm_tokens.push((token.token, token.logprob.to_bits())),
                v1::sequence_event::Event::Failed(failed) => panic!("{}: {}", failed.code, failed.message),
                v1::sequence_event::Event::Finished(_) => {}
            }
        }
        assert_eq!(warm_tokens, tokens(&cold, request(number, model)).await, "sequence {number}");
    }
    warm.check_integrity().await.unwrap();
    // Twelve pages of sixteen tokens lie before the last one.
    assert_eq!((cached[0], cached[2], cached[3]), (0, 192, 192));
    assert!(cached[1] > 90 && cached[1] < 192, "the top of model 1 is its own: {} of 192 tokens' worth were skipped", cached[1]);
}

/// What an operator is told of an executor that is busy, and of one that has nothing to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_are_told_that_books_agree_and_where_pages_are() {
    let family = family().await;
    let handle = start(&family, limits(), CpuOptions { threads: 1, ..CpuOptions::default() }).await;
    let operator = Operator::new(handle.clone());
    let check = async || operator.check(Request::new(v1::CheckRequest {})).await.unwrap().into_inner();
    let untouched = check().await;
    assert_eq!((untouched.executor_id.as_str(), untouched.fault.as_str()), ("exe_test", ""));
    assert_eq!((untouched.used_pages, untouched.cached_pages), (0, 0));
    assert!(untouched.free_pages > 0);

    let prompt: Vec<u32> = (0..40).map(|t| (t * 37) % 2000).collect();
    let mut events = handle.run(admission(&family, 1, 0, prompt, v1::Sampling::default()));
    while !matches!(events.next().await, Some(v1::sequence_event::Event::Token(_))) {}
    let busy = check().await;
    assert_eq!((busy.fault.as_str(), busy.used_pages > 0), ("", true));
    while events.next().await.is_some() {}
    while handle.status().running > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let idle = check().await;
    // Of 40 tokens and 23 more two pages of prompt and one of both are full, in each of the eight layers.
    assert_eq!((idle.fault.as_str(), idle.used_pages, idle.cached_pages), ("", 0, 24));
    assert_eq!(idle.cached_pages + idle.free_pages, untouched.free_pages);
}

/// Nothing is given back in pages that hold a whole sequence. In small ones a sequence runs in less memory than its tokens would take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_behind_a_window_is_given_back_and_changes_no_token() {
    // Heads of keys and values, and their width; layers that see 16 tokens, and layers that see all.
    for (model, kv_heads, head_dim, windowed, full) in [("mistral", 2, 16, 2, 0), ("gemma3", 2, 24, 3, 1), ("qwen3-window", 1, 16, 2, 1)] {
        let family = family_of("data/tiny", &[model]).await;
        let request = |number: u64| {
            // The first 60 tokens are common; the rest is one of two.
            let prompt = (0..150).map(|t| if t < 60 { t + 3 } else { (t * 37 + number as u32 % 2 * 11) % 280 }).collect();
            let sampling = v1::Sampling { temperature: 0.7, logprobs: true, ..v1::Sampling::default() };
            v1::Admission { generated_tokens_max: 60, ..admission(&family, number, 0, prompt, sampling) }
        };
        let options = CpuOptions { threads: 1, ..CpuOptions::default() };
        let whole = start(&family, Limits { page_tokens: 256, prefix_cache: false, ..limits() }, options).await;
        let golden = [tokens(&whole, request(0)).await, tokens(&whole, request(1)).await];
        assert!(golden[0].len() == 60 && golden[0] != golden[1], "{model}");
        // 210 tokens are 14 pages of 16. A window of 16 tokens and a chunk of 16 are in three of them.
        let page_bytes = KvShape { kv_heads, head_dim, page_tokens: 16, format: KvFormat::F32 }.page_bytes() as u64;
        let kv_bytes = page_bytes * (3 * windowed + 14 * full);
        for (in_flight, prefix_cache, kv_bytes) in [(1, false, kv_bytes), (2, true, kv_bytes), (4, true, 3 * kv_bytes)] {
            let limits = Limits { chunk_tokens_max: 16, batches_in_flight_max: in_flight, prefix_cache, kv_bytes, ..limits() };
            let handle = start(&family, limits, options).await;
            let all = (0..6).map(|number| {
                let (handle, request) = (handle.clone(), request(number));
                tokio::spawn(async move { tokens(&handle, request).await })
            });
            let together = futures::future::join_all(all.collect::<Vec<_>>()).await;
            for (number, tokens) in together.into_iter().enumerate() {
                assert_eq!(tokens.unwrap(), golden[number % 2], "{model}, {in_flight} in flight, sequence {number}");
            }
            handle.check_integrity().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_together_from_bf16_activations_give_the_tokens_of_each_alone() {
    eight_together_in_any_chunks(&family().await, KvFormat::F32, Bf16Compute::Bf16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_stays_with_executors_of_its_class() {
    let family = family().await;
    let options = CpuOptions { threads: 1, isa: None, bf16_compute: Bf16Compute::Bf16 };
    let handle = start(&family, Limits { kv_format: KvFormat::Int8, ..limits() }, options).await;
    let request = requests(&family).remove(0);
    for class in ["cpu-v1", "cpu-v1+kv-int8", "cpu-v1+bf16-dot", "cpu-v1+bf16-dot+kv-bf16", "cpu-v1+bf16-dot+kv-int8"] {
        let fits = class == "cpu-v1+bf16-dot+kv-int8";
        let mut events = handle.run(v1::Admission { numeric_class: class.to_owned(), ..request.clone() });
        match events.next().await {
            Some(v1::sequence_event::Event::Failed(failed)) => {
                assert!(!fits, "{class}: {}", failed.message);
                assert_eq!(failed.code, "numeric_class_mismatch");
            }
            other => assert!(fits, "{class}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_stream_frees_the_sequence() {
    let family = family().await;
    let handle = start(&family, limits(), CpuOptions { threads: 1, ..CpuOptions::default() }).await;
    let mut request = requests(&family).remove(0);
    request.generated_tokens_max = 400;
    let mut events = handle.run(request);
    while !matches!(events.next().await, Some(v1::sequence_event::Event::Token(_))) {}
    assert_eq!(handle.status().running + handle.status().waiting, 1);
    drop(events);
    while handle.status().running + handle.status().waiting > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    handle.check_integrity().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_run_is_refused_with_its_code() {
    let family = family().await;
    let handle = start(&family, Limits { kv_bytes: 200 << 10, ..limits() }, CpuOptions { threads: 1, ..CpuOptions::default() }).await;
    let good = requests(&family).remove(0);
    let cases = [
        ("context_length_exceeded", v1::Admission { generated_tokens_max: 600, ..good.clone() }),
        ("never_fits", v1::Admission { generated_tokens_max: 400, ..good.clone() }),
        ("numeric_class_mismatch", v1::Admission { numeric_class: "cuda-sm90-v1".to_owned(), ..good.clone() }),
        (
            "unknown_span",
            admission(
                &Family { chains: vec![(Digest([9; 32]), 18, vec![1])], ..family_like(&family) },
                1,
                0,
                vec![1],
                v1::Sampling::default(),
            ),
        ),
        ("invalid_value", v1::Admission { prompt: vec![70_000], ..good.clone() }),
    ];
    for (code, request) in cases {
        let mut events = handle.run(request);
        match events.next().await {
            Some(v1::sequence_event::Event::Failed(failed)) => assert_eq!(failed.code, code, "{}", failed.message),
            other => panic!("{code}: {other:?}"),
        }
    }
}

fn family_like(family: &Family) -> Family {
    Family { _folder: tempfile::tempdir().unwrap(), zoo: family.zoo.clone(), chains: Vec::new() }
}
