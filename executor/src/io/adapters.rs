//! The adapters on the device, and which rows of a batch have which: by the span of a row's sequence and the place of the block in that span.
//! Part of the device thread. The engine does not know adapters: chains that differ in them alone share segments and batches.

use std::collections::BTreeMap;
use std::ops::Range;

use ashlar_kernels::ops::Ops;

use crate::model::adapter::LoadedAdapter;
use crate::model::forward::AdapterRun;
use crate::state::batch::Rows;
use crate::state::sequence::SpanIndex;

/// A distinct adapter on this executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterIndex(pub u32);

/// The adapters of a span: for each its block, by place in the span, ascending.
pub type SpanAdapters = Vec<(u32, AdapterIndex)>;

/// Adapters by index, and those of each span that has any.
pub(super) struct Adapters<B: Ops> {
    loaded: Vec<Option<Box<LoadedAdapter<B>>>>,
    spans: BTreeMap<SpanIndex, SpanAdapters>,
}

impl<B: Ops> Default for Adapters<B> {
    fn default() -> Self {
        Self { loaded: Vec::new(), spans: BTreeMap::new() }
    }
}

impl<B: Ops> Adapters<B> {
    pub(super) fn load(&mut self, index: AdapterIndex, adapter: Box<LoadedAdapter<B>>) {
        let place = index.0 as usize;
        if self.loaded.len() <= place {
            self.loaded.resize_with(place + 1, || None);
        }
        self.loaded[place] = Some(adapter);
    }

    pub(super) fn evict(&mut self, index: AdapterIndex) {
        self.loaded[index.0 as usize] = None;
    }

    /// From now on rows of a span have these adapters; with none, it is forgotten.
    pub(super) fn adapt(&mut self, span: SpanIndex, adapters: SpanAdapters) {
        if adapters.is_empty() {
            self.spans.remove(&span);
        } else {
            self.spans.insert(span, adapters);
        }
    }

    /// Rows with the same key are best next to each other: those of one span, where it has adapters.
    pub(super) fn key(&self, rows: &Rows) -> Option<SpanIndex> {
        Some(rows.span).filter(|span| self.spans.contains_key(span))
    }

    /// What adapters change in a batch of rows in this order, through so many blocks.
    pub(super) fn runs(&self, order: &[&Rows], block_count: usize) -> Vec<AdapterRun<'_, B>> {
        // Rows with what their spans have from the batch's first block on.
        let mut adapted: Vec<(Range<usize>, u32, &[(u32, AdapterIndex)])> = Vec::new();
        let mut at = 0;
        for rows in order {
            let end = at + rows.count as usize;
            if let Some(adapters) = self.spans.get(&rows.span) {
                let first = adapters.partition_point(|(block, _)| *block < rows.block_from);
                adapted.push((at..end, rows.block_from, &adapters[first..]));
            }
            at = end;
        }
        let (mut runs, mut latest) = (Vec::new(), None);
        for block in 0..if adapted.is_empty() { 0 } else { block_count } {
            for (rows, block_from, ahead) in &mut adapted {
                let Some(((_, index), others)) =
                    ahead.split_first().filter(|((changed, _), _)| *changed as usize == *block_from as usize + block)
                else {
                    continue;
                };
                *ahead = others;
                match runs.last_mut() {
                    // Rows of one adapter that lie next to each other are one run.
                    Some(AdapterRun { rows: run, block: of, .. }) if latest == Some(*index) && *of == block && run.end == rows.start => {
                        run.end = rows.end
                    }
                    _ => {
                        let adapter =
                            self.loaded[index.0 as usize].as_deref().expect("adapters are evicted after the last span that has them");
                        runs.push(AdapterRun { block, rows: rows.clone(), adapter });
                        latest = Some(*index);
                    }
                }
            }
        }
        runs
    }
}
