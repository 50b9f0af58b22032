//! Two at work on one zoo in a store without locks, in many orders of their operations: two `add`s of one name, and `gc` beside an `add` of what
//! it would take.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use crate::scripted::{ScriptedStore, Verdict};
use crate::sound::assert_sound;
use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, add_dir};
use ashlar_zoo::gc::{self, GcReport};
use ashlar_zoo::ingest::{AddReport, IngestError, Recipe};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::{GRACE_DEFAULT, StoreError, Zoo};
use futures::FutureExt;
use object_store::memory::InMemory;
use tokio::sync::Notify;

/// Who may do the next operations, and how many.
struct Turns {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    /// What is left of the schedule, last first: who, and how many operations.
    schedule: Vec<(usize, usize)>,
    ended: [bool; 2],
}

impl Turns {
    /// By a seed: runs of operations, most of them short and some that are longer than all that there are.
    fn drawn(seed: u64) -> Arc<Self> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
        let mut draw = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state % below).unwrap()
        };
        let scale = [4, 30, 200][draw(3)];
        let first = draw(2);
        Self::of((0..400).map(|turn| ((first + turn) % 2, 1 + draw(scale))).collect())
    }

    fn of(mut schedule: Vec<(usize, usize)>) -> Arc<Self> {
        schedule.reverse();
        Arc::new(Self { state: Mutex::new(State { schedule, ended: [false; 2] }), changed: Notify::new() })
    }

    /// Waits until it is `who`'s turn.
    async fn take(&self, who: usize) {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.state.lock().unwrap();
                while let Some((turn, count)) = state.schedule.last().copied() {
                    if count > 0 && !state.ended[turn] {
                        break;
                    }
                    state.schedule.pop();
                }
                match state.schedule.last_mut() {
                    Some((turn, count)) if *turn == who => {
                        *count -= 1;
                        if *count == 0 {
                            self.changed.notify_waiters();
                        }
                        return;
                    }
                    None => return,
                    Some(_) => {}
                }
            }
            // Who has the turn may be computing, or be waiting for the one that is held here: then the turn passes on.
            if tokio::time::timeout(Duration::from_secs(2), changed).await.is_err() {
                self.state.lock().unwrap().schedule.pop();
                self.changed.notify_waiters();
            }
        }
    }

    fn end(&self, who: usize) {
        self.state.lock().unwrap().ended[who] = true;
        self.changed.notify_waiters();
    }
}

/// Runs two at once over one store, in the order of a schedule. What is there at the start is old.
async fn race<A, B>(inner: &Arc<InMemory>, turns: Arc<Turns>, a: impl AsyncFnOnce(Zoo) -> A, b: impl AsyncFnOnce(Zoo) -> B) -> (A, B) {
    let aged_before = SystemTime::now();
    let zoo = async |who| {
        let turns = turns.clone();
        let script = move |_| {
            let turns = turns.clone();
            async move {
                turns.take(who).await;
                Verdict::Done
            }
            .boxed()
        };
        Zoo::open(Arc::new(ScriptedStore::new(inner.clone(), script).aged_before(aged_before)), "memory").await.unwrap()
    };
    let run = async {
        tokio::join!(
            async {
                let done = a(zoo(0).await).await;
                turns.end(0);
                done
            },
            async {
                let done = b(zoo(1).await).await;
                turns.end(1);
                done
            }
        )
    };
    run.await
}

fn id(name: &str) -> ModelId {
    name.parse().unwrap()
}

async fn add(zoo: &Zoo, dir: &Path, name: &str) -> Result<AddReport, IngestError> {
    add_dir(zoo, dir, name, Recipe::Keep).await
}

