//! The engine's state, its events (`handle_*`) and its outputs (`poll_output`). Which rows run next is in `planner`.
//!
//! The device runs batches in the order in which they were handed out. That is what allows counts to move, pages to
//! be published and hidden rows to change hands when a batch is *planned*: whoever reads them runs later. Plans depend on
//! counts only: a token that a batch in flight samples is promised, and the device alone puts it in (`RowInput::Sampled`).

mod output;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ashlar_wire::code::{Code, Retry};
use ashlar_wire::id::SequenceKey;

pub use self::output::Output;
use super::Now;
use super::batch::{Batch, BatchId, Sample, SampledToken, SequenceId};
use super::canary::Canary;
use super::claim::Shortage;
use super::clock::{Clock, InFlight, Micros};
use super::cost::CostCurve;
use super::counters::{Counters, Gauges};
use super::holdings::Holdings;
use super::lane::Held;
use super::limits::Limits;
use super::pages::{ClassIndex, HandleIndex, LineageIndex, PagePool, TokenHash};
use super::planner::Chosen;
use super::ready::{Entries, Entry, Ready};
use super::segments::{BlockIndex, Segment, SegmentIndex};
use super::sequence::{Admit, Reason, Sequence, SpanIndex, Status};
use super::slab::Sequences;
pub use super::span::HostSpan;
use super::span::Span;
use super::targets::first_row_due;
use super::tenants::{OUTPUT_WEIGHT, Tenants};

/// Handles that come back when a batch is done.
#[derive(Debug)]
pub(crate) struct Leaving {
    /// Whose they were.
    pub(crate) sequence: SequenceId,
    /// The latest batch that may write to their pages.
    pub(crate) last_batch: BatchId,
    /// The handles, in the order in which to release them.
    pub(crate) handles: Vec<HandleIndex>,
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    pub(crate) limits: Limits,
    pub(crate) spans: Vec<Span>,
    pub(crate) segments: Vec<Segment>,
    /// Whether sequences under way keep cuts that no chain needs any more, and the batch after which to look again.
    pub(crate) recut_after: Option<BatchId>,
    pub(crate) lineages: BTreeMap<[u8; 32], LineageIndex>,
    pub(crate) pages: PagePool,
    pub(crate) sequences: Sequences,
    by_key: BTreeMap<SequenceKey, SequenceId>,
    /// Who waits, and whose turn it is.
    pub(crate) tenants: Tenants,
    pub(crate) ready: Ready,
    pub(crate) hidden_free: Vec<u32>,
    /// Of these, slots owed to rows that lie in boundary pages meanwhile: whoever has entered a chain can always go on.
    pub(crate) hidden_owed: u32,
    pub(crate) outputs: VecDeque<Output>,
    /// Batches that the device has, oldest first.
    pub(crate) in_flight: VecDeque<InFlight>,
    pub(crate) clock: Clock,
    /// What each segment costs.
    pub(crate) costs: Vec<CostCurve>,
    /// What blocks were profiled to cost, where they were: where curves of segments begin.
    pub(crate) profiles: BTreeMap<BlockIndex, Arc<CostCurve>>,
    /// Pages of sequences that are gone or gave way while batches with rows of them were in flight.
    pub(crate) leaving: Vec<Leaving>,
    /// Pages that running sequences have left behind their windows in batches that are in flight.
    pub(crate) behind: Vec<Leaving>,
    /// Whether a sequence that runs could not get its pages when the latest step was planned, and whose.
    pub(crate) pages_short: Option<Shortage>,
    /// What tenants hold, and who may give it back.
    pub(crate) holdings: Holdings,
    next_batch: u64,
    pub(crate) counters: Counters,
    /// Distinct blocks hosted, and those that more than one span runs through.
    pub(crate) block_counts: (usize, usize),
    /// Memory of the planner that is used again; empty between plans.
    pub(crate) taken: Entries,
    pub(crate) chosen: Vec<Chosen>,
    pub(crate) twins: Vec<SegmentIndex>,
    /// Batches that were to be planned.
    pub(crate) choices: u64,
    /// Batches that came back.
    pub(crate) spare: Vec<Batch>,
    /// Whether a hosted span is not a whole chain, and when to look next for sequences that stand still.
    pub(crate) hosts_cut_chains: bool,
    pub(crate) stalls_at: Micros,
    /// A defect that a simulation has planted.
    pub(crate) canary: Canary,
}

