//! `ashlar bench load`: arguments to a schedule, warm-up, the run, the report. What is measured is decided in `request.rs`, how it is
//! summed up in `report.rs`.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::bench::args::report_file;
use crate::bench::drive::{self, IN_FLIGHT_MAX, Job};
use crate::bench::process::{self, ProcessUse};
use crate::bench::prompts::Prompts;
use crate::bench::report::{self, Limits, Report, ServerUse, Summary};
use crate::bench::request::{BodyOptions, Endpoint};
use crate::bench::schedule::{
    self, Arrivals, DURATION_S_MAX, MODELS_MAX, OUTPUT_TOKENS_TOTAL_MAX, Planned, RATE_MAX, REQUESTS_MAX, ScheduleSpec, Target, TokenRange,
    WeightedModel,
};
use crate::client::Client;
use crate::output;

/// Requests when neither a count nor a duration is given.
const REQUESTS_DEFAULT: usize = 100;
/// Warm-up requests of one model.
const WARMUP_MAX: usize = 1000;
/// Index of the first warm-up request: its prompts are not those of the run.
const WARMUP_INDEX: u32 = 1 << 31;
/// How often progress is shown on a terminal.
const PROGRESS_MS: u64 = 500;

/// Drives an OpenAI-compatible endpoint.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct LoadArgs {
    /// The endpoint, with or without /v1; plain http
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub(crate) url: String,
    /// Key sent as a bearer token
    #[arg(long, env = "ASHLAR_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Route
    #[arg(long, value_enum, default_value = "completions")]
    pub(crate) endpoint: Endpoint,
    /// Model and its weight; may be repeated. Left out, the server's only model
    #[arg(long = "model", value_name = "NAME[:WEIGHT]")]
    pub(crate) models: Vec<WeightedModel>,
    /// Where a model is asked for, if not at --url; may be repeated
    #[arg(long = "target", value_name = "MODEL=URL")]
    pub(crate) targets: Vec<Target>,
    /// Ask for models in turn, not at random; in a closed loop client k of n takes requests k, k + n and so on
    #[arg(long)]
    pub(crate) in_turn: bool,
    /// Open loop: requests a second, at the times of a Poisson process
    #[arg(long, conflicts_with = "concurrency")]
    pub(crate) rate: Option<f64>,
    /// Closed loop: so many clients, each with one request under way
    #[arg(long, default_value_t = 1)]
    pub(crate) concurrency: usize,
    /// Requests at most [default: 100, or as many as start within --duration]
    #[arg(long)]
    pub(crate) requests: Option<usize>,
    /// Seconds in which requests start
    #[arg(long, value_name = "SECONDS")]
    pub(crate) duration: Option<f64>,
    /// Length of generated prompts, in words: 128 or 64..512
    #[arg(long, default_value = "128")]
    pub(crate) prompt_tokens: TokenRange,
    /// Length of answers at most: 64 or 16..256
    #[arg(long, default_value = "64")]
    pub(crate) output_tokens: TokenRange,
    /// Let answers go on after the model's end token, so that all have their length; not every server knows it
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Seed of schedule, prompts and sampling: another one for each run on one server, else its cache of prompts is measured
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// JSON lines with `prompt` or `messages`, used in turn
    #[arg(long, value_name = "FILE")]
    pub(crate) prompts: Option<PathBuf>,
    /// Requests of each model before the run, one after another, not counted
    #[arg(long, default_value_t = 1)]
    pub(crate) warmup: usize,
    /// Seconds from intended send after which a request has failed
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS")]
    pub(crate) timeout: f64,
    /// Limit of a good request: first token
    #[arg(long)]
    pub(crate) ttft_ms: Option<f64>,
    /// Limit of a good request: each gap between tokens
    #[arg(long)]
    pub(crate) itl_ms: Option<f64>,
    /// Limit of a good request: mean time of the tokens after the first
    #[arg(long)]
    pub(crate) tpot_ms: Option<f64>,
    /// Do not ask for usage in the stream; tokens are then counted as chunks
    #[arg(long)]
    pub(crate) no_usage: bool,
    /// Further fields of every body, as a JSON object
    #[arg(long, value_name = "JSON")]
    pub(crate) extra: Option<String>,
    /// Process of the server, for its CPU time and memory; may be repeated
    #[arg(long = "server-pid", value_name = "PID")]
    pub(crate) server_pids: Vec<u32>,
    /// Fail unless the texts have this hash, as an earlier report names it
    #[arg(long, value_name = "HASH")]
    pub(crate) expect_outputs: Option<String>,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE", value_parser = report_file())]
    pub(crate) json: Option<PathBuf>,
    /// Commit of the server, for the report
    #[arg(long)]
    pub(crate) commit: Option<String>,
    /// For the report: a peer's version, a hash of weights; may be repeated
    #[arg(long = "note", value_name = "KEY=VALUE")]
    pub(crate) notes: Vec<String>,
}

