//! Eight-bit floats: e4m3fn of "FP8 Formats for Deep Learning" (arXiv 2209.05433, section 3), without infinities.

use half::f16;

use super::TensorView;

/// What a code stands for; NaN for the two codes that are NaN. Exact.
pub fn fp8_to_f32(code: u8) -> f32 {
    if fp8_is_nan(code) {
        return f32::NAN;
    }
    // An f16 with the same bits has an exponent that is 8 less. Its subnormals are ours.
    f16::from_bits(as_half(code)).to_f32() * 256.0
}

/// Whether a code is NaN.
pub fn fp8_is_nan(code: u8) -> bool {
    code & 0x7f == 0x7f
}

/// The bits of the f16 that is the code's value divided by 256 (of a NaN: by what the bits would be, 480).
pub(crate) fn as_half(code: u8) -> u16 {
    u16::from(code & 0x80) << 8 | u16::from(code & 0x7f) << 7
}

/// The scales of row `row`, one for each group.
pub(crate) fn scales<'a>(view: &TensorView<'a>, row: usize, group: usize) -> impl ExactSizeIterator<Item = f32> + use<'a> {
    let groups = view.cols.div_ceil(group);
    let (words, _) = view.bytes[view.rows * view.cols..][row * groups * 4..][..groups * 4].as_chunks();
    words.iter().map(|word| f32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_stand_for_what_the_paper_says() {
        let hand = [(0x00, 0.0), (0x01, 0.001953125), (0x07, 0.013671875), (0x08, 0.015625), (0x38, 1.0), (0x3c, 1.5), (0x7e, 448.0)];
        for (code, value) in hand {
            assert_eq!(fp8_to_f32(code), value, "{code:#x}");
            assert_eq!(fp8_to_f32(code | 0x80), -value, "{code:#x} negated");
        }
        for code in 0..=255u8 {
            let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
            let magnitude = if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
            let formula = if code & 0x80 == 0 { magnitude } else { -magnitude };
            assert!(if fp8_is_nan(code) { fp8_to_f32(code).is_nan() } else { fp8_to_f32(code) == formula }, "{code:#x}");
        }
    }
}
