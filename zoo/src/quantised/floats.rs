//! FP8 weights (e4m3fn) with a scale for all, for each row, or for each block: `quant_method: fp8` and compressed-tensors' float-quantized.

use std::ops::Range;

use ashlar_kernels::format::Dtype;

use super::scales::{Scales, to_usize};
use super::{Codes, Matrix, Part, QuantisedError, Scheme, stored_group};
use crate::formats::TensorFiles;

/// The largest power of two that meets a scale in a kernel (`format::first_non_finite`).
const LARGEST: f32 = 512.0;

/// Where codes and scales lie.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Floats {
    codes: String,
    scales: Scales,
    /// Inputs that share a scale in the checkpoint.
    inputs: usize,
    /// Inputs that share a scale as stored.
    group: usize,
}

/// The matrix whose codes are `base.weight`.
pub(super) fn find(files: &TensorFiles, scheme: &Scheme, base: &str) -> Result<Matrix, QuantisedError> {
    let codes = Part::need(files, base, "weight", "weight")?.of_type("F8_E4M3")?;
    let shape = codes.matrix("[outputs, inputs]")?;
    let [outputs, inputs] = shape;
    // Multiplied with, whatever the first name says.
    let scale = match Part::seek(files, base, "weight_scale_inv") {
        Some(scale) => scale,
        None => Part::need(files, base, "weight_scale", "weight")?,
    };
    let block = scheme.blocks.iter().find(|[rows, cols]| scale.entry.shape == [outputs.div_ceil(*rows), inputs.div_ceil(*cols)]);
    let (scales, size) = match block {
        Some([rows, cols]) => (Scales::by_block(&scale, *rows, [outputs, inputs.div_ceil(*cols)], "a scale for each block")?, *cols),
        None => {
            let why = scheme.blocks.first().map_or_else(
                || "a scale for each row, or one for all".to_owned(),
                |[rows, cols]| {
                    format!(
                        "a scale for each row, or one for all, or [{}, {}] for blocks of {rows} x {cols}",
                        outputs.div_ceil(*rows),
                        inputs.div_ceil(*cols)
                    )
                },
            );
            (Scales::by_row(&scale, [outputs, 1], &why)?, inputs)
        }
    };
    scales.check(&scale, LARGEST)?;
    let group = stored_group(size, inputs);
    let parts = vec![codes.name.clone(), scale.name];
    let floats = Floats { codes: codes.name, scales, inputs: to_usize(size), group: usize::from(group) };
    Ok(Matrix { parts, dtype: Dtype::Fp8 { group }, shape, widened: None, wrapped: false, codes: Codes::Floats(floats) })
}

impl Floats {
    /// The payload of some rows.
    pub(super) fn rows(&self, files: &TensorFiles, inputs: usize, rows: Range<usize>) -> Vec<u8> {
        let codes = files.bytes(&self.codes).expect("found in these files");
        let scales = self.scales.reader(files);
        let mut out = codes.as_ref()[rows.start * inputs..rows.end * inputs].to_vec();
        for row in rows {
            for first in (0..inputs).step_by(self.group) {
                out.extend(scales.get(row, first / self.inputs).to_le_bytes());
            }
        }
        out
    }
}
