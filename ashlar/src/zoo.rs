//! `ashlar zoo ...`: the block zoo from the command line. Parses, calls ashlar-zoo, prints; it decides nothing.

mod calibration;
mod compress;
mod equivalence;
mod measure;
mod profile;
mod progress;
mod quantize;
mod report;
mod stitch;
mod surrogate;
mod table;
mod unmerge;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use ashlar_zoo::export::export;
use ashlar_zoo::gc;
use ashlar_zoo::hub::{self, Hub, PullOptions, RepoId};
use ashlar_zoo::ingest::{self, AddOptions, AddReport, Recipe};
use ashlar_zoo::model_id::{ModelId, is_tenant};
use ashlar_zoo::repair;
use ashlar_zoo::store::{Domains, GRACE_DEFAULT, Place, Zoo};
use ashlar_zoo::verify;
use clap::{Args, Subcommand};

use crate::config::{ZooConfig, zoo_of_environment};
use crate::output::{self, OutputError};
use crate::status::Found;

/// Arguments of `ashlar zoo`.
#[derive(Debug, Args)]
pub(crate) struct ZooArgs {
    /// Directory of the zoo, or s3://BUCKET[/PREFIX] [env: ASHLAR_ZOO] [default: zoo-data]
    ///
    /// Credentials, region and endpoint of a bucket are read from the usual AWS_* variables.
    #[arg(long, global = true, value_name = "PLACE")]
    zoo: Option<Place>,
    #[command(subcommand)]
    command: ZooCommand,
}

