//! Dispatch over scripted executors: whatever they do, the caller sees each token once and in order.

use std::collections::VecDeque;
use std::sync::Mutex;

use ashlar_registry::embedded::Embedded;
use ashlar_registry::record::{self, DeploymentRecord, ExecutorRecord, KeyRecord, Limits, Plan, SpanAssignment, TenantRecord};
use ashlar_registry::{Registry, key};
use ashlar_wire::id::RequestId;
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event;
use ashlar_zoo::manifest::Chain;
use ashlar_zoo::store::Zoo;
use tonic::Status;

use super::*;
use crate::io::cluster::ClusterOptions;
use crate::io::grpc::{ExecutorClient, RunEvents};
use crate::io::testing;
use crate::state::tenants::{KeyHash, Without};

const BLOCKS: u32 = 6;
const TOKENS: u32 = 8;
const EOS: u32 = 1;

/// What an executor does with one call; after the last act it runs to the end.
#[derive(Debug, Clone)]
enum Act {
    /// Refuses the call.
    Refuse(tonic::Code),
    /// Hands out so many tokens, then breaks the stream.
    DieAfter(u32),
    /// Hands out so many tokens, then ends the stream without a word.
    EndAfter(u32),
    /// Hands out so many tokens, then says this.
    FailAfter(u32, Code, v1::Retry),
    /// Sends tokens that were sent before, as well.
    Repeat,
    /// Leaves a token out.
    Skip,
    /// Runs, but says `Finished` never: it dies first.
    DieBeforeFinished,
}

/// An executor whose token at each index is a function of prompt, seed and index, as sampling is.
#[derive(Default)]
struct Scripted {
    acts: Mutex<VecDeque<Act>>,
    admissions: Mutex<Vec<v1::Admission>>,
}

fn token_at(admission: &v1::Admission, index: u32) -> u32 {
    let prompt: u32 = admission.prompt.iter().sum();
    if index + 1 == TOKENS { EOS } else { 100 + prompt + admission.seed as u32 + index }
}

#[async_trait]
impl ExecutorClient for Scripted {
    async fn run(&self, admission: v1::Admission) -> Result<RunEvents, Status> {
        self.admissions.lock().unwrap().push(admission.clone());
        let act = self.acts.lock().unwrap().pop_front();
        if let Some(Act::Refuse(code)) = act {
            return Err(Status::new(code, "scripted"));
        }
        let from = admission.generated.len() as u32;
        let token =
            |index| Ok(event(Event::Token(v1::TokenEvent { index, token: token_at(&admission, index), logprob: 0.0, top: vec![] })));
        let mut events = vec![Ok(event(Event::Started(v1::Started { queue_ms: 0.0, cached_tokens: 3 })))];
        let some = |count: u32| (from..TOKENS.min(from + count)).map(token).collect::<Vec<_>>();
        match act {
            Some(Act::DieAfter(count)) => {
                events.extend(some(count));
                events.push(Err(Status::unavailable("scripted death")));
            }
            Some(Act::EndAfter(count)) => events.extend(some(count)),
            Some(Act::FailAfter(count, code, retry)) => {
                events.extend(some(count));
                let failed = v1::Failed { code: code.as_str().to_owned(), message: "scripted".to_owned(), retry: retry.into() };
                events.push(Ok(event(Event::Failed(failed))));
            }
            Some(Act::Skip) => events.push(token(from + 1)),
            Some(Act::DieBeforeFinished) => {
                events.extend(some(TOKENS));
                events.push(Err(Status::unavailable("scripted death")));
            }
            Some(Act::Refuse(_)) => unreachable!("answered above"),
            None | Some(Act::Repeat) => {
                if act.is_some() {
                    events.extend((0..from).map(token));
                }
                events.extend(some(TOKENS));
                events.push(Ok(event(Event::Finished(v1::Finished { reason: v1::FinishReason::Stop.into() }))));
            }
        }
        Ok(futures::stream::iter(events).boxed())
    }
}

fn event(event: Event) -> v1::SequenceEvent {
    v1::SequenceEvent { event: Some(event) }
}

