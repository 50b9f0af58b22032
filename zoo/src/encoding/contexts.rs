//! Which base exponents share a model. An optimiser's steps have about the same size everywhere, so in units of the last place a change
//! depends on the exponent of what was changed, which the decoder knows: symbols of like exponents are coded by a model of their own. What
//! that saves is weighed against what a model costs.

use super::model::{Counts, MODELS_MAX, Model};

/// Contexts of a plane; other planes of a tensor have one model each, and there are at most three.
pub(super) const CONTEXTS_MAX: usize = MODELS_MAX - 4;

/// The first exponent of each context but the first, ascending.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Contexts {
    pub(super) starts: Vec<u8>,
}

impl Contexts {
    /// The context of each exponent.
    pub(super) fn of_exponents(&self) -> [u8; 256] {
        let mut contexts = [0; 256];
        for start in &self.starts {
            contexts[usize::from(*start)..].iter_mut().for_each(|context| *context += 1);
        }
        contexts
    }
}

/// Exponents from `start` on, and their symbols' counts.
struct Class {
    start: u8,
    counts: Box<Counts>,
    cost: f64,
}

impl Class {
    fn new(start: u8, counts: Box<Counts>) -> Self {
        let cost = cost(&counts);
        Self { start, counts, cost }
    }

    fn merged(&self, next: &Self) -> Self {
        let mut counts = self.counts.clone();
        counts.iter_mut().zip(next.counts.iter()).for_each(|(a, b)| *a += b);
        Self::new(self.start, counts)
    }
}

/// Bits that symbols of these counts take, their model included (about 10 bits a symbol that occurs, two bytes a gap).
pub(super) fn cost(counts: &Counts) -> f64 {
    let total: f64 = counts.iter().map(|count| f64::from(*count)).sum();
    let occurring = counts.iter().filter(|count| **count > 0);
    let bits: f64 = occurring.map(|count| f64::from(*count) * (total / f64::from(*count)).log2() + 10.0).sum();
    bits + 48.0
}

/// Joins neighbours, those first whose union costs least more, until there are few enough and each that is left is worth its model.
/// `counts[e]` is of the symbols over exponent e; one symbol at least there is.
pub(super) fn choose(counts: Vec<Counts>) -> (Contexts, Vec<Model>) {
    let occurring = counts.into_iter().enumerate().filter(|(_, counts)| counts.iter().any(|count| *count > 0));
    let mut classes: Vec<Class> = occurring.map(|(e, counts)| Class::new(e as u8, Box::new(counts))).collect();
    let join = |a: &Class, b: &Class| {
        let union = a.merged(b);
        (union.cost - a.cost - b.cost, union)
    };
    let mut unions: Vec<(f64, Class)> = classes.windows(2).map(|pair| join(&pair[0], &pair[1])).collect();
    while let Some(best) = (0..unions.len()).min_by(|a, b| unions[*a].0.total_cmp(&unions[*b].0)) {
        if classes.len() <= CONTEXTS_MAX && unions[best].0 > 0.0 {
            break;
        }
        classes[best] = unions.remove(best).1;
        classes.remove(best + 1);
        if best > 0 {
            unions[best - 1] = join(&classes[best - 1], &classes[best]);
        }
        if best + 1 < classes.len() {
            unions[best] = join(&classes[best], &classes[best + 1]);
        }
    }
    let contexts = Contexts { starts: classes.iter().skip(1).map(|class| class.start).collect() };
    (contexts, classes.iter().map(|class| Model::of(&class.counts)).collect())
}
