//! A text through a chain one block at a time: hidden states of all windows wait on the host while a block is made and loaded. So memory holds
//! one block, whatever the model.

use std::sync::Arc;

use ashlar_kernels::ops::{KvFormat, Ops, PackError};

use super::alone::{AloneLimits, Pools, Rows};
use super::block::LoadedBlock;
use super::forward::{Forward, ForwardBatch};
use super::workspace::Observer;

/// Tokens of a KV page; no result depends on it.
const PAGE_TOKENS: usize = 32;

/// Windows of a text, and how far they have come.
pub(super) struct Passes<B: Ops> {
    ops: Arc<B>,
    forward: Forward<B>,
    limits: AloneLimits,
    windows: Vec<Vec<u32>>,
    /// `[window tokens, D]` of each window: what the next block reads. Empty before the embed block.
    hidden: Vec<Vec<f32>>,
}

impl<B: Ops> Passes<B> {
    /// Windows of at most `window_tokens`, none empty.
    pub(super) fn new(ops: Arc<B>, windows: Vec<Vec<u32>>, window_tokens: usize) -> Result<Self, PackError> {
        let forward = Forward::new(Arc::clone(&ops), window_tokens, 1)?;
        let limits =
            AloneLimits { chunk_tokens_max: window_tokens, tokens_max: window_tokens, page_tokens: PAGE_TOKENS, kv_format: KvFormat::F32 };
        let hidden = vec![Vec::new(); windows.len()];
        Ok(Self { ops, forward, limits, windows, hidden })
    }

    /// Runs all windows through a block, no head. Where they are seen by an `observer` they stay where they are; else they go on to the next.
    pub(super) fn run(&mut self, block: &LoadedBlock<B>, observer: Option<Observer>) -> Result<(), PackError> {
        let (mut pools, tables) = Pools::new(&*self.ops, std::slice::from_ref(block), self.limits)?;
        self.forward.reserve(block)?;
        let goes_on = observer.is_none();
        self.forward.observe(observer);
        for (window, hidden) in std::iter::zip(&self.windows, &mut self.hidden) {
            let rows = Rows::at(0..window.len(), &tables, PAGE_TOKENS);
            let attention = rows.attention(&tables);
            self.ops.upload(self.forward.hidden_mut(), 0, hidden);
            let batch = ForwardBatch {
                row_count: window.len(),
                tokens: window,
                positions: &rows.positions,
                attention: &attention,
                logit_rows: &[],
            };
            self.forward.run(&[block], &[], &batch, &mut pools);
            if goes_on {
                hidden.resize(window.len() * block.output_width(), 0.0);
                self.ops.download(self.forward.hidden(), 0, hidden);
            }
        }
        self.forward.observe(None);
        Ok(())
    }
}