impl Engine {
    /// An engine that hosts nothing yet. The limits must hold (`Limits::check`).
    pub fn new(limits: Limits) -> Self {
        assert_eq!(limits.check(), Ok(()), "limits are checked when they are read");
        Self {
            hidden_free: (0..limits.hidden_rows_max).rev().collect(),
            pages: PagePool::new(limits.kv_bytes, limits.boundary_bytes),
            hidden_owed: 0,
            limits,
            spans: Vec::new(),
            segments: Vec::new(),
            recut_after: None,
            lineages: BTreeMap::new(),
            sequences: Sequences::default(),
            by_key: BTreeMap::new(),
            tenants: Tenants::default(),
            ready: Ready::default(),
            outputs: VecDeque::new(),
            in_flight: VecDeque::new(),
            clock: Clock::default(),
            costs: Vec::new(),
            profiles: BTreeMap::new(),
            leaving: Vec::new(),
            behind: Vec::new(),
            pages_short: None,
            holdings: Holdings::default(),
            next_batch: 0,
            counters: Counters::default(),
            block_counts: (0, 0),
            taken: Entries::default(),
            chosen: Vec::new(),
            twins: Vec::new(),
            choices: 0,
            spare: Vec::new(),
            hosts_cut_chains: false,
            stalls_at: 0,
            canary: Canary::Healthy,
        }
    }

    /// An engine with a defect, for simulations that prove their checkers.
    pub fn with_canary(limits: Limits, canary: Canary) -> Self {
        Self { canary, ..Self::new(limits) }
    }

    pub(crate) fn span(&self, span: SpanIndex) -> &Span {
        &self.spans[span.0 as usize]
    }

    pub(crate) fn next_batch_id(&mut self) -> BatchId {
        self.next_batch += 1;
        BatchId(self.next_batch)
    }

    /// The batch that was planned last.
    pub(crate) fn latest_batch(&self) -> BatchId {
        BatchId(self.next_batch)
    }

    /// Sequences of a span that have not ended.
    pub fn sequence_count(&self, span: SpanIndex) -> usize {
        self.span(span).sequence_count
    }

    /// Whether pages for `tokens` could be reserved now, counting what could be evicted.
    pub(crate) fn pages_suffice(&self, span: &Span, tokens: u32) -> bool {
        span.pages_for(tokens, self.limits.page_tokens).all(|(class, count)| self.pages.available(class) >= count)
    }

    /// Why so many tokens of a span never fit, if they do not: their pages are more than all that there are.
    fn never_fits(&self, span: SpanIndex, tokens: u32) -> Option<String> {
        let more = |(class, count): (ClassIndex, usize)| (count, self.pages.slot_count_max(class));
        let pages = self.span(span).pages_for(tokens, self.limits.page_tokens);
        let (needed, most) = pages.map(more).find(|(needed, most)| needed > most)?;
        Some(format!(
            "{tokens} tokens need {needed} KV pages, this executor has {most} for the model's shape (executor.kv_bytes); ask for fewer"
        ))
    }

    /// Fails a sequence if so many tokens of it never fit, as they did when it was admitted: a model of another KV shape that was added since
    /// has its share of the pages. True if it did.
    pub(crate) fn fail_if_never_fits(&mut self, id: SequenceId, tokens: u32) -> bool {
        let message = self.never_fits(self.sequences[id].span, tokens);
        if let Some(message) = &message {
            self.fail(id, Code::NeverFits, message.clone(), Retry::Elsewhere);
        }
        message.is_some()
    }

