//! Placing what has no place yet: greedily, each chain where it adds the fewest bytes, first copies before replicas, until a round
//! changes nothing. That fixed point is what makes planning idempotent.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use ashlar_registry::ChainDigest;
use ashlar_registry::record::{PlanPolicy, SpanAssignment};

use super::cut::{self, Pattern};
use super::keep::pattern;
use super::{Inventory, Ledger, SizedBlock, SizedChain, name};

/// What [`place`] arrived at.
pub(super) struct Placed {
    pub(super) ledger: Ledger,
    pub(super) unplaced: BTreeMap<ChainDigest, String>,
    /// What is missing beyond that: replicas, cuts.
    pub(super) notes: Vec<String>,
}

/// Places all chains and replicas that `ledger` lacks.
pub(super) fn place(policy: &PlanPolicy, inventory: &Inventory, mut ledger: Ledger) -> Placed {
    // Larger chains first: small ones fit into what is left.
    let mut order: Vec<(&ChainDigest, &SizedChain)> = inventory.chains.iter().collect();
    order.sort_by_key(|(digest, chain)| (Reverse(chain.blocks.iter().map(SizedBlock::all_bytes).sum::<u128>()), **digest));
    let placings: Vec<Placing<'_>> =
        order.into_iter().map(|(digest, chain)| Placing { policy, inventory, digest: *digest, chain }).collect();
    let mut changed = true;
    while changed {
        changed = false;
        while placings.iter().fold(false, |changed, placing| placing.first(&mut ledger) | changed) {
            changed = true;
        }
        for copies in 2..=policy.replicas {
            changed |= placings.iter().fold(false, |changed, placing| placing.replicate(&mut ledger, copies) | changed);
        }
    }
    let (mut unplaced, mut notes) = (BTreeMap::new(), Vec::new());
    for (digest, chain) in &inventory.chains {
        let placing = Placing { policy, inventory, digest: *digest, chain };
        if !missing(&ledger, digest, chain, 1).is_empty() {
            unplaced.insert(*digest, placing.reason(&ledger));
            continue;
        }
        for span in missing(&ledger, digest, chain, policy.replicas) {
            notes.push(format!("{} has fewer than {} replicas: no other executor has room", name(&placing.named(span)), policy.replicas));
        }
        let spans = pattern(chain, &ledger.holders(digest)).map_or(0, |pattern| pattern.len());
        if spans < placing.spans_wanted(&ledger) as usize {
            notes.push(format!("{} is in {spans} spans: no room for {}", digest.short(), policy.spans_per_chain));
        }
    }
    Placed { ledger, unplaced, notes }
}

/// Spans of the chain that have fewer than `copies` holders. A chain without holders lacks itself as a whole.
fn missing(ledger: &Ledger, digest: &ChainDigest, chain: &SizedChain, copies: u32) -> Pattern {
    let holders = ledger.holders(digest);
    let spans = pattern(chain, &holders).expect("the ledger holds no overlapping spans");
    let held = |span: &(u32, u32)| holders.iter().filter(|(_, other)| other == span).count();
    spans.into_iter().filter(|span| held(span) < copies as usize).collect()
}

/// One chain being placed.
struct Placing<'a> {
    policy: &'a PlanPolicy,
    inventory: &'a Inventory,
    digest: ChainDigest,
    chain: &'a SizedChain,
}

