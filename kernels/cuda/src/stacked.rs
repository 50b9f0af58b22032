//! Parts of a layer that lie on top of each other in one array of weights, so that one launch takes them: q, k and v, or gate and up.

use ashlar_kernels::format::{CodeRow, TensorView};

/// Tensors of one format and number of columns, one below the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stacked<'a> {
    pub(crate) views: &'a [TensorView<'a>],
    /// Of all.
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl<'a> Stacked<'a> {
    pub(crate) fn new(views: &'a [TensorView<'a>]) -> Self {
        Self { views, rows: views.iter().map(|view| view.rows).sum(), cols: views[0].cols }
    }

    /// Reads a row, counted over all.
    pub(crate) fn read(&self, into: &mut CodeRow, mut row: usize) {
        for view in self.views {
            if row < view.rows {
                return into.read(view, row);
            }
            row -= view.rows;
        }
        unreachable!("a row that is there");
    }
}
