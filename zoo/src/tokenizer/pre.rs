//! How byte-level BPE tokenizers cut text into words before merging, by llama.cpp's name for it.

use serde_json::{Value, json};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A known way.
pub(super) struct Pre {
    /// `pre_tokenizer` of tokenizer.json.
    pub(super) pre_tokenizer: Value,
    /// `normalizer`.
    pub(super) normalizer: Value,
    /// Whether a word that is a token is taken whole, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether a beginning token is added where the file does not say.
    pub(super) add_bos: bool,
}

/// The way of that name.
pub(super) fn by_name(name: &str) -> Option<Pre> {
    let byte_level =
        |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |regex: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
    };
    let plain = |pre_tokenizer| Pre { pre_tokenizer, normalizer: Value::Null, ignore_merges: false, add_bos: false };
    Some(match name {
        // Files from before `pre` existed say default; the byte-level tokenizers of that time were GPT-2's.
        "default" | "gpt-2" | "phi-2" | "jina-es" | "jina-de" | "gigachat" | "mpt" | "olmo" | "jais" => plain(byte_level(true)),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            plain(json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]}))
        }
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => Pre { ignore_merges: true, add_bos: true, ..plain(split(LLAMA3)) },
        "dbrx" | "smaug-bpe" => plain(split(LLAMA3)),
        "qwen2" | "deepseek-r1-qwen" => Pre { normalizer: json!({"type": "NFC"}), ..plain(split(QWEN2)) },
        _ => return None,
    })
}
