//! One sequence's text on its way to the client: tokens in, text and log probabilities out, in step with each other. A token's
//! log probability is shown only when its text is, so a stop string leaks through neither. It does no IO.

use std::sync::Arc;

use ashlar_wire::v1::{FinishReason, TokenEvent, TokenLogprob};
use tokio::time::Instant;

use crate::text::detokenizer::Detokenizer;
use crate::text::stop::{StopStrings, Stops};
use crate::text::tokenizer::Tokenizer;

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChoiceState {
    /// Tokens are coming.
    Running,
    /// A stop token or a stop string ended it.
    Stopped,
    /// The bound of tokens or the context ended it.
    Exhausted,
}

/// The log probability of one token.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<TokenLogprob>,
    /// Where the token's text begins in the generated text, in characters.
    pub(crate) start_chars: usize,
    start_bytes: usize,
    /// The entry is shown once this much text has been.
    end_bytes: usize,
}

/// The state of one choice.
pub(crate) struct Choice {
    detokenizer: Detokenizer,
    stops: StopStrings,
    stop_tokens: Arc<[u32]>,
    logprobs: bool,
    /// Text that may be shown and was not taken yet.
    pub(crate) text: String,
    /// Entries of shown and unshown text; those of `text` come first.
    entries: Vec<Entry>,
    piece: String,
    detokenized_bytes: usize,
    detokenized_chars: usize,
    released_bytes: usize,
    pub(crate) generated_tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) last_token_at: Option<Instant>,
    pub(crate) state: ChoiceState,
}

impl Choice {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32], stops: Arc<Stops>, stop_tokens: Arc<[u32]>, logprobs: bool) -> Self {
        Self {
            detokenizer: Detokenizer::after(tokenizer, prompt),
            stops: StopStrings::new(stops),
            stop_tokens,
            logprobs,
            text: String::new(),
            entries: Vec::new(),
            piece: String::new(),
            detokenized_bytes: 0,
            detokenized_chars: 0,
            released_bytes: 0,
            generated_tokens: 0,
            cached_tokens: 0,
            last_token_at: None,
            state: ChoiceState::Running,
        }
    }

    /// Takes one token. A stop token is counted but not shown.
    pub(crate) fn handle_token(&mut self, event: TokenEvent) {
        self.generated_tokens += 1;
        if self.stop_tokens.contains(&event.token) {
            return;
        }
        let (start_bytes, start_chars) = (self.detokenized_bytes, self.detokenized_chars);
        self.detokenizer.push(event.token, &mut self.piece);
        self.detokenized_bytes += self.piece.len();
        self.detokenized_chars += self.piece.chars().count();
        if self.logprobs {
            // A token that only begins a character waits for the rest of it.
            let end_bytes = if self.detokenizer.is_pending() { self.detokenized_bytes + 1 } else { self.detokenized_bytes };
            let TokenEvent { token, logprob, top, .. } = event;
            self.entries.push(Entry { token, logprob, top, start_chars, start_bytes, end_bytes });
        }
        self.release_piece();
    }

    /// Takes the sequence's own end.
    pub(crate) fn handle_finished(&mut self, reason: FinishReason) {
        if self.state != ChoiceState::Running {
            return;
        }
        self.detokenizer.finish(&mut self.piece);
        self.release_piece();
        if self.state == ChoiceState::Running {
            let before = self.text.len();
            self.stops.finish(&mut self.text);
            self.released_bytes += self.text.len() - before;
            self.state = if reason == FinishReason::Length { ChoiceState::Exhausted } else { ChoiceState::Stopped };
        }
    }

    /// Passes `piece` through the stop strings.
    fn release_piece(&mut self) {
        let before = self.text.len();
        let found = self.stops.push(&self.piece, &mut self.text);
        self.piece.clear();
        self.released_bytes += self.text.len() - before;
        if found {
            let released = self.released_bytes;
            self.entries.retain(|entry| entry.start_bytes < released);
            self.state = ChoiceState::Stopped;
        }
    }

    /// How many entries may be shown.
    pub(crate) fn ready_count(&self) -> usize {
        match self.state {
            ChoiceState::Running => self.entries.partition_point(|entry| entry.end_bytes <= self.released_bytes),
            _ => self.entries.len(),
        }
    }

    /// Entries that may be shown and were not taken yet.
    pub(crate) fn ready(&self) -> &[Entry] {
        &self.entries[..self.ready_count()]
    }

    /// Whether there is something to show.
    pub(crate) fn has_news(&self) -> bool {
        !self.text.is_empty() || self.ready_count() > 0
    }

    /// Forgets what was shown.
    pub(crate) fn clear_shown(&mut self) {
        self.text.clear();
        let ready = self.ready_count();
        self.entries.drain(..ready);
    }

    /// OpenAI's `finish_reason`.
    pub(crate) fn finish_reason(&self) -> Option<&'static str> {
        match self.state {
            ChoiceState::Running => None,
            ChoiceState::Stopped => Some("stop"),
            ChoiceState::Exhausted => Some("length"),
        }
    }
}
