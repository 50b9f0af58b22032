//! One token from one row of logits: a pure function of (logits, parameters, seed, choice index, position) and of the tokens
//! so far (docs/numerics.md, rule 7). It keeps counts of tokens for the penalties and nothing else, so that a sampler
//! built again from (prompt, generated) continues as the first would have.
//!
//! The order is that of vLLM v1 (`vllm/v1/sample/sampler.py`): logit bias; repetition penalty (CTRL's rule, Keskar et al.
//! 2019, as Hugging Face has it: over prompt and generated tokens a positive logit is divided by it, a negative one
//! multiplied); frequency and presence penalty (OpenAI: over generated tokens only); then the largest logit if the temperature
//! is 0, else temperature, min-p, top-k, top-p and one draw (`truncate`). Reported log probabilities are those of the logits
//! as the model gave them, before all of this, as OpenAI's and vLLM's (`raw_logprobs`) are.

mod params;
mod raw;
mod truncate;

use std::collections::BTreeMap;

pub use params::SamplerParams;

use super::philox;
use raw::RawLogprobs;

/// What one call of [`Sampler::sample`] chose.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its log probability under the raw logits, which may be negative infinity; 0 unless `logprobs` was asked for.
    pub logprob: f32,
    /// The `top_logprobs` most likely tokens under the raw logits, most likely first, ties by ascending id.
    pub top: Vec<(u32, f32)>,
}

/// Why no token can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model is broken, or overflowed on this input.
    #[error("choose a token: none of {vocab} logits is a number above negative infinity, so its weights or those of an adapter overflow")]
    NoCandidate {
        /// Logits there were.
        vocab: usize,
    },
}

/// Chooses the tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplerParams,
    /// How often each token of prompt and generated was generated: 0 for those of the prompt alone. Empty where no penalty needs it.
    counts: BTreeMap<u32, u32>,
}

impl Sampler {
    /// A sampler for a sequence that has this prompt and has generated these tokens so far.
    pub fn new(params: SamplerParams, prompt: &[u32], generated: &[u32]) -> Self {
        let mut sampler = Self { params, counts: BTreeMap::new() };
        if sampler.params.repetition_penalty != 1.0 {
            sampler.counts.extend(prompt.iter().map(|token| (*token, 0)));
        }
        generated.iter().for_each(|token| sampler.accept(*token));
        sampler
    }

    /// Chooses the token for absolute position `position` from its logits `[vocab]`, which are overwritten. NaN counts as
    /// negative infinity. It does not change the sampler: [`Sampler::accept`] takes the token up.
    ///
    /// # Errors
    /// When no logit can be chosen.
    pub fn sample(&self, logits: &mut [f32], position: u32) -> Result<Sampled, SampleError> {
        let raw = self.params.logprobs.then(|| RawLogprobs::of(logits));
        self.adjust(logits);
        let likeliest = largest(logits).ok_or(SampleError::NoCandidate { vocab: logits.len() })?;
        let token = match self.params.is_greedy() {
            true => likeliest,
            false => {
                let uniform = philox::uniform(self.params.seed, self.params.choice_index, position);
                truncate::draw(logits, logits[likeliest], &self.params, uniform)
            }
        };
        Ok(Sampled {
            token: token as u32,
            logprob: raw.as_ref().map_or(0.0, |raw| raw.logprob(token)),
            top: raw.map_or_else(Vec::new, |raw| raw.most_likely(self.params.top_logprobs as usize)),
        })
    }

    /// Whether [`Sampler::sample`] would choose the largest of the logits as they are and report nothing of them, so that
    /// [`Sampler::sample_largest`] does as well.
    pub fn takes_largest(&self) -> bool {
        let params = &self.params;
        params.is_greedy() && !params.logprobs && params.logit_bias.is_empty() && !params.has_penalty()
    }

    /// As [`Sampler::sample`] where [`Sampler::takes_largest`], of `vocab` logits whose largest is known: its lowest index, `None` if
    /// none is above negative infinity.
    ///
    /// # Errors
    /// When there is none.
    pub fn sample_largest(&self, largest: Option<u32>, vocab: usize) -> Result<Sampled, SampleError> {
        debug_assert!(self.takes_largest());
        let token = largest.ok_or(SampleError::NoCandidate { vocab })?;
        Ok(Sampled { token, logprob: 0.0, top: Vec::new() })
    }

    /// Counts a generated token.
    pub fn accept(&mut self, token: u32) {
        if self.params.has_penalty() {
            *self.counts.entry(token).or_insert(0) += 1;
        }
    }

    /// Bias and penalties, in place.
    fn adjust(&self, logits: &mut [f32]) {
        let params = &self.params;
        for (token, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        for (token, count) in &self.counts {
            let Some(logit) = logits.get_mut(*token as usize) else {
                continue;
            };
            if params.repetition_penalty != 1.0 {
                *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
            }
            if *count > 0 {
                *logit -= params.frequency_penalty * *count as f32;
                *logit -= params.presence_penalty;
            }
        }
    }
}

/// The lowest index of the largest logit; `None` if none is above negative infinity.
fn largest(logits: &[f32]) -> Option<usize> {
    let mut best = None;
    let mut value = f32::NEG_INFINITY;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > value {
            (best, value) = (Some(index), *logit);
        }
    }
    best
}

#[cfg(test)]
mod tests;
