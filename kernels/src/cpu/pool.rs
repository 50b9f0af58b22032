//! The thread pool: workers are started once, spin briefly for the next job and then park, so an idle server burns no
//! CPU. The caller takes part in its own job; a worker that wakes late finds the job closed and is not waited for.
//! Nothing is allocated for a job. Results never depend on who computes which unit.
//!
//! `state` is one word: the job's epoch in the upper half, the OPEN bit, and how many workers are inside. A worker
//! enters by counting itself in while OPEN is set; the caller closes the job when the units are used up and then waits
//! for the count to fall to zero. Only in between may the job's closure be touched.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::thread::JoinHandle;

/// Runs jobs cut in units over `threads` threads, one of which is the caller's.
pub(super) struct Pool {
    shared: Arc<State>,
    /// Held by the caller whose job is on; another caller meanwhile works alone.
    turn: Mutex<()>,
    /// Jobs that threads were called to, and waited for, since the start.
    barriers: AtomicU64,
    workers: Vec<JoinHandle<()>>,
}

struct State {
    state: AtomicU64,
    /// For each thread the next unit of its span of the open job: thread i of T begins with units `U i / T .. U (i + 1) / T`.
    next: Box<[Next]>,
    job: UnsafeCell<Job>,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Workers that are parked or about to be.
    parked: AtomicUsize,
    gate: Mutex<()>,
    bell: Condvar,
}

/// In a cache line of its own: every thread adds to its own one mostly.
#[derive(Default)]
#[repr(align(64))]
struct Next(AtomicUsize);

#[derive(Clone, Copy)]
struct Job {
    /// The caller's closure; its true lifetime ends when the caller has seen the job closed and empty.
    run: Option<&'static (dyn Fn(usize) + Sync)>,
    units: usize,
}

// SAFETY: `job` is written only by the caller that holds `turn` while the job is closed and empty, and read only by
// workers that are counted in; the count's acquire and release order the two.
unsafe impl Sync for State {}
// SAFETY: all fields may move between threads; the closure is Sync.
unsafe impl Send for State {}

impl Pool {
    /// `threads` of at least 1, the caller included.
    pub(super) fn new(threads: usize) -> Self {
        let shared = Arc::new(State {
            state: AtomicU64::new(0),
            next: (0..threads.max(1)).map(|_| Next::default()).collect(),
            job: UnsafeCell::new(Job { run: None, units: 0 }),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            gate: Mutex::new(()),
            bell: Condvar::new(),
        });
        let workers = (1..threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                let builder = std::thread::Builder::new().name(format!("ashlar-cpu-{index}"));
                builder.spawn(move || work(&shared, index)).expect("the system starts the pool's threads at start-up")
            })
            .collect();
        Self { shared, turn: Mutex::new(()), barriers: AtomicU64::new(0), workers }
    }

    /// Threads that a job may use.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Jobs that several threads took part in so far: each ends with a barrier.
    pub(super) fn barriers(&self) -> u64 {
        self.barriers.load(Ordering::Relaxed)
    }

    /// Calls `unit` once for each of `0..units`, from any of the threads, and returns when all are done. Panics if a unit did.
    ///
    /// Each thread goes through a span of its own in ascending order, the same one for the same number of units: what it
    /// read or first touched it gets again, and what it will read next is known. Who is done takes from the others' spans.
    pub(super) fn run(&self, units: usize, unit: &(dyn Fn(usize) + Sync)) {
        if units <= 1 || self.workers.is_empty() {
            (0..units).for_each(unit);
            return;
        }
        let _turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return (0..units).for_each(unit),
        };
        self.barriers.fetch_add(1, Ordering::Relaxed);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. `Close` below waits until no worker is inside, even if `unit` panics here,
        // so the closure outlives every use.
        let run: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(unit) };
        // SAFETY: we hold `turn` and the previous job is closed and empty (its `Close` has run): nobody reads the cell.
        unsafe { *shared.job.get() = Job { run: Some(run), units } };
        let threads = shared.next.len();
        for (thread, next) in shared.next.iter().enumerate() {
            next.0.store(units * thread / threads, Ordering::Relaxed);
        }
        shared.panicked.store(false, Ordering::Relaxed);
        let epoch = (shared.state.load(Ordering::Relaxed) >> 32) + 1;
        shared.state.store((epoch << 32) | OPEN, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) > 0 {
            // Taking the gate orders us after a worker that has looked at `state` but does not sleep yet.
            drop(shared.gate.lock().unwrap_or_else(PoisonError::into_inner));
            shared.bell.notify_all();
        }
        {
            let _close = Close(shared);
            shared.take_units(0, unit, units);
        }
        assert!(!shared.panicked.load(Ordering::Relaxed), "a unit of work panicked on a pool thread");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.gate.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.bell.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl State {
    /// The units of `thread`'s span, then what is left of the others'.
    fn take_units(&self, thread: usize, unit: &(dyn Fn(usize) + Sync), units: usize) {
        let threads = self.next.len();
        for span in (thread..threads).chain(0..thread) {
            let (next, end) = (&self.next[span].0, units * (span + 1) / threads);
            while next.load(Ordering::Relaxed) < end {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= end {
                    break;
                }
                unit(index);
            }
        }
    }
}

