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

impl TenantIndex {
    pub(crate) fn at(place: usize) -> Self {
        Self(place as u32)
    }

    pub(crate) fn place(self) -> usize {
        self.0 as usize
    }
}

/// A waiting sequence's place in the line of its tenant: by priority, by when its first token is wanted, by arrival.
pub(crate) type Turn = (i32, Micros, SequenceId);

/// A tenant's place in the line: by the priority of its first sequence, by service, by how much it has running for its weight, by that
/// sequence's turn.
type Key = (i32, u64, u64, Turn, TenantIndex);

#[derive(Debug)]
struct Tenant {
    weight: u32,
    /// Service so far, over the weight.
    counter: u64,
    /// Sequences that wait, in their order.
    waiting: BTreeSet<Turn>,
    /// Sequences that run.
    running_count: u32,
    /// Its place in the line while sequences of it wait: never behind the one that it should have.
    key: Option<Key>,
    /// Where its last prompt ends on the line of those that run (`prompts`).
    prompts_end: u64,
}

impl Tenant {
    fn is_active(&self) -> bool {
        self.running_count > 0 || !self.waiting.is_empty()
    }

    /// Its weight among those that have sequences.
    fn active_weight(&self) -> u64 {
        if self.is_active() { u64::from(self.weight) } else { 0 }
    }

    /// The place that it should have.
    fn key(&self, index: TenantIndex) -> Option<Key> {
        let turn = *self.waiting.first()?;
        let running = u64::from(self.running_count) * SCALE / u64::from(self.weight);
        Some((turn.0, self.counter, running, turn, index))
    }
}

/// All tenants that ever had a sequence here.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    tenants: Vec<Tenant>,
    by_name: BTreeMap<String, TenantIndex>,
    waiting_count: usize,
    /// Tenants of which sequences wait, in their order as far as it is known: service only puts a tenant back, so who had some moves when
    /// it is looked at.
    line: BTreeSet<Key>,
    /// Tenants that have sequences, and their weights in all.
    active_count: usize,
    active_weight: u64,
    /// Where counters stood when the latest sequence stopped to wait: a tenant that comes when nobody waits begins there.
    latest_counter: u64,
}

impl Tenants {
    /// The tenant of a name, with the weight that it has now.
    pub(crate) fn named(&mut self, name: &str, weight: u32) -> TenantIndex {
        let weight = weight.max(1);
        if let Some(known) = self.by_name.get(name).copied() {
            if self.tenants[known.0 as usize].weight != weight {
                self.change(known, |tenant| tenant.weight = weight);
                self.place(known);
            }
            return known;
        }
        let index = TenantIndex(self.tenants.len() as u32);
        self.tenants.push(Tenant { weight, counter: 0, waiting: BTreeSet::new(), running_count: 0, key: None, prompts_end: 0 });
        self.by_name.insert(name.to_owned(), index);
        index
    }

    /// A sequence waits. A tenant that had none gets no credit for the time that it was away: its counter is lifted to the lowest of those
    /// that wait, or to where counters stood when somebody last did.
    pub(crate) fn add_waiting(&mut self, index: TenantIndex, turn: Turn) {
        if !self.tenants[index.0 as usize].is_active() {
            let lowest = self.lowest_counter().unwrap_or(self.latest_counter);
            let tenant = &mut self.tenants[index.0 as usize];
            tenant.counter = tenant.counter.max(lowest);
        }
        let is_new = self.change(index, |tenant| tenant.waiting.insert(turn));
        self.waiting_count += usize::from(is_new);
        self.place(index);
    }

    /// A sequence no longer waits, if it did.
    pub(crate) fn remove_waiting(&mut self, index: TenantIndex, turn: Turn) {
        if self.change(index, |tenant| tenant.waiting.remove(&turn)) {
            self.waiting_count -= 1;
            self.latest_counter = self.latest_counter.max(self.tenants[index.0 as usize].counter);
            self.place(index);
        }
    }

    /// A sequence of a tenant begins or ends to run.
    pub(crate) fn count_running(&mut self, index: TenantIndex, begins: bool) {
        self.change(index, |tenant| tenant.running_count = if begins { tenant.running_count + 1 } else { tenant.running_count - 1 });
        if !begins {
            self.place(index);
        }
    }

