//! The forward pass: a run of consecutive blocks over a batch of rows, of any number of sequences. Written once over the op
//! set. Every op is row-local, so a row's result does not depend on the rest of the batch (docs/numerics.md). It does not
//! know which row belongs to whom; the engine builds [`ForwardBatch`].

use std::ops::Range;
use std::sync::Arc;

use ashlar_kernels::ops::{Columns, Finish, KvPlace, KvShape, LinearRun, Ops, PackError, PageLayout, Query};
use ashlar_zoo::stitch::position_feature;

use super::adapter::{LoadedAdapter, Projection};
use super::block::{Attention, Embed, FeedForward, Head, HeadNorm, Kind, LoadedBlock, NormWeights, Stitch};
use super::workspace::{Observer, Workspace};

/// The rows of one run.
#[derive(Debug, Clone, Copy)]
pub struct ForwardBatch<'a> {
    /// Rows T; at most the `rows_max` of [`Forward::new`].
    pub row_count: usize,
    /// `[T]` token ids below the embedding's vocabulary; read only by a run that begins with an embed block.
    pub tokens: &'a [u32],
    /// `[T]` absolute positions.
    pub positions: &'a [u32],
    /// One for each attention block of the run, in order.
    pub attention: &'a [AttentionBatch<'a>],
    /// Rows whose logits are wanted; read only by a run that ends with a head block.
    pub logit_rows: &'a [u32],
}

/// Where the rows' keys and values are, for one attention block. Slots are those of the pool of the block's KV shape.
#[derive(Debug, Clone, Copy)]
pub struct AttentionBatch<'a> {
    /// `[T]`: where each row's own key and value go.
    pub places: &'a [KvPlace],
    /// `[T]`: what each row attends to.
    pub queries: &'a [Query],
    /// Page tables that `queries` point into.
    pub tables: &'a [u32],
}

/// Consecutive rows of a batch, and the blocks that they run through.
#[derive(Debug, Clone)]
pub struct Strand<'a, B: Ops> {
    /// The rows, at least one.
    pub rows: Range<usize>,
    /// The blocks, in order.
    pub blocks: &'a [&'a LoadedBlock<B>],
}

/// The blocks of one kind at one place of all strands, each with its rows.
struct Abreast<'a, B: Ops, T: 'a> {
    strands: &'a [Strand<'a, B>],
    index: usize,
    of: fn(&Kind<B>) -> Option<&T>,
    /// The rows are those of these that lie in a strand, by their place here; without it, those of the strand.
    logit_rows: Option<&'a [u32]>,
}

impl<'a, B: Ops, T> Abreast<'a, B, T> {
    /// What all have in common is read off the first.
    fn first(&self) -> &'a T {
        self.block(&self.strands[0])
    }

    /// Rows of all.
    fn row_count(&self) -> usize {
        self.logit_rows.map_or_else(|| self.strands.last().map_or(0, |strand| strand.rows.end), <[u32]>::len)
    }

    /// Those that have rows.
    fn iter(&self) -> impl Iterator<Item = (Range<usize>, &'a T)> {
        let rows = |strand: &Strand<'_, B>| match self.logit_rows {
            None => strand.rows.clone(),
            Some(_) if self.strands.len() == 1 => 0..self.row_count(),
            Some(all) => {
                let place = |row: usize| all.partition_point(|logit_row| (*logit_row as usize) < row);
                place(strand.rows.start)..place(strand.rows.end)
            }
        };
        self.strands.iter().map(move |strand| (rows(strand), self.block(strand))).filter(|(rows, _)| !rows.is_empty())
    }

    fn block(&self, strand: &Strand<'a, B>) -> &'a T {
        (self.of)(&strand.blocks[self.index].kind).expect("blocks that run abreast are of one kind")
    }
}

/// Rows that an adapter changes in one block of a run.
#[derive(Debug)]
pub struct AdapterRun<'a, B: Ops> {
    /// The block, an attention or feed-forward block, by its place in the run.
    pub block: usize,
    /// The rows.
    pub rows: Range<usize>,
    /// The adapter, of that block.
    pub adapter: &'a LoadedAdapter<B>,
}

