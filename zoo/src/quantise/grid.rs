//! The grid of a group: scale and minimum, chosen so that rounding its weights to the nearest code makes the least squared error. The
//! choice is a function of weights and importances alone. Inlined: calibration runs it in its own crate.

use ashlar_kernels::format::{Dtype, GROUP_MAX};
use half::f16;

/// The codes that a format has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Levels {
    bottom: f32,
    top: f32,
    has_minimum: bool,
}

impl Levels {
    /// Of an int8 or int4 format, with or without minimum; `None` for others.
    pub fn of(dtype: Dtype) -> Option<Self> {
        let (bottom, top) = match dtype {
            Dtype::Int8 { .. } | Dtype::Int8Minimum { .. } => (-127.0, 127.0),
            Dtype::Int4 { .. } => (-8.0, 7.0),
            Dtype::Int4Minimum { .. } => (0.0, 15.0),
            _ => return None,
        };
        Some(Self { bottom, top, has_minimum: dtype.has_minimum() })
    }
}

/// Scale and minimum of a group: `w = code * scale + minimum`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// Step from code to code.
    pub scale: f16,
    /// The weight of code 0; 0 for formats without.
    pub minimum: f16,
}

impl Grid {
    /// The nearest code, ties to even; what lies beyond the levels is clipped.
    #[inline]
    pub fn code(self, levels: Levels, weight: f32) -> f32 {
        self.steps().code(levels, weight)
    }

    /// The weight of a code, as formats define it: each operation rounded.
    #[inline]
    pub fn weight(self, code: f32) -> f32 {
        code * self.scale.to_f32() + self.minimum.to_f32()
    }

    /// The best of a fixed list of grids from coarse to clipping, refined by least squares: of its codes the best scale and minimum, of these
    /// the nearest codes, and again while the error falls. `importance` weighs the squared errors, one for each weight. `plain`, where it is
    /// given, is what the result has to beat. Weights that lie on a grid of the format, and use its ends or all levels but a few, are found exactly.
    ///
    /// # Panics
    /// When there is not one importance for each weight, or there are more weights than a group may have.
    #[inline]
    pub fn fit(levels: Levels, weights: &[f32], importance: &[f32], plain: Option<Self>) -> Self {
        assert!(weights.len() == importance.len() && weights.len() <= GROUP_MAX, "an importance for each weight of a group");
        let mut best = Fitted { grid: Self { scale: f16::ZERO, minimum: f16::ZERO }, error: f32::INFINITY };
        let mut consider = |grid: Self| {
            let error = grid.steps().error(levels, weights, importance);
            if error < best.error {
                best = Fitted { grid, error };
            }
        };
        if let Some(plain) = plain {
            consider(plain);
        }
        if levels.has_minimum {
            let (least, most) = weights.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), &w| (least.min(w), most.max(w)));
            let span = most - least;
            for (below, above) in CLIPS.iter().flat_map(|below| CLIPS.map(|above| (*below, above))) {
                consider(Self::between(levels, least + below * span, most - above * span, levels.top - levels.bottom));
            }
            // Fewer levels than there are, for groups that were rounded before and do not reach both ends.
            if levels.top < 100.0 {
                (7..15u8).for_each(|steps| consider(Self::between(levels, least, most, f32::from(steps))));
            }
        } else {
            let extreme = weights.iter().fold(0.0f32, |max, &w| if w.abs() > max.abs() { w } else { max });
            let divisors: &[f32] = if levels.top > 100.0 { &INT8_DIVISORS } else { &INT4_DIVISORS };
            divisors.iter().for_each(|divisor| consider(Self { scale: half(extreme / divisor), minimum: f16::ZERO }));
        }
        for _ in 0..REFINEMENTS {
            let Some(refined) = best.grid.refined(levels, weights, importance) else { break };
            let error = refined.steps().error(levels, weights, importance);
            if error >= best.error {
                break;
            }
            best = Fitted { grid: refined, error };
        }
        best.grid
    }

    /// So many steps from `least` to `most`.
    #[inline]
    fn between(levels: Levels, least: f32, most: f32, steps: f32) -> Self {
        let scale = half((most - least) / steps);
        // Where code 0 lies in the middle, so does the minimum.
        let minimum = if levels.bottom == 0.0 { half(least) } else { half(0.5 * least + 0.5 * most) };
        Self { scale, minimum }
    }

    /// The grid of least squared error for the codes that this one gives; `None` where they do not tell.
    #[inline]
    fn refined(self, levels: Levels, weights: &[f32], importance: &[f32]) -> Option<Self> {
        let steps = self.steps();
        let mut sums = Sums::default();
        for (&w, &h) in weights.iter().zip(importance) {
            sums.add(f64::from(h), f64::from(steps.code(levels, w)), f64::from(w));
        }
        if !levels.has_minimum {
            let scale = sums.code_weight / sums.code_code;
            return scale.is_finite().then(|| Self { scale: half(scale as f32), minimum: f16::ZERO });
        }
        let determinant = sums.one * sums.code_code - sums.code * sums.code;
        let scale = (sums.one * sums.code_weight - sums.code * sums.weight) / determinant;
        if determinant <= 0.0 || !scale.is_finite() {
            return None;
        }
        let scale = half(scale as f32);
        // The best minimum beside the scale as it is stored.
        let minimum = (sums.weight - f64::from(scale.to_f32()) * sums.code) / sums.one;
        Some(Self { scale, minimum: half(minimum as f32) })
    }

    #[inline]
    fn steps(self) -> Steps {
        let scale = self.scale.to_f32();
        let inverse = 1.0 / scale;
        Steps { scale, inverse: if inverse.is_finite() { inverse } else { 0.0 }, minimum: self.minimum.to_f32() }
    }
}

