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

#[cfg(test)]
mod tests {
    use ashlar_kernels::format::Dtype;
    use ashlar_kernels::ops::Activation;
    use ashlar_kernels::reference::Reference;
    use ashlar_zoo::digest::Digest;
    use ashlar_zoo::manifest::{Adapter, Block, BlockKind, Change, Norm, TensorRef};

    use super::*;
    use crate::model::source::{SourceError, TensorBytes, TensorSource};
    use crate::state::batch::{RowInput, RowOutput, SequenceId};

    struct Zeros;

    impl TensorSource for Zeros {
        fn tensor(&self, tensor: &TensorRef) -> Result<TensorBytes, SourceError> {
            let (rows, cols) = (tensor.shape[0] as usize, tensor.shape[1] as usize);
            Ok(TensorBytes { dtype: Dtype::F32, rows, cols, keep: std::sync::Arc::new(vec![0u8; 4 * rows * cols]) })
        }
    }

    fn adapter() -> Box<LoadedAdapter<Reference>> {
        let tensor = |shape: &[u64]| TensorRef { digest: Digest([0; 32]), dtype: Dtype::F32, shape: shape.to_vec() };
        let norm = Norm::Rms { eps: 1e-6, weight_offset: 0.0 };
        let params = BlockKind::FeedForward { norm, activation: Activation::Relu, inner: 4, gated: false, post_norm: None };
        let tensors = [("norm.weight", tensor(&[8])), ("up.weight", tensor(&[4, 8])), ("down.weight", tensor(&[8, 4]))];
        let block = Block { width: 8, params, tensors: tensors.map(|(role, tensor)| (role.to_owned(), tensor)).into() };
        let change = Change::LowRank { scale: 1.0, a: tensor(&[2, 8]), b: tensor(&[4, 2]) };
        let adapter = Adapter { changes: [("up.weight".to_owned(), change)].into() };
        Box::new(LoadedAdapter::load(&Reference::default(), &block, &adapter, &Zeros).unwrap())
    }

    /// Rows of spans, from some block of each on, through three blocks: what each block's rows have.
    fn check(batch: &[(u32, u32, u32)], picture: &str) {
        let mut adapters = Adapters::default();
        (0..4).for_each(|index| adapters.load(AdapterIndex(index), adapter()));
        // Span 0 has none; 1 and 2 share one; 3 begins a block later in its chain, and has the same as 1.
        for (span, of_span) in [(1, vec![(1, 0), (2, 1), (4, 2)]), (2, vec![(2, 1), (3, 3)]), (3, vec![(0, 0), (1, 1), (3, 2)])] {
            adapters.adapt(SpanIndex(span), of_span.into_iter().map(|(block, index)| (block, AdapterIndex(index))).collect());
        }
        let rows: Vec<Rows> = (batch.iter().enumerate())
            .map(|(number, (span, block_from, count))| Rows {
                sequence: SequenceId::new(number as u64, number),
                start: 0,
                count: *count,
                span: SpanIndex(*span),
                block_from: *block_from,
                attention_from: 0,
                input: RowInput::Link,
                output: RowOutput::Link,
            })
            .collect();
        let place = |adapter: &LoadedAdapter<Reference>| {
            adapters.loaded.iter().position(|loaded| loaded.as_deref().is_some_and(|loaded| std::ptr::eq(loaded, adapter))).unwrap()
        };
        let runs = adapters.runs(&rows.iter().collect::<Vec<_>>(), 3);
        let drawn: Vec<String> = runs.iter().map(|run| format!("{}:{:?}={}", run.block, run.rows, place(run.adapter))).collect();
        assert_eq!(drawn.join(" "), picture);
    }

    #[test]
    fn rows_of_one_adapter_that_lie_next_to_each_other_are_one_run() {
        check(&[(0, 0, 5)], "");
        check(&[(1, 0, 1), (0, 0, 1), (1, 0, 2)], "1:0..1=0 1:2..4=0 2:0..1=1 2:2..4=1");
        check(&[(1, 0, 1), (1, 0, 2), (2, 0, 1)], "1:0..3=0 2:0..4=1");
        check(&[(2, 2, 1), (1, 2, 1), (0, 2, 1), (1, 2, 1)], "0:0..2=1 0:3..4=1 1:0..1=3 2:1..2=2 2:3..4=2");
        check(&[(3, 0, 2), (1, 1, 3)], "0:0..5=0 1:0..5=1");
        check(&[(3, 1, 2), (1, 2, 3)], "0:0..5=1 2:0..5=2");
        // One block's last run ends where the next block's first begins.
        check(&[(2, 1, 1)], "1:0..1=1 2:0..1=3");
    }
}
