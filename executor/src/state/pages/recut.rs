//! Following a new cut: handles of a stretch that is cut are split, handles of stretches that go together from now on are joined. Slots
//! stay where they are; only numbers move.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::{Handle, HandleIndex, HandleKey, PagePool, StretchIndex, TokenHash};

impl PagePool {
    /// The two stretches into which the first `at` attention blocks and the rest of `stretch` fall.
    pub fn halves(&mut self, stretch: StretchIndex, at: usize) -> (StretchIndex, StretchIndex) {
        let whole = &self.stretches[stretch.0 as usize];
        let blocks: Vec<_> = whole.lineages.iter().copied().zip(whole.classes.iter().copied()).collect();
        assert!(at > 0 && at < blocks.len(), "both halves have attention blocks");
        let first = self.stretch(&blocks[..at]).expect("not empty");
        (first, self.stretch(&blocks[at..]).expect("not empty"))
    }

    /// The stretch of two that follow each other.
    pub fn whole(&mut self, first: StretchIndex, second: StretchIndex) -> StretchIndex {
        let parts = [first, second].map(|part| &self.stretches[part.0 as usize]);
        let blocks: Vec<_> = parts.iter().flat_map(|part| part.lineages.iter().copied().zip(part.classes.iter().copied())).collect();
        self.stretch(&blocks).expect("not empty")
    }

    /// Splits every handle of a stretch: it keeps the first `at` attention blocks, a new one takes the rest and as many holders. Returns
    /// the new handle for each.
    pub fn split(&mut self, stretch: StretchIndex, at: usize) -> BTreeMap<HandleIndex, HandleIndex> {
        let (first, second) = self.halves(stretch, at);
        let mut rests = BTreeMap::new();
        for h in 0..self.handles.len() {
            let entry = &mut self.handles[h];
            if entry.stretch != stretch || entry.slots.is_empty() {
                continue;
            }
            let (handle, rest) = (HandleIndex(h as u32), HandleIndex(self.handles.len() as u32));
            let entry = &mut self.handles[h];
            let slots = entry.slots.split_off(at);
            entry.stretch = first;
            let (refs, maker, tokens) = (entry.refs, entry.maker, entry.tokens);
            self.handles.push(Handle { stretch: second, refs, maker, tokens, slots, older: None, newer: None });
            if refs == 0 {
                // The deeper one is to go first.
                self.link(rest, self.handles[h].older);
            }
            if let Some(tokens) = tokens {
                self.index.remove(&HandleKey { tokens, stretch });
                self.rename(handle, tokens);
                self.rename(rest, tokens);
            }
            rests.insert(handle, rest);
        }
        rests
    }

    /// Makes a handle findable under its new stretch, unless an equal one is known from a time when the cut was like this before.
    fn rename(&mut self, handle: HandleIndex, tokens: TokenHash) {
        let entry = &mut self.handles[handle.0 as usize];
        let key = HandleKey { tokens, stretch: entry.stretch };
        if let Entry::Vacant(place) = self.index.entry(key) {
            place.insert(handle);
            return;
        }
        entry.tokens = None;
        if entry.refs == 0 {
            self.evict(handle);
        }
    }

    /// Joins the handles of two stretches: those that `held` pairs, whose holders are the same, and cached ones for the same tokens. What
    /// cannot be paired is no longer cached; where it is held (on its way back, behind a window) it stays what it was until it is released.
    pub fn join(&mut self, first: StretchIndex, second: StretchIndex, held: &BTreeMap<HandleIndex, HandleIndex>) {
        let whole = self.whole(first, second);
        let handles = |pool: &Self, stretch: StretchIndex| -> Vec<HandleIndex> {
            let all = pool.handles.iter().enumerate();
            all.filter(|(_, h)| h.stretch == stretch && !h.slots.is_empty()).map(|(h, _)| HandleIndex(h as u32)).collect()
        };
        for handle in handles(self, first) {
            let entry = &self.handles[handle.0 as usize];
            let (refs, tokens) = (entry.refs, entry.tokens);
            let rest = match refs {
                0 => tokens.and_then(|tokens| self.index.get(&HandleKey { tokens, stretch: second }).copied()),
                _ => match held.get(&handle) {
                    Some(rest) => Some(*rest),
                    None => {
                        self.forget(handle);
                        continue;
                    }
                },
            };
            let Some(rest) = rest.filter(|rest| self.handles[rest.0 as usize].refs == refs) else {
                assert_eq!(refs, 0, "held handles are paired");
                self.evict(handle);
                continue;
            };
            let same_tokens = self.handles[rest.0 as usize].tokens == tokens;
            if refs == 0 {
                self.unlink(rest);
            }
            self.forget(rest);
            self.forget(handle);
            let slots = std::mem::take(&mut self.handles[rest.0 as usize].slots);
            self.handles[rest.0 as usize].refs = 0;
            self.free.push(rest);
            let entry = &mut self.handles[handle.0 as usize];
            entry.slots.extend(slots);
            entry.stretch = whole;
            if let Some(tokens) = tokens.filter(|_| same_tokens) {
                entry.tokens = Some(tokens);
                self.rename(handle, tokens);
            }
        }
        // What is left of the second stretch has no first part.
        for handle in handles(self, second) {
            match self.handles[handle.0 as usize].refs {
                0 => self.evict(handle),
                _ => self.forget(handle),
            }
        }
    }
}