/// The KV memory, by slot class.
pub trait KvPools<B: Ops> {
    /// What pages are like, in every class.
    fn pages(&self) -> PageLayout;
    /// The pool of a class that was allocated.
    fn pool(&mut self, shape: KvShape) -> &mut B::Kv;
}

/// Runs blocks on a device. Owns the buffers that runs work in.
pub struct Forward<B: Ops> {
    ops: Arc<B>,
    rows_max: usize,
    logit_rows_max: usize,
    work: Workspace<B>,
    /// Logits of the latest run that ended with a head.
    logit_row_count: usize,
    /// Vocabulary of that head.
    vocab: usize,
    /// One row of logits on the host, as long as the largest vocabulary.
    logits_row: Vec<f32>,
}

impl<B: Ops> Forward<B> {
    /// A forward pass for runs of up to `rows_max` rows, of which up to `logit_rows_max` want logits.
    ///
    /// # Errors
    /// When the device has no memory.
    ///
    /// # Panics
    /// When a limit is 0 or more rows may want logits than there are.
    pub fn new(ops: Arc<B>, rows_max: usize, logit_rows_max: usize) -> Result<Self, PackError> {
        assert!((1..=rows_max).contains(&logit_rows_max), "1 <= logit_rows_max <= rows_max");
        let work = Workspace::new(&*ops)?;
        Ok(Self { ops, rows_max, logit_rows_max, work, logit_row_count: 0, vocab: 0, logits_row: Vec::new() })
    }

    /// Grows the workspace to what `block` needs. To be called once for each loaded block, between runs: hidden states and
    /// logits may be lost.
    ///
    /// # Errors
    /// When the device has no memory; the workspace stays usable for the blocks reserved before.
    pub fn reserve(&mut self, block: &LoadedBlock<B>) -> Result<(), PackError> {
        self.work.reserve(&*self.ops, block, self.rows_max, self.logit_rows_max)?;
        if let Kind::Head(head) = &block.kind {
            self.logits_row.resize(self.logits_row.len().max(head.vocab), 0.0);
        }
        Ok(())
    }

    /// As [`Forward::reserve`], for an adapter of a block that was reserved.
    ///
    /// # Errors
    /// When the device has no memory; the workspace stays usable for what was reserved before.
    pub fn reserve_adapter(&mut self, adapter: &LoadedAdapter<B>) -> Result<(), PackError> {
        self.work.reserve_adapter(&*self.ops, adapter, self.rows_max)
    }

    /// From now on shows each linear layer's inputs to `observer`, or to nobody. A block has two layers: of attention q, k and v in one, then o; of
    /// feed-forward gate and up in one, then down.
    pub(super) fn observe(&mut self, observer: Option<Observer>) {
        self.work.observer = observer;
    }

    /// `[T, D]`, dense: the output of a run that did not end with a head, D being the width of the rows that its last block gives.
    pub fn hidden(&self) -> &B::Buffer {
        &self.work.hidden.buffer
    }

    /// `[T, D]`, dense: the input of a run that does not begin with an embed block.
    pub fn hidden_mut(&mut self) -> &mut B::Buffer {
        &mut self.work.hidden.buffer
    }

