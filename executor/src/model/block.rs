//! A block of a model on the device: its weights, packed, and the hyper-parameters that the forward pass needs. It is made
//! by `load` and read by `forward`; it holds no activations and no KV, so any number of sequences and models share it.

use std::sync::Arc;

use ashlar_kernels::ops::{Activation, AttentionShape, KvShape, NormKind, Ops, PageLayout};
use ashlar_zoo::manifest::Rope;

use super::outputs::WeightBytes;

/// A block whose weights are on device `B`.
pub struct LoadedBlock<B: Ops> {
    pub(super) width: usize,
    pub(super) weights: WeightBytes,
    pub(super) kind: Kind<B>,
}

impl<B: Ops> LoadedBlock<B> {
    /// Width D of the hidden rows that it takes.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Width of the hidden rows that it gives: another one behind a stitch alone.
    pub fn output_width(&self) -> usize {
        match &self.kind {
            Kind::Stitch(stitch) => stitch.outputs,
            _ => self.width,
        }
    }

    /// What its weights take, and what of that other blocks may hold too.
    pub fn weights(&self) -> WeightBytes {
        self.weights
    }

    /// Bytes of weights, shared ones included.
    pub fn bytes(&self) -> usize {
        (self.weights.own + self.weights.output.map_or(0, |(_, bytes)| bytes)) as usize
    }

    /// Shape of the KV pages that the block needs; `None` unless it is an attention block.
    pub fn kv_shape(&self, pages: PageLayout) -> Option<KvShape> {
        match &self.kind {
            Kind::Attention(attention) => Some(attention.shape(pages).kv),
            _ => None,
        }
    }

    /// The sliding window of an attention block that has one, in tokens.
    pub fn window(&self) -> Option<u32> {
        match &self.kind {
            Kind::Attention(attention) => attention.window,
            _ => None,
        }
    }

    /// Whether it turns token ids into hidden states: the first block of a chain.
    pub fn is_embed(&self) -> bool {
        matches!(self.kind, Kind::Embed(_))
    }

    /// Whether it turns hidden states into logits: the last block of a chain.
    pub fn is_head(&self) -> bool {
        matches!(self.kind, Kind::Head(_))
    }

    /// Whether rows of this block and of another one may go through their layers in the same calls: all is alike but the values of the weights,
    /// and how these are stored.
    pub fn is_like(&self, other: &Self) -> bool {
        std::ptr::eq(self, other) || self.width == other.width && self.kind.is_like(&other.kind)
    }

    /// Token ids that the block knows: rows of the embedding, or logits of the head. `None` for the other kinds.
    pub fn vocab(&self) -> Option<usize> {
        match &self.kind {
            Kind::Embed(embed) => Some(embed.vocab),
            Kind::Head(head) => Some(head.vocab),
            _ => None,
        }
    }

    /// Rows of a learned position embedding: positions from here on cannot be computed.
    pub fn position_count(&self) -> Option<usize> {
        match &self.kind {
            Kind::Embed(embed) => embed.position_count,
            _ => None,
        }
    }
}

impl<B: Ops> std::fmt::Debug for LoadedBlock<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match &self.kind {
            Kind::Embed(_) => "embed",
            Kind::Attention(_) => "attention",
            Kind::FeedForward(_) => "feed_forward",
            Kind::Head(_) => "head",
            Kind::Stitch(_) => "stitch",
        };
        f.debug_struct("LoadedBlock").field("kind", &kind).field("width", &self.width).field("bytes", &self.bytes()).finish()
    }
}

/// Weights by kind.
pub(super) enum Kind<B: Ops> {
    Embed(Embed<B>),
    Attention(Attention<B>),
    FeedForward(FeedForward<B>),
    Head(Head<B>),
    Stitch(Stitch<B>),
}

impl<B: Ops> Kind<B> {
    pub(super) fn embed(&self) -> Option<&Embed<B>> {
        if let Self::Embed(embed) = self { Some(embed) } else { None }
    }

    pub(super) fn attention(&self) -> Option<&Attention<B>> {
        if let Self::Attention(attention) = self { Some(attention) } else { None }
    }

    pub(super) fn feed_forward(&self) -> Option<&FeedForward<B>> {
        if let Self::FeedForward(feed) = self { Some(feed) } else { None }
    }

    pub(super) fn head(&self) -> Option<&Head<B>> {
        if let Self::Head(head) = self { Some(head) } else { None }
    }

