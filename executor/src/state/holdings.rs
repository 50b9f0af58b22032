//! What tenants hold of the places and of the pages, and whose sequences may give it back: kept as sequences start, take and leave pages,
//! and go, so that who is to give way is found and never searched for. What follows from it is in `claim`.

use std::collections::{BTreeMap, BTreeSet};

use super::batch::SequenceId;
use super::claim::Lack;
use super::engine::Engine;
use super::pages::{ClassIndex, HandleIndex};
use super::sequence::{Sequence, Status};
use super::span::SpanPages;
use super::tenants::{TenantIndex, Tenants};

/// How many of one thing each tenant holds.
#[derive(Debug, Default)]
struct Holding {
    tenants: Vec<Held>,
    /// Tenants whose place in `order` may be another one by now.
    unsettled: Vec<TenantIndex>,
    /// Tenants that hold some, by what they hold, for each weight: of equal weight whoever holds most is most above its share.
    order: BTreeMap<u32, BTreeSet<(u64, TenantIndex)>>,
}

/// What one tenant holds.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    count: u64,
    /// Its place in `order`: weight and count when it was settled last.
    place: Option<(u32, u64)>,
    is_unsettled: bool,
}

impl Holding {
    fn of(&mut self, tenant: TenantIndex) -> &mut Held {
        if self.tenants.len() <= tenant.place() {
            self.tenants.resize(tenant.place() + 1, Held::default());
        }
        let held = &mut self.tenants[tenant.place()];
        if !std::mem::replace(&mut held.is_unsettled, true) {
            self.unsettled.push(tenant);
        }
        held
    }

    fn count(&self, tenant: TenantIndex) -> u64 {
        self.tenants.get(tenant.place()).map_or(0, |held| held.count)
    }

    /// Puts tenants where they belong whose counts or weights have changed.
    fn settle(&mut self, tenants: &Tenants) {
        for tenant in self.unsettled.drain(..) {
            let held = &mut self.tenants[tenant.place()];
            held.is_unsettled = false;
            let place = (held.count > 0).then(|| (tenants.weight(tenant), held.count));
            let before = std::mem::replace(&mut held.place, place);
            if before == place {
                continue;
            }
            if let Some((weight, count)) = before {
                let line = self.order.get_mut(&weight).expect("it has a place there");
                line.remove(&(count, tenant));
                if line.is_empty() {
                    self.order.remove(&weight);
                }
            }
            if let Some((weight, count)) = place {
                self.order.entry(weight).or_default().insert((count, tenant));
            }
        }
    }

    /// Tenants that hold more than the share of their weight, those most above it first.
    fn above(&self, share: impl Fn(u32) -> u64) -> impl Iterator<Item = TenantIndex> {
        let mut lines: Vec<_> = self.order.iter().map(|(weight, line)| (share(*weight), line.iter().rev().peekable())).collect();
        std::iter::from_fn(move || {
            let most = (0..lines.len()).max_by_key(|i| {
                let (share, line) = &mut lines[*i];
                line.peek().map(|(count, _)| count.saturating_sub(*share))
            })?;
            let (share, line) = &mut lines[most];
            line.next_if(|(count, _)| *count > *share).map(|(_, tenant)| *tenant)
        })
    }
}

/// Of which tenants sequences hold a handle, and how many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Holders {
    #[default]
    Nobody,
    One(TenantIndex, u32),
    Several(BTreeMap<TenantIndex, u32>),
}

/// Pages of one class.
#[derive(Debug, Default)]
struct PageHolding {
    /// Of each tenant, those that it holds alone, however many sequences of it do.
    alone: Holding,
    /// Those that several tenants hold: they are nobody's, and no tenant's share.
    common: u64,
}

