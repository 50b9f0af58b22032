//! f32 to storage: the float formats and our planar int8, int4 and int1. GGUF's formats are read, never written.

use super::Dtype;
use half::{bf16, f16};

/// Stores a matrix `[rows, cols]` of finite weights as `dtype`. `None` for formats that are only read (GGUF's), for a
/// bad group, or if `weights` does not have `rows * cols` elements.
///
/// int8: `scale = amax / 127` rounded to f16, codes by rounding to even. int4: of some scales near llama.cpp's choice
/// (the extreme weight becomes code 0, that is -8) and near `amax / 7`, the one of least squared error. With minimum: the
/// minimum is rounded to f16 first (int4: down from the least weight; int8: from the middle of the weights, where code 0
/// lies), then the scale reaches from it to the farthest weight. int1: `scale = mean |w|`, a bit for `w >= 0`.
pub fn quantise(dtype: Dtype, rows: usize, cols: usize, weights: &[f32]) -> Option<Vec<u8>> {
    if rows.checked_mul(cols)? != weights.len() {
        return None;
    }
    let mut bytes = Vec::with_capacity(dtype.bytes(rows, cols)?);
    match dtype {
        Dtype::F32 => weights.iter().for_each(|w| bytes.extend(w.to_le_bytes())),
        Dtype::F16 => weights.iter().for_each(|w| bytes.extend(f16::from_f32(*w).to_le_bytes())),
        Dtype::Bf16 => weights.iter().for_each(|w| bytes.extend(bf16::from_f32(*w).to_le_bytes())),
        Dtype::Int8 { group }
        | Dtype::Int4 { group }
        | Dtype::Int8Minimum { group }
        | Dtype::Int4Minimum { group }
        | Dtype::Int1 { group } => {
            let [_, scale_bytes, minimum_bytes] = dtype.sections(rows, cols)?;
            let (mut scales, mut minima) = (Vec::with_capacity(scale_bytes), Vec::with_capacity(minimum_bytes));
            let mut codes = Vec::with_capacity(cols);
            for row in weights.chunks_exact(cols.max(1)) {
                codes.clear();
                for group in row.chunks(usize::from(group)) {
                    let (scale, minimum) = quantise_group(dtype, group, &mut codes);
                    scales.extend(scale.to_le_bytes());
                    if dtype.has_minimum() {
                        minima.extend(minimum.to_le_bytes());
                    }
                }
                let codes_per_byte = match dtype {
                    Dtype::Int1 { .. } => 8,
                    Dtype::Int4 { .. } | Dtype::Int4Minimum { .. } => 2,
                    _ => 1,
                };
                let width = 8 / codes_per_byte;
                bytes.extend(
                    codes
                        .chunks(codes_per_byte)
                        .map(|codes| codes.iter().rev().fold(0, |byte: u16, code| (byte << width) | u16::from(*code)) as u8),
                );
            }
            bytes.append(&mut scales);
            bytes.append(&mut minima);
        }
        _ => return None,
    }
    Some(bytes)
}

/// Appends the stored codes of one group; its scale and its minimum (0 for formats without).
fn quantise_group(dtype: Dtype, group: &[f32], codes: &mut Vec<u8>) -> (f16, f16) {
    let (scale, minimum) = match dtype {
        Dtype::Int8 { .. } => (int8_scale(group), f16::ZERO),
        Dtype::Int4 { .. } => (int4_scale(group), f16::ZERO),
        Dtype::Int8Minimum { .. } => int8_range(group),
        Dtype::Int4Minimum { .. } => int4_range(group),
        _ => {
            codes.extend(group.iter().map(|&w| u8::from(w >= 0.0)));
            return (mean_magnitude(group), f16::ZERO);
        }
    };
    let (bottom, top, offset) = match dtype {
        Dtype::Int4 { .. } => (-8.0, 7.0, 8),
        Dtype::Int4Minimum { .. } => (0.0, 15.0, 0),
        _ => (-127.0, 127.0, 0),
    };
    let (step, base) = (scale.to_f32(), minimum.to_f32());
    codes.extend(group.iter().map(|&w| (nearest(w - base, step, bottom, top) as i8 + offset).cast_unsigned()));
    (scale, minimum)
}

/// `w / scale` to the nearest integer (ties to even) within `bottom..=top`; 0 for a scale of zero.
#[inline(always)]
fn nearest(w: f32, scale: f32, bottom: f32, top: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves no bits for a fraction: the rounding of a sum, which every processor has, in place of a call.
    const WHOLE: f32 = 12_582_912.0;
    let quotient = if scale == 0.0 { 0.0 } else { w / scale };
    quotient.clamp(bottom, top) + WHOLE - WHOLE
}

fn int8_scale(group: &[f32]) -> f16 {
    let amax = group.iter().fold(0.0f32, |max, w| max.max(w.abs()));
    half_scale(amax / 127.0)
}

fn int4_scale(group: &[f32]) -> f16 {
    let extreme = group.iter().fold(0.0f32, |max, &w| if w.abs() > max.abs() { w } else { max });
    let mut best = (f64::INFINITY, f16::ZERO);
    for divisor in INT4_DIVISORS {
        let scale = half_scale(extreme / divisor);
        let error = squared_error(group, scale);
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

/// Scale and minimum with codes -127..=127 on both sides of the middle, which has the lesser rounding error of the two ends
/// and takes the lesser part in a dot product.
fn int8_range(group: &[f32]) -> (f16, f16) {
    let (least, most) = range(group);
    let middle = half_scale(0.5 * least + 0.5 * most);
    let reach = (most - middle.to_f32()).max(middle.to_f32() - least);
    (half_scale(reach / 127.0), middle)
}

/// Scale and minimum with code 0 at or just below the least weight, so that no code would have to be negative.
fn int4_range(group: &[f32]) -> (f16, f16) {
    let (least, most) = range(group);
    let mut minimum = half_scale(least);
    if minimum.to_f32() > least && minimum > f16::MIN {
        // The next lower f16.
        minimum = f16::from_bits(match minimum.to_bits() {
            0 => 0x8001,
            bits if bits < 0x8000 => bits - 1,
            bits => bits + 1,
        });
    }
    (half_scale((most - minimum.to_f32()) / 15.0), minimum)
}

/// BitDelta's scale: the mean magnitude is what has the least squared error.
fn mean_magnitude(group: &[f32]) -> f16 {
    let sum: f64 = group.iter().map(|w| f64::from(w.abs())).sum();
    half_scale((sum / group.len() as f64) as f32)
}

/// The least and the greatest weight.
fn range(group: &[f32]) -> (f32, f32) {
    group.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), &w| (least.min(w), most.max(w)))
}

/// Of int4 codes, in eight sums, so that it is computed eight weights at a time.
fn squared_error(group: &[f32], scale: f16) -> f64 {
    let scale = scale.to_f32();
    let mut sums = [0.0f64; 8];
    for weights in group.chunks(8) {
        for (sum, &w) in sums.iter_mut().zip(weights) {
            let error = f64::from(w) - f64::from(nearest(w, scale, -8.0, 7.0)) * f64::from(scale);
            *sum += error * error;
        }
    }
    sums.iter().sum()
}

/// Rounds to f16; what would overflow becomes the largest finite value.
fn half_scale(scale: f32) -> f16 {
    f16::from_f32(scale.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// What the extreme weight is divided by; -8 is llama.cpp's q4_0 and comes first, so that ties stay with it.
const INT4_DIVISORS: [f32; 12] = [-8.0, -8.4, -7.7, -7.4, -8.8, -9.2, 7.0, 7.3, 7.5, 7.8, 6.8, 8.2];