/// A grid and the error that it makes.
#[derive(Debug, Clone, Copy)]
struct Fitted {
    grid: Grid,
    error: f32,
}

/// A grid in f32.
#[derive(Debug, Clone, Copy)]
struct Steps {
    scale: f32,
    /// 0 for a scale of 0, so that all codes are.
    inverse: f32,
    minimum: f32,
}

impl Steps {
    #[inline]
    fn code(self, levels: Levels, weight: f32) -> f32 {
        // Adding 1.5 * 2^23 leaves no bits for a fraction: the rounding of a sum, which every processor has, in place of a call.
        const WHOLE: f32 = 12_582_912.0;
        ((weight - self.minimum) * self.inverse).clamp(levels.bottom, levels.top) + WHOLE - WHOLE
    }

    /// Weighed squared error, in eight sums, so that it is computed several weights at a time.
    #[inline]
    fn error(self, levels: Levels, weights: &[f32], importance: &[f32]) -> f32 {
        let mut sums = [0.0f32; 8];
        let ((weights, last), (importance, last_importance)) = (weights.as_chunks::<8>(), importance.as_chunks::<8>());
        for (weights, importance) in weights.iter().zip(importance) {
            for ((sum, &w), &h) in sums.iter_mut().zip(weights).zip(importance) {
                let error = w - (self.code(levels, w) * self.scale + self.minimum);
                *sum += h * error * error;
            }
        }
        for ((sum, &w), &h) in sums.iter_mut().zip(last).zip(last_importance) {
            let error = w - (self.code(levels, w) * self.scale + self.minimum);
            *sum += h * error * error;
        }
        sums.iter().sum()
    }
}

/// Weighed sums of products of codes and weights.
#[derive(Debug, Default)]
struct Sums {
    one: f64,
    code: f64,
    weight: f64,
    code_code: f64,
    code_weight: f64,
}

impl Sums {
    #[inline]
    fn add(&mut self, importance: f64, code: f64, weight: f64) {
        self.one += importance;
        self.code += importance * code;
        self.weight += importance * weight;
        self.code_code += importance * code * code;
        self.code_weight += importance * code * weight;
    }
}

