//! A client: what it asked for, what it got, and whether that is right. `tokens`: each is that of the sequence alone. `order`: none is lost
//! or repeated. `ends`: a sequence ends once, for the right reason, and with an error only where one is due.

use std::rc::Rc;

use ashlar_wire::v1;

use crate::Micros;
use crate::alone::Alone;
use crate::check::{Violation, holds, violated};
use crate::models::Model;

/// What a client asks for.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    /// Its model, by place.
    pub(crate) model: usize,
    pub(crate) tenant: usize,
    pub(crate) prompt: Rc<[u32]>,
    pub(crate) generated_tokens_max: u32,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) seed: u64,
    pub(crate) priority: i32,
    pub(crate) domain: [u8; 32],
}

/// What it got.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) arrived: Micros,
    pub(crate) first: Option<Micros>,
    /// When the latest token came; when what counts as progress last happened (something broke).
    pub(crate) latest: Micros,
    pub(crate) progress: Micros,
    pub(crate) tokens: Vec<u32>,
    alone: Option<Alone>,
}

impl Client {
    pub(crate) fn new(now: Micros) -> Self {
        Self { arrived: now, first: None, latest: now, progress: now, tokens: Vec::new(), alone: None }
    }

    /// A token came, made by an executor of a class.
    pub(crate) fn token(
        &mut self,
        now: Micros,
        number: u64,
        ask: &Ask,
        model: &Model,
        class: &str,
        token: &v1::TokenEvent,
    ) -> Result<(), Violation> {
        let count = self.tokens.len() as u32;
        holds("order", token.index == count, || format!("sequence {number} hands out token {} after {count}", token.index))?;
        let over = count >= ask.generated_tokens_max || self.tokens.last().is_some_and(|last| ask.stop_tokens.contains(last));
        holds("ends", !over, || format!("sequence {number} hands out token {count}, and had ended before"))?;
        let alone = self.alone.get_or_insert_with(|| Alone::new(&model.changed_blocks(), class, ask.domain, ask.seed, &ask.prompt));
        let right = alone.next();
        holds("tokens", token.token == right, || {
            let (name, length) = (&model.name, ask.prompt.len());
            format!("token {count} of sequence {number} ({name}, prompt of {length}) is {}, alone it is {right}", token.token)
        })?;
        self.first.get_or_insert(now);
        self.latest = now;
        self.tokens.push(token.token);
        Ok(())
    }

    /// It ended well, they say.
    pub(crate) fn finished(&self, number: u64, ask: &Ask, reason: v1::FinishReason) -> Result<(), Violation> {
        let stopped = self.tokens.last().is_some_and(|last| ask.stop_tokens.contains(last));
        let full = self.tokens.len() == ask.generated_tokens_max as usize;
        let right = match reason {
            v1::FinishReason::Stop => stopped,
            v1::FinishReason::Length => full && !stopped,
            v1::FinishReason::Unspecified => false,
        };
        if right {
            return Ok(());
        }
        violated("ends", format!("sequence {number} ends with {reason:?} after {} of {}", self.tokens.len(), ask.generated_tokens_max))
    }
}
