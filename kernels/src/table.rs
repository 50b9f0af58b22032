//! A lookup table (token or position embedding) as it is stored: the bytes of whoever owns the map of the file, dequantised row
//! by row when a row is asked for. The CPU has another form beside it (`cpu/table`), for tables that are packed anyway.

use std::sync::Arc;

use crate::format::{CodeRow, Dtype, TensorView, dequantise_row};
use crate::ops::PackError;

/// Rows `[rows, width]` that stay where they are stored.
pub struct Table {
    dtype: Dtype,
    rows: usize,
    width: usize,
    /// Where the tensor lies within what `keep` gives.
    start: usize,
    length: usize,
    keep: Arc<dyn AsRef<[u8]> + Send + Sync>,
}

impl Table {
    /// The rows of a tensor whose bytes lie in `keep`.
    ///
    /// # Errors
    /// When its bytes are not as its shape says.
    pub fn new(view: TensorView<'_>, keep: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<Self, PackError> {
        view.check()?;
        let all = (*keep).as_ref();
        let start = (view.bytes.as_ptr() as usize).wrapping_sub(all.as_ptr() as usize);
        let inside = start.checked_add(view.bytes.len()).is_some_and(|end| end <= all.len());
        assert!(inside || view.bytes.is_empty(), "a table's bytes must lie within what keeps them");
        let start = if inside { start } else { 0 };
        Ok(Self { dtype: view.dtype, rows: view.rows, width: view.cols, start, length: view.bytes.len(), keep })
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The format, and the bytes of row `row`, of a float format without scales; `None` of others.
    pub fn float_row(&self, row: u32) -> Option<(Dtype, &[u8])> {
        let bytes = match self.dtype {
            Dtype::F32 => 4 * self.width,
            Dtype::F16 | Dtype::Bf16 => 2 * self.width,
            _ => return None,
        };
        assert!((row as usize) < self.rows, "row {row} of a table of {}", self.rows);
        Some((self.dtype, &(*self.keep).as_ref()[self.start + row as usize * bytes..][..bytes]))
    }

    /// Writes row `row` as f32.
    pub fn read(&self, row: u32, scratch: &mut CodeRow, out: &mut [f32]) {
        let row = row as usize;
        assert!(row < self.rows, "row {row} of a table of {}", self.rows);
        let bytes = &(*self.keep).as_ref()[self.start..][..self.length];
        let view = TensorView { dtype: self.dtype, rows: self.rows, cols: self.width, bytes };
        dequantise_row(&view, row, scratch, out);
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table({} {}x{})", self.dtype, self.rows, self.width)
    }
}