    /// Runs consecutive blocks of a chain, changed by `adapters`: ascending by block, and of one block by rows, which are disjoint. Allocates
    /// nothing but room for more runs than a block ever had. A row's result does not depend on the adapters of others.
    ///
    /// # Panics
    /// When the batch breaks a rule of [`ForwardBatch`], a block or adapter was not reserved, or an embed or head block is not at its end.
    pub fn run(&mut self, blocks: &[&LoadedBlock<B>], adapters: &[AdapterRun<'_, B>], batch: &ForwardBatch<'_>, kv: &mut dyn KvPools<B>) {
        self.run_abreast(&[Strand { rows: 0..batch.row_count, blocks }], adapters, batch, kv);
    }

    /// As [`Forward::run`], each strand's rows through its own blocks: those at one place are alike ([`LoadedBlock::is_like`]), and their layers are
    /// one call of the device. The strands' rows follow each other from 0 to the end. A row's result does not depend on the other strands.
    ///
    /// # Panics
    /// As [`Forward::run`], and when strands break these rules, or the rows that want logits do not ascend where there are several.
    pub fn run_abreast(
        &mut self,
        strands: &[Strand<'_, B>],
        mut adapters: &[AdapterRun<'_, B>],
        batch: &ForwardBatch<'_>,
        kv: &mut dyn KvPools<B>,
    ) {
        self.check(strands, adapters, batch);
        self.work.begin();
        let (blocks, mut attention) = (strands[0].blocks, batch.attention.iter());
        let rows = batch.row_count;
        for (index, block) in blocks.iter().enumerate() {
            let width = block.width;
            let (adapted, others) = adapters.split_at(adapters.iter().take_while(|run| run.block == index).count());
            adapters = others;
            match &block.kind {
                Kind::Embed(_) => self.embed(&Abreast { strands, index, of: Kind::embed, logit_rows: None }, batch),
                Kind::Attention(_) => {
                    let pages = attention.next().expect("counted in check");
                    self.attend(&Abreast { strands, index, of: Kind::attention, logit_rows: None }, adapted, width, batch, pages, kv);
                }
                Kind::FeedForward(_) => {
                    self.feed(&Abreast { strands, index, of: Kind::feed_forward, logit_rows: None }, adapted, width, rows);
                }
                Kind::Head(_) => {
                    let logit_rows = Some(batch.logit_rows);
                    self.project(&Abreast { strands, index, of: Kind::head, logit_rows }, width, batch.logit_rows);
                }
                Kind::Stitch(_) => self.cross(&Abreast { strands, index, of: Kind::stitch, logit_rows: None }, width, batch),
            }
        }
    }

    /// Logits `[vocab]` of `logit_rows[i]` of the latest run that ended with a head, copied to the host; the next call
    /// overwrites them.
    ///
    /// # Panics
    /// When that run had no more than `i` logit rows.
    pub fn logits(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.logit_row_count, "logits of row {i} of {}", self.logit_row_count);
        let row = &mut self.logits_row[..self.vocab];
        self.ops.download(&self.work.logits.buffer, i * self.vocab, row);
        row
    }

    /// For each logit row of the latest run that ended with a head, the lowest index of its largest logit; `None` where none is
    /// above negative infinity.
    pub fn largest_logits(&self, out: &mut Vec<Option<u32>>) {
        out.resize(self.logit_row_count, None);
        self.ops.largest(&self.work.logits.buffer, self.vocab, out);
    }

    /// Logits of a row: the vocabulary of the head that ended the latest run.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    fn check(&self, strands: &[Strand<'_, B>], adapters: &[AdapterRun<'_, B>], batch: &ForwardBatch<'_>) {
        let (rows, blocks) = (batch.row_count, strands[0].blocks);
        assert!((1..=self.rows_max).contains(&rows), "{rows} rows, at most {}", self.rows_max);
        assert_eq!(batch.positions.len(), rows, "a position for each row");
        let end = strands.iter().fold(0, |end, strand| {
            assert!(strand.rows.start == end && strand.rows.end > end, "strands have the rows one after the other");
            assert_eq!(strand.blocks.len(), blocks.len(), "strands are of equal length");
            assert!(strand.blocks.iter().zip(blocks).all(|(block, first)| block.is_like(first)), "blocks that run abreast are alike");
            strand.rows.end
        });
        assert_eq!(end, rows, "each row is of a strand");
        assert!(strands.len() == 1 || batch.logit_rows.is_sorted(), "rows that want logits ascend by strand");
        let mut attention = batch.attention.iter();
        let mut width = blocks[0].width;
        for (index, block) in blocks.iter().enumerate() {
            assert_eq!(block.width, width, "a block takes rows of the width that the one before it gives");
            width = block.output_width();
            match &block.kind {
                Kind::Embed(_) => {
                    assert_eq!(index, 0, "an embed block begins a run");
                    assert_eq!(batch.tokens.len(), rows, "a token for each row");
                }
                Kind::Attention(_) => {
                    let pages = attention.next().expect("an attention batch for each attention block");
                    assert_eq!((pages.places.len(), pages.queries.len()), (rows, rows), "a place and a query for each row");
                }
                Kind::FeedForward(_) => {}
                Kind::Stitch(_) => assert!(self.work.features.elements() >= self.rows_max, "the stitch was not reserved"),
                Kind::Head(head) => {
                    assert_eq!(index + 1, blocks.len(), "a head block ends a run");
                    assert!(
                        batch.logit_rows.len() <= self.logit_rows_max,
                        "{} logit rows, at most {}",
                        batch.logit_rows.len(),
                        self.logit_rows_max
                    );
                    assert!(self.work.logits.elements() >= self.logit_rows_max * head.vocab, "the head was not reserved");
                }
            }
            assert!(self.work.hidden.elements() >= self.rows_max * block.width.max(width), "the block was not reserved");
        }
        assert!(attention.next().is_none(), "an attention batch for each attention block and no more");
        assert!(adapters.is_sorted_by_key(|run| run.block), "adapters ascend by block");
        for run in adapters {
            let is_adapted = matches!(blocks[run.block].kind, Kind::Attention(_) | Kind::FeedForward(_));
            assert!(is_adapted && run.rows.end <= rows, "an adapter is of an attention or feed-forward block, for rows that there are");
        }
    }

    fn embed(&mut self, blocks: &Abreast<'_, B, Embed<B>>, batch: &ForwardBatch<'_>) {
        let hidden = &mut self.work.hidden.buffer;
        for (rows, embed) in blocks.iter() {
            self.ops.embed(hidden, rows.start, &embed.tokens, &batch.tokens[rows.clone()], embed.scale);
            if let Some(positions) = &embed.positions {
                self.ops.embed_add(hidden, rows.start, positions, &batch.positions[rows]);
            }
        }
    }

    fn attend<'a>(
        &mut self,
        blocks: &Abreast<'a, B, Attention<B>>,
        adapters: &[AdapterRun<'_, B>],
        width: usize,
        batch: &ForwardBatch<'_>,
        pages: &AttentionBatch<'_>,
        kv: &mut dyn KvPools<B>,
    ) {
        let (ops, work, rows, block) = (&*self.ops, &mut self.work, batch.row_count, blocks.first());
        let shape = block.shape(kv.pages());
        let (q_width, k_width, stride) = (block.heads * block.head_dim, block.kv_heads * block.head_dim, block.qkv_width());
        let q = Columns { stride, offset: 0, width: q_width };
        let k = Columns { stride, offset: q_width, width: k_width };
        let q_and_k = Columns { stride, offset: 0, width: q_width + k_width };

        norm(ops, &mut work.normed.buffer, &work.hidden.buffer, width, blocks.iter().map(|(rows, block)| (rows, &block.norm)));
        let qkv = |block: &'a Attention<B>| (&block.qkv, block.qkv_bias.as_ref());
        work.linear(ops, blocks, qkv, (Operand::Normed, width), (Target::Wide, stride), Finish::Store);
        work.adapt(ops, adapters, Projection::First, (Operand::Normed, width), (Target::Wide, stride));
        for (rows, block) in blocks.iter() {
            for (head_norm, columns) in [(&block.q_norm, q), (&block.k_norm, k)] {
                if let Some(HeadNorm { eps, weight_offset, weight }) = head_norm {
                    ops.norm_heads(&mut work.wide.buffer, rows.clone(), columns, block.head_dim, *weight_offset, *eps, weight);
                }
            }
        }
        if let Some(rope) = &block.rope {
            let index = work.prepare_rope(ops, rope, batch.positions);
            let (qkv, rope_rows) = work.rope_rows(index);
            ops.rope(qkv, rows, q_and_k, block.head_dim, rope.half, rope_rows);
        }
        let pool = kv.pool(shape.kv);
        ops.kv_write(pool, &work.wide.buffer, &shape, pages.places);
        ops.attend(&mut work.inner.buffer, &work.wide.buffer, pool, &shape, pages.queries, pages.tables);
        let second = |block: &'a Attention<B>| Second {
            linear: &block.output,
            bias: block.output_bias.as_ref(),
            post_norm: block.post_norm.as_ref(),
        };
        work.project(ops, blocks, second, adapters, (Operand::Inner, q_width), rows, width);
    }

