//! Who starts a little before its turn, because more of its prompt is cached than of the one whose turn it is: what was computed once serves
//! those who ask for it while it is there. Few are looked at, what a tenant may be ahead by is small beside what fairness allows anyway
//! (`tenants`), and nobody is passed over often.

use super::batch::SequenceId;
use super::claim::Lack;
use super::cost::largest;
use super::engine::Engine;
use super::pages::HandleKey;
use super::tenants::{TenantIndex, Turn};

/// Tenants, and of each the sequences, among which one that starts is chosen: those who are next in turn.
const TENANTS_LOOKED_AT: usize = 4;
const SEQUENCES_LOOKED_AT: usize = 8;

/// How often a sequence may be passed over by others of its tenant, and, when it is its turn, by anybody.
const PASSES_MOST: u32 = 8;

impl Engine {
    /// Takes the place of the waiting sequence whose turn it is, which has what it needs to start: its own, or that of one of which more is cached. One
    /// may go before it that is of equal priority, has what it needs too, and passes over nobody who was passed over so often already or whose first
    /// token has a target. One of another tenant may if that stays within its share, and has had no more service than the first one's tenant will have had
    /// with its prompt: it would be its turn next.
    pub(crate) fn nearest(&mut self, tenant: TenantIndex, first: SequenceId) -> SequenceId {
        if !self.limits.prefix_cache || self.tenants.waiting_count() < 2 || !self.may_be_passed(first) {
            return first;
        }
        let sequence = &self.sequences[first];
        let priority = sequence.priority;
        let tenants: Vec<TenantIndex> = self.tenants.near(tenant, priority, sequence.prompt_tokens, TENANTS_LOOKED_AT).collect();
        let mut best = (self.cached_pages(first), first, tenant);
        for near in tenants {
            let line: Vec<Turn> = self.tenants.waiting(near).take(SEQUENCES_LOOKED_AT).collect();
            for (_, _, id) in line.into_iter().take_while(|turn| turn.0 == priority) {
                let cached = self.cached_pages(id);
                if cached > best.0 && self.may_start_before(id, tenant) {
                    best = (cached, id, near);
                }
                if !self.may_be_passed(id) {
                    break;
                }
            }
        }
        if best.1 != first {
            self.pass(first, best.1, best.2);
        }
        best.1
    }

    /// Whether a sequence has what it needs to start, and would not bring a tenant that is not the first in turn above its share.
    fn may_start_before(&self, id: SequenceId, first: TenantIndex) -> bool {
        let sequence = &self.sequences[id];
        let tokens = sequence.tokens_to_start();
        let is_within = || self.is_within_share(id, tokens, Lack::Place) && self.is_within_shares(id, tokens);
        sequence.promised_tokens == 0 && self.lacks(id, tokens).is_none() && (sequence.tenant == first || is_within())
    }

    fn may_be_passed(&self, id: SequenceId) -> bool {
        let sequence = &self.sequences[id];
        sequence.passes < PASSES_MOST && sequence.first_due.is_none()
    }

    /// A sequence goes before those of its tenant that are before it in the line, and before the first of all.
    fn pass(&mut self, first: SequenceId, id: SequenceId, tenant: TenantIndex) {
        let before: Vec<SequenceId> = self.tenants.waiting(tenant).map(|(.., id)| id).take_while(|other| *other != id).collect();
        let is_among = before.contains(&first);
        before.into_iter().chain((!is_among).then_some(first)).for_each(|other| self.sequences[other].passes += 1);
    }

    /// About how many leading pages of a sequence's tokens are cached: those of the deepest attention blocks of its chain that see all before them, as
    /// these are the first to be gone.
    fn cached_pages(&mut self, id: SequenceId) -> u32 {
        self.sequences[id].extend_hashes(self.limits.page_tokens);
        let sequence = &self.sequences[id];
        let lanes = sequence.path.steps.iter().rev().flat_map(|step| &step.lanes);
        let Some(lane) = lanes.min_by_key(|lane| lane.window.is_some()).filter(|_| sequence.path.is_whole()) else { return 0 };
        let has = |page: u32| self.pages.contains(&HandleKey { tokens: sequence.hashes[page as usize - 1], stretch: lane.stretch });
        let most = (sequence.tokens.len() as u32 - 1) / self.limits.page_tokens;
        // Mostly nothing.
        if most == 0 || !has(1) { 0 } else { largest(most, |pages| pages == 0 || has(pages)) }
    }
}
