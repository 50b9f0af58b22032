//! Blocks with random weights in memory, for unit tests.

use std::collections::BTreeMap;
use std::sync::Arc;

use ashlar_kernels::format::{Dtype, dequantise, quantise};
use ashlar_kernels::ops::{Activation, Ops};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::{Adapter, Block, BlockKind, Change, Norm, Rope, RopeScaling, TensorRef};
use ashlar_zoo::roles::{RoleShape, roles};

use super::block::LoadedBlock;
use super::outputs::Outputs;
use super::philox;
use super::source::{SourceError, TensorBytes, TensorSource};

/// Width of the test blocks.
pub(super) const WIDTH: u32 = 32;
/// Vocabulary of the test blocks.
pub(super) const VOCAB: u64 = 50;
/// RMSNorm as most families have it.
pub(super) const RMS: Norm = Norm::Rms { eps: 1e-6, weight_offset: 0.0 };

/// Tensors by digest.
#[derive(Default)]
pub(super) struct Memory(pub(super) BTreeMap<Digest, TensorBytes>);

impl TensorSource for Memory {
    fn tensor(&self, tensor: &TensorRef) -> Result<TensorBytes, SourceError> {
        self.0.get(&tensor.digest).cloned().ok_or(SourceError::Missing(tensor.digest))
    }
}

impl Memory {
    /// A block with every role that its kind may have, filled with small random numbers.
    pub(super) fn block(&mut self, params: BlockKind) -> Block {
        let mut tensors = BTreeMap::new();
        for role in roles(WIDTH, &params) {
            let shape = match role.shape {
                RoleShape::Vector(k) => vec![k],
                RoleShape::Matrix(n, k) => vec![n, k],
                RoleShape::Rows(k) => vec![VOCAB, k],
            };
            tensors.insert(role.name.to_owned(), self.tensor(shape));
        }
        Block { width: WIDTH, params, tensors }
    }

    fn tensor(&mut self, shape: Vec<u64>) -> TensorRef {
        let seed = self.0.len() as u64;
        let count = shape.iter().product::<u64>() as u32;
        let value = |i: u32| (philox::uniform(seed, 0, i) - 0.5) as f32;
        let bytes: Vec<u8> = (0..count).flat_map(|i| value(i).to_le_bytes()).collect();
        let tensor = TensorRef { digest: Digest::of(&bytes), dtype: Dtype::F32, shape };
        let (rows, cols) = match *tensor.shape.as_slice() {
            [cols] => (1, cols as usize),
            [rows, cols] => (rows as usize, cols as usize),
            _ => unreachable!(),
        };
        self.0.insert(tensor.digest, TensorBytes { dtype: Dtype::F32, rows, cols, keep: Arc::new(bytes) });
        tensor
    }

    /// A chain of six blocks that uses most of what blocks can do.
    pub(super) fn chain<B: Ops>(&mut self, ops: &B) -> Vec<LoadedBlock<B>> {
        self.chain_as(ops, None)
    }

    /// The same weights, the matrices stored as `dtype`.
    pub(super) fn chain_as<B: Ops>(&mut self, ops: &B, dtype: Option<Dtype>) -> Vec<LoadedBlock<B>> {
        let blocks = self.blocks(dtype);
        blocks.iter().map(|block| LoadedBlock::load(ops, block, self, &Outputs::default()).unwrap()).collect()
    }

    /// The descriptors of such a chain, its head tied to its embedding.
    pub(super) fn tied_blocks(&mut self, dtype: Option<Dtype>) -> Vec<Block> {
        let mut blocks = self.blocks(dtype);
        let tokens = blocks[0].tensors["token.weight"].clone();
        blocks[5].tensors.insert("output.weight".to_owned(), tokens);
        blocks
    }

    /// The descriptors of [`Memory::chain_as`].
    pub(super) fn blocks(&mut self, dtype: Option<Dtype>) -> Vec<Block> {
        let kinds = [
            BlockKind::Embed { scale: 2.0 },
            attention(),
            BlockKind::FeedForward { norm: RMS, activation: Activation::Silu, inner: 48, gated: true, post_norm: None },
            BlockKind::Attention {
                norm: Norm::Layer { eps: 1e-5 },
                heads: 2,
                kv_heads: 2,
                head_dim: 16,
                scale: 0.25,
                rope: None,
                window: None,
                softcap: Some(20.0),
                qk_norm: None,
                post_norm: Some(RMS),
            },
            BlockKind::FeedForward { norm: RMS, activation: Activation::Relu, inner: 40, gated: false, post_norm: Some(RMS) },
            BlockKind::Head { norm: RMS, softcap: Some(30.0), scale: 1.0 },
        ];
        let mut blocks: Vec<Block> = kinds.into_iter().map(|kind| self.block(kind)).collect();
        if let Some(dtype) = dtype {
            let tensors = blocks.iter_mut().flat_map(|block| block.tensors.values_mut());
            tensors.filter(|tensor| tensor.shape.len() == 2).for_each(|tensor| self.convert(tensor, dtype));
        }
        blocks
    }

