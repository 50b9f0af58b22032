//! What a client may choose about sampling, in the form in which values that mean "off" are all alike.

use ashlar_wire::v1;

/// Parameters of one sequence's sampler. [`SamplerParams::default`] is greedy with everything off.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerParams {
    /// Softmax temperature; below 1e-5 the largest logit is taken.
    pub temperature: f32,
    /// Probability mass kept; 1 is off.
    pub top_p: f32,
    /// Candidates kept; 0 is off.
    pub top_k: u32,
    /// Candidates less likely than this share of the likeliest are dropped; 0 is off.
    pub min_p: f32,
    /// Subtracted from logits of tokens that were generated; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted for each time that a token was generated; 0 is off.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens of prompt and generated; 1 is off.
    pub repetition_penalty: f32,
    /// Added to logits; tokens outside the vocabulary are ignored.
    pub logit_bias: Vec<(u32, f32)>,
    /// Drawn by the router where the client sent none.
    pub seed: u64,
    /// Which of a request's choices this is.
    pub choice_index: u32,
    /// Whether to report log probabilities.
    pub logprobs: bool,
    /// How many of the most likely tokens to report with theirs.
    pub top_logprobs: u32,
}

impl SamplerParams {
    /// With the seed and choice index of an admission.
    #[must_use]
    pub fn seeded(self, seed: u64, choice_index: u32) -> Self {
        Self { seed, choice_index, ..self }
    }

    pub(super) fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    pub(super) fn has_penalty(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

impl Default for SamplerParams {
    fn default() -> Self {
        Self::from(&v1::Sampling::default())
    }
}

impl From<&v1::Sampling> for SamplerParams {
    /// Seed and choice index are 0. Values that no router sends (NaN, and what protobuf gives for a field that was left out) are off.
    fn from(sampling: &v1::Sampling) -> Self {
        let finite_or = |value: f32, off: f32| if value.is_finite() { value } else { off };
        let positive_or = |value: f32, off: f32| if value.is_finite() && value > 0.0 { value } else { off };
        Self {
            temperature: positive_or(sampling.temperature, 0.0),
            top_p: positive_or(sampling.top_p, 1.0).min(1.0),
            top_k: sampling.top_k,
            min_p: positive_or(sampling.min_p, 0.0).min(1.0),
            presence_penalty: finite_or(sampling.presence_penalty, 0.0),
            frequency_penalty: finite_or(sampling.frequency_penalty, 0.0),
            repetition_penalty: positive_or(sampling.repetition_penalty, 1.0),
            logit_bias: sampling.logit_bias.iter().filter(|bias| !bias.bias.is_nan()).map(|bias| (bias.token, bias.bias)).collect(),
            seed: 0,
            choice_index: 0,
            logprobs: sampling.logprobs,
            top_logprobs: sampling.top_logprobs,
        }
    }
}

/// vLLM's `_SAMPLING_EPS`: dividing by less would overflow.
pub(super) const GREEDY_BELOW: f32 = 1e-5;
