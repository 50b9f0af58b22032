//! The page pool: which KV memory belongs to whom, which is kept for reuse, which is free. It deals in *handles*: one run of
//! `page_tokens` tokens over all attention blocks of one segment, with a slot of KV memory in each of them. One pool for a device, one
//! class of slots for each KV shape. A *boundary* handle is the same for hidden rows where a lineage forks: one slot of as many rows.
//! It holds numbers, never bytes. `slots` counts slots, `recut` follows a new cut.

mod check;
mod recut;
mod slots;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use ashlar_kernels::ops::KvShape;

pub use slots::ClassIndex;
use slots::{SlotShape, Slots};

/// Lineage at an attention block, interned by the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineageIndex(pub u32);

/// The attention blocks of one segment under one lineage: what a handle covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StretchIndex(pub u32);

/// A handle: the pages of one run of tokens, one in each attention block of a stretch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HandleIndex(pub u32);

/// Digest of all tokens (and the cache domain, numeric class and KV format) up to the end of a page.
pub type TokenHash = [u8; 32];

/// What makes two handles equal. Positions are in the hash: it covers all tokens from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HandleKey {
    /// Tokens so far.
    pub tokens: TokenHash,
    /// Where.
    pub stretch: StretchIndex,
}

#[derive(Debug, Clone)]
struct Stretch {
    /// Lineage at each attention block: its identity.
    lineages: Vec<LineageIndex>,
    /// Class of each attention block's slots.
    classes: Vec<ClassIndex>,
    /// How many slots of each class a handle has.
    counts: Vec<(ClassIndex, usize)>,
}

#[derive(Debug, Clone)]
struct Handle {
    stretch: StretchIndex,
    /// Sequences that hold it.
    refs: u32,
    /// Span whose sequence published it; of no meaning before.
    maker: u32,
    /// Set while the index points here.
    tokens: Option<TokenHash>,
    /// One for each attention block of the stretch; none while it is free.
    slots: Vec<u32>,
    /// Neighbours among cached and unheld handles.
    older: Option<HandleIndex>,
    newer: Option<HandleIndex>,
}

/// Ends of a list of cached and unheld handles.
#[derive(Debug, Clone, Copy, Default)]
struct Ends {
    oldest: Option<HandleIndex>,
    newest: Option<HandleIndex>,
}

/// The pool.
#[derive(Debug, Clone)]
pub struct PagePool {
    slots: Slots,
    stretches: Vec<Stretch>,
    by_blocks: BTreeMap<Vec<(LineageIndex, ClassIndex)>, StretchIndex>,
    handles: Vec<Handle>,
    free: Vec<HandleIndex>,
    index: BTreeMap<HandleKey, HandleIndex>,
    /// Ends of the lists of cached and unheld handles: of keys and values, and of hidden rows. One never makes room for the other, so neither
    /// is looked through for the other.
    ends: [Ends; 2],
    evicted_pages: u64,
    /// For stretches of keys and values before a fork: what boundary handles there cover, which are of use only together with theirs.
    forks: BTreeMap<StretchIndex, Vec<StretchIndex>>,
}

impl PagePool {
    /// An empty pool of `kv_bytes`, and `boundary_bytes` for hidden rows.
    pub fn new(kv_bytes: u64, boundary_bytes: u64) -> Self {
        Self {
            slots: Slots::new(kv_bytes, boundary_bytes),
            stretches: Vec::new(),
            by_blocks: BTreeMap::new(),
            handles: Vec::new(),
            free: Vec::new(),
            index: BTreeMap::new(),
            ends: [Ends::default(); 2],
            evicted_pages: 0,
            forks: BTreeMap::new(),
        }
    }

    /// The class for a shape, made on first use.
    pub fn class(&mut self, shape: KvShape) -> ClassIndex {
        self.slots.class(SlotShape::Kv(shape), shape.page_bytes() as u64)
    }

    /// The class for pages of hidden rows of a width, made on first use.
    pub fn hidden_class(&mut self, width: u32, page_tokens: u32) -> ClassIndex {
        self.slots.class(SlotShape::Hidden { width }, hidden_page_bytes(width, page_tokens))
    }

