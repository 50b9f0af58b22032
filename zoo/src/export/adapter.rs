//! A PEFT directory out of a model that is base and adapter: factors as they were added, under the paths that transformers' modules have.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::tensors::{Tensor, place, stored};
use super::{ExportError, Files, json as written};
use crate::family::names::{Names, Rows};
use crate::inspect::Resolved;
use crate::manifest::{Change, TensorRef};
use crate::model_id::ModelId;
use crate::store::Zoo;

/// A module's factors: one `a`, and for each of its parts its rows of `b`.
#[derive(Debug)]
struct Module {
    scale: f32,
    a: TensorRef,
    parts: Vec<(Rows, TensorRef)>,
}

/// The tensors and the other files of the adapter.
pub(super) async fn of_model(zoo: &Zoo, model: &Resolved, names: &Names) -> Result<(Vec<Tensor>, Files), ExportError> {
    let base = base_of(zoo, model).await?;
    let modules = modules(model, names)?;
    let mut tensors = Vec::with_capacity(2 * modules.len());
    for (path, module) in &modules {
        let name = |factor: &str| format!("base_model.model.{path}.{factor}.weight");
        let a = zoo.map_tensor(&module.a).await?;
        tensors.push(stored(name("lora_A"), module.a.dtype, module.a.shape.clone(), vec![a]));
        let (mut parts, mut rows) = (Vec::new(), 0);
        for (place, part) in &module.parts {
            if matches!(place, Rows::Range { from, .. } if *from != rows) {
                return Err(ExportError::Parts(name("lora_B")));
            }
            rows += part.shape[0];
            parts.push(zoo.map_tensor(part).await?);
        }
        if matches!(module.parts.last(), Some((Rows::Range { of, .. }, _)) if *of != rows) {
            return Err(ExportError::Parts(name("lora_B")));
        }
        let first = &module.parts.first().expect("a module has a part").1;
        tensors.push(stored(name("lora_B"), first.dtype, vec![rows, first.shape[1]], parts));
    }
    let config = config(&modules, names, &base);
    Ok((tensors, vec![("adapter_config.json", written(&config))]))
}

/// The model that it is over, whose blocks it has all.
async fn base_of(zoo: &Zoo, model: &Resolved) -> Result<String, ExportError> {
    let Some(base) = model.name.parent.clone() else { return Err(ExportError::Base("no model is named that it is over".to_owned())) };
    let Ok(id) = base.parse::<ModelId>() else { return Err(ExportError::Base(format!("`{base}` is no model's name"))) };
    let of_base = zoo.resolve(&id).await.map_err(|error| ExportError::Base(error.to_string()))?;
    match of_base.chain.blocks == model.chain.blocks && of_base.chain.adapters.is_empty() {
        true => Ok(base),
        false => Err(ExportError::Base(format!("it has whole tensors of its own beside the factors, or {base} is another model by now"))),
    }
}

/// Modules by their paths.
fn modules(model: &Resolved, names: &Names) -> Result<BTreeMap<String, Module>, ExportError> {
    let mut modules: BTreeMap<String, Module> = BTreeMap::new();
    for (index, adapter) in &model.adapters {
        let params = &model.blocks[*index].params;
        for (role, change) in &adapter.changes {
            let Change::LowRank { scale, a, b } = change;
            let piece = names.piece(place(*index, model.blocks.len()), params, role);
            let path = piece.name.strip_suffix(".weight").unwrap_or(&piece.name).to_owned();
            let known = modules.entry(path).or_insert_with(|| Module { scale: *scale, a: a.clone(), parts: Vec::new() });
            if (known.scale, &known.a) != (*scale, a) {
                return Err(ExportError::Parts(piece.name));
            }
            known.parts.push((piece.rows, b.clone()));
        }
    }
    for module in modules.values_mut() {
        module.parts.sort_by_key(|(rows, _)| match rows {
            Rows::Range { from, .. } => *from,
            Rows::All | Rows::Unpermuted { .. } => 0,
        });
    }
    Ok(modules)
}

fn config(modules: &BTreeMap<String, Module>, names: &Names, base: &str) -> Value {
    let rank = |module: &Module| module.a.shape[0];
    // alpha / rank is the scale, in the arithmetic of whoever reads it.
    let alpha = |module: &Module| f64::from(module.scale) * rank(module) as f64;
    let first = modules.values().next().expect("an adapter changes something");
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (path, module) in modules {
        if rank(module) != rank(first) {
            ranks.insert(path.clone(), json!(rank(module)));
        }
        if alpha(module).to_bits() != alpha(first).to_bits() {
            alphas.insert(path.clone(), json!(alpha(module)));
        }
    }
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank(first),
        "lora_alpha": alpha(first),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": targets(modules.keys()),
        "bias": "none",
        "fan_in_fan_out": matches!(names, Names::Gpt2 { .. }),
        "inference_mode": true,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "use_rslora": false,
    })
}

/// The modules' own names where each is changed in all layers that have any change, and else their paths.
fn targets<'a>(paths: impl Iterator<Item = &'a String>) -> Vec<String> {
    let paths: Vec<&String> = paths.collect();
    let split = |path: &'a String| path.rsplit_once('.').map_or(("", path.as_str()), |(parent, own)| (parent, own));
    let mut parents: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for path in &paths {
        let (parent, own) = split(path);
        parents.entry(own).or_default().insert(parent);
    }
    let layers = |own: &str| parents[own].iter().map(|parent| layer(parent)).collect::<BTreeSet<_>>();
    let own: BTreeSet<&str> = parents.keys().copied().collect();
    let all: BTreeSet<Option<&str>> = own.iter().flat_map(|own| layers(own)).collect();
    let (first, last) = (0, all.len());
    let from_the_start = (first..last).all(|number| all.contains(&Some(number.to_string().as_str())));
    match from_the_start && own.iter().all(|own| layers(own) == all) {
        true => own.into_iter().map(str::to_owned).collect(),
        false => paths.into_iter().cloned().collect(),
    }
}

/// The number of the layer that a path is in.
fn layer(path: &str) -> Option<&str> {
    path.split('.').find(|part| part.bytes().all(|byte| byte.is_ascii_digit()) && !part.is_empty())
}
