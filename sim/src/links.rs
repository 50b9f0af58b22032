//! Modelled wires: links between executors, and the streams of calls from the router. Within one link or stream order is kept; between
//! different ones nothing is. What is under way on a wire that breaks is lost.

use std::collections::BTreeMap;

use ashlar_registry::record::ExecutorRecord;
use ashlar_wire::v1;

use crate::Micros;
use crate::dice::Dice;
use crate::events::{Event, Heard, Process, Queue, ToNode};

/// A link that an executor has opened to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

#[derive(Debug)]
struct Link {
    up: Process,
    down: Process,
    is_open: bool,
    /// When the latest frame arrives, at either end.
    last_down: Micros,
    last_up: Micros,
}

/// How long things take on wires.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Delays {
    /// From process to process, at least; and up to so much more, drawn for each message.
    pub(crate) least: Micros,
    pub(crate) more: Micros,
    /// Until an end notices that the other is gone.
    pub(crate) notice: Micros,
}

/// All wires, and the queue that they fill.
#[derive(Debug)]
pub(crate) struct Post {
    pub(crate) now: Micros,
    pub(crate) queue: Queue,
    pub(crate) delays: Delays,
    dice: Dice,
    links: BTreeMap<LinkId, Link>,
    link_count: u64,
    /// When the latest event of a stream arrives, by sequence and epoch.
    streams: BTreeMap<(u64, u32), Micros>,
    /// The same in the other direction.
    calls: BTreeMap<(u64, u32), Micros>,
    /// When the latest record of a process arrives.
    records: BTreeMap<Process, Micros>,
}

impl Post {
    pub(crate) fn new(delays: Delays, dice: Dice) -> Self {
        let (queue, links, records) = (Queue::default(), BTreeMap::new(), BTreeMap::new());
        let (streams, calls) = (BTreeMap::new(), BTreeMap::new());
        Self { now: 0, queue, delays, dice, links, link_count: 0, streams, calls, records }
    }

    /// An event some time from now.
    pub(crate) fn after(&mut self, wait: Micros, event: Event) {
        self.queue.at(self.now + wait, event);
    }

    fn delay(&mut self) -> Micros {
        let more = self.delays.more;
        // Now and then a message takes much longer.
        let times = if self.dice.chance(3) { 10 } else { 1 };
        self.delays.least + self.dice.within(0..=more) * times
    }

    /// An event on a wire of its own.
    pub(crate) fn send(&mut self, event: Event) {
        let delay = self.delay();
        self.after(delay, event);
    }

    /// An event of a call's stream to the router.
    pub(crate) fn router_hears(&mut self, number: u64, epoch: u32, heard: Heard) {
        let arrives = self.now + self.delay();
        let last = self.streams.entry((number, epoch)).or_default();
        *last = arrives.max(*last);
        let at = *last;
        self.queue.at(at, Event::Router(number, epoch, heard));
    }

    /// What the router tells an executor of a call.
    pub(crate) fn call(&mut self, process: Process, number: u64, epoch: u32, to: ToNode) {
        let arrives = self.now + self.delay();
        let last = self.calls.entry((number, epoch)).or_default();
        *last = arrives.max(*last);
        let at = *last;
        self.queue.at(at, Event::ToNode(process, to));
    }

    /// What an executor says of itself; the registry keeps the order.
    pub(crate) fn record(&mut self, process: Process, record: ExecutorRecord) {
        let arrives = self.now + self.delay();
        let last = self.records.entry(process).or_default();
        *last = arrives.max(*last);
        let at = *last;
        self.queue.at(at, Event::Record(process, Box::new(record)));
    }

    /// Forgets the streams of a sequence that has ended.
    pub(crate) fn forget_streams(&mut self, number: u64) {
        for wires in [&mut self.streams, &mut self.calls] {
            while let Some((key, _)) = wires.range((number, 0)..=(number, u32::MAX)).next() {
                let key = *key;
                wires.remove(&key);
            }
        }
    }

    /// Opens a link; `down` may be gone, which the one upstream is told a while later.
    pub(crate) fn open(&mut self, up: Process, down: Option<Process>) -> LinkId {
        self.link_count += 1;
        let id = LinkId(self.link_count);
        let is_open = down.is_some();
        let link = Link { up, down: down.unwrap_or(up), is_open, last_down: 0, last_up: 0 };
        self.links.insert(id, link);
        if !is_open {
            self.send(Event::ToNode(up, ToNode::DownstreamLost(id)));
        }
        id
    }

    pub(crate) fn down(&mut self, id: LinkId, frame: v1::LinkFrame) {
        let delay = self.delay();
        let Some(link) = self.links.get_mut(&id).filter(|link| link.is_open) else { return };
        link.last_down = (self.now + delay).max(link.last_down);
        self.queue.at(link.last_down, Event::ToNode(link.down, ToNode::FromUpstream(id, Box::new(frame))));
    }

    pub(crate) fn up(&mut self, id: LinkId, frame: v1::LinkFrame) {
        let delay = self.delay();
        let Some(link) = self.links.get_mut(&id).filter(|link| link.is_open) else { return };
        link.last_up = (self.now + delay).max(link.last_up);
        self.queue.at(link.last_up, Event::ToNode(link.up, ToNode::FromDownstream(id, Box::new(frame))));
    }

    /// Whether frames that are under way on a link still arrive.
    pub(crate) fn is_open(&self, id: LinkId) -> bool {
        self.links.get(&id).is_some_and(|link| link.is_open)
    }

    /// Cuts a link; both ends are told a while later, each in its own time.
    pub(crate) fn cut(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id).filter(|link| link.is_open) else { return };
        link.is_open = false;
        let (up, down, notice) = (link.up, link.down, self.delays.notice);
        for event in [Event::ToNode(up, ToNode::DownstreamLost(id)), Event::ToNode(down, ToNode::UpstreamLost(id))] {
            let wait = self.dice.within(1..=notice);
            self.after(wait, event);
        }
    }

    /// Cuts the `drawn`th of the open links, counted around.
    pub(crate) fn cut_any(&mut self, drawn: u64) -> bool {
        let open: Vec<LinkId> = self.links.iter().filter(|(_, link)| link.is_open).map(|(id, _)| *id).collect();
        let Some(id) = open.get((drawn % open.len().max(1) as u64) as usize) else { return false };
        self.cut(*id);
        true
    }

    /// A process is gone, and all its links with it.
    pub(crate) fn process_gone(&mut self, process: Process) {
        let of_it: Vec<LinkId> =
            self.links.iter().filter(|(_, link)| link.is_open && (link.up == process || link.down == process)).map(|(id, _)| *id).collect();
        of_it.into_iter().for_each(|id| self.cut(id));
    }
}
