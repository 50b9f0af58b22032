//! From a block descriptor and its tensors to weights on the device. Owns the checks of tensors against the descriptor
//! and the fusing of q, k, v and of gate, up; it does not know files or the zoo.

use std::sync::Arc;

use ashlar_kernels::format::{Dtype, TensorView, dequantise};
use ashlar_kernels::ops::{NormKind, Ops, PackError};
use ashlar_zoo::adapter::AdapterError;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::{Block, BlockKind, Norm, Rope, TensorRef};
use ashlar_zoo::roles::ManifestError;

use super::block::{Attention, Embed, FeedForward, Head, HeadNorm, Kind, LoadedBlock, LoadedRope, NormWeights, Stitch};
use super::outputs::{Outputs, WeightBytes};
use super::rope;
use super::source::{SourceError, TensorBytes, TensorSource};

/// Why a block or an adapter could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The descriptor contradicts itself.
    #[error("understand the block's descriptor")]
    Manifest(#[from] ManifestError),
    /// An adapter contradicts itself, or its block.
    #[error("fit the adapter to its block")]
    Adapter(#[from] AdapterError),
    /// A tensor is not what the descriptor says. Shapes are `[rows, columns]`; a vector has one row.
    #[error("tensor `{role}` is {actual_dtype} {actual:?}, expected {expected_dtype} {expected:?}")]
    Tensor {
        /// Its role.
        role: String,
        /// Shape that the descriptor states.
        expected: [usize; 2],
        /// Shape of the bytes.
        actual: [usize; 2],
        /// Dtype that the descriptor states.
        expected_dtype: Dtype,
        /// Dtype of the bytes.
        actual_dtype: Dtype,
    },
    /// Hyper-parameters that no op computes.
    #[error("no op computes {0}")]
    Unsupported(&'static str),
    /// A tensor could not be had.
    #[error("get tensor `{role}`")]
    Source {
        /// Its role.
        role: String,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// The device refused weights.
    #[error("put `{role}` on the device")]
    Pack {
        /// Role, or the first of the fused roles.
        role: &'static str,
        /// Why.
        #[source]
        source: PackError,
    },
}

impl<B: Ops> LoadedBlock<B> {
    /// Loads a block: checks it, takes its tensors from `source` and packs them. Blocking and, for large blocks, slow. A head before the
    /// embedding: of its tensor no table is mapped then, where the device can read rows out of what `outputs` knows.
    ///
    /// # Errors
    /// The first thing that does not fit; nothing stays on the device then.
    pub fn load(ops: &B, block: &Block, source: &dyn TensorSource, outputs: &Outputs<B>) -> Result<Self, LoadError> {
        block.check()?;
        let mut loader = Loader { ops, block, source, outputs, bytes: 0, output: None };
        let kind = match &block.params {
            BlockKind::Embed { scale } => Kind::Embed(loader.embed(*scale)?),
            BlockKind::Attention { .. } => Kind::Attention(loader.attention()?),
            BlockKind::FeedForward { .. } => Kind::FeedForward(loader.feed_forward()?),
            BlockKind::Head { .. } => Kind::Head(loader.head()?),
            BlockKind::Stitch { to } => Kind::Stitch(loader.stitch(*to as usize)?),
        };
        let weights = WeightBytes { own: loader.bytes as u64, output: loader.output };
        Ok(Self { width: block.width as usize, weights, kind })
    }
}

/// One load in progress; `bytes` counts what the device holds so far for this block alone, `output` what others may hold too.
struct Loader<'a, B: Ops> {
    ops: &'a B,
    block: &'a Block,
    source: &'a dyn TensorSource,
    outputs: &'a Outputs<B>,
    bytes: usize,
    output: Option<(Digest, u64)>,
}

impl<B: Ops> Loader<'_, B> {
    fn embed(&mut self, scale: f32) -> Result<Embed<B>, LoadError> {
        let tokens = self.take("token.weight")?;
        let positions = self.maybe("position.weight")?;
        Ok(Embed {
            scale,
            vocab: tokens.rows,
            position_count: positions.as_ref().map(|table| table.rows),
            tokens: self.tokens("token.weight", tokens)?,
            positions: positions.map(|table| self.table("position.weight", table)).transpose()?,
        })
    }

    fn attention(&mut self) -> Result<Attention<B>, LoadError> {
        let BlockKind::Attention { norm, heads, kv_heads, head_dim, scale, rope, window, softcap, qk_norm, post_norm } = &self.block.params
        else {
            unreachable!("called for attention blocks only");
        };
        let (q, kv) = ((heads * head_dim) as usize, (kv_heads * head_dim) as usize);
        let (q_norm, k_norm) = match qk_norm {
            Some(norm) => (Some(self.head_norm("q_norm.weight", norm)?), Some(self.head_norm("k_norm.weight", norm)?)),
            None => (None, None),
        };
        Ok(Attention {
            heads: *heads as usize,
            kv_heads: *kv_heads as usize,
            head_dim: *head_dim as usize,
            scale: *scale,
            softcap: *softcap,
            window: *window,
            norm: self.norm("norm.weight", Some("norm.bias"), norm)?,
            qkv: self.linear(&["q.weight", "k.weight", "v.weight"])?,
            qkv_bias: self.bias(&[("q.bias", q), ("k.bias", kv), ("v.bias", kv)])?,
            q_norm,
            k_norm,
            rope: rope.as_ref().map(|rope| self.rope(rope)).transpose()?,
            output: self.linear(&["o.weight"])?,
            output_bias: self.bias(&[("o.bias", self.block.width as usize)])?,
            post_norm: post_norm.as_ref().map(|norm| self.norm("post_norm.weight", None, norm)).transpose()?,
        })
    }

    fn feed_forward(&mut self) -> Result<FeedForward<B>, LoadError> {
        let BlockKind::FeedForward { norm, activation, inner, gated, post_norm } = &self.block.params else {
            unreachable!("called for feed-forward blocks only");
        };
        let inner = *inner as usize;
        let (roles, biases) = (["gate.weight", "up.weight"], [("gate.bias", inner), ("up.bias", inner)]);
        let first = usize::from(!gated);
        Ok(FeedForward {
            inner,
            gated: *gated,
            activation: *activation,
            norm: self.norm("norm.weight", Some("norm.bias"), norm)?,
            up: self.linear(&roles[first..])?,
            up_bias: self.bias(&biases[first..])?,
            down: self.linear(&["down.weight"])?,
            down_bias: self.bias(&[("down.bias", self.block.width as usize)])?,
            post_norm: post_norm.as_ref().map(|norm| self.norm("post_norm.weight", None, norm)).transpose()?,
        })
    }

    fn head(&mut self) -> Result<Head<B>, LoadError> {
        let BlockKind::Head { norm, softcap, scale } = &self.block.params else {
            unreachable!("called for head blocks only");
        };
        if *scale != 1.0 {
            return Err(LoadError::Unsupported("a scale of logits other than 1"));
        }
        let vocab = self.take("output.weight")?.rows;
        Ok(Head {
            vocab,
            softcap: *softcap,
            norm: self.norm("norm.weight", Some("norm.bias"), norm)?,
            output: self.output("output.weight")?,
        })
    }

    fn stitch(&mut self, outputs: usize) -> Result<Stitch<B>, LoadError> {
        let role = "map.position";
        let position = match self.maybe(role)? {
            None => None,
            // A vector, as a layer of one input.
            Some(tensor) => {
                let values: Vec<u8> = dequantise(&tensor.view()).into_iter().flat_map(f32::to_le_bytes).collect();
                let column = TensorView { dtype: Dtype::F32, rows: outputs, cols: 1, bytes: &values };
                let position = self.ops.linear(&[column]).map_err(|source| LoadError::Pack { role, source })?;
                self.bytes += self.ops.linear_bytes(&position);
                Some(position)
            }
        };
        Ok(Stitch { outputs, map: self.linear(&["map.weight"])?, bias: self.bias(&[("map.bias", outputs)])?, position })
    }

    /// The tokens' table: read out of the output projection of the same tensor, if the device holds one and can, and else where it is mapped.
    fn tokens(&mut self, role: &'static str, tensor: TensorBytes) -> Result<B::Table, LoadError> {
        let digest = self.block.tensors[role].digest;
        if let Some(output) = self.outputs.find(digest)
            && let Some(table) = self.ops.table_of(&output)
        {
            self.output = Some((digest, self.ops.linear_bytes(&output) as u64));
            return Ok(table);
        }
        self.table(role, tensor)
    }

    /// The output projection, packed unless the device holds one of the same tensor.
    fn output(&mut self, role: &'static str) -> Result<Arc<B::Linear>, LoadError> {
        let (tensor, digest) = (self.take(role)?, self.block.tensors[role].digest);
        let output = self.outputs.find_or_pack(digest, || self.ops.linear(&[tensor.view()]));
        let output = output.map_err(|source| LoadError::Pack { role, source })?;
        self.output = Some((digest, self.ops.linear_bytes(&output) as u64));
        Ok(output)
    }

    fn norm(&mut self, weight: &'static str, bias: Option<&'static str>, norm: &Norm) -> Result<NormWeights<B>, LoadError> {
        let (kind, eps) = match *norm {
            Norm::Rms { eps, weight_offset } => (NormKind::Rms { weight_offset }, eps),
            Norm::Layer { eps } => (NormKind::Layer, eps),
        };
        let width = self.block.width as usize;
        let bias = bias.map(|role| self.bias(&[(role, width)])).transpose()?.flatten();
        Ok(NormWeights { kind, eps, weight: self.vector(weight)?, bias })
    }

    fn head_norm(&mut self, role: &'static str, norm: &Norm) -> Result<HeadNorm<B>, LoadError> {
        let Norm::Rms { eps, weight_offset } = *norm else {
            return Err(LoadError::Unsupported("a LayerNorm of query and key heads"));
        };
        Ok(HeadNorm { eps, weight_offset, weight: self.vector(role)? })
    }

    fn rope(&mut self, params: &Rope) -> Result<LoadedRope<B>, LoadError> {
        let frequencies = rope::inverse_frequencies(params);
        let inverse_frequencies = self.ops.vector_f32(&frequencies).map_err(|source| LoadError::Pack { role: "rope", source })?;
        self.bytes += 4 * frequencies.len();
        Ok(LoadedRope {
            half: frequencies.len(),
            attention_factor: rope::attention_factor(params),
            params: Arc::new(params.clone()),
            inverse_frequencies,
        })
    }

    /// Stacks the tensors of `roles` along their outputs.
    fn linear(&mut self, roles: &[&'static str]) -> Result<B::Linear, LoadError> {
        let parts = roles.iter().map(|role| self.take(role)).collect::<Result<Vec<_>, _>>()?;
        let views: Vec<TensorView<'_>> = parts.iter().map(TensorBytes::view).collect();
        let linear = self.ops.linear(&views).map_err(|source| LoadError::Pack { role: roles[0], source })?;
        self.bytes += self.ops.linear_bytes(&linear);
        Ok(linear)
    }

    /// Concatenates biases, with zeros for a role that is not there; `None` if none is.
    fn bias(&mut self, roles: &[(&'static str, usize)]) -> Result<Option<B::Vector>, LoadError> {
        let parts = roles.iter().map(|(role, _)| self.maybe(role)).collect::<Result<Vec<_>, _>>()?;
        if parts.iter().all(Option::is_none) {
            return Ok(None);
        }
        let zeros = vec![0u8; 4 * roles.iter().map(|(_, len)| *len).max().unwrap_or(0)];
        let views: Vec<TensorView<'_>> = std::iter::zip(&parts, roles)
            .map(|(part, (_, len))| match part {
                Some(part) => part.view(),
                None => TensorView { dtype: Dtype::F32, rows: 1, cols: *len, bytes: &zeros[..4 * len] },
            })
            .collect();
        let vector = self.ops.vector(&views).map_err(|source| LoadError::Pack { role: roles[0].0, source })?;
        self.bytes += 4 * roles.iter().map(|(_, len)| *len).sum::<usize>();
        Ok(Some(vector))
    }

    fn vector(&mut self, role: &'static str) -> Result<B::Vector, LoadError> {
        let tensor = self.take(role)?;
        self.bytes += 4 * tensor.cols;
        self.ops.vector(&[tensor.view()]).map_err(|source| LoadError::Pack { role, source })
    }

    fn table(&mut self, role: &'static str, tensor: TensorBytes) -> Result<B::Table, LoadError> {
        let keep = Arc::clone(&tensor.keep);
        self.bytes += tensor.view().bytes.len();
        self.ops.table(tensor.view(), keep).map_err(|source| LoadError::Pack { role, source })
    }

    fn take(&self, role: &str) -> Result<TensorBytes, LoadError> {
        Ok(self.maybe(role)?.expect("the descriptor's check found every required role"))
    }

    fn maybe(&self, role: &str) -> Result<Option<TensorBytes>, LoadError> {
        self.block.tensors.get(role).map(|reference| take(self.source, role, reference)).transpose()
    }
}

/// The bytes of a tensor in a role, if they are what a checked descriptor says.
pub(super) fn take(source: &dyn TensorSource, role: &str, reference: &TensorRef) -> Result<TensorBytes, LoadError> {
    let tensor = source.tensor(reference).map_err(|source| LoadError::Source { role: role.to_owned(), source })?;
    let expected = match *reference.shape.as_slice() {
        [cols] => [1, cols as usize],
        [rows, cols] => [rows as usize, cols as usize],
        _ => unreachable!("the descriptor's check allows one or two dimensions"),
    };
    let actual = [tensor.rows, tensor.cols];
    if actual == expected && tensor.dtype == reference.dtype {
        return Ok(tensor);
    }
    let (expected_dtype, actual_dtype) = (reference.dtype, tensor.dtype);
    Err(LoadError::Tensor { role: role.to_owned(), expected, actual, expected_dtype, actual_dtype })
}

#[cfg(test)]
mod tests;
