//! The page pool: which slot of KV memory belongs to whom, which are kept for reuse, which are free. One pool for a
//! device, one slot class for each KV shape. It holds numbers, never bytes of KV.

use std::collections::BTreeMap;

use ashlar_kernels::ops::KvShape;

/// A slot class of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClassIndex(pub u32);

/// Lineage at an attention block, interned by the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineageIndex(pub u32);

/// Digest of all tokens (and the cache domain, numeric class and KV format) up to the end of a page.
pub type TokenHash = [u8; 32];

/// What makes two pages equal. Positions are in the hash: it covers all tokens from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageKey {
    /// Lineage at the attention block.
    pub lineage: LineageIndex,
    /// Tokens so far.
    pub tokens: TokenHash,
}

#[derive(Debug, Clone, Default)]
struct Slot {
    /// Sequences that hold it.
    refs: u32,
    /// Set while the index points here.
    key: Option<PageKey>,
    /// Place in `lru` while cached and unheld.
    tick: u64,
}

#[derive(Debug, Clone)]
struct Class {
    shape: KvShape,
    slot_bytes: u64,
    /// Share of the budget, in slots; may shrink below what is in use, which then drains.
    slot_count_max: usize,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots with a holder.
    held_count: usize,
}

/// The pool.
#[derive(Debug, Clone)]
pub struct PagePool {
    kv_bytes: u64,
    classes: Vec<Class>,
    index: BTreeMap<PageKey, (ClassIndex, u32)>,
    /// Unheld cached slots, least recently used first.
    lru: BTreeMap<u64, (ClassIndex, u32)>,
    tick: u64,
    evicted_count: u64,
}

impl PagePool {
    /// An empty pool of `kv_bytes`.
    pub fn new(kv_bytes: u64) -> Self {
        Self { kv_bytes, classes: Vec::new(), index: BTreeMap::new(), lru: BTreeMap::new(), tick: 0, evicted_count: 0 }
    }

    /// The class for a shape, made on first use.
    pub fn class(&mut self, shape: KvShape) -> ClassIndex {
        if let Some(found) = self.classes.iter().position(|class| class.shape == shape) {
            return ClassIndex(found as u32);
        }
        let slot_bytes = shape.page_bytes() as u64;
        self.classes.push(Class { shape, slot_bytes, slot_count_max: 0, slots: Vec::new(), free: Vec::new(), held_count: 0 });
        ClassIndex(self.classes.len() as u32 - 1)
    }

    /// Shares the budget among classes in proportion to `weights` (attention blocks of each class that are hosted).
    pub fn share(&mut self, weights: &[u64]) {
        assert_eq!(weights.len(), self.classes.len(), "one weight a class");
        let total: u128 = weights.iter().zip(&self.classes).map(|(w, class)| u128::from(*w) * u128::from(class.slot_bytes)).sum();
        for (class, weight) in self.classes.iter_mut().zip(weights) {
            let bytes = (u128::from(self.kv_bytes) * u128::from(*weight) * u128::from(class.slot_bytes)).checked_div(total).unwrap_or(0);
            class.slot_count_max = (bytes / u128::from(class.slot_bytes)) as usize;
        }
    }

    /// Slots that a class may ever hold at once under the present shares.
    pub fn slot_count_max(&self, class: ClassIndex) -> usize {
        self.classes[class.0 as usize].slot_count_max
    }

    /// Slots of a shape that fit the whole budget: what a device reserves address space for.
    pub fn slot_count_limit(&self, class: ClassIndex) -> usize {
        (self.kv_bytes / self.classes[class.0 as usize].slot_bytes) as usize
    }

    /// The shape of a class.
    pub fn shape(&self, class: ClassIndex) -> KvShape {
        self.classes[class.0 as usize].shape
    }

    /// Slots that could be reserved now: free, not yet made, or cached and unheld.
    pub fn available(&self, class: ClassIndex) -> usize {
        self.slot_count_max(class).saturating_sub(self.classes[class.0 as usize].held_count)
    }

    /// Takes a slot for one holder, evicting the least recently used cached page of the class if it must.
    pub fn reserve(&mut self, class: ClassIndex) -> Option<u32> {
        let pool = &mut self.classes[class.0 as usize];
        let in_use = pool.slots.len() - pool.free.len();
        if in_use < pool.slot_count_max {
            let slot = pool.free.pop().unwrap_or_else(|| {
                pool.slots.push(Slot::default());
                pool.slots.len() as u32 - 1
            });
            pool.slots[slot as usize].refs = 1;
            pool.held_count += 1;
            return Some(slot);
        }
        let (tick, slot) = self.lru.iter().find(|(_, (at, _))| *at == class).map(|(tick, (_, slot))| (*tick, *slot))?;
        self.drop_cached(class, slot, tick);
        let pool = &mut self.classes[class.0 as usize];
        // Over its share (the share shrank): give the slot up instead of handing it on.
        if in_use > pool.slot_count_max {
            return self.reserve(class);
        }
        let taken = pool.free.pop().expect("drop_cached just freed a slot");
        pool.slots[taken as usize].refs = 1;
        pool.held_count += 1;
        Some(taken)
    }

