//! An executor: the real engine, a modelled device, and what hangs on sequences outside the engine. It carries out what
//! `executor/src/io/executor.rs` does, with the post for sockets.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use ashlar_executor::state::Now;
use ashlar_executor::state::batch::{RowInput, SampledToken, SequenceId};
use ashlar_executor::state::canary::Canary;
use ashlar_executor::state::engine::{Engine, Output};
use ashlar_executor::state::limits::Limits;
use ashlar_executor::state::sequence::{Admit, Reason, SpanIndex};
use ashlar_executor::state::targets::Targets;
use ashlar_registry::ChainDigest;
use ashlar_registry::record::SpanAssignment;
use ashlar_wire::code::{Code, Retry};
use ashlar_wire::id::{ExecutorId, RouterId, SequenceKey};
use ashlar_wire::v1;
use ashlar_wire::v1::link_frame::Frame;
use ashlar_wire::v1::sequence_event::Event as SequenceEvent;

use crate::Micros;
use crate::alone::{accept, class_salt};
use crate::check::{self, Books, Violation, holds};
use crate::device::{Command, Cost, Device, LinkRows, Sampler};
use crate::events::{Event, Heard, NodeIndex, Process, ToNode};
use crate::hosting::Hosting;
use crate::links::{LinkId, Post};
use crate::models::Model;

/// Who hears of a sequence's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listener {
    Router,
    Upstream(LinkId),
}

/// Everything outside the engine about one sequence.
#[derive(Debug)]
struct Attachment {
    key: SequenceKey,
    epoch: u32,
    listener: Listener,
    downstream: Option<LinkId>,
    prompt_tokens: u32,
    /// Rows that came and no batch has taken.
    inbox: VecDeque<u64>,
    /// Of a span before the end: rows sent down, and those consumed there.
    sent_rows: u32,
    consumed_rows: u32,
    /// Tokens handed on, to see that none is lost or repeated; from the journal on.
    emitted: u32,
}

impl Attachment {
    fn frame(&self, frame: Frame) -> v1::LinkFrame {
        v1::LinkFrame { router_id: self.key.router.0.clone(), sequence_id: self.key.number, epoch: self.epoch, frame: Some(frame) }
    }
}

/// What an executor is, apart from what it does.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) id: ExecutorId,
    pub(crate) class: String,
    pub(crate) memory_bytes: u64,
    pub(crate) limits: Limits,
    pub(crate) cost: Cost,
    /// Time to load a unit of weights.
    pub(crate) load: Micros,
    /// Its books are looked at after so many of its events: after each one, save where recorded prompts fill thousands of pages.
    pub(crate) check_every: u64,
    /// How long sequences of a span that is no longer wanted may go on.
    pub(crate) retire: Micros,
}

/// An executor.
pub(crate) struct Node {
    pub(crate) identity: Identity,
    pub(crate) process: Process,
    pub(crate) is_alive: bool,
    pub(crate) is_draining: bool,
    pub(crate) engine: Engine,
    pub(crate) device: Device,
    pub(crate) hosting: Hosting,
    pub(crate) hosted: BTreeMap<SpanAssignment, (SpanIndex, u32)>,
    /// Those of `hosted` that only finish what they have, and until when.
    pub(crate) retiring: BTreeMap<SpanAssignment, Micros>,
    pub(crate) models: Rc<BTreeMap<ChainDigest, Model>>,
    attachments: BTreeMap<SequenceId, Attachment>,
    /// Links downstream, by the id of the executor there.
    links: BTreeMap<ExecutorId, LinkId>,
    pub(crate) books: Books,
    event_count: u64,
    /// When the engine is asked again.
    wakes_at: Option<Micros>,
    /// Models that met in one batch, at most.
    pub(crate) met_most: usize,
    /// Most segments that ran abreast in one batch.
    pub(crate) strands_most: usize,
}

/// The processes that live now, by id.
pub(crate) type Addresses = BTreeMap<ExecutorId, Process>;

impl Node {
    pub(crate) fn new(
        identity: Identity,
        node: NodeIndex,
        incarnation: u64,
        models: Rc<BTreeMap<ChainDigest, Model>>,
        canary: Canary,
    ) -> Self {
        let engine = Engine::with_canary(identity.limits.clone(), canary);
        let device = Device::new(class_salt(&identity.class), identity.limits.page_tokens, identity.cost);
        Self {
            identity,
            process: Process { node, incarnation },
            is_alive: true,
            is_draining: false,
            engine,
            device,
            hosting: Hosting::default(),
            hosted: BTreeMap::new(),
            retiring: BTreeMap::new(),
            models,
            attachments: BTreeMap::new(),
            links: BTreeMap::new(),
            books: Books::default(),
            event_count: 0,
            wakes_at: None,
            met_most: 0,
            strands_most: 0,
        }
    }

