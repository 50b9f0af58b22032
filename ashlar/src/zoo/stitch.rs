//! `ashlar zoo stitch`: fits a linear map between the hidden states of two models, says what the chain of both is worth, and stores it where it is
//! told to. The regression is `ashlar_executor::model::stitch`, the chain `ashlar_zoo::stitch`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use ashlar_executor::model::alone::Alone;
use ashlar_executor::model::quality::Quality;
use ashlar_executor::model::stitch::{Fitted, HELD_OUT_EACH, fit};
use ashlar_kernels::cpu::Cpu;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::ingest::human_bytes;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::stitch::{Seam, Stitched};
use ashlar_zoo::store::Zoo;
use clap::Args;
use serde_json::json;

use super::calibration::{self, Calibration, Cut};
use super::{measure, progress, table};
use crate::output;

/// Far more than makes the map a constant.
const LAMBDA_MAX: f64 = 1e6;
/// Least tokens of a calibration text: five windows of 128.
const CALIBRATION_TOKENS_MIN: u32 = 640;
/// With fewer rows for each unknown of an output than this, the fit follows chance.
const ROWS_FOR_EACH_UNKNOWN: u64 = 4;

/// By how much a perplexity must be the larger one to be called so.
const GAIN_LEAST: f64 = 1.01;

