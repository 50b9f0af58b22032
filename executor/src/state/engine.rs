//! The engine's state, its events (`handle_*`) and its outputs (`poll_output`). Which rows run next is in `planner`.
//!
//! The device runs batches in the order in which they were handed out. That is what allows counts to move, pages to
//! be published and hidden rows to change hands when a batch is *planned*: whoever reads them runs later. Plans depend on
//! counts only: a token that a batch in flight samples is promised, and the device alone puts it in (`RowInput::Sampled`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ashlar_kernels::ops::KvShape;
use ashlar_wire::code::{Code, Retry};
use ashlar_wire::id::SequenceKey;

use super::Now;
use super::batch::{Batch, BatchId, Sample, SampledToken, SequenceId};
use super::counters::{Counters, Gauges};
use super::limits::Limits;
use super::pages::{ClassIndex, LineageIndex, PagePool};
use super::segments::{BlockIndex, Segment, SegmentIndex, cut};
use super::sequence::{Admit, Reason, Sequence, SpanIndex, Status};

/// An attention block of a hosted span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpanAttention {
    /// Offset of the block in the span.
    pub(crate) offset: u32,
    pub(crate) class: ClassIndex,
    pub(crate) lineage: LineageIndex,
}

/// What the engine is told when a span is ready to run: all its blocks are on the device.
#[derive(Debug, Clone)]
pub struct HostSpan {
    /// Blocks in order.
    pub blocks: Vec<BlockIndex>,
    /// For each block: lineage (any digest) and, for attention blocks, the KV shape.
    pub lineages: Vec<[u8; 32]>,
    /// KV shape of attention blocks; None for others.
    pub kv_shapes: Vec<Option<KvShape>>,
    /// Whether the first block is the embedding.
    pub begins_with_embed: bool,
    /// Whether the last block is the head.
    pub ends_with_head: bool,
}

/// A span under the present cut.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) host: HostSpan,
    pub(crate) attention: Vec<SpanAttention>,
    pub(crate) path: Vec<(SegmentIndex, u32)>,
    pub(crate) hosted: bool,
}

impl Span {
    /// Attention blocks within blocks [from, to) of the span, by their place in `attention`.
    pub(crate) fn attention_in(&self, from: u32, to: u32) -> std::ops::Range<usize> {
        let begin = self.attention.partition_point(|a| a.offset < from);
        let end = self.attention.partition_point(|a| a.offset < to);
        begin..end
    }

    /// First block after step `i` of a path through this span.
    pub(crate) fn step_end(&self, path: &[(SegmentIndex, u32)], i: usize) -> u32 {
        path.get(i + 1).map_or(self.host.blocks.len() as u32, |(_, start)| *start)
    }
}

/// What the caller must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Have the device compute a batch, in order.
    RunBatch(Batch),
    /// Tell the router that the sequence left the queue.
    EmitStarted {
        /// Which.
        sequence: SequenceId,
        /// Time in the queue.
        waited: Now,
        /// Prompt tokens whose compute was avoided.
        cached_tokens: u32,
    },
    /// Give a token to the router.
    EmitToken {
        /// Which.
        sequence: SequenceId,
        /// 0 for the first generated token.
        index: u32,
        /// The token.
        token: SampledToken,
    },
    /// Tell the router that the sequence ended well. The engine has forgotten it.
    EmitFinished {
        /// Which.
        sequence: SequenceId,
        /// Why.
        reason: Reason,
    },
    /// Tell the router that the sequence failed. The engine has forgotten it.
    EmitFailed {
        /// Which.
        sequence: SequenceId,
        /// Stable code.
        code: Code,
        /// A sentence.
        message: String,
        /// Advice.
        retry: Retry,
    },
    /// Give a sampled token to the executor upstream.
    SendToken {
        /// Which.
        sequence: SequenceId,
        /// Position of the token.
        position: u32,
        /// The token.
        token: SampledToken,
    },
    /// Tell the executor upstream that rows below `position` were taken.
    SendConsumed {
        /// Which.
        sequence: SequenceId,
        /// First position not taken.
        position: u32,
    },
    /// Forget the sequence on the device (sampler, inbox) and on the executor downstream.
    Release(SequenceId),
}

