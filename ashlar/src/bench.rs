//! `ashlar bench`: load against any OpenAI-compatible endpoint, and the kernels against the ceilings of the machine. Start at
//! `bench/load.rs`: a schedule is drawn from a seed, driven, and summed up in a report.

pub(crate) mod args;
mod drive;
mod kernels;
mod load;
mod process;
mod prompts;
mod quality;
mod report;
mod request;
mod schedule;
mod stalls;
mod stats;
mod step;
mod storage;
#[cfg(test)]
mod tests;

use anyhow::Context;

/// Measures a server, a model or the kernels; what its help says stands in `main.rs`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// A server under load: latencies, tokens a second, what it costs. Any OpenAI-compatible one, so that servers can be compared
    Load(Box<load::LoadArgs>),
    /// What long prompts do to streams that decode: the longest gap, tokens a second with and without them. Any
    /// OpenAI-compatible server
    Stalls(Box<stalls::StallsArgs>),
    /// This machine: read bandwidth and peak of arithmetic, and the share of them that linear layers get. Needs no model
    Kernels(kernels::KernelsArgs),
    /// A model of the zoo on this machine: tokens a second of whole steps, without a server, and which ops take the time
    Step(step::StepArgs),
    /// Stored forms of a model (int8, int4 and so on): what each costs in perplexity, and how far it is from a baseline
    Quality(quality::QualityArgs),
    /// The tensors of a zoo: what they take in the forms that they are stored in, and how fast they are read back on one core and on all
    Storage(storage::StorageArgs),
}

/// Runs the bench that was asked for.
pub(crate) async fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        Command::Load(args) => Box::pin(load::run(*args)).await.context("measure the server"),
        Command::Stalls(args) => Box::pin(stalls::run(*args)).await.context("measure stalls"),
        Command::Kernels(args) => kernels::run(args).await.context("measure the kernels"),
        Command::Step(args) => Box::pin(step::run(args)).await.context("measure steps"),
        Command::Quality(args) => Box::pin(quality::run(args)).await.context("measure the quality"),
        Command::Storage(args) => Box::pin(storage::run(args)).await.context("measure the storage"),
    }
}
