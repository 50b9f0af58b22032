//! The one binary.

mod zoo;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "ashlar", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The block zoo
    Zoo(zoo::ZooArgs),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    rustls::crypto::ring::default_provider().install_default().map_err(|_| anyhow::anyhow!("a TLS provider is installed already"))?;
    match Cli::parse().command {
        Command::Zoo(args) => zoo::run(args).await,
    }
}
