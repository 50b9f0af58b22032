//! The zoo's reports as text for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use ashlar_executor::model::quality::Quality;
use ashlar_zoo::diff::Diff;
use ashlar_zoo::gc::GcReport;
use ashlar_zoo::ingest::human_bytes;
use ashlar_zoo::inspect::{Listed, Shown, kind};
use ashlar_zoo::measures::Measure;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::relatives::{Compressed, CompressedMatrix, Proof, Proposal};
use ashlar_zoo::repair::RepairReport;
use ashlar_zoo::report::similarity::{Comparison, TensorSimilarity};
use ashlar_zoo::report::{Cost, Report};
use ashlar_zoo::verify::VerifyReport;

use super::measure::Measured;

/// Other models that a line of `zoo show` names.
const ALSO_IN_MAX: usize = 3;

/// Columns as wide as their widest cell; the columns in `right` are aligned to the right.
pub(super) fn columns(rows: &[Vec<String>], right: &[usize]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = widths[column];
            if right.contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

pub(super) fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

pub(super) fn list(models: &[Listed]) -> String {
    let mut rows = vec![row(["MODEL", "FAMILY", "LAYERS", "CONTEXT", "ADAPTERS", "SIZE", "OWN", "PARENT", "CHAIN"])];
    for model in models {
        if let Some(error) = &model.error {
            rows.push(vec![model.model.clone(), format!("(broken: {error})")]);
            continue;
        }
        rows.push(vec![
            model.model.clone(),
            model.architecture.clone(),
            model.layer_count.to_string(),
            model.context_tokens.to_string(),
            if model.adapter_count == 0 { "-".to_owned() } else { model.adapter_count.to_string() },
            human_bytes(model.bytes),
            human_bytes(model.own_bytes),
            model.parent.clone().unwrap_or_else(|| "-".to_owned()),
            model.chain.map(|chain| chain.short()).unwrap_or_default(),
        ]);
    }
    columns(&rows, &[2, 3, 4, 5, 6])
}

pub(super) fn show(model: &Shown) -> String {
    let chain = &model.chain;
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let digest = |value: Option<ashlar_zoo::digest::Digest>| or_none(value.map(|digest| digest.short()));
    let eos: Vec<String> = chain.tokens.eos.iter().map(ToString::to_string).collect();
    let mut facts = vec![
        vec!["model".to_owned(), model.model.clone()],
        vec!["chain".to_owned(), model.name.chain.to_string()],
        vec!["family".to_owned(), chain.architecture.clone()],
        vec!["width, vocabulary".to_owned(), format!("{}, {}", chain.width, chain.vocab)],
        vec!["context".to_owned(), format!("{} tokens", chain.context_tokens)],
        vec!["size".to_owned(), human_bytes(model.bytes)],
        vec!["adapters".to_owned(), adapters(model)],
        vec!["bos, eos".to_owned(), format!("{}, {}", or_none(chain.tokens.bos.map(|id| id.to_string())), eos.join(" "))],
        vec!["tokenizer".to_owned(), digest(chain.assets.tokenizer)],
        vec!["chat template".to_owned(), digest(chain.assets.chat_template)],
        vec!["licence".to_owned(), or_none(chain.licence.clone())],
        vec!["source".to_owned(), chain.source.clone()],
        vec!["parent".to_owned(), or_none(model.name.parent.clone())],
        vec!["earlier chains".to_owned(), model.name.history.len().to_string()],
    ];
    facts.extend(model.measures.iter().map(|measure| vec!["measured".to_owned(), measured(measure)]));
    let mut rows = vec![row(["#", "KIND", "BLOCK", "LINEAGE", "SIZE", "DTYPES", "ALSO IN"])];
    for block in &model.blocks {
        rows.push(vec![
            block.index.to_string(),
            block.kind.to_owned(),
            block.digest.short(),
            block.lineage.short(),
            human_bytes(block.bytes),
            block.dtypes.join(","),
            also_in(&block.shared_with),
        ]);
        if let Some(adapter) = &block.adapter {
            let short = |role: &str| role.trim_end_matches(".weight").to_owned();
            let low = adapter.ranks.iter().map(|(role, rank)| format!("{}:{rank}", short(role)));
            let changes: Vec<String> = low.chain(adapter.one_bit.iter().map(|role| format!("{}:one bit", short(role)))).collect();
            rows.push(vec![
                String::new(),
                " + adapter".to_owned(),
                adapter.digest.short(),
                String::new(),
                human_bytes(adapter.bytes),
                changes.join(","),
                also_in(&adapter.shared_with),
            ]);
        }
    }
    format!("{}\n{}", columns(&facts, &[]), columns(&rows, &[0, 4]))
}

/// Names of others, so many as are read at a glance; `--json` has all.
fn also_in(names: &[String]) -> String {
    match names.len() {
        0..=ALSO_IN_MAX => names.join(","),
        count => format!("{} and {} more", names[..ALSO_IN_MAX].join(","), count - ALSO_IN_MAX),
    }
}

fn measured(measure: &Measure) -> String {
    let Measure { method, against, rows, kl, same_top_share, perplexity, perplexity_of_source, .. } = measure;
    let (top, more) = (100.0 * same_top_share, 100.0 * measure.perplexity_change());
    format!(
        "{method} of chain {}: mean KL {:.2e}, 99% below {:.2e}, most {:.2e}; the same likeliest token {top:.2}% of {rows}; perplexity {perplexity_of_source:.2} to {perplexity:.2} ({more:+.2}%)",
        against.short(),
        kl.mean,
        kl.p99,
        kl.max
    )
}

fn adapters(model: &Shown) -> String {
    match model.chain.adapters.len() {
        0 => "-".to_owned(),
        count => format!("on {count} of {} blocks, {}", model.blocks.len(), human_bytes(model.adapter_bytes)),
    }
}

pub(super) fn diff(diff: &Diff) -> String {
    let mut out = String::new();
    let [a, b] = &diff.models;
    let write = |out: &mut String, text: std::fmt::Arguments<'_>| out.write_fmt(text).expect("writing to a String");
    write(&mut out, format_args!("{a}: {} blocks, {}\n", diff.block_counts[0], human_bytes(diff.bytes[0])));
    write(&mut out, format_args!("{b}: {} blocks, {}\n", diff.block_counts[1], human_bytes(diff.bytes[1])));
    write(
        &mut out,
        format_args!(
            "shared: {} blocks, {}; the first {} in a row\n",
            diff.shared_blocks,
            human_bytes(diff.shared_bytes),
            diff.common_prefix
        ),
    );
    write(&mut out, format_args!("tokenizer, template and special tokens: {}\n", if diff.same_text { "the same" } else { "different" }));
    if diff.differences.is_empty() {
        return out;
    }
    let mut rows = vec![row(["#", "KIND", "DIFFERS IN"])];
    for difference in &diff.differences {
        let kind = match difference.kinds {
            [Some(a), Some(b)] if a == b => a.to_owned(),
            [a, b] => format!("{} / {}", a.unwrap_or("-"), b.unwrap_or("-")),
        };
        let mut what: Vec<String> = difference.roles.clone();
        if difference.params {
            what.insert(0, "hyper-parameters".to_owned());
        }
        what.extend(difference.adapted_roles.iter().map(|role| format!("{role} (adapter)")));
        let place = match difference.places.map(|place| place.map_or_else(|| "-".to_owned(), |place| place.to_string())) {
            [a, b] if a == b => a,
            [a, b] => format!("{a} / {b}"),
        };
        rows.push(vec![place, kind, what.join(" ")]);
    }
    out.push('\n');
    out + &columns(&rows, &[0])
}

/// A proposal: matrices by role with their ranks, what is reproduced, bytes, and the measured change.
pub(super) fn unmerge(model: &ModelId, proposal: &Proposal, measured: Result<&Measured, &anyhow::Error>) -> String {
    let mut rows = vec![row(["#", "KIND", "RANK", "DIFFERENCE", "EXACT", "OTHER CHANGES"])];
    for block in proposal.differences.iter().filter(|block| !block.tensors.is_empty()) {
        let (mut ranks, mut others, mut proof, mut furthest) = (Vec::new(), Vec::new(), Proof::default(), 0.0f64);
        for (role, tensor) in &block.tensors {
            match (tensor.rank, tensor.proof) {
                (Some(rank), Some(of_tensor)) => {
                    ranks.push(format!("{}:{rank}", role.trim_end_matches(".weight")));
                    proof = proof.plus(of_tensor);
                    furthest = furthest.max(tensor.relative_rms.unwrap_or(0.0));
                }
                _ => others.push(role.clone()),
            }
        }
        let found = !ranks.is_empty();
        let if_found = |text: String| if found { text } else { "-".to_owned() };
        rows.push(vec![
            block.index.to_string(),
            kind(&proposal.adapted.blocks()[block.index].params).to_owned(),
            if_found(ranks.join(",")),
            if_found(format!("{:.2}%", 100.0 * furthest)),
            if_found(percent(proof.exact_count, proof.element_count)),
            if others.is_empty() { "-".to_owned() } else { others.join(" ") },
        ]);
    }
    let Proof { element_count, exact_count, changed_count, changed_exact_count, far_count } = proposal.proof;
    let mut out = columns(&rows, &[0, 3, 4]);
    let mut line = |text: std::fmt::Arguments<'_>| out.write_fmt(format_args!("{text}\n")).expect("writing to a String");
    line(format_args!("\n{model} is {} and adapters on {} matrices", proposal.adapted.base, proposal.matrix_count));
    line(format_args!(
        "of their elements {} come out exactly, of those that changed {}; {far_count} are more than one unit in the last place away",
        percent(exact_count, element_count),
        percent(changed_exact_count, changed_count)
    ));
    line(format_args!(
        "beyond the base it takes {} now, {} unmerged",
        human_bytes(proposal.adapted.bytes_before),
        human_bytes(proposal.adapted.bytes_after)
    ));
    out.push_str(&output_change("unmerged", measured));
    out
}

/// What was measured of base and adapters, here `name`, and of the base alone; or why it was not.
fn output_change(name: &str, measured: Result<&Measured, &anyhow::Error>) -> String {
    let Measured { adapted, base } = match measured {
        Ok(measured) => measured,
        Err(error) => return format!("the change of its output was not measured: {error:#}\n"),
    };
    let line = |name: &str, quality: &Quality| {
        format!(
            "{name:<10}  mean KL {:.2e}, 99% below {:.2e}, most {:.2e}; the same likeliest token {:.2}% of {}; perplexity {:.3}, the model's {:.3}\n",
            quality.divergence.mean,
            quality.divergence_p99,
            quality.divergence_max,
            100.0 * quality.same_top_share,
            quality.row_count,
            quality.perplexity,
            quality.perplexity / quality.excess.mean.exp()
        )
    };
    std::iter::once((name, adapted))
        .chain(base.as_ref().map(|base| ("base alone", base)))
        .map(|(name, quality)| line(name, quality))
        .collect()
}

/// A fine-tune as base and compressed differences: a line for each block, the worst of its matrices, and what that changes.
pub(super) fn compress(model: &ModelId, compressed: &Compressed, measured: Result<&Measured, &anyhow::Error>) -> String {
    let Compressed { adapted, method, matrices, given_up, own, .. } = compressed;
    let mut rows = vec![row(["#", "KIND", "MATRICES", "DIFFERENCE", "LOST"])];
    for of_block in matrices.chunk_by(|a, b| a.index == b.index) {
        let most = |of: fn(&CompressedMatrix) -> f64| of_block.iter().map(of).fold(0.0, f64::max);
        let roles: Vec<&str> = of_block.iter().map(|matrix| matrix.role.trim_end_matches(".weight")).collect();
        rows.push(vec![
            of_block[0].index.to_string(),
            kind(&adapted.blocks()[of_block[0].index].params).to_owned(),
            roles.join(","),
            format!("{:.3}%", 100.0 * most(|matrix| matrix.relative_rms)),
            format!("{:.1}%", 100.0 * most(|matrix| matrix.lost)),
        ]);
    }
    let mut out = columns(&rows, &[0, 3, 4]);
    let mut line = |text: std::fmt::Arguments<'_>| out.write_fmt(format_args!("{text}\n")).expect("writing to a String");
    line(format_args!("\n{model} is nearly {} and {method} of the differences of {} matrices", adapted.base, matrices.len()));
    line(format_args!(
        "beyond the base it takes {} now, {} compressed",
        human_bytes(adapted.bytes_before),
        human_bytes(adapted.bytes_after)
    ));
    for (places, what) in [(given_up, "left as the base has them"), (own, "kept as they are")] {
        if !places.is_empty() {
            line(format_args!("{what}: {}", roles_of(places)));
        }
    }
    out.push_str(&output_change("compressed", measured));
    out
}

/// Roles, with how many blocks each is of.
fn roles_of(places: &[(usize, String)]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    places.iter().for_each(|(_, role)| *counts.entry(role).or_default() += 1);
    let all: Vec<String> = counts.into_iter().map(|(role, count)| format!("{role} of {count}")).collect();
    format!("{} blocks", all.join(", "))
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.3}%", 100.0 * part as f64 / whole.max(1) as f64)
}

