//! tokenizer.json out of GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value as Json, json};

use super::{TokenizerError, pre, spm};
use crate::formats::gguf::Value;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";

/// What `tokenizer.ggml.token_type` says of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
}

/// Builds a tokenizer.json.
///
/// # Errors
/// What is missing, malformed or not supported.
pub fn from_gguf(metadata: &BTreeMap<String, Value>) -> Result<Vec<u8>, TokenizerError> {
    let text = |key: &'static str| {
        metadata.get(key).map(|value| value.as_str().ok_or(TokenizerError::Value { key, expected: "text" })).transpose()
    };
    let model = text("tokenizer.ggml.model")?.ok_or(TokenizerError::Key("tokenizer.ggml.model"))?;
    let vocabulary = vocabulary(metadata)?;
    let json = match model {
        "gpt2" => byte_level(metadata, &vocabulary, text("tokenizer.ggml.pre")?.unwrap_or("default"))?,
        "llama" => sentence_piece(metadata, &vocabulary)?,
        other => return Err(TokenizerError::Model(other.to_owned())),
    };
    Ok(serde_json::to_vec(&json).expect("a Value is always JSON"))
}

/// Ids of control tokens that end a turn by their text, as llama.cpp finds them: files often name only one.
pub fn end_tokens(metadata: &BTreeMap<String, Value>) -> Vec<u32> {
    const ENDS: &[&str] = &["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>"];
    let Ok(vocabulary) = vocabulary(metadata) else { return Vec::new() };
    let tokens = vocabulary.tokens.iter().zip(&vocabulary.kinds).zip(0u32..);
    let is_end = |token: &str, kind: Kind| matches!(kind, Kind::Control | Kind::UserDefined) && ENDS.contains(&token);
    tokens.filter(|((token, kind), _)| is_end(token, **kind)).map(|(_, id)| id).collect()
}

fn vocabulary(metadata: &BTreeMap<String, Value>) -> Result<Vocabulary<'_>, TokenizerError> {
    let list = metadata.get(TOKENS).ok_or(TokenizerError::Key(TOKENS))?;
    let tokens = list.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
    let tokens = tokens.ok_or(TokenizerError::Value { key: TOKENS, expected: "a list of texts" })?;
    let mut seen = HashSet::new();
    for token in &tokens {
        if !seen.insert(*token) {
            return Err(TokenizerError::Duplicate((*token).to_owned()));
        }
    }
    let kinds = match metadata.get(TYPES) {
        None => vec![Kind::Normal; tokens.len()],
        Some(list) => {
            let kinds = list.as_array().and_then(|list| list.iter().map(|value| kind(value.as_u64()?)).collect::<Option<Vec<_>>>());
            kinds
                .filter(|kinds| kinds.len() == tokens.len())
                .ok_or(TokenizerError::Value { key: TYPES, expected: "one type of 1 to 6 for each token" })?
        }
    };
    Ok(Vocabulary { tokens, kinds })
}

fn kind(number: u64) -> Option<Kind> {
    Some(match number {
        1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        _ => return None,
    })
}

fn byte_level(metadata: &BTreeMap<String, Value>, vocabulary: &Vocabulary<'_>, pre_name: &str) -> Result<Json, TokenizerError> {
    let pre = pre::by_name(pre_name).ok_or_else(|| TokenizerError::Pre(pre_name.to_owned()))?;
    let list = metadata.get(MERGES).ok_or(TokenizerError::Key(MERGES))?.as_array();
    let list = list.ok_or(TokenizerError::Value { key: MERGES, expected: "a list of texts" })?;
    let mut merges = Vec::with_capacity(list.len());
    for merge in list {
        let merge = merge.as_str().ok_or(TokenizerError::Value { key: MERGES, expected: "a list of texts" })?;
        // Tokens of byte-level BPE hold no space: a space is written Ġ.
        let (left, right) = merge.split_once(' ').ok_or_else(|| TokenizerError::Merge(merge.to_owned()))?;
        merges.push(json!([left, right]));
    }
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre.ignore_merges,
        "vocab": vocab_json(vocabulary), "merges": merges,
    });
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(vocabulary),
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.pre_tokenizer,
        "post_processor": post_processor(metadata, vocabulary, pre.add_bos)?,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": model,
    }))
}

