//! Ceilings of this machine, measured in the same minute as the kernels that are held against them: read bandwidth, and
//! the register-only peaks of fma, of pairs of bf16 products and of the int8 dot product.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::Cpu;
use super::isa::{Kernel, PairKernel};
use super::lanes::Lanes;
use super::memory::Aligned;
use super::pairs::Pairs;
use crate::ops::PackError;

/// What the machine can do with a backend's threads and instruction set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Bytes a second read from a buffer of `probe_bytes`.
    pub read_bytes_per_second: f64,
    /// f32 multiplications and additions a second, from registers.
    pub f32_ops_per_second: f64,
    /// bf16 multiplications and additions to f32 a second, from registers.
    pub bf16_ops_per_second: f64,
    /// int8 multiplications and additions a second, from registers.
    pub int8_ops_per_second: f64,
}

/// Measures them all, each as the best of several runs. `probe_bytes` should be 4 times the last-level cache.
pub fn ceilings(cpu: &Cpu, probe_bytes: usize) -> Result<Ceilings, PackError> {
    Ok(Ceilings {
        read_bytes_per_second: read_bandwidth(cpu, probe_bytes)?,
        f32_ops_per_second: f32_peak(cpu),
        bf16_ops_per_second: bf16_peak(cpu),
        int8_ops_per_second: int8_peak(cpu),
    })
}

/// Bytes a second that all threads together read from one buffer.
pub fn read_bandwidth(cpu: &Cpu, bytes: usize) -> Result<f64, PackError> {
    let mut reader = Reader::new(bytes)?;
    let mut window_bytes = 0;
    let seconds = best_seconds(4 * BUDGET, || window_bytes = reader.pass(cpu));
    Ok(window_bytes as f64 / seconds)
}

/// A buffer that is read one window after another, so that a run is short and yet no cache holds what it reads.
pub(crate) struct Reader {
    data: Aligned<u8>,
    /// 64-byte chunk at which the next window begins.
    next: usize,
}

impl Reader {
    /// `bytes` should be 4 times the last-level cache.
    pub(crate) fn new(bytes: usize) -> Result<Self, PackError> {
        let mut data = Aligned::new(bytes.max(1).next_multiple_of(64))?;
        // Zero pages are all one physical page until they are written.
        data.fill(1);
        Ok(Self { data, next: 0 })
    }

    /// All threads read one window; its bytes.
    pub(crate) fn pass(&mut self, cpu: &Cpu) -> usize {
        let (chunks, _) = self.data.as_chunks::<64>();
        let window = &chunks[self.next..(self.next + WINDOW_CHUNKS).min(chunks.len())];
        self.next = if chunks.len() - self.next < 2 * WINDOW_CHUNKS { 0 } else { self.next + WINDOW_CHUNKS };
        cpu.pool.run(window.len().div_ceil(READ_CHUNKS), &|unit| {
            let chunks = &window[unit * READ_CHUNKS..((unit + 1) * READ_CHUNKS).min(window.len())];
            black_box(cpu.proven.run(Read { chunks }));
        });
        window.len() * 64
    }
}

/// f32 multiplications and additions a second of all threads.
pub fn f32_peak(cpu: &Cpu) -> f64 {
    let seconds = best_seconds(BUDGET, || {
        cpu.pool.run(cpu.threads(), &|_| {
            black_box(cpu.proven.run(Fma { x: black_box(0.5) }));
        })
    });
    (cpu.threads() * STEPS * ACCUMULATORS * 16 * 2) as f64 / seconds
}

/// bf16 multiplications and additions a second of all threads: by the dot product where there is one, else by fma.
pub fn bf16_peak(cpu: &Cpu) -> f64 {
    let mut ops = 0.0;
    let seconds = best_seconds(BUDGET, || ops = bf16_pass(cpu));
    ops / seconds
}

/// As [`int8_pass`], of pairs of bf16.
pub(crate) fn bf16_pass(cpu: &Cpu) -> f64 {
    let chains = AtomicUsize::new(0);
    cpu.pool.run(cpu.threads(), &|_| {
        // 1/2 and 1/2: the sums grow slowly and stay normal.
        let (sum, count) = cpu.proven.run_pairs(PairDot { pair: black_box(0x3f00_3f00) });
        black_box(sum);
        chains.fetch_add(count, Ordering::Relaxed);
    });
    (chains.into_inner() * STEPS * 32 * 2) as f64
}

