//! From adjusted logits to a token by temperature, min-p, top-k, top-p and one uniform number. Works in the row of logits,
//! which becomes a row of weights: proportional to probability, the likeliest 1, a dropped token 0. All sums are f64 and
//! run by ascending token id (top-p's by descending weight), so that there is one result.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::params::SamplerParams;

/// Draws an index of `logits`, whose largest is `max` (above negative infinity); `uniform` is in `[0, 1)`.
///
/// Top-k and min-p both cut below a threshold, so their order does not matter; top-p follows, over what they left. As in
/// vLLM, logits equal to the k-th largest all stay, and top-p keeps the fewest likeliest tokens whose mass reaches it;
/// here ties at its border go to the lower id.
pub(super) fn draw(logits: &mut [f32], max: f32, params: &SamplerParams, uniform: f64) -> usize {
    let threshold = match params.top_k as usize {
        k if k > 0 && k < logits.len() => kth_largest(logits, k),
        _ => f32::NEG_INFINITY,
    };
    let weights = logits;
    for x in weights.iter_mut() {
        *x = if *x == max {
            1.0
        } else if *x >= threshold {
            let weight = libm::expf((*x - max) / params.temperature);
            if weight >= params.min_p { weight } else { 0.0 }
        } else {
            0.0 // NaN comes here too: it is not >= anything.
        };
    }
    if params.top_p < 1.0 {
        keep_top_p(weights, f64::from(params.top_p));
    }
    pick(weights, uniform)
}

/// The k-th largest value, counting equal ones; NaN is not counted. `1 <= k`.
fn kth_largest(values: &[f32], k: usize) -> f32 {
    let mut largest: BinaryHeap<Smallest> = BinaryHeap::with_capacity(k + 1);
    for value in values.iter().filter(|value| !value.is_nan()) {
        if largest.len() < k {
            largest.push(Smallest(*value));
        } else if largest.peek().is_some_and(|least| *value > least.0) {
            largest.pop();
            largest.push(Smallest(*value));
        }
    }
    match largest.len() < k {
        true => f32::NEG_INFINITY,
        false => largest.peek().map_or(f32::NEG_INFINITY, |least| least.0),
    }
}

/// Sets to 0 all but the fewest largest weights whose sum reaches `top_p` of the total.
fn keep_top_p(weights: &mut [f32], top_p: f64) {
    let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
    let count = weights.iter().filter(|w| **w > 0.0).count();
    // All weights below this together are less than 1 - top_p of the total, so none of them can be needed: of a large
    // vocabulary only some hundreds are sorted. The factor leaves room for rounding.
    let floor = (total * (1.0 - top_p) / count as f64 * 0.999) as f32;
    let mut candidates: Vec<(f32, usize)> =
        weights.iter().enumerate().filter(|(_, w)| **w > 0.0 && **w >= floor).map(|(index, w)| (*w, index)).collect();
    candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let (mut mass, mut last) = (0.0f64, candidates[0]);
    for candidate in candidates {
        if mass >= top_p * total && mass > 0.0 {
            break;
        }
        mass += f64::from(candidate.0);
        last = candidate;
    }
    for (index, weight) in weights.iter_mut().enumerate() {
        if *weight < last.0 || (*weight == last.0 && index > last.1) {
            *weight = 0.0;
        }
    }
}

/// The first index at which the running sum exceeds `uniform` of the total.
fn pick(weights: &[f32], uniform: f64) -> usize {
    let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
    let target = uniform * total;
    let (mut sum, mut last) = (0.0f64, 0);
    for (index, weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        sum += f64::from(*weight);
        last = index;
        if sum > target {
            break;
        }
    }
    last
}

/// Orders a heap so that its head is the smallest. No NaN is put in.
#[derive(PartialEq)]
struct Smallest(f32);

impl Eq for Smallest {}

impl PartialOrd for Smallest {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Smallest {
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.total_cmp(&self.0)
    }
}
