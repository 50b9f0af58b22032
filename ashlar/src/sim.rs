//! `ashlar sim`: a whole cluster on a virtual clock, from one seed. One seed prints what happened in it; many print progress and their sum.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use ashlar_sim::load::Load;
use ashlar_sim::{CANARIES, Canary, Failure, Options, Report, simulation, trace};

use crate::output;
use crate::status::Found;

/// What to simulate.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ashlar sim                                 seed 0, and a table of what happened in it
  ashlar sim --seed 17 --events | less       every event of seed 17
  ashlar sim --seeds 10000                   seeds 0 to 9999, and their sum
  ashlar sim --trace AzureLLMInferenceTrace_conv.csv --requests 500
                                             recorded traffic instead of drawn
  ashlar sim --seeds 30 --canary leaks-pages a planted defect, to see that it is found")]
pub(crate) struct SimArgs {
    /// The seed, or the first of many
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds to run; the first that fails ends it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Recorded traffic as load: a CSV of Azure's, a JSONL of Mooncake's, or `<model>_rates.csv` of ServeGen's (beside its lengths); also `.gz`
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Requests of a trace, from its start
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    requests: u64,
    /// Prints every event (of one seed)
    #[arg(long, conflicts_with = "seeds")]
    events: bool,
    /// Plants a defect in the engines, which a checker must find
    #[arg(long, value_name = "NAME", value_parser = CANARIES.map(|(name, _)| name))]
    canary: Option<String>,
}

/// Runs the seeds that were asked for.
///
/// # Errors
/// When a checker found something, which is printed; or the trace cannot be read.
pub(crate) fn run(args: &SimArgs) -> anyhow::Result<()> {
    let last = args.seed.checked_add(args.seeds - 1).with_context(|| {
        format!("use --seed {} and --seeds {} together: the last seed would be over {}", args.seed, args.seeds, u64::MAX)
    })?;
    let load = match &args.trace {
        Some(path) => Some((path.display().to_string(), read(path, args.requests as usize).context("read the trace")?)),
        None => None,
    };
    let named = |name: &String| CANARIES.iter().find(|(known, _)| known == name).map(|(_, canary)| *canary);
    let canary = args.canary.as_ref().and_then(named).unwrap_or(Canary::Healthy);
    let options = |seed| Options { seed, trace: load.clone(), requests: args.requests, canary };
    // A failed assertion is printed below, as what a checker finds is.
    std::panic::set_hook(Box::new(|_| {}));
    if args.events {
        let mut written = Ok(());
        let outcome = simulation::run_logged(&options(args.seed), &mut |line| {
            if written.is_ok() {
                written = output::line(line);
            }
        });
        written?;
        return told(args.seed, outcome);
    }
    if args.seeds == 1 {
        return told(args.seed, ashlar_sim::run(&options(args.seed)));
    }
    many(args, last, options)
}

fn told(seed: u64, outcome: Result<Report, Box<Failure>>) -> anyhow::Result<()> {
    match outcome {
        Ok(report) => Ok(output::text(format_args!("seed {seed} passes\n{report}"))?),
        Err(failure) => {
            output::line(&failure)?;
            Err(Found(format!("pass seed {}: {}", failure.seed, failure.checker)).into())
        }
    }
}

fn many(args: &SimArgs, last: u64, options: impl Fn(u64) -> Options) -> anyhow::Result<()> {
    #[expect(clippy::disallowed_methods, reason = "seeds per second of the real clock")]
    let began = Instant::now();
    let bar = indicatif::ProgressBar::new(args.seeds);
    bar.set_style(indicatif::ProgressStyle::with_template("{wide_bar} {pos} of {len} seeds, {per_sec}, {eta} left")?);
    let mut sum = Report::default();
    for seed in args.seed..=last {
        match ashlar_sim::run(&options(seed)) {
            Ok(report) => sum.add(&report),
            Err(failure) => {
                bar.finish_and_clear();
                output::line(format_args!("{} seeds passed before it", seed - args.seed))?;
                return told(seed, Err(failure));
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let seconds = began.elapsed().as_secs_f64();
    let first = args.seed;
    let rate = args.seeds as f64 / seconds;
    Ok(output::text(format_args!("seeds {first} to {last} pass, {seconds:.1} s, {rate:.0} seeds/s; in all\n{sum}"))?)
}

/// Reads a trace; of ServeGen's also the lengths beside it.
fn read(path: &Path, requests: usize) -> anyhow::Result<Load> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let text = text_of(path)?;
    let lengths = match trace::lengths_beside(name) {
        Some(lengths) => Some(text_of(&path.with_file_name(lengths))?),
        None => None,
    };
    Ok(trace::parse(name, &text, lengths.as_deref(), requests)?)
}

/// The text of a file; `.gz` goes through `gzip`.
fn text_of(path: &Path) -> anyhow::Result<String> {
    if path.extension().is_none_or(|extension| extension != "gz") {
        return std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
    }
    let output = std::process::Command::new("gzip").arg("-dc").arg(path).output().context("run gzip")?;
    anyhow::ensure!(output.status.success(), "unpack {}: {}", path.display(), String::from_utf8_lossy(&output.stderr).trim());
    String::from_utf8(output.stdout).with_context(|| format!("read {}: it is no text", path.display()))
}
