//! What a sequence gives when it runs alone: straight from the definition of the modelled device, with no engine, pages or batches.
//! Each attention block sees a hash of the rows so far, or of those within its window; a wrong page, a lost chunk or a row of another tenant changes every token after.

use std::collections::VecDeque;

use crate::dice::mix;
use crate::models::{Block, VOCAB};

/// Rows that are hashed together, so that a long history is cheap. Pages are multiples of it, so that their size changes nothing.
pub(crate) const GRANULE: u32 = 16;

/// Salt of a numeric class: executors of another class give other tokens.
pub(crate) fn class_salt(class: &str) -> u64 {
    class.bytes().fold(0, |hash, byte| mix(&[hash, u64::from(byte)]))
}

/// The row of a token as the embedding makes it. The tenant's domain is in it, so that a page of another domain is a wrong one.
pub(crate) fn embed(domain: &[u8; 32], token: u32) -> u64 {
    mix(&[u64::from_le_bytes(domain[..8].try_into().expect("eight bytes")), u64::from(token)])
}

/// What a block makes of a row, before attention.
pub(crate) fn through(block: &Block, class: u64, position: u32, value: u64) -> u64 {
    mix(&[block.salt ^ class, u64::from(position), value])
}

/// A token, as a pure function of the last row, the seed, its position and what was generated before.
pub(crate) fn sample(value: u64, seed: u64, position: u32, history: u64) -> u32 {
    (mix(&[value, seed, u64::from(position), history]) % u64::from(VOCAB)) as u32
}

/// Hash of the tokens that a sampler has seen.
pub(crate) fn accept(history: u64, token: u32) -> u64 {
    mix(&[history, u64::from(token)])
}

/// The rows of one attention block so far.
#[derive(Debug, Clone, Default)]
struct History {
    /// Of all full granules, and of the rows of the one that is being filled.
    granules: u64,
    rows: u64,
    /// Those that a block with a window sees, oldest first.
    seen: VecDeque<u64>,
}

impl History {
    /// What a block without a window sees after one more row.
    fn all(&mut self, position: u32, row: u64) -> u64 {
        if position.is_multiple_of(GRANULE) {
            self.granules = if position == 0 { 0 } else { mix(&[self.granules, self.rows]) };
            self.rows = 0;
        }
        self.rows = mix(&[self.rows, row]);
        mix(&[self.granules, self.rows])
    }

    /// What one with a window does.
    fn latest(&mut self, window: u32, row: u64) -> u64 {
        if self.seen.len() == window as usize {
            self.seen.pop_front();
        }
        self.seen.push_back(row);
        window_hash(self.seen.iter().copied())
    }
}

/// Hash of the rows within a window, oldest first.
pub(crate) fn window_hash(rows: impl Iterator<Item = u64>) -> u64 {
    rows.fold(0, |hash, row| mix(&[hash, row]))
}

/// One sequence alone.
#[derive(Debug)]
pub(crate) struct Alone {
    blocks: Vec<Block>,
    class: u64,
    domain: [u8; 32],
    seed: u64,
    histories: Vec<History>,
    sampler: u64,
    position: u32,
    last: u64,
}

impl Alone {
    pub(crate) fn new(blocks: &[Block], class: &str, domain: [u8; 32], seed: u64, prompt: &[u32]) -> Self {
        let histories = vec![History::default(); blocks.len()];
        let (blocks, class) = (blocks.to_vec(), class_salt(class));
        let mut alone = Self { blocks, class, domain, seed, histories, sampler: 0, position: 0, last: 0 };
        prompt.iter().for_each(|token| alone.compute(*token));
        alone.sampler = prompt.iter().fold(0, |history, token| accept(history, *token));
        alone
    }

    fn compute(&mut self, token: u32) {
        let mut value = embed(&self.domain, token);
        for (block, history) in self.blocks.iter().zip(&mut self.histories) {
            value = through(block, self.class, self.position, value);
            if block.kv_heads.is_some() {
                value = match block.window {
                    None => history.all(self.position, value),
                    Some(window) => history.latest(window, value),
                };
            }
        }
        self.last = value;
        self.position += 1;
    }

    /// The next token.
    pub(crate) fn next(&mut self) -> u32 {
        let token = sample(self.last, self.seed, self.position, self.sampler);
        self.sampler = accept(self.sampler, token);
        self.compute(token);
        token
    }
}
