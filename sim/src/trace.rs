//! Recorded traffic as load: Azure's LLM inference traces (CSV), Mooncake's (JSON lines, with blocks of prompts that come again) and
//! ServeGen's (rates and lengths of each client of a service). Texts are parsed here; who calls has read them.

use std::collections::BTreeMap;

use crate::Micros;
use crate::dice::Dice;
use crate::load::{Arrival, Load, Part};

/// When the load begins.
const FROM: Micros = 2_000_000;
/// Longer prompts and answers are cut, so that a run takes seconds.
const PROMPT_TOKENS_MAX: u32 = 8_192;
const ANSWER_TOKENS_MAX: u32 = 512;
/// Tokens of one of Mooncake's blocks.
const BLOCK_TOKENS: u32 = 512;
/// A window of ServeGen's rates.
const WINDOW_S: f64 = 600.0;

/// The text is no trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceError {
    /// The line at fault, from 1; 0: none.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

impl std::fmt::Display for TraceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            0 => f.write_str(&self.message),
            line => write!(f, "line {line}: {}", self.message),
        }
    }
}

impl std::error::Error for TraceError {}

fn wrong<T>(line: usize, message: &str) -> Result<T, TraceError> {
    Err(TraceError { line, message: message.to_owned() })
}

/// The file with the lengths for a file of rates, if the name is one of those.
pub fn lengths_beside(name: &str) -> Option<String> {
    name.contains("_rates.csv").then(|| name.replace("_rates.csv", "_lengths.csv"))
}

/// Makes a load of a trace: the first `requests` of it. What it is follows from its name and first line; `lengths` goes with rates.
///
/// # Errors
/// When it is none of the three.
pub fn parse(name: &str, text: &str, lengths: Option<&str>, requests: usize) -> Result<Load, TraceError> {
    let load = match lengths {
        Some(lengths) => serve_gen(text, lengths, requests)?,
        None if text.starts_with('{') => mooncake(text, requests)?,
        None if text.starts_with("TIMESTAMP,") => azure(text, requests)?,
        None => return wrong(0, &format!("{name} is no trace of Azure's, Mooncake's or ServeGen's")),
    };
    if load.arrivals.is_empty() { wrong(0, &format!("{name} has no requests")) } else { Ok(load) }
}

/// One request, with what traces do not say: its model by popularity (the first ones are asked most), its seed.
fn arrival(number: usize, at: Micros, tenant: usize, prompt: Vec<Part>, answer: u32) -> Arrival {
    let mut dice = Dice::new(number as u64).fork("trace");
    let model = dice.heavy(1, 64) - 1;
    Arrival {
        at: Some(FROM + at),
        tenant,
        model,
        prompt,
        generated_tokens_max: answer.clamp(1, ANSWER_TOKENS_MAX),
        stop_tokens: Vec::new(),
        seed: dice.next(),
        priority: 0,
        hang_up: None,
        next: None,
    }
}

fn own(number: usize, tokens: u32) -> Vec<Part> {
    vec![Part { seed: number as u64 | 1 << 41, tokens: tokens.clamp(1, PROMPT_TOKENS_MAX) }]
}

/// `TIMESTAMP,ContextTokens,GeneratedTokens`, the time as `2023-11-16 18:15:46.6805900`.
fn azure(text: &str, requests: usize) -> Result<Load, TraceError> {
    let mut load = Load { arrivals: Vec::new(), weights: vec![1; 8] };
    let mut first = None;
    for (index, line) in text.lines().enumerate().skip(1).take(requests) {
        let mut fields = line.split(',');
        let (Some(time), Some(prompt), Some(answer)) = (fields.next(), fields.next(), fields.next()) else {
            return wrong(index + 1, "wants a time and two counts");
        };
        let (Some(at), Ok(prompt), Ok(answer)) = (time_us(time), prompt.trim().parse(), answer.trim().parse()) else {
            return wrong(index + 1, "has no time or count where one is due");
        };
        let at = at.saturating_sub(*first.get_or_insert(at));
        let number = load.arrivals.len();
        load.arrivals.push(arrival(number, at, number % 8, own(number, prompt), answer));
    }
    Ok(load)
}

/// Microseconds since the start of the month.
fn time_us(text: &str) -> Option<Micros> {
    let (day, time) = text.trim().split_once(' ')?;
    let day: u64 = day.rsplit('-').next()?.parse().ok()?;
    let mut parts = time.split(':');
    let (hours, minutes): (u64, u64) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let seconds: f64 = parts.next()?.parse().ok()?;
    Some(((day * 24 + hours) * 60 + minutes) * 60_000_000 + (seconds * 1e6) as u64)
}

