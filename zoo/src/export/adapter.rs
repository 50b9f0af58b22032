//! A PEFT directory out of a model that is base and adapter: factors as they were added, under the paths that transformers' modules have.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::tensors::{Tensor, made, place, stored};
use super::{ExportError, Files, json as written};
use crate::family::names::{Names, Rows};
use crate::ingest::gather::element_bytes;
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
        tensors.push(expand(zoo, module, name("lora_B")).await?);
    }
    let config = config(&modules, names, &base);
    Ok((tensors, vec![("adapter_config.json", written(&config))]))
}

/// The factor `b` of a whole module. What of it is zero was left out when it was added.
async fn expand(zoo: &Zoo, module: &Module, name: String) -> Result<Tensor, ExportError> {
    let first = &module.parts.first().expect("a module has a part").1;
    let row_bytes = usize::try_from(first.shape[1]).expect("it is in memory") * element_bytes(first.dtype);
    let zeros = |rows: u64| vec![0; usize::try_from(rows).expect("it is in memory") * row_bytes];
    let (mut bytes, mut rows, mut all) = (Vec::new(), 0, first.shape[0]);
    for (place, part) in &module.parts {
        if let Rows::Range { from, of, .. } = place {
            if *from < rows || part.shape[1] != first.shape[1] || part.dtype != first.dtype {
                return Err(ExportError::Parts(name));
            }
            bytes.extend(zeros(from - rows));
            (rows, all) = (*from, *of);
        }
        bytes.extend_from_slice(zoo.map_tensor(part).await?.as_ref());
        rows += part.shape[0];
    }
    bytes.extend(zeros(all.saturating_sub(rows)));
    Ok(made(name, first.dtype, vec![all, first.shape[1]], bytes))
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
            let piece = names.piece(place(*index, model.blocks.len()), params, role);
            let Change::LowRank { scale, a, b } = change else { return Err(ExportError::OneBit(piece.name)) };
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
        // Their paths: a name alone would mean those of all layers.
        "target_modules": modules.keys().collect::<Vec<_>>(),
        "bias": "none",
        "fan_in_fan_out": matches!(names, Names::Gpt2 { .. }),
        "inference_mode": true,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "use_rslora": false,
    })
}
