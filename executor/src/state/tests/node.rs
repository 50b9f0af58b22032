//! One engine with its device. Integrity is checked after every event.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ashlar_wire::id::{RouterId, SequenceKey};

use super::device::{ModelDevice, PAGE, SHAPE, host_with};
use crate::state::Now;
use crate::state::batch::{Batch, RowInput, Rows, SampledToken, SequenceId, Strand};
use crate::state::cost::CostCurve;
use crate::state::engine::{Engine, Output};
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, Reason, SpanIndex};
use crate::state::span::HostSpan;
use crate::state::targets::Targets;

pub(super) fn admit(number: u64, span: SpanIndex, prompt: &[u32], count: u32, priority: i32) -> Admit {
    Admit {
        key: SequenceKey { router: RouterId("rtr_test".to_owned()), number },
        epoch: 0,
        span,
        tokens: prompt.to_vec(),
        prompt_tokens: prompt.len() as u32,
        generated_tokens_max: count,
        stop_tokens: Vec::new(),
        priority,
        tenant: "ten_test".to_owned(),
        weight: 1,
        targets: Targets::default(),
        domain: [7; 32],
    }
}

/// Bytes of a boundary page of the test chains.
pub(super) const BOUNDARY_BYTES: u64 = 16 * 4 * 4;

pub(super) fn limits(pages: u64, step: u32, chunk: u32) -> Limits {
    Limits {
        page_tokens: PAGE,
        step_tokens_max: step,
        chunk_tokens_max: chunk,
        sequences_max: step.min(8),
        hidden_rows_max: 4 * step,
        link_rows_max: 2 * chunk,
        kv_bytes: pages * SHAPE.page_bytes() as u64,
        ..Limits::default()
    }
}

/// One engine with its device.
pub(super) struct Node {
    pub(super) engine: Engine,
    pub(super) device: ModelDevice,
    pub(super) inbox: BTreeMap<SequenceId, Vec<u64>>,
    /// Batches handed out and not run, with the rows that came over links for them.
    pub(super) in_flight: VecDeque<(Batch, BTreeMap<SequenceId, Vec<u64>>, u64)>,
    pub(super) tokens: BTreeMap<u64, Vec<u32>>,
    pub(super) cached_tokens: BTreeMap<u64, u32>,
    pub(super) finished: BTreeMap<u64, (Reason, u32)>,
    pub(super) keys: BTreeMap<SequenceId, u64>,
    pub(super) models_met_max: usize,
    pub(super) in_flight_most: usize,
    /// Forms of blocks that are hosted from now on: where they are equal, segments may run abreast. Each its own, unless set.
    pub(super) forms: fn(u32) -> u32,
    /// What blocks that are hosted from now on were profiled to cost.
    pub(super) profiled: Option<fn(u32) -> CostCurve>,
    /// Most strands of a batch.
    pub(super) strands_most: usize,
    /// Each batch planned: its blocks, and rows by sequence.
    pub(super) pictures: Vec<String>,
    /// For each block: batches through it, and their rows.
    pub(super) crossed: BTreeMap<u32, (u64, u64)>,
    /// Sequences that failed.
    pub(super) failed: BTreeSet<u64>,
    pub(super) now_us: u64,
    /// Microseconds that the device takes for a batch; where None, a step is 100 of them.
    pub(super) cost_us: Option<fn(&Batch) -> u64>,
    /// Microseconds between two batches, whatever the device has waiting: not told to the engine.
    pub(super) between_us: u64,
    /// When the device is done with what it has run.
    pub(super) device_free_us: u64,
    /// When each token was emitted, by sequence.
    pub(super) emitted_us: BTreeMap<u64, Vec<u64>>,
    /// The longest that a batch took.
    pub(super) batch_us_most: u64,
    /// The longest that a decode was ready past its time.
    pub(super) late_us_most: u64,
    /// When each sequence started.
    pub(super) started_us: BTreeMap<u64, u64>,
    /// Since when each step of a sequence has rows ready, by how much it had computed then, and of which kind of `waited_us_most` they are.
    ready_since: BTreeMap<(SequenceId, usize, u32), (u64, usize)>,
    /// The longest that a decode was ready and did not run, a row of a prompt within its chain, and one that is to enter it.
    pub(super) waited_us_most: [u64; 3],
}

