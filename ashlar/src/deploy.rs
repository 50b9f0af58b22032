//! `ashlar deploy`: how models are to be served. It changes the registry's deployment records, so that it may run beside a server; a
//! record stays when its name points to another chain, and may be there before the model.

use std::sync::Arc;

use anyhow::Context;
use ashlar_registry::record::{self, DeploymentRecord};
use ashlar_registry::{Registry, Swap, key};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::{Place, StoreError, Zoo};
use clap::Subcommand;

use crate::output;

/// What to do with deployments.
#[derive(Debug, Subcommand)]
pub enum DeployCommand {
    /// Set how a model is served; what is not named stays as it is
    #[command(group = clap::ArgGroup::new("settings").required(true).multiple(true))]
    Set {
        /// TENANT/MODEL
        model: ModelId,
        /// Milliseconds from admission to the first token; 0: no target
        #[arg(long, group = "settings", value_parser = milliseconds, allow_negative_numbers = true)]
        ttft_ms: Option<u32>,
        /// Milliseconds between two tokens; 0: no target
        #[arg(long, group = "settings", value_parser = milliseconds, allow_negative_numbers = true)]
        gap_ms: Option<u32>,
        /// Serve it by other models' blocks too, where `ashlar zoo equivalence` measured that all of them together stay within a mean KL of so many
        /// nats a token; 0: exactly as it is
        #[arg(long, value_name = "KL", group = "settings", value_parser = divergence, allow_negative_numbers = true)]
        equivalent_kl: Option<f64>,
    },
    /// List the models that have settings of their own
    List,
    /// Drop a model's settings: targets as executors are set, and its own blocks
    Clear {
        /// TENANT/MODEL
        model: ModelId,
    },
}

fn divergence(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|kl: &f64| kl.is_finite() && *kl >= 0.0).ok_or_else(|| "expected nats a token, 0 or more, as 0.01".to_owned())
}

fn milliseconds(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("expected whole milliseconds, 0 to {}", u32::MAX))
}

/// Does it. A model that the zoo at `zoo` does not have is told of, where there is a zoo.
///
/// # Errors
/// A registry out of reach, or a record that cannot be read.
pub async fn run(command: DeployCommand, registry: Arc<dyn Registry>, zoo: &Place) -> anyhow::Result<()> {
    let text = match command {
        DeployCommand::Set { model, ttft_ms, gap_ms, equivalent_kl } => {
            let text = set(&*registry, &model, DeploymentRecord { ttft_ms, gap_ms, equivalent_kl }).await?;
            note_missing(zoo, &model, "its settings wait").await;
            text
        }
        DeployCommand::List => list(&*registry).await?,
        DeployCommand::Clear { model } => {
            let key = key::deployment(&model.to_string());
            let had = registry.get(&key).await.with_context(|| format!("read the settings of {model}"))?.is_some();
            registry.delete(&key).await.with_context(|| format!("drop the settings of {model}"))?;
            let note = if had { "" } else { ": it had no settings" };
            format!("{model} has the executors' targets and its own blocks{note}\n")
        }
    };
    Ok(output::text(text)?)
}

async fn set(registry: &dyn Registry, model: &ModelId, new: DeploymentRecord) -> anyhow::Result<String> {
    let key = key::deployment(&model.to_string());
    loop {
        let entry = registry.get(&key).await.with_context(|| format!("read the settings of {model}"))?;
        let old = entry.as_ref().map(record::parse::<DeploymentRecord>).transpose()?.unwrap_or_default();
        let record = DeploymentRecord {
            ttft_ms: new.ttft_ms.or(old.ttft_ms),
            gap_ms: new.gap_ms.or(old.gap_ms),
            equivalent_kl: new.equivalent_kl.or(old.equivalent_kl),
        };
        let expected = entry.as_ref().map(|entry| entry.revision);
        let swap = registry.compare_and_swap(&key, expected, &record::to_value(&record), None).await;
        if let Swap::Done(_) = swap.with_context(|| format!("write the settings of {model}"))? {
            return Ok(line(&model.to_string(), &record));
        }
    }
}

/// Tells on standard error that the zoo has no such model, and what waits for it.
pub async fn note_missing(zoo: &Place, model: &ModelId, waits: &str) {
    if is_missing(zoo, model).await {
        eprintln!("no such model yet: {model} is not in zoo {zoo}; {waits} for it");
    }
}

/// Whether there is a zoo, and it has no such name. A zoo that cannot be read says nothing of it.
async fn is_missing(zoo: &Place, model: &ModelId) -> bool {
    let Ok(zoo) = Zoo::open_place(zoo).await else { return false };
    matches!(zoo.read_model(model).await, Err(StoreError::Missing { .. }))
}

async fn list(registry: &dyn Registry) -> anyhow::Result<String> {
    let mut text = String::new();
    for entry in registry.get_prefix(key::DEPLOYMENTS).await.context("read the deployments")? {
        let model = entry.key.strip_prefix(key::DEPLOYMENTS).unwrap_or(&entry.key);
        text += &line(model, &record::parse(&entry)?);
    }
    if text.is_empty() {
        text.push_str("no model has settings of its own: ashlar deploy set TENANT/MODEL --gap-ms N\n");
    }
    Ok(text)
}

fn line(model: &str, record: &DeploymentRecord) -> String {
    let target = |milliseconds: Option<u32>| match milliseconds {
        None => "as executors are set".to_owned(),
        Some(0) => "no target".to_owned(),
        Some(milliseconds) => format!("{milliseconds} ms"),
    };
    let blocks = record.kl_max().map_or_else(|| "exact".to_owned(), |kl| format!("equivalent within {kl}"));
    format!("{model}  first token: {}  gap: {}  blocks: {blocks}\n", target(record.ttft_ms), target(record.gap_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_registry::embedded::Embedded;

    #[tokio::test]
    async fn settings_are_set_one_by_one_and_listed() {
        let registry = Embedded::in_memory();
        let model: ModelId = "acme/m".parse().unwrap();
        let nothing = DeploymentRecord::default();
        assert!(list(&registry).await.unwrap().starts_with("no model has settings"));
        set(&registry, &model, DeploymentRecord { gap_ms: Some(50), ..nothing }).await.unwrap();
        assert_eq!(list(&registry).await.unwrap(), "acme/m  first token: as executors are set  gap: 50 ms  blocks: exact\n");
        set(&registry, &model, DeploymentRecord { ttft_ms: Some(0), ..nothing }).await.unwrap();
        assert_eq!(list(&registry).await.unwrap(), "acme/m  first token: no target  gap: 50 ms  blocks: exact\n");
        assert_eq!(registry.get("deployments/acme/m").await.unwrap().unwrap().value, r#"{"ttft_ms":0,"gap_ms":50}"#);
        set(&registry, &model, DeploymentRecord { equivalent_kl: Some(0.01), ..nothing }).await.unwrap();
        assert_eq!(list(&registry).await.unwrap(), "acme/m  first token: no target  gap: 50 ms  blocks: equivalent within 0.01\n");
        set(&registry, &model, DeploymentRecord { equivalent_kl: Some(0.0), ..nothing }).await.unwrap();
        assert!(list(&registry).await.unwrap().ends_with("blocks: exact\n"));
    }

    #[test]
    fn a_bound_is_a_number_that_can_be_one() {
        assert_eq!(divergence("0.01"), Ok(0.01));
        for text in ["-1", "nan", "inf", "", "much"] {
            assert!(divergence(text).is_err(), "{text}");
        }
    }
}