/// Pages that become free when a batch is done.
#[derive(Debug)]
pub(crate) struct Leaving {
    /// The latest batch that may write to them.
    pub(crate) last_batch: BatchId,
    /// The pages, in the order in which to release them.
    pub(crate) pages: Vec<(ClassIndex, u32)>,
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    pub(crate) limits: Limits,
    pub(crate) spans: Vec<Span>,
    pub(crate) segments: Vec<Segment>,
    lineages: BTreeMap<[u8; 32], LineageIndex>,
    pub(crate) pages: PagePool,
    pub(crate) sequences: BTreeMap<SequenceId, Sequence>,
    by_key: BTreeMap<SequenceKey, SequenceId>,
    /// Waiting sequences: priority, then arrival.
    pub(crate) waiting: BTreeSet<(i32, SequenceId)>,
    pub(crate) hidden_free: Vec<u32>,
    pub(crate) outputs: VecDeque<Output>,
    /// Batches that the device has, oldest first.
    pub(crate) in_flight: VecDeque<BatchId>,
    /// Pages of sequences that are gone or gave way while batches with rows of them were in flight.
    pub(crate) leaving: Vec<Leaving>,
    /// Whether a sequence that runs could not get its pages when the latest step was planned: nobody is started before it.
    pub(crate) pages_short: bool,
    next_sequence: u64,
    next_batch: u64,
    pub(crate) counters: Counters,
}

impl Engine {
    /// An engine that hosts nothing yet. The limits must hold (`Limits::check`).
    pub fn new(limits: Limits) -> Self {
        assert_eq!(limits.check(), Ok(()), "limits are checked when they are read");
        Self {
            hidden_free: (0..limits.hidden_rows_max).rev().collect(),
            pages: PagePool::new(limits.kv_bytes),
            limits,
            spans: Vec::new(),
            segments: Vec::new(),
            lineages: BTreeMap::new(),
            sequences: BTreeMap::new(),
            by_key: BTreeMap::new(),
            waiting: BTreeSet::new(),
            outputs: VecDeque::new(),
            in_flight: VecDeque::new(),
            leaving: Vec::new(),
            pages_short: false,
            next_sequence: 0,
            next_batch: 0,
            counters: Counters::default(),
        }
    }

    pub(crate) fn span(&self, span: SpanIndex) -> &Span {
        &self.spans[span.0 as usize]
    }

    pub(crate) fn next_batch_id(&mut self) -> BatchId {
        self.next_batch += 1;
        BatchId(self.next_batch)
    }

    /// Starts to host a span whose blocks are on the device. Running sequences go on.
    pub fn handle_host(&mut self, host: HostSpan) -> SpanIndex {
        assert!(!host.blocks.is_empty() && host.blocks.len() == host.lineages.len() && host.blocks.len() == host.kv_shapes.len());
        let mut attention = Vec::new();
        for (offset, shape) in host.kv_shapes.iter().enumerate() {
            let Some(shape) = shape else { continue };
            let next = LineageIndex(self.lineages.len() as u32);
            let lineage = *self.lineages.entry(host.lineages[offset]).or_insert(next);
            attention.push(SpanAttention { offset: offset as u32, class: self.pages.class(*shape), lineage });
        }
        self.spans.push(Span { host, attention, path: Vec::new(), hosted: true });
        self.recut();
        SpanIndex(self.spans.len() as u32 - 1)
    }

    /// Sequences of a span that have not ended.
    pub fn sequence_count(&self, span: SpanIndex) -> usize {
        self.sequences.values().filter(|sequence| sequence.span == span).count()
    }

