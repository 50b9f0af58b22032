//! What the project claims of its kernels, each claim measured in pairs against a ceiling or another kernel: the fixed list
//! behind `ashlar bench kernels --assert`. At most 60 cells, some minutes.

use std::fmt;
use std::time::Duration;

use super::attention::{Decode, Pages};
use super::paired::{Estimate, alternate};
use super::{Rotation, Rows, random_layer};
use crate::cpu::probe::{Reader, bf16_pass, int8_pass};
use crate::cpu::{Cpu, CpuOptions, Linear};
use crate::format::Dtype;
use crate::ops::{Bf16Compute, Columns, Finish, KvFormat, LinearRun, Ops, PackError};

/// How long to measure, and how much memory to rotate through.
#[derive(Debug, Clone, Copy)]
pub struct ClaimOptions {
    /// Rounds of a pair.
    pub rounds: usize,
    /// Time of a side in a round.
    pub budget: Duration,
    /// Bytes that cells limited by bandwidth rotate through: 4 times the last-level cache.
    pub rotate_bytes: usize,
}

impl Default for ClaimOptions {
    fn default() -> Self {
        Self { rounds: 30, budget: Duration::from_millis(50), rotate_bytes: 1 << 30 }
    }
}

/// What is claimed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Claim {
    /// One row through the layers of a block, at least [`DECODE_SHARE`] of the read bandwidth.
    Decode {
        /// Whose block.
        shapes: Shapes,
        /// Format of its weights.
        dtype: Dtype,
    },
    /// [`RUNS`] layers with one row each in one call, at least [`RUNS_SHARE`] of the read bandwidth.
    Runs {
        /// Format of the weights.
        dtype: Dtype,
    },
    /// Attention of a step of sequences that share nothing, at least [`ATTEND_SHARE`] of the read bandwidth.
    Attend(Decode),
    /// Many rows, at least [`ROWS_SHARE`] of the int8 peak; bf16 weights from bf16 activations, at least [`BF16_ROWS_SHARE`] of the bf16 peak.
    Rows {
        /// Whose gate and up layer.
        shapes: Shapes,
        /// Format of its weights.
        dtype: Dtype,
        /// Rows.
        row_count: usize,
    },
    /// One row more costs at most [`ROW_COST`] times as much for each row.
    OneMoreRow {
        /// Format of the weights.
        dtype: Dtype,
        /// Rows before.
        row_count: usize,
    },
    /// The instruction set that was chosen takes at most [`DISPATCH_COST`] times what the next lower one takes.
    Dispatch {
        /// Format of the weights.
        dtype: Dtype,
        /// Rows.
        row_count: usize,
    },
}

/// The shapes of a model's block, outputs by inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shapes {
    /// As people call it.
    pub name: &'static str,
    /// Fused q, k, v; output; fused gate, up; down.
    pub layers: [(usize, usize); 4],
}

/// Width 576, 9 heads over 3.
pub const SMOLLM2: Shapes = Shapes { name: "SmolLM2-135M", layers: [(960, 576), (576, 576), (3072, 576), (576, 1536)] };
/// Width 896, 14 heads over 2.
pub const QWEN: Shapes = Shapes { name: "Qwen2.5-0.5B", layers: [(1152, 896), (896, 896), (9728, 896), (896, 4864)] };
/// Width 4096, 32 heads over 8.
pub const LLAMA: Shapes = Shapes { name: "Llama-3-8B", layers: [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)] };

/// Share of the read bandwidth of one row.
pub const DECODE_SHARE: f64 = 0.85;
/// Share of the read bandwidth of many layers with a row each.
pub const RUNS_SHARE: f64 = 0.80;
/// Layers of such a call.
pub const RUNS: usize = 16;
/// Share of the read bandwidth of attention.
pub const ATTEND_SHARE: f64 = 0.70;
/// Share of the int8 peak of many rows.
pub const ROWS_SHARE: f64 = 0.50;
/// Share of the bf16 peak of many rows.
pub const BF16_ROWS_SHARE: f64 = 0.65;
/// Time a row at one row more, over the time a row before.
pub const ROW_COST: f64 = 1.15;
/// Time of the chosen instruction set over that of the next lower one.
pub const DISPATCH_COST: f64 = 1.05;

/// Every claim, in the order in which it is measured.
pub fn all() -> Vec<Claim> {
    let formats = [Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 32 }];
    let mut claims = Vec::new();
    for shapes in [SMOLLM2, QWEN, LLAMA] {
        claims.extend(formats.map(|dtype| Claim::Decode { shapes, dtype }));
    }
    claims.extend(formats.map(|dtype| Claim::Runs { dtype }));
    for (rows, tokens) in [(1, 1024), (16, 160), (32, 160)] {
        claims.push(Claim::Attend(Decode { heads: 9, kv_heads: 3, head_dim: 64, format: KvFormat::F32, rows, tokens }));
    }
    for shapes in [SMOLLM2, QWEN, LLAMA] {
        claims.extend(formats.map(|dtype| Claim::Rows { shapes, dtype, row_count: 64 }));
    }
    for shapes in [SMOLLM2, QWEN, LLAMA] {
        claims.push(Claim::Rows { shapes, dtype: formats[0], row_count: 512 });
    }
    claims.extend([64, 512].map(|row_count| Claim::Rows { shapes: QWEN, dtype: Dtype::Bf16, row_count }));
    for dtype in formats {
        claims.extend([8, 64, 96].map(|row_count| Claim::OneMoreRow { dtype, row_count }));
        claims.extend([1, 64].map(|row_count| Claim::Dispatch { dtype, row_count }));
    }
    claims
}

