//! Two things timed in turns, so that what disturbs the machine disturbs both: the ratio of each round, its median and how sure
//! that is. It knows closures and numbers only.

use std::time::{Duration, Instant};

/// The median of some values, and the interval that holds it in 95 of 100 resamplings (percentile bootstrap).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// The interval's lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl Estimate {
    /// Of at least one value. The resampling is the same every time.
    ///
    /// # Panics
    /// Without a value.
    pub fn of(values: &[f64]) -> Self {
        let mut random = Coin(0x5eed);
        let mut medians: Vec<f64> =
            (0..RESAMPLES).map(|_| median((0..values.len()).map(|_| values[random.below(values.len())]).collect())).collect();
        medians.sort_by(f64::total_cmp);
        Self { median: median(values.to_vec()), low: medians[RESAMPLES / 40], high: medians[RESAMPLES - 1 - RESAMPLES / 40] }
    }
}

/// Seconds of one call of each, for each round; each takes part in a round for about `budget`, and a coin says who begins.
#[expect(clippy::disallowed_methods, reason = "a measurement reads the real clock")]
pub fn alternate(rounds: usize, budget: Duration, a: &mut dyn FnMut(), b: &mut dyn FnMut()) -> Vec<(f64, f64)> {
    let time = |run: &mut dyn FnMut(), calls: usize| {
        let start = Instant::now();
        (0..calls).for_each(|_| run());
        start.elapsed().as_secs_f64() / calls as f64
    };
    // The first call pays for first touches; the second tells how many fit.
    let calls = |run: &mut dyn FnMut()| {
        run();
        ((budget.as_secs_f64() / time(run, 1)).ceil() as usize).clamp(1, CALLS_MAX)
    };
    let (a_calls, b_calls) = (calls(a), calls(b));
    let mut coin = Coin(0xc011);
    (0..rounds)
        .map(|_| {
            if coin.below(2) == 0 {
                let a_seconds = time(a, a_calls);
                (a_seconds, time(b, b_calls))
            } else {
                let b_seconds = time(b, b_calls);
                (time(a, a_calls), b_seconds)
            }
        })
        .collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { f64::midpoint(values[middle - 1], values[middle]) } else { values[middle] }
}

/// A small linear congruence: the same throws in every run.
struct Coin(u64);

impl Coin {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

const RESAMPLES: usize = 1000;
/// Calls of a side in a round at most.
const CALLS_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_is_a_median_within_its_interval() {
        assert_eq!(Estimate::of(&[2.0]), Estimate { median: 2.0, low: 2.0, high: 2.0 });
        assert!((Estimate::of(&[1.0, 3.0]).median - 2.0).abs() < 1e-12);
        let values: Vec<f64> = (0..101).map(f64::from).collect();
        let estimate = Estimate::of(&values);
        assert!((estimate.median - 50.0).abs() < 1e-12);
        assert!((25.0..50.0).contains(&estimate.low) && (50.0..75.0).contains(&estimate.high), "{estimate:?}");
    }

    #[test]
    fn one_wild_value_does_not_move_it() {
        let mut values = vec![1.0; 30];
        values[7] = 1e9;
        assert_eq!(Estimate::of(&values), Estimate { median: 1.0, low: 1.0, high: 1.0 });
    }

    #[test]
    fn both_sides_take_part_in_every_round() {
        let (mut a, mut b) = (0, 0);
        let rounds = alternate(5, Duration::from_micros(1), &mut || a += 1, &mut || b += 1);
        assert_eq!(rounds.len(), 5);
        assert!(a >= 5 && b >= 5);
    }
}
