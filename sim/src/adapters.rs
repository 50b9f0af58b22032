//! Modelled adapters (LoRA): what changes a block's rows for one model and leaves the block to all. Only identity matters, as with blocks.

use ashlar_zoo::digest::Digest;

use crate::dice::{Dice, mix};
use crate::models::Block;

/// An adapter on a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Adapter {
    pub(crate) digest: Digest,
    /// What it mixes into each row, with the block's own.
    salt: u64,
    pub(crate) bytes: u64,
}

impl Adapter {
    fn of(name: &str) -> Self {
        let digest = Digest::of(name.as_bytes());
        Self { digest, salt: u64::from_le_bytes(digest.0[..8].try_into().expect("eight bytes")), bytes: 1 }
    }

    /// Identity of adapter and block together, as executors hold it.
    pub(crate) fn on(&self, block: &Block) -> Digest {
        Digest::of(&[self.digest.0, block.digest.0].concat())
    }

    /// A block as it is for a model that has this adapter on it.
    pub(crate) fn change(&self, block: &Block) -> Block {
        Block { salt: mix(&[block.salt, self.salt]), ..*block }
    }
}

/// Adapters for the blocks of a chain between embedding and head: on all of them, on those from some layer on, on attention blocks alone, or on one
/// block. Lower ones are drawn from few, so that models have some in common and part later.
pub(crate) fn draw(dice: &mut Dice, block_count: usize) -> Vec<Option<Adapter>> {
    let last = block_count as u64 - 2;
    let (from, to) = match dice.within(0..=4) {
        0..=2 => (1, last),
        3 => (dice.within(1..=last), last),
        _ => {
            let one = dice.within(1..=last);
            (one, one)
        }
    };
    let is_on_attention_alone = from < to && dice.chance(30);
    let (lower, upper) = (dice.within(0..=1), dice.within(0..=5));
    let on = |at: u64| {
        let is_there = (from..=to).contains(&at) && (!is_on_attention_alone || !at.is_multiple_of(2));
        let variant = if at <= last / 2 { lower } else { upper };
        is_there.then(|| Adapter::of(&format!("adapter {variant}/{at}")))
    };
    (0..block_count as u64).map(on).collect()
}
