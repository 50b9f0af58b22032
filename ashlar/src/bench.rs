//! `ashlar bench`: load against any OpenAI-compatible endpoint, and the kernels against the ceilings of the machine. Start at
//! `bench/load.rs`: a schedule is drawn from a seed, driven, and summed up in a report.

mod drive;
mod kernels;
mod load;
mod process;
mod prompts;
mod quality;
mod report;
mod request;
mod schedule;
mod stats;
mod step;
#[cfg(test)]
mod tests;

use anyhow::Context;

/// Measures a server or the kernels.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Drive an OpenAI-compatible endpoint and print latencies, tokens per second and the server's cost.
    Load(Box<load::LoadArgs>),
    /// Measure this machine's ceilings and the linear layers against them.
    Kernels(kernels::KernelsArgs),
    /// Measure whole steps of a model of the zoo, without engine and server.
    Step(step::StepArgs),
    /// Measure what the stored forms of a model cost: perplexity, and divergence from a baseline.
    Quality(quality::QualityArgs),
}

/// Runs the bench that was asked for.
pub(crate) async fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        Command::Load(args) => Box::pin(load::run(*args)).await.context("measure the server"),
        Command::Kernels(args) => kernels::run(args).await.context("measure the kernels"),
        Command::Step(args) => Box::pin(step::run(args)).await.context("measure steps"),
        Command::Quality(args) => Box::pin(quality::run(args)).await.context("measure the quality"),
    }
}