    fn feed<'a>(&mut self, blocks: &Abreast<'a, B, FeedForward<B>>, adapters: &[AdapterRun<'_, B>], width: usize, rows: usize) {
        let (ops, work, block) = (&*self.ops, &mut self.work, blocks.first());
        norm(ops, &mut work.normed.buffer, &work.hidden.buffer, width, blocks.iter().map(|(rows, block)| (rows, &block.norm)));
        let (inner, up) = (block.inner, |block: &'a FeedForward<B>| (&block.up, block.up_bias.as_ref()));
        let is_adapted = adapters.iter().any(|run| run.adapter.added(Projection::First).is_some());
        let operand = if block.gated && !is_adapted {
            work.linear(ops, blocks, up, (Operand::Normed, width), (Target::Inner, inner), Finish::Gate(block.activation));
            Operand::Inner
        } else {
            // The bits of the other rows are those of a gate in the same call.
            let outputs = if block.gated { 2 * inner } else { inner };
            work.linear(ops, blocks, up, (Operand::Normed, width), (Target::Wide, outputs), Finish::Store);
            work.adapt(ops, adapters, Projection::First, (Operand::Normed, width), (Target::Wide, outputs));
            if block.gated {
                ops.gate(&mut work.inner.buffer, &work.wide.buffer, rows, inner, block.activation);
                Operand::Inner
            } else {
                ops.activate(&mut work.wide.buffer, rows * inner, block.activation);
                Operand::Wide
            }
        };
        let second =
            |block: &'a FeedForward<B>| Second { linear: &block.down, bias: block.down_bias.as_ref(), post_norm: block.post_norm.as_ref() };
        work.project(ops, blocks, second, adapters, (operand, inner), rows, width);
    }

    /// `y = W x + b`, and then `y += f(p) u`: by the buffer beside, since the rows that it reads may be of another width.
    fn cross<'a>(&mut self, blocks: &Abreast<'a, B, Stitch<B>>, width: usize, batch: &ForwardBatch<'_>) {
        let (ops, work, outputs) = (&*self.ops, &mut self.work, blocks.first().outputs);
        let map = |block: &'a Stitch<B>| (&block.map, block.bias.as_ref());
        work.linear(ops, blocks, map, (Operand::Hidden, width), (Target::Projected, outputs), Finish::Store);
        if blocks.iter().any(|(_, block)| block.position.is_some()) {
            work.features_row.clear();
            work.features_row.extend(batch.positions.iter().map(|position| position_feature(*position)));
            ops.upload(&mut work.features.buffer, 0, &work.features_row);
            let mut calls = recycled(std::mem::take(&mut work.runs));
            calls.extend(blocks.iter().filter_map(|(rows, block)| Some(LinearRun { linear: block.position.as_ref()?, bias: None, rows })));
            let (onto, from) = (&mut work.projected.buffer, &work.features.buffer);
            ops.linear_runs(onto, Columns::dense(outputs), from, Columns::dense(1), &calls, Finish::Add);
            work.runs = recycled(calls);
        }
        // Both are as large.
        std::mem::swap(&mut work.hidden, &mut work.projected);
    }