impl Claim {
    /// Layers by row counts that it times.
    pub fn cells(&self) -> usize {
        match self {
            Self::Decode { shapes, .. } => shapes.layers.len(),
            Self::Runs { .. } | Self::Attend(_) | Self::Rows { .. } => 1,
            Self::OneMoreRow { .. } | Self::Dispatch { .. } => 2,
        }
    }

    /// What the figure is held against.
    pub fn bound(&self) -> Bound {
        match self {
            Self::Decode { .. } => Bound::AtLeast(DECODE_SHARE),
            Self::Runs { .. } => Bound::AtLeast(RUNS_SHARE),
            Self::Attend(_) => Bound::AtLeast(ATTEND_SHARE),
            Self::Rows { dtype: Dtype::Bf16, .. } => Bound::AtLeast(BF16_ROWS_SHARE),
            Self::Rows { .. } => Bound::AtLeast(ROWS_SHARE),
            Self::OneMoreRow { .. } => Bound::AtMost(ROW_COST),
            Self::Dispatch { .. } => Bound::AtMost(DISPATCH_COST),
        }
    }

    /// Measures it. `lower` has the next lower instruction set, with as many threads.
    ///
    /// # Errors
    /// When there is no memory for the layers.
    pub fn measure(&self, cpu: &Cpu, lower: &Cpu, options: &ClaimOptions) -> Result<Estimate, PackError> {
        let alternate = |a: &mut dyn FnMut(), b: &mut dyn FnMut(), ratio: &dyn Fn(f64, f64) -> f64| {
            let rounds = alternate(options.rounds, options.budget, a, b);
            Estimate::of(&rounds.into_iter().map(|(a, b)| ratio(a, b)).collect::<Vec<_>>())
        };
        Ok(match *self {
            Self::Decode { shapes, dtype } => {
                let mut block = Block::new(cpu, shapes, dtype, options.rotate_bytes)?;
                let (block_bytes, mut reader) = (block.bytes as f64, Reader::new(options.rotate_bytes)?);
                let window_bytes = reader.pass(cpu) as f64;
                let share = |block: f64, read: f64| (block_bytes / block) / (window_bytes / read);
                alternate(&mut || block.step(cpu), &mut || _ = reader.pass(cpu), &share)
            }
            Self::Runs { dtype } => {
                let (outputs, inputs) = QWEN.layers[0];
                let layer = random_layer(cpu, dtype, outputs, inputs)?;
                let call_bytes = (RUNS * layer.bytes()) as f64;
                let layers = Rotation::new(&layer, options.rotate_bytes.div_ceil(layer.bytes()).next_multiple_of(RUNS))?.layers;
                let mut runs = layers.chunks(RUNS).cycle();
                let mut rows = Rows::new(cpu, RUNS, inputs, outputs)?;
                let mut reader = Reader::new(options.rotate_bytes)?;
                let window_bytes = reader.pass(cpu) as f64;
                let share = |call: f64, read: f64| (call_bytes / call) / (window_bytes / read);
                let mut call = || {
                    let layers = runs.next().expect("a cycle of at least one call");
                    let runs: [_; RUNS] = std::array::from_fn(|row| LinearRun { linear: &layers[row], bias: None, rows: row..row + 1 });
                    cpu.linear_runs(&mut rows.out, Columns::dense(outputs), &rows.x, Columns::dense(inputs), &runs, Finish::Store);
                };
                alternate(&mut call, &mut || _ = reader.pass(cpu), &share)
            }
            Self::Attend(decode) => {
                let mut pages = Pages::new(cpu, decode, options.rotate_bytes)?;
                let (step_bytes, mut reader) = (pages.step_bytes as f64, Reader::new(options.rotate_bytes)?);
                let window_bytes = reader.pass(cpu) as f64;
                let share = |step: f64, read: f64| (step_bytes / step) / (window_bytes / read);
                alternate(&mut || pages.step(cpu), &mut || _ = reader.pass(cpu), &share)
            }
            Self::Rows { shapes, dtype, row_count } => {
                let (outputs, inputs) = shapes.layers[2];
                let from_bf16 = CpuOptions { threads: cpu.threads(), isa: Some(cpu.isa()), bf16_compute: Bf16Compute::Bf16 };
                let own = (dtype == Dtype::Bf16).then(|| Cpu::new(from_bf16));
                let (cpu, pass): (&Cpu, fn(&Cpu) -> f64) = own.as_ref().map_or((cpu, int8_pass), |own| (own, bf16_pass));
                let layer = random_layer(cpu, dtype, outputs, inputs)?;
                let mut rows = Rows::new(cpu, row_count, inputs, outputs)?;
                let ops = (2 * row_count * inputs * outputs) as f64;
                let peak_ops = pass(cpu);
                let share = |call: f64, peak: f64| (ops / call) / (peak_ops / peak);
                alternate(&mut || rows.apply(cpu, &layer), &mut || _ = pass(cpu), &share)
            }
            Self::OneMoreRow { dtype, row_count } => {
                let (outputs, inputs) = SMOLLM2.layers[2];
                let layer = random_layer(cpu, dtype, outputs, inputs)?;
                let (mut more, mut rows) = (Rows::new(cpu, row_count + 1, inputs, outputs)?, Rows::new(cpu, row_count, inputs, outputs)?);
                let cost = |more: f64, before: f64| more / (row_count + 1) as f64 / (before / row_count as f64);
                alternate(&mut || more.apply(cpu, &layer), &mut || rows.apply(cpu, &layer), &cost)
            }
            Self::Dispatch { dtype, row_count } => {
                let (outputs, inputs) = QWEN.layers[2];
                let layer = random_layer(cpu, dtype, outputs, inputs)?;
                let (mut here, mut there) = (Rows::new(cpu, row_count, inputs, outputs)?, Rows::new(cpu, row_count, inputs, outputs)?);
                alternate(&mut || here.apply(cpu, &layer), &mut || there.apply(lower, &layer), &|here, there| here / there)
            }
        })
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decode { shapes, dtype } => write!(f, "{dtype} {} block, 1 row, of read bandwidth", shapes.name),
            Self::Runs { dtype } => write!(f, "{dtype} {RUNS} layers, 1 row each, of read bandwidth"),
            Self::Attend(Decode { format, rows, tokens, .. }) => {
                write!(f, "{format} attention, {rows} x {tokens} tokens, of read bandwidth")
            }
            Self::Rows { shapes, dtype, row_count } => {
                let peak = if *dtype == Dtype::Bf16 { "bf16" } else { "int8" };
                write!(f, "{dtype} {} gate+up, {row_count} rows, of {peak} peak", shapes.name)
            }
            Self::OneMoreRow { dtype, row_count } => write!(f, "{dtype} {row_count}+1 rows, time a row over {row_count}"),
            Self::Dispatch { dtype, row_count } => {
                write!(f, "{dtype} {row_count} row{}, time over the next lower instruction set", if *row_count == 1 { "" } else { "s" })
            }
        }
    }
}

