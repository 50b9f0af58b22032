//! Kin: models that share a tensor, directly or through others, and their rows of the map. Rows are ordered so that equal blocks lie one under
//! the other; models whose rows are equal are one row, which keeps the map of many names over few chains short.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::digest::Digest;
use crate::inspect::{Resolved, distinct_tensors};

/// Models that share something with each other.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kin {
    /// Models of all rows.
    pub model_count: usize,
    /// Rows of the map.
    pub rows: Vec<Row>,
}

/// A row of the map: the chain of one model, or of several whose chains are of the same blocks and adapters.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Indices of the models, in order.
    pub models: Vec<usize>,
    /// Index of the block at each place.
    pub blocks: Vec<usize>,
    /// How common that block is at its place among these kin: 0 is the one that most models have there, and so on.
    pub ranks: Vec<usize>,
    /// Index of the adapter over a block, by place.
    pub adapters: BTreeMap<usize, usize>,
}

/// Cuts models into kin and orders them: kin of most models first, rows by how common their blocks are from the start on.
pub(super) fn kin(models: &[Resolved], block_index: &BTreeMap<Digest, usize>, adapter_index: &BTreeMap<Digest, usize>) -> Vec<Kin> {
    let mut sets = Sets((0..models.len()).collect());
    let mut first_owner: BTreeMap<Digest, usize> = BTreeMap::new();
    for (index, model) in models.iter().enumerate() {
        for digest in distinct_tensors(model).into_keys() {
            let first = *first_owner.entry(digest).or_insert(index);
            sets.join(first, index);
        }
    }
    let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    (0..models.len()).for_each(|index| members.entry(sets.root(index)).or_default().push(index));
    let rows_of = |members: Vec<usize>| Kin { model_count: members.len(), rows: rows(&members, models, block_index, adapter_index) };
    let mut kin: Vec<Kin> = members.into_values().map(rows_of).collect();
    kin.sort_by_key(|kin| std::cmp::Reverse(kin.model_count)); // stable: then by the first name
    kin
}

fn rows(
    members: &[usize],
    models: &[Resolved],
    block_index: &BTreeMap<Digest, usize>,
    adapter_index: &BTreeMap<Digest, usize>,
) -> Vec<Row> {
    let mut merged: BTreeMap<(Vec<usize>, BTreeMap<usize, usize>), Vec<usize>> = BTreeMap::new();
    for member in members {
        let chain = &models[*member].chain;
        let blocks = chain.blocks.iter().map(|digest| block_index[digest]).collect();
        let adapters = chain.adapters.iter().map(|adapter| (adapter.block_index as usize, adapter_index[&adapter.digest])).collect();
        merged.entry((blocks, adapters)).or_default().push(*member);
    }
    // How many models have a block at a place.
    let mut counts: Vec<BTreeMap<usize, usize>> = Vec::new();
    for ((blocks, _), models) in &merged {
        counts.resize_with(counts.len().max(blocks.len()), BTreeMap::new);
        for (place, block) in blocks.iter().enumerate() {
            *counts[place].entry(*block).or_default() += models.len();
        }
    }
    let ranks: Vec<BTreeMap<usize, usize>> = counts.iter().map(rank).collect();
    let row = |((blocks, adapters), models): ((Vec<usize>, BTreeMap<usize, usize>), Vec<usize>)| Row {
        models,
        ranks: blocks.iter().enumerate().map(|(place, block)| ranks[place][block]).collect(),
        blocks,
        adapters,
    };
    let mut rows: Vec<Row> = merged.into_iter().map(row).collect();
    rows.sort_by(|a, b| (&a.ranks, a.adapters.len(), &a.models).cmp(&(&b.ranks, b.adapters.len(), &b.models)));
    rows
}

/// Blocks of a place by how many models have them, most first.
fn rank(counts: &BTreeMap<usize, usize>) -> BTreeMap<usize, usize> {
    let mut blocks: Vec<(usize, usize)> = counts.iter().map(|(block, count)| (*block, *count)).collect();
    blocks.sort_by_key(|(block, count)| (std::cmp::Reverse(*count), *block));
    blocks.into_iter().enumerate().map(|(rank, (block, _))| (block, rank)).collect()
}

/// Disjoint sets of indices; the least of a set is its root, so that sets come in the order of their first member.
struct Sets(Vec<usize>);

impl Sets {
    fn root(&mut self, mut index: usize) -> usize {
        while self.0[index] != index {
            self.0[index] = self.0[self.0[index]];
            index = self.0[index];
        }
        index
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        self.0[a.max(b)] = a.min(b);
    }
}
