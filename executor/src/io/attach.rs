//! What hangs on a sequence outside the engine: who hears of its tokens, who computes its next span, rows that came in.

use std::collections::VecDeque;

use ashlar_wire::id::{RouterId, SequenceKey};
use ashlar_wire::v1;
use bytes::Bytes;
use tokio::sync::mpsc;

/// Frames to another executor; unbounded, but rows in flight are bounded for each sequence by `link_rows_max`.
pub type FrameSender = mpsc::UnboundedSender<v1::LinkFrame>;

/// Who hears of a sequence's tokens.
#[derive(Debug)]
pub enum Listener {
    /// The router that opened `Run` here.
    Router(mpsc::UnboundedSender<v1::sequence_event::Event>),
    /// The executor upstream, over the link that it opened.
    Upstream(LinkId, FrameSender),
}

/// A link that another executor opened to this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// The executor that owns the next span of the route.
#[derive(Debug)]
pub struct Downstream {
    /// Its address.
    pub address: String,
    /// Frames to it.
    pub frames: FrameSender,
}

/// Everything outside the engine about one sequence.
#[derive(Debug)]
pub struct Attachment {
    /// Its name among routers.
    pub key: SequenceKey,
    /// Under which epoch it runs.
    pub epoch: u32,
    /// Who hears of its tokens.
    pub listener: Listener,
    /// Who computes the rest of the chain.
    pub downstream: Option<Downstream>,
    /// Prompt tokens, to turn positions into indices.
    pub prompt_tokens: u32,
    /// Hidden rows that came and no batch has taken: f32 little-endian, in order.
    pub inbox: VecDeque<Bytes>,
    /// Bytes already taken from the front of `inbox`.
    pub inbox_taken: usize,
}

impl Attachment {
    /// A frame about this sequence.
    pub fn frame(&self, frame: v1::link_frame::Frame) -> v1::LinkFrame {
        v1::LinkFrame { router_id: self.key.router.0.clone(), sequence_id: self.key.number, epoch: self.epoch, frame: Some(frame) }
    }

    /// Takes `value_count` f32 from the inbox; the engine counted that they are there.
    pub fn take_rows(&mut self, value_count: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(value_count);
        while values.len() < value_count {
            let front = self.inbox.front().expect("the engine counts rows received");
            let wanted = (value_count - values.len()) * 4;
            let bytes = &front[self.inbox_taken..];
            let taken = wanted.min(bytes.len());
            values.extend(bytes[..taken].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
            self.inbox_taken += taken;
            if self.inbox_taken == front.len() {
                self.inbox.pop_front();
                self.inbox_taken = 0;
            }
        }
        values
    }
}

/// The name of the sequence that a frame is about.
pub fn frame_key(frame: &v1::LinkFrame) -> SequenceKey {
    SequenceKey { router: RouterId(frame.router_id.clone()), number: frame.sequence_id }
}

/// The name of the sequence that an admission is about.
pub fn admission_key(admission: &v1::Admission) -> SequenceKey {
    SequenceKey { router: RouterId(admission.router_id.clone()), number: admission.sequence_id }
}