/// What leaves a node for its neighbour.
pub(super) enum Sent {
    Rows(u64, u32, Vec<u64>),
    Token(u64, u32, SampledToken),
    Consumed(u64, u32),
    Released(u64),
}

impl Node {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            engine: Engine::new(limits),
            device: ModelDevice::default(),
            inbox: BTreeMap::new(),
            in_flight: VecDeque::new(),
            tokens: BTreeMap::new(),
            cached_tokens: BTreeMap::new(),
            finished: BTreeMap::new(),
            keys: BTreeMap::new(),
            models_met_max: 0,
            in_flight_most: 0,
            forms: |block| block,
            profiled: None,
            strands_most: 0,
            pictures: Vec::new(),
            crossed: BTreeMap::new(),
            failed: BTreeSet::new(),
            now_us: 0,
            cost_us: None,
            between_us: 0,
            device_free_us: 0,
            emitted_us: BTreeMap::new(),
            batch_us_most: 0,
            late_us_most: 0,
            started_us: BTreeMap::new(),
            ready_since: BTreeMap::new(),
            waited_us_most: [0; 3],
        }
    }

    /// Hosts a whole chain with adapters, by place.
    pub(super) fn host(&mut self, blocks: &[u32], adapters: &[(u32, u64)]) -> SpanIndex {
        self.host_part(blocks, adapters, 0..blocks.len())
    }

    /// The same for a part of a chain.
    pub(super) fn host_part(&mut self, blocks: &[u32], adapters: &[(u32, u64)], part: Range<usize>) -> SpanIndex {
        let forms = blocks[part.clone()].iter().map(|block| (self.forms)(*block)).collect();
        let costs = blocks[part.clone()].iter().map(|block| self.profiled.map(|profiled| Arc::new(profiled(*block)))).collect();
        let span = self.engine.handle_host(HostSpan { forms, costs, ..host_with(blocks, adapters, part.start, part.end) });
        let within = adapters.iter().filter(|(place, _)| part.contains(&(*place as usize)));
        self.device.adapters.extend(within.map(|(place, adapter)| ((span, place - part.start as u32), *adapter)));
        self.engine.check_integrity().expect("integrity after a re-cut");
        span
    }

    pub(super) fn admit(&mut self, admit: Admit) {
        let number = admit.key.number;
        let id = self.engine.handle_admit(Now::from_micros(self.now_us), admit).expect("admitted");
        self.keys.insert(id, number);
        self.engine.check_integrity().expect("integrity after admit");
    }

    /// Carries out outputs until nothing is left, then runs the oldest batch in flight: all others were planned before anything
    /// was known of it. Returns whether a batch ran.
    pub(super) fn step(&mut self, sent: &mut Vec<Sent>) -> bool {
        self.now_us += if self.cost_us.is_none() { 100 } else { 0 };
        while let Some(output) = self.engine.poll_output(Now::from_micros(self.now_us)) {
            match output {
                Output::RunBatch(batch) => {
                    assert_eq!(batch.row_count, batch.rows.iter().map(|rows| rows.count).sum::<u32>());
                    let distinct: BTreeSet<SequenceId> = batch.rows.iter().map(|rows| rows.sequence).collect();
                    assert_eq!(distinct.len(), batch.rows.len(), "a sequence is in a batch once");
                    assert!(batch.row_count <= self.engine.limits.step_tokens_max);
                    self.models_met_max = self.models_met_max.max(batch.span_count);
                    let mut link_rows = BTreeMap::new();
                    for rows in batch.rows.iter().filter(|rows| matches!(rows.input, RowInput::Link)) {
                        let inbox = self.inbox.get_mut(&rows.sequence).expect("rows came");
                        link_rows.insert(rows.sequence, inbox.drain(..rows.count as usize).collect());
                    }
                    let picture = |(strand, rows): (&Strand, &[Rows])| {
                        let blocks: Vec<String> = strand.blocks.iter().map(|block| block.0.to_string()).collect();
                        let rows: Vec<String> = rows.iter().map(|rows| format!("{}: {}", self.keys[&rows.sequence], rows.count)).collect();
                        format!("[{}] {}", blocks.join(" "), rows.join(", "))
                    };
                    self.pictures.push(batch.strands().map(picture).collect::<Vec<_>>().join(" | "));
                    assert_eq!(batch.strands.iter().map(|strand| strand.row_count).sum::<u32>(), batch.row_count);
                    assert_eq!(batch.strands().map(|(_, rows)| rows.len()).sum::<usize>(), batch.rows.len());
                    for strand in &batch.strands {
                        for block in strand.blocks.iter() {
                            let crossed = self.crossed.entry(block.0).or_default();
                            *crossed = (crossed.0 + 1, crossed.1 + u64::from(strand.row_count));
                        }
                    }
                    self.strands_most = self.strands_most.max(batch.strands.len());
                    self.in_flight.push_back((batch, link_rows, self.now_us));
                    assert!(self.in_flight.len() <= self.engine.limits.batches_in_flight_max as usize);
                    self.in_flight_most = self.in_flight_most.max(self.in_flight.len());
                    self.engine.check_integrity().expect("integrity with a batch in flight");
                }
                Output::EmitToken { sequence, index, token } => {
                    let tokens = self.tokens.entry(self.keys[&sequence]).or_default();
                    assert_eq!(tokens.len(), index as usize, "no token is lost or repeated");
                    tokens.push(token.token);
                    self.emitted_us.entry(self.keys[&sequence]).or_default().push(self.now_us);
                }
                Output::EmitFinished { sequence, reason } => {
                    let key = self.keys[&sequence];
                    self.finished.insert(key, (reason, self.cached_tokens[&key]));
                }
                Output::EmitFailed { sequence, .. } => {
                    self.failed.insert(self.keys[&sequence]);
                }
                Output::SendToken { sequence, position, token } => sent.push(Sent::Token(self.keys[&sequence], position, token)),
                Output::SendConsumed { sequence, position } => sent.push(Sent::Consumed(self.keys[&sequence], position)),
                Output::Release(sequence) => sent.push(Sent::Released(self.keys[&sequence])),
                Output::EmitStarted { sequence, cached_tokens, .. } => {
                    self.cached_tokens.insert(self.keys[&sequence], cached_tokens);
                    self.started_us.insert(self.keys[&sequence], self.now_us);
                }
            }
        }
        if let Some(due) = self.engine.ready.earliest_decode() {
            self.late_us_most = self.late_us_most.max(self.now_us.saturating_sub(due));
        }
        self.watch();
        let Some((batch, link_rows, handed_us)) = self.in_flight.pop_front() else { return false };
        let elapsed_us = self.cost_us.map_or(100, |cost| cost(&batch));
        if self.cost_us.is_some() {
            self.device_free_us = self.device_free_us.max(handed_us) + self.between_us + elapsed_us;
            self.now_us = self.now_us.max(self.device_free_us);
            self.batch_us_most = self.batch_us_most.max(elapsed_us);
        }
        let (samples, links) = self.device.run(&batch, &link_rows);
        for (sequence, start, rows) in links {
            sent.push(Sent::Rows(self.keys[&sequence], start, rows));
        }
        self.engine.handle_batch_done(Now::from_micros(self.now_us), Duration::from_micros(elapsed_us), samples);
        self.engine.recycle(batch);
        self.engine.check_integrity().expect("integrity after a batch");
        true
    }

    /// Notes how long rows have been ready, and how long those had been that were planned just now.
    fn watch(&mut self) {
        let mut ready = BTreeMap::new();
        for sequence in self.engine.sequences.iter() {
            for (i, step) in sequence.steps.iter().enumerate().filter(|(_, step)| step.queued) {
                let rows = (sequence.id, i, step.computed);
                let kind = if sequence.decodes(i) { 0 } else { 1 + usize::from(i == 0) };
                let since = self.ready_since.get(&rows).copied().unwrap_or((self.now_us, kind));
                ready.insert(rows, since);
            }
        }
        for (since, kind) in std::mem::replace(&mut self.ready_since, ready).into_values() {
            self.waited_us_most[kind] = self.waited_us_most[kind].max(self.now_us - since);
        }
    }

    pub(super) fn run_dry(&mut self) {
        let mut sent = Vec::new();
        for _ in 0..20_000 {
            if !self.step(&mut sent) && self.engine.sequences.is_empty() {
                assert_eq!(self.engine.gauges().used_pages, 0);
                assert!(self.failed.is_empty(), "failed: {:?}", self.failed);
                return;
            }
        }
        panic!("{} sequences never ended", self.engine.sequences.len());
    }

    pub(super) fn id(&self, number: u64) -> Option<SequenceId> {
        self.engine.find(&SequenceKey { router: RouterId("rtr_test".to_owned()), number }, 0)
    }
}
