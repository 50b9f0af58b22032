//! `ashlar bench stalls`: what long prompts do to streams that decode. Arguments, phases and report are here, what is sent in
//! `stalls/drive.rs`, what it comes to in `stalls/account.rs`.

mod account;
mod drive;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::bench::args::{report_file, time, whole};
use crate::bench::load::{extra_fields, notes};
use crate::bench::process::{self, ProcessUse};
use crate::bench::prompts::Prompts;
use crate::bench::request::{BodyOptions, Endpoint};
use crate::bench::schedule::{HASH_CHARS, TOKENS_MAX};
use crate::bench::stats::Quantiles;
use crate::client::Client;
use crate::output;
use account::Stalls;
use drive::{Driven, Load, Target};

/// Steady streams.
const STREAMS_MAX: usize = 1024;
/// Long prompts of one run.
const LONG_MAX: u32 = 10_000;
/// Long prompts that are measured alone.
const ALONE_MAX: usize = 1000;
/// Share of the prompts' tokens from which on the report warns that they were cached: a first token that all prompts have is less.
const CACHED_PERCENT_TOLD: f64 = 1.0;
/// Failures that the report tells by name.
const FAILURES_TOLD_MAX: usize = 16;

/// Measures what long prompts do to steady streams.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StallsArgs {
    /// The endpoint, with or without /v1; plain http
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Key sent as a bearer token
    #[arg(long, env = "ASHLAR_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// The model. Left out, the server's only one
    #[arg(long)]
    model: Option<String>,
    /// Streams that decode all the time
    #[arg(long, default_value = "8", allow_negative_numbers = true, value_parser = whole(1, STREAMS_MAX))]
    streams: usize,
    /// Length of a stream's prompt, in words
    #[arg(long, value_name = "TOKENS", default_value = "128", allow_negative_numbers = true, value_parser = whole(1, TOKENS_MAX as usize))]
    stream_prompt_tokens: usize,
    /// Length of a stream's answer; then it begins another. Prompt and answer must fit the context
    #[arg(long, value_name = "TOKENS", default_value = "1024", allow_negative_numbers = true, value_parser = whole(2, TOKENS_MAX as usize))]
    stream_output_tokens: usize,
    /// Length of a long prompt, in words
    #[arg(long, value_name = "TOKENS", default_value = "1500", allow_negative_numbers = true, value_parser = whole(1, TOKENS_MAX as usize))]
    long_prompt_tokens: usize,
    /// Length of the answer to a long prompt
    #[arg(long, value_name = "TOKENS", default_value = "8", allow_negative_numbers = true, value_parser = whole(1, TOKENS_MAX as usize))]
    long_output_tokens: usize,
    /// Time from one long prompt to the next
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = time)]
    every: Duration,
    /// Time in which long prompts come: a multiple of --every
    #[arg(long, value_name = "TIME", default_value = "40s", value_parser = time)]
    duration: Duration,
    /// Time that the streams are measured without long prompts
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    undisturbed: Duration,
    /// Long prompts that are measured without streams
    #[arg(long, value_name = "COUNT", default_value = "5", allow_negative_numbers = true, value_parser = whole(1, ALONE_MAX))]
    alone: usize,
    /// Time after which a long prompt has failed
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = time)]
    timeout: Duration,
    /// Seed of the prompts: another one for each run on one server, else its cache of prompts is measured
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End answers at the model's end token; for servers that do not know `ignore_eos`
    #[arg(long)]
    no_ignore_eos: bool,
    /// Do not ask for usage in the stream; tokens are then counted as chunks
    #[arg(long)]
    no_usage: bool,
    /// Further fields of every body, as a JSON object
    #[arg(long, value_name = "JSON")]
    extra: Option<String>,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE", value_parser = report_file())]
    json: Option<PathBuf>,
    /// Commit of the server, for the report
    #[arg(long)]
    commit: Option<String>,
    /// For the report: a peer's version, a hash of weights; may be repeated
    #[arg(long = "note", value_name = "KEY=VALUE")]
    notes: Vec<String>,
}