/// A dispatch over executors `exe_a`, `exe_b`, ... that all hold the one model.
struct Stage {
    dispatch: Dispatch,
    registry: Arc<dyn Registry>,
    executors: Vec<Arc<Scripted>>,
    model: Arc<ModelView>,
    _zoo: tempfile::TempDir,
}

fn chain() -> Chain {
    testing::chain((0..BLOCKS).map(|index| Digest::of(&index.to_be_bytes())).collect())
}

fn executor_id(index: usize) -> ExecutorId {
    ExecutorId(format!("exe_{}", char::from(b'a' + index as u8)))
}

impl Stage {
    /// One executor for each script, each holding its span of the chain.
    async fn of(scripts: Vec<(Vec<Act>, (u32, u32))>) -> Self {
        Self::with(scripts, DispatchOptions { attempts_max: 6, ..DispatchOptions::default() }).await
    }

    async fn with(scripts: Vec<(Vec<Act>, (u32, u32))>, options: DispatchOptions) -> Self {
        let registry: Arc<dyn Registry> = Arc::new(Embedded::in_memory());
        let digest = Digest::of(b"chain");
        let mut executors = Vec::new();
        let mut plan = Plan { generation: 7, ..Plan::default() };
        for (index, (acts, (from, to))) in scripts.into_iter().enumerate() {
            let record = ExecutorRecord {
                id: executor_id(index),
                address: format!("127.0.0.1:{index}"),
                device: "scripted".to_owned(),
                profiled_on: String::new(),
                numeric_class: "cpu-v1".to_owned(),
                memory_bytes: 0,
                kv_bytes: 0,
                threads: 1,
                spans: vec![SpanAssignment { chain: ChainDigest(digest.0), from, to }],
                plan_generation: 7,
                draining: false,
                incarnation: 1,
            };
            registry.put(&key::executor(&record.id), &record::to_value(&record), None).await.unwrap();
            plan.assignments.insert(record.id, record.spans);
            executors.push(Arc::new(Scripted { acts: Mutex::new(acts.into()), admissions: Mutex::default() }));
        }
        registry.put(key::PLAN, &record::to_value(&plan), None).await.unwrap();
        let deployment = DeploymentRecord { ttft_ms: Some(900), gap_ms: Some(0), ..DeploymentRecord::default() };
        registry.put(&key::deployment("public/m"), &record::to_value(&deployment), None).await.unwrap();
        let cluster = Cluster::start(registry.clone(), ClusterOptions { without: Without::Open, ..ClusterOptions::default() });
        cluster.loaded().await;
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::start(Zoo::create_dir(directory.path()).await.unwrap(), Duration::from_secs(3600), &cluster).await;
        let local = executors.iter().enumerate().map(|(index, executor)| (executor_id(index), executor.clone() as Arc<dyn ExecutorClient>));
        let router = RouterId("rtr_1".to_owned());
        let dispatch = Dispatch::new(router, cluster, catalog, Clients::new(local), options, &MetricRegistry::new()).unwrap();
        let view =
            ModelView { id: "public/m".into(), root: None, parent: None, created_s: 0, chain: Arc::new(chain()), chain_digest: digest };
        Self { dispatch, registry, executors, model: Arc::new(view), _zoo: directory }
    }

    /// Executors that hold the whole chain.
    async fn whole<const N: usize>(scripts: [Vec<Act>; N]) -> Self {
        Self::of(scripts.into_iter().map(|acts| (acts, (0, BLOCKS))).collect()).await
    }

    fn sequence(&self, request: u64) -> NewSequence {
        NewSequence {
            request_id: RequestId::from_bits(request),
            tenant: TenantName(PUBLIC.to_owned()),
            model: self.model.clone(),
            prompt: [3, 4, 5].into(),
            generated_tokens_max: 20,
            stop_tokens: vec![EOS],
            sampling: v1::Sampling { temperature: 0.5, ..v1::Sampling::default() },
            seed: 40,
            choice_index: 2,
            priority: -1,
        }
    }

