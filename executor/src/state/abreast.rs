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
    /// more than this one by not waiting for siblings. False if there are none, or if it does not pay. A row that is due waits for no others; and
    /// a twin comes along only if it is known what it costs alone, and all together is within what a batch may take.
    pub(crate) fn join_abreast(
        &mut self,
        segment: SegmentIndex,
        urgent: Micros,
        taken: &mut Entries,
        room: &mut Room,
        chosen: &mut Vec<Chosen>,
    ) -> bool {
        let mut twins = std::mem::take(&mut self.twins);
        twins.extend(self.ready.twins(segment));
        let (rows, mut strand) = (chosen.len() as u32, 0);
        let is_decode = |chosen: &Chosen| chosen.count == 1 && self.sequences[chosen.sequence].decodes(chosen.step);
        let may_join = !twins.is_empty() && chosen.iter().all(|chosen| is_decode(chosen) && !self.is_due(chosen, urgent));
        if let Some(mut micros) = self.known_micros(segment, rows).filter(|_| may_join) {
            let lost = self.lost_now(segment, rows);
            let most = match self.limits.batch_ms_max {
                0 => f64::INFINITY,
                most => f64::from(most) * 1e3,
            };
            let tries = self.latest_batch().0.is_multiple_of(AGAIN_BATCHES);
            for twin in twins.iter().copied() {
                if strand + 1 == self.limits.strands_max {
                    break;
                }
                let (decodes, chunks) = self.ready.counts(twin);
                // With a prompt's rows it runs by itself.
                let more = if chunks == 0 { self.known_micros(twin, decodes) } else { None };
                let Some(more) = more else { continue };
                let all = micros + more;
                let pays = self.clock.abreast * all <= all + self.clock.between * f64::from(strand + 1);
                let fits = decodes <= room.rows && all <= most;
                if !fits || !(pays || tries) || self.lost_now(twin, decodes) > lost {
                    continue;
                }
                self.ready.take(twin, taken);
                taken.decodes.sort_unstable();
                let before = chosen.len();
                for entry in taken.decodes.drain(..) {
                    self.choose(twin, entry, true, strand + 1, room, chosen);
                }
                if chosen.len() > before {
                    (strand, micros) = (strand + 1, all);
                }
            }
        }
        twins.clear();
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
