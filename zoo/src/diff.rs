//! How two models differ: their chains laid beside each other, block by block.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::digest::Digest;
use crate::inspect::{Resolved, distinct_tensors, kind};
use crate::manifest::{Adapter, Block, Change};

/// What it costs to lay one different block of the same kind beside the other; another kind is never laid so.
const OTHER_BLOCK: u32 = 2;
/// To leave a block without a partner. Two of these are dearer than [`OTHER_BLOCK`], so that layers which were trained stay beside each other.
const NO_PARTNER: u32 = 2;
/// Pairs of blocks that are weighed at most; longer chains of which more differs are laid beside each other from the start.
const PAIRS_MAX: usize = 1 << 20;

/// `zoo diff`.
#[derive(Debug, Clone, Serialize)]
pub struct Diff {
    /// The two names.
    pub models: [String; 2],
    /// Blocks from the start with equal lineage: where KV could be shared.
    pub common_prefix: usize,
    /// Blocks of each.
    pub block_counts: [usize; 2],
    /// Distinct blocks in both.
    pub shared_blocks: usize,
    /// Bytes of distinct tensors in both.
    pub shared_bytes: u64,
    /// Bytes of distinct tensors of each.
    pub bytes: [u64; 2],
    /// Whether tokenizer, template and special tokens are the same.
    pub same_text: bool,
    /// Places where the blocks differ.
    pub differences: Vec<Difference>,
}

/// Blocks that differ at one place, or a block that only one of the models has there.
#[derive(Debug, Clone, Serialize)]
pub struct Difference {
    /// Place in the chain, of each.
    pub places: [Option<usize>; 2],
    /// Kind, of each.
    pub kinds: [Option<&'static str>; 2],
    /// Whether hyper-parameters differ.
    pub params: bool,
    /// Roles whose tensors differ, or that only one has.
    pub roles: Vec<String>,
    /// Roles that their adapters change in different ways.
    pub adapted_roles: Vec<String>,
}

/// What is compared of a place: a block and what is over it.
type Place<'a> = (&'a Digest, Option<&'a Adapter>);

/// Lays two models beside each other.
pub(crate) fn diff(a: &Resolved, b: &Resolved) -> Diff {
    let (tensors_a, tensors_b) = (distinct_tensors(a), distinct_tensors(b));
    let (blocks_a, blocks_b): (BTreeSet<&Digest>, BTreeSet<&Digest>) = (a.chain.blocks.iter().collect(), b.chain.blocks.iter().collect());
    let (places_a, places_b) = (places(a), places(b));
    let common_prefix = common(places_a.iter(), places_b.iter());
    let aligned = align(a, b, [&places_a, &places_b], common_prefix);
    let differs = |places: &[Option<usize>; 2]| places[0].map(|place| places_a[place]) != places[1].map(|place| places_b[place]);
    Diff {
        models: [a.id.to_string(), b.id.to_string()],
        common_prefix,
        block_counts: [a.blocks.len(), b.blocks.len()],
        shared_blocks: blocks_a.intersection(&blocks_b).count(),
        shared_bytes: tensors_a.iter().filter(|(digest, _)| tensors_b.contains_key(digest)).map(|(_, bytes)| bytes).sum(),
        bytes: [tensors_a.values().sum(), tensors_b.values().sum()],
        same_text: (&a.chain.assets.tokenizer, &a.chain.assets.chat_template, &a.chain.tokens)
            == (&b.chain.assets.tokenizer, &b.chain.assets.chat_template, &b.chain.tokens),
        differences: aligned.into_iter().filter(differs).map(|places| difference(a, b, places)).collect(),
    }
}

fn places(model: &Resolved) -> Vec<Place<'_>> {
    model.chain.blocks.iter().enumerate().map(|(index, digest)| (digest, model.adapters.get(&index))).collect()
}

fn common<'a>(a: impl Iterator<Item = &'a Place<'a>>, b: impl Iterator<Item = &'a Place<'a>>) -> usize {
    std::iter::zip(a, b).take_while(|(a, b)| a == b).count()
}