/// int8 multiplications and additions a second of all threads.
pub fn int8_peak(cpu: &Cpu) -> f64 {
    let mut ops = 0.0;
    let seconds = best_seconds(BUDGET, || ops = int8_pass(cpu));
    ops / seconds
}

/// All threads compute dot products from registers, for a third of a millisecond or so; the operations.
pub(crate) fn int8_pass(cpu: &Cpu) -> f64 {
    cpu.pool.run(cpu.threads(), &|_| {
        black_box(cpu.proven.run(Dot { x: black_box(3) }));
    });
    (cpu.threads() * STEPS * ACCUMULATORS * 64 * 2) as f64
}

/// The shortest of as many runs as fit in `budget`, at least three. On a shared machine the best is the one least
/// disturbed: runs should be shorter than a scheduler's time slice, about a millisecond.
#[expect(clippy::disallowed_methods, reason = "a measurement reads the real clock")]
pub(crate) fn best_seconds(budget: Duration, mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let (mut best, mut runs) = (Duration::MAX, 0);
    while runs < 3 || begin.elapsed() < budget {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed());
        runs += 1;
    }
    best.as_secs_f64()
}

struct Read<'a> {
    chunks: &'a [[u8; 64]],
}

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) -> f32 {
        let mut sums = [s.dot_start(0); 8];
        let quad = s.quad([1; 4]);
        let (blocks, _) = self.chunks.as_chunks::<8>();
        for block in blocks {
            for i in 0..8 {
                sums[i] = s.dot(sums[i], s.load_codes(&block[i]), quad);
            }
        }
        let mut total = 0.0;
        for sum in sums {
            total += s.halving_sum(s.dot_finish(sum));
        }
        total
    }
}

struct Fma {
    x: f32,
}

impl Kernel for Fma {
    type Output = f32;

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) -> f32 {
        let x = s.splat(self.x);
        let mut acc = [s.splat(1.0); ACCUMULATORS];
        for _ in 0..STEPS {
            for i in 0..ACCUMULATORS {
                acc[i] = s.fma(acc[i], x, x);
            }
        }
        let mut total = 0.0;
        for sum in acc {
            total += s.halving_sum(sum);
        }
        total
    }
}

struct PairDot {
    pair: u32,
}

impl PairKernel for PairDot {
    /// The sum, and how many chains there were.
    type Output = (f32, usize);

    #[inline(always)]
    fn run<P: Pairs>(self, p: P) -> (f32, usize) {
        // The instruction has a latency of six or seven cycles; half as many registers hold fewer chains, each of two additions.
        if P::S::WIDE { self.chains::<P, 16>(p) } else { self.chains::<P, 5>(p) }
    }
}

impl PairDot {
    #[inline(always)]
    fn chains<P: Pairs, const N: usize>(self, p: P) -> (f32, usize) {
        let s = p.lanes();
        let (weights, input) = (p.load(&[self.pair; 16]), p.splat(self.pair));
        let mut acc = [s.splat(1.0); N];
        for _ in 0..STEPS {
            for i in 0..N {
                acc[i] = p.dot(acc[i], weights, input);
            }
        }
        let mut total = 0.0;
        for sum in acc {
            total += s.halving_sum(sum);
        }
        (total, N)
    }
}

struct Dot {
    x: i8,
}

impl Kernel for Dot {
    type Output = f32;

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) -> f32 {
        let (quad, codes) = (s.quad([self.x; 4]), s.load_codes(&[self.x.cast_unsigned(); 64]));
        let mut acc = [s.dot_start(0); ACCUMULATORS];
        for _ in 0..STEPS {
            for i in 0..ACCUMULATORS {
                acc[i] = s.dot(acc[i], codes, quad);
            }
        }
        let mut total = 0.0;
        for sum in acc {
            total += s.halving_sum(s.dot_finish(sum));
        }
        total
    }
}

const BUDGET: Duration = Duration::from_millis(250);
/// 64-byte chunks of one timed run of the bandwidth probe (8 MiB), and of its units.
const WINDOW_CHUNKS: usize = 128 << 10;
const READ_CHUNKS: usize = 4 << 10;
/// Independent chains, enough to hide the latency of five cycles at two an instruction.
const ACCUMULATORS: usize = 12;
/// Steps of a peak's loop, about a third of a millisecond; int8 sums stay far below overflow.
const STEPS: usize = 150_000;
