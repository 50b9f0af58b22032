//! Who among waiting sequences starts next: fair between tenants. Each tenant has a virtual counter of the service that it had (tokens,
//! weighed, over its weight); of equal priority the tenant with the lowest goes first, and of one tenant the sequence whose first token
//! is wanted first (Sheng et al., "Fairness in serving large language models", 2024).

use std::collections::{BTreeMap, BTreeSet};

use super::batch::SequenceId;
use super::clock::Micros;

/// Service of a prompt token that is computed, and of a generated one.
pub(crate) const INPUT_WEIGHT: u64 = 1;
/// See `INPUT_WEIGHT`.
pub(crate) const OUTPUT_WEIGHT: u64 = 2;
/// Service is counted in parts of a token, so that weights divide it finely.
const SCALE: u64 = 1 << 16;

/// A tenant, by its place in the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TenantIndex(u32);

/// A waiting sequence's place in the line of its tenant: by priority, by when its first token is wanted, by arrival.
pub(crate) type Turn = (i32, Micros, SequenceId);

#[derive(Debug)]
struct Tenant {
    weight: u32,
    /// Service so far, over the weight.
    counter: u64,
    /// Sequences that wait, in their order.
    waiting: BTreeSet<Turn>,
    /// Sequences that run.
    running_count: u32,
}

impl Tenant {
    fn is_active(&self) -> bool {
        self.running_count > 0 || !self.waiting.is_empty()
    }
}

/// All tenants that ever had a sequence here.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    tenants: Vec<Tenant>,
    by_name: BTreeMap<String, TenantIndex>,
    waiting_count: usize,
    /// Where counters stood when the latest sequence stopped to wait: a tenant that comes when nobody waits begins there.
    latest_counter: u64,
}

impl Tenants {
    /// The tenant of a name, with the weight that it has now.
    pub(crate) fn named(&mut self, name: &str, weight: u32) -> TenantIndex {
        let weight = weight.max(1);
        if let Some(known) = self.by_name.get(name) {
            self.tenants[known.0 as usize].weight = weight;
            return *known;
        }
        let index = TenantIndex(self.tenants.len() as u32);
        self.tenants.push(Tenant { weight, counter: 0, waiting: BTreeSet::new(), running_count: 0 });
        self.by_name.insert(name.to_owned(), index);
        index
    }

    /// A sequence waits. A tenant that had none gets no credit for the time that it was away: its counter is lifted to the lowest of those
    /// that wait, or to where counters stood when somebody last did.
    pub(crate) fn add_waiting(&mut self, tenant: TenantIndex, turn: Turn) {
        if !self.tenants[tenant.0 as usize].is_active() {
            let lowest = self.tenants.iter().filter(|tenant| !tenant.waiting.is_empty()).map(|tenant| tenant.counter).min();
            let tenant = &mut self.tenants[tenant.0 as usize];
            tenant.counter = tenant.counter.max(lowest.unwrap_or(self.latest_counter));
        }
        self.waiting_count += usize::from(self.tenants[tenant.0 as usize].waiting.insert(turn));
    }

    /// A sequence no longer waits, if it did.
    pub(crate) fn remove_waiting(&mut self, tenant: TenantIndex, turn: Turn) {
        let tenant = &mut self.tenants[tenant.0 as usize];
        if tenant.waiting.remove(&turn) {
            self.waiting_count -= 1;
            self.latest_counter = self.latest_counter.max(tenant.counter);
        }
    }

    /// A sequence of a tenant begins or ends to run.
    pub(crate) fn count_running(&mut self, tenant: TenantIndex, begins: bool) {
        let count = &mut self.tenants[tenant.0 as usize].running_count;
        *count = if begins { *count + 1 } else { *count - 1 };
    }

    /// The waiting sequence that is to start next.
    pub(crate) fn first(&self) -> Option<(TenantIndex, Turn)> {
        let firsts = self.tenants.iter().enumerate().filter_map(|(index, tenant)| {
            let turn = *tenant.waiting.first()?;
            // Equal service: who has less running for its weight.
            let running = u64::from(tenant.running_count) * SCALE / u64::from(tenant.weight);
            Some((turn.0, tenant.counter, running, turn, TenantIndex(index as u32)))
        });
        firsts.min().map(|(_, _, _, turn, tenant)| (tenant, turn))
    }

    /// A tenant had service: so many tokens, each of a weight.
    pub(crate) fn charge(&mut self, tenant: TenantIndex, tokens: u32, weight: u64) {
        let tenant = &mut self.tenants[tenant.0 as usize];
        tenant.counter += u64::from(tokens) * weight * SCALE / u64::from(tenant.weight);
    }

    /// A tenant's counter.
    pub(crate) fn counter(&self, tenant: TenantIndex) -> u64 {
        self.tenants[tenant.0 as usize].counter
    }

    /// Sequences that wait.
    pub(crate) fn waiting_count(&self) -> usize {
        self.waiting_count
    }

    /// Tenants that have sequences now.
    pub(crate) fn active_count(&self) -> usize {
        self.tenants.iter().filter(|tenant| tenant.is_active()).count()
    }

    /// Sequences of a tenant that run.
    pub(crate) fn running_count(&self, tenant: TenantIndex) -> u32 {
        self.tenants[tenant.0 as usize].running_count
    }

    /// A tenant's share of so many things among all that have sequences now.
    pub(crate) fn share(&self, tenant: TenantIndex, of: u64) -> u64 {
        let weights: u64 = self.tenants.iter().filter(|tenant| tenant.is_active()).map(|tenant| u64::from(tenant.weight)).sum();
        (of * u64::from(self.tenants[tenant.0 as usize].weight)).checked_div(weights).unwrap_or(0)
    }

    /// The first fault of the books, given (waiting, running) sequences of each tenant.
    pub(crate) fn check(&self, sequences: impl Iterator<Item = (TenantIndex, bool)>) -> Result<(), String> {
        let mut counts = vec![(0, 0); self.tenants.len()];
        for (tenant, runs) in sequences {
            let count = &mut counts[tenant.0 as usize];
            if runs { count.1 += 1 } else { count.0 += 1 }
        }
        for (index, (tenant, count)) in self.tenants.iter().zip(&counts).enumerate() {
            let books = (tenant.waiting.len(), tenant.running_count);
            if books != *count {
                return Err(format!("tenant {index} counts {books:?} sequences (waiting, running), there are {count:?}"));
            }
        }
        let waiting = counts.iter().map(|(waiting, _)| waiting).sum::<usize>();
        if waiting != self.waiting_count { Err(format!("{} sequences wait, {waiting} do", self.waiting_count)) } else { Ok(()) }
    }
}
