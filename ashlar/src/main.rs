//! The one binary.
mod bench;
mod chat;
mod client;

use clap::Parser;

/// The one binary.
#[derive(Parser)]
enum Cli {
    /// Talk with a model in the terminal.
    Chat(chat::ChatArgs),
    /// Measure a server or the kernels.
    Bench(bench::BenchArgs),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Cli::parse() {
        Cli::Chat(args) => chat::run(args).await,
        Cli::Bench(args) => bench::run(args).await,
    }
}