/// One run, whole.
#[derive(Debug, Serialize)]
struct Report {
    /// Of this program.
    version: &'static str,
    /// Of the server's source, if told.
    commit: Option<String>,
    /// As told.
    notes: BTreeMap<String, String>,
    /// Where the client ran.
    machine: String,
    /// The endpoint.
    url: String,
    /// All arguments that shape the load.
    load: Map<String, Value>,
    /// Of the prompts.
    seed: u64,
    /// Of the prompts' source.
    prompts_hash: String,
    /// Of the texts that long prompts got: the same for every greedy run of a server that keeps its word.
    output_hash: String,
    /// What came of it.
    stalls: Stalls,
    /// Requests without a whole answer.
    failed_count: usize,
    /// Why the first of them failed.
    failures: Vec<String>,
    /// What this program spent: on a small machine it takes that from the server.
    client_cpu_seconds: Option<f64>,
}

/// Runs all phases, prints the report, and fails where requests failed: a stream that breaks off waits for nothing.
pub(crate) async fn run(args: StallsArgs) -> anyhow::Result<()> {
    let report = measure(&args).await?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    output::text(&report)?;
    ensure!(report.failed_count == 0, "{} requests got no whole answer: these figures mean little", report.failed_count);
    Ok(())
}

async fn measure(args: &StallsArgs) -> anyhow::Result<Report> {
    let notes = notes(&args.notes)?;
    let load = load(args)?;
    let options = BodyOptions {
        endpoint: Endpoint::Completions,
        temperature: 0.0,
        seed: args.seed,
        ignore_eos: !args.no_ignore_eos,
        usage: !args.no_usage,
        extra: extra_fields(args.extra.as_deref())?,
    };
    let client = Client::new(&args.url, args.api_key.as_deref())?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => client.only_model("name one with --model").await?,
    };
    let own_pid = [std::process::id()];
    let client_before = ProcessUse::read(&own_pid).ok();
    let described = described(args, &load, &model);
    let target = Arc::new(Target { client, options, model, prompts: Prompts::Generated { seed: args.seed } });
    let (url, prompts_hash) = (target.client.base().to_owned(), target.prompts.hash());
    let Driven { record, output_hash, failures } = Box::pin(drive::drive(target, &load, tell)).await?;
    let client_after = ProcessUse::read(&own_pid).ok();
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        commit: args.commit.clone(),
        notes,
        machine: process::machine(),
        url,
        load: described,
        seed: args.seed,
        prompts_hash,
        output_hash: output_hash.to_hex()[..HASH_CHARS].to_owned(),
        stalls: Stalls::of(&record),
        failed_count: failures.len(),
        failures: failures.into_iter().take(FAILURES_TOLD_MAX).collect(),
        client_cpu_seconds: client_before.zip(client_after).map(|(before, after)| after.cpu_seconds - before.cpu_seconds),
    })
}

fn load(args: &StallsArgs) -> anyhow::Result<Load> {
    let (every, duration) = (args.every.as_micros(), args.duration.as_micros());
    ensure!(duration.is_multiple_of(every), "--duration {:?} must be a multiple of --every {:?}", args.duration, args.every);
    let long_count = u32::try_from(duration / every).ok().filter(|count| *count <= LONG_MAX);
    let tokens = |tokens: usize| u32::try_from(tokens).expect("bounded when it was read");
    Ok(Load {
        streams: args.streams,
        stream_prompt_tokens: tokens(args.stream_prompt_tokens),
        stream_output_tokens: tokens(args.stream_output_tokens),
        long_prompt_tokens: tokens(args.long_prompt_tokens),
        long_output_tokens: tokens(args.long_output_tokens),
        every: args.every,
        long_count: long_count.with_context(|| format!("send more than {LONG_MAX} long prompts: --duration over --every"))?,
        alone_count: tokens(args.alone),
        undisturbed: args.undisturbed,
        timeout: args.timeout,
    })
}

/// Says on a terminal what is being measured; elsewhere nothing.
fn tell(phase: &str) {
    if std::io::stderr().is_terminal() {
        // A terminal that is gone is no reason to stop measuring.
        let _ = writeln!(std::io::stderr(), "measuring: {phase}");
    }
}

