//! Search for NaN and infinity, which no op has to define and the zoo refuses.

use super::{Dtype, TensorView, fp8_is_nan, read_f16};

/// Index (`row * cols + column`) of the first element that is NaN or infinite, or for a quantised format of the first
/// element of the first group or block whose scale or minimum is (of fp8 also where the largest code times the scale would be). The view must have passed [`TensorView::check`].
pub fn first_non_finite(view: &TensorView<'_>) -> Option<usize> {
    let blocks = |offsets: &[usize]| {
        let block_columns = view.dtype.block_columns();
        let mut blocks = view.bytes.chunks_exact(view.dtype.block_bytes());
        blocks.position(|block| offsets.iter().any(|&at| !read_f16(block, at).is_finite())).map(|block| block * block_columns)
    };
    match view.dtype {
        Dtype::F32 => first_word(view.bytes, |word: [u8; 4]| u32::from_le_bytes(word) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F16 => first_word(view.bytes, |word: [u8; 2]| u16::from_le_bytes(word) & 0x7c00 == 0x7c00),
        Dtype::Bf16 => first_word(view.bytes, |word: [u8; 2]| u16::from_le_bytes(word) & 0x7f80 == 0x7f80),
        Dtype::Int8 { group }
        | Dtype::Int4 { group }
        | Dtype::Int8Minimum { group }
        | Dtype::Int4Minimum { group }
        | Dtype::Int1 { group } => {
            let groups = view.row_groups();
            let [codes, scales, _] = view.dtype.sections(view.rows, view.cols).expect("the view was checked");
            let (scales, minima) = view.bytes[codes..].split_at(scales);
            let first = |halves| first_word(halves, |word: [u8; 2]| u16::from_le_bytes(word) & 0x7c00 == 0x7c00);
            let index = [first(scales), first(minima)].into_iter().flatten().min()?;
            Some(index / groups * view.cols + index % groups * usize::from(group))
        }
        Dtype::Int4Zero { group } => {
            let groups = view.row_groups();
            let [codes, scales, _] = view.dtype.sections(view.rows, view.cols).expect("the view was checked");
            let index = first_word(&view.bytes[codes..][..scales], |word: [u8; 2]| u16::from_le_bytes(word) & 0x7c00 == 0x7c00)?;
            Some(index / groups * view.cols + index % groups * usize::from(group))
        }
        Dtype::Fp8 { group } => {
            let groups = view.cols.div_ceil(usize::from(group));
            let [codes, ..] = view.dtype.sections(view.rows, view.cols).expect("the view was checked");
            let (codes, scales) = view.bytes.split_at(codes);
            // The largest code is 448, and kernels multiply the scale with 256.
            let scale = first_word(scales, |word: [u8; 4]| !(f32::from_le_bytes(word) * 512.0).is_finite());
            let scale = scale.map(|index| index / groups * view.cols + index % groups * usize::from(group));
            [scale, first_word(codes, |[code]: [u8; 1]| fp8_is_nan(code))].into_iter().flatten().min()
        }
        Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => blocks(&[0]),
        Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => blocks(&[0, 2]),
        Dtype::Q6K => blocks(&[208]),
    }
}

/// Looks at 4,096 words at a time without a branch for each, so that a scan runs at memory speed.
fn first_word<const N: usize>(bytes: &[u8], non_finite: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let (words, _) = bytes.as_chunks::<N>();
    for (index, run) in words.chunks(4096).enumerate() {
        if run.iter().fold(false, |any, &word| any | non_finite(word)) {
            return run.iter().position(|&word| non_finite(word)).map(|at| index * 4096 + at);
        }
    }
    None
}
