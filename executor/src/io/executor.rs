//! The task that drives the engine: events in (routers, links, device, hosting), outputs carried out. One task owns all
//! state, so there is nothing to lock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ashlar_kernels::ops::Ops;
use ashlar_wire::code::{Code, Retry};
use ashlar_wire::id::SequenceKey;
use ashlar_wire::v1;
use ashlar_wire::v1::link_frame::Frame;
use ashlar_wire::v1::sequence_event::Event as SequenceEvent;
use bytes::Bytes;
use futures::FutureExt;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::adapters::AdapterIndex;
use super::attach::{Attachment, Downstream, FrameSender, LinkId, Listener, admission_key, frame_key};
use super::device::{self, Command, Reply};
pub use super::handle::{ExecutorHandle, SequenceEvents};
use super::hosting::{HostedSpan, SpanKey};
use super::links::Links;
use super::metrics::ExecutorMetrics;
use super::told::{failed, failed_event, failure, sampled_token, token_event};
use crate::model::outputs::{WeightBytes, total_bytes};
use crate::model::sampler::{Sampler, SamplerParams};
use crate::state::batch::{RowInput, SequenceId};
use crate::state::engine::{Engine, Output};
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, Reason, SpanIndex};
use crate::state::targets::Targets;

/// Time between copies of the engine's gauges into metrics while it is busy.
const GAUGE_INTERVAL: Duration = Duration::from_millis(200);

/// How long sequences of a span that is no longer wanted may go on.
const RETIRE_MAX: Duration = Duration::from_secs(120);

/// What an executor is, apart from its load.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its id in the registry.
    pub executor_id: String,
    /// Device, instruction set, threads.
    pub device: String,
    /// Executors of one class give the same bits.
    pub numeric_class: String,
}

/// What the engine task is told.
#[derive(Debug)]
pub enum Event {
    /// A router opened `Run`.
    Run(Box<v1::Admission>, mpsc::UnboundedSender<SequenceEvent>),
    /// The router dropped the stream.
    Cancel(SequenceKey, u32),
    /// A frame from an executor upstream.
    FromUpstream {
        /// Which link.
        link: LinkId,
        /// What it says.
        frame: v1::LinkFrame,
        /// Frames back.
        back: FrameSender,
    },
    /// An executor upstream is gone.
    UpstreamLost(LinkId),
    /// A frame from an executor downstream.
    FromDownstream(v1::LinkFrame),
    /// An executor downstream is gone, or never was.
    DownstreamLost {
        /// Its address.
        address: String,
        /// Why.
        reason: String,
    },
    /// The device answered.
    Device(DeviceReply),
    /// A span's blocks were handed to the device.
    Host(Box<HostedSpan>),
    /// A span is no longer wanted: it takes no new sequence, and is gone (which the sender is told) when those that it has have ended.
    Retire(SpanKey, oneshot::Sender<()>),
    /// The newest plan that the executor obeys.
    Plan(u64),
    /// Look for faults in the engine's books.
    Check(oneshot::Sender<v1::CheckReply>),
}

/// [`Reply`] without the device's type.
pub struct DeviceReply(pub Reply);

impl std::fmt::Debug for DeviceReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DeviceReply")
    }
}

/// Starts the device thread and the engine task. Returns the handle and the sender of blocks to the device.
///
/// # Errors
/// When the device has no memory for its workspace.
pub fn start<B: Ops>(
    ops: Arc<B>,
    limits: Limits,
    identity: &Identity,
    metrics: ExecutorMetrics,
) -> Result<(ExecutorHandle, std::sync::mpsc::Sender<Command<B>>), Box<dyn std::error::Error + Send + Sync>> {
    let (events, receiver) = mpsc::unbounded_channel();
    let to_engine = events.clone();
    let commands = device::start(ops, limits.clone(), move |reply| {
        // The engine task ends only with the process.
        let _ = to_engine.send(Event::Device(DeviceReply(reply)));
    })?;
    metrics.kv_bytes.set(i64::try_from(limits.kv_bytes).unwrap_or(i64::MAX));
    let status = v1::StatusReply {
        executor_id: identity.executor_id.clone(),
        device: identity.device.clone(),
        numeric_class: identity.numeric_class.clone(),
        kv_bytes: limits.kv_bytes,
        ..v1::StatusReply::default()
    };
    let status = Arc::new(Mutex::new(status));
    let driver = Driver {
        engine: Engine::new(limits),
        commands: commands.clone(),
        links: Links::new(events.clone()),
        attachments: BTreeMap::new(),
        hosted: BTreeMap::new(),
        retiring: BTreeMap::new(),
        numeric_class: identity.numeric_class.clone(),
        status: Arc::clone(&status),
        metrics,
        began: Instant::now(),
        gauges_at: Instant::now(),
        is_busy: false,
        generation: 0,
    };
    tokio::spawn(async move {
        if std::panic::AssertUnwindSafe(driver.drive(receiver)).catch_unwind().await.is_err() {
            // A broken invariant: no book here can be trusted any more. The panic's message was printed by the hook.
            std::process::abort();
        }
    });
    Ok((ExecutorHandle::new(events, status), commands))
}

