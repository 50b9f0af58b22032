//! `ashlar zoo surrogate`: makes cheaper forms of a model's blocks, measures the chain that has them against the model, and stores it where it is
//! told to.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context;
use ashlar_executor::model::alone::Alone;
use ashlar_executor::model::quality::Quality;
use ashlar_executor::model::surrogate::{Calibration as Windows, CutBlock, make};
use ashlar_kernels::cpu::Cpu;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::draft::ChainDraft;
use ashlar_zoo::ingest::human_bytes;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::Zoo;
use ashlar_zoo::surrogate::{BlockRange, Plan, Share, multiply_adds};
use clap::{ArgGroup, Args};
use serde_json::{Value, json};

use super::calibration::{self, Calibration};
use super::{measure, progress};
use crate::output;

/// Arguments of `ashlar zoo surrogate`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("shares").required(true).multiple(true))]
pub(crate) struct SurrogateArgs {
    /// TENANT/MODEL
    model: ModelId,
    /// Share of each feed-forward block's inner columns that stays, to the nearest multiple of 32
    #[arg(long, value_name = "SHARE", group = "shares")]
    ffn_keep: Option<Share>,
    /// Share of each attention block's key-value heads that stays, each with its query heads
    #[arg(long, value_name = "SHARE", group = "shares")]
    heads_keep: Option<Share>,
    /// Cut only these blocks, as `zoo show` counts them, the last one not included
    #[arg(long, value_name = "FROM..TO")]
    blocks: Option<BlockRange>,
    /// Text to tell by what matters, UTF-8, at most 1 MiB [default: by the weights alone, and nothing is refitted]
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// Tokens of the calibration text that are used, at most
    #[arg(long, default_value_t = 8192, requires = "calibrate", value_parser = clap::value_parser!(u32).range(128..=i64::from(calibration::TOKENS_MAX)))]
    calibration_tokens: u32,
    /// Do not fit what stays to what the whole block said of the calibration text
    #[arg(long, requires = "calibrate")]
    no_refit: bool,
    /// Store it as TENANT/NEW, a name that is free
    #[arg(long)]
    name: Option<ModelId>,
    #[command(flatten)]
    on: measure::MeasureArgs,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// How it was told what matters, and whether the rest was fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Weights,
    Calibrated,
    Refitted,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Weights => "by weights",
            Self::Calibrated => "calibrated",
            Self::Refitted => "refitted",
        }
    }
}

/// Runs `ashlar zoo surrogate`.
pub(super) async fn run(zoo: &Zoo, args: SurrogateArgs) -> anyhow::Result<()> {
    let (zoo, runtime) = (zoo.clone(), tokio::runtime::Handle::current());
    // It keeps all cores busy for minutes.
    let work = move || {
        let model = args.model.clone();
        runtime.block_on(surrogate(&zoo, args)).with_context(|| format!("make a surrogate of {model}"))
    };
    tokio::task::spawn_blocking(work).await?
}

