//! Steps that come again: launches that a card was given before are replayed as one, amended where they differ. A decode of so many rows
//! launches the same kernels over the same memory from token to token; what differs lies in the lists that are sent before, and now and then in a grid.

use std::collections::VecDeque;

use crate::driver::{Driver, DriverError, Recording};
use crate::tape::Tape;

/// Fewer launches are asked for one by one.
const LAUNCHES_MIN: usize = 8;
/// Of so many launches one may differ, so that it is a step that came before: amending one costs about as much as asking for it.
const AMENDED_SHARE: usize = 4;
/// Recordings that are kept: one for each number of rows that decode, and more for segments.
const KEPT_MAX: usize = 64;
/// Steps that came once, of which the next that comes again is recorded.
const SEEN_MAX: usize = 32;

/// What was asked of the card, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Launches that were asked for one by one.
    pub launched: u64,
    /// Steps that were recorded.
    pub recorded: u64,
    /// Steps that were replayed, those just recorded among them.
    pub replayed: u64,
    /// Launches that were amended in recordings.
    pub amended: u64,
}

/// Steps that were recorded, with what they do.
#[derive(Default)]
pub(crate) struct Recordings {
    /// The latest used last.
    kept: Vec<(Recording, Tape)>,
    seen: VecDeque<Tape>,
    /// The driver cannot record.
    refused: bool,
    pub(crate) counts: Counts,
}

impl Recordings {
    /// Asks for a tape's launches.
    ///
    /// # Errors
    /// When the card fails.
    pub(crate) fn run(&mut self, card: &dyn Driver, tape: &Tape) -> Result<(), DriverError> {
        if self.refused || tape.len() < LAUNCHES_MIN {
            return self.launch_all(card, tape);
        }
        let most = tape.len() / AMENDED_SHARE;
        let alike =
            |(place, (_, kept)): (usize, &(Recording, Tape))| (kept.key() == tape.key()).then_some((place, kept.changes(tape, most)?));
        if let Some((place, changes)) = self.kept.iter().enumerate().filter_map(alike).min_by_key(|(_, changes)| changes.len()) {
            let (recording, mut kept) = self.kept.remove(place);
            for &change in &changes {
                card.amend(recording, change, &tape.launch(change))?;
            }
            if !changes.is_empty() {
                kept.clone_from(tape);
            }
            self.kept.push((recording, kept));
            self.counts.amended += changes.len() as u64;
            self.counts.replayed += 1;
            return card.replay(recording);
        }
        let came = self.seen.iter().position(|seen| seen.key() == tape.key() && seen.changes(tape, most).is_some());
        let Some(came) = came else {
            // The oldest's memory is used again.
            let mut latest = if self.seen.len() < SEEN_MAX { Tape::default() } else { self.seen.pop_front().unwrap_or_default() };
            latest.clone_from(tape);
            self.seen.push_back(latest);
            return self.launch_all(card, tape);
        };
        let launches: Vec<_> = tape.launches().collect();
        let Some(recording) = card.record(&launches)? else {
            self.refused = true;
            return self.launch_all(card, tape);
        };
        if self.kept.len() == KEPT_MAX {
            let (oldest, _) = self.kept.remove(0);
            card.forget(oldest);
        }
        let mut kept = self.seen.remove(came).unwrap_or_default();
        kept.clone_from(tape);
        self.kept.push((recording, kept));
        self.counts.recorded += 1;
        self.counts.replayed += 1;
        card.replay(recording)
    }

    fn launch_all(&mut self, card: &dyn Driver, tape: &Tape) -> Result<(), DriverError> {
        self.counts.launched += tape.len() as u64;
        tape.launches().try_for_each(|launch| card.launch(&launch))
    }

    /// Gives all of them back.
    pub(crate) fn forget(&mut self, card: &dyn Driver) {
        self.kept.drain(..).for_each(|(recording, _)| card.forget(recording));
    }
}
