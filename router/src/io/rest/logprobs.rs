//! Log probabilities in the two shapes that OpenAI's API has: a list of tokens (chat) and parallel lists (completions).

use std::borrow::Cow;

use ashlar_wire::v1::TokenLogprob;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::io::rest::choice::Entry;
use crate::text::tokenizer::Tokenizer;

/// What stands for a log probability that JSON cannot hold.
const LOGPROB_MIN: f32 = -9999.0;

/// Chat's shape.
#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprobs<'a> {
    content: Vec<ChatToken<'a>>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    bytes: &'a [u8],
    top_logprobs: Vec<Token<'a>>,
}

#[derive(Debug, Serialize)]
struct Token<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    bytes: &'a [u8],
}

impl<'a> ChatLogprobs<'a> {
    pub(crate) fn of(entries: &[Entry], tokenizer: &'a Tokenizer) -> Self {
        let shown = |id: u32, logprob: f32| {
            let bytes = tokenizer.pieces().bytes(id);
            Token { token: String::from_utf8_lossy(bytes), logprob: finite(logprob), bytes }
        };
        let content = entries
            .iter()
            .map(|entry| {
                let Token { token, logprob, bytes } = shown(entry.token, entry.logprob);
                let top_logprobs = entry.top.iter().map(|top| shown(top.token, top.logprob)).collect();
                ChatToken { token, logprob, bytes, top_logprobs }
            })
            .collect();
        Self { content, refusal: None }
    }
}

/// Completions' shape: one element a token in each list.
#[derive(Debug, Serialize)]
pub(crate) struct CompletionLogprobs<'a> {
    text_offset: Vec<usize>,
    token_logprobs: Vec<f32>,
    tokens: Vec<Cow<'a, str>>,
    top_logprobs: Option<Vec<TopLogprobs<'a>>>,
}

/// An object from text to log probability. Of tokens with equal text (parts of characters) the most likely one counts.
#[derive(Debug)]
struct TopLogprobs<'a>(Vec<(Cow<'a, str>, f32)>);

impl Serialize for TopLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (text, logprob) in &self.0 {
            map.serialize_entry(text, logprob)?;
        }
        map.end()
    }
}

impl<'a> CompletionLogprobs<'a> {
    /// `top` says whether the client asked for alternatives; the token itself is always among them.
    pub(crate) fn of(entries: &[Entry], tokenizer: &'a Tokenizer, top: bool) -> Self {
        let text = |id: u32| String::from_utf8_lossy(tokenizer.pieces().bytes(id));
        let alternatives = |entry: &Entry| {
            let own = TokenLogprob { token: entry.token, logprob: entry.logprob };
            let mut found: Vec<(Cow<'a, str>, f32)> = Vec::with_capacity(entry.top.len() + 1);
            for candidate in entry.top.iter().chain([&own]) {
                let text = text(candidate.token);
                if !found.iter().any(|(known, _)| *known == text) {
                    found.push((text, finite(candidate.logprob)));
                }
            }
            TopLogprobs(found)
        };
        Self {
            text_offset: entries.iter().map(|entry| entry.start_chars).collect(),
            token_logprobs: entries.iter().map(|entry| finite(entry.logprob)).collect(),
            tokens: entries.iter().map(|entry| text(entry.token)).collect(),
            top_logprobs: top.then(|| entries.iter().map(alternatives).collect()),
        }
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOGPROB_MIN }
}