/// Rounds to f16; what would overflow becomes the largest finite value.
#[inline]
fn half(value: f32) -> f16 {
    f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// Rounds of least squares: the error rarely falls after the second.
const REFINEMENTS: usize = 4;
/// What the extreme weight is divided by. Beyond -8 and 7 it is clipped, to two thirds at most; below, levels stay unused.
const INT4_DIVISORS: [f32; 24] =
    [-8.0, -8.4, -8.8, -9.3, -9.9, -10.6, -11.4, -7.7, -7.4, -7.0, -6.0, -5.0, 7.0, 7.3, 7.6, 8.0, 8.5, 9.0, 9.7, 10.5, 6.8, 6.4, 6.0, 5.0];
/// The same for 8 bits, which clip hardly ever.
const INT8_DIVISORS: [f32; 6] = [127.0, 128.0, 129.5, 132.0, 136.0, 142.0];
/// Shares of the span that are clipped at either end.
const CLIPS: [f32; 5] = [0.0, 0.03, 0.07, 0.12, 0.18];

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [Dtype; 4] =
        [Dtype::Int4 { group: 32 }, Dtype::Int4Minimum { group: 32 }, Dtype::Int8 { group: 32 }, Dtype::Int8Minimum { group: 32 }];

    /// Reproducible values in [-1, 1).
    fn random(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }
    }

    #[test]
    fn weights_on_a_grid_of_the_format_are_found_exactly() {
        for (seed, dtype) in (0..200).flat_map(|seed| FORMATS.map(|dtype| (seed, dtype))) {
            let (levels, mut next) = (Levels::of(dtype).unwrap(), random(seed));
            let minimum = if levels.has_minimum { f16::from_f32(next()) } else { f16::ZERO };
            let grid = Grid { scale: f16::from_f32(0.02 + 0.01 * next()), minimum };
            let span = levels.top - levels.bottom;
            let mut codes: Vec<f32> = (0..32).map(|_| (levels.bottom + (next() * 0.5 + 0.5) * span).floor()).collect();
            (codes[3], codes[17]) = (levels.bottom, levels.top);
            let weights: Vec<f32> = codes.iter().map(|code| grid.weight(*code)).collect();
            let found = Grid::fit(levels, &weights, &[1.0; 32], None);
            let back: Vec<f32> = weights.iter().map(|w| found.weight(found.code(levels, *w))).collect();
            assert_eq!(back, weights, "{dtype} {seed}: {found:?}, not {grid:?}");
        }
    }

    #[test]
    fn constant_tiny_and_huge_groups_have_finite_grids() {
        for dtype in FORMATS {
            let levels = Levels::of(dtype).unwrap();
            for weights in
                [[0.0f32; 5], [0.25; 5], [-1e-30; 5], [3e38; 5], [1e-8, -1e-8, 0.0, 3e-8, 1e-8], [f32::MAX, f32::MIN, 0.0, 1.0, 2.0]]
            {
                let grid = Grid::fit(levels, &weights, &[1.0; 5], None);
                let error = |w: &f32| (w - grid.weight(grid.code(levels, *w))).abs();
                assert!(weights.iter().all(|w| error(w).is_finite() || w.abs() > 1e38), "{dtype} {weights:?} {grid:?}");
                assert!(weights != [0.25; 5] || error(&0.25) < 1e-3, "{dtype} {grid:?}");
            }
        }
    }

    #[test]
    fn an_important_weight_is_met_better() {
        let (levels, mut next) = (Levels::of(FORMATS[0]).unwrap(), random(9));
        let (mut even, mut weighed) = (0.0, 0.0);
        for _ in 0..100 {
            let weights: Vec<f32> = (0..32).map(|_| next()).collect();
            let mut importance = [1.0; 32];
            importance[11] = 100.0;
            let error = |grid: Grid| (weights[11] - grid.weight(grid.code(levels, weights[11]))).powi(2);
            even += error(Grid::fit(levels, &weights, &[1.0; 32], None));
            weighed += error(Grid::fit(levels, &weights, &importance, None));
        }
        assert!(weighed < 0.3 * even, "{weighed} {even}");
    }
}
