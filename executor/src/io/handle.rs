//! What the rest of the process holds of a running executor: admissions in, events of each sequence out.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use ashlar_wire::id::SequenceKey;
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event as SequenceEvent;
use futures::Stream;
use tokio::sync::{mpsc, oneshot};

use super::attach::admission_key;
use super::executor::Event;

/// A handle to a running executor; clones drive the same one.
#[derive(Debug, Clone)]
pub struct ExecutorHandle {
    events: mpsc::UnboundedSender<Event>,
    status: Arc<Mutex<v1::StatusReply>>,
}

/// The events of one sequence. Dropping it cancels the sequence.
#[derive(Debug)]
pub struct SequenceEvents {
    receiver: mpsc::UnboundedReceiver<SequenceEvent>,
    cancel: Option<(SequenceKey, u32)>,
    events: mpsc::UnboundedSender<Event>,
}

impl Stream for SequenceEvents {
    type Item = SequenceEvent;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<SequenceEvent>> {
        let event = std::task::ready!(self.receiver.poll_recv(context));
        if matches!(event, None | Some(SequenceEvent::Finished(_) | SequenceEvent::Failed(_))) {
            self.cancel = None;
        }
        Poll::Ready(event)
    }
}

impl Drop for SequenceEvents {
    fn drop(&mut self) {
        if let Some((key, epoch)) = self.cancel.take() {
            // The engine task may have ended, and the sequence with it.
            let _ = self.events.send(Event::Cancel(key, epoch));
        }
    }
}

impl ExecutorHandle {
    pub(super) fn new(events: mpsc::UnboundedSender<Event>, status: Arc<Mutex<v1::StatusReply>>) -> Self {
        Self { events, status }
    }

    /// Admits a sequence. Refusals come as a `Failed` event.
    pub fn run(&self, admission: v1::Admission) -> SequenceEvents {
        let (sender, receiver) = mpsc::unbounded_channel();
        let cancel = Some((admission_key(&admission), admission.epoch));
        // If the engine task has ended, `sender` is dropped here and the stream ends at once.
        let _ = self.events.send(Event::Run(Box::new(admission), sender));
        SequenceEvents { receiver, cancel, events: self.events.clone() }
    }

    /// Where events for the engine task go.
    pub fn events(&self) -> mpsc::UnboundedSender<Event> {
        self.events.clone()
    }

    /// What the executor holds and does.
    pub fn status(&self) -> v1::StatusReply {
        self.status.lock().expect("no holder panics").clone()
    }

    /// Looks for faults in the engine's books, and counts its pages; `None`: the engine task has ended.
    pub async fn check(&self) -> Option<v1::CheckReply> {
        let (answer, answered) = oneshot::channel();
        let _ = self.events.send(Event::Check(answer));
        answered.await.ok()
    }

    /// Looks for faults in the engine's books: Ok, or the first one.
    pub async fn check_integrity(&self) -> Result<(), String> {
        match self.check().await {
            Some(reply) if reply.fault.is_empty() => Ok(()),
            Some(reply) => Err(reply.fault),
            None => Err("the engine task has ended".to_owned()),
        }
    }
}