    /// Shares the budget among classes in proportion to `weights` (attention blocks of each class that are hosted).
    pub fn share(&mut self, weights: &[u64]) {
        self.slots.share(weights);
    }

    /// Slots that a class may ever hold at once under the present shares.
    pub fn slot_count_max(&self, class: ClassIndex) -> usize {
        self.slots.count_max(class)
    }

    /// Slots that could be reserved now: free, not yet made, or of cached and unheld handles.
    pub fn available(&self, class: ClassIndex) -> usize {
        self.slots.available(class)
    }

    /// Classes made so far.
    pub fn class_count(&self) -> usize {
        self.slots.class_count()
    }

    /// The stretch of attention blocks with these lineages and slot classes, made on first use; None where there are none.
    pub fn stretch(&mut self, blocks: &[(LineageIndex, ClassIndex)]) -> Option<StretchIndex> {
        if blocks.is_empty() {
            return None;
        }
        if let Some(known) = self.by_blocks.get(blocks) {
            return Some(*known);
        }
        let lineages: Vec<LineageIndex> = blocks.iter().map(|(lineage, _)| *lineage).collect();
        let classes: Vec<ClassIndex> = blocks.iter().map(|(_, class)| *class).collect();
        let mut counts: BTreeMap<ClassIndex, usize> = BTreeMap::new();
        classes.iter().for_each(|class| *counts.entry(*class).or_default() += 1);
        let made = StretchIndex(self.stretches.len() as u32);
        self.by_blocks.insert(blocks.to_vec(), made);
        self.stretches.push(Stretch { lineages, classes, counts: counts.into_iter().collect() });
        Some(made)
    }

    /// The slot of each attention block of a handle's stretch.
    pub fn slots(&self, handle: HandleIndex) -> &[u32] {
        &self.handles[handle.0 as usize].slots
    }

    /// What a handle covers.
    pub(crate) fn stretch_of(&self, handle: HandleIndex) -> StretchIndex {
        self.handles[handle.0 as usize].stretch
    }

    /// Attention blocks of a stretch.
    pub(crate) fn block_count(&self, stretch: StretchIndex) -> usize {
        self.stretches[stretch.0 as usize].classes.len()
    }

    /// Slots of each class that a handle has.
    pub(crate) fn slot_counts(&self, handle: HandleIndex) -> &[(ClassIndex, usize)] {
        &self.stretches[self.stretch_of(handle).0 as usize].counts
    }

    /// Takes a handle for one holder, evicting least recently used cached ones if it must.
    pub fn reserve(&mut self, stretch: StretchIndex) -> Option<HandleIndex> {
        let place = stretch.0 as usize;
        let fits = |(class, count): &(ClassIndex, usize)| self.slots.available(*class) >= *count;
        if !self.stretches[place].counts.iter().all(fits) {
            return None;
        }
        for i in 0..self.stretches[place].counts.len() {
            let (class, count) = self.stretches[place].counts[i];
            while !self.slots.has_room(class, count) {
                self.evict_oldest(class);
            }
        }
        let handle = self.free.pop().unwrap_or_else(|| {
            self.handles.push(Handle { stretch, refs: 0, maker: 0, tokens: None, slots: Vec::new(), older: None, newer: None });
            HandleIndex(self.handles.len() as u32 - 1)
        });
        let entry = &mut self.handles[handle.0 as usize];
        entry.stretch = stretch;
        entry.refs = 1;
        entry.slots.extend(self.stretches[place].classes.iter().map(|class| self.slots.take(*class)));
        self.hold(stretch);
        Some(handle)
    }

    /// The handle with a key, taken for one more holder.
    pub fn find(&mut self, key: &HandleKey) -> Option<HandleIndex> {
        let handle = *self.index.get(key)?;
        if self.handles[handle.0 as usize].refs == 0 {
            self.unlink(handle);
            self.hold(key.stretch);
        }
        self.handles[handle.0 as usize].refs += 1;
        Some(handle)
    }

    /// Whether the index has a handle, without taking it.
    pub fn contains(&self, key: &HandleKey) -> bool {
        self.index.contains_key(key)
    }