/// Objects with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`: equal ids are equal runs of 512 tokens.
fn mooncake(text: &str, requests: usize) -> Result<Load, TraceError> {
    let mut load = Load { arrivals: Vec::new(), weights: vec![1; 4] };
    for (index, line) in text.lines().enumerate().take(requests) {
        let Ok(value) = serde_json::from_str::<serde_json::Value>(line) else { return wrong(index + 1, "is no JSON") };
        let number = |name: &str| value.get(name).and_then(serde_json::Value::as_u64);
        let (Some(at), Some(length), Some(answer)) = (number("timestamp"), number("input_length"), number("output_length")) else {
            return wrong(index + 1, "lacks timestamp, input_length or output_length");
        };
        let mut left = (length.min(u64::from(PROMPT_TOKENS_MAX)) as u32).max(1);
        let ids = value.get("hash_ids").and_then(serde_json::Value::as_array).cloned().unwrap_or_default();
        let mut prompt = Vec::new();
        for id in ids.iter().filter_map(serde_json::Value::as_u64) {
            let tokens = left.min(BLOCK_TOKENS);
            left -= tokens;
            if tokens > 0 {
                prompt.push(Part { seed: id | 1 << 42, tokens });
            }
        }
        if left > 0 {
            prompt.push(Part { seed: index as u64 | 1 << 41, tokens: left });
        }
        // Who shares a first block is one tenant's.
        let tenant = prompt.first().map_or(0, |part| part.seed % 4) as usize;
        load.arrivals.push(arrival(index, at * 1000, tenant, prompt, answer.min(1 << 20) as u32));
    }
    Ok(load)
}

/// Rates (`client,t_s,rate_rps,cv,..`) and lengths (`client,t_s,kind,mean,..`): the window with the most requests, each client a tenant that
/// sends at its rate, at random; clients without lengths have those of all others' means.
fn serve_gen(rates: &str, lengths: &str, requests: usize) -> Result<Load, TraceError> {
    let mut windows: BTreeMap<u64, BTreeMap<u64, f64>> = BTreeMap::new();
    for (index, line) in rates.lines().enumerate().skip(1) {
        let fields: Vec<f64> = line.split(',').take(3).map_while(|field| field.parse().ok()).collect();
        let [client, at, rate] = fields[..] else { return wrong(index + 1, "wants client, time and rate") };
        windows.entry(at as u64).or_default().insert(client as u64, rate);
    }
    let mut means: BTreeMap<(u64, &str), f64> = BTreeMap::new();
    let (mut sums, mut counts) = ([0.0, 0.0], [0.0, 0.0]);
    for (index, line) in lengths.lines().enumerate().skip(1) {
        let fields: Vec<&str> = line.split(',').collect();
        let (Some(Ok(client)), Some(kind), Some(Ok(mean))) =
            (fields.first().map(|text| text.parse::<f64>()), fields.get(2).copied(), fields.get(3).map(|text| text.parse::<f64>()))
        else {
            return wrong(index + 1, "wants client, time, kind and mean");
        };
        let place = usize::from(kind == "output");
        (sums[place], counts[place]) = (sums[place] + mean, counts[place] + 1.0);
        means.entry((client as u64, if place == 0 { "input" } else { "output" })).or_insert(mean);
    }
    let busiest = windows.values().max_by(|a, b| a.values().sum::<f64>().total_cmp(&b.values().sum::<f64>()));
    let Some(busiest) = busiest.filter(|_| counts[0] > 0.0 && counts[1] > 0.0) else { return wrong(0, "no rates or no lengths") };
    let mut load = Load { arrivals: Vec::new(), weights: vec![1; busiest.len()] };
    let mut arrivals = Vec::new();
    for (tenant, (client, rate)) in busiest.iter().enumerate() {
        let mut dice = Dice::new(*client).fork("client");
        let mean = |kind, place: usize| means.get(&(*client, kind)).copied().unwrap_or(sums[place] / counts[place]);
        let (input, output) = (mean("input", 0), mean("output", 1));
        let mut at = 0;
        loop {
            at += dice.wait((1e6 / rate.max(1e-6)) as Micros);
            if at as f64 > WINDOW_S * 1e6 {
                break;
            }
            // Pareto with that mean: a sixth of it at least.
            let (prompt, answer) = (dice.heavy((input / 6.0) as u64 + 1, 1 << 20), dice.heavy((output / 6.0) as u64 + 1, 1 << 20));
            arrivals.push((at, tenant, prompt as u32, answer as u32));
        }
    }
    arrivals.sort_unstable();
    for (number, (at, tenant, prompt, answer)) in arrivals.into_iter().take(requests).enumerate() {
        load.arrivals.push(arrival(number, at, tenant, own(number, prompt), answer));
    }
    Ok(load)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_known_by_its_looks() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n";
        let load = parse("conv.csv", azure, None, 9).unwrap();
        assert_eq!(load.arrivals.iter().map(|a| a.at.unwrap() - FROM).collect::<Vec<_>>(), [0, 4_314_579]);
        assert_eq!((load.arrivals[1].prompt[0].tokens, load.arrivals[1].generated_tokens_max), (396, 109));

        let mooncake = "{\"timestamp\": 27, \"input_length\": 600, \"output_length\": 52, \"hash_ids\": [46, 47]}\n";
        let load = parse("trace.jsonl", mooncake, None, 9).unwrap();
        assert_eq!(load.arrivals[0].prompt.iter().map(|part| part.tokens).collect::<Vec<_>>(), [512, 88]);

        let (rates, lengths) = ("client,t_s,rate_rps,cv\n0,0,1.5,1\n7,0,0.5,1\n", "client,t_s,kind,mean\n0,0,input,100\n0,0,output,20\n");
        let load = parse("m_rates.csv", rates, Some(lengths), 50).unwrap();
        assert_eq!((load.arrivals.len(), load.weights.len()), (50, 2));
        assert!(load.arrivals.windows(2).all(|pair| pair[0].at <= pair[1].at));

        assert!(parse("notes.txt", "hello", None, 9).is_err());
        let error = parse("conv.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", None, 9).unwrap_err();
        assert_eq!(error.line, 2);
    }
}