    /// The waiting sequence that is to start next.
    pub(crate) fn first(&mut self) -> Option<(TenantIndex, Turn)> {
        self.first_from(i32::MIN).map(|(_, _, _, turn, tenant)| (tenant, turn))
    }

    /// The first in the line of this priority or a lower one. Nobody is behind the place that it should have, so the first who is in its own
    /// goes before all others.
    fn first_from(&mut self, priority: i32) -> Option<Key> {
        loop {
            let from = (priority, 0, 0, (i32::MIN, 0, SequenceId::new(0, 0)), TenantIndex(0));
            let key = *self.line.range(from..).next()?;
            if self.tenants[key.4.0 as usize].key(key.4) == Some(key) {
                return Some(key);
            }
            self.place(key.4);
        }
    }

    /// The tenant that is first in the line, and of so many next ones of equal priority those that had no more service than it will have had with a
    /// prompt of so many tokens.
    pub(crate) fn near(&self, first: TenantIndex, priority: i32, prompt_tokens: u32, count: usize) -> impl Iterator<Item = TenantIndex> {
        let tenant = &self.tenants[first.0 as usize];
        let most = tenant.counter + u64::from(prompt_tokens) * INPUT_WEIGHT * SCALE / u64::from(tenant.weight);
        let others = self.line.iter().take(count).take_while(move |key| key.0 == priority).map(|key| key.4);
        std::iter::once(first).chain(others.filter(move |of| *of != first && self.counter(*of) <= most))
    }

    /// Tenants of which sequences wait.
    pub(crate) fn all_waiting(&self) -> impl Iterator<Item = TenantIndex> {
        self.line.iter().map(|key| key.4)
    }

    /// How long a tenant's line of waiting sequences would be with so many more, over its weight.
    pub(crate) fn line_length(&self, tenant: TenantIndex, more: i64) -> u64 {
        let tenant = &self.tenants[tenant.0 as usize];
        (tenant.waiting.len() as u64).saturating_add_signed(more) * SCALE / u64::from(tenant.weight)
    }

    /// A tenant's sequences that wait, in their order.
    pub(crate) fn waiting(&self, tenant: TenantIndex) -> impl DoubleEndedIterator<Item = Turn> {
        self.tenants[tenant.0 as usize].waiting.iter().copied()
    }

    /// The lowest counter of those of which sequences wait.
    fn lowest_counter(&mut self) -> Option<u64> {
        let (mut lowest, mut priority) = (None, Some(i32::MIN));
        while let Some(key) = priority.and_then(|priority| self.first_from(priority)) {
            lowest = Some(lowest.map_or(key.1, |lowest: u64| lowest.min(key.1)));
            priority = key.0.checked_add(1);
        }
        lowest
    }

    /// Puts a tenant where it should be in the line.
    fn place(&mut self, index: TenantIndex) {
        let tenant = &mut self.tenants[index.0 as usize];
        let key = tenant.key(index);
        let before = std::mem::replace(&mut tenant.key, key);
        if before != key {
            before.map(|before| self.line.remove(&before));
            self.line.extend(key);
        }
    }

    /// Changes a tenant and what is summed over those that have sequences.
    fn change<T>(&mut self, index: TenantIndex, change: impl FnOnce(&mut Tenant) -> T) -> T {
        let tenant = &mut self.tenants[index.0 as usize];
        let before = tenant.active_weight();
        let result = change(tenant);
        let after = tenant.active_weight();
        self.active_weight = self.active_weight - before + after;
        self.active_count = self.active_count + usize::from(after > 0) - usize::from(before > 0);
        result
    }

    /// A tenant had service: so many tokens, each of a weight.
    pub(crate) fn charge(&mut self, tenant: TenantIndex, tokens: u32, weight: u64) {
        let tenant = &mut self.tenants[tenant.0 as usize];
        tenant.counter += u64::from(tokens) * weight * SCALE / u64::from(tenant.weight);
    }

    /// Where a prompt of so many tokens that a tenant starts begins on the line of prompts that run, whose first one is at `first`.
    pub(crate) fn place_prompt(&mut self, tenant: TenantIndex, first: Option<u64>, tokens: u32) -> u64 {
        let tenant = &mut self.tenants[tenant.0 as usize];
        let begins = first.unwrap_or(u64::MAX).min(tenant.counter).max(tenant.prompts_end);
        tenant.prompts_end = begins + u64::from(tokens) * SCALE / u64::from(tenant.weight);
        begins
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
        self.active_count
    }

