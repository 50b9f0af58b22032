//! Which blocks of a chain are cut, and how much of each stays: a pure function of what was asked for and the chain's hyper-parameters.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use super::Units;
use crate::manifest::{Block, BlockKind};

/// How much is kept: from 0.0001 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share(f64);

/// No share.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no share to keep: a number from 0.0001 to 1, as in 0.5")]
pub struct UnknownShare(String);

impl FromStr for Share {
    type Err = UnknownShare;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let share: Option<f64> = text.parse().ok();
        share.filter(|share| (1e-4..=1.0).contains(share)).map(Self).ok_or_else(|| UnknownShare(text.chars().take(40).collect()))
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Blocks of a chain, by their index, the end not included: `2..5`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    from: usize,
    to: usize,
}

/// No range of blocks.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no range of blocks: FROM..TO, without TO, as in 2..5 for blocks 2, 3 and 4 of `zoo show`")]
pub struct UnknownRange(String);

impl FromStr for BlockRange {
    type Err = UnknownRange;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let range = text.split_once("..").and_then(|(from, to)| Some(Self { from: from.parse().ok()?, to: to.parse().ok()? }));
        range.filter(|range| range.from < range.to).ok_or_else(|| UnknownRange(text.chars().take(40).collect()))
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.from, self.to)
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Of the inner columns of feed-forward blocks.
    pub feed_forward: Option<Share>,
    /// Of the key-value heads of attention blocks, each with its query heads.
    pub heads: Option<Share>,
    /// Which blocks; all without it.
    pub blocks: Option<BlockRange>,
}

/// A plan that changes nothing, or not in this chain.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PlanError {
    /// Blocks that are not there.
    #[error("blocks {from}..{to} are asked for, and the model has {count}, from 0 on")]
    Range {
        /// The first.
        from: usize,
        /// The one after the last.
        to: usize,
        /// Blocks of the chain.
        count: usize,
    },
    /// No block becomes smaller.
    #[error(
        "{0} cuts no block of this model: a feed-forward block keeps a multiple of 32 columns, an attention block whole key-value heads"
    )]
    Nothing(Plan),
}

impl Plan {
    /// Units that stay of each block that is cut, by the block's index.
    ///
    /// # Errors
    /// When it asks for blocks that are not there, or changes none.
    pub fn counts(&self, blocks: &[Block]) -> Result<BTreeMap<usize, usize>, PlanError> {
        let range = match self.blocks {
            Some(BlockRange { from, to }) if to > blocks.len() => return Err(PlanError::Range { from, to, count: blocks.len() }),
            Some(BlockRange { from, to }) => from..to,
            None => 0..blocks.len(),
        };
        let counts: BTreeMap<usize, usize> = self.within(blocks, range).collect();
        if counts.is_empty() { Err(PlanError::Nothing(*self)) } else { Ok(counts) }
    }

    fn within(&self, blocks: &[Block], range: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
        range.filter_map(|index| {
            let params = &blocks[index].params;
            let (share, multiple) = match params {
                BlockKind::FeedForward { .. } => (self.feed_forward?, INNER_MULTIPLE),
                BlockKind::Attention { .. } => (self.heads?, 1),
                BlockKind::Embed { .. } | BlockKind::Head { .. } | BlockKind::Stitch { .. } => return None,
            };
            let count = Units::of(params)?.count;
            let kept = (count as f64 * share.0 / multiple as f64).round().max(1.0) as usize * multiple;
            (share.0 < 1.0 && kept < count).then_some((index, kept))
        })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            self.feed_forward.map(|share| format!("ffn={share}")),
            self.heads.map(|share| format!("heads={share}")),
            self.blocks.map(|blocks| format!("blocks={blocks}")),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        f.write_str(&parts.join(","))
    }
}

/// Columns of a feed-forward block stay whole groups of 32: the usual group of quantised weights, and a multiple of what kernels read at a time.
const INNER_MULTIPLE: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Norm;
    use ashlar_kernels::ops::Activation;

    const RMS: Norm = Norm::Rms { eps: 1e-6, weight_offset: 0.0 };

    fn chain(inner: u32, kv_heads: u32) -> Vec<Block> {
        let attention = BlockKind::Attention {
            norm: RMS,
            heads: 3 * kv_heads,
            kv_heads,
            head_dim: 8,
            scale: 1.0,
            rope: None,
            window: None,
            softcap: None,
            qk_norm: None,
            post_norm: None,
        };
        let feed = BlockKind::FeedForward { norm: RMS, activation: Activation::Silu, inner, gated: true, post_norm: None };
        let head = BlockKind::Head { norm: RMS, softcap: None, scale: 1.0 };
        let kinds = [BlockKind::Embed { scale: 1.0 }, attention.clone(), feed.clone(), attention, feed, head];
        kinds.into_iter().map(|params| Block { width: 16, params, tensors: BTreeMap::new() }).collect()
    }

    fn plan(feed_forward: &str, heads: &str, blocks: &str) -> Plan {
        let share = |text: &str| (!text.is_empty()).then(|| text.parse().unwrap());
        Plan { feed_forward: share(feed_forward), heads: share(heads), blocks: (!blocks.is_empty()).then(|| blocks.parse().unwrap()) }
    }

    #[test]
    fn what_stays_is_the_nearest_multiple_and_never_nothing() {
        let counts = |plan: Plan, chain: &[Block]| plan.counts(chain).map(|counts| counts.into_iter().collect::<Vec<_>>());
        assert_eq!(counts(plan("0.5", "0.5", ""), &chain(192, 4)), Ok(vec![(1, 2), (2, 96), (3, 2), (4, 96)]));
        assert_eq!(counts(plan("0.4", "", ""), &chain(192, 4)), Ok(vec![(2, 64), (4, 64)]));
        assert_eq!(counts(plan("0.001", "0.001", "3..5"), &chain(192, 3)), Ok(vec![(3, 1), (4, 32)]));
        assert_eq!(counts(plan("0.9", "0.5", "1..2"), &chain(72, 3)), Ok(vec![(1, 2)]));
        assert_eq!(counts(plan("0.95", "", ""), &chain(72, 3)), Ok(vec![(2, 64), (4, 64)]));
        for (plan, chain) in [
            (plan("1", "1", ""), chain(72, 3)),
            (plan("0.5", "", ""), chain(32, 3)),
            (plan("", "0.5", ""), chain(192, 1)),
            (plan("0.5", "", "1..2"), chain(192, 4)),
            (plan("0.5", "0.5", "5..6"), chain(192, 4)),
        ] {
            assert_eq!(counts(plan, &chain), Err(PlanError::Nothing(plan)));
        }
        assert_eq!(counts(plan("0.5", "", "4..7"), &chain(192, 4)), Err(PlanError::Range { from: 4, to: 7, count: 6 }));
    }

    #[test]
    fn a_plan_reads_as_it_is_written_and_no_share_or_range_is_refused() {
        assert_eq!(plan("0.5", "0.75", "2..5").to_string(), "ffn=0.5,heads=0.75,blocks=2..5");
        assert_eq!(plan("", "1", "").to_string(), "heads=1");
        for text in ["0", "1.1", "-0.5", "nan", "inf", "half", "", "1e-9"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
        for text in ["", "2", "2..", "..5", "5..2", "2..2", "2..=5", "-1..2", "a..b", "1..99999999999999999999"] {
            assert!(text.parse::<BlockRange>().is_err(), "{text}");
        }
    }
}
