//! Percentiles by nearest rank, with infinity as a value like any other: a failure is a latency that never ends. It knows
//! numbers only.

use std::fmt;

use serde::{Serialize, Serializer};

/// Four points of a distribution, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    /// Values.
    pub(crate) count: usize,
    /// Half of the values are no larger.
    pub(crate) p50: Ms,
    /// 95 of 100 are no larger.
    pub(crate) p95: Ms,
    /// 99 of 100 are no larger.
    pub(crate) p99: Ms,
    /// None is larger.
    pub(crate) max: Ms,
}

/// Milliseconds, perhaps infinite: JSON has no word for that, so it is written as the string "inf".
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Ms(pub(crate) f64);

impl Serialize for Ms {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_finite() { serializer.serialize_f64((self.0 * 1e4).round() / 1e4) } else { serializer.serialize_str("inf") }
    }
}

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `pad` keeps the width that the table asks for.
        f.pad(&if self.0.is_infinite() { "never".to_owned() } else { format!("{:.1}", self.0) })
    }
}

impl Quantiles {
    /// Of all values; none without a value.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let max = Ms(*values.last()?);
        let at = |percent| Ms(values[rank(values.len(), percent)]);
        Some(Self { count: values.len(), p50: at(50), p95: at(95), p99: at(99), max })
    }
}

/// Index of the smallest value that at least `percent` of 100 values do not exceed.
fn rank(count: usize, percent: usize) -> usize {
    (count * percent).div_ceil(100).max(1) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(values: &[f64], p50: f64, p95: f64, p99: f64, max: f64) {
        let expected = Quantiles { count: values.len(), p50: Ms(p50), p95: Ms(p95), p99: Ms(p99), max: Ms(max) };
        assert_eq!(Quantiles::of(values.to_vec()), Some(expected));
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        check(&[5.0], 5.0, 5.0, 5.0, 5.0);
        check(&[2.0, 1.0], 1.0, 2.0, 2.0, 2.0);
        check(&[3.0, 1.0, 2.0], 2.0, 3.0, 3.0, 3.0);
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        check(&hundred, 50.0, 95.0, 99.0, 100.0);
        let thousand: Vec<f64> = (1..=1000).map(f64::from).collect();
        check(&thousand, 500.0, 950.0, 990.0, 1000.0);
        assert_eq!(Quantiles::of(Vec::new()), None);
    }

    #[test]
    fn failures_are_infinite_and_stay_so() {
        let mut values = vec![1.0; 96];
        values.extend([f64::INFINITY; 4]);
        check(&values, 1.0, 1.0, f64::INFINITY, f64::INFINITY);
        let quantiles = Quantiles::of(values).expect("values");
        assert_eq!(serde_json::to_string(&quantiles).expect("text"), r#"{"count":100,"p50":1.0,"p95":1.0,"p99":"inf","max":"inf"}"#);
        assert_eq!(format!("{:>8}|{:>8}", quantiles.p50, quantiles.p99), "     1.0|   never");
    }
}
