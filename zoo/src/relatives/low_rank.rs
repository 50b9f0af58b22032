//! Whether a matrix is another one plus a product of two thin ones, rounded: a merged LoRA (arXiv 2106.09685). The range of the difference
//! is found by random projection (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1). Rounding has hidden a part of it: each
//! element of the difference is known to half a unit in the last place only. So the factors are then moved, by alternating projections,
//! into the set of all differences that would have been rounded to what is there. The proof is direct: base + product, rounded as
//! stored, is the tuned matrix. Pure. Start with [`low_rank`].

use ashlar_kernels::format::{Dtype, TensorView, dequantise};
use half::{bf16, f16};
use nalgebra::DMatrix;

use super::truncated::{OVERSAMPLE, SVD_STEPS_MAX, range};

/// Share of the changed elements that must come out as they are, and of all others. A merge that is computed in bf16 rounds the product first
/// and so moves a few of a thousand by one unit in the last place; a full fine-tune keeps less than half of its changes at any rank that saves space.
pub const REPRODUCED_MIN: f64 = 0.98;

/// Changed elements for each number in the factors, at least. With two, trained matrices of 64 rows "had" rank 21. With four, factors in f32 take at
/// most half of what a matrix in bf16 takes.
const EVIDENCE_MIN: u64 = 4;
/// Rows and columns of the random part of a matrix that is tried first. What is not of low rank ends there, whatever the matrix's size.
const PART_MAX: usize = 256;
/// Rounds of alternating projections.
const ROUNDS_MAX: usize = 60;
/// Steps past the nearest point of the set: 1 would stop at its border, 2 is its mirror image.
const RELAXATION: f32 = 1.95;
/// How much more than even rounding errors may be left beyond the rank: where a merge changed less than a unit, they are not spread evenly.
const NOISE_FACTOR: f32 = 2.5;
/// Share of a sum of squares in f32 that may be its own error.
const SUM_ERROR: f32 = 1e-4;
/// Ranks that are tried: those behind which singular values fall most.
const RANKS_TRIED: usize = 3;

/// Factors of a difference.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// Their rank.
    pub rank: usize,
    /// Shrink, `[rank, K]`, row by row.
    pub a: Vec<f32>,
    /// Expand, `[N, rank]`, row by row. The difference is B A.
    pub b: Vec<f32>,
    /// How well base + B A is the tuned matrix.
    pub proof: Proof,
}

/// Elements of base + B A, rounded to the stored format, against the tuned matrix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Proof {
    /// Elements.
    pub element_count: u64,
    /// Elements in which base and tuned differ.
    pub changed_count: u64,
    /// Changed ones that come out as they are.
    pub changed_exact_count: u64,
    /// All that come out as they are.
    pub exact_count: u64,
    /// Those that come out more than one unit in the last place away.
    pub far_count: u64,
}

impl Proof {
    /// Share of the elements that come out as they are.
    pub fn exact_share(&self) -> f64 {
        self.exact_count as f64 / self.element_count.max(1) as f64
    }

    /// Whether base and product of this rank are the matrix. What has as many numbers as elements changed could be made to fit anything.
    fn holds(&self, number_count: usize) -> bool {
        if self.changed_count < EVIDENCE_MIN * number_count as u64 {
            return false;
        }
        let changed = self.changed_exact_count as f64 / self.changed_count.max(1) as f64;
        changed >= REPRODUCED_MIN && self.exact_share() >= REPRODUCED_MIN && self.far_count * 1000 <= self.element_count
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            element_count: self.element_count + other.element_count,
            changed_count: self.changed_count + other.changed_count,
            changed_exact_count: self.changed_exact_count + other.changed_exact_count,
            exact_count: self.exact_count + other.exact_count,
            far_count: self.far_count + other.far_count,
        }
    }
}

/// A pair of matrices, as numbers.
struct Pair {
    dtype: Dtype,
    base: DMatrix<f32>,
    tuned: DMatrix<f32>,
}

/// Factors of rank at most `rank_max` of the difference of two matrices of one shape, both f32, f16 or bf16; `None` where there are none that
/// have fewer numbers than a quarter of the changed elements. Equal matrices have none.
pub fn low_rank(base: &TensorView<'_>, tuned: &TensorView<'_>, rank_max: usize) -> Option<LowRank> {
    let is_float = matches!(tuned.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16);
    if !is_float || (base.dtype, base.rows, base.cols) != (tuned.dtype, tuned.rows, tuned.cols) {
        return None;
    }
    let rank_max = rank_max.min(tuned.rows * tuned.cols / (tuned.rows + tuned.cols) / EVIDENCE_MIN as usize);
    if rank_max == 0 {
        return None;
    }
    let mut rng = Seeded(0x5EED ^ ((tuned.rows as u64) << 32) ^ tuned.cols as u64);
    let matrix = |view: &TensorView<'_>| DMatrix::from_row_slice(view.rows, view.cols, &dequantise(view));
    let pair = Pair { dtype: tuned.dtype, base: matrix(base), tuned: matrix(tuned) };
    if tuned.rows.min(tuned.cols) > PART_MAX {
        let part = pair.part(&mut rng);
        let rank = fit(&part, rank_max, &mut rng)?.rank;
        return fit(&pair, rank, &mut rng);
    }
    fit(&pair, rank_max, &mut rng)
}

