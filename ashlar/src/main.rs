//! The one binary: parses the command line, reads the configuration, starts what was asked for. It holds no logic that a
//! library should.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]
#![allow(unreachable_pub, reason = "a binary: pub marks what other modules use")]
#![deny(clippy::print_stdout)] // it panics where nobody reads: see output.rs

mod bench;
mod chat;
mod check;
mod client;
mod config;
mod deploy;
mod device;
mod devices;
mod health;
mod logging;
mod output;
mod process;
mod server;
mod serving;
mod sim;
mod status;
mod tenant;
mod zoo;

use clap::{CommandFactory, Parser, Subcommand};

/// Serve many fine-tuned language models by storing, placing, batching and caching blocks of models.
///
/// Begin with `ashlar zoo add PATH --name TENANT/MODEL`, then `ashlar serve`, then `ashlar chat TENANT/MODEL`.
///
/// Status 0: done. 1: failed, and the last line of standard error says at what. 2: the command line or the configuration cannot be used. 3: done, and found what
/// must not be: damage (`zoo verify`), a fault (`check`), a seed that does not pass (`sim`). 141: nobody reads what is printed.
#[derive(Debug, Parser)]
#[command(name = "ashlar", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Router, executor and registry in one process: all a single machine needs
    Serve(config::ConfigArgs),
    /// A router alone: REST in, sequences out to executors found through the registry
    Router(config::ConfigArgs),
    /// An executor alone: holds the blocks that the plan gives it
    Executor(config::ConfigArgs),
    /// The block zoo: add and pull models, show what they share, quantise, compress, compare, verify, collect garbage
    Zoo(zoo::ZooArgs),
    /// Tenants and their API keys
    Tenant {
        #[command(flatten)]
        config: config::PlaceArgs,
        #[command(subcommand)]
        command: tenant::TenantCommand,
    },
    /// How models are to be served: their targets for time
    Deploy {
        #[command(flatten)]
        config: config::PlaceArgs,
        #[command(subcommand)]
        command: deploy::DeployCommand,
    },
    /// Ask running executors whether their books agree: each page of KV in one place, all counts right
    ///
    /// An executor's engine keeps books of every page (free, cached or held by sequences) and of every row that waits to be computed. This
    /// asks each running executor to compare all of them, between two batches: nothing is changed, and requests go on. It prints a line for
    /// each: id, address, `ok` or the first fault, and its pages as /metrics counts them.
    ///
    /// Executors are found as servers are configured: `--zoo DIR` or `--registry file:PATH` as `ashlar serve` was given, `--registry
    /// etcd://HOST:PORT` for a cluster. Or name them: `--executor HOST:PORT` is an executor's `executor.listen`; `ashlar serve` logs an
    /// address of its own, on this machine alone.
    ///
    /// Status 0: all are well. 1: one cannot be reached, or there is none. 3: one has a fault. A fault is a defect of Ashlar: report the line, and
    /// restart that executor; in a cluster its sequences go on elsewhere.
    Check(check::CheckArgs),
    /// Talk to a model in the terminal
    Chat(chat::ChatArgs),
    /// Measure a server, this machine or a model
    ///
    /// Begin with `ashlar bench load` beside a running server: it asks the server's only model a hundred times and prints how fast it is.
    /// To see what this machine could do at best, `ashlar bench kernels`; what a model of the zoo makes of that, `ashlar bench step`.
    Bench(bench::BenchArgs),
    /// Simulate a cluster from a seed, and look for what must not be
    ///
    /// The router's and the executors' real logic runs on a virtual clock, over modelled devices and links. A seed draws everything:
    /// executors and their limits, models that share blocks, tenants and their requests, and what breaks when. After every event named
    /// checkers look: is each token that of its sequence alone, is none lost or repeated, has a page leaked, was a budget exceeded, does
    /// a sequence starve? The same seed does the same every time.
    ///
    /// Status 0: all seeds pass. 3: a checker found something; which, when, what happened last and the command that does it again are printed.
    Sim(Box<sim::SimArgs>),
    /// Which devices there are, and why one is not used
    Devices,
    /// Print a script that completes this program's words in a shell
    ///
    /// For bash: `ashlar completions bash > ~/.local/share/bash-completion/completions/ashlar`
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    // One TLS provider for every client in the process.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(run(cli.command));
            // Work on threads of its own, such as a template that does not end, is not waited for.
            runtime.shutdown_timeout(std::time::Duration::from_secs(1));
            outcome
        }
        Err(error) => Err(anyhow::Error::new(error).context("start the runtime")),
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            if !output::reader_is_gone(&error) {
                eprintln!("error: failed to {error:#}");
            }
            std::process::ExitCode::from(status::of(&error))
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => server::run(server::Role::Serve, args).await,
        Command::Router(args) => server::run(server::Role::Router, args).await,
        Command::Executor(args) => server::run(server::Role::Executor, args).await,
        Command::Zoo(args) => zoo::run(args).await,
        Command::Tenant { config, command } => {
            let config = config.load()?;
            let registry = match command {
                // Reads no record and writes none.
                tenant::TenantCommand::Hash => server::open_registry(&config, server::Role::Serve).await?,
                tenant::TenantCommand::List => server::open_lasting_registry(&config, "read").await?,
                _ => server::open_lasting_registry(&config, "change").await?,
            };
            tenant::run(command, registry, &config.zoo.root).await
        }
        Command::Deploy { config, command } => {
            let config = config.load()?;
            let purpose = if matches!(command, deploy::DeployCommand::List) { "read" } else { "change" };
            let registry = server::open_lasting_registry(&config, purpose).await?;
            deploy::run(command, registry, &config.zoo.root).await
        }
        Command::Check(args) => check::run(args).await,
        Command::Chat(args) => chat::run(args).await,
        Command::Bench(args) => bench::run(args).await,
        Command::Sim(args) => sim::run(&args),
        Command::Devices => Ok(devices::print()?),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ashlar", &mut script);
            Ok(output::text(String::from_utf8_lossy(&script))?)
        }
    }
}