    /// Makes a cached handle the most recently used one, if there is one under a key.
    pub fn touch(&mut self, key: &HandleKey) {
        if let Some(handle) = self.index.get(key).copied().filter(|handle| self.handles[handle.0 as usize].refs == 0) {
            self.unlink(handle);
            self.link_newest(handle);
        }
    }

    /// Says which boundary handles are of use only as long as the pages of a stretch for the same tokens are there.
    pub(crate) fn set_forks(&mut self, forks: BTreeMap<StretchIndex, Vec<StretchIndex>>) {
        self.forks = forks;
    }

    /// Makes a held handle findable, whose pages are full. If an equal one is known already, that one stays the known one.
    pub fn publish(&mut self, handle: HandleIndex, tokens: TokenHash, maker: u32) {
        let entry = &mut self.handles[handle.0 as usize];
        assert!(entry.refs > 0, "only held pages are published");
        if entry.tokens.is_some() {
            return;
        }
        if let Entry::Vacant(place) = self.index.entry(HandleKey { tokens, stretch: entry.stretch }) {
            place.insert(handle);
            entry.tokens = Some(tokens);
            entry.maker = maker;
        }
    }

    /// A class of which a handle in each of these stretches would together lack slots; None if there is none.
    pub fn short_class(&self, stretches: impl Iterator<Item = StretchIndex> + Clone) -> Option<ClassIndex> {
        let counts = stretches.clone().flat_map(|stretch| &self.stretches[stretch.0 as usize].counts);
        let needed = |class: ClassIndex| stretches.clone().map(|stretch| self.slot_count(stretch, class)).sum::<usize>();
        counts.map(|(class, _)| *class).find(|class| self.slots.available(*class) < needed(*class))
    }

    /// Slots of a class that a handle of a stretch has.
    pub fn slot_count(&self, stretch: StretchIndex, class: ClassIndex) -> usize {
        let counts = &self.stretches[stretch.0 as usize].counts;
        counts.iter().find(|(of, _)| *of == class).map_or(0, |(_, count)| *count)
    }

    /// Who published a handle.
    pub fn maker(&self, handle: HandleIndex) -> u32 {
        self.handles[handle.0 as usize].maker
    }

    /// One holder fewer. Call for a sequence's last tokens first, and of one run of tokens for the deeper stretch first, so that leaves
    /// are evicted before what they hang on.
    pub fn release(&mut self, handle: HandleIndex) {
        let entry = &mut self.handles[handle.0 as usize];
        assert!(entry.refs > 0, "released a handle that nobody holds");
        entry.refs -= 1;
        if entry.refs > 0 {
            return;
        }
        let (stretch, is_cached) = (entry.stretch, entry.tokens.is_some());
        for (class, count) in &self.stretches[stretch.0 as usize].counts {
            self.slots.unhold(*class, *count);
        }
        if is_cached {
            self.link_newest(handle);
        } else {
            self.free_handle(handle);
        }
    }

    /// Pages (used, cached, free) over all classes; a handle has a page in each attention block.
    pub fn counts(&self) -> (u64, u64, u64) {
        self.slots.counts(true)
    }

    /// The same for pages of hidden rows.
    pub fn boundary_counts(&self) -> (u64, u64, u64) {
        self.slots.counts(false)
    }

    /// Cached pages dropped so far.
    pub fn evicted_pages(&self) -> u64 {
        self.evicted_pages
    }

    /// What keys and values are cached, without cuts: lineage at each attention block and tokens, in order.
    pub fn cached_keys(&self) -> std::collections::BTreeSet<(LineageIndex, TokenHash)> {
        let lineages = |key: &HandleKey| self.stretches[key.stretch.0 as usize].lineages.clone();
        let is_kv = |key: &&HandleKey| self.slots.is_kv(self.stretches[key.stretch.0 as usize].classes[0]);
        self.index.keys().filter(is_kv).flat_map(|key| lineages(key).into_iter().map(|lineage| (lineage, key.tokens))).collect()
    }

    fn hold(&mut self, stretch: StretchIndex) {
        for (class, count) in &self.stretches[stretch.0 as usize].counts {
            self.slots.hold(*class, *count);
        }
    }