/// What all tenants hold.
#[derive(Debug, Default)]
pub(crate) struct Holdings {
    places: Holding,
    /// By class.
    pages: Vec<PageHolding>,
    /// By handle.
    holders: Vec<Holders>,
    /// Sequences that run and could start over, as their chains are whole here.
    whole: BTreeSet<(i32, SequenceId)>,
    /// Of each tenant these (None), and the sequences that may give back what another tenant lacks.
    givers: BTreeSet<(TenantIndex, Option<Lack>, i32, SequenceId)>,
}

impl Holdings {
    /// A sequence of a tenant takes a handle that has so many slots of each class.
    pub(crate) fn take(&mut self, tenant: TenantIndex, handle: HandleIndex, counts: &[(ClassIndex, usize)]) {
        if self.holders.len() <= handle.0 as usize {
            self.holders.resize(handle.0 as usize + 1, Holders::Nobody);
        }
        let holders = &mut self.holders[handle.0 as usize];
        match holders {
            Holders::Nobody => {
                *holders = Holders::One(tenant, 1);
                self.each_class(counts, |class, count| class.alone.of(tenant).count += count);
            }
            Holders::One(of, count) if *of == tenant => *count += 1,
            Holders::One(of, count) => {
                let of = *of;
                *holders = Holders::Several(BTreeMap::from([(of, *count), (tenant, 1)]));
                self.each_class(counts, |class, count| {
                    class.alone.of(of).count -= count;
                    class.common += count;
                });
            }
            Holders::Several(by) => *by.entry(tenant).or_default() += 1,
        }
    }

    /// A sequence of a tenant leaves a handle that it took.
    pub(crate) fn leave(&mut self, tenant: TenantIndex, handle: HandleIndex, counts: &[(ClassIndex, usize)]) {
        let holders = &mut self.holders[handle.0 as usize];
        match holders {
            Holders::One(of, count) if *of == tenant && *count > 1 => *count -= 1,
            Holders::One(of, _) if *of == tenant => {
                *holders = Holders::Nobody;
                self.each_class(counts, |class, count| class.alone.of(tenant).count -= count);
            }
            Holders::Several(by) => {
                let count = by.get_mut(&tenant).expect("it holds it");
                *count -= 1;
                if *count == 0 {
                    by.remove(&tenant);
                }
                if by.len() == 1 {
                    let (of, count) = by.pop_first().expect("one is left");
                    *holders = Holders::One(of, count);
                    self.each_class(counts, |class, count| {
                        class.alone.of(of).count += count;
                        class.common -= count;
                    });
                }
            }
            Holders::Nobody | Holders::One(..) => panic!("a tenant leaves a handle that it does not hold"),
        }
    }

    fn each_class(&mut self, counts: &[(ClassIndex, usize)], change: impl Fn(&mut PageHolding, u64)) {
        for (class, count) in counts {
            let place = class.0 as usize;
            if self.pages.len() <= place {
                self.pages.resize_with(place + 1, PageHolding::default);
            }
            change(&mut self.pages[place], *count as u64);
        }
    }

    /// A sequence begins to run.
    pub(crate) fn start(&mut self, sequence: &Sequence) {
        self.places.of(sequence.tenant).count += 1;
        if sequence.path.is_whole() {
            self.whole.insert((sequence.priority, sequence.id));
            self.givers.insert((sequence.tenant, None, sequence.priority, sequence.id));
        }
    }

    /// A sequence that runs may give way to another tenant from now on.
    pub(crate) fn list_giver(&mut self, sequence: &Sequence, pages: &[SpanPages]) {
        for lack in lacks(pages) {
            self.givers.insert((sequence.tenant, Some(lack), sequence.priority, sequence.id));
        }
    }

    /// A sequence that ran does no longer.
    pub(crate) fn stop(&mut self, sequence: &Sequence, pages: &[SpanPages]) {
        let (tenant, priority, id) = (sequence.tenant, sequence.priority, sequence.id);
        self.places.of(tenant).count -= 1;
        self.whole.remove(&(priority, id));
        self.givers.remove(&(tenant, None, priority, id));
        if sequence.is_giver {
            for lack in lacks(pages) {
                self.givers.remove(&(tenant, Some(lack), priority, id));
            }
        }
    }

