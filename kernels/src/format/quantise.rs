//! f32 to storage: the float formats and our planar int8 and int4. GGUF's formats are read, never written.

use super::{Dtype, planar_scale_bytes};
use half::{bf16, f16};

/// Stores a matrix `[rows, cols]` of finite weights as `dtype`. `None` for formats that are only read (GGUF's), for a
/// bad group, or if `weights` does not have `rows * cols` elements.
///
/// int8: `scale = amax / 127` rounded to f16, codes by rounding to even. int4: of some scales near llama.cpp's choice
/// (the extreme weight becomes code 0, that is -8) and near `amax / 7`, the one of least squared error.
pub fn quantise(dtype: Dtype, rows: usize, cols: usize, weights: &[f32]) -> Option<Vec<u8>> {
    if rows.checked_mul(cols)? != weights.len() {
        return None;
    }
    let mut bytes = Vec::with_capacity(dtype.bytes(rows, cols)?);
    match dtype {
        Dtype::F32 => weights.iter().for_each(|w| bytes.extend(w.to_le_bytes())),
        Dtype::F16 => weights.iter().for_each(|w| bytes.extend(f16::from_f32(*w).to_le_bytes())),
        Dtype::Bf16 => weights.iter().for_each(|w| bytes.extend(bf16::from_f32(*w).to_le_bytes())),
        Dtype::Int8 { group } | Dtype::Int4 { group } => {
            planar_scale_bytes(group, cols)?;
            let wide = matches!(dtype, Dtype::Int8 { .. });
            let mut scales = Vec::with_capacity(rows * cols.div_ceil(usize::from(group)) * 2);
            let mut codes = Vec::with_capacity(cols);
            for row in weights.chunks_exact(cols.max(1)) {
                codes.clear();
                for group in row.chunks(usize::from(group)) {
                    let scale = if wide { int8_scale(group) } else { int4_scale(group) };
                    let (offset, top) = if wide { (0, 127) } else { (8, 15) };
                    codes.extend(group.iter().map(|&w| code(w, scale, offset, top)));
                    scales.extend(scale.to_le_bytes());
                }
                if wide {
                    bytes.extend(codes.iter().map(|code| code.cast_unsigned()));
                } else {
                    bytes.extend(
                        codes.chunks(2).map(|pair| pair[0].cast_unsigned() | pair.get(1).map_or(0, |high| high.cast_unsigned() << 4)),
                    );
                }
            }
            bytes.extend(scales);
        }
        _ => return None,
    }
    Some(bytes)
}

/// The stored code: `w / scale` to the nearest integer plus `offset`, within the bounds of the format.
fn code(w: f32, scale: f16, offset: i8, top: i8) -> i8 {
    let bottom = if offset == 0 { -top } else { 0 };
    nearest(w, scale.to_f32(), f32::from(bottom - offset), f32::from(top - offset)) as i8 + offset
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
