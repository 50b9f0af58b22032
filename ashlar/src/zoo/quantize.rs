//! `ashlar zoo quantize`: makes quantised forms of a model, measures each against the model, and stores one where it is told to.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use ashlar_executor::model::alone::Alone;
use ashlar_executor::model::calibrate::calibrate;
use ashlar_executor::model::quality::Quality;
use ashlar_kernels::cpu::Cpu;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::ingest::{Progress, Stage, human_bytes};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::quantise::{Draft, Form, Recipe};
use ashlar_zoo::store::Zoo;
use clap::Args;
use serde_json::{Value, json};

use super::calibration::{self, Calibration};
use super::{measure, progress};
use crate::output;
use crate::status::Misused;

/// Arguments of `ashlar zoo quantize`.
#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// TENANT/MODEL
    model: ModelId,
    /// What linear weights become: int8-gN, int4-gN, int8m-gN or int4m-gN (with minimum), fp8-gN, N the group, or fp8 (a scale for each row); several
    /// by repeating, to compare
    #[arg(long = "recipe", required = true, value_name = "FORM")]
    recipes: Vec<Form>,
    /// What the token table and the head become
    #[arg(long, value_name = "FORM", default_value_t = Form::TABLE)]
    head: Form,
    /// Text to calibrate on, UTF-8, at most 1 MiB: GPTQ in place of rounding; not for fp8
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// Tokens of the calibration text that are used, at most
    #[arg(long, default_value_t = 8192, requires = "calibrate", value_parser = clap::value_parser!(u32).range(128..=i64::from(calibration::TOKENS_MAX)))]
    calibration_tokens: u32,
    /// Store it as TENANT/NEW, a name that is free; takes one --recipe
    #[arg(long)]
    name: Option<ModelId>,
    #[command(flatten)]
    on: measure::MeasureArgs,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs `ashlar zoo quantize`.
pub(super) async fn run(zoo: &Zoo, args: QuantizeArgs) -> anyhow::Result<()> {
    if args.name.is_some() && args.recipes.len() != 1 {
        return Err(Misused(anyhow!("quantize {}: --name takes one --recipe", args.model)).into());
    }
    let (zoo, runtime) = (zoo.clone(), tokio::runtime::Handle::current());
    // It keeps all cores busy for minutes.
    let work = move || {
        let model = args.model.clone();
        runtime.block_on(quantize(&zoo, args)).with_context(|| format!("quantize {model}"))
    };
    tokio::task::spawn_blocking(work).await?
}

async fn quantize(zoo: &Zoo, args: QuantizeArgs) -> anyhow::Result<()> {
    let text = measure::text(args.on.text.as_deref())?;
    let source = zoo.resolve(&args.model).await?;
    let calibration = Calibration::of_one(zoo, &source.chain, args.calibrate.as_deref(), args.calibration_tokens).await?;
    let (windows, cut) = measure::cut(zoo, &source.chain, &text, args.on.window as usize, args.on.windows as usize).await?;
    let (ops, limits) = (measure::device(), measure::limits(windows));
    let mut rows = Vec::new();
    let mut model = None;
    for linear in &args.recipes {
        let recipe = Recipe { linear: *linear, table: args.head };
        let mut draft = Draft::new(zoo, source.clone(), recipe, args.name.as_ref()).await?;
        let progress = progress::for_terminal();
        match &calibration {
            Some(calibration) => calibrate(&ops, &mut draft, calibration.windows.clone(), &*progress).await?,
            None => round(&mut draft, &*progress).await?,
        }
        let blocks = measure::load(&ops, draft.blocks().len(), async |index| draft.map_block(index).await).await?;
        let model: &mut Alone<Cpu> = match &mut model {
            Some(model) => model,
            none => none.insert(Alone::load(ops.clone(), zoo, source.name.chain, limits).await.context("load the model")?),
        };
        let mut others = [Alone::new(ops.clone(), blocks, limits)?];
        let quality = measure::compare(windows, &cut, model, &mut others).remove(0);
        if !args.json {
            if rows.is_empty() {
                let source_perplexity = quality.perplexity * (-quality.excess.mean).exp();
                output::line(format_args!(
                    "{} windows of {} tokens, {} predictions; the model's perplexity is {source_perplexity:.4}",
                    cut.len(),
                    windows.window_tokens,
                    quality.row_count
                ))?;
                output::line(HEADER)?;
            }
            output::line(line(&draft, recipe, calibration.is_some(), &quality))?;
        }
        rows.push(row(&draft, recipe, calibration.as_ref(), &quality));
        let Some(name) = &args.name else { continue };
        let how = calibration
            .as_ref()
            .map_or_else(|| "rounding".to_owned(), |calibration| format!("gptq over text {}", calibration.digest.short()));
        let measured = measure::record(format!("{recipe}, {how}"), source.name.chain, &text, &quality, measure::now_ms())?;
        let chain = draft.store(name, measured.created_ms, Some(&measured)).await?;
        if !args.json {
            let whose = match calibration {
                Some(_) => "calibrated: its blocks are this model's alone",
                None => "rounded without data: blocks that models share stay shared",
            };
            output::line(format_args!("{name} is chain {}, {}; {whose}", chain.short(), human_bytes(draft.bytes())))?;
        }
    }
    if args.json {
        output::line(serde_json::to_string_pretty(&json!({
            "model": args.model.to_string(),
            "text_blake3": Digest::of(text.as_bytes()),
            "window_tokens": windows.window_tokens,
            "windows": cut.len(),
            "recipes": rows,
        }))?)?;
    }
    Ok(())
}

/// Rounds all blocks of a draft.
async fn round(draft: &mut Draft, progress: &dyn Progress) -> anyhow::Result<()> {
    let indices = 0..draft.blocks().len();
    progress.begin(Stage::Quantise, indices.clone().map(|index| draft.target_bytes(index)).sum());
    for index in indices {
        draft.round(index).await?;
        progress.advance(draft.target_bytes(index));
    }
    progress.end();
    Ok(())
}

const HEADER: &str =
    "recipe                        method          MB   perplexity  ln of ratio to the model      mean KL     99% KL  same top";

fn line(draft: &Draft, recipe: Recipe, is_calibrated: bool, quality: &Quality) -> String {
    format!(
        "{:<28}  {:<8}  {:>8.1}  {:>11.4}  {:>24}  {:>11.6}  {:>9.6}  {:>7.2}%",
        recipe.to_string(),
        method(is_calibrated),
        draft.bytes() as f64 / 1e6,
        quality.perplexity,
        format!("{:+.5} ± {:.5}", quality.excess.mean, quality.excess.error),
        quality.divergence.mean,
        quality.divergence_p99,
        quality.same_top_share * 100.0,
    )
}

fn row(draft: &Draft, recipe: Recipe, calibration: Option<&Calibration>, quality: &Quality) -> Value {
    let mut row = measure::json(quality);
    row["recipe"] = json!(recipe.linear.to_string());
    row["head"] = json!(recipe.table.to_string());
    row["method"] = json!(method(calibration.is_some()));
    row["chain_bound"] = json!(calibration.is_some());
    row["calibration"] = json!(calibration.map(Calibration::json));
    row["bytes"] = json!(draft.bytes());
    row["ln_perplexity_ratio"] = json!({ "mean": quality.excess.mean, "standard_error": quality.excess.error });
    row
}

fn method(is_calibrated: bool) -> &'static str {
    if is_calibrated { "gptq" } else { "rounding" }
}