    /// The weight of a tenant may be another one.
    pub(crate) fn weigh(&mut self, tenant: TenantIndex) {
        for holding in std::iter::once(&mut self.places).chain(self.pages.iter_mut().map(|class| &mut class.alone)) {
            holding.of(tenant);
        }
    }

    /// What a tenant holds of what somebody lacks; of pages, those that no other tenant holds.
    pub(crate) fn held(&self, lack: Lack, tenant: TenantIndex) -> u64 {
        self.holding(lack).map_or(0, |holding| holding.count(tenant))
    }

    /// Pages of a class that several tenants hold.
    pub(crate) fn common(&self, class: ClassIndex) -> u64 {
        self.pages.get(class.0 as usize).map_or(0, |class| class.common)
    }

    /// Brings the order up to date in which `above` looks at tenants.
    pub(crate) fn settle(&mut self, lack: Lack, tenants: &Tenants) {
        match lack {
            Lack::Place => self.places.settle(tenants),
            Lack::Pages(class) => {
                if let Some(class) = self.pages.get_mut(class.0 as usize) {
                    class.alone.settle(tenants);
                }
            }
        }
    }

    /// Tenants that hold more than the share of their weight, those most above it first. `settle` comes before.
    pub(crate) fn above(&self, lack: Lack, share: impl Fn(u32) -> u64) -> impl Iterator<Item = TenantIndex> {
        self.holding(lack).map(|holding| holding.above(share)).into_iter().flatten()
    }

    /// Sequences that run and could start over, of the lowest priority and latest first.
    pub(crate) fn whole(&self) -> impl Iterator<Item = (i32, SequenceId)> {
        self.whole.iter().rev().copied()
    }

    /// Those of a tenant and a priority, latest first.
    pub(crate) fn whole_of(&self, tenant: TenantIndex, priority: i32) -> impl Iterator<Item = SequenceId> {
        let range = (tenant, None, priority, SequenceId::LEAST)..=(tenant, None, priority, SequenceId::MOST);
        self.givers.range(range).rev().map(|(.., id)| *id)
    }

    /// Sequences of a tenant that may give way to another one, and are of a kind that holds what is lacking: of this priority or a lower
    /// one, the lowest and latest first.
    pub(crate) fn givers(&self, tenant: TenantIndex, lack: Lack, priority: i32) -> impl Iterator<Item = SequenceId> {
        let range = (tenant, Some(lack), priority, SequenceId::LEAST)..=(tenant, Some(lack), i32::MAX, SequenceId::MOST);
        self.givers.range(range).rev().map(|(.., id)| *id)
    }

    fn holding(&self, lack: Lack) -> Option<&Holding> {
        match lack {
            Lack::Place => Some(&self.places),
            Lack::Pages(class) => self.pages.get(class.0 as usize).map(|class| &class.alone),
        }
    }
}

/// What a sequence may give back that takes such pages.
fn lacks(pages: &[SpanPages]) -> impl Iterator<Item = Lack> {
    std::iter::once(Lack::Place).chain(pages.iter().map(|of_class| Lack::Pages(of_class.class)))
}

impl Sequence {
    /// Whether it may give way to another tenant: it never did, or is a page further by now. One of a cut chain fails and is tried again by the
    /// router, so it must have gained a page since it came.
    pub(crate) fn may_give_way(&self, page_tokens: u32) -> bool {
        let computed = self.steps.last().map_or(0, |step| step.computed);
        let from = if self.path.is_whole() { self.gave_way_at } else { Some(self.base_tokens) };
        from.is_none_or(|from| computed >= from + page_tokens)
    }
}

