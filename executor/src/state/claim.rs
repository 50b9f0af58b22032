//! What tenants may hold while others wait: their share, by weight, of the places and of the pages. One alone may have all; when another
//! one comes that has less than its share and had less service, sequences of who is above its share give way until it starts. So nobody
//! waits for another tenant's sequence to end. A sequence that gave way does so again only when it is a page further, so it ends.

use std::collections::BTreeMap;

use super::batch::SequenceId;
use super::engine::Engine;
use super::pages::{ClassIndex, HandleIndex};
use super::sequence::{Sequence, Status};
use super::tenants::TenantIndex;
use ashlar_wire::code::{Code, Retry};

/// What a sequence lacks to start, or to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lack {
    /// A place among those that run.
    Place,
    /// Pages of a class.
    Pages(ClassIndex),
}

/// Who runs and lacks pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Shortage {
    /// Sequences of tenants above their share: those of tenants within theirs may start meanwhile.
    AboveShare,
    /// One of a tenant within its share, or of the only one: nobody starts before it.
    WithinShare,
}

/// Things are counted in parts, so that a page that several hold is divided among them.
const PARTS: u64 = 1 << 8;

impl Engine {
    /// What a sequence of so many tokens lacks to start.
    pub(crate) fn lacks(&self, id: SequenceId, tokens: u32) -> Option<Lack> {
        if self.sequences.len() - self.tenants.waiting_count() >= self.limits.sequences_max as usize {
            return Some(Lack::Place);
        }
        let short = |(class, count): &(ClassIndex, usize)| self.pages.available(*class) < *count;
        self.pages_needed(id, tokens).find(short).map(|(class, _)| Lack::Pages(class))
    }

    /// Whether a waiting sequence is within its tenant's share, among others that have sequences: a tenant without any that run may have
    /// one in any case.
    pub(crate) fn is_within_share(&mut self, id: SequenceId, tokens: u32, lack: Lack) -> bool {
        if self.tenants.active_count() < 2 {
            return false;
        }
        let sequence = &self.sequences[id];
        let tenant = sequence.tenant;
        let needed = match lack {
            Lack::Place => 1,
            Lack::Pages(class) => self.pages_needed(id, tokens).filter(|(of, _)| *of == class).map(|(_, count)| count as u64).sum(),
        };
        let held = self.held(lack, tenant);
        self.tenants.running_count(tenant) == 0 || held + needed * PARTS <= self.share(lack, tenant)
    }

    /// The same for all pages that it needs.
    pub(crate) fn is_within_shares(&mut self, id: SequenceId, tokens: u32) -> bool {
        let classes: Vec<ClassIndex> = self.pages_needed(id, tokens).map(|(class, _)| class).collect();
        let mut is_within = |class: ClassIndex| self.is_within_share(id, tokens, Lack::Pages(class));
        classes.into_iter().all(&mut is_within)
    }

    /// Has the latest sequence of the tenant that is most above its share give way, for a waiting one of a tenant within its own; never one of
    /// higher priority, nor of a tenant that had less service. True if one did whose pages are back already.
    pub(crate) fn claim(&mut self, id: SequenceId, tokens: u32, lack: Lack) -> bool {
        // What gave way before comes back first.
        if !self.leaving.is_empty() || !self.is_within_share(id, tokens, lack) {
            return false;
        }
        let (tenant, priority) = (self.sequences[id].tenant, self.sequences[id].priority);
        let mut victim = None;
        for other in self.sequences.iter().filter(|other| other.status == Status::Running && other.priority >= priority) {
            if other.tenant == tenant || !self.may_give_way(other) || !self.holds(other, lack) {
                continue;
            }
            let above = self.held_known(lack, other.tenant).saturating_sub(self.share(lack, other.tenant));
            if above > 0 && self.tenants.counter(other.tenant) >= self.tenants.counter(tenant) {
                victim = victim.max(Some((above, other.priority, other.id)));
            }
        }
        if let Some((_, _, victim)) = victim {
            self.give_way(victim);
        }
        victim.is_some() && self.leaving.is_empty()
    }

    /// What it is that a running sequence lacks pages for a step.
    pub(crate) fn shortage(&mut self, id: SequenceId, step: usize) -> Shortage {
        let class = self.short_class(id, step).filter(|_| self.tenants.active_count() > 1);
        let (tenant, lack) = (self.sequences[id].tenant, class.map(Lack::Pages));
        let is_above = lack.is_some_and(|lack| self.held(lack, tenant) >= self.share(lack, tenant));
        if is_above { Shortage::AboveShare } else { Shortage::WithinShare }
    }