    /// Takes an event, carries out all that follows, and checks.
    pub(crate) fn handle(&mut self, post: &mut Post, addresses: &Addresses, event: ToNode) -> Result<(), Violation> {
        let now = Now::from_micros(post.now);
        match event {
            ToNode::Run(admission) => {
                let (number, epoch) = (admission.sequence_id, admission.epoch);
                if let Err((code, message, retry)) = self.admit(post, addresses, *admission, 0, Listener::Router) {
                    post.router_hears(number, epoch, Heard::Event(SequenceEvent::Failed(failed(code, &message, retry))));
                }
            }
            ToNode::Cancel(key, epoch) => {
                if let Some(id) = self.engine.find(&key, epoch) {
                    self.engine.handle_cancel(id);
                }
            }
            ToNode::FromUpstream(link, frame) => self.handle_upstream(post, addresses, link, *frame),
            ToNode::FromDownstream(_, frame) => self.handle_downstream(post, *frame),
            ToNode::UpstreamLost(link) => {
                let lost = self.attached(|attachment| attachment.listener == Listener::Upstream(link));
                lost.into_iter().for_each(|id| self.engine.handle_cancel(id));
            }
            ToNode::DownstreamLost(link) => {
                self.links.retain(|_, open| *open != link);
                for id in self.attached(|attachment| attachment.downstream == Some(link)) {
                    self.engine.handle_failure(id, Code::Unavailable, "lost the executor downstream".to_owned(), Retry::Elsewhere);
                }
            }
            ToNode::BatchDone => {
                let (batch, elapsed, samples, rows) = self.device.end();
                self.books.done();
                rows.into_iter().for_each(|rows| self.send_rows(post, rows));
                self.engine.handle_batch_done(now, Duration::from_micros(elapsed), samples);
                self.engine.recycle(*batch);
            }
            ToNode::Plan(plan) => self.obey(post, &plan)?,
            ToNode::Loaded => self.loaded(post)?,
            ToNode::RetireDue => {}
            ToNode::Wake => self.wakes_at = None,
            ToNode::HostAgain => self.load_next(post)?,
        }
        loop {
            while let Some(output) = self.engine.poll_output(now) {
                self.act(post, output)?;
            }
            if !self.unhost_retired(post)? {
                break;
            }
        }
        self.begin_batch(post);
        if let Some(at) = self.engine.wake_at().map(|at| at.as_micros() as Micros)
            && self.wakes_at.is_none()
        {
            let at = at.max(post.now + 1);
            self.wakes_at = Some(at);
            post.queue.at(at, Event::ToNode(self.process, ToNode::Wake));
        }
        self.event_count += 1;
        if self.event_count.is_multiple_of(self.identity.check_every) {
            check::engine(&self.identity.id.0, &self.engine, &self.identity.limits)?;
        }
        if self.attachments.is_empty() && self.device.running.is_none() {
            check::idle(&self.identity.id.0, &self.engine)?;
        }
        Ok(())
    }

    fn attached(&self, which: impl Fn(&Attachment) -> bool) -> Vec<SequenceId> {
        self.attachments.iter().filter(|(_, attachment)| which(attachment)).map(|(id, _)| *id).collect()
    }

    /// Has the device begin its next batch, if it has none.
    pub(crate) fn begin_batch(&mut self, post: &mut Post) {
        if let Some(elapsed) = self.device.begin() {
            post.after(elapsed, Event::ToNode(self.process, ToNode::BatchDone));
        }
    }

    fn send_rows(&mut self, post: &mut Post, rows: LinkRows) {
        let Some(attachment) = self.attachments.get_mut(&rows.sequence) else { return };
        let Some(link) = attachment.downstream else { return };
        attachment.sent_rows = rows.start + rows.rows.len() as u32;
        let mut bytes = Vec::with_capacity(rows.rows.len() * rows.width as usize * 4);
        for row in &rows.rows {
            bytes.extend_from_slice(&row.to_le_bytes());
            bytes.resize(bytes.len() + (rows.width as usize - 2) * 4, 0);
        }
        post.down(link, attachment.frame(Frame::Hidden(v1::HiddenRows { start: rows.start, width: rows.width, rows: bytes.into() })));
    }

