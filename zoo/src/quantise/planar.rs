//! Rounding a whole tensor, group by group, and writing it as the planar formats lie (docs/block-format.md). A pure function of tensor and
//! form, so what models share stays shared.

use std::ops::Range;

use ashlar_kernels::format::{CodeRow, Dtype, GROUP_MAX, TensorView, dequantise_row, quantise};
use half::f16;

use super::grid::{Grid, Levels};

/// A matrix in an int8 or int4 format that is written row by row.
#[derive(Debug)]
pub struct PlanarRows {
    dtype: Dtype,
    codes: Vec<u8>,
    scales: Vec<u8>,
    minima: Vec<u8>,
}

impl PlanarRows {
    /// With room for a matrix `[rows, cols]`.
    ///
    /// # Panics
    /// When the format is none that has [`Levels`], or cannot have the shape.
    pub fn new(dtype: Dtype, rows: usize, cols: usize) -> Self {
        assert!(Levels::of(dtype).is_some(), "{dtype} is no int8 or int4");
        let [codes, scales, minima] = dtype.sections(rows, cols).expect("a shape that can be stored");
        Self { dtype, codes: Vec::with_capacity(codes), scales: Vec::with_capacity(scales), minima: Vec::with_capacity(minima) }
    }

    /// Appends a row: a code for each weight, and a grid for each group.
    pub fn push(&mut self, codes: &[i8], grids: &[Grid]) {
        match self.dtype {
            Dtype::Int4 { .. } => self.codes.extend(codes.chunks(2).map(|pair| nibbles(pair, 8))),
            Dtype::Int4Minimum { .. } => self.codes.extend(codes.chunks(2).map(|pair| nibbles(pair, 0))),
            _ => self.codes.extend(codes.iter().map(|code| code.cast_unsigned())),
        }
        for grid in grids {
            self.scales.extend(grid.scale.to_le_bytes());
            if self.dtype.has_minimum() {
                self.minima.extend(grid.minimum.to_le_bytes());
            }
        }
    }

    /// The payload of a matrix `[rows, cols]` whose rows do not depend on each other: `write` gives those of a range, and is asked for ranges of a
    /// multiple of `together` rows, each on a thread of its own.
    ///
    /// # Panics
    /// As [`PlanarRows::new`], or when `write` does.
    pub fn in_parts(dtype: Dtype, [rows, cols]: [usize; 2], together: usize, write: impl Fn(Range<usize>) -> Self + Sync) -> Vec<u8> {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let rows_each = rows.div_ceil(threads).next_multiple_of(together).max(1);
        let parts: Vec<Self> = std::thread::scope(|scope| {
            let write = &write;
            let starts = (0..rows).step_by(rows_each);
            let running: Vec<_> = starts.map(|start| scope.spawn(move || write(start..rows.min(start + rows_each)))).collect();
            running.into_iter().map(|part| part.join().expect("rows are written without a panic")).collect()
        });
        let mut all = Self::new(dtype, rows, cols);
        for mut part in parts {
            all.codes.append(&mut part.codes);
            all.scales.append(&mut part.scales);
            all.minima.append(&mut part.minima);
        }
        all.finish()
    }

    fn finish(mut self) -> Vec<u8> {
        self.codes.append(&mut self.scales);
        self.codes.append(&mut self.minima);
        self.codes
    }
}

/// A tensor in an int8 or int4 format: the grid of each group by [`Grid::fit`], which is never worse than what
/// [`quantise`](ashlar_kernels::format::quantise) chooses, and each weight as the nearest code.
///
/// # Panics
/// As [`PlanarRows::new`].
pub fn round(view: &TensorView<'_>, dtype: Dtype) -> Vec<u8> {
    PlanarRows::in_parts(dtype, [view.rows, view.cols], 1, |rows| round_rows(view, dtype, rows))
}

