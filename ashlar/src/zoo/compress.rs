//! `ashlar zoo compress-delta`: proposes base and compressed difference for a fine-tune, with what that changes, and stores it with that
//! measure where it is told to.

use std::path::PathBuf;

use anyhow::Context;
use ashlar_zoo::ingest::human_bytes;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::relatives::{Compressed, Kept, Method, compress};
use ashlar_zoo::store::Zoo;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::measure::{self, Measured};
use super::table;
use crate::output;

/// Arguments of `ashlar zoo compress-delta`.
#[derive(Debug, Args)]
pub(crate) struct CompressArgs {
    /// TENANT/MODEL
    model: ModelId,
    /// svd:R keeps R singular values of each matrix's difference; bitdelta keeps a sign for each weight and a scale for 512
    #[arg(long)]
    method: Method,
    /// TENANT/MODEL that it was tuned from [default: the nearest of those that the tenant may see]
    #[arg(long)]
    base: Option<ModelId>,
    /// Blocks that stay the model's own, exactly
    #[arg(long, value_delimiter = ',')]
    keep_blocks: Vec<KeptBlock>,
    /// Text to measure the change of the output on, UTF-8, at most 1 MiB [default: half a page of English]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Store it under --name, if it could be measured; without this it is only proposed
    #[arg(long, requires = "name")]
    apply: bool,
    /// TENANT/NEW, a name that is free; the model keeps its own until `zoo rm`
    #[arg(long, requires = "apply")]
    name: Option<ModelId>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// A block that can stay as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KeptBlock {
    /// The table of tokens.
    Embed,
    /// The last norm and the output projection.
    Head,
}

/// Runs `ashlar zoo compress-delta`.
pub(super) async fn run(zoo: &Zoo, args: CompressArgs) -> anyhow::Result<()> {
    let text = measure::text(args.text.as_deref())?;
    let tenant = args.name.as_ref().unwrap_or(&args.model).tenant();
    let viewer = zoo.viewer(tenant).await?;
    let what = || format!("compress {}", args.model);
    let kept = Kept { embed: args.keep_blocks.contains(&KeptBlock::Embed), head: args.keep_blocks.contains(&KeptBlock::Head) };
    let compressed = compress(zoo, (tenant, &viewer), &args.model, args.base.as_ref(), (args.method, kept)).await.with_context(what)?;
    let measured = measure::measure(zoo, &compressed.adapted, &text).await;
    match args.json {
        true => output::line(serde_json::to_string_pretty(&report(&args.model, &compressed, measured.as_ref().ok()))?)?,
        false => output::text(table::compress(&args.model, &compressed, measured.as_ref()))?,
    }
    let Some(name) = args.name.filter(|_| args.apply) else { return Ok(()) };
    // An approximation is worth what is known of it.
    let measured = measured.with_context(|| format!("measure what {name} would say, and so to store it"))?;
    let method = if kept == Kept::default() { args.method.to_string() } else { format!("{} keeping {kept}", args.method) };
    let created_ms = measure::now_ms();
    let record = measure::record(method, compressed.adapted.source, &text, &measured.adapted, created_ms).with_context(what)?;
    let chain = compressed.adapted.store(zoo, &name, created_ms, Some(&record)).await.with_context(what)?;
    if args.json {
        return Ok(());
    }
    let saved = compressed.adapted.bytes_before.saturating_sub(compressed.adapted.bytes_after);
    let (base, model) = (&compressed.adapted.base, &args.model);
    Ok(output::line(format_args!(
        "{name} is chain {} over {base}; `zoo rm {model}` and `zoo gc` free at most {}, and the exact model",
        chain.short(),
        human_bytes(saved)
    ))?)
}

fn report(model: &ModelId, compressed: &Compressed, measured: Option<&Measured>) -> Value {
    let Compressed { adapted, method, kept, matrices, given_up, own } = compressed;
    let places =
        |places: &[(usize, String)]| -> Vec<Value> { places.iter().map(|(index, role)| json!({ "index": index, "role": role })).collect() };
    json!({
        "model": model.to_string(),
        "base": adapted.base.to_string(),
        "method": method.to_string(),
        "keep_blocks": kept.to_string(),
        "bytes_before": adapted.bytes_before,
        "bytes_after": adapted.bytes_after,
        "matrices": matrices,
        "given_up": places(given_up),
        "own": places(own),
        "compressed": measured.map(|measured| measure::json(&measured.adapted)),
        "base_alone": measured.and_then(|measured| measured.base.as_ref()).map(measure::json),
    })
}
