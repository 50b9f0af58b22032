//! `ashlar zoo equivalence`: measures which blocks of one model may stand for another's in the context of its chain, records what came out,
//! lists the records and revokes them. The arithmetic of divergence is `ashlar_executor::model::quality`, the record `ashlar_zoo::equivalence`.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use ashlar_executor::model::alone::Alone;
use ashlar_executor::model::block::LoadedBlock;
use ashlar_executor::model::outputs::Outputs;
use ashlar_executor::model::quality::{Tally, Windows};
use ashlar_kernels::cpu::Cpu;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::equivalence::{Equivalence, Figures, METHOD, Pair, Step, cosine, exchanged, pairs};
use ashlar_zoo::manifest::Chain;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::Zoo;
use clap::Args;

use super::{measure, progress, table};
use crate::output;

/// Arguments of `ashlar zoo equivalence`.
#[derive(Debug, Args)]
pub(crate) struct EquivalenceArgs {
    /// TENANT/MODEL whose blocks may be exchanged
    #[arg(requires = "other")]
    model: Option<ModelId>,
    /// TENANT/MODEL whose blocks stand for them
    other: Option<ModelId>,
    /// Text to measure on, UTF-8, at most 1 MiB: best what the model is asked [default: half a page of English]
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// Windows of 128 tokens of the text, at most
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    windows: u16,
    /// Blocks whose parameters' cosine is less are not measured
    #[arg(long, default_value_t = 0.9)]
    cosine_min: f64,
    /// Exchanges that together diverge by more, as a mean KL in nats a token, are not recorded
    #[arg(long, default_value_t = 0.1)]
    kl_max: f64,
    /// Measure and print, record nothing
    #[arg(long, requires = "model")]
    dry_run: bool,
    /// Take away the record whose digest begins so
    #[arg(long, value_name = "DIGEST", conflicts_with = "model")]
    revoke: Option<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Runs `ashlar zoo equivalence`.
pub(super) async fn run(zoo: &Zoo, args: EquivalenceArgs) -> anyhow::Result<()> {
    if let Some(prefix) = &args.revoke {
        return revoke(zoo, prefix).await;
    }
    match (&args.model, &args.other) {
        (Some(model), Some(other)) => record(zoo, model, other, &args).await,
        _ => list(zoo, args.json).await,
    }
}

async fn revoke(zoo: &Zoo, prefix: &str) -> anyhow::Result<()> {
    // An empty one, as of a variable that is not set, would be any record's.
    ensure!(prefix.len() >= 4, "revoke `{prefix}`: give at least 4 digits of the record's digest");
    let listed = zoo.list_equivalences().await.context("list the records")?;
    let matching: Vec<&Digest> = listed.iter().filter(|digest| digest.to_string().starts_with(prefix)).collect();
    let [digest] = matching.as_slice() else {
        bail!("revoke `{prefix}`: {} records have a digest that begins so; `ashlar zoo equivalence` lists them", matching.len());
    };
    zoo.remove_equivalence(**digest).await.with_context(|| format!("revoke {digest}"))?;
    Ok(output::line(format_args!("revoked {digest}: sequences that run end as they began, others are served exactly"))?)
}

async fn list(zoo: &Zoo, json: bool) -> anyhow::Result<()> {
    let mut records = Vec::new();
    for digest in zoo.list_equivalences().await.context("list the records")? {
        records.push((digest, zoo.read_equivalence(digest).await.with_context(|| format!("read record {digest}"))?));
    }
    if json {
        let of = |(digest, record): &(Digest, Equivalence)| serde_json::json!({"digest": digest, "record": record});
        return Ok(output::line(serde_json::to_string_pretty(&records.iter().map(of).collect::<Vec<_>>())?)?);
    }
    let mut rows = vec![table::row(["RECORD", "MODEL", "CHAIN", "OTHER", "BLOCKS", "MEAN KL", "SAME TOP", "TEXT", "MEASURED"])];
    for (digest, record) in &records {
        let last = record.steps.last().expect("a record that was read has steps");
        let since = UNIX_EPOCH + std::time::Duration::from_millis(record.created_ms);
        let hours = SystemTime::now().duration_since(since).unwrap_or_default().as_secs() / 3600;
        rows.push(vec![
            digest.short(),
            record.model.clone(),
            record.chain.short(),
            record.other.clone(),
            record.steps.len().to_string(),
            format!("{:.5}", last.together.kl.mean),
            format!("{:.2}%", last.together.same_top_share * 100.0),
            record.text.short(),
            if hours < 48 { format!("{hours} h ago") } else { format!("{} days ago", hours / 24) },
        ]);
    }
    Ok(output::text(table::columns(&rows, &[4, 5, 6]))?)
}

async fn record(zoo: &Zoo, model: &ModelId, other: &ModelId, args: &EquivalenceArgs) -> anyhow::Result<()> {
    let what = || format!("hold {other} against {model}");
    ensure!((-1.0..=1.0).contains(&args.cosine_min), "use --cosine-min {}: a cosine is from -1 to 1", args.cosine_min);
    ensure!(args.kl_max.is_finite() && args.kl_max > 0.0, "use --kl-max {}: it must be above 0", args.kl_max);
    let viewer = zoo.viewer(model.tenant()).await?;
    if !viewer.sees(other) {
        bail!(
            "{}: {other} is not {}'s to see: `ashlar zoo public {}` lets every tenant see what it has",
            what(),
            model.tenant(),
            other.tenant()
        );
    }
    let text = measure::text(args.text.as_deref())?;
    let (own, others) = (zoo.resolve(model).await.with_context(what)?, zoo.resolve(other).await.with_context(what)?);
    let pairs = pairs(zoo, (model, &own.chain), (other, &others.chain)).await.with_context(what)?;
    let measured = measure_pairs(zoo, (own.name.chain, &own.chain), pairs, &text, args).await.with_context(what)?;
    if !args.json {
        output::text(steps_table(&measured))?;
    }
    let Some(last) = measured.steps.last().filter(|_| !args.dry_run) else {
        if measured.steps.is_empty() {
            output::line(format_args!(
                "no block of {other} can stand for {model}'s within a mean KL of {}: nothing is recorded",
                args.kl_max
            ))?;
        }
        return Ok(());
    };
    let record = Equivalence {
        format: 1,
        method: METHOD.to_owned(),
        model: model.to_string(),
        chain: own.name.chain,
        other: other.to_string(),
        other_chain: others.name.chain,
        text: Digest::of(text.as_bytes()),
        created_ms: measure::now_ms(),
        steps: measured.steps.clone(),
    };
    record.check().with_context(what)?;
    let digest = zoo.store_equivalence(&own.chain, &record).await.with_context(what)?;
    if args.json {
        return Ok(output::line(serde_json::to_string_pretty(&serde_json::json!({"digest": digest, "record": record}))?)?);
    }
    Ok(output::line(format_args!(
        "recorded as {}: {} blocks within {:.5} nats; served so after `ashlar deploy set {model} --equivalent-kl KL`",
        digest.short(),
        record.steps.len(),
        last.together.kl.mean
    ))?)
}

/// What came out.
struct Measured {
    /// From the least divergence up, as far as together they stay within the bound.
    steps: Vec<Step>,
    /// Pairs that were not measured or did not fit: place, cosine, and divergence alone where it was measured.
    left: Vec<(usize, f64, Option<f64>)>,
}

async fn measure_pairs(
    zoo: &Zoo,
    (digest, chain): (Digest, &Chain),
    pairs: Vec<Pair>,
    text: &str,
    args: &EquivalenceArgs,
) -> anyhow::Result<Measured> {
    let (windows, cut) = measure::cut(zoo, chain, text, measure::WINDOW_TOKENS, usize::from(args.windows)).await?;
    let (ops, limits) = (measure::device(), measure::limits(windows));
    let (mut candidates, mut left) = (Vec::new(), Vec::new());
    for pair in pairs {
        let (own, other) = (zoo.map_block(pair.own).await?, zoo.map_block(pair.other).await?);
        let (cosine, other) = tokio::task::spawn_blocking(move || (cosine(&own, &other), other)).await?;
        if cosine < args.cosine_min {
            left.push((pair.block_index, cosine, None));
            continue;
        }
        let block = LoadedBlock::load(&*ops, &other.block, &other, &Outputs::default());
        let block = block.with_context(|| format!("load block {}", pair.block_index))?;
        candidates.push(Candidate { pair, cosine, block: Some(block), tally: Tally::default() });
    }
    let model = Alone::load(ops, zoo, digest, limits).await.context("load the model")?;
    let (kl_max, chain) = (args.kl_max, chain.clone());
    let measured = tokio::task::spawn_blocking(move || exchange(&chain, model, candidates, (windows, &cut), kl_max)).await??;
    Ok(Measured { left: [left, measured.left].concat(), ..measured })
}

struct Candidate {
    pair: Pair,
    cosine: f64,
    /// The other model's block, while it is not in the chain.
    block: Option<LoadedBlock<Cpu>>,
    tally: Tally,
}

/// Measures each candidate alone, then all together in order of what they cost alone, until they cost too much.
fn exchange(
    chain: &Chain,
    mut model: Alone<Cpu>,
    mut candidates: Vec<Candidate>,
    (windows, cut): (Windows, &[Vec<u32>]),
    kl_max: f64,
) -> anyhow::Result<Measured> {
    let bar = progress::of_passes(cut.len() * (1 + candidates.len()));
    // The exact rows of one text's window at a time: a row is a whole vocabulary.
    for window in cut {
        let exact = windows.logits(&mut model, window);
        bar.inc(1);
        for candidate in &mut candidates {
            swap(&mut model, candidate)?;
            candidate.tally.add_window(windows, window, &exact, &windows.logits(&mut model, window));
            swap(&mut model, candidate)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let mut alone: Vec<(Figures, Candidate)> = candidates.into_iter().map(|candidate| (figures(&candidate.tally), candidate)).collect();
    alone.sort_by(|(a, x), (b, y)| a.kl.mean.total_cmp(&b.kl.mean).then(x.pair.block_index.cmp(&y.pair.block_index)));

    // One more at a time, within each window; what was exchanged comes back before the next.
    let bar = progress::of_passes(cut.len() * (1 + alone.len()));
    let mut tallies = vec![Tally::default(); alone.len()];
    for window in cut {
        let exact = windows.logits(&mut model, window);
        bar.inc(1);
        for ((_, candidate), tally) in std::iter::zip(&mut alone, &mut tallies) {
            swap(&mut model, candidate)?;
            tally.add_window(windows, window, &exact, &windows.logits(&mut model, window));
            bar.inc(1);
        }
        alone.iter_mut().try_for_each(|(_, candidate)| swap(&mut model, candidate))?;
    }
    bar.finish_and_clear();
    // Divergence need not grow with every exchange: what is behind the last that is within the bound is left.
    let together: Vec<Figures> = tallies.iter().map(figures).collect();
    let kept = together.iter().rposition(|together| together.kl.mean <= kl_max).map_or(0, |last| last + 1);
    let (mut steps, mut swaps): (Vec<Step>, Vec<(usize, Digest)>) = (Vec::new(), Vec::new());
    for ((alone, candidate), together) in std::iter::zip(&alone, &together).take(kept) {
        let Pair { block_index, own, other } = candidate.pair;
        swaps.push((block_index, other));
        steps.push(Step {
            block_index: u32::try_from(block_index).expect("chains are short"),
            own,
            other,
            cosine: candidate.cosine,
            alone: *alone,
            together: *together,
            chain: ashlar_zoo::canonical::digest(&exchanged(chain, swaps.iter().copied())),
        });
    }
    let left =
        alone[steps.len()..].iter().map(|(alone, candidate)| (candidate.pair.block_index, candidate.cosine, Some(alone.kl.mean))).collect();
    Ok(Measured { steps, left })
}

/// Puts the candidate's block into the chain, or takes it out.
fn swap(model: &mut Alone<Cpu>, candidate: &mut Candidate) -> anyhow::Result<()> {
    let block = candidate.block.take().expect("a block is put back before it is taken again");
    candidate.block = Some(model.exchange(candidate.pair.block_index, block)?);
    Ok(())
}

fn figures(tally: &Tally) -> Figures {
    let quality = tally.sum_up().expect("a row of each window");
    Figures { rows: quality.row_count as u64, kl: measure::divergence(&quality), same_top_share: quality.same_top_share }
}

fn steps_table(measured: &Measured) -> String {
    let mut rows = vec![table::row(["STEP", "BLOCK", "COSINE", "KL ALONE", "KL TOGETHER", "P99", "SAME TOP"])];
    for (index, step) in measured.steps.iter().enumerate() {
        rows.push(vec![
            (index + 1).to_string(),
            step.block_index.to_string(),
            format!("{:.6}", step.cosine),
            format!("{:.6}", step.alone.kl.mean),
            format!("{:.6}", step.together.kl.mean),
            format!("{:.5}", step.together.kl.p99),
            format!("{:.2}%", step.together.same_top_share * 100.0),
        ]);
    }
    for (block_index, cosine, alone) in &measured.left {
        let alone = alone.map_or_else(|| "not measured".to_owned(), |alone| format!("{alone:.6}"));
        rows.push(vec!["-".to_owned(), block_index.to_string(), format!("{cosine:.6}"), alone]);
    }
    table::columns(&rows, &[0, 1, 2, 3, 4, 5, 6])
}