impl Engine {
    /// Lists a sequence that runs, if it may give way to another tenant.
    pub(crate) fn list_giver(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id];
        if !sequence.is_giver && sequence.may_give_way(self.limits.page_tokens) {
            sequence.is_giver = true;
            self.holdings.list_giver(sequence, &self.spans[sequence.span.0 as usize].pages);
        }
    }

    /// A sequence that ran, and has left its pages, does no longer.
    pub(crate) fn stop_running(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id];
        self.holdings.stop(sequence, &self.spans[sequence.span.0 as usize].pages);
        sequence.is_giver = false;
    }

    /// The same by looking at all sequences: after a new cut, and for checks.
    pub(crate) fn count_holdings(&self) -> Holdings {
        let mut counted = Holdings::default();
        for sequence in self.sequences.iter().filter(|sequence| sequence.status == Status::Running) {
            counted.start(sequence);
            if sequence.may_give_way(self.limits.page_tokens) {
                counted.list_giver(sequence, &self.span(sequence.span).pages);
            }
            for handle in sequence.steps.iter().flat_map(|step| &step.lanes).flat_map(|held| &held.handles) {
                counted.take(sequence.tenant, *handle, self.pages.slot_counts(*handle));
            }
        }
        counted
    }

    /// Whether what is kept here is what all sequences say.
    pub(crate) fn check_holdings(&self) -> Result<(), String> {
        let (kept, counted) = (&self.holdings, self.count_holdings());
        let is_giver = |sequence: &&Sequence| sequence.status == Status::Running && sequence.may_give_way(self.limits.page_tokens);
        if let Some(wrong) = self.sequences.iter().find(|sequence| sequence.is_giver != is_giver(sequence)) {
            return Err(format!("sequence {:?} is listed to give way: {}, and should not be so", wrong.id, wrong.is_giver));
        }
        if (&kept.whole, &kept.givers) != (&counted.whole, &counted.givers) {
            return Err("sequences that may give way are not those that are listed".to_owned());
        }
        let handles = kept.holders.len().max(counted.holders.len());
        let holders = |holdings: &Holdings, h: usize| holdings.holders.get(h).cloned().unwrap_or_default();
        if let Some(h) = (0..handles).find(|h| holders(kept, *h) != holders(&counted, *h)) {
            return Err(format!("handle {h} is held by {:?}, kept as {:?}", holders(&counted, h), holders(kept, h)));
        }
        for lack in std::iter::once(Lack::Place).chain((0..self.pages.class_count() as u32).map(|class| Lack::Pages(ClassIndex(class)))) {
            let tenants = || (0..self.tenants.count()).map(TenantIndex::at);
            if let Some(tenant) = tenants().find(|tenant| kept.held(lack, *tenant) != counted.held(lack, *tenant)) {
                let (is, known) = (counted.held(lack, tenant), kept.held(lack, tenant));
                return Err(format!("{tenant:?} holds {is} of {lack:?}, kept as {known}"));
            }
            let Some(holding) = kept.holding(lack) else { continue };
            let places: BTreeSet<_> =
                holding.order.iter().flat_map(|(weight, line)| line.iter().map(|(n, of)| (*of, *weight, *n))).collect();
            let placed =
                holding.tenants.iter().enumerate().filter_map(|(t, held)| held.place.map(|(weight, n)| (TenantIndex::at(t), weight, n)));
            if placed.collect::<BTreeSet<_>>() != places {
                return Err(format!("tenants are not where they should be in the order of {lack:?}"));
            }
            let is_right = |tenant: &TenantIndex| {
                let held = &holding.tenants[tenant.place()];
                let place = (held.count > 0).then(|| (self.tenants.weight(*tenant), held.count));
                held.place == place || holding.unsettled.contains(tenant)
            };
            if let Some(tenant) = (0..holding.tenants.len()).map(TenantIndex::at).find(|tenant| !is_right(tenant)) {
                return Err(format!("{tenant:?} is in a wrong place in the order of {lack:?}"));
            }
        }
        match (0..self.pages.class_count() as u32).map(ClassIndex).find(|class| kept.common(*class) != counted.common(*class)) {
            Some(class) => Err(format!("{} pages of {class:?} are common, kept as {}", counted.common(class), kept.common(class))),
            None => Ok(()),
        }
    }
}
