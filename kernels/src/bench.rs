//! Linear layers against the machine's ceilings, on the shapes of SmolLM2-135M: GB/s of weights for one row, operations
//! a second for many, each with its share. `ashlar bench kernels` prints it.

pub mod attention;
pub mod claims;
pub mod paired;

use std::fmt;
use std::time::Duration;

use crate::cpu::probe::{Ceilings, best_seconds};
use crate::cpu::{Buffer, Cpu, Linear};
use crate::format::{Dtype, TensorView, quantise};
use crate::ops::{Bf16Compute, Finish, Ops, PackError};

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Formats of the weights.
    pub dtypes: Vec<Dtype>,
    /// Shapes `[N, K]`.
    pub shapes: Vec<(usize, usize)>,
    /// Rows of a batch.
    pub row_counts: Vec<usize>,
    /// One-row cells rotate through copies of the layer of this many bytes together, so that no cache holds them.
    pub rotate_bytes: usize,
    /// Each cell is the best of the runs that fit in this time.
    pub budget: Duration,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self {
            dtypes: vec![Dtype::F32, Dtype::Bf16, Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 32 }, Dtype::Q8_0, Dtype::Q4_1],
            shapes: vec![(576, 576), (1536, 576), (576, 1536), (49_152, 576)],
            row_counts: vec![1, 64, 512],
            rotate_bytes: 1 << 30,
            budget: Duration::from_millis(250),
        }
    }
}

/// One measured cell.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cell {
    /// Format of the weights.
    pub dtype: Dtype,
    /// Outputs (N).
    pub outputs: usize,
    /// Inputs (K).
    pub inputs: usize,
    /// Rows of the batch.
    pub row_count: usize,
    /// Seconds of one call.
    pub seconds: f64,
    /// Weight bytes read a second.
    pub bytes_per_second: f64,
    /// Multiplications and additions a second.
    pub ops_per_second: f64,
    /// Of the read bandwidth for one row, else of the peak of the kind of arithmetic.
    pub share: f64,
}

/// Measures every cell and hands each over as soon as it is known.
pub fn linear(cpu: &Cpu, ceilings: &Ceilings, options: &BenchOptions, mut on_cell: impl FnMut(&Cell)) -> Result<(), PackError> {
    for &(outputs, inputs) in &options.shapes {
        for &dtype in &options.dtypes {
            let layer = Layer::new(cpu, dtype, outputs, inputs)?;
            for &row_count in &options.row_counts {
                on_cell(&layer.measure(cpu, ceilings, row_count, options)?);
            }
        }
    }
    Ok(())
}

/// A layer of random weights.
pub struct Layer {
    dtype: Dtype,
    linear: Linear,
}

impl Layer {
    /// Makes and packs it.
    ///
    /// # Errors
    /// When the format cannot have the shape, or there is no memory.
    pub fn new(cpu: &Cpu, dtype: Dtype, outputs: usize, inputs: usize) -> Result<Self, PackError> {
        Ok(Self { dtype, linear: random_layer(cpu, dtype, outputs, inputs)? })
    }

    /// The time of one call with `row_count` rows: of `options` only the memory and the budget count.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn measure(&self, cpu: &Cpu, ceilings: &Ceilings, row_count: usize, options: &BenchOptions) -> Result<Cell, PackError> {
        let Self { dtype, linear } = self;
        let (outputs, inputs, layer_bytes) = (linear.outputs(), linear.inputs(), linear.bytes());
        let copies = if row_count == 1 { options.rotate_bytes.div_ceil(layer_bytes) } else { 1 };
        let mut layers = Rotation::new(linear, copies)?;
        let mut rows = Rows::new(cpu, row_count, inputs, outputs)?;
        let calls = CELL_OPS.div_ceil(2 * row_count * inputs * outputs).max(1);
        let seconds = best_seconds(options.budget, || (0..calls).for_each(|_| rows.apply(cpu, layers.next()))) / calls as f64;
        let bytes_per_second = layer_bytes as f64 / seconds;
        let ops_per_second = (2 * row_count * inputs * outputs) as f64 / seconds;
        let peak = match dtype {
            Dtype::Bf16 if cpu.bf16_compute() == Bf16Compute::Bf16 => ceilings.bf16_ops_per_second,
            _ if dtype.group().is_some() => ceilings.int8_ops_per_second,
            _ => ceilings.f32_ops_per_second,
        };
        let share = if row_count == 1 { bytes_per_second / ceilings.read_bytes_per_second } else { ops_per_second / peak };
        Ok(Cell { dtype: *dtype, outputs, inputs, row_count, seconds, bytes_per_second, ops_per_second, share })
    }
}