fn sentence_piece(metadata: &BTreeMap<String, Value>, vocabulary: &Vocabulary<'_>) -> Result<Json, TokenizerError> {
    let list = metadata.get(SCORES).ok_or(TokenizerError::Key(SCORES))?.as_array();
    let scores = list.and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
    let scores = scores.filter(|scores| scores.len() == vocabulary.tokens.len());
    let scores = scores.ok_or(TokenizerError::Value { key: SCORES, expected: "one score for each token" })?;
    let pieces: Vec<(&str, f64, bool)> = vocabulary
        .tokens
        .iter()
        .zip(&vocabulary.kinds)
        .zip(&scores)
        .map(|((token, kind), score)| (*token, *score, *kind == Kind::Normal))
        .collect();
    let merges: Vec<Json> = spm::merges(&pieces).into_iter().map(|(left, right)| json!([left, right])).collect();
    let unknown = vocabulary.kinds.iter().position(|kind| *kind == Kind::Unknown);
    let unknown = metadata.get("tokenizer.ggml.unknown_token_id").and_then(Value::as_u64).map_or(unknown, |id| usize::try_from(id).ok());
    let unknown = unknown.and_then(|id| vocabulary.tokens.get(id)).copied();
    let space_prefix = metadata.get("tokenizer.ggml.add_space_prefix").and_then(Value::as_bool).unwrap_or(true);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": true, "byte_fallback": vocabulary.kinds.contains(&Kind::Byte), "ignore_merges": false,
        "vocab": vocab_json(vocabulary), "merges": merges,
    });
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(vocabulary),
        "normalizer": spm::normalizer(space_prefix),
        "pre_tokenizer": null,
        "post_processor": post_processor(metadata, vocabulary, true)?,
        "decoder": spm::decoder(space_prefix),
        "model": model,
    }))
}

/// Unused tokens pad the embedding; they are left out, so that no text can give them.
fn vocab_json(vocabulary: &Vocabulary<'_>) -> Json {
    let used = vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate().filter(|(_, (_, kind))| **kind != Kind::Unused);
    Json::Object(used.map(|(id, (token, _))| ((*token).to_owned(), json!(id))).collect::<Map<_, _>>())
}

/// Tokens that are matched in the text itself, before words are cut.
fn added_tokens(vocabulary: &Vocabulary<'_>) -> Json {
    let added = vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate().filter_map(|(id, (token, kind))| {
        let special = match kind {
            Kind::Control | Kind::Unknown => true,
            Kind::UserDefined => false,
            Kind::Normal | Kind::Unused | Kind::Byte => return None,
        };
        (!token.is_empty()).then(|| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special})
        })
    });
    Json::Array(added.collect())
}

/// Puts the beginning token in front, where the file (or, where it is silent, the kind of tokenizer) wants it.
fn post_processor(metadata: &BTreeMap<String, Value>, vocabulary: &Vocabulary<'_>, add_bos_default: bool) -> Result<Json, TokenizerError> {
    let add_bos = match metadata.get("tokenizer.ggml.add_bos_token") {
        Some(value) => value.as_bool().ok_or(TokenizerError::Value { key: "tokenizer.ggml.add_bos_token", expected: "true or false" })?,
        None => add_bos_default,
    };
    if !add_bos {
        return Ok(Json::Null);
    }
    let Some(bos) = metadata.get(BOS) else { return Ok(Json::Null) };
    let id = bos.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocabulary.tokens.len());
    let id = id.ok_or(TokenizerError::Value { key: BOS, expected: "the id of a token" })?;
    let token = vocabulary.tokens[id];
    let special = |sequence: u8| json!({"SpecialToken": {"id": token, "type_id": sequence}});
    let sequence = |name: &str, sequence: u8| json!({"Sequence": {"id": name, "type_id": sequence}});
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }))
}
