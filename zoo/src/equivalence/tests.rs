//! Records: what `check` refuses, and which step a bound allows.

use super::{Equivalence, EquivalenceError, Figures, METHOD, Step};
use crate::digest::Digest;
use crate::measures::Divergence;

fn figures(kl: f64) -> Figures {
    Figures { rows: 63, kl: Divergence { mean: kl, p99: kl, max: kl }, same_top_share: 1.0 }
}

fn step(block_index: u32, kl: f64) -> Step {
    let [own, other, chain] = ["own", "other", "chain"].map(|name| Digest::of(format!("{name}{block_index}").as_bytes()));
    Step { block_index, own, other, cosine: 0.99, alone: figures(kl), together: figures(kl), chain }
}

fn record(steps: Vec<Step>) -> Equivalence {
    let [chain, other_chain, text] = ["a", "b", "text"].map(|name| Digest::of(name.as_bytes()));
    let (model, other) = ("acme/a".to_owned(), "acme/b".to_owned());
    Equivalence { format: 1, method: METHOD.to_owned(), model, chain, other, other_chain, text, created_ms: 1, steps }
}

#[test]
fn a_bound_allows_the_most_exchanges_that_stay_within_it() {
    // Divergence fell with the third.
    let record = record(vec![step(1, 0.01), step(2, 0.05), step(3, 0.03), step(4, 0.2)]);
    assert_eq!(record.check(), Ok(()));
    let indices: Vec<Option<usize>> = [0.001, 0.01, 0.04, 1.0].map(|bound| record.within(bound).map(|(index, _)| index)).to_vec();
    assert_eq!(indices, [None, Some(0), Some(2), Some(3)]);
}

#[test]
fn what_cannot_be_is_refused() {
    assert_eq!(record(Vec::new()).check(), Err(EquivalenceError::Steps(0)));
    let twice = record(vec![step(1, 0.01), step(1, 0.02)]).check();
    assert_eq!(twice, Err(EquivalenceError::Repeated { step: 1, block_index: 1, how: "a second time" }));
    let itself = Step { other: step(1, 0.0).own, ..step(1, 0.0) };
    assert_eq!(record(vec![itself]).check(), Err(EquivalenceError::Repeated { step: 0, block_index: 1, how: "for itself" }));
    for kl in [-0.1, f64::NAN, f64::INFINITY] {
        let refused = record(vec![step(1, 0.0), step(2, kl)]).check();
        assert!(matches!(&refused, Err(EquivalenceError::Figures { step: 1, .. })), "{refused:?}");
    }
    let apart = Step { cosine: 1.5, ..step(1, 0.0) };
    assert_eq!(record(vec![apart]).check(), Err(EquivalenceError::Cosine { step: 0, cosine: 1.5 }));
    let other = Equivalence { other: "nobody".to_owned(), ..record(vec![step(1, 0.0)]) };
    assert_eq!(other.check(), Err(EquivalenceError::Model("nobody".to_owned())));
    let later = Equivalence { format: 2, ..record(vec![step(1, 0.0)]) };
    assert_eq!(later.check(), Err(EquivalenceError::Format(2)));
}
