//! `ashlar zoo unmerge`: proposes base and adapter for a merged model, with what that changes, and stores it where it is told to.

use std::path::PathBuf;

use anyhow::Context;
use ashlar_zoo::ingest::human_bytes;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::relatives::{Proposal, propose};
use ashlar_zoo::store::Zoo;
use clap::Args;
use serde_json::{Value, json};

use super::measure::{self, Measured};
use super::table;
use crate::output;

/// Arguments of `ashlar zoo unmerge`.
#[derive(Debug, Args)]
pub(crate) struct UnmergeArgs {
    /// TENANT/MODEL
    model: ModelId,
    /// TENANT/MODEL that it was tuned from [default: the nearest of those that the tenant may see]
    #[arg(long)]
    base: Option<ModelId>,
    /// Largest rank to look for
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=512))]
    rank_max: u16,
    /// Store it under --name; without this it is only proposed
    #[arg(long, requires = "name")]
    apply: bool,
    /// TENANT/NEW, a name that is free; the model keeps its own until `zoo rm`
    #[arg(long, requires = "apply")]
    name: Option<ModelId>,
    /// Text to measure the change of the output on, UTF-8, at most 1 MiB [default: half a page of English]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs `ashlar zoo unmerge`.
pub(super) async fn run(zoo: &Zoo, args: UnmergeArgs) -> anyhow::Result<()> {
    let text = measure::text(args.text.as_deref())?;
    let tenant = args.name.as_ref().unwrap_or(&args.model).tenant();
    let viewer = zoo.viewer(tenant).await?;
    let what = || format!("unmerge {}", args.model);
    let proposal = propose(zoo, (tenant, &viewer), &args.model, args.base.as_ref(), usize::from(args.rank_max)).await.with_context(what)?;
    // Not measurable is no obstacle to a proposal, but it is said.
    let measured = measure::measure(zoo, &proposal.adapted, &text).await;
    match args.json {
        true => output::line(serde_json::to_string_pretty(&report(&args.model, &proposal, measured.as_ref().ok()))?)?,
        false => output::text(table::unmerge(&args.model, &proposal, measured.as_ref()))?,
    }
    let Some(name) = args.name.filter(|_| args.apply) else { return Ok(()) };
    let created_ms = measure::now_ms();
    let record = |measured: &Measured| measure::record("unmerge".to_owned(), proposal.adapted.source, &text, &measured.adapted, created_ms);
    let record = measured.ok().as_ref().map(record).transpose().with_context(what)?;
    let chain = proposal.adapted.store(zoo, &name, created_ms, record.as_ref()).await.with_context(what)?;
    if args.json {
        return Ok(());
    }
    Ok(output::line(format_args!(
        "{name} is chain {} over {}; `zoo rm {}` and `zoo gc` free at most {}",
        chain.short(),
        proposal.adapted.base,
        args.model,
        human_bytes(proposal.adapted.bytes_before.saturating_sub(proposal.adapted.bytes_after))
    ))?)
}

fn report(model: &ModelId, proposal: &Proposal, measured: Option<&Measured>) -> Value {
    json!({
        "model": model.to_string(),
        "base": proposal.adapted.base.to_string(),
        "matrices": proposal.matrix_count,
        "bytes_before": proposal.adapted.bytes_before,
        "bytes_after": proposal.adapted.bytes_after,
        "exact_share": proposal.proof.exact_share(),
        "proof": proposal.proof,
        "blocks": proposal.differences,
        "unmerged": measured.map(|measured| measure::json(&measured.adapted)),
        "base_alone": measured.and_then(|measured| measured.base.as_ref()).map(measure::json),
    })
}