impl Pair {
    /// Some rows and columns of it.
    fn part(&self, rng: &mut Seeded) -> Self {
        let (rows, cols) = (rng.some_of(self.base.nrows()), rng.some_of(self.base.ncols()));
        let select = |matrix: &DMatrix<f32>| matrix.select_rows(&rows).select_columns(&cols);
        Self { dtype: self.dtype, base: select(&self.base), tuned: select(&self.tuned) }
    }

    /// Counts what base + `unit` x is after rounding. `largest` is the largest change.
    fn prove(&self, x: &DMatrix<f32>, unit: f32, largest: f32) -> Proof {
        let mut proof = Proof { element_count: x.len() as u64, ..Proof::default() };
        for ((base, tuned), x) in self.base.iter().zip(&self.tuned).zip(x) {
            let apart = units_apart(self.dtype, base + unit * x, *tuned, largest);
            let (changed, exact) = (base != tuned, apart == 0);
            proof.changed_count += u64::from(changed);
            proof.exact_count += u64::from(exact);
            proof.changed_exact_count += u64::from(changed && exact);
            proof.far_count += u64::from(apart > 1);
        }
        proof
    }
}

/// Factors of the least rank among those tried for which the proof holds.
fn fit(pair: &Pair, rank_max: usize, rng: &mut Seeded) -> Option<LowRank> {
    let mut difference = &pair.tuned - &pair.base;
    // In units of the largest change, so that no product overflows.
    let unit = difference.amax();
    if !unit.is_normal() {
        return None;
    }
    difference /= unit;
    let slack = pair.tuned.map(|tuned| half_unit(pair.dtype, tuned, unit) / unit);
    let width = (rank_max + OVERSAMPLE).min(difference.nrows()).min(difference.ncols());
    let range = range(&difference, width, rng);
    let small = range.tr_mul(&difference).try_svd(true, false, f32::EPSILON, SVD_STEPS_MAX)?;
    // What no product of so little rank explains must be rounding, whose errors are spread evenly over a unit.
    let (whole, explained) = (difference.norm_squared(), small.singular_values.norm_squared());
    if whole - explained > NOISE_FACTOR * slack.norm_squared() / 3.0 + SUM_ERROR * whole {
        return None;
    }
    let left = range * small.u.expect("asked for");
    for rank in ranks(small.singular_values.as_slice(), rank_max) {
        if let Some(found) = refine(pair, (&difference, &slack, unit), left.columns(0, rank).into_owned()) {
            return Some(found);
        }
    }
    None
}

/// Ranks to try, ascending: those behind which singular values, descending, fall most.
fn ranks(singular: &[f32], rank_max: usize) -> Vec<usize> {
    let fall = |rank: usize| singular[rank - 1] / singular.get(rank).copied().unwrap_or(0.0).max(f32::MIN_POSITIVE);
    let mut ranks: Vec<usize> = (1..=rank_max.min(singular.len())).collect();
    ranks.sort_by(|a, b| fall(*b).total_cmp(&fall(*a)));
    ranks.truncate(RANKS_TRIED);
    if !ranks.contains(&rank_max) && rank_max <= singular.len() {
        ranks.push(rank_max);
    }
    ranks.sort_unstable();
    ranks
}

