//! The device buffers that a forward pass works in. They grow when a block is loaded (`reserve`) and never while one runs;
//! two blocks that run one after the other share them.

use std::sync::Arc;

use ashlar_kernels::ops::{LinearRun, Ops, PackError};
use ashlar_zoo::manifest::Rope;

use super::adapter::{LoadedAdapter, Projection};
use super::block::{Kind, LoadedBlock, LoadedRope};

/// Is shown the rows `[T, K]` that a linear layer reads, and K.
pub(super) type Observer = Box<dyn FnMut(&[f32], usize) + Send>;

/// Buffers, each as wide as the widest block that was reserved. T is the row limit of a run.
pub(super) struct Workspace<B: Ops> {
    /// `[T, D]`: the residual stream.
    pub(super) hidden: Grown<B>,
    /// `[T, D]`: what a norm wrote.
    pub(super) normed: Grown<B>,
    /// `[T, (H + 2K) * head_dim]`, or `[T, inner]` without a gate, or `[T, 2 * inner]` with one where an adapter changes it: what the first
    /// projection wrote.
    pub(super) wide: Grown<B>,
    /// `[T, H * head_dim]` or `[T, inner]`: what the second projection reads.
    pub(super) inner: Grown<B>,
    /// `[T, D]`: what the second projection wrote; in the head, the rows that want logits.
    pub(super) projected: Grown<B>,
    /// `[logit rows, vocab]`.
    pub(super) logits: Grown<B>,
    /// `[T, R]`: what the shrinks of adapters wrote.
    pub(super) low: Grown<B>,
    /// `[T]`: the position feature of each row, where a stitch reads it.
    pub(super) features: Grown<B>,
    /// The same on the host, on its way there.
    pub(super) features_row: Vec<f32>,
    /// Memory for the runs of one call, empty between calls.
    pub(super) runs: Vec<LinearRun<'static, B::Linear, B::Vector>>,
    /// Sees what every linear layer reads, while a model is calibrated.
    pub(super) observer: Option<Observer>,
    /// Cosines and sines of the ropes of this run.
    ropes: [RopeRows<B>; ROPES_MAX],
    /// The entry of `ropes` to fill next.
    rope_next: usize,
}

impl<B: Ops> Workspace<B> {
    /// Empty buffers.
    pub(super) fn new(ops: &B) -> Result<Self, PackError> {
        let rope = || -> Result<RopeRows<B>, PackError> { Ok(RopeRows { rope: None, rows: Grown::new(ops)? }) };
        Ok(Self {
            hidden: Grown::new(ops)?,
            normed: Grown::new(ops)?,
            wide: Grown::new(ops)?,
            inner: Grown::new(ops)?,
            projected: Grown::new(ops)?,
            logits: Grown::new(ops)?,
            low: Grown::new(ops)?,
            features: Grown::new(ops)?,
            features_row: Vec::new(),
            runs: Vec::new(),
            observer: None,
            ropes: [rope()?, rope()?, rope()?, rope()?],
            rope_next: 0,
        })
    }

    /// Grows every buffer to what `block` needs; contents are lost where one grows.
    pub(super) fn reserve(&mut self, ops: &B, block: &LoadedBlock<B>, rows: usize, logit_rows: usize) -> Result<(), PackError> {
        for buffer in [&mut self.hidden, &mut self.normed, &mut self.projected] {
            buffer.grow(ops, rows * block.width.max(block.output_width()))?;
        }
        match &block.kind {
            Kind::Embed(_) => {}
            Kind::Attention(attention) => {
                self.wide.grow(ops, rows * attention.qkv_width())?;
                self.inner.grow(ops, rows * attention.heads * attention.head_dim)?;
                let rope_width = attention.rope.as_ref().map_or(0, |rope| 2 * rope.half);
                self.ropes.iter_mut().try_for_each(|slot| slot.rows.grow(ops, rows * rope_width))?;
            }
            Kind::FeedForward(feed) => {
                if !feed.gated {
                    self.wide.grow(ops, rows * feed.inner)?;
                }
                self.inner.grow(ops, rows * feed.inner)?;
            }
            Kind::Head(head) => self.logits.grow(ops, logit_rows * head.vocab)?,
            Kind::Stitch(_) => {
                self.features.grow(ops, rows)?;
                self.features_row.reserve(rows);
            }
        }
        Ok(())
    }

    /// Grows every buffer to what `adapter` needs, as [`Workspace::reserve`] does.
    pub(super) fn reserve_adapter(&mut self, ops: &B, adapter: &LoadedAdapter<B>, rows: usize) -> Result<(), PackError> {
        let parts = [Projection::First, Projection::Second].map(|projection| adapter.added(projection));
        let mut low_rank = parts.into_iter().flatten().filter_map(|added| added.low_rank.as_ref());
        low_rank.try_for_each(|low| self.low.grow(ops, rows * low.rank))?;
        // Gate and up are not activated as they are computed.
        parts[0].map_or(Ok(()), |added| self.wide.grow(ops, rows * added.outputs))
    }

    /// Forgets the rope rows of the previous run, whose positions were others.
    pub(super) fn begin(&mut self) {
        self.ropes.iter_mut().for_each(|slot| slot.rope = None);
        self.rope_next = 0;
    }

    /// The index, for [`Workspace::rope_rows`], of the rows of `rope` at `positions`, computed once a run.
    pub(super) fn prepare_rope(&mut self, ops: &B, rope: &LoadedRope<B>, positions: &[u32]) -> usize {
        let held = |slot: &RopeRows<B>| slot.rope.as_ref().is_some_and(|held| Arc::ptr_eq(held, &rope.params) || **held == *rope.params);
        if let Some(index) = self.ropes.iter().position(held) {
            return index;
        }
        // A run with more distinct ropes than slots computes some again; no chain of today has more than two.
        let index = self.rope_next;
        self.rope_next = (index + 1) % ROPES_MAX;
        let slot = &mut self.ropes[index];
        ops.rope_rows(&mut slot.rows.buffer, positions, &rope.inverse_frequencies, rope.attention_factor);
        slot.rope = Some(Arc::clone(&rope.params));
        index
    }
}

/// Rows `[T, 2 * half]` of one rope.
struct RopeRows<B: Ops> {
    /// The rope whose rows they are, in this run.
    rope: Option<Arc<Rope>>,
    rows: Grown<B>,
}

impl<B: Ops> Workspace<B> {
    /// Splits off the rope rows at `index` and the fused rows that they rotate.
    pub(super) fn rope_rows(&mut self, index: usize) -> (&mut B::Buffer, &B::Buffer) {
        (&mut self.wide.buffer, &self.ropes[index].rows.buffer)
    }
}

/// A buffer and its length.
pub(super) struct Grown<B: Ops> {
    pub(super) buffer: B::Buffer,
    elements: usize,
}

impl<B: Ops> Grown<B> {
    fn new(ops: &B) -> Result<Self, PackError> {
        Ok(Self { buffer: ops.buffer(0)?, elements: 0 })
    }

    fn grow(&mut self, ops: &B, elements: usize) -> Result<(), PackError> {
        if elements > self.elements {
            self.buffer = ops.buffer(elements)?;
            self.elements = elements;
        }
        Ok(())
    }

    /// Elements that fit.
    pub(super) fn elements(&self) -> usize {
        self.elements
    }
}

/// Distinct ropes whose rows a run keeps: Gemma 3 has two.
const ROPES_MAX: usize = 4;