    /// Stops to host a span: its sequences fail with advice to go elsewhere.
    pub fn handle_unhost(&mut self, span: SpanIndex) {
        let ids: Vec<SequenceId> = self.sequences.iter().filter(|(_, s)| s.span == span).map(|(id, _)| *id).collect();
        for id in ids {
            self.fail(id, Code::UnknownSpan, "the executor no longer holds this span".to_owned(), Retry::Elsewhere);
        }
        self.spans[span.0 as usize].hosted = false;
        self.recut();
    }

    /// Cuts hosted spans anew and moves sequences to the new cut where they can follow: pages hang on attention
    /// blocks and move no byte; a sequence with hidden rows inside a joined segment keeps its old path.
    fn recut(&mut self) {
        let hosted: Vec<usize> = (0..self.spans.len()).filter(|&i| self.spans[i].hosted).collect();
        let blocks: Vec<&[BlockIndex]> = hosted.iter().map(|&i| self.spans[i].host.blocks.as_slice()).collect();
        let fresh = cut(&blocks);
        // Old segments stay: sequences that cannot follow yet still name them.
        let mut renamed = Vec::with_capacity(fresh.segments.len());
        for segment in &mut self.segments {
            segment.span_count = 0;
        }
        for segment in fresh.segments {
            let index = match self.segments.iter().position(|known| known.blocks == segment.blocks) {
                Some(known) => {
                    self.segments[known].span_count = segment.span_count;
                    known
                }
                None => {
                    self.segments.push(segment);
                    self.segments.len() - 1
                }
            };
            renamed.push(SegmentIndex(index as u32));
        }
        for (path, &i) in fresh.paths.into_iter().zip(&hosted) {
            self.spans[i].path = path.into_iter().map(|(segment, start)| (renamed[segment.0 as usize], start)).collect();
        }
        for sequence in self.sequences.values_mut() {
            let span = &self.spans[sequence.span.0 as usize];
            follow_cut(sequence, &span.path);
        }
        self.share_pages();
    }

    fn share_pages(&mut self) {
        let mut weights: Vec<u64> = Vec::new();
        for span in self.spans.iter().filter(|span| span.hosted) {
            for attention in &span.attention {
                let class = attention.class.0 as usize;
                if weights.len() <= class {
                    weights.resize(class + 1, 0);
                }
                weights[class] += 1;
            }
        }
        let class_count = self.spans.iter().flat_map(|s| &s.attention).map(|a| a.class.0 as usize + 1).max().unwrap_or(0);
        weights.resize(class_count, 0);
        self.pages.share(&weights);
    }

    /// Pages of one class that `tokens` of a sequence in this span need.
    fn pages_needed(&self, span: &Span, tokens: u32) -> BTreeMap<ClassIndex, usize> {
        let pages = tokens.div_ceil(self.limits.page_tokens) as usize;
        let mut needed = BTreeMap::new();
        for attention in &span.attention {
            *needed.entry(attention.class).or_default() += pages;
        }
        needed
    }

    /// Whether pages for `tokens` could be reserved now, counting what could be evicted.
    pub(crate) fn pages_suffice(&self, span: &Span, tokens: u32) -> bool {
        self.pages_needed(span, tokens).iter().all(|(class, needed)| self.pages.available(*class) >= *needed)
    }