    /// Admits a sequence. A refusal comes back at once and nothing is kept.
    pub fn handle_admit(&mut self, now: Now, admit: Admit) -> Result<SequenceId, (Code, String, Retry)> {
        self.tell_time(now);
        if !self.span(admit.span).hosted {
            return Err((Code::UnknownSpan, "the executor no longer holds this span".to_owned(), Retry::Elsewhere));
        }
        if let Some(id) = self.by_key.get(&admit.key).copied() {
            if self.sequences[id].epoch >= admit.epoch {
                return Err((
                    Code::StalePlan,
                    format!("{} runs already under epoch {}", admit.key, self.sequences[id].epoch),
                    Retry::Never,
                ));
            }
            self.remove(id);
            self.outputs.push_back(Output::Release(id));
        }
        if let Some(message) = self.never_fits(admit.span, admit.prompt_tokens.saturating_add(admit.generated_tokens_max)) {
            return Err((Code::NeverFits, message, Retry::Elsewhere));
        }
        let tenant = self.tenants.named(&admit.tenant, admit.weight);
        self.holdings.weigh(tenant);
        // Who goes on where it was (its executor was lost, or it gave way here) has its place.
        if admit.tokens.len() <= admit.prompt_tokens as usize {
            self.make_room_to_wait(tenant, admit.priority)?;
        }
        let (gap, first_due, wanted_at) = self.wants(&admit.targets);
        let token_at = self.clock.now;
        let span = &mut self.spans[admit.span.0 as usize];
        span.sequence_count += 1;
        let path = Arc::clone(&span.path);
        let key = admit.key.clone();
        let id = self.sequences.add(|id| Sequence {
            id,
            key: admit.key,
            epoch: admit.epoch,
            span: admit.span,
            priority: admit.priority,
            tenant,
            gave_way_at: None,
            is_giver: false,
            passes: 0,
            service_before: 0,
            rank: 0,
            stop_tokens: admit.stop_tokens,
            prompt_tokens: admit.prompt_tokens,
            generated_tokens_max: admit.generated_tokens_max,
            domain: admit.domain,
            admitted_at: now,
            status: Status::Waiting,
            due: first_due,
            gap,
            first_due,
            wanted_at,
            begins_by: None,
            is_decoding: false,
            sampled_in: BatchId(0),
            token_at,
            moved_at: token_at,
            started: false,
            promised_tokens: 0,
            last_batch: BatchId(0),
            chosen_in: 0,
            base_tokens: admit.tokens.len() as u32,
            decodes_from: admit.tokens.len() as u32,
            tokens: admit.tokens,
            received: 0,
            consumed: 0,
            steps: path.fresh_steps(),
            path,
            hashes: Vec::new(),
            cached_tokens: 0,
        });
        self.by_key.insert(key, id);
        self.tenants.add_waiting(tenant, self.sequences[id].turn());
        // A resumed sequence may already have all it asked for.
        if let Some(reason) = self.sequences[id].end_reason() {
            self.finish(id, reason);
        }
        Ok(id)
    }

    /// The id of a sequence under exactly this epoch.
    pub fn find(&self, key: &SequenceKey, epoch: u32) -> Option<SequenceId> {
        let id = *self.by_key.get(key)?;
        (self.sequences[id].epoch == epoch).then_some(id)
    }

    /// The name of a sequence that is still known.
    pub fn key(&self, id: SequenceId) -> Option<(&SequenceKey, u32)> {
        self.sequences.get(id).map(|sequence| (&sequence.key, sequence.epoch))
    }

    /// The span that a known sequence runs through.
    pub fn span_of(&self, id: SequenceId) -> Option<SpanIndex> {
        self.sequences.get(id).map(|sequence| sequence.span)
    }

    /// The client or the executor upstream no longer wants it: everything is freed now; late results are dropped.
    pub fn handle_cancel(&mut self, id: SequenceId) {
        if self.sequences.get(id).is_some() {
            self.remove(id);
            self.outputs.push_back(Output::Release(id));
        }
    }

    /// Rows `start..start + count` came over the link; the caller keeps their bytes until a batch takes them.
    /// Returns false (and fails the sequence) if they do not follow those received before.
    pub fn handle_hidden(&mut self, id: SequenceId, start: u32, count: u32) -> bool {
        let Some(sequence) = self.sequences.get_mut(id) else { return false };
        let most = sequence.prompt_tokens + sequence.generated_tokens_max;
        if start != sequence.received || sequence.received.saturating_add(count) > most {
            let message = format!("expected hidden rows from position {}, got {start}+{count}", sequence.received);
            self.fail(id, Code::Internal, message, Retry::Same);
            return false;
        }
        sequence.received += count;
        sequence.moved_at = self.clock.now;
        self.enqueue(id, 0);
        true
    }

    /// The executor downstream took rows below `position`.
    pub fn handle_consumed(&mut self, id: SequenceId, position: u32) {
        if let Some(sequence) = self.sequences.get_mut(id) {
            sequence.consumed = sequence.consumed.max(position);
            let steps = sequence.steps.len();
            (0..steps).for_each(|step| self.enqueue(id, step));
        }
    }