/// Runs the load, prints the report, and fails if nothing was answered or the texts are not those expected.
pub(crate) async fn run(args: LoadArgs) -> anyhow::Result<()> {
    let report = measure(&args).await?;
    // First the file: whoever pipes the table to `head` wants that whole.
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    output::text(&report)?;
    if report.all.answered_count() == 0 {
        bail!("no request was answered");
    }
    if let Some(expected) = args.expect_outputs.filter(|expected| *expected != report.output_hash) {
        bail!("the texts have the hash {}, expected {expected}", report.output_hash);
    }
    Ok(())
}

/// The whole measurement, without printing.
pub(crate) async fn measure(args: &LoadArgs) -> anyhow::Result<Report> {
    let notes = notes(&args.notes)?;
    let (job, spec) = job(args).await?;
    // Before the warm-up, so that a wrong process is told at once.
    ProcessUse::read(&args.server_pids)?;
    warm_up(&job, args.warmup).await?;

    let own_pid = [std::process::id()];
    let server_before = ProcessUse::read(&args.server_pids)?;
    let client_before = ProcessUse::read(&own_pid).ok();
    let start = Instant::now();
    let outcomes = {
        let showing = show_progress(&job);
        tokio::pin!(showing);
        tokio::select! {
            outcomes = drive::drive(&job) => outcomes,
            () = &mut showing => unreachable!("progress is shown for ever"),
        }
    };
    let elapsed_s = start.elapsed().as_secs_f64();
    let client_cpu_seconds =
        client_before.zip(ProcessUse::read(&own_pid).ok()).map(|(before, after)| after.cpu_seconds - before.cpu_seconds);

    let limits = Limits { ttft_ms: args.ttft_ms, itl_ms: args.itl_ms, tpot_ms: args.tpot_ms };
    let all = Summary::of(&outcomes, limits, elapsed_s);
    let server = match args.server_pids.as_slice() {
        [] => None,
        pids => {
            let after = ProcessUse::read(pids).context("the server went away during the run")?;
            let spent = after.cpu_seconds - server_before.cpu_seconds;
            Some(ServerUse::of(spent, after.peak_rss_bytes, process::core_count(), &all, elapsed_s))
        }
    };
    let mut models = BTreeMap::new();
    if job.models.len() > 1 {
        for (index, model) in job.models.iter().enumerate() {
            let of_model = outcomes.iter().filter(|outcome| outcome.planned.model == index);
            models.insert(model.name.clone(), Summary::of(of_model, limits, elapsed_s));
        }
    }
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        commit: args.commit.clone(),
        notes,
        machine: process::machine(),
        url: job.clients[0].base().to_owned(),
        targets: args.targets.iter().map(|target| (target.model.clone(), target.url.clone())).collect(),
        load: described(args, &spec),
        seed: args.seed,
        schedule_hash: schedule::hash(&job.models, &job.requests),
        prompts_hash: job.prompts.hash(),
        output_hash: report::output_hash(&outcomes),
        elapsed_s,
        limits,
        all,
        models,
        server,
        client_cpu_seconds,
    })
}

/// Checks the arguments and draws the schedule; asks the server only for its models, and only where none is named.
pub(crate) async fn job(args: &LoadArgs) -> anyhow::Result<(Arc<Job>, ScheduleSpec)> {
    let duration = args.duration.map(|seconds| bounded_seconds("--duration", seconds)).transpose()?;
    let timeout = bounded_seconds("--timeout", args.timeout)?;
    let arrivals = match args.rate {
        Some(rate) => {
            ensure!(rate > 0.0 && rate <= RATE_MAX, "--rate must be above 0 and at most {RATE_MAX}");
            Arrivals::Poisson { rate }
        }
        None => {
            ensure!((1..=IN_FLIGHT_MAX).contains(&args.concurrency), "--concurrency must be from 1 to {IN_FLIGHT_MAX}");
            Arrivals::Closed { concurrency: args.concurrency }
        }
    };
    ensure!(args.requests.is_none_or(|count| (1..=REQUESTS_MAX).contains(&count)), "--requests must be from 1 to {REQUESTS_MAX}");
    ensure!(args.warmup <= WARMUP_MAX, "--warmup must be at most {WARMUP_MAX}");
    ensure!((0.0..=2.0).contains(&args.temperature), "--temperature must be from 0 to 2");
    ensure!(args.models.len() <= MODELS_MAX, "at most {MODELS_MAX} models can be named");
    let requests_max = args.requests.unwrap_or(if duration.is_some() { REQUESTS_MAX } else { REQUESTS_DEFAULT });
    let extra = extra_fields(args.extra.as_deref())?;
    let prompts = match &args.prompts {
        None => Prompts::Generated { seed: args.seed },
        Some(path) => Prompts::read(path, args.endpoint)?,
    };

    let client = Client::new(&args.url, args.api_key.as_deref())?;
    let models = match args.models.as_slice() {
        [] => vec![WeightedModel { name: client.only_model("name one with --model").await?, weight: 1.0 }],
        models => models.to_vec(),
    };
    ensure!(!args.in_turn || models.iter().all(|model| model.weight == 1.0), "models come in turn: --in-turn takes no weights");
    let clients = clients(args, &client, &models)?;
    let spec = ScheduleSpec {
        seed: args.seed,
        arrivals,
        models: models.clone(),
        in_turn: args.in_turn,
        prompt_tokens: args.prompt_tokens,
        output_tokens: args.output_tokens,
        requests_max,
        duration,
    };
    let requests = schedule::draw(&spec);
    ensure!(!requests.is_empty(), "no request falls into --duration at this rate");
    // A closed loop that ends by time draws more than it sends.
    if args.requests.is_some() || args.rate.is_some() {
        let tokens: u64 = requests.iter().map(|request| u64::from(request.output_tokens)).sum();
        ensure!(tokens <= OUTPUT_TOKENS_TOTAL_MAX, "the load asks for {tokens} tokens, more than {OUTPUT_TOKENS_TOTAL_MAX}");
    }
    let options = BodyOptions {
        endpoint: args.endpoint,
        temperature: args.temperature,
        seed: args.seed,
        ignore_eos: args.ignore_eos,
        usage: !args.no_usage,
        extra,
    };
    let job = Job {
        clients,
        options,
        models,
        prompts,
        requests,
        arrivals,
        in_turn: args.in_turn,
        duration,
        timeout,
        ended_count: AtomicUsize::new(0),
    };
    Ok((Arc::new(job), spec))
}