/// Arguments of `ashlar zoo stitch`.
#[derive(Debug, Args)]
pub(crate) struct StitchArgs {
    /// TENANT/MODEL whose first layers are kept
    a: ModelId,
    /// TENANT/MODEL whose last layers and head are kept
    b: ModelId,
    /// Layers of A that are kept, at least 1
    #[arg(long, value_name = "LAYERS", value_parser = clap::value_parser!(u32).range(1..))]
    from: u32,
    /// Layers of B that are left out, all but one at most
    #[arg(long, value_name = "LAYERS")]
    to: u32,
    /// Text to fit the map on, UTF-8, at most 1 MiB: like what the model will be asked
    #[arg(long, value_name = "FILE")]
    calibrate: PathBuf,
    /// Tokens of the calibration text that are used, at most; a fifth of them is held out
    #[arg(long, default_value_t = 32_768, value_parser = clap::value_parser!(u32).range(i64::from(CALIBRATION_TOKENS_MIN)..=i64::from(calibration::TOKENS_MAX)))]
    calibration_tokens: u32,
    /// Ridge, over the mean variance of an input
    #[arg(long, default_value_t = 1e-4, value_parser = lambda)]
    lambda: f64,
    /// Text to measure on, UTF-8, at most 1 MiB; another one than --calibrate [default: half a page of English]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Windows of 128 tokens that are measured, at most
    #[arg(long, default_value_t = measure::WINDOWS_MAX as u32, value_parser = clap::value_parser!(u32).range(1..=65536))]
    windows: u32,
    /// Store it as TENANT/NEW, a name that is free
    #[arg(long)]
    name: Option<ModelId>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

fn lambda(text: &str) -> Result<f64, String> {
    let lambda = text.parse().ok().filter(|lambda| (0.0..=LAMBDA_MAX).contains(lambda));
    lambda.ok_or_else(|| format!("it must be a number from 0 to {LAMBDA_MAX:e}"))
}

/// Runs `ashlar zoo stitch`.
pub(super) async fn run(zoo: &Zoo, args: StitchArgs) -> anyhow::Result<()> {
    let (zoo, runtime) = (zoo.clone(), tokio::runtime::Handle::current());
    // It keeps all cores busy for minutes.
    let work = move || {
        let what = format!("stitch {} to {}", args.a, args.b);
        runtime.block_on(stitch(&zoo, args)).context(what)
    };
    tokio::task::spawn_blocking(work).await?
}

/// What the stitched chain says.
struct Measured {
    /// Against b, for which it may be taken.
    against_b: Quality,
    /// And a, where it has as many tokens.
    against_a: Option<Quality>,
    /// What a says as it is, against b.
    a_alone: Option<Quality>,
}

/// All that was found out.
struct Outcome {
    args: StitchArgs,
    seam: Seam,
    stitched: Stitched,
    calibration: Digest,
    fitted: Fitted,
    text: String,
    measured: Measured,
    notes: Vec<String>,
}

async fn stitch(zoo: &Zoo, args: StitchArgs) -> anyhow::Result<()> {
    let text = measure::text(args.text.as_deref())?;
    let (a, b) = (zoo.resolve(&args.a).await?, zoo.resolve(&args.b).await?);
    let seam = Seam::new(a, b, args.from as usize, args.to as usize)?;
    match &args.name {
        Some(name) => seam.check_name(zoo, name).await?,
        None => seam.check_sight(zoo, args.a.tenant()).await?,
    }
    let cut = Cut {
        tokens_min: CALIBRATION_TOKENS_MIN as usize,
        tokens_max: args.calibration_tokens as usize,
        windows_min: HELD_OUT_EACH,
        context_tokens: seam.context_tokens(),
    };
    let calibration = Calibration::read(zoo, &seam.models()[1].chain, &args.calibrate, &cut).await?;
    let ops = measure::device();
    let bar = progress::of_windows("fitting", calibration.windows.len());
    let fitted = fit(&ops, zoo, &seam, &calibration.windows, args.lambda, || bar.inc(1)).await?;
    bar.finish_and_clear();
    let stitched = seam.joined(&fitted.map)?;
    let measured = compare(zoo, &ops, &seam, &stitched, &text, args.windows as usize).await?;
    let notes = notes(&args, &fitted, &measured, calibration.digest == Digest::of(text.as_bytes()));
    let outcome = Outcome { args, seam, stitched, calibration: calibration.digest, fitted, text, measured, notes };
    match outcome.args.json {
        true => output::line(serde_json::to_string_pretty(&outcome.report())?)?,
        false => output::text(outcome.said())?,
    }
    let Some(name) = &outcome.args.name else { return Ok(()) };
    let against = outcome.seam.models()[1].name.chain;
    let record = measure::record(outcome.seam.method(), against, &outcome.text, &outcome.measured.against_b, measure::now_ms())
        .with_context(|| format!("measure what {name} would say, and so to store it"))?;
    let chain = outcome.stitched.store(zoo, name, record.created_ms, Some(&record)).await?;
    if outcome.args.json {
        return Ok(());
    }
    let (new, short) = (human_bytes(outcome.stitched.new_bytes()), chain.short());
    let StitchArgs { a, b, .. } = &outcome.args;
    Ok(output::line(format_args!("{name} is chain {short}; all of it but the map, {new}, is {a}'s and {b}'s"))?)
}

/// Runs both models and the stitched chain over the text.
async fn compare(zoo: &Zoo, ops: &Arc<Cpu>, seam: &Seam, stitched: &Stitched, text: &str, windows_max: usize) -> anyhow::Result<Measured> {
    let (windows, cut) = measure::cut(zoo, &stitched.chain, text, measure::WINDOW_TOKENS, windows_max).await?;
    let limits = measure::limits(windows);
    let blocks = measure::load(ops, stitched.blocks().len(), async |index| stitched.map_block(zoo, index).await).await?;
    let mut others: Vec<Alone<Cpu>> = vec![Alone::new(ops.clone(), blocks, limits)?];
    let mut models = Vec::new();
    for model in seam.models() {
        let loaded = Alone::load(ops.clone(), zoo, model.name.chain, limits).await.with_context(|| format!("load {}", model.id))?;
        models.push(loaded);
    }
    let (mut b, a) = (models.remove(1), models.remove(0));
    others.extend(Some(a).filter(|a| a.vocab() == b.vocab()));
    let mut of_b = measure::compare(windows, &cut, &mut b, &mut others).into_iter();
    let against_b = of_b.next().expect("the stitched chain");
    let a_alone = of_b.next();
    let against_a = match others.pop().filter(|_| a_alone.is_some()) {
        Some(mut a) => measure::compare(windows, &cut, &mut a, &mut others).pop(),
        None => None,
    };
    Ok(Measured { against_b, against_a, a_alone })
}

/// What whoever reads the figures should know.
fn notes(args: &StitchArgs, fitted: &Fitted, measured: &Measured, is_same_text: bool) -> Vec<String> {
    let (a, b, quality) = (&args.a, &args.b, &measured.against_b);
    let mut notes = Vec::new();
    // One for each element of a row, one for the position, one for the bias.
    let unknowns = fitted.map.inputs as u64 + 2;
    if fitted.row_count < ROWS_FOR_EACH_UNKNOWN * unknowns {
        let rows = fitted.row_count;
        notes.push(format!("{rows} rows are few for {unknowns} unknowns of each output: a longer calibration text would fit better"));
    }
    if is_same_text {
        notes.push("it is measured on the text that it was fitted on, and so looks better than it is".to_owned());
    }
    notes.push(verdict(b, quality.excess.mean.exp(), quality.same_top_share, quality.divergence.mean));
    if let Some(alone) = measured.a_alone.filter(|alone| GAIN_LEAST * alone.perplexity < quality.perplexity) {
        notes.push(format!("{a} as it is predicts this text better, at a perplexity of {:.2}: nothing is gained here", alone.perplexity));
    }
    notes
}

/// In words what the figures mean: perplexity over b's, the share of equal likeliest tokens, the mean divergence.
fn verdict(b: &ModelId, ratio: f64, same_top_share: f64, divergence: f64) -> String {
    let others = 100.0 * (1.0 - same_top_share);
    if ratio.is_nan() || ratio >= 2.0 {
        return format!("its perplexity is {ratio:.1} times that of {b}: it is not fit to be served as {b}");
    }
    if ratio > 1.05 || same_top_share < 0.9 || divergence > 0.1 {
        return format!(
            "another token than {b}'s is likeliest in {others:.0} of 100 places, at {ratio:.2} times its perplexity: it is a model of its own, and not {b}"
        );
    }
    format!("on this text it is close to {b}: another token is likeliest in {others:.1} of 100 places")
}

impl Outcome {
    fn said(&self) -> String {
        let (StitchArgs { a, b, from, to, lambda, .. }, fitted, measured) = (&self.args, &self.fitted, &self.measured);
        let (map, size) = (&fitted.map, human_bytes(self.stitched.new_bytes()));
        let mut rows = vec![table::row(["", "MEAN KL", "99% KL", "SAME TOP", "PERPLEXITY"])];
        let mut add = |name: String, quality: &Quality| {
            rows.push(vec![
                name,
                format!("{:.5}", quality.divergence.mean),
                format!("{:.5}", quality.divergence_p99),
                format!("{:.2}%", quality.same_top_share * 100.0),
                format!("{:.4}", quality.perplexity),
            ]);
        };
        add(format!("stitched against {b}"), &measured.against_b);
        if let Some(quality) = &measured.a_alone {
            add(format!("{a} against {b}"), quality);
        }
        if let Some(quality) = measured.against_a.as_ref().filter(|_| a != b) {
            add(format!("stitched against {a}"), quality);
        }
        let quality = &measured.against_b;
        let notes: String = self.notes.iter().map(|note| format!("note: {note}\n")).collect();
        format!(
            "layers 0..{from} of {a}, a map of {} to {} ({size}), layers {to}.. of {b}\n\
             fitted on {} rows with a ridge of {lambda}; of the variance of {} rows held out, {:.2}% is not explained \
             ({:.2}% behind the first token of each window)\n\
             {} predictions; the perplexity of {b} is {:.4}\n{}{notes}",
            map.inputs,
            map.outputs,
            fitted.row_count,
            fitted.held_count,
            100.0 * fitted.error,
            100.0 * fitted.error_after_first,
            quality.row_count,
            quality.perplexity / quality.excess.mean.exp(),
            table::columns(&rows, &[1, 2, 3, 4]),
        )
    }