    /// The owner of the head, downstream, sampled a token.
    pub fn handle_link_token(&mut self, id: SequenceId, position: u32, token: SampledToken) {
        let Some(sequence) = self.sequences.get(id) else { return };
        if position != sequence.tokens.len() as u32 {
            let message = format!("expected the token at position {}, got {position}", sequence.tokens.len());
            self.fail(id, Code::Internal, message, Retry::Same);
            return;
        }
        self.take_token(id, token);
    }

    /// Something outside failed the sequence (a lost link, a block that could not be read).
    pub fn handle_failure(&mut self, id: SequenceId, code: Code, message: String, retry: Retry) {
        if self.sequences.get(id).is_some() {
            self.fail(id, code, message, retry);
        }
    }

    /// The device finished the oldest batch in flight, which took it `elapsed`.
    pub fn handle_batch_done(&mut self, now: Now, elapsed: Duration, samples: Vec<Sample>) {
        self.tell_time(now);
        let batch = self.in_flight.pop_front().expect("a batch was done that was never handed out");
        let done = batch.id;
        self.observe(&batch, elapsed);
        self.clock.paces.batch_done(done);
        self.clock.busy_until = self.clock.now + self.in_flight.iter().map(|batch| batch.predicted).sum::<Micros>();
        for Sample { sequence: id, position, token } in samples {
            // It may have ended while the batch was in flight.
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            match token {
                Err(message) => self.fail(id, Code::ModelFailed, message, Retry::Never),
                Ok(token) if sequence.path.begins_with_embed => {
                    assert_eq!(position, sequence.tokens.len() as u32, "tokens are sampled in order");
                    sequence.promised_tokens -= 1;
                    self.take_token(id, token);
                }
                Ok(token) => {
                    self.token_came(id);
                    self.outputs.push_back(Output::SendToken { sequence: id, position, token });
                }
            }
        }
        let is_over = |leaving: &mut Leaving| leaving.last_batch <= done;
        let over = self.leaving.extract_if(.., is_over).chain(self.behind.extract_if(.., is_over));
        over.flat_map(|leaving| leaving.handles).for_each(|handle| self.pages.release(handle));
        if self.recut_after.is_some_and(|after| after <= done) {
            self.recut();
        }
    }

    /// Takes a batch back whose work is done, to use its memory again. Nothing depends on it.
    pub fn recycle(&mut self, batch: Batch) {
        if self.spare.len() < self.limits.batches_in_flight_max as usize {
            self.spare.push(batch);
        }
    }

    /// Whether a batch is still on the device.
    pub(crate) fn is_in_flight(&self, batch: BatchId) -> bool {
        self.in_flight.front().is_some_and(|oldest| oldest.id <= batch)
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
        Counters { evicted_pages: self.pages.evicted_pages(), ..self.counters.clone() }
    }

    /// What is there now.
    pub fn gauges(&self) -> Gauges {
        let (used_pages, cached_pages, free_pages) = self.pages.counts();
        let (used_boundaries, cached_boundaries, _) = self.pages.boundary_counts();
        Gauges {
            running_count: self.sequences.len() - self.tenants.waiting_count(),
            waiting_count: self.tenants.waiting_count(),
            used_pages,
            cached_pages,
            free_pages,
            boundary_pages: used_boundaries + cached_boundaries,
            block_count: self.block_counts.0,
            shared_block_count: self.block_counts.1,
            gap_target_us: self.clock.paces.iter().next().map_or(0, |(gap, _)| gap),
        }
    }

    /// What is in the prefix cache: lineage at an attention block, and digest of the tokens up to the end of a page. Never depends on
    /// how this executor cuts its chains.
    pub fn cached_keys(&self) -> BTreeSet<([u8; 32], TokenHash)> {
        let digests: BTreeMap<LineageIndex, [u8; 32]> = self.lineages.iter().map(|(digest, index)| (*index, *digest)).collect();
        self.pages.cached_keys().into_iter().map(|(lineage, tokens)| (digests[&lineage], tokens)).collect()
    }

