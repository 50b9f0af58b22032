//! Slots of device memory by class: how many there may be, which are free, how many are held. A slot is one page of one attention block,
//! or a page of hidden rows at a border of segments.

use ashlar_kernels::ops::KvShape;

/// A slot class of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClassIndex(pub u32);

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SlotShape {
    /// Keys and values of a page of tokens.
    Kv(KvShape),
    /// Hidden rows of a page of tokens, so many f32 each.
    Hidden { width: u32 },
}

#[derive(Debug, Clone)]
struct Class {
    shape: SlotShape,
    slot_bytes: u64,
    /// Share of the budget, in slots; may shrink below what is in use, which then drains.
    count_max: usize,
    /// Slots ever given out.
    made_count: u32,
    free: Vec<u32>,
    /// Slots of handles that somebody holds.
    held_count: usize,
}

impl Class {
    fn is_kv(&self) -> bool {
        matches!(self.shape, SlotShape::Kv(_))
    }

    /// Slots of handles, held or cached.
    fn in_use(&self) -> usize {
        self.made_count as usize - self.free.len()
    }
}

/// All slots of a pool.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    kv_bytes: u64,
    boundary_bytes: u64,
    classes: Vec<Class>,
}

impl Slots {
    pub(super) fn new(kv_bytes: u64, boundary_bytes: u64) -> Self {
        Self { kv_bytes, boundary_bytes, classes: Vec::new() }
    }

    pub(super) fn class(&mut self, shape: SlotShape, slot_bytes: u64) -> ClassIndex {
        if let Some(found) = self.classes.iter().position(|class| class.shape == shape) {
            return ClassIndex(found as u32);
        }
        self.classes.push(Class { shape, slot_bytes, count_max: 0, made_count: 0, free: Vec::new(), held_count: 0 });
        ClassIndex(self.classes.len() as u32 - 1)
    }

    pub(super) fn is_kv(&self, class: ClassIndex) -> bool {
        self.classes[class.0 as usize].is_kv()
    }

    /// Shares each budget (KV, hidden rows) among its classes in proportion to `weights`, in slots.
    pub(super) fn share(&mut self, weights: &[u64]) {
        assert_eq!(weights.len(), self.classes.len(), "one weight a class");
        for (budget, is_kv) in [(self.kv_bytes, true), (self.boundary_bytes, false)] {
            let bytes = |weight: &u64, class: &Class| u128::from(*weight) * u128::from(class.slot_bytes);
            let mine = |class: &Class| class.is_kv() == is_kv;
            let total: u128 = weights.iter().zip(&self.classes).filter(|(_, class)| mine(class)).map(|(w, class)| bytes(w, class)).sum();
            for (class, weight) in self.classes.iter_mut().zip(weights).filter(|(class, _)| mine(class)) {
                let share = (u128::from(budget) * bytes(weight, class)).checked_div(total).unwrap_or(0);
                class.count_max = (share / u128::from(class.slot_bytes)) as usize;
            }
        }
    }

    pub(super) fn count_max(&self, class: ClassIndex) -> usize {
        self.classes[class.0 as usize].count_max
    }

    pub(super) fn available(&self, class: ClassIndex) -> usize {
        let class = &self.classes[class.0 as usize];
        class.count_max.saturating_sub(class.held_count)
    }

    /// Whether `count` slots can be taken without evicting. A class over its share (which shrank) has none before it has drained.
    pub(super) fn has_room(&self, class: ClassIndex, count: usize) -> bool {
        let class = &self.classes[class.0 as usize];
        class.in_use() + count <= class.count_max
    }

    pub(super) fn take(&mut self, class: ClassIndex) -> u32 {
        let class = &mut self.classes[class.0 as usize];
        class.free.pop().unwrap_or_else(|| {
            class.made_count += 1;
            class.made_count - 1
        })
    }

    pub(super) fn give_back(&mut self, class: ClassIndex, slot: u32) {
        self.classes[class.0 as usize].free.push(slot);
    }

    pub(super) fn hold(&mut self, class: ClassIndex, count: usize) {
        self.classes[class.0 as usize].held_count += count;
    }

    pub(super) fn unhold(&mut self, class: ClassIndex, count: usize) {
        self.classes[class.0 as usize].held_count -= count;
    }

    /// (used, cached, free) over the classes of keys and values, or over those of hidden rows.
    pub(super) fn counts(&self, is_kv: bool) -> (u64, u64, u64) {
        let classes = || self.classes.iter().filter(|class| class.is_kv() == is_kv);
        let sum = |count: fn(&Class) -> usize| classes().map(count).sum::<usize>() as u64;
        let used = sum(|class| class.held_count);
        let all = sum(|class| class.count_max.max(class.made_count as usize));
        let cached = sum(Class::in_use) - used;
        (used, cached, all - used - cached)
    }

    /// Whether each class has exactly these slots in use, `owners[class]` of them listed once each, and so many held.
    pub(super) fn check(&self, owned: &[Vec<u32>], held: &[usize]) -> Result<(), String> {
        for (c, class) in self.classes.iter().enumerate() {
            if class.held_count != held[c] {
                return Err(format!("class {c} counts {} held pages, handles have {}", class.held_count, held[c]));
            }
            let mut places = vec![0u32; class.made_count as usize];
            for slot in class.free.iter().chain(&owned[c]) {
                *places.get_mut(*slot as usize).ok_or_else(|| format!("page {c}/{slot} was never made"))? += 1;
            }
            if let Some(slot) = places.iter().position(|count| *count != 1) {
                return Err(format!("page {c}/{slot} is in {} places of free and owned", places[slot]));
            }
        }
        Ok(())
    }

    pub(super) fn class_count(&self) -> usize {
        self.classes.len()
    }
}