    /// Admits a sequence. A refusal comes back at once and nothing is kept.
    pub fn handle_admit(&mut self, now: Now, admit: Admit) -> Result<SequenceId, (Code, String, Retry)> {
        let span = &self.spans[admit.span.0 as usize];
        if !span.hosted {
            return Err((Code::UnknownSpan, "the executor no longer holds this span".to_owned(), Retry::Elsewhere));
        }
        if let Some(id) = self.by_key.get(&admit.key).copied() {
            if self.sequences[&id].epoch >= admit.epoch {
                return Err((
                    Code::StalePlan,
                    format!("{} runs already under epoch {}", admit.key, self.sequences[&id].epoch),
                    Retry::Never,
                ));
            }
            self.remove(id);
            self.outputs.push_back(Output::Release(id));
        }
        let span = &self.spans[admit.span.0 as usize];
        let most = admit.prompt_tokens.saturating_add(admit.generated_tokens_max);
        for (class, needed) in self.pages_needed(span, most) {
            let most_pages = self.pages.slot_count_max(class);
            if needed > most_pages {
                let message = format!("{most} tokens need {needed} KV pages, this executor has {most_pages} for the model's shape");
                return Err((Code::NeverFits, message, Retry::Elsewhere));
            }
        }
        if self.waiting.len() >= self.limits.waiting_max as usize {
            return Err((Code::TooManyRequests, format!("{} sequences wait already", self.waiting.len()), Retry::Elsewhere));
        }
        let id = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let path = span.path.clone();
        let attention_count = span.attention.len();
        self.by_key.insert(admit.key.clone(), id);
        self.waiting.insert((admit.priority, id));
        let sequence = Sequence {
            key: admit.key,
            epoch: admit.epoch,
            span: admit.span,
            priority: admit.priority,
            stop_tokens: admit.stop_tokens,
            prompt_tokens: admit.prompt_tokens,
            generated_tokens_max: admit.generated_tokens_max,
            domain: admit.domain,
            admitted_at: now,
            status: Status::Waiting,
            started: false,
            promised_tokens: 0,
            last_batch: BatchId(0),
            base_tokens: admit.tokens.len() as u32,
            tokens: admit.tokens,
            received: 0,
            consumed: 0,
            computed: vec![0; path.len()],
            boundary: vec![VecDeque::new(); path.len() - 1],
            path,
            pages: vec![Vec::new(); attention_count],
            published: vec![0; attention_count],
            hashes: Vec::new(),
            cached_tokens: 0,
        };
        self.sequences.insert(id, sequence);
        // A resumed sequence may already have all it asked for.
        if let Some(reason) = self.end_reason(id) {
            self.finish(id, reason);
        }
        Ok(id)
    }

    /// The id of a sequence under exactly this epoch.
    pub fn find(&self, key: &SequenceKey, epoch: u32) -> Option<SequenceId> {
        let id = *self.by_key.get(key)?;
        (self.sequences[&id].epoch == epoch).then_some(id)
    }

    /// The name of a sequence that is still known.
    pub fn key(&self, id: SequenceId) -> Option<(&SequenceKey, u32)> {
        self.sequences.get(&id).map(|sequence| (&sequence.key, sequence.epoch))
    }

    /// The span that a known sequence runs through.
    pub fn span_of(&self, id: SequenceId) -> Option<SpanIndex> {
        self.sequences.get(&id).map(|sequence| sequence.span)
    }

    /// The client or the executor upstream no longer wants it: everything is freed now; late results are dropped.
    pub fn handle_cancel(&mut self, id: SequenceId) {
        if self.sequences.contains_key(&id) {
            self.remove(id);
            self.outputs.push_back(Output::Release(id));
        }
    }

