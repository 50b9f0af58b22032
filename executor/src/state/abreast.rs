//! Segments that are alike, abreast: the ready decodes of all of them in one batch, in which the device computes the layers of one place in one call.
//! Eight models' own layers, a row each, are then as many calls as one model's. Which segments are alike is for `recut` to say.

use super::clock::Micros;
use super::engine::Engine;
use super::meeting::lost_apart;
use super::planner::{Chosen, Room};
use super::ready::Entries;
use super::segments::SegmentIndex;

/// One batch of so many runs abreast where that was seen not to pay, so that it is seen again.
const AGAIN_BATCHES: u64 = 256;

impl Engine {
    /// Adds to the rows that were chosen at a segment those that are ready at its twins, as strands of their own: decodes, and of segments that lose no
    /// more by not waiting for siblings. False if there are none, or if it does not pay. Rows that are due run without waiting for others, and what
    /// is not known to take less than a batch may take, and than it has taken alone, is not added.
    pub(crate) fn join_abreast(
        &mut self,
        segment: SegmentIndex,
        urgent: Micros,
        taken: &mut Entries,
        room: &mut Room,
        chosen: &mut Vec<Chosen>,
    ) -> bool {
        if self.ready.twins(segment).next().is_none() {
            return false;
        }
        let is_decode = |chosen: &Chosen| chosen.count == 1 && self.sequences[chosen.sequence].decodes(chosen.step);
        let rows = chosen.len() as u32;
        let Some(mut micros) = self.known_micros(segment, rows).filter(|_| self.limits.strands_max > 1) else { return false };
        if !chosen.iter().all(is_decode) || chosen.iter().any(|chosen| self.is_due(chosen, urgent)) {
            return false;
        }
        let most = match self.limits.batch_ms_max {
            0 => f64::INFINITY,
            most => f64::from(most) * 1e3,
        };
        let lost = self.lost_now(segment, rows);
        let mut twins = std::mem::take(&mut self.twins);
        twins.extend(self.ready.twins(segment).filter(|twin| {
            let (decodes, chunks) = self.ready.counts(*twin);
            chunks == 0 && self.known_micros(*twin, decodes).is_some() && self.lost_now(*twin, decodes) <= lost
        }));
        twins.truncate(self.limits.strands_max as usize - 1);
        let mut strand = 0;
        for twin in twins.drain(..) {
            let decodes = self.ready.counts(twin).0;
            let more = self.known_micros(twin, decodes).unwrap_or(f64::INFINITY);
            let pays = self.clock.abreast * (micros + more) <= micros + more + self.clock.between * f64::from(strand + 1);
            let tries = self.latest_batch().0.is_multiple_of(AGAIN_BATCHES);
            if decodes > room.rows || micros + more > most || !(pays || tries) {
                continue;
            }
            micros += more;
            self.ready.take(twin, taken);
            taken.decodes.sort_unstable();
            let before = chosen.len();
            for entry in taken.decodes.drain(..) {
                self.choose(twin, entry, true, strand + 1, room, chosen);
            }
            strand += u32::from(chosen.len() > before);
        }
        self.twins = twins;
        strand > 0
    }

    /// Whether the next token of a chosen row would be late after a pass of all others, and need not be.
    fn is_due(&self, chosen: &Chosen, urgent: Micros) -> bool {
        let sequence = &self.sequences[chosen.sequence];
        sequence.due.is_some_and(|due| due <= urgent) && sequence.gap > urgent - self.clock.start()
    }

    /// Microseconds that are lost if decodes that are ready at a segment run now, and their siblings later.
    fn lost_now(&self, segment: SegmentIndex, decodes: u32) -> f64 {
        let waits = self.ready.waits_until(segment) > self.clock.now;
        if waits { lost_apart(&self.costs, &self.clock.decoding, self.limits.step_tokens_max, segment, decodes, 0) } else { 0.0 }
    }

    /// Microseconds of a batch of so many rows of a segment, if one as large has run.
    fn known_micros(&self, segment: SegmentIndex, rows: u32) -> Option<f64> {
        let curve = &self.costs[segment.0 as usize];
        curve.predict(rows).filter(|_| curve.is_known(rows))
    }
}