    /// Puts a step of a sequence into its segment's ready queue if it has rows ready and is not there yet.
    pub(crate) fn enqueue(&mut self, id: SequenceId, step: usize) {
        let (turn, waits_until) = (self.turn_due(), self.regroup_due());
        let sequence = &mut self.sequences[id];
        if sequence.status != Status::Running || sequence.steps[step].queued || sequence.ready_count(step, self.limits.link_rows_max) == 0 {
            return;
        }
        sequence.steps[step].queued = true;
        let due = match sequence.due {
            Some(due) if sequence.is_decoding => due.min(turn),
            Some(_) => first_row_due(sequence, step, &self.clock, &self.costs).min(turn),
            None => turn,
        };
        let entry = Entry { priority: sequence.priority, rank: sequence.rank, sequence: id, step: std::cmp::Reverse(step as u32), due };
        self.ready.push(sequence.path.steps[step].segment, entry, sequence.decodes(step), waits_until);
    }

    fn take_token(&mut self, id: SequenceId, token: SampledToken) {
        let sequence = &mut self.sequences[id];
        let index = sequence.generated_tokens();
        sequence.tokens.push(token.token);
        self.counters.generated_tokens += 1;
        self.tenants.charge(sequence.tenant, 1, OUTPUT_WEIGHT);
        let is_first = sequence.begins_by.is_some();
        self.outputs.push_back(Output::EmitToken { sequence: id, index, token });
        if (sequence.tokens.len() as u32).is_multiple_of(self.limits.page_tokens) {
            let steps = sequence.steps.len();
            for step in 0..steps {
                self.publish(id, step);
                self.slide(id, step);
            }
        }
        if let Some(reason) = self.sequences[id].end_reason() {
            self.finish(id, reason);
            return;
        }
        if is_first {
            self.look_at_first(id);
        }
        self.token_came(id);
        self.enqueue(id, 0);
    }

    fn finish(&mut self, id: SequenceId, reason: Reason) {
        let sequence = &self.sequences[id];
        let useful = sequence.tokens.len() as u32 - 1;
        self.counters.discarded_rows += sequence.steps.iter().map(|step| u64::from(step.computed.saturating_sub(useful))).sum::<u64>();
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
        if self.sequences[id].status == Status::Running {
            self.stop_running(id);
        }
        let sequence = self.sequences.remove(id);
        self.spans[sequence.span.0 as usize].sequence_count -= 1;
        match sequence.status {
            Status::Waiting => self.tenants.remove_waiting(sequence.tenant, sequence.turn()),
            Status::Running => self.tenants.count_running(sequence.tenant, false),
        }
        self.by_key.remove(&sequence.key);
    }

    /// Gives back pages (last tokens first, deeper ones first) and hidden rows; the sequence starts over. Batches in flight
    /// may still write to the pages, so those wait for the last of them. Hidden rows (and boundary pages) need not: who gets one writes
    /// it before reading it, in a batch that is planned later and so runs later.
    pub(crate) fn release_all(&mut self, id: SequenceId) {
        self.stop_decoding(id);
        let is_in_flight = self.canary != Canary::FreesInFlight && self.is_in_flight(self.sequences[id].last_batch);
        let sequence = &mut self.sequences[id];
        let lanes = || sequence.steps.iter().flat_map(|step| &step.lanes);
        let (first, most) = (lanes().map(|held| held.from).min().unwrap_or(0), lanes().map(Held::to).max().unwrap_or(0));
        let mut handles = Vec::with_capacity(if is_in_flight { lanes().map(|held| held.handles.len()).sum() } else { 0 });
        for page in (first..most).rev() {
            for handle in lanes().rev().filter_map(|held| held.get(page)) {
                self.holdings.leave(sequence.tenant, handle, self.pages.slot_counts(handle));
                match is_in_flight {
                    true => handles.push(handle),
                    false => self.pages.release(handle),
                }
            }
        }
        for (i, step) in sequence.steps.iter_mut().enumerate() {
            let kept_from = self.limits.hidden_rows_max;
            self.hidden_owed -= step.kept_rows(kept_from) - step.found;
            step.found = 0;
            self.hidden_free.extend(step.hidden.drain(..).filter(|slot| *slot < kept_from));
            step.boundary.drain(..).rev().for_each(|kept| self.pages.release(kept.handle));
            if step.queued {
                self.ready.remove(sequence.path.steps[i].segment, id, i as u32);
            }
            for held in &mut step.lanes {
                held.handles.clear();
                held.from = 0;
            }
            (step.computed, step.reserved, step.published, step.told, step.queued) = (0, 0, 0, 0, false);
        }
        if !handles.is_empty() && self.canary != Canary::LeaksPages {
            self.leaving.push(Leaving { sequence: id, last_batch: sequence.last_batch, handles });
        }
    }
}
