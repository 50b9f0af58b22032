//! How much longer a tokenizer may make a text. Steps of a normaliser or decoder replace and prepend, one after another: forty that double an `a` make a
//! terabyte of it, and nothing in the library stops them. What real tokenizers do (Unicode's widest compatibility forms, a space as three bytes) stays far below.

use base64::Engine;
use serde_json::Value;

use super::TokenizerError;

/// Bytes that one byte of text may become, by all steps of a chain together.
const GROWTH_MAX: usize = 128;
/// Bytes of a text that a step puts in.
const INSERTED_BYTES_MAX: usize = 1024;
/// Steps of a chain, those of chains within it counted.
const STEPS_MAX: usize = 64;
/// Tokens that a post-processor puts around a text.
const TEMPLATE_MAX: usize = 256;

/// Checks normaliser, pre-tokenizer, decoder and post-processor of a tokenizer.json.
///
/// # Errors
/// The step that may make a text too long, or replaces nothing by something.
pub fn check(json: &[u8]) -> Result<(), TokenizerError> {
    let steps: Steps = serde_json::from_slice(json).map_err(|e| TokenizerError::Load(e.to_string()))?;
    for (part, step) in [("normalizer", &steps.normalizer), ("pre_tokenizer", &steps.pre_tokenizer), ("decoder", &steps.decoder)] {
        let (mut growth, mut count) = (1, 0);
        walk(part, step, &mut growth, &mut count)?;
    }
    templates(&steps.post_processor)
}

/// What works on texts; the vocabulary is skipped.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Steps {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    post_processor: Value,
}

fn refused(part: &str, reason: impl Into<String>) -> TokenizerError {
    TokenizerError::Step { part: part.to_owned(), reason: reason.into() }
}

fn walk(part: &str, step: &Value, growth: &mut usize, steps: &mut usize) -> Result<(), TokenizerError> {
    let kind = step["type"].as_str().unwrap_or_default();
    *steps += 1;
    if *steps > STEPS_MAX {
        return Err(refused(part, format!("it has more than {STEPS_MAX} steps")));
    }
    for key in ["prepend", "content", "prefix", "suffix", "replacement"] {
        if let Some(text) = step[key].as_str().filter(|text| text.len() > INSERTED_BYTES_MAX) {
            return Err(refused(
                part,
                format!("`{key}` of a {kind} step is {} bytes, and at most {INSERTED_BYTES_MAX} are allowed", text.len()),
            ));
        }
    }
    let factor = match kind {
        "Replace" => {
            let content = step["content"].as_str().unwrap_or_default();
            let literal = step["pattern"]["String"].as_str();
            let pattern = literal.or(step["pattern"]["Regex"].as_str()).unwrap_or_default();
            if pattern.is_empty() {
                return Err(refused(part, "a Replace step has an empty pattern"));
            }
            // What a regular expression matches may be one byte long.
            content.len().div_ceil(literal.map_or(1, str::len))
        }
        "Precompiled" => longest_mapping(step["precompiled_charsmap"].as_str().unwrap_or_default()),
        _ => 1,
    };
    *growth = growth.saturating_mul(factor.max(1));
    if *growth > GROWTH_MAX {
        return Err(refused(part, format!("its steps may make a text more than {GROWTH_MAX} times as long")));
    }
    let inner = ["normalizers", "pretokenizers", "decoders"].into_iter().filter_map(|key| step[key].as_array()).flatten();
    inner.into_iter().try_for_each(|step| walk(part, step, growth, steps))
}

/// The longest text that a compiled map of characters (SentencePiece's: the length of a trie, the trie, texts that end in zero) gives. One that
/// cannot be read is left to the library, which refuses it.
fn longest_mapping(map: &str) -> usize {
    let Ok(bytes) = base64::engine::general_purpose::STANDARD.decode(map) else { return 1 };
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return 1 };
    let texts = rest.get(u32::from_le_bytes(*length) as usize..).unwrap_or_default();
    texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(1)
}

fn templates(step: &Value) -> Result<(), TokenizerError> {
    for key in ["single", "pair"] {
        if step[key].as_array().is_some_and(|pieces| pieces.len() > TEMPLATE_MAX) {
            return Err(refused("post_processor", format!("`{key}` has more than {TEMPLATE_MAX} pieces")));
        }
    }
    let special = step["special_tokens"].as_object().into_iter().flat_map(|tokens| tokens.values());
    if special.filter_map(|token| token["ids"].as_array()).any(|ids| ids.len() > TEMPLATE_MAX) {
        return Err(refused("post_processor", format!("a special token stands for more than {TEMPLATE_MAX} ids")));
    }
    step["processors"].as_array().into_iter().flatten().try_for_each(templates)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error(value: &Value) -> Option<String> {
        check(&serde_json::to_vec(value).unwrap()).err().map(|error| error.to_string())
    }

    fn replace(pattern: &str, content: &str) -> Value {
        json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
    }

    #[test]
    fn what_real_tokenizers_do_is_taken() {
        let llama = json!({
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]},
            "decoder": {"type": "Sequence", "decoders": [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "special_tokens": {"<s>": {"ids": [1]}}},
        });
        assert_eq!(error(&llama), None);
        assert_eq!(error(&json!({})), None);
    }

    #[test]
    fn what_makes_texts_long_is_named() {
        let chain = |key: &str, steps: Vec<Value>| json!({"type": "Sequence", key: steps});
        let doubling = |count| (0..count).map(|_| replace("a", "aa")).collect::<Vec<_>>();
        assert_eq!(error(&json!({"normalizer": chain("normalizers", doubling(7))})), None, "128 times");
        for (tokenizer, expected) in [
            (
                json!({"normalizer": chain("normalizers", doubling(8))}),
                "its normalizer is not taken: its steps may make a text more than 128 times as long",
            ),
            (json!({"decoder": chain("decoders", vec![chain("decoders", doubling(40))])}), "its decoder is not taken: its steps may make"),
            (json!({"normalizer": {"type": "Prepend", "prepend": "x".repeat(1025)}}), "`prepend` of a Prepend step is 1025 bytes"),
            (json!({"normalizer": replace("", "z")}), "a Replace step has an empty pattern"),
            (json!({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "z"}}), "a Replace step has an empty pattern"),
            (json!({"decoder": chain("decoders", vec![json!({"type": "Fuse"}); 64])}), "it has more than 64 steps"),
            (
                json!({"post_processor": {"type": "TemplateProcessing", "single": vec![json!({}); 257]}}),
                "`single` has more than 256 pieces",
            ),
        ] {
            assert!(error(&tokenizer).is_some_and(|error| error.contains(expected)), "{expected}: {:?}", error(&tokenizer));
        }
    }

    #[test]
    fn a_compiled_map_counts_by_its_longest_text() {
        let map = |text: &str| {
            let bytes = [&4u32.to_le_bytes()[..], b"trie", b"ab\0", text.as_bytes(), b"\0"].concat();
            json!({"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64::engine::general_purpose::STANDARD.encode(bytes)}})
        };
        assert_eq!(error(&map(&"x".repeat(33))), None);
        assert!(error(&map(&"x".repeat(129))).is_some());
    }
}
