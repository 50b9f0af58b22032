//! What a tensor becomes when stored: recipes, and the conversion itself, by rows so that f32 copies stay small. A pure
//! function of tensor and recipe: shared tensors stay shared.

use std::str::FromStr;

use ashlar_kernels::format::{CodeRow, Dtype, TensorView, dequantise_row, quantise};

/// Elements dequantised at a time.
const SCRATCH_ELEMENTS: usize = 1 << 20;

/// What `--dtype` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recipe {
    /// Everything as the checkpoint has it.
    #[default]
    Keep,
    /// Everything as f32.
    F32,
    /// Matrices as bf16, vectors as f32.
    Bf16,
    /// Linear weights and the token table as int8 in groups of 32; vectors and position tables as f32.
    Int8,
    /// Linear weights as int4 in groups of 32, the token table (which may be the head too) as int8; the rest as f32.
    Int4,
}

/// No such recipe.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is none of keep, f32, bf16, int8, int4")]
pub struct UnknownRecipe(String);

impl FromStr for Recipe {
    type Err = UnknownRecipe;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "keep" => Ok(Self::Keep),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            _ => Err(UnknownRecipe(text.to_owned())),
        }
    }
}

/// What a tensor is used as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Multiplied with activations.
    Linear,
    /// Looked up by token; where tied, also multiplied.
    TokenTable,
    /// Looked up by position.
    PositionTable,
    /// Norm or bias.
    Vector,
}

impl Recipe {
    /// The dtype that a tensor of dtype `source` is stored in.
    pub(super) fn target(self, used_as: Use, source: Dtype) -> Dtype {
        const INT8: Dtype = Dtype::Int8 { group: 32 };
        const INT4: Dtype = Dtype::Int4 { group: 32 };
        match (self, used_as) {
            (Self::Keep, _) => source,
            (Self::Bf16, Use::Linear | Use::TokenTable | Use::PositionTable) => Dtype::Bf16,
            (Self::Int8, Use::Linear | Use::TokenTable) | (Self::Int4, Use::TokenTable) => INT8,
            (Self::Int4, Use::Linear) => INT4,
            (Self::F32 | Self::Bf16 | Self::Int8 | Self::Int4, _) => Dtype::F32,
        }
    }
}

/// The payload of `view` as `target`, which is a dtype that can be written (a float or a planar one).
pub(super) fn convert(view: &TensorView<'_>, target: Dtype) -> Vec<u8> {
    let bytes = target.bytes(view.rows, view.cols).expect("the plan has checked the shape");
    // What comes after the codes of all rows: the scales of all rows, then the minima of all rows.
    let [_, scale_bytes, minimum_bytes] = target.sections(view.rows, view.cols).unwrap_or_default();
    let mut payload = Vec::with_capacity(bytes);
    let (mut scales, mut minima) = (Vec::with_capacity(scale_bytes), Vec::with_capacity(minimum_bytes));
    let rows_at_once = (SCRATCH_ELEMENTS / view.cols).clamp(1, view.rows);
    let mut scratch = vec![0.0f32; rows_at_once * view.cols];
    let mut codes = CodeRow::default();
    let mut row = 0;
    while row < view.rows {
        let count = rows_at_once.min(view.rows - row);
        let values = &mut scratch[..count * view.cols];
        for (offset, out) in values.chunks_exact_mut(view.cols).enumerate() {
            dequantise_row(view, row + offset, &mut codes, out);
        }
        let mut part = quantise(target, count, view.cols, values).expect("a dtype that is written, of finite weights");
        let [_, part_scales, part_minima] = target.sections(count, view.cols).unwrap_or_default();
        minima.extend(part.drain(part.len() - part_minima..));
        scales.extend(part.drain(part.len() - part_scales..));
        payload.append(&mut part);
        row += count;
    }
    payload.append(&mut scales);
    payload.append(&mut minima);
    assert_eq!(payload.len(), bytes);
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converting_by_rows_gives_what_converting_at_once_gives() {
        let (rows, cols) = (5, (SCRATCH_ELEMENTS / 2) + 7); // Two rows at a time, and a short last group.
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 1001) as f32 - 500.0) / 77.0).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = TensorView { dtype: Dtype::F32, rows, cols, bytes: &bytes };
        let planar = [Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 32 }, Dtype::Int4Minimum { group: 64 }, Dtype::Int1 { group: 128 }];
        for target in [Dtype::F32, Dtype::Bf16].into_iter().chain(planar) {
            assert!(convert(&view, target) == quantise(target, rows, cols, &values).unwrap(), "{target}");
        }
    }
}