    /// Drops the least recently used cached handle that has a slot of the class.
    fn evict_oldest(&mut self, class: ClassIndex) {
        let has_class = |handle: HandleIndex| {
            let stretch = self.handles[handle.0 as usize].stretch;
            self.stretches[stretch.0 as usize].counts.iter().any(|(known, _)| *known == class)
        };
        let mut at = self.ends[usize::from(!self.slots.is_kv(class))].oldest;
        while let Some(handle) = at.filter(|handle| !has_class(*handle)) {
            at = self.handles[handle.0 as usize].newer;
        }
        let handle = at.expect("slots that are available and not free are cached");
        let Handle { stretch, tokens, .. } = self.handles[handle.0 as usize];
        self.evict(handle);
        // Hidden rows whose keys and values are gone let nobody skip the blocks before them.
        for fork in 0..self.forks.get(&stretch).map_or(0, Vec::len) {
            let key = tokens.map(|tokens| HandleKey { tokens, stretch: self.forks[&stretch][fork] });
            let boundary = key.and_then(|key| self.index.get(&key).copied());
            if let Some(boundary) = boundary.filter(|boundary| self.handles[boundary.0 as usize].refs == 0) {
                self.evict(boundary);
            }
        }
    }

    /// Drops a cached handle that nobody holds.
    #[cfg(test)]
    pub(crate) fn drop_cached(&mut self, key: &HandleKey) {
        self.evict(self.index[key]);
    }

    fn evict(&mut self, handle: HandleIndex) {
        self.unlink(handle);
        self.forget(handle);
        self.evicted_pages += self.handles[handle.0 as usize].slots.len() as u64;
        self.free_handle(handle);
    }

    /// Takes a handle out of the index.
    fn forget(&mut self, handle: HandleIndex) {
        let entry = &mut self.handles[handle.0 as usize];
        if let Some(tokens) = entry.tokens.take() {
            self.index.remove(&HandleKey { tokens, stretch: entry.stretch });
        }
    }

    /// Gives the slots of an unheld, unknown handle back.
    fn free_handle(&mut self, handle: HandleIndex) {
        let entry = &mut self.handles[handle.0 as usize];
        let classes = &self.stretches[entry.stretch.0 as usize].classes;
        entry.slots.drain(..).zip(classes).for_each(|(slot, class)| self.slots.give_back(*class, slot));
        self.free.push(handle);
    }

    /// The ends of the list of a handle.
    fn ends(&mut self, handle: HandleIndex) -> &mut Ends {
        let stretch = &self.stretches[self.handles[handle.0 as usize].stretch.0 as usize];
        &mut self.ends[usize::from(!self.slots.is_kv(stretch.classes[0]))]
    }

    /// Puts an unheld handle into the list of cached ones, as the one that was used last.
    fn link_newest(&mut self, handle: HandleIndex) {
        let newest = self.ends(handle).newest;
        self.link(handle, newest);
    }

    /// Puts an unheld handle into the list of cached ones, right after `older`.
    fn link(&mut self, handle: HandleIndex, older: Option<HandleIndex>) {
        let newer = match older {
            Some(older) => self.handles[older.0 as usize].newer.replace(handle),
            None => self.ends(handle).oldest.replace(handle),
        };
        match newer {
            Some(newer) => self.handles[newer.0 as usize].older = Some(handle),
            None => self.ends(handle).newest = Some(handle),
        }
        let entry = &mut self.handles[handle.0 as usize];
        (entry.older, entry.newer) = (older, newer);
    }

    fn unlink(&mut self, handle: HandleIndex) {
        let entry = &mut self.handles[handle.0 as usize];
        let (older, newer) = (entry.older.take(), entry.newer.take());
        match older {
            Some(older) => self.handles[older.0 as usize].newer = newer,
            None => self.ends(handle).oldest = newer,
        }
        match newer {
            Some(newer) => self.handles[newer.0 as usize].older = older,
            None => self.ends(handle).newest = older,
        }
    }
}

/// Bytes of a page of hidden rows.
pub(crate) fn hidden_page_bytes(width: u32, page_tokens: u32) -> u64 {
    u64::from(width) * u64::from(page_tokens) * size_of::<f32>() as u64
}