    /// An adapter of some matrices of a block, filled with small random numbers.
    pub(super) fn adapter(&mut self, block: &Block, roles: &[&str], rank: u64, scale: f32, dtype: Dtype) -> Adapter {
        let change = |role: &&str| {
            let [outputs, inputs] = block.tensors[*role].shape[..] else { unreachable!("a matrix") };
            let (mut a, mut b) = (self.tensor(vec![rank, inputs]), self.tensor(vec![outputs, rank]));
            [&mut a, &mut b].into_iter().for_each(|factor| self.convert(factor, dtype));
            ((*role).to_owned(), Change::LowRank { scale, a, b })
        };
        Adapter { changes: roles.iter().map(change).collect() }
    }

    /// The same with a one-bit delta of some more matrices, whose weights are of a tenth of the size of others.
    pub(super) fn with_signs(&mut self, block: &Block, roles: &[&str], mut adapter: Adapter) -> Adapter {
        for role in roles {
            let mut signs = self.tensor(block.tensors[*role].shape.clone());
            let values: Vec<f32> = dequantise(&self.0[&signs.digest].view()).iter().map(|value| 0.1 * value).collect();
            self.insert(&mut signs, Dtype::Int1 { group: 512 }, &values);
            adapter.changes.insert((*role).to_owned(), Change::OneBit { signs });
        }
        adapter
    }

    /// A block of f32 with an adapter merged into it: `W + s B A` or `W + D`, rounded once.
    pub(super) fn merged(&mut self, block: &Block, adapter: &Adapter) -> Block {
        let mut merged = block.clone();
        for (role, change) in &adapter.changes {
            let weights = self.0[&block.tensors[role].digest].clone();
            let mut values = dequantise(&weights.view());
            let held = |tensor: &TensorRef| self.0[&tensor.digest].clone();
            match change {
                Change::LowRank { scale, a, b } => {
                    let (rank, cols) = (held(a).rows, weights.cols);
                    let [a, b] = [a, b].map(|tensor| dequantise(&held(tensor).view()));
                    for (i, value) in values.iter_mut().enumerate() {
                        let (row, col) = (i / cols, i % cols);
                        let sum: f64 = (0..rank).map(|r| f64::from(b[row * rank + r]) * f64::from(a[r * cols + col])).sum();
                        *value = (f64::from(*value) + f64::from(*scale) * sum) as f32;
                    }
                }
                Change::OneBit { signs } => {
                    let delta = dequantise(&held(signs).view());
                    values.iter_mut().zip(delta).for_each(|(value, d)| *value += d);
                }
            }
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let digest = Digest::of(&bytes);
            merged.tensors.insert(role.clone(), TensorRef { digest, ..block.tensors[role].clone() });
            self.0.insert(digest, TensorBytes { keep: Arc::new(bytes), ..weights });
        }
        merged
    }

    fn convert(&mut self, tensor: &mut TensorRef, dtype: Dtype) {
        let values = dequantise(&self.0[&tensor.digest].view());
        self.insert(tensor, dtype, &values);
    }

    /// Other values for a tensor, stored as `dtype`.
    fn insert(&mut self, tensor: &mut TensorRef, dtype: Dtype, values: &[f32]) {
        let TensorBytes { rows, cols, .. } = self.0[&tensor.digest];
        let bytes = quantise(dtype, rows, cols, values).unwrap();
        *tensor = TensorRef { digest: Digest::of(&bytes), dtype, shape: tensor.shape.clone() };
        self.0.insert(tensor.digest, TensorBytes { dtype, rows, cols, keep: Arc::new(bytes) });
    }
}

/// Grouped heads, partial rope, window, norms of heads.
pub(super) fn attention() -> BlockKind {
    BlockKind::Attention {
        norm: RMS,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        scale: 0.3,
        rope: Some(Rope { theta: 10000.0, dim: 4, scaling: RopeScaling::None }),
        window: Some(9),
        softcap: None,
        qk_norm: Some(RMS),
        post_norm: None,
    }
}