pub(super) fn verify(report: &VerifyReport) -> String {
    let mut out = String::new();
    for damage in &report.damage {
        out.push_str(&format!("{}: {}\n", damage.object, damage.reason));
        for block in &damage.blocks {
            out.push_str(&format!("  block {block}\n"));
        }
        for adapter in &damage.adapters {
            out.push_str(&format!("  adapter {adapter}\n"));
        }
        if !damage.models.is_empty() {
            out.push_str(&format!("  models {}\n", damage.models.join(", ")));
        }
    }
    let state = if report.damage.is_empty() { "all sound".to_owned() } else { format!("{} damaged or missing", report.damage.len()) };
    let unreferenced = report.unreferenced_count;
    out + &format!(
        "{} models, {} objects, {}: {state}; {unreferenced} unreferenced\n",
        report.model_count,
        report.object_count,
        human_bytes(report.bytes)
    )
}

pub(super) fn gc(report: &GcReport, dry_run: bool) -> String {
    let verb = if dry_run { "would free" } else { "freed" };
    let mut out = format!(
        "{verb} {}: {} chains, {} blocks, {} adapters, {} tensors, {} assets",
        human_bytes(report.bytes),
        report.chain_count,
        report.block_count,
        report.adapter_count,
        report.tensor_count,
        report.asset_count
    );
    if report.equivalence_count > 0 {
        out.push_str(&format!(", {} records of equivalence", report.equivalence_count));
    }
    if report.sketch_count > 0 {
        out.push_str(&format!(", {} sketches", report.sketch_count));
    }
    if report.measure_count > 0 {
        out.push_str(&format!(", {} measures", report.measure_count));
    }
    if report.profile_count > 0 {
        out.push_str(&format!(", {} profiles", report.profile_count));
    }
    if report.staged_count > 0 {
        out.push_str(&format!(", {} unfinished writes", report.staged_count));
    }
    if report.young_count > 0 {
        let bytes = human_bytes(report.young_bytes);
        out.push_str(&format!("; {} objects ({bytes}) that nothing names are younger than the grace period", report.young_count));
    }
    out + "\n"
}

