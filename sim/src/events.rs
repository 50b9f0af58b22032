//! What may happen, and the queue of it in virtual time. Events at one time come in the order in which they were made.

use std::collections::BTreeMap;
use std::rc::Rc;

use ashlar_registry::record::{ExecutorRecord, Plan};
use ashlar_wire::id::SequenceKey;
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event as SequenceEvent;

use crate::Micros;
use crate::links::LinkId;

/// An executor, by its place in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeIndex(pub(crate) usize);

/// A process: an executor that starts again is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Process {
    pub(crate) node: NodeIndex,
    pub(crate) incarnation: u64,
}

/// What the router hears of a call.
#[derive(Debug)]
pub(crate) enum Heard {
    Event(SequenceEvent),
    /// The call failed, or its stream broke.
    Broken,
}

/// What happens to one executor's process; forgotten if that is gone.
#[derive(Debug)]
pub(crate) enum ToNode {
    Run(Box<v1::Admission>),
    /// The router dropped the stream.
    Cancel(SequenceKey, u32),
    /// A frame over a link, from upstream or from downstream.
    FromUpstream(LinkId, Box<v1::LinkFrame>),
    FromDownstream(LinkId, Box<v1::LinkFrame>),
    UpstreamLost(LinkId),
    DownstreamLost(LinkId),
    /// The device has done its oldest batch.
    BatchDone,
    Plan(Rc<Plan>),
    /// Blocks of the span that is being loaded are there.
    Loaded,
    /// Sequences of spans that are no longer wanted have had their time.
    RetireDue,
    /// A span that found no memory may find it now.
    HostAgain,
    /// The engine wants to be asked again.
    Wake,
}

/// What breaks or changes.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    Kill(NodeIndex),
    Restart(NodeIndex),
    /// A link between executors, by a drawn number among those that are open.
    Cut(u64),
    /// It finishes what it has and takes nothing new.
    Drain(NodeIndex),
    AddModel(usize),
    RemoveModel(usize),
}

/// What happens.
#[derive(Debug)]
pub(crate) enum Event {
    /// A request, by its number in the load; of a conversation it is the next turn.
    Arrive(usize),
    /// The client hangs up.
    HangUp(u64),
    /// The wait before the next attempt of a sequence is over; the number tells this wait from later ones.
    Retry(u64, u32),
    /// The router hears of a sequence under an epoch.
    Router(u64, u32, Heard),
    /// The router sees what an executor says of itself.
    Record(Process, Box<ExecutorRecord>),
    /// The lease of a process ran out.
    LeaseOver(Process),
    /// Departed executors are forgotten.
    DepartedOver,
    /// The leader makes a plan.
    MakePlan,
    ToNode(Process, ToNode),
    Fault(Fault),
    /// Looks for sequences that starve.
    Look,
}

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    events: BTreeMap<(Micros, u64), Event>,
    count: u64,
}

impl Queue {
    pub(crate) fn at(&mut self, at: Micros, event: Event) {
        self.count += 1;
        self.events.insert((at, self.count), event);
    }

    pub(crate) fn next(&mut self) -> Option<(Micros, Event)> {
        self.events.pop_first().map(|((at, _), event)| (at, event))
    }
}

impl Event {
    /// One line for the log.
    pub(crate) fn line(&self) -> String {
        match self {
            Self::ToNode(Process { node, .. }, to) => format!("exe_{} {}", node.0, to.line()),
            Self::Router(number, epoch, Heard::Event(SequenceEvent::Token(token))) => {
                format!("router hears sequence {number}/{epoch}: token {} is {}", token.index, token.token)
            }
            Self::Router(number, epoch, heard) => format!("router hears sequence {number}/{epoch}: {heard:?}"),
            Self::Record(process, record) => {
                format!("router sees exe_{} with {} spans, plan {}", process.node.0, record.spans.len(), record.plan_generation)
            }
            other => format!("{other:?}"),
        }
    }
}

impl ToNode {
    fn line(&self) -> String {
        let frame = |frame: &v1::LinkFrame| {
            use v1::link_frame::Frame;
            let what = match &frame.frame {
                Some(Frame::Admit(_)) => "admit".to_owned(),
                Some(Frame::Hidden(rows)) => format!("rows from {}, {} bytes", rows.start, rows.rows.len()),
                Some(Frame::Consumed(position)) => format!("consumed below {position}"),
                Some(Frame::Token(token)) => format!("token {} is {}", token.index, token.token),
                Some(Frame::Released(_)) => "released".to_owned(),
                Some(Frame::Failed(failed)) => format!("failed: {}", failed.message),
                None => "nothing".to_owned(),
            };
            format!("sequence {}/{}: {what}", frame.sequence_id, frame.epoch)
        };
        match self {
            Self::Run(admission) => format!(
                "is called to run sequence {}/{}: {} tokens of prompt, {} generated, {} hops",
                admission.sequence_id,
                admission.epoch,
                admission.prompt.len(),
                admission.generated.len(),
                admission.route.len()
            ),
            Self::Cancel(key, epoch) => format!("is told to cancel sequence {}/{epoch}", key.number),
            Self::FromUpstream(_, of) => format!("hears from upstream: {}", frame(of)),
            Self::FromDownstream(_, of) => format!("hears from downstream: {}", frame(of)),
            Self::UpstreamLost(link) => format!("loses its link {} upstream", link.0),
            Self::DownstreamLost(link) => format!("loses its link {} downstream", link.0),
            Self::BatchDone => "has done a batch".to_owned(),
            Self::Plan(plan) => format!("sees plan {}", plan.generation),
            Self::Loaded => "has loaded a span".to_owned(),
            Self::RetireDue => "looks at spans that retire".to_owned(),
            Self::HostAgain => "tries again to host".to_owned(),
            Self::Wake => "looks for sequences that stand still".to_owned(),
        }
    }
}