/// What to do with the zoo.
#[derive(Debug, Subcommand)]
pub(crate) enum ZooCommand {
    /// Add a checkpoint, or a PEFT LoRA adapter over a model that is here
    ///
    /// A checkpoint is a Hugging Face directory with safetensors, or a GGUF file.
    /// Quantised directories (GPTQ, AWQ, compressed-tensors, FP8) stay what they are:
    /// docs/block-format.md has a table of what is taken.
    ///
    /// A directory with adapter_config.json and adapter_model.safetensors is an
    /// adapter. It shares all blocks of its base, which is named with --base, or else
    /// the one model whose name or source adapter_config.json asks for, or (with a
    /// note) the one that has at least the last part of it, `base` of `org/base`:
    ///
    ///     ashlar zoo add my-lora --name acme/my-lora --base acme/llama
    #[command(verbatim_doc_comment)]
    Add {
        /// Directory or .gguf file
        path: PathBuf,
        #[command(flatten)]
        naming: Naming,
    },
    /// Download a model from the Hugging Face hub (HF_ENDPOINT, HF_TOKEN) and add it
    Pull {
        /// Repository, as ORG/NAME
        repo: String,
        /// Branch, tag or commit
        #[arg(long, default_value = "main")]
        revision: String,
        /// Take this one GGUF file instead of the safetensors
        #[arg(long)]
        file: Option<String>,
        /// Where downloads are kept while they are incomplete, and afterwards with --keep
        #[arg(long, env = "ASHLAR_DOWNLOADS", default_value = "downloads")]
        downloads: PathBuf,
        /// Keep the downloaded files after adding
        #[arg(long)]
        keep: bool,
        #[command(flatten)]
        naming: Naming,
    },
    /// List the models
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what a model is made of
    Show {
        /// TENANT/MODEL
        model: ModelId,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show where two models differ
    Diff {
        /// TENANT/MODEL
        a: ModelId,
        /// TENANT/MODEL
        b: ModelId,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Write a model as a Hugging Face directory: tensors byte for byte as they were added
    ///
    /// Only what is stored as f32, f16 or bf16 goes back: no quantised checkpoints. A model that is an adapter over another one becomes a PEFT directory that names it.
    Export {
        /// TENANT/MODEL
        model: ModelId,
        /// Directory; not there yet, or empty
        directory: PathBuf,
    },
    /// Show the zoo: which models share which blocks, and what each costs alone and in company
    ///
    /// Draws a map with a line for each model and a sign for each block, and tables of costs; with --html, a page for a browser. It reads
    /// manifests and the sizes of files; only --compare reads weights. It shows all tenants' models: whoever can read the zoo is its operator.
    Report(report::ReportArgs),
    /// Find the base and the adapter of a model into which a LoRA was merged, so that it shares its base
    ///
    /// Proposes, and measures what it would change in the model's output; --apply stores it under another name.
    Unmerge(unmerge::UnmergeArgs),
    /// Measure which blocks of one model may stand for another's; list such records, or revoke one
    ///
    /// Puts each block of OTHER that differs from MODEL's into its place, measures how far the next-token distributions move, then exchanges them
    /// together, from the least divergence up. What is recorded changes nothing by itself: a record is used only for a model that was deployed
    /// with `ashlar deploy set --equivalent-kl KL`, and only as far as all exchanges together stay within KL. Without models, lists the records.
    Equivalence(equivalence::EquivalenceArgs),
    /// Make a fine-tune its base and a compressed difference, so that it shares its base and takes little beside it
    ///
    /// An approximation. Proposes, and measures how far the output is from the model's; --apply stores it under another name, with that
    /// measure, which `zoo show` shows. Norms, biases, embedding and head become the base's, unless --keep-blocks keeps the model's own.
    CompressDelta(compress::CompressArgs),
    /// Store a model's matrices in fewer bits, or measure what that would cost
    ///
    /// Without --calibrate each matrix is rounded by itself: models that share blocks share their quantised forms. With a calibration text
    /// it is GPTQ, which loses less, and belongs to this one model. Without --name nothing is stored.
    Quantize(quantize::QuantizeArgs),
    /// Join the first layers of one model to the last of another by a linear map, and say how well that does
    ///
    /// Layers 0..FROM of A, a map, layers TO.. of B with its head. The map is fitted by ridge regression on the hidden states that both models
    /// have at their cuts, so the two may be of different families and widths; they need the same tokenizer. Without --name it only measures.
    Stitch(stitch::StitchArgs),
    /// Make cheaper forms of a model's blocks, of fewer inner columns or heads, or measure what that would cost
    ///
    /// What matters least goes: by the energy of the outputs that a calibration text makes of it, or without one by the weights alone. With a
    /// text, what stays is fitted to make up for what goes. The other blocks stay shared with the model. Without --name nothing is stored.
    Surrogate(surrogate::SurrogateArgs),
    /// Measure what each block costs on this machine by rows, so that servers know it before they have served
    ///
    /// Keeps a record beside the block for each kind of device: processor, instruction set, threads. Blocks that several models share are measured
    /// once, and those with a record are not measured again. Executors read the records of the blocks that they load (docs/profile.md).
    Profile(profile::ProfileArgs),
    /// Declare tenants public: their models are seen, shared and built on by every tenant; lists them where none is given
    ///
    /// Others see their own models only: what `add` says is there, and what it takes for a relative or a base, is a tenant's own or a public
    /// one's. What is equal is stored once all the same.
    Public {
        /// Tenants
        tenants: Vec<String>,
        /// They are public no more
        #[arg(long, requires = "tenants")]
        remove: bool,
    },
    /// Read every object and follow every name
    ///
    /// Status 0: all is sound. 1: it could not be read. 3: something is damaged or missing; what, and which blocks and models that hits, is printed.
    Verify {
        /// Write what is damaged or missing anew from the zoo at this place
        #[arg(long, value_name = "PLACE")]
        repair: Option<Place>,
    },
    /// Drop a name; its blocks stay until gc
    Rm {
        /// TENANT/MODEL
        model: ModelId,
    },
    /// Delete what no name leads to
    Gc {
        /// Leave objects younger than so many seconds: an add may be writing them
        #[arg(long, default_value_t = GRACE_DEFAULT.as_secs())]
        grace: u64,
        /// Only say what would be deleted
        #[arg(long)]
        dry_run: bool,
    },
}

/// How an added model is named and stored.
#[derive(Debug, Args)]
pub(crate) struct Naming {
    /// TENANT/MODEL
    #[arg(long)]
    name: ModelId,
    /// Store weights as f32, bf16, int8 or int4 (groups of 32), or as they are; an adapter's factors always stay as they are
    #[arg(long, default_value = "keep")]
    dtype: Recipe,
    /// Store every tensor as its bytes are: larger, and nothing to decode when it is loaded
    #[arg(long)]
    raw: bool,
    /// TENANT/MODEL that it was tuned from
    #[arg(long)]
    parent: Option<ModelId>,
    /// TENANT/MODEL that an adapter is over [default: the one that adapter_config.json asks for]
    #[arg(long, conflicts_with = "parent")]
    base: Option<ModelId>,
    /// Say what was done as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `ashlar zoo`.
///
/// # Errors
/// What failed, for people; also when `verify` finds damage.
pub(crate) async fn run(args: ZooArgs) -> anyhow::Result<()> {
    let root = match args.zoo {
        Some(root) => root,
        None => zoo_of_environment()?.unwrap_or_else(|| ZooConfig::default().root),
    };
    if let ZooCommand::Add { path, naming } = &args.command {
        let zoo = Zoo::create_place(&root).await.context("open the zoo")?;
        return add(&zoo, path, naming, None).await;
    }
    if let ZooCommand::Pull { repo, revision, file, downloads, keep, naming } = args.command {
        let options = PullOptions { repo: repo.parse::<RepoId>().context("read the repository's name")?, revision, file };
        return pull(&root, &options, &downloads, keep, &naming).await;
    }
    let zoo = Zoo::open_place(&root).await.context("open the zoo")?;
    match args.command {
        ZooCommand::Add { .. } | ZooCommand::Pull { .. } => unreachable!("handled above"),
        ZooCommand::List { json } => {
            let listed = zoo.list_resolved().await.context("list the models")?;
            print(json, &listed, || table::list(&listed))
        }
        ZooCommand::Show { model, json } => {
            let shown = zoo.show(&model).await.with_context(|| format!("show {model}"))?;
            print(json, &shown, || table::show(&shown))
        }
        ZooCommand::Diff { a, b, json } => {
            let diff = zoo.diff(&a, &b).await.with_context(|| format!("compare {a} with {b}"))?;
            print(json, &diff, || table::diff(&diff))
        }
        ZooCommand::Report(args) => report::run(&zoo, args).await,
        ZooCommand::Export { model, directory } => {
            let report = export(&zoo, &model, &directory).await.with_context(|| format!("export {model} to {}", directory.display()))?;
            let size = ingest::human_bytes(report.bytes);
            Ok(output::line(format_args!("{model} is in {}: {} tensors, {size}", directory.display(), report.tensors))?)
        }
        ZooCommand::Unmerge(args) => unmerge::run(&zoo, args).await,
        ZooCommand::Equivalence(args) => equivalence::run(&zoo, args).await,
        ZooCommand::CompressDelta(args) => compress::run(&zoo, args).await,
        ZooCommand::Quantize(args) => quantize::run(&zoo, args).await,
        ZooCommand::Stitch(args) => stitch::run(&zoo, args).await,
        ZooCommand::Surrogate(args) => surrogate::run(&zoo, args).await,
        ZooCommand::Profile(args) => profile::run(&zoo, args).await,
        ZooCommand::Public { tenants, remove } => public(&zoo, &tenants, remove).await,
        ZooCommand::Verify { repair } => {
            let mut report = verify::verify(&zoo, &*progress::for_terminal()).await.context("verify the zoo")?;
            if let Some(other) = repair.filter(|_| !report.damage.is_empty()) {
                output::text(table::verify(&report))?;
                let other = Zoo::open_place(&other).await.context("open the zoo to repair from")?;
                let repaired = repair::repair(&zoo, &other, &report).await.context("repair the zoo")?;
                output::text(table::repair(&repaired))?;
                report = verify::verify(&zoo, &*progress::for_terminal()).await.context("verify the zoo again")?;
            }
            output::text(table::verify(&report))?;
            match report.damage.len() {
                0 => Ok(()),
                count => Err(Found(format!("verify the zoo: {count} of its objects are damaged or missing")).into()),
            }
        }
        ZooCommand::Rm { model } => {
            zoo.remove_model(&model).await.with_context(|| format!("remove {model}"))?;
            let over = adapters_over(&zoo, &model).await;
            if !over.is_empty() {
                output::line(format_args!("adapters over it keep its blocks and are served as before: {}", over.join(", ")))?;
            }
            let minutes = GRACE_DEFAULT.as_secs() / 60;
            Ok(output::line(format_args!(
                "removed the name {model}; `zoo gc` frees what no other model uses, once it is {minutes} minutes old (--grace SECONDS)"
            ))?)
        }
        ZooCommand::Gc { grace, dry_run } => {
            let report = gc::collect(&zoo, Duration::from_secs(grace), dry_run).await.context("collect garbage")?;
            Ok(output::text(table::gc(&report, dry_run))?)
        }
    }
}

async fn public(zoo: &Zoo, tenants: &[String], remove: bool) -> anyhow::Result<()> {
    if let Some(tenant) = tenants.iter().find(|tenant| !is_tenant(tenant)) {
        bail!("declare `{tenant}` public: a tenant has 1 to 96 letters, digits, `.`, `_` or `-`, and begins with a letter or digit");
    }
    let domains = match tenants.is_empty() {
        true => zoo.read_domains().await,
        false => {
            let change = |domains: &mut Domains| match remove {
                true => domains.public.retain(|public| !tenants.contains(public)),
                false => domains.public.extend(tenants.iter().cloned()),
            };
            zoo.update_domains(change).await
        }
    };
    let public: Vec<String> = domains.context("read or change which tenants are public")?.public.into_iter().collect();
    Ok(match public.is_empty() {
        true => output::line("no tenant is public: each sees its own models only"),
        false => output::line(format_args!("public: {}", public.join(", "))),
    }?)
}

/// Names of models that are adapters over one, as far as they can be read.
async fn adapters_over(zoo: &Zoo, base: &ModelId) -> Vec<String> {
    let mut over = Vec::new();
    for (id, name) in zoo.list_models().await.unwrap_or_default() {
        let Some(name) = name.ok().filter(|name| name.parent.as_deref() == Some(&base.to_string())) else { continue };
        if zoo.read_chain(name.chain).await.is_ok_and(|chain| !chain.adapters.is_empty()) {
            over.push(id.to_string());
        }
    }
    over
}

async fn add(zoo: &Zoo, path: &std::path::Path, naming: &Naming, source: Option<String>) -> anyhow::Result<()> {
    if matches!(path.try_exists(), Ok(false)) {
        bail!("add {}: it does not exist", path.display());
    }
    if naming.base.is_some() && !ingest::is_adapter(path) {
        bail!("add {}: --base is for PEFT adapters, and it is none; --parent says what a full model was tuned from", path.display());
    }
    let given = [("--parent", &naming.parent), ("--base", &naming.base)];
    let given = given.into_iter().find_map(|(flag, model)| Some((flag, model.as_ref()?)));
    if let Some((flag, model)) = given {
        let tenant = naming.name.tenant();
        if flag == "--parent" && !zoo.viewer(tenant).await?.sees(model) {
            let owner = model.tenant();
            bail!(
                "use {flag} {model}: it is not {tenant}'s to see: `ashlar zoo public {owner}` lets every tenant see and share what {owner} has"
            );
        }
        zoo.resolve(model).await.with_context(|| format!("use {flag} {model}"))?;
    }
    let parent = given.map(|(_, model)| model.clone());
    let options = AddOptions { recipe: naming.dtype, parent, source, compress: !naming.raw, ..AddOptions::new(naming.name.clone()) };
    let report = ingest::add(zoo, path, &options, &*progress::for_terminal()).await.with_context(|| format!("add {}", path.display()))?;
    if naming.json {
        return Ok(output::line(serde_json::to_string_pretty(&report)?)?);
    }
    Ok(print_added(&report)?)
}

async fn pull(zoo: &Place, options: &PullOptions, downloads: &std::path::Path, keep: bool, naming: &Naming) -> anyhow::Result<()> {
    let hub = Hub::from_env().context("reach the hub")?;
    let pulled = hub::pull(&hub, options, downloads, &*progress::for_terminal()).await.with_context(|| format!("pull {}", options.repo))?;
    let zoo = Zoo::create_place(zoo).await.context("open the zoo")?;
    add(&zoo, &pulled.path, naming, Some(pulled.source.clone())).await?;
    if !keep {
        std::fs::remove_dir_all(&pulled.directory).with_context(|| format!("remove {}", pulled.directory.display()))?;
    }
    Ok(())
}

fn print_added(report: &AddReport) -> Result<(), OutputError> {
    output::line(report)?;
    if let Some(nearest) = &report.nearest {
        output::line(format_args!("nearest: {nearest}"))?;
    }
    for note in &report.notes {
        output::line(format_args!("note: {note}"))?;
    }
    let verb = if report.replaced.is_some() { "now points to" } else { "is" };
    let over = report.base.as_ref().map(|base| format!(" over {base}")).unwrap_or_default();
    output::line(format_args!("{} {verb} chain {} ({}{over})", report.model, report.chain.short(), report.architecture))?;
    if let Some(replaced) = report.replaced {
        output::line(format_args!("it was chain {}, which stays among its earlier chains", replaced.short()))?;
    }
    Ok(())
}

fn print<T: serde::Serialize>(json: bool, value: &T, table: impl FnOnce() -> String) -> anyhow::Result<()> {
    Ok(if json { output::line(serde_json::to_string_pretty(value)?) } else { output::text(table()) }?)
}