    /// Sequences of a tenant that run.
    pub(crate) fn running_count(&self, tenant: TenantIndex) -> u32 {
        self.tenants[tenant.0 as usize].running_count
    }

    /// A tenant's weight.
    pub(crate) fn weight(&self, tenant: TenantIndex) -> u32 {
        self.tenants[tenant.0 as usize].weight
    }

    /// Tenants that ever had a sequence.
    pub(crate) fn count(&self) -> usize {
        self.tenants.len()
    }

    /// The share that a weight has of so many things among all tenants that have sequences now.
    pub(crate) fn share(&self, weight: u32, of: u64) -> u64 {
        (of * u64::from(weight)).checked_div(self.active_weight).unwrap_or(0)
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
        for (index, tenant) in self.tenants.iter().enumerate() {
            let key = tenant.key(TenantIndex(index as u32));
            // In the line exactly while it waits, and never behind its place.
            if tenant.key.is_some() != key.is_some() || tenant.key > key || !tenant.key.iter().all(|key| self.line.contains(key)) {
                return Err(format!("tenant {index} is in the line at {:?}, its place is {key:?}", tenant.key));
            }
        }
        let active = || self.tenants.iter().filter(|tenant| tenant.is_active());
        let sums = (active().map(Tenant::active_weight).sum(), active().count(), active().filter(|tenant| tenant.key.is_some()).count());
        if sums != (self.active_weight, self.active_count, self.line.len()) {
            let known = (self.active_weight, self.active_count, self.line.len());
            return Err(format!("(weight, tenants, tenants in the line) are {sums:?}, counted as {known:?}"));
        }
        let waiting = counts.iter().map(|(waiting, _)| waiting).sum::<usize>();
        if waiting != self.waiting_count { Err(format!("{} sequences wait, {waiting} do", self.waiting_count)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Who should start next, and the lowest counter of those that wait, found by looking at all.
    fn truth(tenants: &Tenants) -> (Option<(TenantIndex, Turn)>, Option<u64>) {
        let waits = || tenants.tenants.iter().enumerate().filter_map(|(i, tenant)| tenant.key(TenantIndex(i as u32)));
        (waits().min().map(|key| (key.4, key.3)), waits().map(|key| key.1).min())
    }

    proptest! {
        /// Whatever comes, goes, is served or gets another weight.
        #[test]
        fn the_first_in_the_line_is_the_first_of_all(events in proptest::collection::vec((0u32..7, 0usize..9, 1u32..400, -2i32..2), 1..300)) {
            let mut tenants = Tenants::default();
            let (mut waiting, mut running, mut number) = (Vec::<(TenantIndex, Turn)>::new(), Vec::<TenantIndex>::new(), 0);
            for (event, which, amount, priority) in events {
                let tenant = tenants.named(&format!("ten_{which}"), 1 + (which as u32 + amount / 300) % 3);
                match event {
                    0 | 1 => {
                        number += 1;
                        let turn = (priority, u64::from(amount), SequenceId::new(number, which));
                        tenants.add_waiting(tenant, turn);
                        waiting.push((tenant, turn));
                    }
                    2 if !waiting.is_empty() => {
                        let (tenant, turn) = waiting.swap_remove(amount as usize % waiting.len());
                        tenants.remove_waiting(tenant, turn);
                    }
                    3 => {
                        if let Some(first) = tenants.first() {
                            tenants.remove_waiting(first.0, first.1);
                            tenants.count_running(first.0, true);
                            waiting.retain(|known| *known != first);
                            running.push(first.0);
                        }
                    }
                    4 if !running.is_empty() => tenants.count_running(running.swap_remove(amount as usize % running.len()), false),
                    _ => tenants.charge(tenant, amount, OUTPUT_WEIGHT),
                }
                let books = waiting.iter().map(|(tenant, _)| (*tenant, false)).chain(running.iter().map(|tenant| (*tenant, true)));
                prop_assert_eq!(tenants.check(books), Ok(()));
                if amount % 3 == 0 {
                    prop_assert_eq!((tenants.first(), tenants.lowest_counter()), truth(&tenants));
                }
            }
        }
    }
}
