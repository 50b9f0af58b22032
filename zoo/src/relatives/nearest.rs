//! The nearest of many sketches, and what of a chain others have. Pure: sketches come one by one, so that memory does not grow with
//! their number. Start with [`Search`].

use std::collections::HashSet;

use super::sketch::{Prefix, Sketch};
use crate::digest::Digest;

/// Farthest that is still a relative. The measure is 0 for the same matrices and near 0.7 for independent ones. What was seen: fine-tunes
/// 0.000006 to 0.28 (the most is the demo family's `japanese-full`, which learned another language at rates far above any usual one), noise as
/// large as the weights 0.45, random and displaced matrices 0.70 and 0.73. docs/relatives.md has the table.
pub const RELATED_MAX: f32 = 0.5;

/// A search for the nearest relative of one chain.
#[derive(Debug)]
pub struct Search<'a, K> {
    of: &'a Sketch,
    /// All that the chain is made of.
    wanted: HashSet<Prefix>,
    /// What of it was seen in other sketches.
    seen: HashSet<Prefix>,
    /// Tensors of the chain.
    tensors: HashSet<Prefix>,
    best: Option<(Rank, K)>,
}

/// How near one is; less is nearer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rank {
    /// [`Sketch::distance`].
    pub distance: f32,
    /// Distinct tensors of the chain that it has: breaks ties, as between a base and its adapters.
    pub shared_tensors: usize,
    /// Whether adapters lie over its blocks.
    pub is_adapted: bool,
}

impl Rank {
    /// A strict order: nearer, then with more in common, then without adapters.
    fn is_before(&self, other: &Self) -> bool {
        let order = self.distance.total_cmp(&other.distance);
        let order = order.then(other.shared_tensors.cmp(&self.shared_tensors)).then(self.is_adapted.cmp(&other.is_adapted));
        order.is_lt()
    }
}

impl<'a, K> Search<'a, K> {
    /// A search that has seen nothing.
    pub fn new(of: &'a Sketch) -> Self {
        let tensors = of.tensors().iter().copied().collect();
        Self { of, wanted: of.objects().collect(), seen: HashSet::new(), tensors, best: None }
    }

    /// Looks at one sketch. Where two are equally near the first one stays.
    pub fn see(&mut self, key: K, sketch: &Sketch) {
        let common: HashSet<Prefix> = sketch.objects().filter(|prefix| self.wanted.contains(prefix)).collect();
        if let Some(distance) = self.of.distance(sketch).filter(|distance| *distance <= RELATED_MAX) {
            let rank = Rank { distance, shared_tensors: common.intersection(&self.tensors).count(), is_adapted: sketch.is_adapted() };
            if self.best.as_ref().is_none_or(|(best, _)| rank.is_before(best)) {
                self.best = Some((rank, key));
            }
        }
        self.seen.extend(common);
    }

    /// Looks at one sketch that is no relative: only what it has counts.
    pub fn know(&mut self, sketch: &Sketch) {
        self.seen.extend(sketch.objects().filter(|prefix| self.wanted.contains(prefix)));
    }

    /// Counts one object of the chain as there, or the chain itself.
    pub fn know_object(&mut self, digest: Digest) {
        self.seen.insert(digest.into());
    }

    /// The nearest, and the parts of the chain that were seen.
    pub fn finish(self) -> (Option<(Rank, K)>, Known) {
        (self.best, Known(self.seen))
    }
}

/// Parts of a chain that others have.
#[derive(Debug, Clone, Default)]
pub struct Known(HashSet<Prefix>);

impl Known {
    /// Whether the object of this digest is one.
    pub fn has(&self, digest: Digest) -> bool {
        self.0.contains(&digest.into())
    }
}

#[cfg(test)]
mod tests;