pub(super) fn repair(report: &RepairReport) -> String {
    let mut out: String = report.repaired.iter().map(|object| format!("repaired {object}\n")).collect();
    for (object, reason) in &report.left {
        out.push_str(&format!("left {object}: {reason}\n"));
    }
    out
}

/// Costs of a report's models and tenants, `rows_max` of each, and its sums.
pub(super) fn report(report: &Report, rows_max: usize) -> String {
    let costs = |name: &str, memory: &Cost, disk: &Cost| {
        let figures = [memory.alone_bytes, memory.fair_bytes, memory.own_bytes, disk.fair_bytes, disk.own_bytes];
        std::iter::once(name.to_owned()).chain(figures.map(human_bytes)).collect::<Vec<_>>()
    };
    let head = |what| row([what, "ALONE", "FAIR SHARE", "OWN", "DISK, FAIR", "DISK, OWN"]);
    let right = [1, 2, 3, 4, 5];
    let models = report.models.iter().take(rows_max).map(|model| costs(&model.model, &model.memory, &model.disk));
    let mut out = format!("\n{}", columns(&std::iter::once(head("MODEL")).chain(models).collect::<Vec<_>>(), &right));
    out.push_str(&left_out(report.models.len(), rows_max));
    if report.tenants.len() > 1 {
        let tenants = report.tenants.iter().take(rows_max).map(|tenant| costs(&tenant.tenant, &tenant.memory, &tenant.disk));
        out.push_str(&format!("\n{}", columns(&std::iter::once(head("TENANT")).chain(tenants).collect::<Vec<_>>(), &right)));
        out.push_str(&left_out(report.tenants.len(), rows_max));
    }
    let totals = &report.totals;
    let less = |bytes: u64| match totals.alone_bytes {
        0 => String::new(),
        alone => format!(" ({:.0}% less)", (1.0 - bytes as f64 / alone as f64) * 100.0),
    };
    out.push_str(&format!(
        "\n{}, {}: {} blocks, {} of them distinct, and {} distinct adapters\nin memory {} alone, {} together{}; on disk {}{}\n",
        counted(totals.model_count, "model"),
        counted(totals.tenant_count, "tenant"),
        totals.placed_count,
        totals.block_count,
        totals.adapter_count,
        human_bytes(totals.alone_bytes),
        human_bytes(totals.resident_bytes),
        less(totals.resident_bytes),
        human_bytes(totals.stored_bytes),
        less(totals.stored_bytes)
    ));
    if totals.other_stored_bytes > 0 {
        let bytes = human_bytes(totals.other_stored_bytes);
        out.push_str(&format!("{bytes} more on disk belong to no model now: earlier chains, bases of others, what `zoo gc` would free\n"));
    }
    for broken in report.broken.iter().take(rows_max) {
        out.push_str(&format!("broken: {}: {}\n", broken.model, broken.error));
    }
    out + &left_out(report.broken.len(), rows_max)
}

fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn left_out(count: usize, rows_max: usize) -> String {
    if count > rows_max { format!("... and {} more: --rows {count} shows all\n", count - rows_max) } else { String::new() }
}

/// How alike the weights of two models are, where they differ.
pub(super) fn comparison(comparison: &Comparison) -> String {
    let [a, b] = &comparison.models;
    let mut rows = vec![row(["#", "KIND", "TENSOR", "EQUAL", "DIFFERENCE", "COSINE"])];
    let mut same_count = 0;
    let percent = |share: f64| format!("{:.2}%", share * 100.0);
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    for (index, place) in comparison.places.iter().enumerate() {
        let kind = match place.kinds {
            [Some(a), Some(b)] if a != b => format!("{a} / {b}"),
            [a, b] => a.or(b).unwrap_or("-").to_owned(),
        };
        for (role, similarity) in &place.tensors {
            let figures = match similarity {
                TensorSimilarity::Same { .. } => {
                    same_count += 1;
                    continue;
                }
                TensorSimilarity::Apart => ["-".to_owned(), "-".to_owned(), "-".to_owned()],
                TensorSimilarity::Compared(measures) => [
                    percent(measures.equal_share),
                    or_none(measures.relative_rms.map(percent)),
                    or_none(measures.cosine.map(|cosine| format!("{cosine:.6}"))),
                ],
            };
            rows.push([index.to_string(), kind.clone(), role.clone()].into_iter().chain(figures).collect());
        }
    }
    let differ_count = rows.len() - 1;
    let mut out = format!("\n{b} against {a}: {same_count} tensors are the same, {differ_count} differ\n");
    if differ_count > 0 {
        out.push_str(&columns(&rows, &[0, 3, 4, 5]));
    }
    out
}
