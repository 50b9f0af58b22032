//! How blocks follow each other in a chain: embed, attention and feed-forward by turns, head; a stitch in front of an attention block but the first;
//! and each takes rows as wide as the one before it gives. Whoever reads the blocks of a chain checks it here, so that a chain that was put
//! together wrongly is refused by the block that does not fit. It does no IO.

use crate::inspect::kind;
use crate::manifest::{Block, BlockKind};
use crate::roles::ManifestError;

/// A block as its neighbours see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Joint {
    /// Its kind, as it is written.
    pub kind: &'static str,
    /// Width of the rows that it takes; an embedding takes tokens.
    pub width: u32,
    /// Width of the rows that it gives.
    pub output_width: u32,
    is: Is,
}

/// What may stand where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    Embed,
    Attention,
    FeedForward,
    Stitch,
    Head,
}

impl Joint {
    /// Of a block.
    pub fn of(block: &Block) -> Self {
        let is = match block.params {
            BlockKind::Embed { .. } => Is::Embed,
            BlockKind::Attention { .. } => Is::Attention,
            BlockKind::FeedForward { .. } => Is::FeedForward,
            BlockKind::Stitch { .. } => Is::Stitch,
            BlockKind::Head { .. } => Is::Head,
        };
        Self { kind: kind(&block.params), width: block.width, output_width: block.output_width(), is }
    }

    /// Whether a chain may be cut in front of it where layers end: an attention block, or the stitch in front of one.
    pub fn begins_layer(&self) -> bool {
        matches!(self.is, Is::Attention | Is::Stitch)
    }

    fn may_follow(self, before: Self) -> bool {
        matches!(
            (before.is, self.is),
            (Is::Embed | Is::FeedForward | Is::Stitch, Is::Attention)
                | (Is::Attention, Is::FeedForward)
                | (Is::FeedForward, Is::Stitch | Is::Head)
        )
    }
}

/// Checks consecutive blocks, the first of which has the place `from` in a chain of `count` blocks.
///
/// # Errors
/// The first block that cannot be where it is, or takes rows of another width than it is given.
pub fn check(from: usize, count: usize, joints: impl IntoIterator<Item = Joint>) -> Result<(), ManifestError> {
    let mut before: Option<Joint> = None;
    for (index, joint) in (from..).zip(joints) {
        let order = |place: String| Err(ManifestError::Order { index, kind: joint.kind, place });
        if (joint.is == Is::Embed) != (index == 0) {
            return order(if index == 0 { "begin a chain".to_owned() } else { "stand but at the beginning".to_owned() });
        }
        if let Some(before) = before {
            if !joint.may_follow(before) {
                return order(format!("follow one of kind {}", before.kind));
            }
            if joint.width != before.output_width {
                return Err(ManifestError::Width { index, kind: joint.kind, width: joint.width, given: before.output_width });
            }
        }
        if (joint.is == Is::Head) != (index + 1 == count) {
            return order(if joint.is == Is::Head { "stand but at the end".to_owned() } else { "end a chain".to_owned() });
        }
        before = Some(joint);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A letter a block, `E A F S H`, each with its width; `to` is that which a stitch gives.
    fn checked(chain: &[(char, u32)], from: usize, count: usize, to: u32) -> Result<(), String> {
        let joint = |(letter, width): &(char, u32)| {
            let (kind, is) = match letter {
                'E' => ("embed", Is::Embed),
                'A' => ("attention", Is::Attention),
                'F' => ("feed_forward", Is::FeedForward),
                'S' => ("stitch", Is::Stitch),
                _ => ("head", Is::Head),
            };
            Joint { kind, width: *width, output_width: if is == Is::Stitch { to } else { *width }, is }
        };
        check(from, count, chain.iter().map(joint)).map_err(|e| e.to_string())
    }

    #[test]
    fn chains_with_and_without_a_stitch_fit_and_so_do_their_parts() {
        let plain = [('E', 8), ('A', 8), ('F', 8), ('A', 8), ('F', 8), ('H', 8)];
        let stitched = [('E', 8), ('A', 8), ('F', 8), ('S', 8), ('A', 12), ('F', 12), ('H', 12)];
        for (chain, to) in [(plain.as_slice(), 0), (stitched.as_slice(), 12)] {
            for from in 0..chain.len() {
                for end in from + 1..=chain.len() {
                    assert_eq!(checked(&chain[from..end], from, chain.len(), to), Ok(()), "{from}..{end}");
                }
            }
        }
    }

    #[test]
    fn the_block_that_does_not_fit_is_named() {
        let refused = |chain: &[(char, u32)], sentence: &str| {
            assert_eq!(checked(chain, 0, chain.len(), 12), Err(sentence.to_owned()), "{chain:?}");
        };
        let (e, a, f, s, h) = (('E', 8), ('A', 8), ('F', 8), ('S', 8), ('H', 8));
        refused(&[a, f, h], "block 0 is of kind attention, which cannot begin a chain");
        refused(&[e, a, f, e, h], "block 3 is of kind embed, which cannot stand but at the beginning");
        refused(&[e, a, f, h, h], "block 3 is of kind head, which cannot stand but at the end");
        refused(&[e, a, f, a], "block 3 is of kind attention, which cannot end a chain");
        refused(&[e, a, a, f, h], "block 2 is of kind attention, which cannot follow one of kind attention");
        refused(&[e, s, ('A', 12), ('F', 12), ('H', 12)], "block 1 is of kind stitch, which cannot follow one of kind embed");
        refused(&[e, a, f, s, ('H', 12)], "block 4 is of kind head, which cannot follow one of kind stitch");
        refused(&[e, a, s, ('F', 12), ('H', 12)], "block 2 is of kind stitch, which cannot follow one of kind attention");
        refused(&[e, a, f, s, ('A', 8), ('F', 8), h], "block 4 (attention) takes rows of width 8, and block 3 gives rows of width 12");
        refused(&[e, a, ('F', 9), h], "block 2 (feed_forward) takes rows of width 9, and block 1 gives rows of width 8");
    }
}
