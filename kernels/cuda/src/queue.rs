//! Between the device and its card: launches are gathered until something must come of them, and so are the lists that they read; then the card is sent
//! all lists in one copy and asked for all launches at once, as a recording where they came before (`recordings.rs`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::driver::{Address, Driver, DriverError, Launch};
use crate::memory::Memory;
use crate::recordings::{Counts, Recordings};
use crate::tape::Tape;

/// Bytes of lists at first; a batch with more makes it grow.
const STAGED_BYTES: usize = 4 << 20;
/// Where lists begin. So large that a list which grows by a little leaves those after it where they were, and launches as they are.
const ALIGNMENT: usize = 1024;
/// Lists that one is compared with: each layer asks for the same few.
const COMPARED: usize = 8;

/// A card behind a queue: a [`Driver`] whose launches begin when something is fetched, sent or given back, or [`Queue::submit`] says so.
pub(crate) struct Queue {
    card: Arc<dyn Driver>,
    state: Mutex<State>,
}

struct State {
    tape: Tape,
    recordings: Recordings,
    /// Where lists lie on the card.
    memory: Memory,
    /// The lists as they lie there.
    staged: Vec<u8>,
    /// Of these, from the first, on the card or on the way.
    sent: usize,
    /// Begin and length of the latest lists.
    lists: Vec<(usize, usize)>,
}

impl Queue {
    pub(crate) fn new(card: Arc<dyn Driver>) -> Result<Self, DriverError> {
        let memory = Memory::new(&card, STAGED_BYTES)?;
        let state =
            State { tape: Tape::default(), recordings: Recordings::default(), memory, staged: Vec::new(), sent: 0, lists: Vec::new() };
        Ok(Self { card, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists on the card, for launches that are asked for before [`Queue::begin`] is called again. The same list has the same place.
    pub(crate) fn stage<const N: usize>(&self, lists: [&[u8]; N]) -> Result<[Address; N], DriverError> {
        let mut state = self.state();
        let bytes: usize = lists.iter().map(|list| list.len().next_multiple_of(ALIGNMENT)).sum();
        if state.staged.len() + bytes > state.memory.bytes() {
            state.submit(&*self.card)?;
            state.begin();
            if bytes > state.memory.bytes() {
                state.memory = Memory::new(&self.card, bytes.next_power_of_two())?;
            }
        }
        Ok(lists.map(|list| state.place(list)))
    }

    /// Asks for all that was gathered.
    ///
    /// # Errors
    /// When the card fails.
    pub(crate) fn submit(&self) -> Result<(), DriverError> {
        self.state().submit(&*self.card)
    }

    /// Lists that were staged are not needed any more: what reads them was asked for, and nobody is about to ask for more.
    pub(crate) fn begin(&self) -> Result<(), DriverError> {
        let mut state = self.state();
        state.submit(&*self.card)?;
        state.begin();
        Ok(())
    }

    pub(crate) fn counts(&self) -> Counts {
        self.state().recordings.counts
    }
}

impl State {
    fn submit(&mut self, card: &dyn Driver) -> Result<(), DriverError> {
        let outcome = self.ask(card);
        // A card that failed is asked for nothing twice.
        self.sent = self.staged.len();
        self.tape.clear();
        outcome
    }

    fn ask(&mut self, card: &dyn Driver) -> Result<(), DriverError> {
        if self.sent < self.staged.len() {
            card.send(self.memory.at(self.sent, self.staged.len() - self.sent), &self.staged[self.sent..])?;
        }
        if self.tape.len() == 0 { Ok(()) } else { self.recordings.run(card, &self.tape) }
    }

    fn begin(&mut self) {
        self.staged.clear();
        self.lists.clear();
        self.sent = 0;
    }

    fn place(&mut self, list: &[u8]) -> Address {
        let same = |(begin, bytes): &&(usize, usize)| *bytes == list.len() && &self.staged[*begin..][..*bytes] == list;
        let begin = match self.lists.iter().rev().take(COMPARED).find(same) {
            Some((begin, _)) => *begin,
            None => {
                let begin = self.staged.len();
                self.staged.extend_from_slice(list);
                self.staged.resize(self.staged.len().next_multiple_of(ALIGNMENT), 0);
                self.lists.push((begin, list.len()));
                begin
            }
        };
        self.memory.at(begin, list.len())
    }
}

impl Driver for Queue {
    fn describe(&self) -> String {
        self.card.describe()
    }

    fn shared_bytes_max(&self) -> usize {
        self.card.shared_bytes_max()
    }

    fn memory_bytes(&self) -> Result<(u64, u64), DriverError> {
        self.card.memory_bytes()
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DriverError> {
        self.card.allocate(bytes)
    }

    fn free(&self, memory: Address) {
        // What was gathered may use it.
        if let Err(error) = self.submit()
            && !std::thread::panicking()
        {
            tracing::error!(%error, "the card was not asked for what uses memory that is given back");
        }
        self.card.free(memory);
    }

    fn fill(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        self.card.fill(to, bytes)
    }

    fn send(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        self.submit()?;
        self.card.send(to, bytes)
    }

    fn zero(&self, to: Address, bytes: usize) -> Result<(), DriverError> {
        self.submit()?;
        self.card.zero(to, bytes)
    }

    fn fetch(&self, from: Address, bytes: &mut [u8]) -> Result<(), DriverError> {
        self.submit()?;
        self.card.fetch(from, bytes)
    }

    fn prepare(&self, kernel: &'static str) -> Result<(), DriverError> {
        self.card.prepare(kernel)
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        self.state().tape.push(launch);
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.recordings.forget(&*self.card);
    }
}
