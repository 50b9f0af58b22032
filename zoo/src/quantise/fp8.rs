//! Rounding a matrix to eight-bit floats (e4m3fn of "FP8 Formats for Deep Learning", arXiv 2209.05433, section 3): a scale for each row or
//! group, and each weight as the nearest code. A pure function of matrix and form.

use ashlar_kernels::format::{CodeRow, Dtype, TensorView, dequantise_row, fp8_to_f32};

/// The largest magnitude that a code stands for.
const LARGEST: f32 = 448.0;
/// What the largest weight may be divided by to become the scale, a step of 2^(1/8) each, the plain choice first: a mantissa of three bits is
/// as fine in every octave, but which weights fall near a code depends on where the octaves begin.
const DIVISORS: [f32; 8] = [448.0, 410.82, 376.72, 345.45, 316.78, 290.49, 266.38, 244.27];
/// Kernels multiply scales with powers of two up to this one (`format::first_non_finite`).
const SCALE_MAX: f32 = f32::MAX / 1024.0;

/// The nearest code, ties to even; what lies beyond the largest is clipped.
pub(super) fn code(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(LARGEST);
    // Below 2^-6 codes are as far apart as there.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    // Eight steps an octave. A power of two divides exactly.
    let steps = (magnitude * f32::from_bits(((127 + 3 - exponent) as u32) << 23)).round_ties_even();
    // A mantissa that was rounded up to 16 steps is the next octave's first code.
    sign | (((exponent + 6) << 3) as u8 + steps as u8)
}

/// `view` as `Fp8` of a group. With `by_row` all groups of a row have one scale.
///
/// # Panics
/// When the group is none that can be stored.
pub(super) fn round(view: &TensorView<'_>, group: u16, by_row: bool) -> Vec<u8> {
    let dtype = Dtype::Fp8 { group };
    let [code_bytes, scale_bytes, _] = dtype.sections(view.rows, view.cols).expect("a shape that can be stored");
    let (mut codes, mut scales) = (vec![0u8; code_bytes], vec![0u8; scale_bytes]);
    let group = usize::from(group);
    let groups = view.cols.div_ceil(group);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let rows_each = view.rows.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let parts = codes.chunks_mut(rows_each * view.cols).zip(scales.chunks_mut(rows_each * groups * 4));
        for (part, (codes, scales)) in parts.enumerate() {
            scope.spawn(move || {
                let (mut scratch, mut weights) = (CodeRow::default(), vec![0.0f32; view.cols]);
                let rows = codes.chunks_mut(view.cols).zip(scales.chunks_mut(groups * 4));
                for (row, (codes, scales)) in rows.enumerate() {
                    dequantise_row(view, part * rows_each + row, &mut scratch, &mut weights);
                    let together = if by_row { view.cols } else { group };
                    let runs =
                        weights.chunks(together).zip(codes.chunks_mut(together)).zip(scales.chunks_mut(together.div_ceil(group) * 4));
                    for ((weights, codes), scales) in runs {
                        let scale = scale(weights);
                        codes.iter_mut().zip(weights).for_each(|(out, w)| *out = of_scale(*w, scale));
                        scales.chunks_exact_mut(4).for_each(|out| out.copy_from_slice(&scale.to_le_bytes()));
                    }
                }
            });
        }
    });
    codes.append(&mut scales);
    codes
}

fn of_scale(weight: f32, scale: f32) -> u8 {
    if scale == 0.0 { 0 } else { code(weight / scale) }
}