fn round_rows(view: &TensorView<'_>, dtype: Dtype, range: Range<usize>) -> PlanarRows {
    let levels = Levels::of(dtype).expect("an int8 or int4 format");
    let group = dtype.group().expect("it has groups");
    let mut rows = PlanarRows::new(dtype, range.len(), view.cols);
    let (mut source, mut plain) = (CodeRow::default(), CodeRow::default());
    let (mut weights, mut codes, mut grids) = (vec![0.0f32; view.cols], Vec::new(), Vec::new());
    for row in range {
        dequantise_row(view, row, &mut source, &mut weights);
        let bytes = quantise(dtype, 1, view.cols, &weights).expect("a format that is written");
        plain.read(&TensorView { dtype, rows: 1, cols: view.cols, bytes: &bytes }, 0);
        codes.clear();
        grids.clear();
        for (index, weights) in weights.chunks(group).enumerate() {
            let minimum = plain.minima.get(index).copied().unwrap_or(0.0);
            let plain = Grid { scale: f16::from_f32(plain.scales[index]), minimum: f16::from_f32(minimum) };
            let grid = Grid::fit(levels, weights, &[1.0; GROUP_MAX][..weights.len()], Some(plain));
            codes.extend(weights.iter().map(|w| grid.code(levels, *w) as i8));
            grids.push(grid);
        }
        rows.push(&codes, &grids);
    }
    rows
}

fn nibbles(pair: &[i8], offset: i8) -> u8 {
    let nibble = |at: usize| pair.get(at).map_or(0, |code| (code + offset).cast_unsigned());
    nibble(0) | nibble(1) << 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_kernels::format::dequantise;

    fn formats(group: u16) -> [Dtype; 4] {
        [Dtype::Int8 { group }, Dtype::Int4 { group }, Dtype::Int8Minimum { group }, Dtype::Int4Minimum { group }]
    }

    /// Bell-shaped values, with an outlier here and there.
    fn weights(count: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|i| (next() + next() + next()) * if i % 97 == 0 { 3.0 } else { 1.0 }).collect()
    }

    #[test]
    fn rows_are_written_as_they_are_read() {
        let (rows, cols) = (3, 77); // An odd row, and a short last group.
        let weights = weights(rows * cols);
        for dtype in formats(32) {
            let bytes = quantise(dtype, rows, cols, &weights).unwrap();
            let view = TensorView { dtype, rows, cols, bytes: &bytes };
            let (mut read, mut written) = (CodeRow::default(), PlanarRows::new(dtype, rows, cols));
            for row in 0..rows {
                read.read(&view, row);
                let minimum = |group: usize| f16::from_f32(read.minima.get(group).copied().unwrap_or(0.0));
                let grids: Vec<Grid> =
                    read.scales.iter().enumerate().map(|(g, scale)| Grid { scale: f16::from_f32(*scale), minimum: minimum(g) }).collect();
                written.push(&read.codes, &grids);
            }
            assert_eq!(written.finish(), bytes, "{dtype}");
        }
    }

    #[test]
    fn no_group_is_worse_than_rounded_plainly_and_four_bits_are_better_on_the_whole() {
        let (rows, cols) = (40, 200);
        let weights = weights(rows * cols);
        let source: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let view = TensorView { dtype: Dtype::F32, rows, cols, bytes: &source };
        for dtype in formats(64) {
            let errors = |bytes: &[u8]| -> Vec<f64> {
                let back = dequantise(&TensorView { dtype, rows, cols, bytes });
                let squares: Vec<f64> = weights.iter().zip(back).map(|(w, b)| f64::from(w - b).powi(2)).collect();
                squares.chunks(cols).flat_map(|row| row.chunks(64).map(|group| group.iter().sum::<f64>())).collect()
            };
            let (plain, fitted) = (errors(&quantise(dtype, rows, cols, &weights).unwrap()), errors(&round(&view, dtype)));
            // The choice is made in f32, and codes by a product with the inverse.
            assert!(plain.iter().zip(&fitted).all(|(plain, fitted)| *fitted <= plain * 1.0001), "{dtype}");
            let gain = fitted.iter().sum::<f64>() / plain.iter().sum::<f64>();
            assert!(gain < if matches!(dtype, Dtype::Int4 { .. } | Dtype::Int4Minimum { .. }) { 0.995 } else { 1.0001 }, "{dtype}: {gain}");
        }
    }
}