    /// Rows `start..start + count` came over the link; the caller keeps their bytes until a batch takes them.
    /// Returns false (and fails the sequence) if they do not follow those received before.
    pub fn handle_hidden(&mut self, id: SequenceId, start: u32, count: u32) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        let most = sequence.prompt_tokens + sequence.generated_tokens_max;
        if start != sequence.received || sequence.received.saturating_add(count) > most {
            let message = format!("expected hidden rows from position {}, got {start}+{count}", sequence.received);
            self.fail(id, Code::Internal, message, Retry::Same);
            return false;
        }
        sequence.received += count;
        true
    }

    /// The executor downstream took rows below `position`.
    pub fn handle_consumed(&mut self, id: SequenceId, position: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.consumed = sequence.consumed.max(position);
        }
    }

    /// The owner of the head, downstream, sampled a token.
    pub fn handle_link_token(&mut self, id: SequenceId, position: u32, token: SampledToken) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        if position != sequence.tokens.len() as u32 {
            let message = format!("expected the token at position {}, got {position}", sequence.tokens.len());
            self.fail(id, Code::Internal, message, Retry::Same);
            return;
        }
        self.take_token(id, token);
    }

    /// Something outside failed the sequence (a lost link, a block that could not be read).
    pub fn handle_failure(&mut self, id: SequenceId, code: Code, message: String, retry: Retry) {
        if self.sequences.contains_key(&id) {
            self.fail(id, code, message, retry);
        }
    }

    /// The device finished the oldest batch in flight.
    pub fn handle_batch_done(&mut self, samples: Vec<Sample>) {
        let done = self.in_flight.pop_front().expect("a batch was done that was never handed out");
        for Sample { sequence: id, position, token } in samples {
            // It may have ended while the batch was in flight.
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let feeds_itself = self.spans[sequence.span.0 as usize].host.begins_with_embed;
            match token {
                Err(message) => self.fail(id, Code::Internal, message, Retry::Never),
                Ok(token) if feeds_itself => {
                    assert_eq!(position, sequence.tokens.len() as u32, "tokens are sampled in order");
                    sequence.promised_tokens -= 1;
                    self.take_token(id, token);
                }
                Ok(token) => self.outputs.push_back(Output::SendToken { sequence: id, position, token }),
            }
        }
        let over = self.leaving.extract_if(.., |leaving| leaving.last_batch <= done);
        over.flat_map(|leaving| leaving.pages).for_each(|(class, slot)| self.pages.release(class, slot));
    }

    /// Whether a batch is still on the device.
    fn is_in_flight(&self, batch: BatchId) -> bool {
        self.in_flight.front().is_some_and(|oldest| *oldest <= batch)
    }

    /// The next thing to do, or None until the next event.
    pub fn poll_output(&mut self, now: Now) -> Option<Output> {
        if self.outputs.is_empty() && self.in_flight.len() < self.limits.batches_in_flight_max as usize {
            self.plan_step(now);
        }
        self.outputs.pop_front()
    }

    /// What the engine has counted.
    pub fn counters(&self) -> Counters {
        Counters { evicted_pages: self.pages.evicted_count(), ..self.counters.clone() }
    }

    /// What is there now.
    pub fn gauges(&self) -> Gauges {
        let mut users: BTreeMap<BlockIndex, usize> = BTreeMap::new();
        for span in self.spans.iter().filter(|span| span.hosted) {
            let distinct: BTreeSet<BlockIndex> = span.host.blocks.iter().copied().collect();
            for block in distinct {
                *users.entry(block).or_default() += 1;
            }
        }
        let (used_pages, cached_pages, free_pages) = self.pages.counts();
        Gauges {
            running_count: self.sequences.len() - self.waiting.len(),
            waiting_count: self.waiting.len(),
            used_pages,
            cached_pages,
            free_pages,
            block_count: users.len(),
            shared_block_count: users.values().filter(|count| **count > 1).count(),
        }
    }

    fn take_token(&mut self, id: SequenceId, token: SampledToken) {
        let sequence = self.sequences.get_mut(&id).expect("callers looked it up");
        let index = sequence.generated_tokens();
        sequence.tokens.push(token.token);
        self.counters.generated_tokens += 1;
        self.outputs.push_back(Output::EmitToken { sequence: id, index, token });
        self.publish_pages(id);
        if let Some(reason) = self.end_reason(id) {
            self.finish(id, reason);
        }
    }

    fn end_reason(&self, id: SequenceId) -> Option<Reason> {
        let sequence = &self.sequences[&id];
        if !self.span(sequence.span).host.begins_with_embed || sequence.generated_tokens() == 0 {
            return None;
        }
        let last = sequence.tokens.last()?;
        if sequence.stop_tokens.contains(last) {
            return Some(Reason::Stop);
        }
        (sequence.generated_tokens() >= sequence.generated_tokens_max).then_some(Reason::Length)
    }

    fn finish(&mut self, id: SequenceId, reason: Reason) {
        let sequence = &self.sequences[&id];
        let useful = sequence.tokens.len() as u32 - 1;
        self.counters.discarded_rows += sequence.computed.iter().map(|computed| u64::from(computed.saturating_sub(useful))).sum::<u64>();
        self.remove(id);
        self.outputs.push_back(Output::EmitFinished { sequence: id, reason });
        self.outputs.push_back(Output::Release(id));
    }

    pub(crate) fn fail(&mut self, id: SequenceId, code: Code, message: String, retry: Retry) {
        self.remove(id);
        self.outputs.push_back(Output::EmitFailed { sequence: id, code, message, retry });
        self.outputs.push_back(Output::Release(id));
    }

    fn remove(&mut self, id: SequenceId) {
        self.release_all(id);
        let sequence = self.sequences.remove(&id).expect("callers looked it up");
        self.waiting.remove(&(sequence.priority, id));
        self.by_key.remove(&sequence.key);
    }

    /// Gives back pages (last tokens first, deeper blocks first) and hidden rows; the sequence starts over. Batches in flight
    /// may still write to the pages, so those wait for the last of them. Hidden rows need not: who gets one writes it before
    /// reading it, in a batch that is planned later and so runs later.
    pub(crate) fn release_all(&mut self, id: SequenceId) {
        let last_batch = self.sequences[&id].last_batch;
        let is_in_flight = self.is_in_flight(last_batch);
        let sequence = self.sequences.get_mut(&id).expect("callers looked it up");
        let span = &self.spans[sequence.span.0 as usize];
        let most = sequence.pages.iter().map(Vec::len).max().unwrap_or(0);
        let mut pages = Vec::new();
        for page in (0..most).rev() {
            for (attention, slots) in span.attention.iter().zip(&sequence.pages).rev() {
                pages.extend(slots.get(page).map(|slot| (attention.class, *slot)));
            }
        }
        if is_in_flight && !pages.is_empty() {
            self.leaving.push(Leaving { last_batch, pages });
        } else {
            pages.into_iter().for_each(|(class, slot)| self.pages.release(class, slot));
        }
        sequence.pages.iter_mut().for_each(Vec::clear);
        sequence.published.iter_mut().for_each(|count| *count = 0);
        for boundary in &mut sequence.boundary {
            self.hidden_free.extend(boundary.drain(..));
        }
        sequence.computed.iter_mut().for_each(|computed| *computed = 0);
    }
}

/// Moves a sequence to a new path of the same span if no hidden row of it lies inside a segment of that path.
fn follow_cut(sequence: &mut Sequence, path: &[(SegmentIndex, u32)]) {
    if sequence.path == path {
        return;
    }
    // Step of the old path that computes the block at `offset`.
    let old_step = |offset: u32| sequence.path.partition_point(|(_, start)| *start <= offset) - 1;
    let mut computed = Vec::with_capacity(path.len());
    let mut boundary: Vec<VecDeque<u32>> = Vec::with_capacity(path.len() - 1);
    for (i, (_, start)) in path.iter().enumerate() {
        let first = old_step(*start);
        let last = path.get(i + 1).map_or(sequence.path.len() - 1, |(_, next)| old_step(next - 1));
        if sequence.computed[first] != sequence.computed[last] {
            return;
        }
        computed.push(sequence.computed[first]);
        if i + 1 < path.len() {
            let starts_old_step = path[i + 1].1 == sequence.path[old_step(path[i + 1].1)].1;
            boundary.push(if starts_old_step { sequence.boundary[last].clone() } else { VecDeque::new() });
        }
    }
    sequence.path = path.to_vec();
    sequence.computed = computed;
    sequence.boundary = boundary;
}
