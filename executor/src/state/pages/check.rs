//! The pool's books: every slot is free or in one handle, every handle is free, cached or held as often as sequences say.

use std::collections::BTreeMap;

use super::{HandleIndex, HandleKey, PagePool};

impl PagePool {
    /// Checks that every handle is free, cached or held exactly `held[handle]` times. Returns the first fault.
    pub fn check(&self, held: &BTreeMap<HandleIndex, u32>) -> Result<(), String> {
        let mut cached = vec![false; self.handles.len()];
        for (ends, is_kv) in self.ends.iter().zip([true, false]) {
            let (mut at, mut before) = (ends.oldest, None);
            while let Some(handle) = at {
                let entry = &self.handles[handle.0 as usize];
                let is_stray = self.slots.is_kv(self.stretches[entry.stretch.0 as usize].classes[0]) != is_kv;
                if entry.older != before || is_stray || std::mem::replace(&mut cached[handle.0 as usize], true) {
                    return Err(format!("the list of cached handles is broken at {handle:?}"));
                }
                (before, at) = (at, entry.newer);
            }
            if ends.newest != before {
                return Err(format!("the newest cached handle is {:?}, the list ends at {before:?}", ends.newest));
            }
        }
        let mut free = vec![false; self.handles.len()];
        self.free.iter().for_each(|handle| free[handle.0 as usize] = true);
        let mut owned = vec![Vec::new(); self.slots.class_count()];
        let mut held_slots = vec![0; self.slots.class_count()];
        let mut keyed = 0;
        for (h, entry) in self.handles.iter().enumerate() {
            let handle = HandleIndex(h as u32);
            let expected = held.get(&handle).copied().unwrap_or(0);
            if entry.refs != expected {
                return Err(format!("handle {h} has {} holders, sequences hold it {expected} times", entry.refs));
            }
            let places = u32::from(entry.refs > 0) + u32::from(free[h]) + u32::from(cached[h]);
            if places != 1 {
                return Err(format!("handle {h} is in {places} of held, free, cached"));
            }
            if free[h] {
                continue;
            }
            let stretch = &self.stretches[entry.stretch.0 as usize];
            if entry.slots.len() != stretch.classes.len() {
                return Err(format!("handle {h} has {} pages over {} attention blocks", entry.slots.len(), stretch.classes.len()));
            }
            for (slot, class) in entry.slots.iter().zip(&stretch.classes) {
                owned[class.0 as usize].push(*slot);
                held_slots[class.0 as usize] += usize::from(entry.refs > 0);
            }
            if let Some(tokens) = entry.tokens {
                keyed += 1;
                if self.index.get(&HandleKey { tokens, stretch: entry.stretch }) != Some(&handle) {
                    return Err(format!("handle {h} has a key that the index does not know"));
                }
            } else if entry.refs == 0 {
                return Err(format!("handle {h} is cached under no key"));
            }
        }
        if keyed != self.index.len() {
            return Err(format!("the index has {} handles, {keyed} have keys", self.index.len()));
        }
        self.slots.check(&owned, &held_slots)
    }
}
