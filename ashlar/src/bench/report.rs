//! Outcomes summed up: a table for people, JSON for programs. A failed request has an infinite latency of each kind and no
//! tokens, so that failing fast never looks fast.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::bench::drive::Outcome;
use crate::bench::schedule::HASH_CHARS;
use crate::bench::stats::{Ms, Quantiles};

/// Kinds of failure told apart; the rest is counted together.
const FAILURE_KINDS_MAX: usize = 16;

/// What a request must meet to be good; absent limits are met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Limits {
    /// Intended send to first text.
    pub(crate) ttft_ms: Option<f64>,
    /// Each gap.
    pub(crate) itl_ms: Option<f64>,
    /// Mean time of a token after the first.
    pub(crate) tpot_ms: Option<f64>,
}

/// One run, whole.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Of this program.
    pub(crate) version: &'static str,
    /// Of the server's source, if told.
    pub(crate) commit: Option<String>,
    /// As told: versions of peers, hashes of weights.
    pub(crate) notes: BTreeMap<String, String>,
    /// Where the client ran.
    pub(crate) machine: String,
    /// The endpoint; with several, the first model's.
    pub(crate) url: String,
    /// Models with an endpoint of their own.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) targets: BTreeMap<String, String>,
    /// All arguments that shape the load.
    pub(crate) load: Map<String, Value>,
    /// Of all draws.
    pub(crate) seed: u64,
    /// Of the schedule that the seed gave.
    pub(crate) schedule_hash: String,
    /// Of the prompts' source.
    pub(crate) prompts_hash: String,
    /// Of all texts that came, in the order of the schedule.
    pub(crate) output_hash: String,
    /// First send to last answer.
    pub(crate) elapsed_s: f64,
    /// What goodput is held to.
    pub(crate) limits: Limits,
    /// All requests.
    pub(crate) all: Summary,
    /// Each model's, where there are several.
    pub(crate) models: BTreeMap<String, Summary>,
    /// What the server spent, if its process was named.
    pub(crate) server: Option<ServerUse>,
    /// What this program spent: on a small machine it takes that from the server.
    pub(crate) client_cpu_seconds: Option<f64>,
}

/// What the server's processes spent during the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct ServerUse {
    /// User and system time.
    pub(crate) cpu_seconds: f64,
    /// For each million tokens, in and out together; none without tokens.
    pub(crate) cpu_seconds_per_million_tokens: Option<f64>,
    /// For each thousand requests that were answered.
    pub(crate) cpu_seconds_per_thousand_requests: Option<f64>,
    /// Of all cores' time.
    pub(crate) utilisation: f64,
    /// Cores of the machine.
    pub(crate) core_count: usize,
    /// Since the processes began.
    pub(crate) peak_rss_bytes: u64,
}

/// What came of some requests.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// Sent or due.
    pub(crate) request_count: usize,
    /// Without a whole answer.
    pub(crate) failed_count: usize,
    /// Why, and how often.
    pub(crate) failures: BTreeMap<String, usize>,
    /// Answers shorter than asked for.
    pub(crate) short_count: usize,
    /// Answered, a second.
    pub(crate) requests_per_second: f64,
    /// Answered within all limits, a second.
    pub(crate) goodput_requests_per_second: f64,
    /// Intended send to first text.
    pub(crate) ttft_ms: Option<Quantiles>,
    /// Every gap between texts.
    pub(crate) itl_ms: Option<Quantiles>,
    /// Mean time of a token after the first, for each request.
    pub(crate) tpot_ms: Option<Quantiles>,
    /// Intended send to the end.
    pub(crate) e2e_ms: Option<Quantiles>,
    /// How late the client itself was.
    pub(crate) lag_ms: Option<Quantiles>,
    /// As the server counted; none if it did not for every answer.
    pub(crate) input_tokens: Option<u64>,
    /// Of them, those that the server says it had cached; servers that do not tell count as 0.
    pub(crate) cached_tokens: u64,
    /// The server's count where it has one, else chunks with text.
    pub(crate) output_tokens: u64,
    /// Answers whose tokens are counted as chunks.
    pub(crate) counted_by_chunks: usize,
    /// Of the prompts of whole answers.
    pub(crate) input_tokens_per_second: Option<f64>,
    /// Of whole answers.
    pub(crate) output_tokens_per_second: f64,
}