    /// Only the rows that want logits go through the final norm and the projection.
    fn project(&mut self, blocks: &Abreast<'_, B, Head<B>>, width: usize, logit_rows: &[u32]) {
        let (ops, work, rows, head) = (&*self.ops, &mut self.work, logit_rows.len(), blocks.first());
        (self.logit_row_count, self.vocab) = (rows, head.vocab);
        if rows == 0 {
            return;
        }
        ops.gather_rows(&mut work.projected.buffer, &work.hidden.buffer, logit_rows, width);
        norm(ops, &mut work.normed.buffer, &work.projected.buffer, width, blocks.iter().map(|(rows, head)| (rows, &head.norm)));
        work.linear(ops, blocks, |head| (&head.output, None), (Operand::Normed, width), (Target::Logits, head.vocab), Finish::Store);
        if let Some(cap) = head.softcap {
            ops.softcap(&mut work.logits.buffer, rows * head.vocab, cap);
        }
    }
}

/// A buffer that a projection reads.
#[derive(Debug, Clone, Copy)]
enum Operand {
    Hidden,
    Normed,
    Inner,
    Wide,
}

/// A buffer that a projection writes.
#[derive(Debug, Clone, Copy)]
enum Target {
    Wide,
    Projected,
    Hidden,
    Inner,
    Logits,
}