    fn admit(
        &mut self,
        post: &mut Post,
        addresses: &Addresses,
        admission: v1::Admission,
        hop_index: usize,
        listener: Listener,
    ) -> Result<(), (Code, String, Retry)> {
        let refuse = |code, message: &str| Err((code, message.to_owned(), Retry::Elsewhere));
        if admission.numeric_class != self.identity.class {
            return refuse(Code::NumericClass, "the sequence is pinned to another class");
        }
        let Some(span) = admission.route.get(hop_index).and_then(|hop| hop.span.as_ref()) else {
            return refuse(Code::UnknownSpan, "no hop of the route names this executor");
        };
        let key = span_key(span).filter(|key| !self.retiring.contains_key(key));
        let Some((key, (index, _))) = key.and_then(|key| self.hosted.get(&key).map(|hosted| (key, *hosted))) else {
            return refuse(Code::UnknownSpan, "this executor does not hold the span named");
        };
        let model = &self.models[&key.chain];
        let lineage = |through: u32| model.lineages[through as usize - 1].0.as_slice();
        if span.lineage_to != lineage(span.to) || (span.from > 0 && span.lineage_from != lineage(span.from)) {
            return refuse(Code::UnknownSpan, "the span's lineage is not the one held here");
        }
        let cache_domain = <[u8; 32]>::try_from(admission.cache_domain.as_slice()).expect("the router makes it");
        let mut domain = blake3::Hasher::new_keyed(&cache_domain);
        domain.update(self.identity.class.as_bytes());
        let key_of = SequenceKey { router: RouterId(admission.router_id.clone()), number: admission.sequence_id };
        let mut tokens = admission.prompt.clone();
        tokens.extend_from_slice(&admission.generated);
        let history = tokens.iter().fold(0, |history, token| accept(history, *token));
        let (from, to, prompt_tokens) = (span.from, span.to, admission.prompt.len() as u32);
        let admit = Admit {
            key: key_of.clone(),
            epoch: admission.epoch,
            span: index,
            tokens,
            prompt_tokens,
            generated_tokens_max: admission.generated_tokens_max,
            stop_tokens: admission.stop_tokens.clone(),
            priority: admission.priority,
            tenant: admission.tenant.clone(),
            weight: admission.tenant_weight,
            targets: Targets { ttft_ms: admission.ttft_ms, gap_ms: admission.gap_ms },
            domain: *domain.finalize().as_bytes(),
        };
        let id = self.engine.handle_admit(Now::from_micros(post.now), admit)?;
        let sampler = Sampler { seed: admission.seed, domain: cache_domain, history, latest: None };
        self.device.commands.push_back(Command::Admit(id, sampler));
        let mut attachment = Attachment {
            key: key_of,
            epoch: admission.epoch,
            listener,
            downstream: None,
            prompt_tokens,
            inbox: VecDeque::new(),
            sent_rows: 0,
            consumed_rows: 0,
            emitted: admission.generated.len() as u32,
        };
        let is_end = to as usize == self.models[&key.chain].blocks.len();
        debug_assert!(from < to, "spans have blocks");
        if !is_end && let Some(next) = admission.route.get(hop_index + 1) {
            let next = ExecutorId(next.executor_id.clone());
            let process = self.process;
            let link = *self.links.entry(next).or_insert_with_key(|id| post.open(process, addresses.get(id).copied()));
            post.down(link, attachment.frame(Frame::Admit(admission)));
            attachment.downstream = Some(link);
        }
        self.attachments.insert(id, attachment);
        Ok(())
    }

    fn handle_upstream(&mut self, post: &mut Post, addresses: &Addresses, link: LinkId, frame: v1::LinkFrame) {
        let key = SequenceKey { router: RouterId(frame.router_id.clone()), number: frame.sequence_id };
        let (router_id, sequence_id, epoch) = (frame.router_id, frame.sequence_id, frame.epoch);
        match frame.frame {
            Some(Frame::Admit(admission)) => {
                let hop_index = self.hop_of_mine(&admission);
                if let Err((code, message, retry)) = self.admit(post, addresses, admission, hop_index, Listener::Upstream(link)) {
                    let failed = Frame::Failed(failed(code, &message, retry));
                    post.up(link, v1::LinkFrame { router_id, sequence_id, epoch, frame: Some(failed) });
                }
            }
            Some(Frame::Hidden(hidden)) => {
                let Some(id) = self.engine.find(&key, epoch) else { return };
                let row_bytes = hidden.width as usize * 4;
                let count = (hidden.rows.len() / row_bytes) as u32;
                if self.engine.handle_hidden(id, hidden.start, count)
                    && let Some(attachment) = self.attachments.get_mut(&id)
                {
                    let row = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
                    attachment.inbox.extend(hidden.rows.chunks_exact(row_bytes).map(row));
                }
            }
            Some(Frame::Released(_)) => {
                if let Some(id) = self.engine.find(&key, epoch) {
                    self.engine.handle_cancel(id);
                }
            }
            Some(Frame::Token(_) | Frame::Consumed(_) | Frame::Failed(_)) | None => {}
        }
    }