impl Summary {
    /// Sums up the outcomes of a run of `elapsed_s` seconds.
    pub(crate) fn of<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>, limits: Limits, elapsed_s: f64) -> Self {
        let (mut ttft, mut itl, mut tpot, mut e2e, mut lag) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut failures = BTreeMap::new();
        let (mut answered, mut failed, mut good, mut short, mut by_chunks) = (0usize, 0usize, 0usize, 0usize, 0usize);
        let (mut input_tokens, mut output_tokens, mut cached_tokens) = (Some(0), 0, 0);
        for outcome in outcomes {
            lag.push(outcome.lag_ms);
            let answer = match &outcome.result {
                Ok(answer) => answer,
                Err(failure) => {
                    failed += 1;
                    for values in [&mut ttft, &mut itl, &mut tpot, &mut e2e] {
                        values.push(f64::INFINITY);
                    }
                    let reason = failure.to_string();
                    let known = failures.len() < FAILURE_KINDS_MAX || failures.contains_key(&reason);
                    *failures.entry(if known { reason } else { "other".into() }).or_insert(0) += 1;
                    continue;
                }
            };
            answered += 1;
            ttft.push(answer.ttft_ms);
            e2e.push(answer.e2e_ms);
            tpot.extend(answer.tpot_ms());
            itl.extend(answer.gaps_ms.iter().copied().map(f64::from));
            input_tokens = input_tokens.zip(answer.usage).map(|(tokens, usage)| tokens + usage.prompt_tokens);
            output_tokens += answer.output_tokens();
            cached_tokens += answer.usage.map_or(0, |usage| usage.cached_tokens);
            by_chunks += usize::from(answer.usage.is_none());
            short += usize::from(answer.output_tokens() < u64::from(outcome.planned.output_tokens));
            let meets = |limit: Option<f64>, value: f64| limit.is_none_or(|limit| value <= limit);
            good += usize::from(
                meets(limits.ttft_ms, answer.ttft_ms)
                    && meets(limits.tpot_ms, answer.tpot_ms().unwrap_or(0.0))
                    && answer.gaps_ms.iter().all(|gap| meets(limits.itl_ms, f64::from(*gap))),
            );
        }
        let input_tokens = input_tokens.filter(|_| answered > 0);
        Self {
            request_count: answered + failed,
            failed_count: failed,
            failures,
            short_count: short,
            requests_per_second: answered as f64 / elapsed_s,
            goodput_requests_per_second: good as f64 / elapsed_s,
            ttft_ms: Quantiles::of(ttft),
            itl_ms: Quantiles::of(itl),
            tpot_ms: Quantiles::of(tpot),
            e2e_ms: Quantiles::of(e2e),
            lag_ms: Quantiles::of(lag),
            input_tokens,
            cached_tokens,
            output_tokens,
            counted_by_chunks: by_chunks,
            input_tokens_per_second: input_tokens.map(|tokens| tokens as f64 / elapsed_s),
            output_tokens_per_second: output_tokens as f64 / elapsed_s,
        }
    }

    /// Requests with a whole answer.
    pub(crate) fn answered_count(&self) -> usize {
        self.request_count - self.failed_count
    }
}

impl ServerUse {
    /// Of a run that `summary` sums up.
    pub(crate) fn of(cpu_seconds: f64, peak_rss_bytes: u64, core_count: usize, summary: &Summary, elapsed_s: f64) -> Self {
        let per = |count: u64, unit: f64| (count > 0).then(|| cpu_seconds / count as f64 * unit);
        Self {
            cpu_seconds,
            // A count without the prompts would flatter nobody and compare with nothing.
            cpu_seconds_per_million_tokens: summary.input_tokens.and_then(|input| per(input + summary.output_tokens, 1e6)),
            cpu_seconds_per_thousand_requests: per(summary.answered_count() as u64, 1e3),
            utilisation: cpu_seconds / elapsed_s / core_count as f64,
            core_count,
            peak_rss_bytes,
        }
    }
}

