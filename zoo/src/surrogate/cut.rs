//! Taking units out of a block, all of its tensors consistently: rows of the first layer's matrices and biases, columns of the second layer's.
//! Rows go as they are stored, whatever the format. Columns go as floats; those of a quantised matrix are rounded to its form again.

use ashlar_kernels::format::{CodeRow, Dtype, TensorView, dequantise_row, first_non_finite, quantise};

use crate::blocking::blocking;
use crate::draft::ChainDraft;
use crate::manifest::{Block, BlockKind};
use crate::quantise::Form;
use crate::store::StoreError;

/// Why a block was not cut.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// The store failed, or a tensor is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Weights that their dtype cannot hold.
    #[error("`{role}` of block {index} would not be finite as {dtype}")]
    NotFinite {
        /// The block's place in the chain.
        index: usize,
        /// The matrix.
        role: &'static str,
        /// What it is stored as.
        dtype: Dtype,
    },
}

/// What lies between the two layers of a block and can go without the rest: inner columns of a feed-forward block, of an attention block
/// key-value heads with their query heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Units {
    /// How many there are.
    pub count: usize,
    /// Inputs of the second layer that are of one unit; they follow each other.
    pub columns: usize,
    /// The second layer's matrix.
    pub second: &'static str,
}

impl Units {
    /// Those of a block; `None` for kinds that have none.
    pub fn of(params: &BlockKind) -> Option<Self> {
        match params {
            BlockKind::FeedForward { inner, .. } => Some(Self { count: *inner as usize, columns: 1, second: "down.weight" }),
            BlockKind::Attention { heads, kv_heads, head_dim, .. } => {
                Some(Self { count: *kv_heads as usize, columns: (heads / kv_heads * head_dim) as usize, second: "o.weight" })
            }
            BlockKind::Embed { .. } | BlockKind::Head { .. } | BlockKind::Stitch { .. } => None,
        }
    }

    /// The second layer's inputs of some units.
    pub fn inputs(self, units: &[usize]) -> Vec<usize> {
        runs(units, self.columns)
    }
}

/// Leaves of a block the units `kept`, ascending. `refitted`, where it is given, is the second layer's matrix for these, `[outputs, inputs that stay]`,
/// in place of its own columns.
///
/// # Errors
/// When a tensor cannot be read or stored, or is not finite as it is stored.
///
/// # Panics
/// When the block has no units, or not these, or the refitted matrix has another size.
pub async fn cut(draft: &mut ChainDraft, index: usize, kept: &[usize], refitted: Option<Vec<f32>>) -> Result<(), CutError> {
    let mut block = draft.blocks()[index].clone();
    let units = Units::of(&block.params).expect("a block of two layers");
    assert!(kept.is_sorted() && kept.iter().all(|unit| *unit < units.count), "units that there are");
    for (role, columns) in first(&block.params) {
        let Some(reference) = block.tensors.get(role).cloned() else { continue };
        let (mapped, rows) = (draft.map_tensor(index, role).await?, runs(kept, columns));
        let mut shape = reference.shape;
        shape[0] = rows.len() as u64;
        let is_vector = shape.len() == 1;
        let cut = blocking(move || match is_vector {
            // A vector is a row, and its elements are columns.
            true => encode(&columns_of(&mapped.view(), &rows), [1, rows.len()], mapped.dtype()),
            false => (mapped.dtype(), rows_of(&mapped.view(), &rows)),
        });
        let (dtype, payload) = cut.await;
        block.tensors.insert(role.to_owned(), draft.put(dtype, shape, payload).await?);
    }
    let (mapped, inputs) = (draft.map_tensor(index, units.second).await?, units.inputs(kept));
    let shape = [mapped.rows(), inputs.len()];
    let second = blocking(move || {
        let weights = refitted.unwrap_or_else(|| columns_of(&mapped.view(), &inputs));
        encode(&weights, shape, mapped.dtype())
    });
    let (dtype, payload) = second.await;
    if first_non_finite(&TensorView { dtype, rows: shape[0], cols: shape[1], bytes: &payload }).is_some() {
        return Err(CutError::NotFinite { index, role: units.second, dtype });
    }
    let tensor = draft.put(dtype, shape.map(|size| size as u64).to_vec(), payload).await?;
    block.tensors.insert(units.second.to_owned(), tensor);
    let count = u32::try_from(kept.len()).expect("at most as many as there were");
    match &mut block.params {
        BlockKind::FeedForward { inner, .. } => *inner = count,
        BlockKind::Attention { heads, kv_heads, .. } => (*heads, *kv_heads) = (*heads / *kv_heads * count, count),
        BlockKind::Embed { .. } | BlockKind::Head { .. } | BlockKind::Stitch { .. } => unreachable!("a block of two layers"),
    }
    draft.set_block(index, block);
    Ok(())
}

/// Multiplications with weights that a token takes in all blocks. Scores and sums of attention, which grow with the context, are not in it.
pub fn multiply_adds(blocks: &[Block]) -> u64 {
    let tensors = blocks.iter().flat_map(|block| &block.tensors);
    let matrices = tensors.filter(|(role, tensor)| tensor.shape.len() == 2 && *role != "token.weight" && *role != "position.weight");
    matrices.map(|(_, tensor)| tensor.shape.iter().product::<u64>()).sum()
}

