use std::collections::BTreeMap;

use super::*;
use crate::formats::gguf::Value as Meta;

fn text(value: &str) -> Meta {
    Meta::Text(value.to_owned())
}

fn list(values: &[&str]) -> Meta {
    Meta::Array(values.iter().map(|value| text(value)).collect())
}

fn encode(fitted: &Fitted, input: &str) -> Vec<u32> {
    fitted.tokenizer.encode(input, true).unwrap().get_ids().to_vec()
}

fn byte_level(pre: &str) -> BTreeMap<String, Meta> {
    let tokens = ["<s>", "a", "b", "Ġ", "ab", "Ġab", "1", "2", "12", "<x>"];
    let kinds = [3, 1, 1, 1, 1, 1, 1, 1, 1, 4].map(Meta::Unsigned);
    BTreeMap::from([
        ("tokenizer.ggml.model".to_owned(), text("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), text(pre)),
        ("tokenizer.ggml.tokens".to_owned(), list(&tokens)),
        ("tokenizer.ggml.token_type".to_owned(), Meta::Array(kinds.to_vec())),
        ("tokenizer.ggml.merges".to_owned(), list(&["a b", "Ġ ab", "1 2"])),
        ("tokenizer.ggml.bos_token_id".to_owned(), Meta::Unsigned(0)),
    ])
}

#[test]
fn byte_level_tokenizers_cut_words_as_their_pre_tokenizer_says() {
    for (pre, ids) in [("gpt-2", vec![4, 5, 8]), ("smollm", vec![4, 5, 6, 7]), ("qwen2", vec![4, 5, 6, 7]), ("llama-bpe", vec![0, 4, 5, 8])]
    {
        let fitted = fit(from_gguf(&byte_level(pre)).unwrap(), 10).unwrap();
        assert_eq!(encode(&fitted, "ab ab12"), ids, "{pre}");
        assert_eq!(fitted.tokenizer.decode(&[4, 5, 8], true).unwrap(), "ab ab12");
    }
}

#[test]
fn control_and_user_tokens_are_matched_in_text() {
    let fitted = fit(from_gguf(&byte_level("gpt-2")).unwrap(), 10).unwrap();
    assert_eq!(encode(&fitted, "<s>a<x>b"), [0, 1, 9, 2]);
    assert_eq!(fitted.tokenizer.decode(&[0, 1, 9, 2], true).unwrap(), "a<x>b");
}

fn sentence_piece(space_prefix: bool) -> BTreeMap<String, Meta> {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let pieces = ["▁a", "ab", "▁ab", "▁", "a", "b"];
    tokens.extend(pieces.map(str::to_owned));
    let mut kinds = vec![2, 3, 3];
    kinds.resize(259, 6);
    kinds.resize(tokens.len(), 1);
    let scores: Vec<f64> = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 259.0 - id as f64 }).collect();
    let names: Vec<&str> = tokens.iter().map(String::as_str).collect();
    BTreeMap::from([
        ("tokenizer.ggml.model".to_owned(), text("llama")),
        ("tokenizer.ggml.tokens".to_owned(), list(&names)),
        ("tokenizer.ggml.token_type".to_owned(), Meta::Array(kinds.into_iter().map(Meta::Unsigned).collect())),
        ("tokenizer.ggml.scores".to_owned(), Meta::Array(scores.into_iter().map(Meta::Float).collect())),
        ("tokenizer.ggml.bos_token_id".to_owned(), Meta::Unsigned(1)),
        ("tokenizer.ggml.add_space_prefix".to_owned(), Meta::Bool(space_prefix)),
    ])
}

#[test]
fn sentence_piece_merges_best_score_first_and_falls_back_to_bytes() {
    let fitted = fit(from_gguf(&sentence_piece(true)).unwrap(), 265).unwrap();
    // "▁ab": "▁a" scores best, then "▁ab" out of "▁a" and "b".
    assert_eq!(encode(&fitted, "ab ab"), [1, 261, 261]);
    // é is no token: its two bytes.
    assert_eq!(encode(&fitted, "abé"), [1, 261, 3 + 0xC3, 3 + 0xA9]);
    assert_eq!(fitted.tokenizer.decode(&[1, 261, 261, 3 + 0xC3, 3 + 0xA9], true).unwrap(), "ab abé");
    let fitted = fit(from_gguf(&sentence_piece(false)).unwrap(), 265).unwrap();
    assert_eq!(encode(&fitted, "ab ab"), [1, 260, 261]);
}

#[test]
fn what_cannot_be_built_is_named() {
    let changed = |key: &str, value: Meta| {
        let mut metadata = byte_level("gpt-2");
        metadata.insert(key.to_owned(), value);
        from_gguf(&metadata).unwrap_err().to_string()
    };
    assert!(changed("tokenizer.ggml.pre", text("tekken")).contains("`tekken`"));
    assert!(changed("tokenizer.ggml.model", text("t5")).contains("`t5`"));
    assert!(changed("tokenizer.ggml.tokens", list(&["a", "a"])).contains("twice"));
    assert!(changed("tokenizer.ggml.token_type", Meta::Array(vec![])).contains("token_type"));
    assert!(changed("tokenizer.ggml.merges", list(&["ab"])).contains("`ab`"));
    let mut metadata = byte_level("llama-bpe");
    metadata.insert("tokenizer.ggml.bos_token_id".to_owned(), Meta::Unsigned(99));
    assert!(from_gguf(&metadata).unwrap_err().to_string().contains("bos_token_id"));
}

#[test]
fn ids_without_a_row_are_refused_unless_only_added() {
    let json = from_gguf(&byte_level("gpt-2")).unwrap();
    let error = fit(json.clone(), 9).err().unwrap().to_string();
    assert!(error.contains("`<x>` has id 9, but the embedding has 9 rows"), "{error}");
    // Behind the vocabulary proper: taken out.
    let mut value: Value = serde_json::from_slice(&json).unwrap();
    let extra = serde_json::json!({"id": 10, "content": "<image>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    value["added_tokens"].as_array_mut().unwrap().push(extra);
    let fitted = fit(serde_json::to_vec(&value).unwrap(), 10).unwrap();
    assert_eq!(fitted.notes.len(), 1);
    assert_eq!(fitted.tokenizer.token_to_id("<image>"), None);
}
