//! Everything of a checkpoint that is no weight: tokenizer, chat template, card, special tokens, generation defaults,
//! licence.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use bytes::Bytes;
use serde_json::Value as Json;

use super::IngestError;
use super::checkpoint::{Checkpoint, Directory, Kind, read_small};
use crate::family::{Config, ConfigError};
use crate::formats::gguf::Value;
use crate::manifest::{Defaults, Tokens};
use crate::store::ASSET_BYTES_MAX;
use crate::tokenizer::{self, Fitted, TokenizerError};

const TEMPLATE_BYTES_MAX: u64 = 4 << 20;
const CARD_BYTES_MAX: u64 = 4 << 20;

/// What [`read`] found.
#[derive(Debug, Default)]
pub(super) struct Text {
    pub(super) tokenizer: Option<Bytes>,
    pub(super) chat_template: Option<Bytes>,
    pub(super) card: Option<Bytes>,
    pub(super) tokens: Tokens,
    pub(super) defaults: Defaults,
    pub(super) licence: Option<String>,
    pub(super) notes: Vec<String>,
}

/// Reads and checks it against an embedding of `vocab` rows.
pub(super) fn read(checkpoint: &Checkpoint, vocab: u32) -> Result<Text, IngestError> {
    match &checkpoint.kind {
        Kind::Directory(directory) => from_directory(directory, vocab),
        Kind::Gguf(metadata) => from_gguf(metadata, vocab),
    }
}

fn from_directory(directory: &Directory, vocab: u32) -> Result<Text, IngestError> {
    let path = &directory.path;
    let bytes = read_small(&path.join("tokenizer.json"), ASSET_BYTES_MAX)?.ok_or(TokenizerError::Missing("tokenizer.json"))?;
    let fitted = tokenizer::fit(bytes, vocab)?;
    let config = directory.tokenizer_config.clone().unwrap_or_default();
    let generation = directory.generation_config.clone().unwrap_or_default();

    let bos_text = token_text(&config, "bos_token")?;
    let eos_text = token_text(&config, "eos_token")?;
    let id = |text: &Option<String>| text.as_deref().and_then(|text| fitted.tokenizer.token_to_id(text));
    let mut eos: BTreeSet<u32> = id(&eos_text).into_iter().collect();
    let model = match directory.config.object("text_config")? {
        Some(text) => text,
        None => directory.config.clone(),
    };
    for source in [&model, &directory.config, &generation] {
        eos.extend(source.token_ids("eos_token_id")?);
    }
    let bos = match id(&bos_text) {
        Some(bos) => Some(bos),
        None => model.token_ids("bos_token_id")?.first().copied(),
    };
    let tokens = tokens(&fitted, bos, eos, bos_text, eos_text, vocab);

    let chat_template = match read_small(&path.join("chat_template.jinja"), TEMPLATE_BYTES_MAX)? {
        Some(bytes) => Some(Bytes::from(bytes)),
        None => template_of(&config)?.map(Bytes::from),
    };
    let card = read_small(&path.join("README.md"), CARD_BYTES_MAX)?;
    let licence = card.as_deref().and_then(licence_of);
    let defaults = defaults(&generation)?;
    Ok(Text { tokenizer: Some(fitted.json), chat_template, card: card.map(Bytes::from), tokens, defaults, licence, notes: fitted.notes })
}

fn from_gguf(metadata: &BTreeMap<String, Value>, vocab: u32) -> Result<Text, IngestError> {
    let fitted = tokenizer::fit(tokenizer::from_gguf(metadata)?, vocab)?;
    let id = |key: &str| metadata.get(key).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
    let bos = id("tokenizer.ggml.bos_token_id");
    let end_keys = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
    let mut eos: BTreeSet<u32> = end_keys.iter().filter_map(|key| id(key)).collect();
    eos.extend(tokenizer::end_tokens(metadata));
    let text = |id: Option<u32>| id.and_then(|id| fitted.tokenizer.id_to_token(id));
    let (bos_text, eos_text) = (text(bos), text(id("tokenizer.ggml.eos_token_id")));
    let tokens = tokens(&fitted, bos, eos, bos_text, eos_text, vocab);
    let owned = |key: &str| metadata.get(key).and_then(Value::as_str).map(str::to_owned);
    Ok(Text {
        tokenizer: Some(fitted.json),
        chat_template: owned("tokenizer.chat_template").map(Bytes::from),
        card: None,
        tokens,
        defaults: Defaults::default(),
        licence: owned("general.license"),
        notes: fitted.notes,
    })
}

/// Ids that the model cannot produce are left out.
fn tokens(fitted: &Fitted, bos: Option<u32>, eos: BTreeSet<u32>, bos_text: Option<String>, eos_text: Option<String>, vocab: u32) -> Tokens {
    let bos = bos.filter(|id| *id < vocab);
    let eos: Vec<u32> = eos.into_iter().filter(|id| *id < vocab).collect();
    let text = |id: Option<u32>| id.and_then(|id| fitted.tokenizer.id_to_token(id));
    Tokens { bos_text: bos_text.or_else(|| text(bos)), eos_text: eos_text.or_else(|| text(eos.first().copied())), bos, eos }
}

/// A token's text: plain, or as an object with `content`.
fn token_text(config: &Config, key: &str) -> Result<Option<String>, ConfigError> {
    if let Some(Json::Object(_)) = config.get(key) {
        return Ok(config.object(key)?.unwrap_or_default().text("content")?.map(str::to_owned));
    }
    Ok(config.text(key)?.map(str::to_owned))
}

/// `chat_template`: text, or a list of named templates of which `default` is ours.
fn template_of(config: &Config) -> Result<Option<String>, ConfigError> {
    match config.get("chat_template") {
        Some(Json::Array(list)) => {
            let named = |template: &&Json| template.get("name").and_then(Json::as_str) == Some("default");
            Ok(list.iter().find(named).and_then(|template| template.get("template")).and_then(Json::as_str).map(str::to_owned))
        }
        _ => Ok(config.text("chat_template")?.map(str::to_owned)),
    }
}

fn defaults(generation: &Config) -> Result<Defaults, ConfigError> {
    // As docs/api.md bounds what a request may ask for; a `top_k` of -1 or 0 is off.
    let temperature = generation.number_in("temperature", 0.0..=2.0, "a number from 0 to 2")?;
    let top_p = generation.number_in("top_p", 0.0..=1.0, "a number from 0 to 1")?;
    let top_k = generation.number_in("top_k", -1.0..=f64::from(u32::MAX), "a number from -1")?;
    let repetition_penalty = generation.number_in("repetition_penalty", 0.01..=10.0, "a number from 0.01 to 10")?;
    // What transformers calls not sampling is a temperature of 0 here. Where the key is absent, clients expect OpenAI's default.
    let greedy = generation.flag("do_sample")? == Some(false);
    Ok(Defaults {
        temperature: if greedy { Some(0.0) } else { temperature.map(|value| value as f32) },
        top_p: top_p.map(|value| value as f32),
        top_k: top_k.filter(|k| *k >= 1.0).map(|k| k as u32),
        repetition_penalty: repetition_penalty.map(|value| value as f32),
    })
}

/// `license:` of a model card's front matter.
fn licence_of(card: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(card).ok()?;
    let front = text.strip_prefix("---")?.split("\n---").next()?;
    let line = front.lines().find_map(|line| line.strip_prefix("license:"))?;
    Some(line.trim().trim_matches(['"', '\'']).to_owned()).filter(|licence| !licence.is_empty())
}