    /// Runs one sequence to its end: tokens, and how it ended.
    async fn run(&self) -> (Vec<u32>, Result<v1::Finished, ApiError>) {
        let mut events = match self.dispatch.start(self.sequence(1)).await {
            Ok(events) => events,
            Err(error) => return (vec![], Err(error)),
        };
        let (mut tokens, mut started, mut end) = (Vec::new(), 0, None);
        while let Some(event) = events.next().await {
            assert!(end.is_none(), "nothing comes after the end");
            match event {
                Ok(Event::Token(token)) => {
                    assert_eq!(token.index as usize, tokens.len(), "in order, without gaps or repeats");
                    tokens.push(token.token);
                }
                Ok(Event::Started(_)) => started += 1,
                Ok(Event::Finished(finished)) => end = Some(Ok(finished)),
                Ok(Event::Failed(failed)) => panic!("failures come as errors: {failed:?}"),
                Err(error) => end = Some(Err(error)),
            }
        }
        assert!(started <= 1, "it starts once");
        assert_eq!(self.dispatch.in_flight(), 0, "its place is free at the end, whoever still holds the stream");
        assert!(self.dispatch.shared.loads.now().is_empty(), "no load is left behind");
        (tokens, end.expect("every stream has an end"))
    }

    fn admissions(&self, index: usize) -> Vec<v1::Admission> {
        self.executors[index].admissions.lock().unwrap().clone()
    }