/// The arguments that shape the load, for the report.
fn described(args: &StallsArgs, load: &Load, model: &str) -> Map<String, Value> {
    let all = json!({
        "model": model,
        "streams": load.streams,
        "stream_prompt_tokens": load.stream_prompt_tokens,
        "stream_output_tokens": load.stream_output_tokens,
        "long_prompt_tokens": load.long_prompt_tokens,
        "long_output_tokens": load.long_output_tokens,
        "every_s": load.every.as_secs_f64(),
        "long_count": load.long_count,
        "alone": load.alone_count,
        "undisturbed_s": load.undisturbed.as_secs_f64(),
        "timeout_s": load.timeout.as_secs_f64(),
        "ignore_eos": !args.no_ignore_eos,
        "extra": args.extra,
    });
    match all {
        Value::Object(map) => map,
        _ => unreachable!("it is written as an object above"),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} | {}", self.url, self.machine)?;
        writeln!(f, "{}", Value::Object(self.load.clone()))?;
        writeln!(f, "seed {}, prompts {}, texts of long prompts {}", self.seed, self.prompts_hash, self.output_hash)?;
        write!(f, "{}", self.stalls)?;
        for failure in &self.failures {
            writeln!(f, "  failed     {failure}")?;
        }
        if let Some(seconds) = self.client_cpu_seconds {
            writeln!(f, "  client     {seconds:.2} CPU-s")?;
        }
        Ok(())
    }
}

impl fmt::Display for Stalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {:<34}{:>8}{:>10}{:>10}{:>10}{:>10}", "ms", "count", "p50", "p95", "p99", "max")?;
        for (name, quantiles) in [
            ("gaps, streams alone", &self.gaps_undisturbed_ms),
            ("gaps with long prompts (no claim)", &self.gaps_ms),
            ("gaps that overlap a prefill", &self.gaps_at_prefill_ms),
            ("first token, long prompt alone", &self.alone_ttft_ms),
            ("first token, long prompt", &self.long_ttft_ms),
            ("first token, stream's next answer", &self.stream_ttft_ms),
        ] {
            if let Some(Quantiles { count, p50, p95, p99, max }) = quantiles {
                writeln!(f, "  {name:<34}{count:>8}{p50:>10}{p95:>10}{p99:>10}{max:>10}")?;
            }
        }
        writeln!(f, "  longest    {} ms without a token of a stream since the first long prompt", self.longest_gap_ms)?;
        write!(f, "  streams    {:.1} tokens/s alone, ", self.undisturbed_tokens_per_second)?;
        write!(f, "{:.1} with long prompts", self.disturbed_tokens_per_second)?;
        writeln!(f, "{}", self.rate_kept.map_or_else(String::new, |kept| format!(": {kept:.3} of it")))?;
        match self.rate_kept {
            Some(kept) => write!(f, "  share      kept {kept:.3} of the streams' rate; ")?,
            None => write!(f, "  share      the streams had no rate to keep; ")?,
        }
        write!(f, "beside prompts that alone take u = {:.3} of the time ", self.alone_share)?;
        let met = if self.floor_is_kept { "met" } else { "missed" };
        writeln!(f, "their share would be 1 - u = {:.3}: {met}", self.rate_floor)?;
        writeln!(f, "  in all     {:.1} tokens/s, of prompts and answers", self.total_tokens_per_second)?;
        let answered = self.long_count - self.long_failed_count;
        write!(f, "  prompts    {answered} of {} answered", self.long_count)?;
        match self.long_input_tokens {
            Some(tokens) => write!(f, ", {tokens:.0} tokens each")?,
            None => write!(f, ", tokens unknown")?,
        }
        match self.tokens_per_chunk {
            Some(tokens) => writeln!(f, "; {tokens:.3} tokens in a stream's chunk (the server's count)")?,
            None => writeln!(f, "; chunks counted: the server does not tell")?,
        }
        if self.input_tokens == 0 {
            return Ok(());
        }
        let percent = self.cached_tokens as f64 / self.input_tokens as f64 * 100.0;
        writeln!(f, "  cached     {} of {} tokens of all prompts ({percent:.0} %)", self.cached_tokens, self.input_tokens)?;
        if percent >= CACHED_PERCENT_TOLD {
            writeln!(f, "  warning    {percent:.0} % of the prompts' tokens were cached by the server: take another --seed")?;
        }
        Ok(())
    }
}
