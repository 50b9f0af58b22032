//! The parameters that chat and completions share: read, checked against their ranges, and completed with the chain's defaults.

use std::collections::BTreeMap;
use std::sync::Arc;

use ashlar_wire::code::Code;
use ashlar_wire::v1;
use ashlar_zoo::manifest::Chain;
use serde_json::value::RawValue;

use crate::io::backend::ApiError;
use crate::io::rest::config::RestLimits;
use crate::io::rest::fields::{Fields, parse, wrong};
use crate::text::stop::Stops;

/// Names that `Generation::take` reads.
pub(crate) const KNOWN: &[&str] = &[
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "n",
    "ignore_eos",
    "user",
    "stream",
    "stream_options",
];

/// How to generate.
#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) choices_count: u32,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// The client's seed, or one drawn here.
    pub(crate) seed: u64,
    pub(crate) stops: Arc<Stops>,
    /// Empty with `ignore_eos`.
    pub(crate) stop_tokens: Vec<u32>,
    /// As the client asked; absent: the route's default.
    pub(crate) generated_tokens_max: Option<u32>,
    pub(crate) sampling: v1::Sampling,
}

impl Generation {
    /// Takes all shared parameters. Log probabilities are the routes' own.
    pub(crate) fn take(fields: &mut Fields<'_>, limits: &RestLimits, chain: &Chain) -> Result<Self, ApiError> {
        let stream = fields.take_flag("stream")?.unwrap_or(false);
        let include_usage = take_stream_options(fields, stream)?;
        fields.take::<&RawValue>("user", "a string")?.map(|raw| parse::<String>(raw, "user", "a string")).transpose()?;
        let choices_count = fields.take_integer("n", 1..=i64::from(limits.choices_max))?.unwrap_or(1) as u32;
        let generated_tokens_max = fields.take_integer("max_tokens", 1..=i64::from(u32::MAX))?.map(|n| n as u32);
        let seed = fields.take_integer("seed", i64::MIN..=i64::MAX)?;
        let ignore_eos = fields.take_flag("ignore_eos")?.unwrap_or(false);
        Ok(Self {
            choices_count,
            stream,
            include_usage,
            seed: seed.map_or_else(draw_seed, |seed| seed as u64),
            stops: Arc::new(Stops::new(&take_stops(fields, limits)?)),
            stop_tokens: if ignore_eos { Vec::new() } else { chain.tokens.eos.clone() },
            generated_tokens_max,
            sampling: take_sampling(fields, limits, chain)?,
        })
    }

    /// How many tokens may be generated after a prompt; `default` where the client did not say (`None`: as many as fit).
    pub(crate) fn generated_tokens_max(
        &self,
        prompt_tokens: usize,
        chain: &Chain,
        default: Option<u32>,
        param: &str,
    ) -> Result<u32, ApiError> {
        let context = chain.context_tokens;
        let wanted = self.generated_tokens_max.or(default);
        let room = u64::from(context).saturating_sub(prompt_tokens as u64);
        let granted = match wanted {
            Some(wanted) if u64::from(wanted) <= room => wanted,
            None if room > 0 => room as u32,
            // A default gives way; what the client asked for does not.
            Some(_) if self.generated_tokens_max.is_none() && room > 0 => room as u32,
            _ => {
                let asked = wanted.unwrap_or(1);
                let message = format!(
                    "this model's context is {context} tokens, but {} were asked for ({prompt_tokens} in the {param}, {asked} to generate)",
                    prompt_tokens as u64 + u64::from(asked),
                );
                return Err(ApiError::of_param(Code::ContextLengthExceeded, param, message));
            }
        };
        Ok(granted)
    }
}

fn take_stream_options(fields: &mut Fields<'_>, stream: bool) -> Result<bool, ApiError> {
    let Some(raw) = fields.take_raw("stream_options") else { return Ok(false) };
    let mut options = Fields::of_value(raw, "stream_options.".to_owned(), &["include_usage"], &[("include_obfuscation", &["false"])])?;
    let include_usage = options.take_flag("include_usage")?.unwrap_or(false);
    options.finish();
    if !stream {
        return Err(ApiError::of_param(Code::InvalidValue, "stream_options", "`stream_options` is allowed only with `stream: true`"));
    }
    Ok(include_usage)
}

fn take_stops(fields: &mut Fields<'_>, limits: &RestLimits) -> Result<Vec<String>, ApiError> {
    let expected = format!("a string, or at most {} strings, of 1 to {} bytes each", limits.stops_max, limits.stop_bytes_max);
    let Some(raw) = fields.take_raw("stop") else { return Ok(Vec::new()) };
    let stops = if raw.get().starts_with('"') {
        vec![parse::<String>(raw, "stop", &expected)?]
    } else {
        parse::<Vec<String>>(raw, "stop", &expected)?
    };
    let fits = |stop: &String| !stop.is_empty() && stop.len() <= limits.stop_bytes_max as usize;
    if stops.len() > limits.stops_max as usize || !stops.iter().all(fits) {
        return Err(wrong("stop", &expected));
    }
    Ok(stops)
}

fn take_sampling(fields: &mut Fields<'_>, limits: &RestLimits, chain: &Chain) -> Result<v1::Sampling, ApiError> {
    let defaults = &chain.defaults;
    let temperature = fields.take_number("temperature", 0.0..=2.0)?;
    let top_p = fields.take_number("top_p", 0.0..=1.0)?;
    let top_k = fields.take_integer("top_k", -1..=i64::from(i32::MAX))?;
    let repetition_penalty = fields.take_number("repetition_penalty", 0.01..=10.0)?;
    Ok(v1::Sampling {
        temperature: temperature.or(defaults.temperature).unwrap_or(1.0),
        // A mass of 0 would keep no token; the smallest mass keeps the most likely one.
        top_p: top_p.or(defaults.top_p).unwrap_or(1.0).max(f32::MIN_POSITIVE),
        top_k: top_k.map(|k| k.max(0) as u32).or(defaults.top_k).unwrap_or(0),
        min_p: fields.take_number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        presence_penalty: fields.take_number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.take_number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        repetition_penalty: repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        logit_bias: take_logit_bias(fields, limits, chain.vocab)?,
        logprobs: false,
        top_logprobs: 0,
    })
}

fn take_logit_bias(fields: &mut Fields<'_>, limits: &RestLimits, vocab: u32) -> Result<Vec<v1::LogitBias>, ApiError> {
    let expected = format!("an object of at most {} numbers from -100 to 100", limits.logit_bias_max);
    let Some(given) = fields.take::<BTreeMap<String, f64>>("logit_bias", &expected)? else { return Ok(Vec::new()) };
    if given.len() > limits.logit_bias_max as usize || !given.values().all(|bias| (-100.0..=100.0).contains(bias)) {
        return Err(wrong("logit_bias", &expected));
    }
    let mut biases = Vec::with_capacity(given.len());
    for (token, bias) in given {
        // One spelling for each id, or two biases could be for one.
        let id = token.parse::<u32>().ok().filter(|id| *id < vocab && id.to_string() == token);
        let id = id.ok_or_else(|| wrong("logit_bias", &format!("keyed by token ids from 0 to {}", vocab - 1)))?;
        biases.push(v1::LogitBias { token: id, bias: bias as f32 });
    }
    biases.sort_by_key(|bias| bias.token);
    Ok(biases)
}

/// 53 random bits, so that every client's JSON can send the seed back.
fn draw_seed() -> u64 {
    random_bits() >> 11
}

/// 64 random bits of the operating system.
pub(crate) fn random_bits() -> u64 {
    getrandom::u64().expect("the operating system has random bits")
}
