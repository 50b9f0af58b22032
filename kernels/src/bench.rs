//! Linear layers against the machine's ceilings, on the shapes of SmolLM2-135M: GB/s of weights for one row, operations
//! a second for many, each with its share. `ashlar bench kernels` prints it.

use std::fmt;

use crate::cpu::probe::{Ceilings, best_seconds};
use crate::cpu::{Cpu, Linear};
use crate::format::{Dtype, TensorView, quantise};
use crate::ops::{Ops, PackError};

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
    /// Each cell is the best of so many runs.
    pub runs: usize,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self {
            dtypes: vec![Dtype::F32, Dtype::Bf16, Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 32 }, Dtype::Q8_0, Dtype::Q4_1],
            shapes: vec![(576, 576), (1536, 576), (576, 1536), (49_152, 576)],
            row_counts: vec![1, 64, 512],
            rotate_bytes: 1 << 30,
            runs: 5,
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
            let layer = random_layer(cpu, dtype, outputs, inputs)?;
            let layer_bytes = layer.bytes();
            for &row_count in &options.row_counts {
                let copies = if row_count == 1 { options.rotate_bytes.div_ceil(layer_bytes) } else { 1 };
                let layers = (0..copies).map(|_| layer.duplicate()).collect::<Result<Vec<_>, _>>()?;
                let mut x = cpu.buffer(row_count * inputs)?;
                cpu.upload(&mut x, 0, &pseudo_random(row_count * inputs));
                let mut out = cpu.buffer(row_count * outputs)?;
                let calls = copies.max(CELL_OPS.div_ceil(2 * row_count * inputs * outputs));
                let seconds = best_seconds(options.runs, || {
                    for call in 0..calls {
                        cpu.linear_apply(&mut out, &x, row_count, &layers[call % copies], None);
                    }
                }) / calls as f64;
                let bytes_per_second = layer_bytes as f64 / seconds;
                let ops_per_second = (2 * row_count * inputs * outputs) as f64 / seconds;
                let peak = if dtype.group().is_some() { ceilings.int8_ops_per_second } else { ceilings.f32_ops_per_second };
                let share = if row_count == 1 { bytes_per_second / ceilings.read_bytes_per_second } else { ops_per_second / peak };
                on_cell(&Cell { dtype, outputs, inputs, row_count, seconds, bytes_per_second, ops_per_second, share });
            }
        }
    }
    Ok(())
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
        let Self { read_bytes_per_second, f32_ops_per_second, int8_ops_per_second } = self;
        write!(
            f,
            "read {:.1} GB/s, f32 fma {:.0} GFLOP/s, int8 dot {:.0} GOP/s",
            read_bytes_per_second / 1e9,
            f32_ops_per_second / 1e9,
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

/// Operations that one timed run makes at least.
const CELL_OPS: usize = 1 << 30;