/// Copies of a layer, used in turn.
struct Rotation {
    layers: Vec<Linear>,
    next: usize,
}

impl Rotation {
    fn new(linear: &Linear, copies: usize) -> Result<Self, PackError> {
        Ok(Self { layers: (0..copies.max(1)).map(|_| linear.duplicate()).collect::<Result<_, _>>()?, next: 0 })
    }

    fn next(&mut self) -> &Linear {
        self.next = (self.next + 1) % self.layers.len();
        &self.layers[self.next]
    }
}

/// Inputs and outputs of a layer.
struct Rows {
    row_count: usize,
    x: Buffer,
    out: Buffer,
}

impl Rows {
    fn new(cpu: &Cpu, row_count: usize, inputs: usize, outputs: usize) -> Result<Self, PackError> {
        let mut x = cpu.buffer(row_count * inputs)?;
        cpu.upload(&mut x, 0, &pseudo_random(row_count * inputs));
        Ok(Self { row_count, x, out: cpu.buffer(row_count * outputs)? })
    }

    fn apply(&mut self, cpu: &Cpu, linear: &Linear) {
        cpu.linear_apply(&mut self.out, &self.x, self.row_count, linear, None, Finish::Store);
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dtype, outputs, inputs, row_count, seconds, bytes_per_second, ops_per_second, share } = self;
        let of = if *row_count == 1 { "read bandwidth" } else { "arithmetic peak" };
        write!(
            f,
            "{:<8} {outputs:>6}x{inputs:<5} {row_count:>4} rows {:>10.1} us {:>7.1} GB/s {:>8.1} GOP/s {:>4.0}% of {of}",
            dtype.to_string(),
            seconds * 1e6,
            bytes_per_second / 1e9,
            ops_per_second / 1e9,
            share * 100.0
        )
    }
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { read_bytes_per_second, f32_ops_per_second, bf16_ops_per_second, int8_ops_per_second } = self;
        write!(
            f,
            "read {:.1} GB/s, f32 fma {:.0} GFLOP/s, bf16 pairs {:.0} GFLOP/s, int8 dot {:.0} GOP/s",
            read_bytes_per_second / 1e9,
            f32_ops_per_second / 1e9,
            bf16_ops_per_second / 1e9,
            int8_ops_per_second / 1e9
        )
    }
}

fn random_layer(cpu: &Cpu, dtype: Dtype, outputs: usize, inputs: usize) -> Result<Linear, PackError> {
    let bytes = match quantise(dtype, outputs, inputs, &pseudo_random(outputs * inputs)) {
        Some(bytes) => bytes,
        // GGUF's formats are not written; 0x2c as every byte is a small f16 scale and a mixture of codes.
        None => {
            vec![
                0x2c;
                dtype.bytes(outputs, inputs).ok_or_else(|| PackError::Shape { dtype: dtype.to_string(), rows: outputs, cols: inputs })?
            ]
        }
    };
    cpu.linear(&[TensorView { dtype, rows: outputs, cols: inputs, bytes: &bytes }])
}

/// Values within -1..1 from a linear congruence.
fn pseudo_random(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Operations that one timed run makes at least: long against the clock, short against a scheduler's time slice.
const CELL_OPS: usize = 8 << 20;