    fn drop_cached(&mut self, class: ClassIndex, slot: u32, tick: u64) {
        self.lru.remove(&tick);
        let pool = &mut self.classes[class.0 as usize];
        let key = pool.slots[slot as usize].key.take().expect("a slot in lru has a key");
        pool.free.push(slot);
        self.index.remove(&key);
        self.evicted_count += 1;
    }

    /// The slot that holds a page, taken for one more holder.
    pub fn find(&mut self, class: ClassIndex, key: &PageKey) -> Option<u32> {
        let (at, slot) = *self.index.get(key)?;
        assert_eq!(at, class, "equal lineages have equal KV shapes");
        let pool = &mut self.classes[class.0 as usize];
        let entry = &mut pool.slots[slot as usize];
        if entry.refs == 0 {
            self.lru.remove(&entry.tick);
            pool.held_count += 1;
        }
        entry.refs += 1;
        Some(slot)
    }

    /// Whether the index has a page, without taking it.
    pub fn contains(&self, key: &PageKey) -> bool {
        self.index.contains_key(key)
    }

    /// Makes a held, full page findable. If an equal page is known already, that one stays the known one.
    pub fn publish(&mut self, class: ClassIndex, slot: u32, key: PageKey) {
        let entry = &mut self.classes[class.0 as usize].slots[slot as usize];
        assert!(entry.refs > 0, "only a held page is published");
        if entry.key.is_none() && !self.index.contains_key(&key) {
            entry.key = Some(key);
            self.index.insert(key, (class, slot));
        }
    }

    /// One holder fewer. Call for a sequence's last pages first, so that leaves are evicted before what they hang on.
    pub fn release(&mut self, class: ClassIndex, slot: u32) {
        self.tick += 1;
        let pool = &mut self.classes[class.0 as usize];
        let entry = &mut pool.slots[slot as usize];
        assert!(entry.refs > 0, "released a page that nobody holds");
        entry.refs -= 1;
        if entry.refs > 0 {
            return;
        }
        pool.held_count -= 1;
        if entry.key.is_some() {
            entry.tick = self.tick;
            self.lru.insert(self.tick, (class, slot));
        } else {
            pool.free.push(slot);
        }
    }

    /// Pages (used, cached, free) over all classes.
    pub fn counts(&self) -> (u64, u64, u64) {
        let used: usize = self.classes.iter().map(|class| class.held_count).sum();
        let all: usize = self.classes.iter().map(|class| class.slot_count_max.max(class.slots.len())).sum();
        let cached = self.lru.len();
        (used as u64, cached as u64, (all - used - cached) as u64)
    }

    /// Cached pages dropped so far.
    pub fn evicted_count(&self) -> u64 {
        self.evicted_count
    }

    /// Checks that every slot is free, cached or held exactly `held[(class, slot)]` times. Returns the first fault.
    pub fn check(&self, held: &BTreeMap<(ClassIndex, u32), u32>) -> Result<(), String> {
        for (c, class) in self.classes.iter().enumerate() {
            if class.held_count != class.slots.iter().filter(|slot| slot.refs > 0).count() {
                return Err(format!("class {c} counts {} held pages", class.held_count));
            }
            let class_index = ClassIndex(c as u32);
            for (s, slot) in class.slots.iter().enumerate() {
                let expected = held.get(&(class_index, s as u32)).copied().unwrap_or(0);
                if slot.refs != expected {
                    return Err(format!("page {c}/{s} has {} holders, sequences hold it {expected} times", slot.refs));
                }
                let places = u32::from(slot.refs > 0)
                    + u32::from(class.free.contains(&(s as u32)))
                    + u32::from(self.lru.get(&slot.tick) == Some(&(class_index, s as u32)));
                if places != 1 {
                    return Err(format!("page {c}/{s} is in {places} of held, free, cached"));
                }
                if let Some(key) = &slot.key
                    && self.index.get(key) != Some(&(class_index, s as u32))
                {
                    return Err(format!("page {c}/{s} has a key that the index does not know"));
                }
            }
        }
        let keyed: usize = self.classes.iter().map(|class| class.slots.iter().filter(|slot| slot.key.is_some()).count()).sum();
        if keyed != self.index.len() {
            return Err(format!("the index has {} pages, slots have {keyed} keys", self.index.len()));
        }
        Ok(())
    }
}
