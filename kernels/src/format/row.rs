//! Rows of any format as f32.

use super::{CodeRow, Dtype, TensorView, fp8, fp8_to_f32};
use half::{bf16, f16};

/// Writes row `row` (`cols` weights) as f32; floats convert exactly, quantised formats by GGUF's formulas. `scratch` is
/// reused between calls so that nothing is allocated for each row. The view must have passed [`TensorView::check`].
pub fn dequantise_row(view: &TensorView<'_>, row: usize, scratch: &mut CodeRow, out: &mut [f32]) {
    assert_eq!(out.len(), view.cols, "a row has cols elements");
    let cols = view.cols;
    match view.dtype {
        Dtype::F32 => {
            let (words, _) = view.bytes[row * cols * 4..][..cols * 4].as_chunks();
            out.iter_mut().zip(words).for_each(|(out, word)| *out = f32::from_le_bytes(*word));
        }
        Dtype::F16 => {
            let (words, _) = view.bytes[row * cols * 2..][..cols * 2].as_chunks();
            out.iter_mut().zip(words).for_each(|(out, word)| *out = f16::from_le_bytes(*word).to_f32());
        }
        Dtype::Bf16 => {
            let (words, _) = view.bytes[row * cols * 2..][..cols * 2].as_chunks();
            out.iter_mut().zip(words).for_each(|(out, word)| *out = bf16::from_le_bytes(*word).to_f32());
        }
        Dtype::Fp8 { group } => {
            let (group, codes) = (usize::from(group), &view.bytes[row * cols..][..cols]);
            for ((out, codes), scale) in out.chunks_mut(group).zip(codes.chunks(group)).zip(fp8::scales(view, row, group)) {
                out.iter_mut().zip(codes).for_each(|(out, code)| *out = fp8_to_f32(*code) * scale);
            }
        }
        quantised => {
            scratch.read(view, row);
            scratch.weights(quantised.group().expect("floats are handled above"), out);
        }
    }
}

/// The whole matrix as f32, `rows * cols`. The view must have passed [`TensorView::check`].
pub fn dequantise(view: &TensorView<'_>) -> Vec<f32> {
    let mut out = vec![0.0; view.rows * view.cols];
    let mut scratch = CodeRow::default();
    if view.cols > 0 {
        for (row, out) in out.chunks_exact_mut(view.cols).enumerate() {
            dequantise_row(view, row, &mut scratch, out);
        }
    }
    out
}