/// Closes the open job and waits for the workers inside.
struct Close<'a>(&'a State);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut rounds = 0u32;
        while self.0.state.load(Ordering::Acquire) & COUNT != 0 {
            rounds += 1;
            // The worker may have lost its core to another process: do not burn ours against it.
            if rounds < CLOSE_SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

/// A worker inside the open job; leaves it on drop.
struct Inside<'a>(&'a State);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panicked.store(true, Ordering::Relaxed);
            // Units that nobody will do; the caller stops early and reports.
            self.0.next.iter().for_each(|next| next.0.store(usize::MAX / 2, Ordering::Relaxed));
        }
        self.0.state.fetch_sub(1, Ordering::Release);
    }
}

fn work(shared: &State, thread: usize) {
    let mut done = 0u64;
    let mut spins = 0u32;
    while !shared.stop.load(Ordering::Relaxed) {
        let state = shared.state.load(Ordering::Acquire);
        if state & OPEN != 0 && state >> 32 != done {
            if shared.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                let _inside = Inside(shared);
                // SAFETY: we are counted in, so the job stays as it is until we leave.
                let job = unsafe { *shared.job.get() };
                if let Some(run) = job.run {
                    shared.take_units(thread, run, job.units);
                }
                done = state >> 32;
                spins = 0;
            }
        } else if spins < IDLE_SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            park(shared, done);
            spins = 0;
        }
    }
}

/// Sleeps until a job after `done` is open, or the pool stops.
fn park(shared: &State, done: u64) {
    shared.parked.fetch_add(1, Ordering::SeqCst);
    let mut gate = shared.gate.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let state = shared.state.load(Ordering::SeqCst);
        if (state & OPEN != 0 && state >> 32 != done) || shared.stop.load(Ordering::SeqCst) {
            break;
        }
        gate = shared.bell.wait(gate).unwrap_or_else(PoisonError::into_inner);
    }
    drop(gate);
    shared.parked.fetch_sub(1, Ordering::SeqCst);
}

const OPEN: u64 = 1 << 31;
const COUNT: u64 = OPEN - 1;
/// Looks at the state before a worker parks: about 50 us, longer than the gap between two ops of a step.
const IDLE_SPINS: u32 = 1_500;
/// Looks before the caller yields its core to a worker that is still inside.
const CLOSE_SPINS: u32 = 4_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_runs_once() {
        let pool = Pool::new(3);
        for units in [0, 1, 2, 7, 1000] {
            for _ in 0..200 {
                let counts: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                pool.run(units, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn parked_workers_wake_for_a_job() {
        let pool = Pool::new(2);
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let other = AtomicBool::new(false);
            let me = std::thread::current().id();
            pool.run(50, &|_| {
                other.fetch_or(std::thread::current().id() != me, Ordering::Relaxed);
                std::thread::sleep(std::time::Duration::from_millis(1));
            });
            assert!(other.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn callers_at_the_same_time_do_not_wait_for_each_other() {
        let pool = Pool::new(2);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let sum = AtomicUsize::new(0);
                        pool.run(20, &|i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                        assert_eq!(sum.load(Ordering::Relaxed), 190);
                    }
                });
            }
        });
    }

    #[test]
    #[should_panic(expected = "panicked")]
    fn a_panic_in_a_unit_reaches_the_caller() {
        let pool = Pool::new(2);
        pool.run(100, &|i| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            assert!(i != 60, "panicked on purpose");
        });
    }
}
