//! Log probabilities of the logits as the model gave them: log-softmax, summed in f64 by ascending token id.

/// One row of logits, before bias and penalties, and its normaliser. NaN counts as negative infinity.
#[derive(Debug)]
pub(super) struct RawLogprobs {
    logits: Vec<f32>,
    max: f32,
    /// ln of the sum of `exp(x - max)`.
    log_sum: f64,
}

impl RawLogprobs {
    /// Of a row `[vocab]`.
    pub(super) fn of(logits: &[f32]) -> Self {
        let logits: Vec<f32> = logits.iter().map(|x| if x.is_nan() { f32::NEG_INFINITY } else { *x }).collect();
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // The maximum weighs 1 even where it is infinite.
        let sum: f64 = logits.iter().map(|x| if *x == max { 1.0 } else { f64::from(libm::expf(*x - max)) }).sum();
        Self { logits, max, log_sum: libm::log(sum) }
    }

    /// Log probability of a token.
    pub(super) fn logprob(&self, token: usize) -> f32 {
        let logit = self.logits[token];
        let shifted = if logit == self.max { 0.0 } else { f64::from(logit) - f64::from(self.max) };
        (shifted - self.log_sum) as f32
    }

    /// The `count` most likely tokens with their log probabilities, most likely first, ties by ascending token.
    pub(super) fn most_likely(&self, count: usize) -> Vec<(u32, f32)> {
        let count = count.min(self.logits.len());
        let mut top: Vec<usize> = Vec::with_capacity(count + 1);
        for (token, logit) in self.logits.iter().enumerate() {
            if top.len() == count && top.last().is_none_or(|least| self.logits[*least] >= *logit) {
                continue;
            }
            let at = top.partition_point(|held| self.logits[*held] >= *logit);
            top.insert(at, token);
            top.truncate(count);
        }
        top.into_iter().map(|token| (token as u32, self.logprob(token))).collect()
    }
}