impl Placing<'_> {
    /// Completes the first copy, or leaves nothing of it; true when the ledger changed.
    fn first(&self, ledger: &mut Ledger) -> bool {
        let holders = ledger.holders(&self.digest);
        let lost = missing(ledger, &self.digest, self.chain, 1);
        if lost.is_empty() {
            return self.cut_further(ledger, holders.len());
        }
        if !holders.is_empty() {
            let mut trial = ledger.clone();
            if lost.iter().all(|span| self.put_best(&mut trial, *span)) {
                *ledger = trial;
                return true;
            }
            // What is left of it does not lead to a whole: begin anew.
            ledger.remove(&self.digest, self.inventory);
        }
        match self.afresh(ledger) {
            Some(placed) => {
                *ledger = placed;
                true
            }
            None => !holders.is_empty(),
        }
    }

    /// Cuts a chain anew that is in fewer spans than the policy asks for and the executors allow.
    fn cut_further(&self, ledger: &mut Ledger, holder_count: usize) -> bool {
        let spans = holder_count.min(pattern(self.chain, &ledger.holders(&self.digest)).map_or(0, |pattern| pattern.len()));
        let wanted = self.spans_wanted(ledger);
        if spans >= wanted as usize {
            return false;
        }
        let mut trial = ledger.clone();
        trial.remove(&self.digest, self.inventory);
        let Some(placed) = self.in_spans(&trial, wanted) else { return false };
        *ledger = placed;
        true
    }

    /// Spans that the policy asks for, bounded by the chain's borders and the largest class of executors.
    fn spans_wanted(&self, ledger: &Ledger) -> u32 {
        let mut classes: BTreeMap<&str, u32> = BTreeMap::new();
        for shelf in ledger.shelves.values() {
            *classes.entry(&shelf.numeric_class).or_default() += 1;
        }
        let executors = classes.values().copied().max().unwrap_or(0);
        self.policy.spans_per_chain.min(cut::spans_max(self.chain)).min(executors).max(1)
    }

    /// Places the chain, of which the ledger holds nothing.
    fn afresh(&self, ledger: &Ledger) -> Option<Ledger> {
        (1..=self.spans_wanted(ledger)).rev().take_while(|count| *count > 1).find_map(|count| self.in_spans(ledger, count)).or_else(|| {
            let mut trial = ledger.clone();
            self.put_best(&mut trial, (0, self.chain.len())).then_some(trial).or_else(|| self.as_far_as_it_goes(ledger))
        })
    }

    /// In `count` spans of about equal time or bytes, in the first class that has room.
    fn in_spans(&self, ledger: &Ledger, count: u32) -> Option<Ledger> {
        classes(ledger).into_iter().find_map(|class| {
            let spans = cut::evenly(self.chain, count, &self.weights(&class));
            let mut trial = ledger.clone();
            let placed = spans.iter().all(|span| self.put_best_of(&mut trial, *span, Some(&class)));
            placed.then_some(trial)
        })
    }

    /// What the blocks count where the chain is cut evenly: their times, if all executors of the class are of one kind of device and all blocks were
    /// profiled on it, for then spans that take equally long keep all executors busy; else their bytes.
    fn weights(&self, class: &str) -> Vec<u128> {
        let of_class = self.inventory.executors.values().filter(|offer| offer.numeric_class == class);
        let devices: BTreeSet<&String> = of_class.map(|offer| &offer.profiled_on).collect();
        let times = match devices.first() {
            Some(device) if devices.len() == 1 => self.inventory.times.get(&self.digest).and_then(|times| times.get(*device)),
            _ => None,
        };
        match times.filter(|times| times.len() == self.chain.blocks.len()) {
            Some(times) => times.iter().map(|nanos| u128::from(*nanos)).collect(),
            None => self.chain.blocks.iter().map(SizedBlock::all_bytes).collect(),
        }
    }

    /// In as few spans as the executors' sizes allow, in the class that needs the fewest.
    fn as_far_as_it_goes(&self, ledger: &Ledger) -> Option<Ledger> {
        let cuts = classes(ledger).into_iter().filter_map(|class| cut::greedily(self.chain, ledger, &class));
        let best = cuts.min_by_key(Vec::len)?;
        let mut trial = ledger.clone();
        for (executor, span) in best {
            trial.put(&executor, self.named(span), self.inventory);
        }
        Some(trial)
    }

    /// Adds a holder to each span that has fewer than `copies`, where there is room; true when the ledger changed.
    fn replicate(&self, ledger: &mut Ledger, copies: u32) -> bool {
        if !missing(ledger, &self.digest, self.chain, 1).is_empty() {
            return false;
        }
        let short = missing(ledger, &self.digest, self.chain, copies);
        short.into_iter().fold(false, |changed, span| self.put_best(ledger, span) | changed)
    }

    /// As [`Self::put_best_of`]; spans of a cut chain go where the others' class is.
    fn put_best(&self, ledger: &mut Ledger, span: (u32, u32)) -> bool {
        let is_cut = span != (0, self.chain.len());
        let class = ledger.holders(&self.digest).first().filter(|_| is_cut).map(|(id, _)| ledger.shelves[id].numeric_class.clone());
        self.put_best_of(ledger, span, class.as_deref())
    }

    /// Puts a span on the best executor of the class that has room and nothing of the chain; false when there is none.
    fn put_best_of(&self, ledger: &mut Ledger, span: (u32, u32), class: Option<&str>) -> bool {
        let blocks = self.chain.span(span.0, span.1);
        let first_class = ledger.holders(&self.digest).first().map(|(id, _)| ledger.shelves[id].numeric_class.clone());
        let usable = ledger.shelves.iter().filter(|(_, shelf)| {
            shelf.span(&self.digest).is_none() && class.is_none_or(|class| class == shelf.numeric_class) && shelf.fits(blocks)
        });
        // A replica of another class cannot take over sequences that run.
        let other_class = |shelf: &super::ledger::Shelf| first_class.as_ref().is_some_and(|first| *first != shelf.numeric_class);
        let best = usable.min_by_key(|(id, shelf)| (other_class(shelf), shelf.added_bytes(blocks), Reverse(shelf.free_bytes()), *id));
        let Some(executor) = best.map(|(id, _)| id.clone()) else { return false };
        ledger.put(&executor, self.named(span), self.inventory);
        true
    }

    fn named(&self, (from, to): (u32, u32)) -> SpanAssignment {
        SpanAssignment { chain: self.digest, from, to }
    }

    /// Why it has no place, with the figures that an operator can act on.
    fn reason(&self, ledger: &Ledger) -> String {
        if ledger.shelves.is_empty() {
            return "no executor is registered".to_owned();
        }
        let least = ledger.shelves.values().map(|shelf| shelf.added_bytes(&self.chain.blocks)).min().unwrap_or(0);
        let most = ledger.shelves.values().map(super::ledger::Shelf::free_bytes).max().unwrap_or(0);
        let class_sum = |class: &String| -> u64 {
            ledger.shelves.values().filter(|shelf| shelf.numeric_class == *class).map(super::ledger::Shelf::free_bytes).sum()
        };
        let together = classes(ledger).iter().map(class_sum).max().unwrap_or(0);
        format!("it needs {least} bytes more; the executor with the most room has {most} left, one class together {together}")
    }
}

/// Classes by the room that their executors have left, most first.
fn classes(ledger: &Ledger) -> Vec<String> {
    let mut room: BTreeMap<&str, u128> = BTreeMap::new();
    for shelf in ledger.shelves.values() {
        *room.entry(&shelf.numeric_class).or_default() += u128::from(shelf.free_bytes());
    }
    let mut classes: Vec<(&str, u128)> = room.into_iter().collect();
    classes.sort_by_key(|(class, bytes)| (Reverse(*bytes), *class));
    classes.into_iter().map(|(class, _)| class.to_owned()).collect()
}