    /// Who gives way to a running sequence that lacks pages, if anybody does: the lowest priority, latest, and never an earlier one of its own
    /// tenant. A tenant within its share takes from one above its own, however early that came, and is spared by it, unless it had had more service when it started.
    pub(crate) fn page_victim(&mut self, id: SequenceId, step: usize) -> Option<SequenceId> {
        let mine = &self.sequences[id];
        let (priority, tenant, rank) = (mine.priority, mine.tenant, mine.rank);
        let later = |other: &(i32, SequenceId)| *other > (priority, id);
        if self.tenants.active_count() < 2 {
            return self.preemptible().filter(later).max().map(|(_, victim)| victim);
        }
        let lack = Lack::Pages(self.short_class(id, step)?);
        let is_above = self.held(lack, tenant) >= self.share(lack, tenant);
        let mut victim = None;
        for (of, other) in self.preemptible() {
            let sequence = &self.sequences[other];
            if other == id || of < priority {
                continue;
            }
            let its = sequence.tenant;
            let its_above = self.held_known(lack, its) > self.share(lack, its);
            // A prompt is counted at once, so who has just started is measured by what its tenant had had then.
            let (i_had_less, it_had_less) = (rank <= self.tenants.counter(its), sequence.rank <= self.tenants.counter(tenant));
            let is_spared = of == priority && its != tenant && is_above && !its_above && it_had_less;
            let may_take =
                its != tenant && !is_above && its_above && i_had_less && self.may_give_way(sequence) && self.holds(sequence, lack);
            if may_take || later(&(of, other)) && !is_spared {
                victim = victim.max(Some((of, its_above, other)));
            }
        }
        let (_, _, victim) = victim?;
        if !later(&(self.sequences[victim].priority, victim)) {
            self.mark(victim);
        }
        Some(victim)
    }

    /// Pages of each class that a sequence of so many tokens needs at one time.
    fn pages_needed(&self, id: SequenceId, tokens: u32) -> impl Iterator<Item = (ClassIndex, usize)> {
        self.span(self.sequences[id].span).pages_for(tokens, self.limits.page_tokens)
    }

    /// A class of which one page more in all lanes of a step is not there.
    fn short_class(&self, id: SequenceId, step: usize) -> Option<ClassIndex> {
        let lanes = &self.sequences[id].path.steps[step].lanes;
        self.pages.short_class(lanes.iter().map(|lane| lane.stretch))
    }

    /// Whether a sequence may give way to another tenant: it never did, or is a page further by now. One of a cut chain fails and is tried
    /// again by the router, so it must have gained a page since it came.
    fn may_give_way(&self, sequence: &Sequence) -> bool {
        let computed = sequence.steps.last().map_or(0, |step| step.computed);
        let from = if sequence.path.is_whole() { sequence.gave_way_at } else { Some(sequence.base_tokens) };
        from.is_none_or(|from| computed >= from + self.limits.page_tokens)
    }

    fn mark(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id];
        sequence.gave_way_at = sequence.steps.last().map(|step| step.computed);
    }

    fn give_way(&mut self, id: SequenceId) {
        if self.sequences[id].path.is_whole() {
            self.mark(id);
            self.preempt(id);
            return;
        }
        self.held = None;
        let message = "its tenant is above its share, and another one's sequence waited".to_owned();
        self.fail(id, Code::Unavailable, message, Retry::Same);
    }

    fn holds(&self, sequence: &Sequence, lack: Lack) -> bool {
        match lack {
            Lack::Place => true,
            Lack::Pages(class) => self.page_counts(sequence, class).next().is_some(),
        }
    }

    /// Handles of a sequence with pages of a class, a lane at a time, and how many such pages each of them has.
    fn page_counts<'a>(&'a self, sequence: &'a Sequence, class: ClassIndex) -> impl Iterator<Item = (&'a [HandleIndex], usize)> {
        let steps = sequence.path.steps.iter().zip(&sequence.steps);
        let lanes = steps.flat_map(|(at, state)| at.lanes.iter().zip(&state.lanes)).filter(|(_, held)| !held.handles.is_empty());
        let counts = lanes.map(move |(lane, held)| (&held.handles[..], self.pages.slot_count(lane.stretch, class)));
        counts.filter(|(_, count)| *count > 0)
    }

    /// What a tenant's running sequences hold, in parts. Pages are counted once a plan.
    fn held(&mut self, lack: Lack, tenant: TenantIndex) -> u64 {
        if let Lack::Pages(class) = lack
            && self.held.as_ref().is_none_or(|(of, _)| *of != class)
        {
            let mut held: BTreeMap<TenantIndex, u64> = BTreeMap::new();
            for sequence in self.sequences.iter().filter(|sequence| sequence.status == Status::Running) {
                let parts = |(handles, count): (&[HandleIndex], usize)| -> u64 {
                    handles.iter().map(|handle| count as u64 * PARTS / u64::from(self.pages.holder_count(*handle))).sum()
                };
                *held.entry(sequence.tenant).or_default() += self.page_counts(sequence, class).map(parts).sum::<u64>();
            }
            self.held = Some((class, held));
        }
        self.held_known(lack, tenant)
    }

    /// The same, when it was counted.
    fn held_known(&self, lack: Lack, tenant: TenantIndex) -> u64 {
        match lack {
            Lack::Place => u64::from(self.tenants.running_count(tenant)) * PARTS,
            Lack::Pages(_) => self.held.as_ref().and_then(|(_, held)| held.get(&tenant).copied()).unwrap_or(0),
        }
    }

    /// A tenant's share, in parts; of the places at least one.
    fn share(&self, lack: Lack, tenant: TenantIndex) -> u64 {
        match lack {
            Lack::Place => self.tenants.share(tenant, self.limits.sequences_max.into()).max(1) * PARTS,
            Lack::Pages(class) => self.tenants.share(tenant, self.pages.slot_count_max(class) as u64 * PARTS),
        }
    }
}