#[tokio::test(start_paused = true)]
async fn two_adds_of_one_name_end_with_one_and_the_other_in_its_history_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1", 2).write(&dir.path().join("b"));
    let begun = Arc::new(InMemory::new());
    Zoo::create(begun.clone(), "memory").await.unwrap();
    for seed in 0..200 {
        let inner = Arc::new(begun.fork());
        let (a, b) = race(
            &inner,
            Turns::drawn(seed),
            async |zoo| Box::pin(add(&zoo, &dir.path().join("a"), "demo/m")).await,
            async |zoo| Box::pin(add(&zoo, &dir.path().join("b"), "demo/m")).await,
        )
        .await;
        let when = format!("seed {seed}");
        assert_sound(&inner, &when).await;
        let name = Zoo::open(inner.clone(), "memory").await.unwrap().read_model(&id("demo/m")).await.unwrap();
        let known: Vec<_> = std::iter::once(name.chain).chain(name.history.iter().map(|past| past.chain)).collect();
        let mut winners = 0;
        for added in [a, b] {
            match added {
                Ok(report) => {
                    assert!(known.contains(&report.chain), "{when}: {name:?}");
                    winners += 1;
                }
                Err(error) => assert!(matches!(error, IngestError::Contended(_)), "{when}: {error}"),
            }
        }
        assert_eq!(known.len(), winners, "{when}: {name:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_swaps_of_one_name_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    Checkpoint::llama(1).write(&dir.path().join("a"));
    let begun = Arc::new(InMemory::new());
    let zoo = Zoo::create(begun.clone(), "memory").await.unwrap();
    add(&zoo, &dir.path().join("a"), "demo/m").await.unwrap();
    let old = zoo.read_model(&id("demo/m")).await.unwrap();
    for (seed, expected) in (0..200).flat_map(|seed| [(seed, Some(&old)), (seed, None)]) {
        let inner = Arc::new(begun.fork());
        if expected.is_none() {
            Zoo::open(inner.clone(), "memory").await.unwrap().remove_model(&id("demo/m")).await.unwrap();
        }
        let swap = |created_ms| {
            let new = ashlar_zoo::manifest::ModelName { created_ms, ..old.clone() };
            async move |zoo: Zoo| zoo.set_model(&id("demo/m"), expected, &new).await
        };
        let ended: (Result<(), StoreError>, Result<(), StoreError>) = race(&inner, Turns::drawn(seed), swap(1), swap(2)).await;
        let won = match ended {
            (Ok(()), Err(StoreError::Conflict { .. })) => 1,
            (Err(StoreError::Conflict { .. }), Ok(())) => 2,
            other => panic!("seed {seed}: {other:?}"),
        };
        let name = Zoo::open(inner.clone(), "memory").await.unwrap().read_model(&id("demo/m")).await.unwrap();
        assert_eq!(name.created_ms, won, "seed {seed}");
    }
}

/// Old and without a name lie what `folder` needs; it is added beside a `gc`.
async fn gc_beside_add(dir: &Path, begun: &Arc<InMemory>, folder: &str, turns: Arc<Turns>, when: &str) {
    let inner = Arc::new(begun.fork());
    let (swept, added) = race(
        &inner,
        turns,
        async |zoo| gc::collect(&zoo, GRACE_DEFAULT, false).await,
        async |zoo| Box::pin(add(&zoo, &dir.join(folder), "demo/new")).await,
    )
    .await;
    assert_sound(&inner, when).await;
    let zoo = Zoo::open(inner.clone(), "memory").await.unwrap();
    let report = added.unwrap_or_else(|e| panic!("{when}: {e}"));
    assert_eq!(zoo.read_model(&id("demo/new")).await.unwrap().chain, report.chain);
    swept.unwrap_or_else(|e| panic!("{when}: {e}"));
}

/// A zoo in which nothing but `demo/base` has a name, and all that `a`, `b` and `lora` need lies there.
async fn begun(dir: &Path) -> Arc<InMemory> {
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.join("a"));
    // Stored as a delta of it.
    checkpoint.nudge(1e-4, 2).write(&dir.join("b"));
    Checkpoint::llama(3).write(&dir.join("base"));
    Peft::over("demo/base").lora("model.layers.1.self_attn.q_proj", (D, D), 4, 1).write(&dir.join("lora"));
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    add(&zoo, &dir.join("base"), "demo/base").await.unwrap();
    for folder in ["a", "b", "lora"] {
        add(&zoo, &dir.join(folder), &format!("demo/{folder}")).await.unwrap();
    }
    for folder in ["a", "b", "lora"] {
        zoo.remove_model(&id(&format!("demo/{folder}"))).await.unwrap();
    }
    inner
}

#[tokio::test(start_paused = true)]
async fn gc_takes_nothing_that_an_add_beside_it_comes_to_name() {
    let dir = tempfile::tempdir().unwrap();
    let begun = begun(dir.path()).await;
    for (seed, folder) in (0..67).flat_map(|seed| ["a", "b", "lora"].map(|folder| (seed, folder))) {
        gc_beside_add(dir.path(), &begun, folder, Turns::drawn(seed), &format!("{folder}, seed {seed}")).await;
    }
}

#[tokio::test(start_paused = true)]
async fn gc_that_stops_at_any_operation_while_an_add_runs_takes_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let begun = begun(dir.path()).await;
    let operations = {
        // What there is to stop at.
        let (inner, count) = (Arc::new(begun.fork()), Arc::new(Mutex::new(0)));
        let counted = count.clone();
        let script = move |_| {
            *counted.lock().unwrap() += 1;
            async { Verdict::Done }.boxed()
        };
        let store = ScriptedStore::new(inner, script).aged_before(SystemTime::now());
        let report = gc::collect(&Zoo::open(Arc::new(store), "memory").await.unwrap(), GRACE_DEFAULT, false).await.unwrap();
        assert_ne!(report, GcReport::default());
        *count.lock().unwrap()
    };
    for at in 1..operations {
        gc_beside_add(dir.path(), &begun, "b", Turns::of(vec![(0, at), (1, 100_000)]), &format!("gc stops after {at}")).await;
    }
}
