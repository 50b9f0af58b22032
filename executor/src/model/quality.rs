//! What a stored form of a model costs: the perplexity of a text, and how far the distribution of each next token is from that of
//! another form (Kullback-Leibler divergence, in nats). Arithmetic in f64 over the f32 logits of [`Alone`]; it knows no files, no
//! tokenizers and no tables. What `ashlar bench quality` prints.

use std::ops::Range;

use ashlar_kernels::ops::{KvFormat, Ops};

use super::alone::{Alone, AloneLimits};

/// How a text is cut, as llama.cpp's perplexity tool does it: windows follow each other without overlap, each is a sequence of
/// its own, and only the tokens of its second half count, so that every prediction had half a window to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of a window; at least 4.
    pub window_tokens: usize,
    /// Put in place of each window's first token: what the model expects at the beginning, if it expects something.
    pub begin: Option<u32>,
}

impl Windows {
    /// The limits that an [`Alone`] needs for one window.
    pub fn limits(self, page_tokens: usize, kv_format: KvFormat) -> AloneLimits {
        AloneLimits { chunk_tokens_max: self.chunk_tokens(), tokens_max: self.window_tokens, page_tokens, kv_format }
    }

    /// The whole windows of a text; what is left at its end is dropped.
    pub fn cut(self, tokens: &[u32]) -> Vec<Vec<u32>> {
        assert!(self.window_tokens >= 4, "a window of {} tokens predicts nothing", self.window_tokens);
        let mut windows: Vec<Vec<u32>> = tokens.chunks_exact(self.window_tokens).map(<[u32]>::to_vec).collect();
        if let Some(begin) = self.begin {
            windows.iter_mut().for_each(|window| window[0] = begin);
        }
        windows
    }

    /// Positions whose logits count: the last one predicts the last token.
    pub fn counted(self) -> Range<usize> {
        self.window_tokens / 2..self.window_tokens - 1
    }

    /// The logits `[vocab]` of the counted positions of one window.
    pub fn logits<B: Ops>(self, model: &mut Alone<B>, window: &[u32]) -> Vec<Vec<f32>> {
        assert_eq!(window.len(), self.window_tokens, "a whole window");
        model.restart();
        model.feed(&window[..self.window_tokens - 1], self.chunk_tokens(), self.counted().len())
    }

    /// Half a window: the first chunk wants no logits, the second all.
    fn chunk_tokens(self) -> usize {
        self.window_tokens.div_ceil(2)
    }
}

/// The rows of one model against those of the baseline.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Negative log probability of the token that came, by row.
    surprise: Vec<f64>,
    /// The same less the baseline's.
    excess: Vec<f64>,
    /// Divergence of the row from the baseline's.
    divergence: Vec<f64>,
    /// Rows whose most likely token is the baseline's.
    same_top_count: usize,
}

impl Tally {
    /// Counts one row of logits: the baseline's, the model's, and the token that came next.
    ///
    /// # Panics
    /// When the rows differ in length or the token is beyond them.
    pub fn add(&mut self, baseline: &[f32], model: &[f32], next: u32) {
        assert_eq!(baseline.len(), model.len(), "one vocabulary");
        let (base, other) = (LogSum::of(baseline), LogSum::of(model));
        let surprise = -other.log_probability(model[next as usize]);
        self.surprise.push(surprise);
        self.excess.push(surprise + base.log_probability(baseline[next as usize]));
        self.divergence.push(divergence(baseline, base, model, other));
        self.same_top_count += usize::from(top(baseline) == top(model));
    }

    /// Counts the rows of one window.
    pub fn add_window(&mut self, windows: Windows, window: &[u32], baseline: &[Vec<f32>], model: &[Vec<f32>]) {
        assert_eq!((baseline.len(), model.len()), (windows.counted().len(), windows.counted().len()), "a row for each counted position");
        for ((baseline, model), position) in std::iter::zip(baseline, model).zip(windows.counted()) {
            self.add(baseline, model, window[position + 1]);
        }
    }

    /// What all rows say; `None` without a row.
    pub fn sum_up(&self) -> Option<Quality> {
        let surprise = Mean::of(&self.surprise)?;
        let perplexity = surprise.mean.exp();
        let mut divergence = self.divergence.clone();
        divergence.sort_by(f64::total_cmp);
        let rank = |percent: usize| divergence[(divergence.len() * percent).div_ceil(100).max(1) - 1];
        Some(Quality {
            row_count: self.surprise.len(),
            perplexity,
            // First order: d exp(x) = exp(x) dx.
            perplexity_error: perplexity * surprise.error,
            excess: Mean::of(&self.excess)?,
            divergence: Mean::of(&self.divergence)?,
            divergence_p50: rank(50),
            divergence_p99: rank(99),
            divergence_max: rank(100),
            same_top_share: self.same_top_count as f64 / self.surprise.len() as f64,
        })
    }
}

/// A model's figures against the baseline's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quality {
    /// Predictions.
    pub row_count: usize,
    /// Of the text: `exp` of the mean surprise.
    pub perplexity: f64,
    /// Its standard error: of the choice of text, so it is much the same for every form of a model.
    pub perplexity_error: f64,
    /// `ln` of perplexity over the baseline's. Taken row by row, so its error is far smaller than the perplexity's.
    pub excess: Mean,
    /// KL(baseline || model), nats a token.
    pub divergence: Mean,
    /// Half of the rows are no farther.
    pub divergence_p50: f64,
    /// 99 of 100 are no farther.
    pub divergence_p99: f64,
    /// None is farther.
    pub divergence_max: f64,
    /// Share of the rows with the baseline's most likely token.
    pub same_top_share: f64,
}

/// A mean and its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Its standard error, as if the rows were independent; 0 for a single row.
    pub error: f64,
}

impl Mean {
    fn of(values: &[f64]) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let error = if values.len() > 1 { (squares / (count - 1.0) / count).sqrt() } else { 0.0 };
        Some(Self { mean, error })
    }
}

/// `ln sum exp` of a row, as its largest logit and the rest.
#[derive(Debug, Clone, Copy)]
struct LogSum {
    max: f64,
    rest: f64,
}

impl LogSum {
    fn of(row: &[f32]) -> Self {
        let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        Self { max, rest: row.iter().map(|logit| (f64::from(*logit) - max).exp()).sum::<f64>().ln() }
    }

    fn log_probability(self, logit: f32) -> f64 {
        f64::from(logit) - self.max - self.rest
    }
}

/// `sum p (ln p - ln q)`. A sum of many small terms of both signs can end a rounding below 0, where the truth cannot be.
fn divergence(p: &[f32], p_sum: LogSum, q: &[f32], q_sum: LogSum) -> f64 {
    let term = |(p, q): (&f32, &f32)| {
        let (p, q) = (p_sum.log_probability(*p), q_sum.log_probability(*q));
        // What the baseline rules out costs nothing, whatever the model says: 0 * ln 0 is 0.
        if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }
    };
    let sum: f64 = std::iter::zip(p, q).map(term).sum();
    // Not `max`: that would hide a row that is not a number.
    if sum < 0.0 { 0.0 } else { sum }
}

fn top(row: &[f32]) -> Option<usize> {
    (0..row.len()).reduce(|best, index| if row[index] > row[best] { index } else { best })
}

#[cfg(test)]
mod tests;
