//! SentencePiece BPE as tokenizer.json: its scores become an order of merges, since the library merges by rank.

use std::collections::HashMap;

use serde_json::{Value, json};

/// Merges that give what SentencePiece's scores give: for each token every pair of tokens that it splits into, best score
/// first, then the longest left part.
pub(super) fn merges(tokens: &[(&str, f64, bool)]) -> Vec<(String, String)> {
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().filter(|(_, (_, _, merges))| *merges).map(|(id, (text, _, _))| (*text, id)).collect();
    struct Pair<'a> {
        left: &'a str,
        right: &'a str,
        score: f64,
        left_chars: usize,
    }
    let mut pairs = Vec::new();
    for (text, score, _) in tokens.iter().filter(|(_, _, merges)| *merges) {
        for (left_chars, (at, _)) in text.char_indices().enumerate().skip(1) {
            let (left, right) = text.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                pairs.push(Pair { left, right, score: *score, left_chars });
            }
        }
    }
    // Stable, so that equal scores keep the order of ids.
    pairs.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.left_chars.cmp(&a.left_chars)));
    pairs.into_iter().map(|pair| (pair.left.to_owned(), pair.right.to_owned())).collect()
}

/// `normalizer`: spaces become the visible space, with one in front where the tokenizer wants it.
pub(super) fn normalizer(space_prefix: bool) -> Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    if !space_prefix {
        return replace;
    }
    json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]})
}

/// `decoder`: the other way, with bytes put together again.
pub(super) fn decoder(space_prefix: bool) -> Value {
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space_prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}