    fn report(&self) -> serde_json::Value {
        let (fitted, measured) = (&self.fitted, &self.measured);
        json!({
            "a": self.args.a.to_string(),
            "b": self.args.b.to_string(),
            "method": self.seam.method(),
            "block_index": self.stitched.index(),
            "widths": self.seam.widths(),
            "new_bytes": self.stitched.new_bytes(),
            "lambda": self.args.lambda,
            "calibration": { "text_blake3": self.calibration, "rows": fitted.row_count, "rows_held_out": fitted.held_count },
            "held_out_error": fitted.error,
            "held_out_error_after_first": fitted.error_after_first,
            "text_blake3": Digest::of(self.text.as_bytes()),
            "against_b": measure::json(&measured.against_b),
            "against_a": measured.against_a.as_ref().map(measure::json),
            "a_against_b": measured.a_alone.as_ref().map(measure::json),
            "notes": self.notes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_follow_the_figures_and_what_is_no_number_is_not_fit() {
        let b: ModelId = "demo/b".parse().unwrap();
        for (ratio, same_top, kl, words) in [
            (1.0, 1.0, 0.0, "on this text it is close to demo/b: another token is likeliest in 0.0 of 100 places"),
            (1.2, 0.95, 0.05, "in 5 of 100 places, at 1.20 times its perplexity: it is a model of its own, and not demo/b"),
            (1.0, 0.7, 0.05, "in 30 of 100 places"),
            (1.0, 0.95, 0.2, "a model of its own"),
            (2.0, 0.95, 0.2, "its perplexity is 2.0 times that of demo/b: it is not fit to be served as demo/b"),
            (f64::NAN, 0.0, f64::NAN, "not fit to be served"),
            (f64::INFINITY, 0.0, 1.0, "not fit to be served"),
        ] {
            let said = verdict(&b, ratio, same_top, kl);
            assert!(said.contains(words), "{said}");
        }
    }
}