/// Names the texts of all answers, in the order of the schedule; a failure is part of it.
pub(crate) fn output_hash(outcomes: &[Outcome]) -> String {
    let mut hasher = blake3::Hasher::new();
    for outcome in outcomes {
        hasher.update(&outcome.planned.index.to_le_bytes());
        match &outcome.result {
            Ok(answer) => hasher.update(answer.text_hash.as_bytes()),
            Err(_) => hasher.update(b"failed"),
        };
    }
    hasher.finalize().to_hex()[..HASH_CHARS].to_owned()
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {:<22}{:>10}{:>10}{:>10}{:>10}", "ms", "p50", "p95", "p99", "max")?;
        for (name, quantiles) in [
            ("first token", &self.ttft_ms),
            ("gap between tokens", &self.itl_ms),
            ("time per later token", &self.tpot_ms),
            ("whole request", &self.e2e_ms),
            ("client's lateness", &self.lag_ms),
        ] {
            if let Some(Quantiles { p50, p95, p99, max, .. }) = quantiles {
                writeln!(f, "  {name:<22}{p50:>10}{p95:>10}{p99:>10}{max:>10}")?;
            }
        }
        let (answered, failed) = (self.answered_count(), self.failed_count);
        write!(f, "  requests   {answered} answered, {failed} failed; {:.2}/s", self.requests_per_second)?;
        writeln!(f, ", within limits {:.2}/s", self.goodput_requests_per_second)?;
        for (reason, count) in &self.failures {
            writeln!(f, "    {count} x {reason}")?;
        }
        match (self.input_tokens, self.input_tokens_per_second) {
            (Some(tokens), Some(rate)) => {
                let percent = self.cached_tokens as f64 / tokens.max(1) as f64 * 100.0;
                write!(f, "  tokens     in {tokens}, {rate:.1}/s ({} cached, {percent:.0} %)", self.cached_tokens)?;
            }
            _ if self.cached_tokens > 0 => write!(f, "  tokens     in unknown ({} known to be cached)", self.cached_tokens)?,
            _ => write!(f, "  tokens     in unknown")?,
        }
        write!(f, "; out {}, {:.1}/s", self.output_tokens, self.output_tokens_per_second)?;
        if let Some(Quantiles { p50: Ms(p50), .. }) = self.tpot_ms.filter(|tpot| tpot.p50.0.is_finite() && tpot.p50.0 > 0.0) {
            write!(f, "; each stream {:.1}/s", 1e3 / p50)?;
        }
        match self.counted_by_chunks {
            0 => writeln!(f, " (the server's count)")?,
            count if count == answered => writeln!(f, " (chunks counted: the server does not tell)")?,
            count => writeln!(f, " (chunks counted for {count} answers: the server did not tell)")?,
        }
        if self.short_count > 0 {
            writeln!(f, "  short      {} answers ended before their length", self.short_count)?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} | {}", self.url, self.machine)?;
        writeln!(f, "{}", Value::Object(self.load.clone()))?;
        writeln!(
            f,
            "seed {}, schedule {}, prompts {}, texts {}, {:.1} s",
            self.seed, self.schedule_hash, self.prompts_hash, self.output_hash, self.elapsed_s
        )?;
        write!(f, "{}", self.all)?;
        if let Some(server) = self.server {
            write!(f, "  server     {:.2} CPU-s, {:.0}% of {} cores", server.cpu_seconds, server.utilisation * 100.0, server.core_count)?;
            if let Some(seconds) = server.cpu_seconds_per_million_tokens {
                write!(f, "; {seconds:.1} CPU-s per million tokens")?;
            }
            if let Some(seconds) = server.cpu_seconds_per_thousand_requests {
                write!(f, ", {seconds:.1} per 1,000 requests")?;
            }
            writeln!(f, "; peak memory {} MiB", server.peak_rss_bytes >> 20)?;
        }
        if let Some(seconds) = self.client_cpu_seconds {
            writeln!(f, "  client     {seconds:.2} CPU-s")?;
        }
        for (model, summary) in &self.models {
            write!(f, "{model}\n{summary}")?;
        }
        Ok(())
    }
}