struct Driver<B: Ops> {
    engine: Engine,
    commands: std::sync::mpsc::Sender<Command<B>>,
    links: Links,
    attachments: BTreeMap<SequenceId, Attachment>,
    hosted: BTreeMap<SpanKey, (SpanIndex, HostedSpan)>,
    /// Those of `hosted` that only finish what they have, and until when.
    retiring: BTreeMap<SpanKey, (Instant, oneshot::Sender<()>)>,
    numeric_class: String,
    status: Arc<Mutex<v1::StatusReply>>,
    metrics: ExecutorMetrics,
    began: Instant,
    gauges_at: Instant,
    /// Whether there were sequences when gauges were last copied.
    is_busy: bool,
    generation: u64,
}

impl<B: Ops> Driver<B> {
    async fn drive(mut self, mut events: mpsc::UnboundedReceiver<Event>) {
        loop {
            let wake = self.engine.wake_at().map(|at| self.began + at);
            let late = self.retiring.values().map(|(until, _)| *until).chain(wake).min();
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
                () = tokio::time::sleep_until(late.unwrap_or_else(Instant::now)), if late.is_some() => {}
            }
            // Everything that has arrived meanwhile joins the same plan.
            while let Ok(event) = events.try_recv() {
                self.handle(event);
            }
            loop {
                while let Some(output) = self.engine.poll_output(self.began.elapsed()) {
                    self.act(output);
                }
                if !self.unhost_retired() {
                    break;
                }
            }
            if events.is_empty() || self.gauges_at.elapsed() > GAUGE_INTERVAL {
                self.gauges_at = Instant::now();
                self.publish();
            }
        }
    }

    fn publish(&mut self) {
        let gauges = self.engine.gauges();
        self.metrics.publish(&gauges, &self.engine.counters());
        let was_busy = std::mem::replace(&mut self.is_busy, gauges.running_count + gauges.waiting_count > 0);
        if cfg!(debug_assertions) && was_busy && !self.is_busy {
            // Nobody waits for it now.
            self.engine.check_integrity().expect("the books of an engine that became idle agree");
        }
        let mut status = self.status.lock().expect("no holder panics");
        status.running = gauges.running_count as u32;
        status.waiting = gauges.waiting_count as u32;
        status.plan_generation = self.generation;
    }

    fn check(&self) -> v1::CheckReply {
        let gauges = self.engine.gauges();
        v1::CheckReply {
            executor_id: self.status.lock().expect("no holder panics").executor_id.clone(),
            fault: self.engine.check_integrity().err().unwrap_or_default(),
            used_pages: gauges.used_pages,
            cached_pages: gauges.cached_pages,
            free_pages: gauges.free_pages,
        }
    }

    fn handle(&mut self, event: Event) {
        let now = self.began.elapsed();
        match event {
            Event::Run(admission, sender) => {
                if let Err((code, message, retry, Listener::Router(sender))) = self.admit(now, *admission, 0, Listener::Router(sender)) {
                    // A router that is gone needs no answer.
                    let _ = sender.send(failed_event(code, &message, retry));
                }
            }
            Event::Cancel(key, epoch) => {
                if let Some(id) = self.engine.find(&key, epoch) {
                    self.engine.handle_cancel(id);
                }
            }
            Event::FromUpstream { link, frame, back } => self.handle_upstream(now, link, frame, back),
            Event::UpstreamLost(link) => {
                let lost: Vec<SequenceId> = self
                    .attachments
                    .iter()
                    .filter(|(_, a)| matches!(&a.listener, Listener::Upstream(id, _) if *id == link))
                    .map(|(id, _)| *id)
                    .collect();
                lost.into_iter().for_each(|id| self.engine.handle_cancel(id));
            }
            Event::FromDownstream(frame) => self.handle_downstream(frame),
            Event::DownstreamLost { address, reason } => {
                self.links.forget(&address);
                let lost: Vec<SequenceId> = self
                    .attachments
                    .iter()
                    .filter(|(_, a)| a.downstream.as_ref().is_some_and(|d| d.address == address))
                    .map(|(id, _)| *id)
                    .collect();
                if !lost.is_empty() {
                    tracing::warn!(address, reason, sequence_count = lost.len(), "lost an executor downstream");
                }
                for id in lost {
                    self.engine.handle_failure(
                        id,
                        Code::Unavailable,
                        format!("lost the executor at {address}: {reason}"),
                        Retry::Elsewhere,
                    );
                }
            }
            Event::Device(DeviceReply(Reply::Done(done))) => {
                self.metrics.step_seconds.observe(done.elapsed.as_secs_f64());
                for rows in done.link_rows {
                    if let Some(attachment) = self.attachments.get(&rows.sequence)
                        && let Some(downstream) = &attachment.downstream
                    {
                        let bytes: Vec<u8> = rows.rows.iter().flat_map(|value| value.to_le_bytes()).collect();
                        let hidden = v1::HiddenRows { start: rows.start, width: rows.width as u32, rows: Bytes::from(bytes) };
                        // A closed link is told by `DownstreamLost`.
                        let _ = downstream.frames.send(attachment.frame(Frame::Hidden(hidden)));
                    }
                }
                self.engine.handle_batch_done(now, done.elapsed, done.samples);
                self.engine.recycle(done.batch);
            }
            Event::Device(DeviceReply(Reply::LoadFailed(block, error))) => {
                // The budget is checked before a block is sent here, so this is a defect of the budget.
                tracing::error!(block = block.0, %error, "the device could not take a block that the budget allowed");
                std::process::abort();
            }
            Event::Device(DeviceReply(Reply::LoadAdapterFailed(adapter, error))) => {
                tracing::error!(adapter = adapter.0, %error, "the device could not take an adapter that the budget allowed");
                std::process::abort();
            }
            Event::Host(span) => self.host(*span),
            Event::Retire(key, done) => {
                self.retiring.insert(key, (Instant::now() + RETIRE_MAX, done));
                self.update_spans();
            }
            Event::Plan(generation) => self.generation = self.generation.max(generation),
            // Whoever asked may have gone.
            Event::Check(answer) => drop(answer.send(self.check())),
        }
    }

    fn host(&mut self, span: HostedSpan) {
        let index = self.engine.handle_host(span.host.clone());
        if !span.adapters.is_empty() {
            self.send(Command::Adapt(index, span.adapters.clone()));
        }
        self.hosted.insert(span.key.clone(), (index, span));
        self.update_spans();
    }

    /// Lets go of retiring spans that have nothing left to do, or no time to do it. Whether there were any.
    fn unhost_retired(&mut self) -> bool {
        let now = Instant::now();
        let is_over = |key: &SpanKey, until: Instant| {
            self.hosted.get(key).is_none_or(|(index, _)| now >= until || self.engine.sequence_count(*index) == 0)
        };
        let over: Vec<SpanKey> =
            self.retiring.iter().filter(|(key, (until, _))| is_over(key, *until)).map(|(key, _)| key.clone()).collect();
        for key in &over {
            if let Some((index, span)) = self.hosted.remove(key) {
                self.engine.handle_unhost(index);
                if !span.adapters.is_empty() {
                    self.send(Command::Adapt(index, Vec::new()));
                }
            }
            if let Some((_, done)) = self.retiring.remove(key) {
                let _ = done.send(());
            }
        }
        if !over.is_empty() {
            self.update_spans();
        }
        !over.is_empty()
    }

    fn update_spans(&mut self) {
        let mut status = self.status.lock().expect("no holder panics");
        let wanted = self.hosted.iter().filter(|(key, _)| !self.retiring.contains_key(key));
        status.spans = wanted.map(|(_, (_, span))| span.to_wire()).collect();
        let (mut weights, mut adapters) = (BTreeMap::<u32, WeightBytes>::new(), BTreeMap::<AdapterIndex, u64>::new());
        for (_, span) in self.hosted.values() {
            weights.extend(span.host.blocks.iter().map(|block| block.0).zip(span.block_weights.iter().copied()));
            adapters.extend(span.adapters.iter().map(|(_, adapter)| *adapter).zip(span.adapter_bytes.iter().copied()));
        }
        status.weight_bytes = total_bytes(weights.into_values()) + adapters.values().sum::<u64>();
        self.metrics.adapters_resident.set(adapters.len() as i64);
        self.metrics.weight_bytes.set(i64::try_from(status.weight_bytes).unwrap_or(i64::MAX));
    }

    /// Admits one hop of an admission. On refusal the listener comes back to be told.
    fn admit(
        &mut self,
        now: Duration,
        admission: v1::Admission,
        hop_index: usize,
        listener: Listener,
    ) -> Result<(), (Code, String, Retry, Listener)> {
        let refuse = |code, message: &str, retry, listener| Err((code, message.to_owned(), retry, listener));
        if !admission.numeric_class.is_empty() && admission.numeric_class != self.numeric_class {
            let message =
                format!("this executor is of class {}, the sequence is pinned to {}", self.numeric_class, admission.numeric_class);
            return refuse(Code::NumericClass, &message, Retry::Elsewhere, listener);
        }
        let Some(span) = admission.route.get(hop_index).and_then(|hop| hop.span.as_ref()) else {
            // It was made for one that had this address before.
            return refuse(Code::UnknownSpan, "no hop of the route names this executor", Retry::Elsewhere, listener);
        };
        let wanted = SpanKey::parse(span).filter(|key| !self.retiring.contains_key(key));
        let Some((index, hosted)) = wanted.and_then(|key| self.hosted.get(&key)) else {
            return refuse(Code::UnknownSpan, "this executor does not hold the span named", Retry::Elsewhere, listener);
        };
        if span.lineage_to != hosted.lineage_to || (span.from > 0 && span.lineage_from != hosted.lineage_from) {
            return refuse(Code::UnknownSpan, "the span's lineage is not the one held here", Retry::Elsewhere, listener);
        }
        if let Some(token) = admission.prompt.iter().chain(&admission.generated).find(|token| **token >= hosted.vocab) {
            let message = format!("token {token} is outside the vocabulary of {}", hosted.vocab);
            return refuse(Code::InvalidValue, &message, Retry::Never, listener);
        }
        let total = admission.prompt.len() as u64 + u64::from(admission.generated_tokens_max);
        if admission.prompt.is_empty() || total > u64::from(hosted.context_tokens) {
            let message = format!("{total} tokens are not within 1..={}", hosted.context_tokens);
            return refuse(Code::ContextLengthExceeded, &message, Retry::Never, listener);
        }
        let Ok(cache_domain) = <[u8; 32]>::try_from(admission.cache_domain.as_slice()) else {
            return refuse(Code::InvalidValue, "the cache domain must be 32 bytes", Retry::Never, listener);
        };
        let mut domain = blake3::Hasher::new_keyed(&cache_domain);
        domain.update(self.numeric_class.as_bytes()).update(b"kv:").update(self.engine.limits.kv_format.name().as_bytes());
        let key = admission_key(&admission);
        let mut tokens = admission.prompt.clone();
        tokens.extend_from_slice(&admission.generated);
        let admit = Admit {
            key: key.clone(),
            epoch: admission.epoch,
            span: *index,
            tokens,
            prompt_tokens: admission.prompt.len() as u32,
            generated_tokens_max: admission.generated_tokens_max,
            stop_tokens: admission.stop_tokens.clone(),
            priority: admission.priority,
            tenant: admission.tenant.clone(),
            weight: admission.tenant_weight,
            targets: Targets { ttft_ms: admission.ttft_ms, gap_ms: admission.gap_ms },
            domain: *domain.finalize().as_bytes(),
        };
        let samples = hosted.host.ends_with_head;
        let id = match self.engine.handle_admit(now, admit) {
            Ok(id) => id,
            Err((code, message, retry)) => return Err((code, message, retry, listener)),
        };
        if samples {
            let params =
                SamplerParams::from(&admission.sampling.clone().unwrap_or_default()).seeded(admission.seed, admission.choice_index);
            let sampler = Box::new(Sampler::new(params, &admission.prompt, &admission.generated));
            self.send(Command::Admit(id, sampler));
        }
        let mut attachment = Attachment {
            key,
            epoch: admission.epoch,
            listener,
            downstream: None,
            prompt_tokens: admission.prompt.len() as u32,
            inbox: VecDeque::new(),
            inbox_taken: 0,
        };
        if !samples && let Some(next) = admission.route.get(hop_index + 1) {
            let address = next.address.clone();
            let frames = self.links.to(&address);
            // A closed link is told by `DownstreamLost`, after which the sequence fails.
            let _ = frames.send(attachment.frame(Frame::Admit(admission)));
            attachment.downstream = Some(Downstream { address, frames });
        }
        self.attachments.insert(id, attachment);
        Ok(())
    }

    fn handle_upstream(&mut self, now: Duration, link: LinkId, frame: v1::LinkFrame, back: FrameSender) {
        let key = frame_key(&frame);
        let (router_id, sequence_id, epoch) = (frame.router_id, frame.sequence_id, frame.epoch);
        match frame.frame {
            Some(Frame::Admit(admission)) => {
                let hop_index = self.hop_of_mine(&admission);
                if let Err((code, message, retry, _)) = self.admit(now, admission, hop_index, Listener::Upstream(link, back.clone())) {
                    let failed = Frame::Failed(failed(code, &message, retry));
                    let _ = back.send(v1::LinkFrame { router_id, sequence_id, epoch, frame: Some(failed) });
                }
            }
            Some(Frame::Hidden(hidden)) => {
                let Some(id) = self.engine.find(&key, epoch) else { return };
                let width = hidden.width as usize;
                let expected = self.attachments.get(&id).is_some_and(|_| width > 0 && hidden.rows.len() % (4 * width) == 0);
                if !expected || !self.width_fits(id, width) {
                    self.engine.handle_failure(id, Code::Internal, format!("hidden rows of width {width} do not fit"), Retry::Elsewhere);
                    return;
                }
                let count = (hidden.rows.len() / 4 / width) as u32;
                if self.engine.handle_hidden(id, hidden.start, count)
                    && let Some(attachment) = self.attachments.get_mut(&id)
                {
                    attachment.inbox.push_back(hidden.rows);
                }
            }
            Some(Frame::Released(_)) => {
                if let Some(id) = self.engine.find(&key, epoch) {
                    self.engine.handle_cancel(id);
                }
            }
            // Tokens, credits and failures never come from upstream.
            Some(Frame::Token(_) | Frame::Consumed(_) | Frame::Failed(_)) | None => {}
        }
    }

    fn width_fits(&self, id: SequenceId, width: usize) -> bool {
        let span = self.engine.span_of(id);
        self.hosted.values().any(|(index, hosted)| Some(*index) == span && hosted.width as usize == width)
    }

    /// Which hop of a route that came over a link is this executor's: the first after the embedding's that it hosts, else the first
    /// that names it; past the end where none does.
    fn hop_of_mine(&self, admission: &v1::Admission) -> usize {
        let hosts = |hop: &v1::Hop| hop.span.as_ref().and_then(SpanKey::parse).is_some_and(|key| self.hosted.contains_key(&key));
        let id = self.status.lock().expect("no holder panics").executor_id.clone();
        let mut named = admission.route.iter().enumerate().skip(1).filter(|(_, hop)| hop.executor_id == id);
        let first = named.clone().next();
        named.find(|(_, hop)| hosts(hop)).or(first).map_or(admission.route.len(), |(index, _)| index)
    }

    fn handle_downstream(&mut self, frame: v1::LinkFrame) {
        let Some(id) = self.engine.find(&frame_key(&frame), frame.epoch) else { return };
        match frame.frame {
            Some(Frame::Consumed(position)) => self.engine.handle_consumed(id, position),
            Some(Frame::Token(token)) => {
                let Some(attachment) = self.attachments.get(&id) else { return };
                if let Listener::Upstream(_, back) = &attachment.listener {
                    // In the middle of a route: pass it on towards the first executor.
                    let _ = back.send(attachment.frame(Frame::Token(token)));
                    return;
                }
                let position = attachment.prompt_tokens + token.index;
                self.engine.handle_link_token(id, position, sampled_token(token));
            }
            Some(Frame::Failed(failed)) => {
                let (code, retry) = failure(&failed);
                self.engine.handle_failure(id, code, failed.message, retry);
            }
            // Admissions, rows and releases never come from downstream.
            Some(Frame::Admit(_) | Frame::Hidden(_) | Frame::Released(_)) | None => {}
        }
    }

    fn send(&self, command: Command<B>) {
        self.commands.send(command).expect("the device thread ends only with the process");
    }

    fn tell(&self, id: SequenceId, event: SequenceEvent) {
        let Some(attachment) = self.attachments.get(&id) else { return };
        match (&attachment.listener, event) {
            // A router that is gone cancels by dropping the stream.
            (Listener::Router(sender), event) => drop(sender.send(event)),
            (Listener::Upstream(_, back), SequenceEvent::Failed(failed)) => drop(back.send(attachment.frame(Frame::Failed(failed)))),
            // Starts and ends are the first executor's to tell.
            (Listener::Upstream(..), _) => {}
        }
    }

    fn act(&mut self, output: Output) {
        match output {
            Output::RunBatch(batch) => {
                self.metrics.batch(&batch);
                let mut link_rows = Vec::new();
                for rows in batch.rows.iter().filter(|rows| matches!(rows.input, RowInput::Link)) {
                    let span = self.engine.span_of(rows.sequence);
                    let width = self.hosted.values().find(|(index, _)| Some(*index) == span).map_or(0, |(_, hosted)| hosted.width as usize);
                    let attachment = self.attachments.get_mut(&rows.sequence).expect("admitted over a link");
                    link_rows.push((rows.sequence, attachment.take_rows(rows.count as usize * width)));
                }
                self.send(Command::Run(batch, link_rows));
            }
            Output::EmitStarted { sequence, waited, cached_tokens } => {
                self.metrics.queued(waited.as_secs_f64());
                self.tell(sequence, SequenceEvent::Started(v1::Started { queue_ms: waited.as_secs_f64() * 1e3, cached_tokens }));
            }
            Output::EmitToken { sequence, index, token } => self.tell(sequence, SequenceEvent::Token(token_event(index, token))),
            Output::EmitFinished { sequence, reason } => {
                let reason = match reason {
                    Reason::Stop => v1::FinishReason::Stop,
                    Reason::Length => v1::FinishReason::Length,
                };
                self.tell(sequence, SequenceEvent::Finished(v1::Finished { reason: reason.into() }));
            }
            Output::EmitFailed { sequence, code, message, retry } => self.tell(sequence, failed_event(code, &message, retry)),
            Output::SendToken { sequence, position, token } => {
                let Some(attachment) = self.attachments.get(&sequence) else { return };
                if let Listener::Upstream(_, back) = &attachment.listener {
                    let index = position - attachment.prompt_tokens;
                    let _ = back.send(attachment.frame(Frame::Token(token_event(index, token))));
                }
            }
            Output::SendConsumed { sequence, position } => {
                let Some(attachment) = self.attachments.get(&sequence) else { return };
                if let Listener::Upstream(_, back) = &attachment.listener {
                    let _ = back.send(attachment.frame(Frame::Consumed(position)));
                }
            }
            Output::Release(sequence) => {
                self.send(Command::Release(sequence));
                if let Some(attachment) = self.attachments.remove(&sequence)
                    && let Some(downstream) = &attachment.downstream
                {
                    let _ = downstream.frames.send(attachment.frame(Frame::Released(v1::Released {})));
                }
            }
        }
    }
}