    /// Which hop of a route that came over a link is this executor's.
    fn hop_of_mine(&self, admission: &v1::Admission) -> usize {
        let hosts = |hop: &v1::Hop| hop.span.as_ref().and_then(span_key).is_some_and(|key| self.hosted.contains_key(&key));
        let mut named = admission.route.iter().enumerate().skip(1).filter(|(_, hop)| hop.executor_id == self.identity.id.0);
        let first = named.clone().next();
        named.find(|(_, hop)| hosts(hop)).or(first).map_or(admission.route.len(), |(index, _)| index)
    }

    fn handle_downstream(&mut self, post: &mut Post, frame: v1::LinkFrame) {
        let key = SequenceKey { router: RouterId(frame.router_id.clone()), number: frame.sequence_id };
        let Some(id) = self.engine.find(&key, frame.epoch) else { return };
        match frame.frame {
            Some(Frame::Consumed(position)) => {
                if let Some(attachment) = self.attachments.get_mut(&id) {
                    attachment.consumed_rows = attachment.consumed_rows.max(position);
                }
                self.engine.handle_consumed(id, position);
            }
            Some(Frame::Token(token)) => {
                let Some(attachment) = self.attachments.get(&id) else { return };
                if let Listener::Upstream(link) = attachment.listener {
                    post.up(link, attachment.frame(Frame::Token(token)));
                    return;
                }
                let position = attachment.prompt_tokens + token.index;
                self.engine.handle_link_token(id, position, SampledToken { token: token.token, logprob: token.logprob, top: Vec::new() });
            }
            Some(Frame::Failed(failed)) => {
                let code = Code::parse(&failed.code).unwrap_or(Code::Internal);
                let retry = match failed.retry() {
                    v1::Retry::Elsewhere => Retry::Elsewhere,
                    v1::Retry::Same => Retry::Same,
                    v1::Retry::Never | v1::Retry::Unspecified => Retry::Never,
                };
                self.engine.handle_failure(id, code, failed.message, retry);
            }
            Some(Frame::Admit(_) | Frame::Hidden(_) | Frame::Released(_)) | None => {}
        }
    }

    fn tell(&self, post: &mut Post, id: SequenceId, event: SequenceEvent) {
        let Some(attachment) = self.attachments.get(&id) else { return };
        match (attachment.listener, event) {
            (Listener::Router, event) => post.router_hears(attachment.key.number, attachment.epoch, Heard::Event(event)),
            (Listener::Upstream(link), SequenceEvent::Failed(failed)) => post.up(link, attachment.frame(Frame::Failed(failed))),
            (Listener::Upstream(_), _) => {}
        }
    }