/// The endpoint of each model: its own, or the common one.
fn clients(args: &LoadArgs, common: &Client, models: &[WeightedModel]) -> anyhow::Result<Vec<Client>> {
    let mut clients = vec![common.clone(); models.len()];
    for Target { model, url } in &args.targets {
        let place = models.iter().position(|known| known.name == *model);
        clients[place.with_context(|| format!("--target {model}: no --model has that name"))?] = Client::new(url, args.api_key.as_deref())?;
    }
    Ok(clients)
}

/// A first answer of each model, before anything counts; a model that does not answer ends the bench here, with its reason.
async fn warm_up(job: &Job, count: usize) -> anyhow::Result<()> {
    let mut index = WARMUP_INDEX;
    let like = job.requests[0];
    for (model, WeightedModel { name, .. }) in job.models.iter().enumerate() {
        for _ in 0..count {
            let planned = Planned { index, at: Duration::ZERO, model, ..like };
            job.send(planned, Instant::now()).await.result.with_context(|| format!("warm up {name}"))?;
            index += 1;
        }
    }
    job.ended_count.store(0, Ordering::Relaxed);
    Ok(())
}

/// Shows on a terminal how far the run is; elsewhere it only waits.
async fn show_progress(job: &Job) {
    if !std::io::stderr().is_terminal() {
        return std::future::pending().await;
    }
    loop {
        tokio::time::sleep(Duration::from_millis(PROGRESS_MS)).await;
        let ended = job.ended_count.load(Ordering::Relaxed);
        // A terminal that is gone is no reason to stop measuring.
        let _ = write!(std::io::stderr(), "\r{ended} of at most {} requests ended \r", job.requests.len());
    }
}

fn bounded_seconds(name: &str, seconds: f64) -> anyhow::Result<Duration> {
    ensure!(seconds > 0.0 && seconds <= DURATION_S_MAX, "{name} must be above 0 and at most {DURATION_S_MAX} seconds");
    Ok(Duration::from_secs_f64(seconds))
}

/// Further fields of a body, as `--extra` has them.
pub(crate) fn extra_fields(extra: Option<&str>) -> anyhow::Result<Map<String, Value>> {
    extra.map_or(Ok(Map::new()), |text| serde_json::from_str(text).context("--extra must be a JSON object"))
}

/// What `--note` says, for a report.
pub(crate) fn notes(notes: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let pair = |note: &String| note.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    notes.iter().map(|note| pair(note).with_context(|| format!("--note takes KEY=VALUE, got `{note}`"))).collect()
}

/// The arguments that shape the load, for the report.
fn described(args: &LoadArgs, spec: &ScheduleSpec) -> Map<String, Value> {
    let range = |range: TokenRange| if range.min == range.max { json!(range.min) } else { json!([range.min, range.max]) };
    let arrivals = match spec.arrivals {
        Arrivals::Poisson { rate } => json!({"poisson_rate": rate}),
        Arrivals::Closed { concurrency } => json!({"closed_concurrency": concurrency}),
    };
    let models: Vec<Value> = spec.models.iter().map(|model| json!([model.name, model.weight])).collect();
    let all = json!({
        "endpoint": format!("{:?}", args.endpoint).to_lowercase(),
        "arrivals": arrivals,
        "models": models,
        "in_turn": spec.in_turn,
        "requests_max": spec.requests_max,
        "duration_s": args.duration,
        "prompt_tokens": if args.prompts.is_none() { range(args.prompt_tokens) } else { json!("file") },
        "output_tokens": range(args.output_tokens),
        "ignore_eos": args.ignore_eos,
        "temperature": args.temperature,
        "warmup": args.warmup,
        "timeout_s": args.timeout,
        "extra": args.extra,
    });
    match all {
        Value::Object(map) => map,
        _ => unreachable!("it is written as an object above"),
    }
}
