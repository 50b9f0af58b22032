//! Ceilings of this machine, measured in the same minute as the kernels that are held against them: read bandwidth, and
//! the register-only peaks of fma and of the int8 dot product.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Cpu;
use super::isa::Kernel;
use super::lanes::Lanes;
use super::memory::Aligned;
use crate::ops::PackError;

/// What the machine can do with a backend's threads and instruction set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Bytes a second read from a buffer of `probe_bytes`.
    pub read_bytes_per_second: f64,
    /// f32 multiplications and additions a second, from registers.
    pub f32_ops_per_second: f64,
    /// int8 multiplications and additions a second, from registers.
    pub int8_ops_per_second: f64,
}

/// Measures all three, each as the best of several runs. `probe_bytes` should be 4 times the last-level cache.
pub fn ceilings(cpu: &Cpu, probe_bytes: usize) -> Result<Ceilings, PackError> {
    Ok(Ceilings {
        read_bytes_per_second: read_bandwidth(cpu, probe_bytes)?,
        f32_ops_per_second: f32_peak(cpu),
        int8_ops_per_second: int8_peak(cpu),
    })
}

/// Bytes a second that all threads together read from one buffer.
pub fn read_bandwidth(cpu: &Cpu, bytes: usize) -> Result<f64, PackError> {
    let mut data = Aligned::<u8>::new(bytes.next_multiple_of(64))?;
    // Zero pages are all one physical page until they are written.
    data.fill(1);
    let (chunks, _) = data.as_chunks::<64>();
    let seconds = best_seconds(BANDWIDTH_RUNS, || {
        let units = chunks.len().div_ceil(READ_CHUNKS);
        cpu.pool.run(units, &|unit| {
            let chunks = &chunks[unit * READ_CHUNKS..((unit + 1) * READ_CHUNKS).min(chunks.len())];
            black_box(cpu.proven.run(Read { chunks }));
        });
    });
    Ok(data.len() as f64 / seconds)
}

/// f32 multiplications and additions a second of all threads.
pub fn f32_peak(cpu: &Cpu) -> f64 {
    let seconds = best_seconds(PEAK_RUNS, || {
        cpu.pool.run(cpu.threads(), &|_| {
            black_box(cpu.proven.run(Fma { x: black_box(0.5) }));
        })
    });
    (cpu.threads() * STEPS * ACCUMULATORS * 16 * 2) as f64 / seconds
}

/// int8 multiplications and additions a second of all threads.
pub fn int8_peak(cpu: &Cpu) -> f64 {
    let seconds = best_seconds(PEAK_RUNS, || {
        cpu.pool.run(cpu.threads(), &|_| {
            black_box(cpu.proven.run(Dot { x: black_box(3) }));
        })
    });
    (cpu.threads() * STEPS * ACCUMULATORS * 64 * 2) as f64 / seconds
}

/// The shortest of `runs` runs: on a shared machine the best is the one least disturbed.
#[expect(clippy::disallowed_methods, reason = "a measurement reads the real clock")]
pub(crate) fn best_seconds(runs: usize, mut run: impl FnMut()) -> f64 {
    let mut best = Duration::MAX;
    for _ in 0..runs {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed());
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

const BANDWIDTH_RUNS: usize = 5;
const PEAK_RUNS: usize = 10;
/// 64-byte chunks of a unit of the bandwidth probe.
const READ_CHUNKS: usize = 16 << 10;
/// Independent chains, enough to hide the latency of five cycles at two an instruction.
const ACCUMULATORS: usize = 12;
/// Steps of a peak's loop; int8 sums stay far below overflow.
const STEPS: usize = 1_000_000;