/// What goes back to the residual stream.
struct Second<'a, B: Ops> {
    linear: &'a B::Linear,
    bias: Option<&'a B::Vector>,
    post_norm: Option<&'a NormWeights<B>>,
}

impl<B: Ops> Workspace<B> {
    /// The layer of each block for that block's rows, of so many inputs and outputs: one call of the device.
    fn linear<'a, T>(
        &mut self,
        ops: &B,
        blocks: &Abreast<'a, B, T>,
        layer: impl Fn(&'a T) -> (&'a B::Linear, Option<&'a B::Vector>),
        x: (Operand, usize),
        out: (Target, usize),
        finish: Finish,
    ) {
        let mut calls = recycled(std::mem::take(&mut self.runs));
        let mut observer = self.observer.take();
        let (from, onto) = self.ends(x.0, out.0);
        if let Some(observer) = &mut observer {
            let mut rows = vec![0.0; blocks.row_count() * x.1];
            ops.download(from, 0, &mut rows);
            observer(&rows, x.1);
        }
        if let [_] = blocks.strands {
            let (rows, (linear, bias)) = (blocks.row_count(), layer(blocks.first()));
            ops.linear_apply(onto, from, rows, linear, bias, finish);
        } else {
            let (inputs, outputs) = (Columns::dense(x.1), Columns::dense(out.1));
            calls.extend(blocks.iter().map(|(rows, block)| {
                let (linear, bias) = layer(block);
                LinearRun { linear, bias, rows }
            }));
            ops.linear_runs(onto, outputs, from, inputs, &calls, finish);
        }
        (self.runs, self.observer) = (recycled(calls), observer);
    }

    /// What a projection reads and writes.
    fn ends(&mut self, from: Operand, onto: Target) -> (&B::Buffer, &mut B::Buffer) {
        match (from, onto) {
            (Operand::Hidden, Target::Projected) => (&self.hidden.buffer, &mut self.projected.buffer),
            (Operand::Normed, Target::Wide) => (&self.normed.buffer, &mut self.wide.buffer),
            (Operand::Normed, Target::Inner) => (&self.normed.buffer, &mut self.inner.buffer),
            (Operand::Normed, Target::Logits) => (&self.normed.buffer, &mut self.logits.buffer),
            (Operand::Inner, Target::Projected) => (&self.inner.buffer, &mut self.projected.buffer),
            (Operand::Inner, Target::Hidden) => (&self.inner.buffer, &mut self.hidden.buffer),
            (Operand::Wide, Target::Projected) => (&self.wide.buffer, &mut self.projected.buffer),
            (Operand::Wide, Target::Hidden) => (&self.wide.buffer, &mut self.hidden.buffer),
            (operand, target) => unreachable!("no layer goes from {operand:?} to {target:?}"),
        }
    }

    /// `hidden += post_norm(operand W^T + bias)`, rows of `operand` having so many elements.
    fn project<'a, T>(
        &mut self,
        ops: &B,
        blocks: &Abreast<'a, B, T>,
        second: impl Fn(&'a T) -> Second<'a, B>,
        adapters: &[AdapterRun<'_, B>],
        operand: (Operand, usize),
        rows: usize,
        width: usize,
    ) {
        let layer = |block: &'a T| {
            let Second { linear, bias, .. } = second(block);
            (linear, bias)
        };
        if second(blocks.first()).post_norm.is_none() {
            self.linear(ops, blocks, layer, operand, (Target::Hidden, width), Finish::Add);
            return self.adapt(ops, adapters, Projection::Second, operand, (Target::Hidden, width));
        }
        self.linear(ops, blocks, layer, operand, (Target::Projected, width), Finish::Store);
        self.adapt(ops, adapters, Projection::Second, operand, (Target::Projected, width));
        let norms = blocks.iter().filter_map(|(rows, block)| Some((rows, second(block).post_norm?)));
        norm(ops, &mut self.normed.buffer, &self.projected.buffer, width, norms);
        ops.add(&mut self.hidden.buffer, &self.normed.buffer, rows * width);
    }

