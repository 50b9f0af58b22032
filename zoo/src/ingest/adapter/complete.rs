//! Whether an adapter has all that its configuration says was trained: a file that lacks some of it would be served as a model that
//! nobody made. What peft itself explains (layers, exclusions, patterns) is a note at most.

use std::collections::BTreeSet;

use super::error::PeftError;
use super::keys::{self, Sites};
use crate::family::peft::LoraConfig;

/// What is in the file, by path in the base as the file has it.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Modules that have factors.
    pub(super) factors: BTreeSet<String>,
    /// Tensors saved whole.
    pub(super) whole: BTreeSet<String>,
}

/// Checks that nothing is missing. Returns notes on what is, but may be meant so.
///
/// # Errors
/// The first entry of the configuration, or module, of which there are no tensors.
pub(super) fn check(contents: &Contents, config: &LoraConfig, sites: &Sites) -> Result<Vec<String>, PeftError> {
    if contents.factors.is_empty() && contents.whole.is_empty() {
        return Err(PeftError::Empty);
    }
    if let Some(module) = contents.factors.iter().find(|module| config.is_excluded(module)) {
        return Err(PeftError::Excluded { module: module.clone() });
    }
    for entry in config.modules_to_save() {
        if !contents.whole.iter().any(|path| LoraConfig::is_saved(entry, module_of(path))) {
            return Err(PeftError::NoTensors { key: "modules_to_save", entry: entry.clone() });
        }
    }
    biases(contents, config, sites)?;
    let mut notes = targets(contents, config, sites)?;
    notes.extend(layers(contents, config, sites)?);
    Ok(notes)
}

fn module_of(path: &str) -> &str {
    path.rsplit_once('.').map_or(path, |(module, _)| module)
}

/// `bias` over a base that has some.
fn biases(contents: &Contents, config: &LoraConfig, sites: &Sites) -> Result<(), PeftError> {
    if !config.biases || contents.whole.iter().any(|path| path.ends_with(".bias")) {
        return Ok(());
    }
    let trained = |name: &str| config.all_biases || contents.factors.iter().any(|module| keys::bare(module) == module_of(name));
    match sites.names().find(|name| name.ends_with(".bias") && trained(name)) {
        Some(name) => Err(PeftError::NoBiases(name.to_owned())),
        None => Ok(()),
    }
}

/// Entries of `target_modules` that have factors nowhere. One that the base has no module for trained nothing.
fn targets(contents: &Contents, config: &LoraConfig, sites: &Sites) -> Result<Vec<String>, PeftError> {
    let mut notes = Vec::new();
    for entry in config.target_modules() {
        let names = |module: &str| LoraConfig::is_named(entry, module);
        if contents.factors.iter().any(|module| names(module)) || contents.whole.iter().any(|path| names(module_of(path))) {
            continue;
        }
        let in_base = |name: &str| name.ends_with(".weight") && LoraConfig::is_named(keys::bare(entry), module_of(name));
        if !config.excludes() && sites.names().any(in_base) {
            return Err(PeftError::NoTensors { key: "target_modules", entry: entry.clone() });
        }
        notes.push(format!("target_modules names `{entry}`, of which the adapter has no tensors"));
    }
    Ok(notes)
}

/// Modules without factors that target_modules names, or that have them in other layers.
fn layers(contents: &Contents, config: &LoraConfig, sites: &Sites) -> Result<Vec<String>, PeftError> {
    let Some(first) = contents.factors.first() else { return Ok(Vec::new()) };
    let prefix = &first[..first.len() - keys::bare(first).len()];
    let present: BTreeSet<&str> = contents.factors.iter().map(|module| keys::bare(module)).collect();
    let kinds: BTreeSet<String> = present.iter().map(|module| kind(module)).collect();
    let listed = !config.target_modules().is_empty();
    let is_missing = |module: &&str| {
        let path = format!("{prefix}{module}");
        let expected = config.targets(&path) && !config.saves(&path) && (listed || kinds.contains(&kind(module)));
        expected && !present.contains(module)
    };
    let missing: Vec<&str> = sites.linear_modules().filter(is_missing).collect();
    match missing.first() {
        None => Ok(Vec::new()),
        Some(module) if listed && !config.has_layers() && !config.excludes() => {
            Err(PeftError::MissingModule { module: format!("{prefix}{module}") })
        }
        Some(module) => {
            let more = if missing.len() > 1 { format!(" (nor do {} other modules)", missing.len() - 1) } else { String::new() };
            Ok(vec![format!("`{prefix}{module}` has no factors, though its like in other layers has{more}")])
        }
    }
}

/// A module's path without its layer.
fn kind(module: &str) -> String {
    module.split('.').map(|part| if part.parse::<u64>().is_ok() { "*" } else { part }).collect::<Vec<_>>().join(".")
}