/// What the first layer has, with the outputs of each that are of one unit.
fn first(params: &BlockKind) -> Vec<(&'static str, usize)> {
    match params {
        BlockKind::FeedForward { .. } => ["gate.weight", "gate.bias", "up.weight", "up.bias"].map(|role| (role, 1)).to_vec(),
        BlockKind::Attention { heads, kv_heads, head_dim, .. } => {
            let (query, head) = ((heads / kv_heads * head_dim) as usize, *head_dim as usize);
            vec![("q.weight", query), ("q.bias", query), ("k.weight", head), ("k.bias", head), ("v.weight", head), ("v.bias", head)]
        }
        BlockKind::Embed { .. } | BlockKind::Head { .. } | BlockKind::Stitch { .. } => Vec::new(),
    }
}

/// `each` places for each unit.
fn runs(units: &[usize], each: usize) -> Vec<usize> {
    units.iter().flat_map(|unit| unit * each..(unit + 1) * each).collect()
}

/// Rows of a matrix as they are stored: sections of a planar format, and blocks, are whole rows.
fn rows_of(view: &TensorView<'_>, kept: &[usize]) -> Vec<u8> {
    let (mut payload, mut rest) = (Vec::new(), view.bytes);
    for section in view.dtype.sections(view.rows, view.cols).unwrap_or([view.bytes.len(), 0, 0]) {
        let (rows, after) = rest.split_at(section);
        let row_bytes = section / view.rows;
        kept.iter().for_each(|row| payload.extend(&rows[row * row_bytes..][..row_bytes]));
        rest = after;
    }
    payload
}

/// Columns of a matrix, `[rows, kept]`.
fn columns_of(view: &TensorView<'_>, kept: &[usize]) -> Vec<f32> {
    let (mut scratch, mut row) = (CodeRow::default(), vec![0.0f32; view.cols]);
    let mut columns = Vec::with_capacity(view.rows * kept.len());
    for index in 0..view.rows {
        dequantise_row(view, index, &mut scratch, &mut row);
        columns.extend(kept.iter().map(|column| row[*column]));
    }
    columns
}

/// Weights as the format that they came in: exact where that is a float, rounded where it is one that is written, and bf16 (vectors f32) where it is
/// only read.
fn encode(weights: &[f32], [rows, cols]: [usize; 2], source: Dtype) -> (Dtype, Vec<u8>) {
    let only_read = if rows == 1 { Dtype::F32 } else { Dtype::Bf16 };
    let dtype = match source {
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 => source,
        _ => match Form::of(source) {
            Some(form) => {
                let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
                return (source, form.round(&TensorView { dtype: Dtype::F32, rows, cols, bytes: &bytes }));
            }
            None => only_read,
        },
    };
    (dtype, quantise(dtype, rows, cols, weights).expect("floats of this shape"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_kernels::format::dequantise;

    fn weights(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect()
    }

    #[test]
    fn rows_of_any_format_stay_what_they_were() {
        let (rows, cols) = (5, 70); // Half bytes at the end of a row, and a short last group.
        let planar = ["f32", "bf16", "int8g32", "int4g32", "int4mg16", "int8mg64", "int1g32"].map(|name| name.parse::<Dtype>().unwrap());
        for dtype in planar {
            let bytes = quantise(dtype, rows, cols, &weights(rows * cols)).unwrap();
            let view = TensorView { dtype, rows, cols, bytes: &bytes };
            let (all, payload) = (dequantise(&view), rows_of(&view, &[0, 3, 4]));
            let cut = TensorView { dtype, rows: 3, cols, bytes: &payload };
            assert!(cut.check().is_ok(), "{dtype}");
            assert_eq!(dequantise(&cut), [&all[..cols], &all[3 * cols..]].concat(), "{dtype}");
        }
        // GGUF's blocks are of equal size, whatever is in them.
        let bytes: Vec<u8> = (0..4 * 2 * 34).map(|i| (i % 251) as u8).collect();
        let view = TensorView { dtype: Dtype::Q8_0, rows: 4, cols: 64, bytes: &bytes };
        assert_eq!(rows_of(&view, &[1, 3]), [&bytes[68..136], &bytes[204..]].concat());
    }

    #[test]
    fn columns_of_floats_are_exact_and_others_are_rounded_to_their_form() {
        let (rows, cols, kept) = (3, 64, runs(&[1, 3], 16));
        assert_eq!((kept[0], kept[15], kept[16], kept[31]), (16, 31, 48, 63));
        let weights = weights(rows * cols);
        let expected: Vec<f32> = weights.chunks(cols).flat_map(|row| [&row[16..32], &row[48..]].concat()).collect();
        for name in ["f32", "f16", "bf16", "int8g32", "int8mg32", "int4g32"] {
            let dtype: Dtype = name.parse().unwrap();
            let bytes = quantise(dtype, rows, cols, &weights).unwrap();
            let columns = columns_of(&TensorView { dtype, rows, cols, bytes: &bytes }, &kept);
            let (stored, payload) = encode(&columns, [rows, kept.len()], dtype);
            assert_eq!(stored, dtype);
            let back = dequantise(&TensorView { dtype, rows, cols: kept.len(), bytes: &payload });
            let tolerance = if name == "int4g32" {
                0.12
            } else if name.starts_with("int") {
                0.01
            } else {
                0.0
            };
            for ((back, column), weight) in back.iter().zip(&columns).zip(&expected) {
                assert!((back - column).abs() <= tolerance && (back - weight).abs() <= 2.0 * tolerance, "{name}: {back} {column} {weight}");
            }
        }
        assert_eq!(encode(&expected, [rows, 32], Dtype::Q4_0).0, Dtype::Bf16);
        assert_eq!(encode(&expected[..32], [1, 32], Dtype::Q8_0).0, Dtype::F32);
    }
}
