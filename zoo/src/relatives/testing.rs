//! Blocks and random numbers for the tests of this folder.

use std::collections::BTreeMap;

use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::Activation;

use crate::digest::Digest;
use crate::manifest::{Block, BlockKind, Norm, TensorRef};

/// xorshift64*, seeded.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// In [0, 1).
    pub(super) fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Of mean 0 and deviation 1, nearly: a sum of twelve.
    pub(super) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

/// A digest of a number.
pub(super) fn digest_of(number: u64) -> Digest {
    Digest::of(&number.to_le_bytes())
}

/// Blocks of so many layers of width 8, in bf16; the digests of their tensors are those of `first` and the numbers after it.
pub(super) fn blocks(layers: usize, first: u64) -> Vec<Block> {
    chain(layers, 16, Dtype::Bf16, first, 100)
}

/// Blocks of so many layers of width 8.
pub(super) fn chain(layers: usize, inner: u32, dtype: Dtype, first: u64, vocab: u64) -> Vec<Block> {
    let norm = Norm::Rms { eps: 1e-5, weight_offset: 0.0 };
    let mut next = first;
    let mut block = |params: BlockKind, roles: &[(&str, Vec<u64>)]| {
        let tensors = roles.iter().map(|(role, shape)| {
            let digest = digest_of(next);
            next += 1;
            ((*role).to_owned(), TensorRef { digest, dtype, shape: shape.clone() })
        });
        Block { width: 8, params, tensors: tensors.collect::<BTreeMap<_, _>>() }
    };
    let attention = BlockKind::Attention {
        norm,
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
        scale: 1.0,
        rope: None,
        window: None,
        softcap: None,
        qk_norm: None,
        post_norm: None,
    };
    let feed_forward = BlockKind::FeedForward { norm, activation: Activation::Silu, inner, gated: false, post_norm: None };
    let square = ["q.weight", "k.weight", "v.weight", "o.weight"].map(|role| (role, vec![8, 8]));
    let wide = [("up.weight", vec![u64::from(inner), 8]), ("down.weight", vec![8, u64::from(inner)])];
    let mut blocks = vec![block(BlockKind::Embed { scale: 1.0 }, &[("token.weight", vec![vocab, 8])])];
    for _ in 0..layers {
        blocks.push(block(attention.clone(), &[&[("norm.weight", vec![8])], square.as_slice()].concat()));
        blocks.push(block(feed_forward.clone(), &[&[("norm.weight", vec![8])], wide.as_slice()].concat()));
    }
    blocks.push(block(BlockKind::Head { norm, softcap: None, scale: 1.0 }, &[("norm.weight", vec![8]), ("output.weight", vec![vocab, 8])]));
    blocks
}