    /// Adds what adapters add to the rows that they change in this projection. `x` and `out` come with the elements of their rows. A matrix has one
    /// change at most, so the two ways to add meet in no element.
    fn adapt(&mut self, ops: &B, adapters: &[AdapterRun<'_, B>], projection: Projection, x: (Operand, usize), out: (Target, usize)) {
        self.add_low_rank(ops, adapters, projection, x, out);
        self.add_signs(ops, adapters, projection, x, out);
    }

    /// `out += x D^T`: one call of the device, whatever the adapters are.
    fn add_signs(&mut self, ops: &B, adapters: &[AdapterRun<'_, B>], projection: Projection, x: (Operand, usize), out: (Target, usize)) {
        let mut calls = recycled(std::mem::take(&mut self.runs));
        calls.extend(adapters.iter().filter_map(|run| {
            let linear = run.adapter.added(projection)?.signs.as_ref()?;
            Some(LinearRun { linear, bias: None, rows: run.rows.clone() })
        }));
        if !calls.is_empty() {
            let (from, onto) = self.ends(x.0, out.0);
            ops.linear_runs(onto, Columns::dense(out.1), from, Columns::dense(x.1), &calls, Finish::Add);
        }
        self.runs = recycled(calls);
    }

    /// `out += (x A^T) (s B)^T`.
    fn add_low_rank(&mut self, ops: &B, adapters: &[AdapterRun<'_, B>], projection: Projection, x: (Operand, usize), out: (Target, usize)) {
        let runs = || adapters.iter().filter_map(|run| Some((run.rows.clone(), run.adapter.added(projection)?.low_rank.as_ref()?)));
        let Some(rank) = runs().map(|(_, low)| low.rank).max() else { return };
        let row_count = runs().map(|(rows, _)| rows.end).max().unwrap_or(0);
        assert!(self.low.elements() >= row_count * rank, "the adapter was not reserved");
        let low_at = Columns::dense(rank);
        let mut calls = recycled(std::mem::take(&mut self.runs));
        calls.extend(runs().map(|(rows, low)| LinearRun { linear: &low.shrink, bias: None, rows }));
        let from = match x.0 {
            Operand::Normed => &self.normed.buffer,
            Operand::Inner => &self.inner.buffer,
            Operand::Wide => &self.wide.buffer,
            Operand::Hidden => unreachable!("no adapter reads there"),
        };
        ops.linear_runs(&mut self.low.buffer, low_at, from, Columns::dense(x.1), &calls, Finish::Store);
        calls.clear();
        calls.extend(runs().map(|(rows, low)| LinearRun { linear: &low.expand, bias: None, rows }));
        let onto = match out.0 {
            Target::Wide => &mut self.wide.buffer,
            Target::Projected => &mut self.projected.buffer,
            Target::Hidden => &mut self.hidden.buffer,
            Target::Inner | Target::Logits => unreachable!("no adapter writes there"),
        };
        ops.linear_runs(onto, Columns::dense(out.1), &self.low.buffer, low_at, &calls, Finish::Add);
        self.runs = recycled(calls);
    }
}

/// The memory of a list whose runs are over: collecting in place keeps it.
fn recycled<'b, L, V>(mut runs: Vec<LinearRun<'_, L, V>>) -> Vec<LinearRun<'b, L, V>> {
    runs.clear();
    runs.into_iter().map(|_| unreachable!("it is empty")).collect()
}

fn norm<'a, B: Ops>(
    ops: &B,
    dst: &mut B::Buffer,
    src: &B::Buffer,
    width: usize,
    norms: impl Iterator<Item = (Range<usize>, &'a NormWeights<B>)>,
) {
    for (rows, weights) in norms {
        ops.norm(dst, src, rows, width, weights.kind, weights.eps, &weights.weight, weights.bias.as_ref());
    }
}

#[cfg(test)]
mod tests;
