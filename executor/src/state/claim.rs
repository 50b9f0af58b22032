//! What tenants may hold while others wait: their share, by weight, of the places and of the pages. One alone may have all; when another
//! one comes that has less than its share and had less service, sequences of who is above its share give way until it starts. So nobody
//! waits for another tenant's sequence to end. A sequence that gave way does so again only when it is a page further, so it ends.

use super::batch::SequenceId;
use super::engine::Engine;
use super::pages::ClassIndex;
use super::sequence::Sequence;
use super::tenants::TenantIndex;
use ashlar_wire::code::{Code, Retry};

/// Where a share is smaller than one sequence, a tenant's only one holds at most so many times what another one's needs to start, and does not
/// give way to it: all are alike, and each would cost the other its prompt.
const SPARED_TIMES: u64 = 2;

/// What a sequence lacks to start, or to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
    /// The only one of a tenant above its share: those may start that need no more than theirs.
    OnlyOne,
    /// One of a tenant within its share, or of the only one: nobody starts before it.
    WithinShare,
}

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
    pub(crate) fn is_within_share(&self, id: SequenceId, tokens: u32, lack: Lack) -> bool {
        if self.tenants.active_count() < 2 {
            return false;
        }
        let sequence = &self.sequences[id];
        let tenant = sequence.tenant;
        let is_first = self.tenants.running_count(tenant) == 0;
        is_first || self.holdings.held(lack, tenant) + self.needed(id, tokens, lack) <= self.share(lack, tenant)
    }

    /// What a sequence needs to start of what it lacks.
    fn needed(&self, id: SequenceId, tokens: u32, lack: Lack) -> u64 {
        match lack {
            Lack::Place => 1,
            Lack::Pages(class) => self.pages_needed(id, tokens).filter(|(of, _)| *of == class).map(|(_, count)| count as u64).sum(),
        }
    }

    /// Whether a waiting sequence that has what it needs may start while running ones lack pages.
    pub(crate) fn may_start_beside(&self, shortage: Shortage, id: SequenceId, tokens: u32) -> bool {
        let tenant = self.sequences[id].tenant;
        let fits = |(class, needed): (ClassIndex, usize)| {
            let lack = Lack::Pages(class);
            self.holdings.held(lack, tenant) + needed as u64 <= self.share(lack, tenant)
        };
        match shortage {
            Shortage::AboveShare => self.is_within_shares(id, tokens),
            Shortage::OnlyOne => self.pages_needed(id, tokens).all(fits),
            Shortage::WithinShare => false,
        }
    }

    /// The same for all pages that it needs.
    pub(crate) fn is_within_shares(&self, id: SequenceId, tokens: u32) -> bool {
        self.pages_needed(id, tokens).all(|(class, _)| self.is_within_share(id, tokens, Lack::Pages(class)))
    }

    /// Has the latest sequence of the tenant that is most above its share give way, for a waiting one of a tenant within its own; never one of
    /// higher priority, nor of a tenant that had less service; where one needs more than its share, nor the only one of a tenant that is not much
    /// larger. True if one did whose pages are back already.
    pub(crate) fn claim(&mut self, id: SequenceId, tokens: u32, lack: Lack) -> bool {
        // What gave way before comes back first.
        if !self.leaving.is_empty() || !self.is_within_share(id, tokens, lack) {
            return false;
        }
        self.holdings.settle(lack, &self.tenants);
        let (tenant, priority) = (self.sequences[id].tenant, self.sequences[id].priority);
        let needed = self.needed(id, tokens, lack);
        let spared = if needed > self.share(lack, tenant) { SPARED_TIMES * needed } else { 0 };
        let is_spared = |of: TenantIndex| self.tenants.running_count(of) == 1 && self.holdings.held(lack, of) <= spared;
        let had_more = |of: TenantIndex| self.tenants.counter(of) >= self.tenants.counter(tenant);
        let gives = |of: &TenantIndex| *of != tenant && had_more(*of) && !is_spared(*of);
        let victim = self.above(lack).filter(gives).find_map(|of| self.giver(of, lack, priority));
        if let Some(victim) = victim {
            self.give_way(victim);
        }
        victim.is_some() && self.leaving.is_empty()
    }

    /// What it is that a running sequence lacks pages for a step.
    pub(crate) fn shortage(&self, id: SequenceId, step: usize) -> Shortage {
        let class = self.short_class(id, step).filter(|_| self.tenants.active_count() > 1);
        let tenant = self.sequences[id].tenant;
        match class.is_some_and(|class| self.has_its_share(Lack::Pages(class), tenant)) {
            true if self.tenants.running_count(tenant) == 1 => Shortage::OnlyOne,
            true => Shortage::AboveShare,
            false => Shortage::WithinShare,
        }
    }

    /// Who gives way to a running sequence that lacks pages, if anybody does: the lowest priority, of that a tenant above its share, the latest,
    /// and never an earlier one of its own tenant. A tenant within its share takes from one above its own, however early that came, and is
    /// spared by it.
    pub(crate) fn page_victim(&mut self, id: SequenceId, step: usize) -> Option<SequenceId> {
        let mine = &self.sequences[id];
        let (priority, tenant, service_before) = (mine.priority, mine.tenant, mine.service_before);
        let (lowest, last) = self.preemptible().next().filter(|(lowest, _)| *lowest >= priority)?;
        let later = |other: &SequenceId| (lowest, *other) > (priority, id);
        if self.tenants.active_count() < 2 {
            return Some(last).filter(later);
        }
        let lack = Lack::Pages(self.short_class(id, step)?);
        self.holdings.settle(lack, &self.tenants);
        let is_above = self.has_its_share(lack, tenant);
        let latest_of = |of: TenantIndex| {
            let mut all = self.holdings.whole_of(of, lowest);
            all.find(|other| self.sequences[*other].has_pages()).filter(later)
        };
        // A prompt is counted at once, so who has just started is measured by what its tenant had had then.
        let may_take = |from: TenantIndex| from != tenant && !is_above && service_before <= self.tenants.counter(from);
        let giver_of = |of: TenantIndex| self.giver(of, lack, lowest).filter(|_| may_take(of));
        let of_above = self.above(lack).find_map(|of| latest_of(of).or_else(|| giver_of(of)));
        let victim = of_above.or_else(|| match is_above && lowest == priority {
            true => latest_of(tenant),
            false => Some(last).filter(later),
        })?;
        if !later(&victim) {
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
        let message = "its tenant is above its share, and another one's sequence waited".to_owned();
        self.fail(id, Code::Unavailable, message, Retry::Same);
    }

    /// The latest sequence of a tenant that may give way to another one and holds what that one lacks, of this priority or a lower one.
    fn giver(&self, tenant: TenantIndex, lack: Lack, priority: i32) -> Option<SequenceId> {
        self.holdings.givers(tenant, lack, priority).find(|id| self.holds(&self.sequences[*id], lack))
    }

    /// Whether a sequence that runs holds any of what somebody lacks: mostly, but all that it has may lie behind windows.
    fn holds(&self, sequence: &Sequence, lack: Lack) -> bool {
        let Lack::Pages(class) = lack else { return true };
        let mut lanes = sequence.path.steps.iter().zip(&sequence.steps).flat_map(|(at, state)| at.lanes.iter().zip(&state.lanes));
        lanes.any(|(lane, held)| !held.handles.is_empty() && self.pages.slot_count(lane.stretch, class) > 0)
    }

    /// Tenants above their share, the most so first, as `Holdings::settle` has put them.
    fn above(&self, lack: Lack) -> impl Iterator<Item = TenantIndex> {
        self.holdings.above(lack, move |weight| self.share_of(lack, weight))
    }

    /// Whether a tenant holds no less than its share.
    fn has_its_share(&self, lack: Lack, tenant: TenantIndex) -> bool {
        self.holdings.held(lack, tenant) >= self.share(lack, tenant)
    }

    /// A tenant's share; of the places at least one, of the pages one of those that no two tenants hold.
    fn share(&self, lack: Lack, tenant: TenantIndex) -> u64 {
        self.share_of(lack, self.tenants.weight(tenant))
    }

    fn share_of(&self, lack: Lack, weight: u32) -> u64 {
        match lack {
            Lack::Place => self.tenants.share(weight, self.limits.sequences_max.into()).max(1),
            Lack::Pages(class) => {
                let all = self.pages.slot_count_max(class) as u64;
                self.tenants.share(weight, all.saturating_sub(self.holdings.common(class)))
            }
        }
    }
}