async fn surrogate(zoo: &Zoo, args: SurrogateArgs) -> anyhow::Result<()> {
    let text = measure::text(args.on.text.as_deref())?;
    let source = zoo.resolve(&args.model).await?;
    let plan = Plan { feed_forward: args.ffn_keep, heads: args.heads_keep, blocks: args.blocks };
    let counts = plan.counts(&source.blocks)?;
    let calibration = Calibration::of_one(zoo, &source.chain, args.calibrate.as_deref(), args.calibration_tokens).await?;
    let (windows, cut) = measure::cut(zoo, &source.chain, &text, args.on.window as usize, args.on.windows as usize).await?;
    let (ops, limits) = (measure::device(), measure::limits(windows));
    // The last one is what is stored; the one before shows what the refit brings.
    let ways: &[Way] = match (&calibration, args.no_refit) {
        (None, _) => &[Way::Weights],
        (Some(_), true) => &[Way::Calibrated],
        (Some(_), false) => &[Way::Calibrated, Way::Refitted],
    };
    let mut drafts = Vec::new();
    for (index, way) in ways.iter().enumerate() {
        let name = args.name.as_ref().filter(|_| index + 1 == ways.len());
        drafts.push((way, name, ChainDraft::new(zoo, source.clone(), name).await?));
    }
    let mut rows = Vec::new();
    let mut model: Option<Alone<Cpu>> = None;
    for (way, name, mut draft) in drafts {
        let windows_of = calibration.as_ref().map(|calibration| calibration.windows.clone());
        let calibrated = windows_of.map(|windows| Windows { windows, refits: *way == Way::Refitted });
        let blocks = make(&ops, &mut draft, &counts, calibrated, &*progress::for_terminal()).await?;
        let loaded = measure::load(&ops, draft.blocks().len(), async |index| draft.map_block(index).await).await?;
        let model = match &mut model {
            Some(model) => model,
            none => none.insert(Alone::load(ops.clone(), zoo, source.name.chain, limits).await.context("load the model")?),
        };
        let quality = measure::compare(windows, &cut, model, &mut [Alone::new(ops.clone(), loaded, limits)?]).remove(0);
        if !args.json {
            if rows.is_empty() {
                output::line(format_args!(
                    "{} windows of {} tokens, {} predictions; the model has {:.1} MB, and its perplexity is {:.4}",
                    cut.len(),
                    windows.window_tokens,
                    quality.row_count,
                    draft.source_bytes() as f64 / 1e6,
                    quality.perplexity * (-quality.excess.mean).exp(),
                ))?;
                output::line(HEADER)?;
            }
            output::line(line(plan, *way, &draft, &quality))?;
        }
        rows.push(row(*way, &draft, &blocks, &quality));
        let Some(name) = name else { continue };
        let how = match (&calibration, way) {
            (Some(calibration), way) => format!("{} over text {}", way.name(), calibration.digest.short()),
            (None, way) => way.name().to_owned(),
        };
        let measured = measure::record(format!("surrogate:{plan}, {how}"), source.name.chain, &text, &quality, measure::now_ms())?;
        let chain = draft.store(name, measured.created_ms, Some(&measured)).await?;
        if !args.json {
            output::line(format_args!(
                "{name} is chain {}, {}; {} of its {} blocks were cut, the others are {}'s: beside it, it takes {}",
                chain.short(),
                human_bytes(draft.bytes()),
                counts.len(),
                source.blocks.len(),
                args.model,
                human_bytes(draft.own_bytes())
            ))?;
        }
    }
    if args.json {
        output::line(serde_json::to_string_pretty(&json!({
            "model": args.model.to_string(),
            "surrogate": plan.to_string(),
            "text_blake3": Digest::of(text.as_bytes()),
            "window_tokens": windows.window_tokens,
            "windows": cut.len(),
            "calibration": calibration.as_ref().map(Calibration::json),
            "kept": kept(&counts),
            "ways": rows,
        }))?)?;
    }
    Ok(())
}

const HEADER: &str = "surrogate                             method            MB  beside it   work   perplexity  ln of ratio to the model      mean KL     99% KL  same top";

fn line(plan: Plan, way: Way, draft: &ChainDraft, quality: &Quality) -> String {
    format!(
        "{:<36}  {:<10}  {:>8.1}  {:>9.1}  {:>4.0}%  {:>11.4}  {:>24}  {:>11.6}  {:>9.6}  {:>7.2}%",
        plan.to_string(),
        way.name(),
        draft.bytes() as f64 / 1e6,
        draft.own_bytes() as f64 / 1e6,
        work_share(draft) * 100.0,
        quality.perplexity,
        format!("{:+.5} ± {:.5}", quality.excess.mean, quality.excess.error),
        quality.divergence.mean,
        quality.divergence_p99,
        quality.same_top_share * 100.0,
    )
}

fn row(way: Way, draft: &ChainDraft, blocks: &[CutBlock], quality: &Quality) -> Value {
    let block =
        |block: &CutBlock| json!({ "index": block.index, "units": block.unit_count, "kept": block.kept, "lost_share": block.lost_share });
    let mut row = measure::json(quality);
    row["method"] = json!(way.name());
    row["chain_bound"] = json!(way != Way::Weights);
    row["bytes"] = json!(draft.bytes());
    row["bytes_of_source"] = json!(draft.source_bytes());
    row["own_bytes"] = json!(draft.own_bytes());
    row["work_share"] = json!(work_share(draft));
    row["ln_perplexity_ratio"] = json!({ "mean": quality.excess.mean, "standard_error": quality.excess.error });
    row["blocks"] = blocks.iter().map(block).collect();
    row
}

/// Units that stay of each block that is cut.
fn kept(counts: &BTreeMap<usize, usize>) -> Value {
    counts.iter().map(|(index, count)| json!({ "index": index, "count": count })).collect()
}

/// Multiplications with weights, as a share of the model's.
fn work_share(draft: &ChainDraft) -> f64 {
    multiply_adds(draft.blocks()) as f64 / multiply_adds(&draft.source().blocks).max(1) as f64
}
