//! The small files of a checkpoint: tokenizer, chat template, card, generation defaults.

use serde_json::{Map, Value, json};

use super::config::number;
use super::{ExportError, Files, json as written};
use crate::inspect::Resolved;
use crate::manifest::Defaults;
use crate::measures::Measure;
use crate::store::Zoo;

/// All files but the weights.
pub(super) async fn files(zoo: &Zoo, model: &Resolved, config: Value) -> Result<Files, ExportError> {
    let (assets, tokens) = (&model.chain.assets, &model.chain.tokens);
    let mut files: Files = vec![("config.json", written(&config))];
    let kept = [(assets.tokenizer, "tokenizer.json"), (assets.chat_template, "chat_template.jinja"), (assets.card, "README.md")];
    for (digest, name) in kept {
        if let Some(digest) = digest {
            files.push((name, zoo.read_asset(digest).await?.to_vec()));
        }
    }
    // What is no longer the model of the card says so.
    let measures = zoo.read_measures(model.name.chain).await?;
    if !measures.is_empty() {
        let lines = measures.iter().map(|measure| {
            let Measure { method, against, kl, rows, .. } = measure;
            format!(
                "- {method}, of chain {}: its next-token distributions differ by a mean KL of {:.2e} over {rows} tokens\n",
                against.short(),
                kl.mean
            )
        });
        let note = format!("\n## This is an approximation\n\nMade from the model of this card:\n\n{}", lines.collect::<String>());
        match files.iter_mut().find(|(name, _)| *name == "README.md") {
            Some((_, card)) => card.extend(note.into_bytes()),
            None => files.push(("README.md", note.into_bytes())),
        }
    }
    let mut tokenizer = Map::from_iter([
        ("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast")),
        ("clean_up_tokenization_spaces".to_owned(), json!(false)),
        ("model_max_length".to_owned(), json!(model.chain.context_tokens)),
    ]);
    for (key, text) in [("bos_token", &tokens.bos_text), ("eos_token", &tokens.eos_text)] {
        tokenizer.extend(text.clone().map(|text| (key.to_owned(), json!(text))));
    }
    files.push(("tokenizer_config.json", written(&Value::Object(tokenizer))));
    let defaults = &model.chain.defaults;
    let mut generation = Map::new();
    generation.extend(tokens.bos.map(|id| ("bos_token_id".to_owned(), json!(id))));
    if !tokens.eos.is_empty() {
        generation.insert("eos_token_id".to_owned(), json!(tokens.eos));
    }
    // transformers has no temperature of 0: it does not sample.
    let greedy = defaults.temperature == Some(0.0);
    let sampling = [
        ("temperature", defaults.temperature.filter(|_| !greedy)),
        ("top_p", defaults.top_p),
        ("repetition_penalty", defaults.repetition_penalty),
    ];
    generation.extend(sampling.into_iter().filter_map(|(key, value)| Some((key.to_owned(), number(value?)))));
    generation.extend(defaults.top_k.map(|value| ("top_k".to_owned(), json!(value))));
    if *defaults != Defaults::default() {
        generation.insert("do_sample".to_owned(), json!(!greedy));
    }
    files.push(("generation_config.json", written(&Value::Object(generation))));
    Ok(files)
}
