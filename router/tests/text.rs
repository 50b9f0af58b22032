//! Detokenizer and stop strings against their slow truths: `tokenizers`' own decode, and a search of the whole text.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use std::sync::Arc;

use ashlar_router::text::detokenizer::Detokenizer;
use ashlar_router::text::stop::{StopStrings, Stops};
use ashlar_router::text::tokenizer::Tokenizer;
use proptest::prelude::*;

fn load(name: &str) -> Arc<Tokenizer> {
    let path = format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"));
    Arc::new(Tokenizer::from_bytes(&std::fs::read(path).unwrap()).unwrap())
}

/// The text of tokens that follow `prompt`, and its parts as they came.
fn stream(tokenizer: &Arc<Tokenizer>, prompt: &[u32], tokens: &[u32]) -> (String, Vec<String>) {
    let mut detokenizer = Detokenizer::after(Arc::clone(tokenizer), prompt);
    let mut parts: Vec<String> = Vec::new();
    for token in tokens {
        let mut part = String::new();
        detokenizer.push(*token, &mut part);
        parts.push(part);
    }
    let mut last = String::new();
    detokenizer.finish(&mut last);
    parts.push(last);
    (parts.concat(), parts)
}

#[test]
fn characters_are_never_split() {
    let tokenizer = load("byte_level.json");
    let tokens = tokenizer.encode("a😀é", false).unwrap();
    let (text, parts) = stream(&tokenizer, &[2], &tokens);
    assert_eq!(text, "a😀é");
    assert_eq!(parts, ["a", "", "", "😀", "", "é", ""]);
    // The rest of a character that never comes is one replacement.
    assert_eq!(stream(&tokenizer, &[], &tokens[..3]).0, "a\u{fffd}");
}

#[test]
fn first_space_belongs_to_the_prompt_where_there_is_one() {
    let tokenizer = load("pieces.json");
    let the = tokenizer.encode("the", false).unwrap();
    assert_eq!(tokenizer.decode(&the, true).unwrap(), "the");
    assert_eq!(stream(&tokenizer, &[], &the).0, "the");
    assert_eq!(stream(&tokenizer, &[1], &the).0, "the", "special tokens are no text");
    assert_eq!(stream(&tokenizer, &the, &the).0, " the");
}

#[test]
fn special_and_absent_tokens_are_silent() {
    let tokenizer = load("byte_level.json");
    let mut tokens = tokenizer.encode("é", false).unwrap();
    tokens.insert(1, 0);
    tokens.insert(1, 100_000);
    assert_eq!(stream(&tokenizer, &[], &tokens).0, "é");
}

/// The first byte at which any stop is complete, and of the stops complete there the one that began first.
fn cut(text: &str, stops: &[String]) -> (String, bool) {
    for end in 1..=text.len() {
        let complete = stops.iter().filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()));
        if let Some(longest) = complete.map(String::len).max() {
            return (text[..end - longest].to_owned(), true);
        }
    }
    (text.to_owned(), false)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases * 8, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any ids at all, also those that make no UTF-8.
    #[test]
    fn byte_level_stream_equals_decode(ids in prop::collection::vec(0u32..275, 0..40)) {
        let tokenizer = load_once("byte_level.json");
        prop_assert_eq!(stream(&tokenizer, &[], &ids).0, tokenizer.decode(&ids, true).unwrap());
    }

    /// Any text, of which most characters are spelled in bytes.
    #[test]
    fn pieces_stream_equals_decode(text in "[ a-eé😀日]{0,20}") {
        let tokenizer = load_once("pieces.json");
        let ids = tokenizer.encode(&text, true).unwrap();
        prop_assert_eq!(stream(&tokenizer, &[], &ids).0, tokenizer.decode(&ids, true).unwrap());
    }

    /// Any pieces, with whole characters only.
    #[test]
    fn any_whole_pieces_stream_equals_decode(ids in prop::collection::vec(prop_oneof![0u32..3, 259u32..296], 0..40)) {
        let tokenizer = load_once("pieces.json");
        prop_assert_eq!(stream(&tokenizer, &[], &ids).0, tokenizer.decode(&ids, true).unwrap());
    }

    /// A text after a prompt is the rest of the whole text.
    #[test]
    fn stream_continues_the_prompt(text in "[ a-eé😀日]{1,20}", at in 1usize..20) {
        for name in ["byte_level.json", "pieces.json"] {
            let tokenizer = load_once(name);
            let ids = tokenizer.encode(&text, true).unwrap();
            let whole = tokenizer.decode(&ids, true).unwrap();
            let decode = |at: usize| tokenizer.decode(&ids[..at], true).unwrap();
            // The first border of characters at or after `at`.
            let at = (at.min(ids.len())..=ids.len()).find(|at| !decode(*at).ends_with('\u{fffd}')).unwrap();
            let prompt = decode(at);
            prop_assert_eq!(prompt + &stream(&tokenizer, &ids[..at], &ids[at..]).0, whole);
        }
    }

    /// However the text is cut, what comes out is what a search of the whole text gives, and nothing waits in vain.
    #[test]
    fn stop_strings_do_not_depend_on_cuts(
        parts in prop::collection::vec("[abé]{0,6}", 0..8),
        stops in prop::collection::vec("[abé]{1,4}", 0..4),
    ) {
        let (expected, found) = cut(&parts.concat(), &stops);
        let mut state = StopStrings::new(Arc::new(Stops::new(&stops)));
        let (mut out, mut seen, mut stopped) = (String::new(), String::new(), false);
        for part in &parts {
            seen.push_str(part);
            stopped = state.push(part, &mut out);
            if stopped {
                break;
            }
            let waits = &seen[out.len()..];
            let may_stop = stops.iter().any(|stop| stop.starts_with(waits) && stop != waits);
            prop_assert!(waits.is_empty() || may_stop, "{:?} waits", waits);
        }
        if !stopped {
            state.finish(&mut out);
        }
        prop_assert_eq!((out, stopped), (expected, found));
    }
}

fn load_once(name: &'static str) -> Arc<Tokenizer> {
    static LOADED: std::sync::Mutex<std::collections::BTreeMap<&'static str, Arc<Tokenizer>>> =
        std::sync::Mutex::new(std::collections::BTreeMap::new());
    Arc::clone(LOADED.lock().unwrap().entry(name).or_insert_with(|| load(name)))
}
