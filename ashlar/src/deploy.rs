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
    /// Set targets of a model; those that are not named stay as they are
    #[command(group = clap::ArgGroup::new("targets").required(true).multiple(true))]
    Set {
        /// TENANT/MODEL
        model: ModelId,
        /// Milliseconds from admission to the first token; 0: no target
        #[arg(long, group = "targets", value_parser = milliseconds, allow_negative_numbers = true)]
        ttft_ms: Option<u32>,
        /// Milliseconds between two tokens; 0: no target
        #[arg(long, group = "targets", value_parser = milliseconds, allow_negative_numbers = true)]
        gap_ms: Option<u32>,
    },
    /// List the models that have targets of their own
    List,
    /// Drop a model's targets: those that executors are set to hold again
    Clear {
        /// TENANT/MODEL
        model: ModelId,
    },
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
        DeployCommand::Set { model, ttft_ms, gap_ms } => {
            let text = set(&*registry, &model, DeploymentRecord { ttft_ms, gap_ms }).await?;
            note_missing(zoo, &model, "its targets wait").await;
            text
        }
        DeployCommand::List => list(&*registry).await?,
        DeployCommand::Clear { model } => {
            registry.delete(&key::deployment(&model.to_string())).await.with_context(|| format!("drop the targets of {model}"))?;
            format!("{model} has the executors' targets\n")
        }
    };
    Ok(output::text(text)?)
}

async fn set(registry: &dyn Registry, model: &ModelId, new: DeploymentRecord) -> anyhow::Result<String> {
    let key = key::deployment(&model.to_string());
    loop {
        let entry = registry.get(&key).await.with_context(|| format!("read the targets of {model}"))?;
        let old = entry.as_ref().map(record::parse::<DeploymentRecord>).transpose()?.unwrap_or_default();
        let record = DeploymentRecord { ttft_ms: new.ttft_ms.or(old.ttft_ms), gap_ms: new.gap_ms.or(old.gap_ms) };
        let expected = entry.as_ref().map(|entry| entry.revision);
        let swap = registry.compare_and_swap(&key, expected, &record::to_value(&record), None).await;
        if let Swap::Done(_) = swap.with_context(|| format!("write the targets of {model}"))? {
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
        text.push_str("no model has targets of its own: ashlar deploy set TENANT/MODEL --gap-ms N\n");
    }
    Ok(text)
}

fn line(model: &str, record: &DeploymentRecord) -> String {
    let target = |milliseconds: Option<u32>| match milliseconds {
        None => "as executors are set".to_owned(),
        Some(0) => "no target".to_owned(),
        Some(milliseconds) => format!("{milliseconds} ms"),
    };
    format!("{model}  first token: {}  gap: {}\n", target(record.ttft_ms), target(record.gap_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_registry::embedded::Embedded;

    #[tokio::test]
    async fn targets_are_set_one_by_one_and_listed() {
        let registry = Embedded::in_memory();
        let model: ModelId = "acme/m".parse().unwrap();
        assert!(list(&registry).await.unwrap().starts_with("no model has targets"));
        set(&registry, &model, DeploymentRecord { ttft_ms: None, gap_ms: Some(50) }).await.unwrap();
        assert_eq!(list(&registry).await.unwrap(), "acme/m  first token: as executors are set  gap: 50 ms\n");
        set(&registry, &model, DeploymentRecord { ttft_ms: Some(0), gap_ms: None }).await.unwrap();
        assert_eq!(list(&registry).await.unwrap(), "acme/m  first token: no target  gap: 50 ms\n");
        assert_eq!(registry.get("deployments/acme/m").await.unwrap().unwrap().value, r#"{"ttft_ms":0,"gap_ms":50}"#);
    }
}