    pub(super) fn stitch(&self) -> Option<&Stitch<B>> {
        if let Self::Stitch(stitch) = self { Some(stitch) } else { None }
    }

    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            // Each strand's rows are looked up alone.
            (Self::Embed(_), Self::Embed(_)) => true,
            (Self::Attention(one), Self::Attention(two)) => {
                let rope = |block: &Attention<B>| block.rope.as_ref().map(|rope| Arc::clone(&rope.params));
                let shape = |block: &Attention<B>| (block.heads, block.kv_heads, block.head_dim, block.scale, block.softcap, block.window);
                shape(one) == shape(two) && rope(one) == rope(two) && one.post_norm.is_some() == two.post_norm.is_some()
            }
            (Self::FeedForward(one), Self::FeedForward(two)) => {
                let shape = |block: &FeedForward<B>| (block.inner, block.gated, block.activation, block.post_norm.is_some());
                shape(one) == shape(two)
            }
            (Self::Head(one), Self::Head(two)) => (one.vocab, one.softcap) == (two.vocab, two.softcap),
            (Self::Stitch(one), Self::Stitch(two)) => one.outputs == two.outputs,
            _ => false,
        }
    }
}

/// Token (and learned position) embedding.
pub(super) struct Embed<B: Ops> {
    pub(super) scale: f32,
    pub(super) vocab: usize,
    pub(super) position_count: Option<usize>,
    /// `[vocab, D]`.
    pub(super) tokens: B::Table,
    /// `[position_count, D]`.
    pub(super) positions: Option<B::Table>,
}

/// Attention with its norms and residual.
pub(super) struct Attention<B: Ops> {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) window: Option<u32>,
    pub(super) norm: NormWeights<B>,
    /// q, k and v stacked: `[(H + 2K) * head_dim, D]`.
    pub(super) qkv: B::Linear,
    pub(super) qkv_bias: Option<B::Vector>,
    pub(super) q_norm: Option<HeadNorm<B>>,
    pub(super) k_norm: Option<HeadNorm<B>>,
    pub(super) rope: Option<LoadedRope<B>>,
    /// `[D, H * head_dim]`.
    pub(super) output: B::Linear,
    pub(super) output_bias: Option<B::Vector>,
    pub(super) post_norm: Option<NormWeights<B>>,
}

impl<B: Ops> Attention<B> {
    /// What the attention ops are told.
    pub(super) fn shape(&self, pages: PageLayout) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv: KvShape { kv_heads: self.kv_heads, head_dim: self.head_dim, page_tokens: pages.tokens, format: pages.format },
            scale: self.scale,
            softcap: self.softcap,
            window: self.window,
        }
    }

    /// Elements of one fused row `[q | k | v]`.
    pub(super) fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Feed-forward with its norms and residual.
pub(super) struct FeedForward<B: Ops> {
    pub(super) inner: usize,
    pub(super) gated: bool,
    pub(super) activation: Activation,
    pub(super) norm: NormWeights<B>,
    /// gate and up stacked, `[2 * inner, D]`; without a gate up alone, `[inner, D]`.
    pub(super) up: B::Linear,
    pub(super) up_bias: Option<B::Vector>,
    /// `[D, inner]`.
    pub(super) down: B::Linear,
    pub(super) down_bias: Option<B::Vector>,
    pub(super) post_norm: Option<NormWeights<B>>,
}

/// Final norm and output projection.
pub(super) struct Head<B: Ops> {
    pub(super) vocab: usize,
    pub(super) softcap: Option<f32>,
    pub(super) norm: NormWeights<B>,
    /// `[vocab, D]`.
    pub(super) output: Arc<B::Linear>,
}

/// A linear map from one family's hidden rows to another's.
pub(super) struct Stitch<B: Ops> {
    /// D'.
    pub(super) outputs: usize,
    /// `[D', D]`.
    pub(super) map: B::Linear,
    pub(super) bias: Option<B::Vector>,
    /// `[D', 1]`: of the position feature.
    pub(super) position: Option<B::Linear>,
}

/// A norm over a row's D elements.
pub(super) struct NormWeights<B: Ops> {
    pub(super) kind: NormKind,
    pub(super) eps: f32,
    pub(super) weight: B::Vector,
    pub(super) bias: Option<B::Vector>,
}

/// An RMSNorm over each head.
pub(super) struct HeadNorm<B: Ops> {
    pub(super) eps: f32,
    pub(super) weight_offset: f32,
    pub(super) weight: B::Vector,
}

/// Rotary embedding; blocks with equal `params` share the rows that a batch computes.
pub(super) struct LoadedRope<B: Ops> {
    pub(super) params: Arc<Rope>,
    /// Frequencies: half of the elements that are rotated.
    pub(super) half: usize,
    pub(super) inverse_frequencies: B::Vector,
    pub(super) attention_factor: f32,
}
