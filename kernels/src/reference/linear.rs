//! Linear layers: docs/numerics.md, rules 1 to 3 and 9.

use half::bf16;

use crate::SLICE;
use crate::format::{CodeRow, Dtype, TensorView, dequantise_row};
use crate::ops::{Bf16Compute, PackError, PlacedPart};

/// A linear layer `[N, K]`: each output row with its weights unpacked.
#[derive(Debug)]
pub struct Linear {
    inputs: usize,
    outputs: usize,
    bytes: usize,
    parts: Vec<Part>,
}

/// Outputs that read the same inputs.
#[derive(Debug)]
struct Part {
    first_input: usize,
    inputs: usize,
    first_output: usize,
    rows: Vec<Row>,
}

/// The weights of one output.
#[derive(Debug)]
enum Row {
    Float(Vec<f32>),
    /// bf16 weights that meet bf16 activations, subnormal ones as zeros.
    Pairs(Vec<f32>),
    Integer {
        group: usize,
        codes: CodeRow,
    },
}

impl Linear {
    pub(super) fn new(parts: &[TensorView<'_>], bf16_compute: Bf16Compute) -> Result<Self, PackError> {
        let inputs = check_parts(parts)?;
        let (mut outputs, mut stacked) = (0, Vec::with_capacity(parts.len()));
        for view in parts {
            stacked.push(Part::new(view, 0, outputs, bf16_compute));
            outputs += view.rows;
        }
        Ok(Self { inputs, outputs, bytes: parts.iter().map(|part| part.bytes.len()).sum(), parts: stacked })
    }

    pub(super) fn placed(parts: &[PlacedPart<'_>], bf16_compute: Bf16Compute) -> Result<Self, PackError> {
        let (inputs, outputs) = check_placed(parts)?;
        let along = parts.iter().map(|part| Part::new(&part.weights, part.first_input, part.first_output, bf16_compute)).collect();
        Ok(Self { inputs, outputs, bytes: parts.iter().map(|part| part.weights.bytes.len()).sum(), parts: along })
    }

    /// Outputs (N).
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The outputs that it gives, in ranges.
    pub(super) fn columns(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        self.parts.iter().map(|part| part.first_output..part.first_output + part.rows.len())
    }

    /// Inputs (K).
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// One row: `out[N] = x[K] W^T + bias`.
    pub(super) fn row(&self, out: &mut [f32], x: &[f32], bias: Option<&[f32]>) {
        for part in &self.parts {
            let bias = bias.map(|bias| &bias[part.first_output..][..part.rows.len()]);
            part.row(&mut out[part.first_output..][..part.rows.len()], &x[part.first_input..][..part.inputs], bias);
        }
    }
}

impl Part {
    fn new(view: &TensorView<'_>, first_input: usize, first_output: usize, bf16_compute: Bf16Compute) -> Self {
        let inputs = view.cols;
        let row = |row| {
            let mut codes = CodeRow::default();
            if let Some(group) = view.dtype.group() {
                codes.read(view, row);
                return Row::Integer { group, codes };
            }
            let mut weights = vec![0.0; inputs];
            dequantise_row(view, row, &mut codes, &mut weights);
            if view.dtype == Dtype::Bf16 && bf16_compute == Bf16Compute::Bf16 {
                weights.iter_mut().for_each(|w| *w = without_subnormal(*w));
                return Row::Pairs(weights);
            }
            Row::Float(weights)
        };
        Self { first_input, inputs, first_output, rows: (0..view.rows).map(row).collect() }
    }

    fn row(&self, out: &mut [f32], x: &[f32], bias: Option<&[f32]>) {
        let mut quantised: Option<(usize, Activations)> = None;
        let mut rounded: Option<Vec<f32>> = None;
        for (n, row) in self.rows.iter().enumerate() {
            let value = match row {
                Row::Float(weights) => float_dot(x, weights),
                Row::Pairs(weights) => pair_dot(rounded.get_or_insert_with(|| x.iter().map(|x| round_to_bf16(*x)).collect()), weights),
                Row::Integer { group, codes } => {
                    if quantised.as_ref().is_none_or(|(g, _)| g != group) {
                        quantised = Some((*group, quantise_activations(x, *group)));
                    }
                    integer_dot(&quantised.as_ref().expect("filled above").1, codes, *group)
                }
            };
            out[n] = bias.map_or(value, |bias| value + bias[n]);
        }
    }
}

/// Checks each part and that all have the same columns, which it returns.
///
/// # Errors
/// The part that is not as its shape says, or that others differ from.
pub fn check_parts(parts: &[TensorView<'_>]) -> Result<usize, PackError> {
    let first = parts.first().ok_or_else(|| PackError::Parts("there is none".to_owned()))?;
    for part in parts {
        part.check()?;
        if part.cols != first.cols {
            return Err(PackError::Parts(format!("{} and {} columns", first.cols, part.cols)));
        }
    }
    if first.cols == 0 {
        return Err(PackError::Parts("they have no inputs".to_owned()));
    }
    Ok(first.cols)
}

/// Checks parts with their places; how many inputs and outputs they span.
///
/// # Errors
/// The part that is not as its shape says, or whose outputs lie within others'.
pub fn check_placed(parts: &[PlacedPart<'_>]) -> Result<(usize, usize), PackError> {
    let (mut inputs, mut outputs) = (0, 0);
    for PlacedPart { weights, first_input, first_output } in parts {
        check_parts(&[*weights])?;
        if *first_output < outputs {
            return Err(PackError::Parts(format!("output {first_output} is behind {outputs} of others")));
        }
        (inputs, outputs) = (inputs.max(first_input + weights.cols), first_output + weights.rows);
    }
    if parts.is_empty() { Err(PackError::Parts("there is none".to_owned())) } else { Ok((inputs, outputs)) }
}

fn float_dot(x: &[f32], w: &[f32]) -> f32 {
    slices(x.len(), |range| {
        let mut acc = 0.0f32;
        for k in range {
            acc = x[k].mul_add(w[k], acc);
        }
        acc
    })
}

/// Rule 9.
fn pair_dot(x: &[f32], w: &[f32]) -> f32 {
    slices(x.len(), |range| {
        let mut acc = 0.0f32;
        for even in range.clone().step_by(2) {
            let odd = even + 1;
            let (x_odd, w_odd) = if odd < range.end { (x[odd], w[odd]) } else { (0.0, 0.0) };
            acc = flushing_fma(x_odd, w_odd, acc);
            acc = flushing_fma(x[even], w[even], acc);
        }
        acc
    })
}

/// `a * b + c` rounded once, to 24 bits and an exponent of any size; what is then smaller than the smallest normal number becomes a zero of
/// its sign. Which that is shows where all is scaled up: there the exponents do not end yet.
fn flushing_fma(a: f32, b: f32, c: f32) -> f32 {
    let sum = a.mul_add(b, c);
    let is_tiny = (a * SCALE).mul_add(b, c * SCALE).abs() < f32::MIN_POSITIVE * SCALE;
    if is_tiny { 0.0f32.copysign(sum) } else { sum }
}

/// An activation as rule 9 takes it: a subnormal number is a zero of its sign, others are rounded to bf16, ties to even.
pub(crate) fn round_to_bf16(x: f32) -> f32 {
    bf16::from_f32(without_subnormal(x)).to_f32()
}

fn without_subnormal(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// A sum that is small enough to matter does not overflow by it.
const SCALE: f32 = (1u64 << 63) as f32;

fn integer_dot(x: &Activations, w: &CodeRow, group: usize) -> f32 {
    slices(x.codes.len(), |range| {
        let mut acc = 0.0f32;
        for start in range.clone().step_by(group) {
            let members = start..(start + group).min(range.end);
            let isum: i32 = members.clone().map(|k| i32::from(x.codes[k]) * i32::from(w.codes[k])).sum();
            let asum: i32 = members.map(|k| i32::from(x.codes[k])).sum();
            let g = start / group;
            acc = (isum as f32).mul_add(x.scales[g] * w.scales[g], acc);
            if let Some(minimum) = w.minima.get(g) {
                acc = (asum as f32).mul_add(x.scales[g] * minimum, acc);
            }
        }
        acc
    })
}

/// Rule 1: the sums of the slices, added in ascending order.
fn slices(k: usize, sum: impl Fn(std::ops::Range<usize>) -> f32) -> f32 {
    let mut total = 0.0;
    for start in (0..k).step_by(SLICE) {
        let slice = sum(start..(start + SLICE).min(k));
        total = if start == 0 { slice } else { total + slice };
    }
    total
}

/// One row of activations as int8.
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    /// K codes within -127..=127.
    pub codes: Vec<i8>,
    /// A scale for each group.
    pub scales: Vec<f32>,
}

/// Rule 3: activations of one row as int8 in groups.
pub fn quantise_activations(x: &[f32], group: usize) -> Activations {
    let mut out = Activations { codes: Vec::new(), scales: Vec::new() };
    for x in x.chunks(group) {
        let amax = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let inverse = 127.0 / amax;
        if inverse < f32::INFINITY {
            out.codes.extend(x.iter().map(|x| (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8));
            out.scales.push(amax / 127.0);
        } else {
            out.codes.extend(x.iter().map(|_| 0));
            out.scales.push(0.0);
        }
    }
    out
}