    fn act(&mut self, post: &mut Post, output: Output) -> Result<(), Violation> {
        match output {
            Output::RunBatch(batch) => {
                let place = |place| *self.hosting.blocks.get(place).expect("the engine runs resident blocks only");
                let chains: Vec<Vec<_>> = batch.strands.iter().map(|strand| strand.blocks.iter().map(place).collect()).collect();
                let alike = |chain: &Vec<(crate::models::Block, u32)>| {
                    chain.iter().map(|(block, width)| (block.form(), block.window, *width)).collect()
                };
                let forms: Vec<Vec<_>> = chains.iter().map(alike).collect();
                holds("alike", forms.iter().all(|form| *form == forms[0]), || format!("batch {}: strands of unlike blocks", batch.id.0))?;
                let blocks = chains.into_iter().next().expect("at least one strand");
                self.strands_most = self.strands_most.max(batch.strands.len());
                self.books.planned(&self.identity.limits, &batch, &blocks)?;
                self.met_most = self.met_most.max(batch.span_count);
                let mut link_rows = BTreeMap::new();
                for rows in batch.rows.iter().filter(|rows| matches!(rows.input, RowInput::Link)) {
                    let attachment = self.attachments.get_mut(&rows.sequence).expect("admitted over a link");
                    link_rows.insert(rows.sequence, attachment.inbox.drain(..rows.count as usize).collect());
                }
                for rows in batch.rows.iter().filter(|rows| matches!(rows.output, ashlar_executor::state::batch::RowOutput::Link)) {
                    let Some(attachment) = self.attachments.get(&rows.sequence) else { continue };
                    let (most, ahead) = (self.identity.limits.link_rows_max, rows.start + rows.count - attachment.consumed_rows);
                    holds("in-flight", ahead <= most, || {
                        format!("sequence {} has {ahead} rows of {most} on its way down a link", attachment.key.number)
                    })?;
                }
                self.device.commands.push_back(Command::Run(Box::new(batch), link_rows));
            }
            Output::EmitStarted { sequence, waited, cached_tokens } => {
                let started = v1::Started { queue_ms: waited.as_secs_f64() * 1e3, cached_tokens };
                self.tell(post, sequence, SequenceEvent::Started(started));
            }
            Output::EmitToken { sequence, index, token } => {
                let attachment = self.attachments.get_mut(&sequence).expect("a token of a sequence that was released");
                let next = std::mem::replace(&mut attachment.emitted, index + 1);
                holds("order", next == index, || format!("sequence {} emits token {index} after {next}", attachment.key.number))?;
                self.tell(post, sequence, SequenceEvent::Token(token_event(index, &token)));
            }
            Output::EmitFinished { sequence, reason } => {
                let reason = match reason {
                    Reason::Stop => v1::FinishReason::Stop,
                    Reason::Length => v1::FinishReason::Length,
                };
                self.tell(post, sequence, SequenceEvent::Finished(v1::Finished { reason: reason.into() }));
            }
            Output::EmitFailed { sequence, code, message, retry } => {
                self.tell(post, sequence, SequenceEvent::Failed(failed(code, &message, retry)));
            }
            Output::SendToken { sequence, position, token } => {
                let Some(attachment) = self.attachments.get_mut(&sequence) else { return Ok(()) };
                let index = position - attachment.prompt_tokens;
                let next = std::mem::replace(&mut attachment.emitted, index + 1);
                holds("order", next == index, || format!("sequence {} sends token {index} after {next}", attachment.key.number))?;
                if let Listener::Upstream(link) = attachment.listener {
                    post.up(link, attachment.frame(Frame::Token(token_event(index, &token))));
                }
            }
            Output::SendConsumed { sequence, position } => {
                let Some(attachment) = self.attachments.get(&sequence) else { return Ok(()) };
                if let Listener::Upstream(link) = attachment.listener {
                    post.up(link, attachment.frame(Frame::Consumed(position)));
                }
            }
            Output::Release(sequence) => {
                self.device.commands.push_back(Command::Release(sequence));
                self.books.released(sequence);
                if let Some(attachment) = self.attachments.remove(&sequence)
                    && let Some(link) = attachment.downstream
                {
                    post.down(link, attachment.frame(Frame::Released(v1::Released {})));
                }
            }
        }
        Ok(())
    }

    /// `idle`, for the whole executor at the end of a run.
    pub(crate) fn check_end(&self) -> Result<(), Violation> {
        let name = &self.identity.id.0;
        let left = (self.attachments.len(), self.device.samplers.len(), self.device.commands.len());
        check::engine(name, &self.engine, &self.identity.limits)?;
        holds("idle", left == (0, 0, 0), || {
            format!("{name} ends with {} attachments, {} samplers and {} commands of its device", left.0, left.1, left.2)
        })?;
        check::idle(name, &self.engine)
    }
}

fn span_key(span: &v1::Span) -> Option<SpanAssignment> {
    Some(SpanAssignment { chain: ChainDigest(span.chain.as_slice().try_into().ok()?), from: span.from, to: span.to })
}

fn token_event(index: u32, token: &SampledToken) -> v1::TokenEvent {
    v1::TokenEvent { index, token: token.token, logprob: token.logprob, top: Vec::new() }
}

fn failed(code: Code, message: &str, retry: Retry) -> v1::Failed {
    let retry = match retry {
        Retry::Never => v1::Retry::Never,
        Retry::Same => v1::Retry::Same,
        Retry::Elsewhere => v1::Retry::Elsewhere,
    };
    v1::Failed { code: code.as_str().to_owned(), message: message.to_owned(), retry: retry.into() }
}
