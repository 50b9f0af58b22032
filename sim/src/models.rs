//! Modelled models: families of chains that share blocks, as fine-tunes do, and chains that differ in adapters alone. A block computes a hash, so only its identity matters.

use ashlar_executor::state::engine::HostSpan;
use ashlar_executor::state::segments::BlockIndex;
use ashlar_kernels::ops::{KvFormat, KvShape};
use ashlar_registry::ChainDigest;
use ashlar_registry::record::DeploymentRecord;
use ashlar_router::state::assembly::ChainPath;
use ashlar_router::state::placement::{SizedAdapter, SizedBlock, SizedChain};
use ashlar_zoo::digest::{Digest, lineages};
use ashlar_zoo::manifest::{AdapterRef, Assets, Chain, Defaults, Tokens};

use crate::adapters::{self, Adapter};
use crate::dice::Dice;

/// Token ids are below it.
pub(crate) const VOCAB: u32 = 97;

/// A block as the modelled device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) digest: Digest,
    /// What it mixes into each row.
    pub(crate) salt: u64,
    pub(crate) bytes: u64,
    /// Heads of its keys and values; None: no attention.
    pub(crate) kv_heads: Option<usize>,
    /// Tokens that its attention sees; None: all.
    pub(crate) window: Option<u32>,
}

impl Block {
    fn of(name: &str, bytes: u64, kv_heads: Option<usize>, window: Option<u32>) -> Self {
        let digest = Digest::of(name.as_bytes());
        let salt = u64::from_le_bytes(digest.0[..8].try_into().expect("eight bytes"));
        Self { digest, salt, bytes, kv_heads, window }
    }

    /// Equal where blocks are alike in all but what they mix in, and their windows.
    pub(crate) fn form(&self) -> u32 {
        16 * self.bytes as u32 + self.kv_heads.map_or(0, |kv_heads| kv_heads as u32)
    }

    pub(crate) fn kv_shape(&self, page_tokens: u32) -> Option<KvShape> {
        self.kv_heads.map(|kv_heads| KvShape { kv_heads, head_dim: 4, page_tokens: page_tokens as usize, format: KvFormat::F32 })
    }
}

/// A model: a chain of blocks, some perhaps with an adapter.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) digest: ChainDigest,
    pub(crate) blocks: Vec<Block>,
    /// Of each block.
    pub(crate) adapters: Vec<Option<Adapter>>,
    /// Lineage through each block.
    pub(crate) lineages: Vec<Digest>,
    /// f32 of a hidden row.
    pub(crate) width: u32,
    pub(crate) path: ChainPath,
    pub(crate) sized: SizedChain,
    /// When its tokens are wanted.
    pub(crate) deployment: DeploymentRecord,
}

impl Model {
    fn new(name: String, blocks: Vec<Block>, adapters: Vec<Option<Adapter>>, width: u32) -> Self {
        let digests: Vec<Digest> = blocks.iter().map(|block| block.digest).collect();
        let placed: Vec<(u32, Digest)> = (0..).zip(&adapters).filter_map(|(at, adapter)| Some((at, adapter.as_ref()?.digest))).collect();
        let lineages = lineages(&digests, &placed);
        let digest = lineages[lineages.len() - 1];
        let chain = Chain {
            format: 1,
            architecture: "model".to_owned(),
            width,
            vocab: VOCAB,
            context_tokens: u32::MAX,
            blocks: digests,
            adapters: placed.into_iter().map(|(block_index, digest)| AdapterRef { block_index, digest }).collect(),
            assets: Assets::default(),
            tokens: Tokens::default(),
            defaults: Defaults::default(),
            licence: None,
            source: "sim".to_owned(),
        };
        let sized = |(block, adapter): (&Block, &Option<Adapter>)| SizedBlock {
            digest: block.digest,
            bytes: block.bytes,
            adapter: adapter.map(|adapter| SizedAdapter { digest: adapter.on(block), bytes: adapter.bytes }),
        };
        let sized = SizedChain {
            blocks: blocks.iter().zip(&adapters).map(sized).collect(),
            borders: (3..blocks.len().saturating_sub(2) as u32).step_by(2).collect(),
        };
        let path = ChainPath::new(digest, &chain);
        let deployment = DeploymentRecord::default();
        Self { name, digest: ChainDigest(digest.0), blocks, adapters, lineages, width, path, sized, deployment }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.parts(0, self.blocks.len() as u32).map(|(_, bytes)| bytes).sum()
    }

    /// What an executor holds of blocks [from, to) and their adapters, by identity, and its bytes.
    pub(crate) fn parts(&self, from: u32, to: u32) -> impl Iterator<Item = (Digest, u64)> {
        let sized = &self.sized.blocks[from as usize..to as usize];
        sized.iter().flat_map(|block| {
            let adapter = block.adapter.map(|adapter| (adapter.digest, adapter.bytes));
            [(block.digest, block.bytes)].into_iter().chain(adapter)
        })
    }

    /// Its blocks as they are for it.
    pub(crate) fn changed_blocks(&self) -> Vec<Block> {
        let changed = |(block, adapter): (&Block, &Option<Adapter>)| adapter.map_or(*block, |adapter| adapter.change(block));
        self.blocks.iter().zip(&self.adapters).map(changed).collect()
    }