/// Which places stand beside each other, in order: as few blocks without a partner, and as many equal ones beside each other, as can be had
/// (an edit distance, Needleman and Wunsch 1970). What is equal at both ends needs no weighing.
fn align(a: &Resolved, b: &Resolved, places: [&[Place<'_>]; 2], prefix: usize) -> Vec<[Option<usize>; 2]> {
    let suffix = common(places[0][prefix..].iter().rev(), places[1][prefix..].iter().rev());
    let [rows, columns] = places.map(|places| places.len() - prefix - suffix);
    if rows.saturating_mul(columns) > PAIRS_MAX {
        let at = |index: usize, count: usize| (index < count).then_some(index);
        return (0..places[0].len().max(places[1].len())).map(|index| [at(index, places[0].len()), at(index, places[1].len())]).collect();
    }
    let pair = |row: usize, column: usize| {
        let (row, column) = (prefix + row, prefix + column);
        let same_kind = kind(&a.blocks[row].params) == kind(&b.blocks[column].params);
        if places[0][row] == places[1][column] { Some(0) } else { same_kind.then_some(OTHER_BLOCK) }
    };
    // least[row][column]: of laying the first so many beside each other.
    let mut least = vec![vec![0u32; columns + 1]; rows + 1];
    for row in 0..=rows {
        for column in 0..=columns {
            least[row][column] = [
                (row > 0).then(|| least[row - 1][column] + NO_PARTNER),
                (column > 0).then(|| least[row][column - 1] + NO_PARTNER),
                (row > 0 && column > 0).then(|| pair(row - 1, column - 1).map(|cost| least[row - 1][column - 1] + cost)).flatten(),
            ]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(0);
        }
    }
    let (mut row, mut column, mut middle) = (rows, columns, Vec::new());
    while row > 0 || column > 0 {
        let paired = (row > 0 && column > 0).then(|| pair(row - 1, column - 1)).flatten();
        let is_paired = paired.is_some_and(|cost| least[row][column] == least[row - 1][column - 1] + cost);
        let of_a = is_paired || row > 0 && least[row][column] == least[row - 1][column] + NO_PARTNER;
        let of_b = is_paired || !of_a;
        row -= usize::from(of_a);
        column -= usize::from(of_b);
        middle.push([of_a.then_some(prefix + row), of_b.then_some(prefix + column)]);
    }
    middle.reverse();
    let start = (0..prefix).map(|index| [Some(index), Some(index)]);
    let end = (0..suffix).map(|index| [Some(prefix + rows + index), Some(prefix + columns + index)]);
    start.chain(middle).chain(end).collect()
}

fn difference(a: &Resolved, b: &Resolved, places: [Option<usize>; 2]) -> Difference {
    let pair = [places[0].map(|place| &a.blocks[place]), places[1].map(|place| &b.blocks[place])];
    let roles: BTreeSet<&String> = pair.iter().flatten().flat_map(|block| block.tensors.keys()).collect();
    let tensor = |block: Option<&Block>, role: &str| block.and_then(|block| block.tensors.get(role).cloned());
    let none = BTreeMap::new();
    let changes = |model: &'_ Resolved, place: Option<usize>| -> BTreeMap<String, Change> {
        place.and_then(|place| model.adapters.get(&place)).map_or(&none, |adapter| &adapter.changes).clone()
    };
    let changes = [changes(a, places[0]), changes(b, places[1])];
    let adapted: BTreeSet<&String> = changes.iter().flat_map(BTreeMap::keys).collect();
    Difference {
        places,
        kinds: pair.map(|block| block.map(|block| kind(&block.params))),
        params: pair[0].map(|block| &block.params) != pair[1].map(|block| &block.params),
        roles: roles.into_iter().filter(|role| tensor(pair[0], role) != tensor(pair[1], role)).cloned().collect(),
        adapted_roles: adapted.into_iter().filter(|role| changes[0].get(*role) != changes[1].get(*role)).cloned().collect(),
    }
}