    /// The tokens that an undisturbed run gives.
    fn wanted() -> Vec<u32> {
        let admission = v1::Admission { prompt: vec![3, 4, 5], seed: 40, ..v1::Admission::default() };
        (0..TOKENS).map(|index| token_at(&admission, index)).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn admission_carries_all_that_an_executor_needs() {
    let stage = Stage::whole([vec![]]).await;
    let (tokens, end) = stage.run().await;
    assert_eq!(tokens, Stage::wanted());
    end.unwrap();
    let admission = &stage.admissions(0)[0];
    assert_eq!((admission.router_id.as_str(), admission.sequence_id, admission.epoch), ("rtr_1", 1, 0));
    assert_eq!((admission.numeric_class.as_str(), admission.plan_generation), ("cpu-v1", 7));
    assert_eq!((admission.seed, admission.choice_index, admission.priority), (40, 2, -1));
    assert_eq!((admission.prompt.as_slice(), admission.generated_tokens_max), (&[3, 4, 5][..], 20));
    assert_eq!((admission.stop_tokens.as_slice(), admission.cache_domain.len()), (&[EOS][..], 32));
    assert_eq!(admission.sampling.as_ref().unwrap().temperature, 0.5);
    assert_eq!((admission.ttft_ms, admission.gap_ms), (Some(900), Some(0)), "the model's deployment");
    let span = admission.route[0].span.as_ref().unwrap();
    assert_eq!((span.from, span.to, span.lineage_from.len(), span.lineage_to.len()), (0, BLOCKS, 0, 32));
    let trace: Vec<usize> = admission.traceparent.split('-').map(str::len).collect();
    assert_eq!(trace, [2, 32, 16, 2]);
}

#[tokio::test(start_paused = true)]
async fn stream_goes_on_wherever_its_executor_dies() {
    for count in 0..TOKENS {
        for act in [Act::DieAfter(count), Act::EndAfter(count), Act::FailAfter(count, Code::Unavailable, v1::Retry::Elsewhere)] {
            let stage = Stage::whole([vec![act.clone()], vec![]]).await;
            let (tokens, end) = stage.run().await;
            assert_eq!(tokens, Stage::wanted(), "{act:?}");
            end.unwrap();
            let resumed = &stage.admissions(1)[0];
            assert_eq!(resumed.generated, Stage::wanted()[..count as usize], "{act:?}");
            assert_eq!((resumed.epoch, resumed.sequence_id, resumed.numeric_class.as_str()), (1, 1, "cpu-v1"));
            assert_eq!((resumed.seed, resumed.choice_index), (40, 2), "sampling goes on as it would have");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn stream_goes_on_through_death_after_death() {
    let stage = Stage::whole([vec![Act::DieAfter(2), Act::DieAfter(0), Act::DieAfter(1)], vec![Act::DieAfter(1), Act::DieAfter(3)]]).await;
    let (tokens, end) = stage.run().await;
    assert_eq!(tokens, Stage::wanted());
    end.unwrap();
    let mut epochs: Vec<u32> = [0, 1].into_iter().flat_map(|index| stage.admissions(index)).map(|admission| admission.epoch).collect();
    epochs.sort_unstable();
    assert_eq!(epochs, (0..epochs.len() as u32).collect::<Vec<_>>(), "each attempt has an epoch of its own");
}

#[tokio::test(start_paused = true)]
async fn executor_that_returns_is_used_again() {
    let stage = Stage::whole([vec![Act::DieAfter(3), Act::Refuse(tonic::Code::Unavailable), Act::Refuse(tonic::Code::Unavailable)]]).await;
    let (tokens, end) = stage.run().await;
    assert_eq!(tokens, Stage::wanted());
    end.unwrap();
    assert_eq!(stage.admissions(0).len(), 4);
}

#[tokio::test(start_paused = true)]
async fn stream_waits_for_an_executor_that_takes_over() {
    let stage = Stage::whole([vec![Act::DieAfter(3)], vec![]]).await;
    let key_b = key::executor(&executor_id(1));
    let entry = stage.registry.get(&key_b).await.unwrap().unwrap();
    let mut draining: ExecutorRecord = record::parse(&entry).unwrap();
    draining.draining = true;
    stage.registry.put(&key_b, &record::to_value(&draining), None).await.unwrap();
    let mut gone: ExecutorRecord = record::parse(&stage.registry.get("executors/exe_a").await.unwrap().unwrap()).unwrap();
    let registry = stage.registry.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        gone.spans.clear();
        registry.put("executors/exe_a", &record::to_value(&gone), None).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        registry.put(&key_b, &entry.value, None).await.unwrap();
    });
    let mut events = stage.dispatch.start(stage.sequence(1)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut tokens = Vec::new();
    while let Some(event) = events.next().await {
        if let Event::Token(token) = event.unwrap() {
            tokens.push(token.token);
        }
    }
    assert_eq!(tokens, Stage::wanted());
    assert_eq!(stage.admissions(1)[0].generated.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn request_that_comes_while_an_executor_starts_again_waits_for_it() {
    let stage = Stage::whole([vec![]]).await;
    let entry = stage.registry.get("executors/exe_a").await.unwrap().unwrap();
    let mut empty: ExecutorRecord = record::parse(&entry).unwrap();
    empty.spans.clear();
    stage.run().await.1.unwrap();

    stage.registry.put("executors/exe_a", &record::to_value(&empty), None).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let registry = stage.registry.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(700)).await;
        registry.put("executors/exe_a", &entry.value, None).await.unwrap();
    });
    let (tokens, end) = stage.run().await;
    assert_eq!(tokens, Stage::wanted());
    end.unwrap();

    // Nobody is to hold it any more: then it is told at once.
    stage.registry.put("executors/exe_a", &record::to_value(&empty), None).await.unwrap();
    stage.registry.put(key::PLAN, &record::to_value(&Plan { generation: 8, ..Plan::default() }), None).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let began = tokio::time::Instant::now();
    assert_eq!(stage.run().await.1.unwrap_err().code, Code::ModelNotReady);
    assert!(began.elapsed() < Duration::from_millis(10), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn model_that_was_replaced_is_not_waited_for() {
    let stage = Stage::whole([vec![Act::DieAfter(3)]]).await;
    let mut events = stage.dispatch.start(stage.sequence(1)).await.unwrap();
    stage.registry.put(key::PLAN, &record::to_value(&Plan { generation: 8, ..Plan::default() }), None).await.unwrap();
    let mut gone: ExecutorRecord = record::parse(&stage.registry.get("executors/exe_a").await.unwrap().unwrap()).unwrap();
    gone.spans.clear();
    stage.registry.put("executors/exe_a", &record::to_value(&gone), None).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let began = tokio::time::Instant::now();
    let mut last = None;
    while let Some(event) = events.next().await {
        last = Some(event);
    }
    let error = last.unwrap().unwrap_err();
    assert!(error.message.contains("replaced or removed"), "{}", error.message);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn repeated_tokens_are_dropped_and_skipped_ones_are_a_loss() {
    let stage = Stage::whole([vec![Act::DieAfter(3)], vec![Act::Repeat]]).await;
    assert_eq!(stage.run().await.0, Stage::wanted());
    let stage = Stage::whole([vec![Act::DieAfter(3), Act::Skip], vec![Act::Skip]]).await;
    assert_eq!(stage.run().await.0, Stage::wanted());
}

#[tokio::test(start_paused = true)]
async fn end_that_was_lost_is_known_from_the_journal() {
    let stage = Stage::whole([vec![Act::DieBeforeFinished], vec![]]).await;
    let (tokens, end) = stage.run().await;
    assert_eq!((tokens, end.unwrap().reason()), (Stage::wanted(), v1::FinishReason::Stop));
    assert!(stage.admissions(1).is_empty(), "nothing is left to compute");
}

#[tokio::test(start_paused = true)]
async fn refusals_go_elsewhere_and_are_told_when_all_refuse() {
    let refuse = |code| Act::FailAfter(0, code, v1::Retry::Elsewhere);
    let stage = Stage::whole([vec![refuse(Code::TooManyRequests)], vec![]]).await;
    assert_eq!(stage.run().await.0, Stage::wanted());
    for code in [Code::TooManyRequests, Code::NeverFits] {
        let stage = Stage::whole([vec![refuse(code)], vec![refuse(code)]]).await;
        let (tokens, end) = stage.run().await;
        assert_eq!((tokens.len(), end.unwrap_err().code), (0, code));
        assert_eq!([0, 1].map(|index| stage.admissions(index).len()), [1, 1], "each was asked once");
    }
    let stage = Stage::whole([vec![Act::FailAfter(2, Code::InvalidValue, v1::Retry::Never)], vec![]]).await;
    assert_eq!(stage.run().await.1.unwrap_err().code, Code::InvalidValue);
    assert!(stage.admissions(1).is_empty());
    let stage = Stage::whole([vec![Act::FailAfter(0, Code::ModelFailed, v1::Retry::Never)], vec![]]).await;
    let error = stage.run().await.1.unwrap_err();
    assert!(error.code == Code::ModelFailed && error.message.starts_with("model public/m failed to "), "{error:?}");
    assert!(stage.admissions(1).is_empty(), "others would fail as well");
    let stage = Stage::whole([vec![Act::Refuse(tonic::Code::Unimplemented)], vec![]]).await;
    assert_eq!(stage.run().await.1.unwrap_err().code, Code::Internal);
}

#[tokio::test(start_paused = true)]
async fn class_is_pinned_by_the_first_token_only() {
    for (count, class) in [(0, "gpu-v1"), (2, "cpu-v1")] {
        let stage = Stage::whole([vec![Act::DieAfter(count)], vec![], vec![]]).await;
        let key_b = key::executor(&executor_id(1));
        let mut other: ExecutorRecord = record::parse(&stage.registry.get(&key_b).await.unwrap().unwrap()).unwrap();
        other.numeric_class = "gpu-v1".to_owned();
        stage.registry.put(&key_b, &record::to_value(&other), None).await.unwrap();
        let ready = |state: &Arc<ClusterState>| state.executors.values().any(|record| record.numeric_class == "gpu-v1");
        stage.dispatch.shared.cluster.subscribe().wait_for(ready).await.unwrap();
        assert_eq!(stage.run().await.0, Stage::wanted());
        let resumed: Vec<v1::Admission> = [1, 2].into_iter().flat_map(|index| stage.admissions(index)).collect();
        assert_eq!((resumed.len(), resumed[0].numeric_class.as_str()), (1, class), "died after {count}");
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_are_bounded() {
    let stage = Stage::whole([vec![Act::DieAfter(2)].into_iter().chain((0..99).map(|_| Act::DieAfter(0))).collect()]).await;
    let (tokens, end) = stage.run().await;
    assert_eq!((tokens.len(), end.unwrap_err().code), (2, Code::Unavailable));
    assert_eq!(stage.admissions(0).len(), 7);
    assert_eq!(stage.dispatch.shared.lost.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn cut_chain_runs_over_its_owners_and_blames_the_right_one() {
    let lost_behind = Act::FailAfter(3, Code::Unavailable, v1::Retry::Elsewhere);
    let stage = Stage::of(vec![(vec![lost_behind], (0, 3)), (vec![], (3, BLOCKS)), (vec![], (3, BLOCKS))]).await;
    let (tokens, end) = stage.run().await;
    assert_eq!(tokens, Stage::wanted());
    end.unwrap();
    let routes: Vec<Vec<String>> =
        stage.admissions(0).iter().map(|admission| admission.route.iter().map(|hop| hop.executor_id.clone()).collect()).collect();
    assert_eq!(routes, [["exe_a", "exe_b"], ["exe_a", "exe_c"]]);
    assert!(stage.dispatch.shared.suspects.now().contains(&executor_id(1)));
}

#[tokio::test(start_paused = true)]
async fn span_that_a_later_hop_does_not_hold_yet_is_asked_for_again() {
    let refuse = || Act::FailAfter(0, Code::UnknownSpan, v1::Retry::Elsewhere);
    let stage = Stage::of(vec![(vec![refuse(), refuse()], (0, 2)), (vec![], (2, BLOCKS))]).await;
    assert_eq!(stage.run().await.0, Stage::wanted());
}

#[tokio::test(start_paused = true)]
async fn new_sequences_avoid_who_just_failed_and_spread_over_replicas() {
    let stage = Stage::whole([vec![Act::DieAfter(1)], vec![], vec![]]).await;
    stage.run().await.1.unwrap();
    stage.run().await.1.unwrap();
    assert_eq!(stage.admissions(0).len(), 1);
    tokio::time::sleep(Duration::from_secs(6)).await;
    let first = stage.dispatch.start(stage.sequence(1)).await.unwrap();
    let second = stage.dispatch.start(stage.sequence(2)).await.unwrap();
    let third = stage.dispatch.start(stage.sequence(3)).await.unwrap();
    assert_eq!(stage.dispatch.shared.loads.now().values().copied().collect::<Vec<_>>(), [1, 1, 1]);
    drop((first, second, third));
}

#[tokio::test(start_paused = true)]
async fn model_without_executors_is_not_ready() {
    let stage = Stage::of(vec![(vec![], (0, 3))]).await;
    assert_eq!(stage.run().await.1.unwrap_err().code, Code::ModelNotReady);
    assert!(matches!(stage.dispatch.ready(), Readiness::NotReady(_)));
    stage.dispatch.drain();
    assert_eq!(stage.dispatch.start(stage.sequence(1)).await.err().unwrap().code, Code::Draining);
}

#[tokio::test(start_paused = true)]
async fn keys_and_limits_of_tenants_hold() {
    let stage = Stage::whole([vec![]]).await;
    let keys = vec![KeyRecord { hash: KeyHash::of("ask_x").to_string(), created_ms: 0 }];
    let tenant = TenantRecord { keys, limits: Limits { requests_max: Some(1), weight: None }, ..TenantRecord::default() };
    stage.registry.put("tenants/acme", &record::to_value(&tenant), None).await.unwrap();
    stage.dispatch.shared.cluster.subscribe().wait_for(|state| !state.tenants.has_no_keys()).await.unwrap();
    for key in [None, Some("ask_y")] {
        assert_eq!(stage.dispatch.authenticate(key).unwrap_err().code, Code::InvalidApiKey);
    }
    let acme = stage.dispatch.authenticate(Some("ask_x")).unwrap();
    let sequence = |request| NewSequence { tenant: acme.clone(), ..stage.sequence(request) };
    let first = stage.dispatch.start(sequence(1)).await.unwrap();
    let _choice = stage.dispatch.start(sequence(1)).await.unwrap();
    assert_eq!(stage.dispatch.start(sequence(2)).await.err().unwrap().code, Code::TooManyRequests);
    drop((first, _choice));
    assert!(stage.dispatch.start(sequence(2)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn deadline_ends_a_sequence_that_nobody_runs() {
    let options = DispatchOptions { attempts_max: 1000, deadline: Some(Duration::from_secs(3)), ..DispatchOptions::default() };
    let deaths = (0..99).map(|_| Act::DieAfter(0)).collect();
    let stage = Stage::with(vec![(deaths, (0, BLOCKS))], options).await;
    let (_, end) = stage.run().await;
    assert!(end.unwrap_err().message.contains("time is up"));
    assert!(stage.admissions(0)[0].deadline_unix_ms > 0);
}