/// Moves the product whose columns `left` spans to where rounding gives the tuned matrix, as far as it can. `sought` are the difference, how far off
/// each of its elements may be, and the unit of both.
fn refine(pair: &Pair, sought: (&DMatrix<f32>, &DMatrix<f32>, f32), mut left: DMatrix<f32>) -> Option<LowRank> {
    let (difference, slack, unit) = sought;
    let rank = left.ncols();
    let mut target = difference.clone();
    let mut last: Option<DMatrix<f32>> = None;
    let mut best: Option<(Proof, DMatrix<f32>, DMatrix<f32>)> = None;
    let mut stale = 0;
    for round in 0..ROUNDS_MAX {
        // The nearest product to the target in one step of subspace iteration from the last one.
        let right = orthonormal(target.tr_mul(&left));
        left = orthonormal(&target * right);
        let right = target.tr_mul(&left);
        let product = &left * right.transpose();
        let proof = pair.prove(&product, unit, unit);
        let missed = |proof: &Proof| proof.element_count - proof.exact_count;
        let is_better = best.as_ref().is_none_or(|(best, ..)| missed(&proof) < missed(best));
        stale = if is_better { 0 } else { stale + 1 };
        if is_better {
            best = Some((proof, left.clone(), right));
        }
        let hopeless = round == 3 && (proof.changed_exact_count as f64) < 0.6 * proof.changed_count as f64;
        if missed(&proof) == 0 || stale >= 8 || hopeless {
            break;
        }
        // On in the direction of the last step, as Nesterov does, then towards the set of differences that round to the tuned matrix, and a
        // little past its border. Without the momentum 60 rounds leave 2.7 % of math-lora's elements wrong, with it 0.06 %.
        let momentum = round as f32 / (round + 3) as f32;
        let ahead = match &last {
            Some(last) => &product + (&product - last) * momentum,
            None => product.clone(),
        };
        for (((target, ahead), d), slack) in target.iter_mut().zip(&ahead).zip(difference).zip(slack) {
            let nearest = ahead.clamp(d - slack, d + slack);
            *target = ahead + RELAXATION * (nearest - ahead);
        }
        last = Some(product);
    }
    let (_, left, right) = best?;
    // Both factors of one size: product = U (S V'), and each gets the root of S.
    let small = right.transpose().try_svd(true, true, f32::EPSILON, SVD_STEPS_MAX)?;
    let roots = small.singular_values.map(|value| (value * unit).sqrt());
    let (u, v) = (small.u.expect("asked for"), small.v_t.expect("asked for"));
    let b = left * u * DMatrix::from_diagonal(&roots);
    let a = DMatrix::from_diagonal(&roots) * v;
    let proof = pair.prove(&(&b * &a), 1.0, unit);
    // Row by row is column by column of the transpose.
    proof.holds(a.len() + b.len()).then(|| LowRank {
        rank,
        a: a.transpose().as_slice().to_vec(),
        b: b.transpose().as_slice().to_vec(),
        proof,
    })
}

/// Columns that span the same, orthonormal.
pub(super) fn orthonormal(matrix: DMatrix<f32>) -> DMatrix<f32> {
    matrix.qr().q()
}

/// Half the distance of a stored value to the next one. Of f32 it is four distances, of the largest change where that is greater: a product is summed
/// in some order, and a merge may have taken another one.
fn half_unit(dtype: Dtype, value: f32, largest: f32) -> f32 {
    let next = match dtype {
        Dtype::Bf16 => bf16::from_bits((bf16::from_f32(value).to_bits() & 0x7FFF) + 1).to_f32(),
        Dtype::F16 => f16::from_bits((f16::from_f32(value).to_bits() & 0x7FFF) + 1).to_f32(),
        _ => {
            let size = value.abs().max(largest);
            return 4.0 * (size.next_up() - size);
        }
    };
    (next - value.abs()) / 2.0
}

/// Stored values between two numbers, one of them not yet rounded. Of f32 what is within [`half_unit`] counts as none.
fn units_apart(dtype: Dtype, value: f32, stored: f32, largest: f32) -> u32 {
    // Of a sign and a magnitude, to a line of integers.
    let line = |bits: u16| if bits & 0x8000 == 0 { i32::from(bits) } else { -i32::from(bits & 0x7FFF) };
    match dtype {
        Dtype::Bf16 => line(bf16::from_f32(value).to_bits()).abs_diff(line(bf16::from_f32(stored).to_bits())),
        Dtype::F16 => line(f16::from_f32(value).to_bits()).abs_diff(line(f16::from_f32(stored).to_bits())),
        _ => {
            let units = (value - stored).abs() / half_unit(dtype, stored, largest);
            if units <= 1.0 { 0 } else { 1 + u32::from(units > 2.0) }
        }
    }
}

/// SplitMix64: the same matrices give the same factors.
pub(super) struct Seeded(pub(super) u64);

impl Seeded {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        value ^ (value >> 31)
    }

    /// Entries of +1 and -1, which project as well as normal ones.
    pub(super) fn matrix(&mut self, rows: usize, cols: usize) -> DMatrix<f32> {
        DMatrix::from_fn(rows, cols, |_, _| if self.next() >> 63 == 0 { 1.0 } else { -1.0 })
    }

    /// At most [`PART_MAX`] of `count` indices, ascending.
    fn some_of(&mut self, count: usize) -> Vec<usize> {
        let mut chosen = std::collections::BTreeSet::new();
        while chosen.len() < count.min(PART_MAX) {
            chosen.insert(usize::try_from(self.next() % count as u64).expect("less than a usize"));
        }
        chosen.into_iter().collect()
    }
}

#[cfg(test)]
mod tests;
