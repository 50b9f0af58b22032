//! Where a chain is cut: into spans of about equal time or bytes where the policy asks for several, else as far as each executor reaches.

use ashlar_wire::id::ExecutorId;

use super::SizedChain;
use super::ledger::Ledger;

/// A chain's spans in order: `[from, to)` each, without gaps.
pub(super) type Pattern = Vec<(u32, u32)>;

/// The most spans the chain can have.
pub(super) fn spans_max(chain: &SizedChain) -> u32 {
    u32::try_from(chain.borders.len()).expect("chains are short") + 1
}

/// `count` spans that are as equal as the borders allow, by the weight of each block: its time or its bytes.
pub(super) fn evenly(chain: &SizedChain, count: u32, weights: &[u128]) -> Pattern {
    assert_eq!(weights.len(), chain.blocks.len(), "a weight for each block");
    assert!(count >= 1 && count <= spans_max(chain), "the caller bounds the count");
    let sum = |from: u32, to: u32| weights[from as usize..to as usize].iter().sum::<u128>();
    let whole = sum(0, chain.len());
    let mut cuts = vec![0];
    for index in 1..count {
        let wanted = whole * u128::from(index) / u128::from(count);
        let last = *cuts.last().expect("begins with one");
        let after = chain.borders.iter().filter(|border| **border > last);
        // Enough borders must be left for the cuts that follow.
        let candidates: Vec<u32> = after.copied().collect();
        let usable = candidates.len() - (count - 1 - index) as usize;
        let best = candidates[..usable].iter().min_by_key(|border| sum(0, **border).abs_diff(wanted));
        cuts.push(*best.expect("count is at most the number of borders plus one"));
    }
    cuts.push(chain.len());
    cuts.windows(2).map(|pair| (pair[0], pair[1])).collect()
}

/// Contiguous spans on different executors of one class, each reaching as far as any executor left can; `None` when the last
/// block is not reached.
pub(super) fn greedily(chain: &SizedChain, ledger: &Ledger, numeric_class: &str) -> Option<Vec<(ExecutorId, (u32, u32))>> {
    let mut left: Vec<_> = ledger.shelves.iter().filter(|(_, shelf)| shelf.numeric_class == numeric_class).collect();
    let mut spans = Vec::new();
    let mut from = 0;
    while from < chain.len() {
        let ends = || chain.borders.iter().copied().chain([chain.len()]).filter(|end| *end > from).rev();
        let reach = |shelf: &super::ledger::Shelf| ends().find(|end| shelf.fits(chain.span(from, *end)));
        let reached = left.iter().enumerate().filter_map(|(index, (id, shelf))| Some((reach(shelf)?, index, *id)));
        // The farthest; among equals the one with the fewest bytes to spare, so that large gaps stay for others.
        let (to, index, id) = reached.min_by_key(|(to, index, id)| (std::cmp::Reverse(*to), left[*index].1.free_bytes(), *id))?;
        spans.push((id.clone(), (from, to)));
        left.remove(index);
        from = to;
    }
    Some(spans)
}
