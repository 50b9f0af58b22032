//! What an approximate model was measured to change in what is said: a record beside its chain (`store/measures.rs`), written once and shown with
//! the model. Whoever makes or compares such models writes one; the arithmetic is theirs. It does no IO. Bytes: docs/block-format.md, "Measures".

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// Largest record, in bytes: ten numbers and a method.
pub const MEASURE_BYTES_MAX: u64 = 4096;
/// Longest name of a method, in bytes.
pub const METHOD_BYTES_MAX: usize = 128;
/// Records of one chain that are shown, newest first.
pub const MEASURES_SHOWN_MAX: usize = 64;

/// One measurement of a chain against another one, its source, on a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// How the chain was made of its source, or that the two were only compared: `svd:16`, `bitdelta`, ... Printable ASCII.
    pub method: String,
    /// The chain that it stands for.
    pub against: Digest,
    /// BLAKE3 of the text, UTF-8.
    pub text: Digest,
    /// Next-token distributions that were compared.
    pub rows: u64,
    /// How far these are from the source's.
    pub kl: Divergence,
    /// Share of the rows whose likeliest token is the source's, 0 to 1.
    pub same_top_share: f64,
    /// Perplexity of the text.
    pub perplexity: f64,
    /// The same of the source.
    pub perplexity_of_source: f64,
    /// Unix time, in milliseconds.
    pub created_ms: u64,
}

/// Kullback-Leibler divergence of next-token distributions from the source's, KL(source || this), in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Divergence {
    /// Mean over the rows.
    pub mean: f64,
    /// 99 of 100 rows are no farther.
    pub p99: f64,
    /// No row is farther.
    pub max: f64,
}

/// What is wrong with a record.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum MeasureError {
    /// No method that can be shown.
    #[error("its method is not 1 to {METHOD_BYTES_MAX} characters of printable ASCII")]
    Method,
    /// Nothing was compared.
    #[error("it has no rows")]
    Rows,
    /// A number that such a measurement cannot have.
    #[error("its {field} is {value}")]
    Number {
        /// Which.
        field: &'static str,
        /// The number.
        value: f64,
    },
}

impl Measure {
    /// Checks that the numbers can be a measurement's: finite, none below what it can be.
    ///
    /// # Errors
    /// The first thing that is wrong. A model that says nonsense may have an infinite perplexity, so ask before storing.
    pub fn check(&self) -> Result<(), MeasureError> {
        let is_printable = self.method.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if self.method.is_empty() || self.method.len() > METHOD_BYTES_MAX || !is_printable {
            return Err(MeasureError::Method);
        }
        check_figures(self.rows, self.kl, self.same_top_share)?;
        within([("perplexity", self.perplexity, 1.0, f64::MAX), ("source's perplexity", self.perplexity_of_source, 1.0, f64::MAX)])
    }

    /// Perplexity over the source's, less one: 0.02 is two per cent more.
    pub fn perplexity_change(&self) -> f64 {
        self.perplexity / self.perplexity_of_source - 1.0
    }
}

/// Checks what any comparison of next-token distributions has.
pub(crate) fn check_figures(rows: u64, kl: Divergence, same_top_share: f64) -> Result<(), MeasureError> {
    if rows == 0 {
        return Err(MeasureError::Rows);
    }
    let Divergence { mean, p99, max } = kl;
    within([
        ("mean divergence", mean, 0.0, f64::MAX),
        ("99th percentile of the divergence", p99, 0.0, max),
        ("largest divergence", max, 0.0, f64::MAX),
        ("share of equal likeliest tokens", same_top_share, 0.0, 1.0),
    ])
}

/// Numbers with the least and the most that they can be.
fn within<const N: usize>(numbers: [(&'static str, f64, f64, f64); N]) -> Result<(), MeasureError> {
    match numbers.into_iter().find(|(_, value, least, most)| !(*least..=*most).contains(value)) {
        Some((field, value, ..)) => Err(MeasureError::Number { field, value }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure() -> Measure {
        Measure {
            method: "svd:16".to_owned(),
            against: Digest::of(b"source"),
            text: Digest::of(b"text"),
            rows: 63,
            kl: Divergence { mean: 0.01, p99: 0.2, max: 0.5 },
            same_top_share: 0.97,
            perplexity: 20.4,
            perplexity_of_source: 20.0,
            created_ms: 1,
        }
    }

    #[test]
    fn a_record_is_one_text_and_back() {
        let bytes = crate::canonical::to_bytes(&measure());
        assert_eq!(serde_json::from_slice::<Measure>(&bytes).unwrap(), measure());
        assert!(bytes.len() as u64 + METHOD_BYTES_MAX as u64 <= MEASURE_BYTES_MAX);
        assert!((measure().perplexity_change() - 0.02).abs() < 1e-12);
    }

    #[test]
    fn numbers_that_cannot_be_are_refused_by_name() {
        assert_eq!(measure().check(), Ok(()));
        let refused = |change: fn(&mut Measure)| {
            let mut measure = measure();
            change(&mut measure);
            measure.check().unwrap_err().to_string()
        };
        assert_eq!(refused(|measure| measure.perplexity = f64::INFINITY), "its perplexity is inf");
        assert_eq!(refused(|measure| measure.kl.max = f64::NAN), "its 99th percentile of the divergence is 0.2");
        assert_eq!(refused(|measure| measure.kl.mean = -0.1), "its mean divergence is -0.1");
        assert_eq!(refused(|measure| measure.same_top_share = 1.1), "its share of equal likeliest tokens is 1.1");
        assert_eq!(refused(|measure| measure.perplexity_of_source = 0.5), "its source's perplexity is 0.5");
        assert_eq!(refused(|measure| measure.rows = 0), "it has no rows");
        assert_eq!(refused(|measure| measure.method = "a\nb".to_owned()), MeasureError::Method.to_string());
        assert_eq!(refused(|measure| measure.method = "a".repeat(129)), MeasureError::Method.to_string());
    }
}