    /// What an engine is told of blocks [from, to), whose places on the device are given.
    pub(crate) fn host(&self, from: u32, to: u32, places: Vec<BlockIndex>, page_tokens: u32) -> HostSpan {
        let range = from as usize..to as usize;
        HostSpan {
            blocks: places,
            lineages: self.lineages[range.clone()].iter().map(|lineage| lineage.0).collect(),
            windows: self.blocks[range.clone()].iter().map(|block| block.window).collect(),
            forms: self.blocks[range.clone()].iter().map(Block::form).collect(),
            costs: vec![None; range.len()],
            kv_shapes: self.blocks[range].iter().map(|block| block.kv_shape(page_tokens)).collect(),
            widths: vec![self.width; (to - from) as usize + 1],
            begins_with_embed: from == 0,
            ends_with_head: to as usize == self.blocks.len(),
        }
    }
}

/// Families of models: each has a base, and descendants that differ in the top, in one layer, or end earlier. `windows` draws which attention
/// blocks of a family see less than all, `of_adapters` which descendants are adapters over one that is there instead: some in every other draw.
pub(crate) fn draw(dice: &mut Dice, windows: &mut Dice, of_adapters: &mut Dice, count: usize) -> Vec<Model> {
    let mut models: Vec<Model> = Vec::new();
    let adapter_chance = if of_adapters.chance(50) { 50 } else { 0 };
    let mut family = 0;
    while models.len() < count {
        let layers = dice.within(2..=5) as usize;
        let kv_heads = if family == 0 || dice.chance(60) { 1 } else { 2 };
        let width = if kv_heads == 1 { 2 } else { 4 };
        let window = windows.pick(&[3, 16, 40, 100]);
        // None, all, every other one as in Gemma, or those of the upper layers as in Qwen.
        let pattern = windows.pick(&[0, 0, 1, 2, 3]);
        let window_of = |layer: usize| match pattern {
            1 => Some(window),
            2 if layer.is_multiple_of(2) => Some(window),
            3 if layer >= layers / 2 => Some(window),
            _ => None,
        };
        let mut base = vec![Block::of(&format!("{family}/embed"), 4, None, None)];
        for layer in 0..layers {
            base.push(Block::of(&format!("{family}/{layer}/attention"), 2, Some(kv_heads), window_of(layer)));
            base.push(Block::of(&format!("{family}/{layer}/feed_forward"), 3, None, None));
        }
        base.push(Block::of(&format!("{family}/head"), 4, None, None));
        models.push(Model::new(format!("m{}", models.len()), base.clone(), vec![None; base.len()], width));
        for _ in 0..dice.within(0..=4) {
            if models.len() == count {
                break;
            }
            let name = format!("m{}", models.len());
            let parent = dice.pick(&models.iter().filter(|model| model.blocks[0] == base[0]).map(|m| m.blocks.clone()).collect::<Vec<_>>());
            let blocks = descend(dice, &parent, &name);
            let model = match of_adapters.chance(adapter_chance) {
                true => {
                    let adapters = adapters::draw(of_adapters, parent.len());
                    Model::new(name, parent, adapters, width)
                }
                false => Model::new(name, blocks.clone(), vec![None; blocks.len()], width),
            };
            if models.iter().all(|known| known.digest != model.digest) {
                models.push(model);
            }
        }
        family += 1;
    }
    models
}

/// A chain with some blocks of another one.
fn descend(dice: &mut Dice, parent: &[Block], name: &str) -> Vec<Block> {
    let mut blocks = parent.to_vec();
    let tuned = |block: &Block, at: usize| Block::of(&format!("{name}/{at}"), block.bytes, block.kv_heads, block.window);
    let layers = (blocks.len() - 2) / 2;
    match dice.within(0..=3) {
        // The top, with the head or without it.
        0 => {
            let from = 1 + 2 * dice.within(1..=layers as u64 - 1) as usize;
            let to = blocks.len() - usize::from(dice.chance(50));
            (from..to).for_each(|at| blocks[at] = tuned(&parent[at], at));
        }
        // One block anywhere: the same blocks come again behind it.
        1 => {
            let at = dice.within(1..=blocks.len() as u64 - 1) as usize;
            blocks[at] = tuned(&parent[at], at);
        }
        // A feed-forward in each of two layers.
        2 => {
            for _ in 0..2 {
                let at = 2 + 2 * dice.within(0..=layers as u64 - 1) as usize;
                blocks[at] = tuned(&parent[at], at);
            }
        }
        // It ends a layer earlier.
        _ if layers > 2 => {
            let at = blocks.len() - 3;
            blocks.drain(at..at + 2);
        }
        _ => {
            let at = blocks.len() - 1;
            blocks[at] = tuned(&parent[at], at);
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_differ_in_adapters_alone_are_among_those_that_are_drawn() {
        let (mut pairs, mut forks) = (0, 0);
        for seed in 0..200 {
            let dice = Dice::new(seed);
            let models = draw(&mut dice.fork("models"), &mut dice.fork("windows"), &mut dice.fork("of adapters"), 7);
            for (i, a) in models.iter().enumerate() {
                for b in models[..i].iter().filter(|b| b.blocks == a.blocks) {
                    let first = (0..a.blocks.len()).position(|at| a.adapters[at] != b.adapters[at]).expect("they differ");
                    let common = (0..a.blocks.len()).take_while(|at| a.lineages[*at] == b.lineages[*at]).count();
                    assert_eq!(common, first, "lineages part at the first adapter that differs");
                    assert_ne!(a.changed_blocks()[first], b.changed_blocks()[first]);
                    (pairs, forks) = (pairs + 1, forks + usize::from(a.adapters[..first].iter().any(Option::is_some)));
                }
            }
        }
        assert!(pairs > 100 && forks > 10, "{pairs} pairs, {forks} part behind an adapter that they share");
    }
}