/// The scale of least squared error among those of [`DIVISORS`].
fn scale(weights: &[f32]) -> f32 {
    let largest = weights.iter().fold(0.0f32, |max, w| max.max(w.abs()));
    let mut best = (f64::INFINITY, 0.0);
    for divisor in DIVISORS {
        let scale = (largest / divisor).min(SCALE_MAX);
        let error = |w: &f32| f64::from(w - fp8_to_f32(of_scale(*w, scale)) * scale).powi(2);
        let error: f64 = weights.iter().map(error).sum();
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_kernels::format::{dequantise, first_non_finite, fp8_is_nan};

    #[test]
    fn each_code_is_the_nearest_to_its_value_and_to_what_lies_around_it() {
        let codes: Vec<u8> = (0..=255).filter(|code| !fp8_is_nan(*code)).collect();
        for own in &codes {
            assert_eq!(code(fp8_to_f32(*own)), *own, "{own:#x}");
        }
        let mut ascending: Vec<u8> = codes.iter().copied().filter(|code| *code < 0x80).collect();
        ascending.sort_by(|a, b| fp8_to_f32(*a).total_cmp(&fp8_to_f32(*b)));
        for pair in ascending.windows(2) {
            let [low, high] = [fp8_to_f32(pair[0]), fp8_to_f32(pair[1])];
            let middle = 0.5 * (low + high);
            let even = pair[usize::from(pair[0] % 2 == 1)];
            assert_eq!((code(middle), code(-middle)), (even, even | 0x80), "{middle}");
            assert_eq!((code(middle.next_down()), code(middle.next_up())), (pair[0], pair[1]), "{middle}");
        }
        for beyond in [448.1, 463.0, 1e6, f32::INFINITY] {
            assert_eq!((code(beyond), code(-beyond)), (0x7e, 0xfe), "{beyond}");
        }
        assert_eq!((code(1e-30), code(f32::MIN_POSITIVE / 2.0), code(0.0)), (0, 0, 0));
    }

    fn weights(count: usize) -> Vec<f32> {
        let mut state = 5u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|i| (next() + next() + next()) * if i % 97 == 0 { 5.0 } else { 0.05 }).collect()
    }

    #[test]
    fn rows_are_near_what_they_were_and_better_than_by_the_plain_scale() {
        let (rows, cols) = (7, 700); // More rows than threads, and a short last group.
        let weights = weights(rows * cols);
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let view = TensorView { dtype: Dtype::F32, rows, cols, bytes: &bytes };
        for (group, by_row) in [(512, true), (32, false), (128, false), (512, false)] {
            let payload = round(&view, group, by_row);
            let stored = TensorView { dtype: Dtype::Fp8 { group }, rows, cols, bytes: &payload };
            assert!(stored.check().is_ok() && first_non_finite(&stored).is_none());
            let back = dequantise(&stored);
            let together = if by_row { cols } else { usize::from(group) };
            for (weights, back) in weights.chunks(cols).zip(back.chunks(cols)) {
                for (weights, back) in weights.chunks(together).zip(back.chunks(together)) {
                    let largest = weights.iter().fold(0.0f32, |max, w| max.max(w.abs()));
                    let plain = largest / 448.0;
                    let error =
                        |of: &mut dyn FnMut(usize) -> f32| (0..weights.len()).map(|i| f64::from(weights[i] - of(i)).powi(2)).sum::<f64>();
                    let rounded = error(&mut |i| back[i]);
                    assert!(rounded <= error(&mut |i| fp8_to_f32(code(weights[i] / plain)) * plain), "{group} {by_row}");
                    // Half a step of an eighth of the octave, and of a subnormal.
                    let step = |w: f32| (w.abs() / 16.0).max(2.0 * plain * 2f32.powi(-10)) * 1.001;
                    assert!(weights.iter().zip(back).all(|(w, b)| (w - b).abs() <= step(*w)), "{group} {by_row}");
                }
            }
        }
    }

    #[test]
    fn rows_of_nothing_and_of_the_largest_floats_can_be_stored() {
        let values = [0.0f32, 0.0, f32::MAX, -f32::MAX, 1e-44, -1e-44];
        let bytes: Vec<u8> = values.iter().flat_map(|w| w.to_le_bytes()).collect();
        let view = TensorView { dtype: Dtype::F32, rows: 3, cols: 2, bytes: &bytes };
        let payload = round(&view, 512, true);
        let stored = TensorView { dtype: Dtype::Fp8 { group: 512 }, bytes: &payload, ..view };
        assert_eq!(first_non_finite(&stored), None);
        let back = dequantise(&stored);
        assert_eq!(back[..2], [0.0, 0.0]);
        assert!(back[2] > 0.4 * f32::MAX && back[3] == -back[2], "{back:?}");
    }
}
