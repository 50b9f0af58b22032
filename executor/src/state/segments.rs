//! Cutting hosted spans into segments: maximal runs of blocks that always go together. A run ends where chains part or
//! meet and where a span ends. Segments are private to one executor; no key or message names them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A distinct block on this executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u32);

/// A segment under the present cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentIndex(pub u32);

/// A run of blocks that is always computed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its blocks, in order.
    pub blocks: Arc<[BlockIndex]>,
    /// Spans that run through it.
    pub span_count: usize,
}

/// A cut of several spans.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cut {
    /// All segments.
    pub segments: Vec<Segment>,
    /// For each span, in the order given: its segments with the offset of each one's first block in the span.
    pub paths: Vec<Vec<(SegmentIndex, u32)>>,
}

/// Cuts `spans` (each a sequence of blocks) into segments. Between the two blocks of a pair in `keep` it cuts in any case.
pub fn cut(spans: &[&[BlockIndex]], keep: &BTreeSet<(BlockIndex, BlockIndex)>) -> Cut {
    let mut before: BTreeMap<BlockIndex, BTreeSet<Option<BlockIndex>>> = BTreeMap::new();
    let mut after: BTreeMap<BlockIndex, BTreeSet<Option<BlockIndex>>> = BTreeMap::new();
    for span in spans {
        for (i, block) in span.iter().enumerate() {
            before.entry(*block).or_default().insert(i.checked_sub(1).map(|j| span[j]));
            after.entry(*block).or_default().insert(span.get(i + 1).copied());
        }
    }
    let mut cut = Cut::default();
    let mut known: BTreeMap<Vec<BlockIndex>, SegmentIndex> = BTreeMap::new();
    for span in spans {
        let starts: Vec<usize> = (0..span.len())
            .filter(|&i| i == 0 || before[&span[i]].len() > 1 || after[&span[i - 1]].len() > 1 || keep.contains(&(span[i - 1], span[i])))
            .collect();
        let mut path = Vec::with_capacity(starts.len());
        for (n, &start) in starts.iter().enumerate() {
            let end = starts.get(n + 1).copied().unwrap_or(span.len());
            let blocks = span[start..end].to_vec();
            let index = *known.entry(blocks.clone()).or_insert_with(|| {
                cut.segments.push(Segment { blocks: blocks.into(), span_count: 0 });
                SegmentIndex(cut.segments.len() as u32 - 1)
            });
            path.push((index, start as u32));
        }
        let distinct: BTreeSet<SegmentIndex> = path.iter().map(|(segment, _)| *segment).collect();
        for segment in distinct {
            cut.segments[segment.0 as usize].span_count += 1;
        }
        cut.paths.push(path);
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn blocks(text: &str) -> Vec<BlockIndex> {
        text.bytes().map(|byte| BlockIndex(byte.into())).collect()
    }

    /// Spans as words, one letter a block; the picture joins a span's segments by dots.
    fn check(spans: &[&str], picture: &[&str]) {
        let spans: Vec<Vec<BlockIndex>> = spans.iter().map(|span| blocks(span)).collect();
        let borrowed: Vec<&[BlockIndex]> = spans.iter().map(Vec::as_slice).collect();
        let cut = cut(&borrowed, &BTreeSet::new());
        let drawn: Vec<String> = cut
            .paths
            .iter()
            .map(|path| {
                let names: Vec<String> =
                    path.iter().map(|(s, _)| cut.segments[s.0 as usize].blocks.iter().map(|b| b.0 as u8 as char).collect()).collect();
                names.join(".")
            })
            .collect();
        assert_eq!(drawn, picture);
    }

    #[test]
    fn an_unshared_chain_is_one_segment() {
        check(&["abcdef"], &["abcdef"]);
    }

    #[test]
    fn chains_are_cut_where_they_part_and_where_they_meet() {
        check(&["abcdef", "abcXef"], &["abc.d.ef", "abc.X.ef"]);
        check(&["abcd", "abXY"], &["ab.cd", "ab.XY"]);
    }

    #[test]
    fn a_span_that_ends_inside_another_cuts_it() {
        check(&["abcd", "ab"], &["ab.cd", "ab"]);
        check(&["abcd", "cd"], &["ab.cd", "cd"]);
    }

    #[test]
    fn a_block_repeated_in_one_chain_stands_alone() {
        check(&["xaab"], &["x.a.a.b"]);
    }

    proptest! {
        #[test]
        fn paths_spell_their_spans(spans in proptest::collection::vec(proptest::collection::vec(0u32..8, 1..10), 1..6)) {
            let spans: Vec<Vec<BlockIndex>> = spans.into_iter().map(|s| s.into_iter().map(BlockIndex).collect()).collect();
            let borrowed: Vec<&[BlockIndex]> = spans.iter().map(Vec::as_slice).collect();
            let cut = cut(&borrowed, &BTreeSet::new());
            for (span, path) in spans.iter().zip(&cut.paths) {
                let spelled: Vec<BlockIndex> = path.iter().flat_map(|(s, _)| cut.segments[s.0 as usize].blocks.to_vec()).collect();
                prop_assert_eq!(&spelled, span);
                for (segment, start) in path {
                    prop_assert_eq!(span[*start as usize], cut.segments[segment.0 as usize].blocks[0]);
                }
            }
        }
    }
}
