//! Chains that are cut over executors hold all their pages here from start to end, and wait for rows from elsewhere meanwhile. Two of them
//! may so wait for each other for ever: each holds on one executor what the other waits for on another. No executor sees that; what
//! each sees is a sequence that waits and a younger one that holds pages and stands still. Then the younger one fails with the advice to
//! try again (the router resumes it from its journal), and the older one starts. Age is the number that the router drew, so all
//! executors agree on it, the oldest never gives way, and it ends.

use super::Now;
use super::batch::SequenceId;
use super::clock::Micros;
use super::engine::Engine;
use super::sequence::{Sequence, Status};
use ashlar_wire::code::{Code, Retry};

/// How long a sequence stands still, and an older one waits, before it gives way.
const STALL: Micros = 2_000_000;
/// Between two looks.
const LOOK: Micros = 500_000;

/// Lower is older.
fn age(sequence: &Sequence) -> (u64, &str) {
    (sequence.key.number, &sequence.key.router.0)
}

impl Engine {
    /// When the caller is to poll again although nothing has happened: while the device is idle and sequences of cut chains wait for others.
    pub fn wake_at(&self) -> Option<Now> {
        let is_late = self.hosts_cut_chains && self.in_flight.is_empty() && self.stalled_for().is_some();
        is_late.then(|| Now::from_micros(self.clock.now.max(self.stalls_at)))
    }

    /// The oldest sequence of a cut chain that waits here, while a younger one runs.
    fn stalled_for(&self) -> Option<SequenceId> {
        let cut = || self.sequences.iter().filter(|sequence| !sequence.path.is_whole());
        let oldest = cut().filter(|sequence| sequence.status == Status::Waiting).min_by_key(|sequence| age(sequence))?;
        let mut running = cut().filter(|sequence| sequence.status == Status::Running);
        running.any(|sequence| age(sequence) > age(oldest)).then_some(oldest.id)
    }

    /// Lets the oldest sequence of a cut chain start that has waited long, where younger ones that stand still hold what it needs.
    pub(crate) fn break_stalls(&mut self, now: Now) {
        if !self.hosts_cut_chains || self.clock.now < self.stalls_at {
            return;
        }
        self.stalls_at = self.clock.now + LOOK;
        let Some(oldest) = self.stalled_for().map(|id| &self.sequences[id]) else { return };
        let (id, tokens, span) = (oldest.id, oldest.tokens_max(), self.span(oldest.span));
        if self.clock.now < oldest.admitted_at.as_micros() as Micros + STALL {
            return;
        }
        let stands = |s: &&Sequence| s.status == Status::Running && !s.path.is_whole() && self.clock.now >= s.moved_at + STALL;
        let mut younger: Vec<&Sequence> = self.sequences.iter().filter(stands).filter(|s| age(s) > age(oldest)).collect();
        younger.sort_unstable_by_key(|sequence| std::cmp::Reverse(age(sequence)));
        if younger.is_empty() {
            return;
        }
        // Of these so many, the youngest first, that it fits; none if all would not do, or if it fits already and only its turn has not come.
        let mut places = self.sequences.len() - self.tenants.waiting_count();
        let mut missing: Vec<_> = span.pages_for(tokens, self.limits.page_tokens).collect();
        missing.iter_mut().for_each(|(class, needed)| *needed = needed.saturating_sub(self.pages.available(*class)));
        let mut victims = Vec::new();
        let fits = |missing: &[(_, usize)], places| places < self.limits.sequences_max as usize && missing.iter().all(|m| m.1 == 0);
        for sequence in younger {
            if fits(&missing, places) {
                break;
            }
            places -= 1;
            for handle in sequence.steps.iter().flat_map(|step| &step.lanes).flat_map(|held| &held.handles) {
                for (class, count) in self.pages.slot_counts(*handle) {
                    let of_class = missing.iter_mut().filter(|(of, _)| of == class);
                    of_class.for_each(|(_, needed)| *needed = needed.saturating_sub(*count));
                }
            }
            victims.push(sequence.id);
        }
        if !fits(&missing, places) {
            return;
        }
        for victim in victims {
            let message = "it stood still, and an older sequence waited for its pages".to_owned();
            self.fail(victim, Code::Unavailable, message, Retry::Same);
        }
        // What is left to share may have shrunk meanwhile.
        if self.pages_suffice(self.span(self.sequences[id].span), tokens) {
            self.start(now, id);
        }
    }
}