/// What a figure must be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// No less.
    AtLeast(f64),
    /// No more.
    AtMost(f64),
}

impl Bound {
    /// Whether the figure is surely on the right side: the whole interval is.
    pub fn holds(self, seen: &Estimate) -> bool {
        match self {
            Self::AtLeast(bound) => seen.low >= bound,
            Self::AtMost(bound) => seen.high <= bound,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, ">= {bound:.2}"),
            Self::AtMost(bound) => write!(f, "<= {bound:.2}"),
        }
    }
}

/// Copies of a block's layers, one row through all layers of one copy a step.
struct Block {
    copies: Vec<Vec<Linear>>,
    rows: Vec<Rows>,
    next: usize,
    /// Of one copy.
    bytes: usize,
}

impl Block {
    fn new(cpu: &Cpu, shapes: Shapes, dtype: Dtype, rotate_bytes: usize) -> Result<Self, PackError> {
        let layers = shapes.layers.iter().map(|(n, k)| random_layer(cpu, dtype, *n, *k)).collect::<Result<Vec<_>, _>>()?;
        let bytes = layers.iter().map(Linear::bytes).sum();
        let rows = shapes.layers.iter().map(|(n, k)| Rows::new(cpu, 1, *k, *n)).collect::<Result<_, _>>()?;
        let copy = |_| layers.iter().map(Linear::duplicate).collect::<Result<Vec<_>, _>>();
        let copies = (0..rotate_bytes.div_ceil(bytes)).map(copy).collect::<Result<_, _>>()?;
        Ok(Self { copies, rows, next: 0, bytes })
    }

    fn step(&mut self, cpu: &Cpu) {
        self.next = (self.next + 1) % self.copies.len();
        for (linear, rows) in self.copies[self.next].iter().zip(&mut self.rows) {
            rows.apply(cpu, linear);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_at_most_sixty_cells_and_no_claim_twice() {
        let claims = all();
        assert!(claims.iter().map(Claim::cells).sum::<usize>() <= 60);
        for (index, claim) in claims.iter().enumerate() {
            assert!(!claims[..index].contains(claim), "{claim} twice");
        }
    }

    #[test]
    fn a_bound_holds_where_the_whole_interval_does() {
        let seen = Estimate { median: 0.9, low: 0.86, high: 0.95 };
        assert!(Bound::AtLeast(0.85).holds(&seen) && !Bound::AtLeast(0.87).holds(&seen));
        assert!(Bound::AtMost(0.95).holds(&seen) && !Bound::AtMost(0.94).holds(&seen));
        let none = Estimate { median: f64::NAN, low: f64::NAN, high: f64::NAN };
        assert!(!Bound::AtLeast(0.0).holds(&none) && !Bound::AtMost(9.0).holds(&none));
    }
}
