//! Adapters of noise for `ashlar bench step`: what they add to a step does not depend on what is in them.

use std::sync::Arc;

use anyhow::{Context, bail};
use ashlar_executor::model::adapter::LoadedAdapter;
use ashlar_executor::model::source::{SourceError, TensorBytes, TensorSource};
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::Ops;
use ashlar_zoo::adapter::{ADAPTED_ROLES, RANK_MAX};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::{Adapter, Block, Change, TensorRef};

/// A matrix that adapters change, as `--adapter-matrices` names it.
pub(super) fn matrix(text: &str) -> Result<String, String> {
    let role = format!("{text}.weight");
    if ADAPTED_ROLES.contains(&role.as_str()) { Ok(role) } else { Err("expected q, k, v, o, gate, up or down".to_owned()) }
}

/// The largest rank.
pub(super) const RANK: usize = RANK_MAX as usize;

/// For each of so many sequences adapters of its own, in bf16, on those of `roles` that a block has, each with the place of its block.
pub(super) fn noise<B: Ops>(
    ops: &B,
    blocks: &[Block],
    roles: &[String],
    rank: usize,
    sequences: usize,
) -> anyhow::Result<Vec<Vec<(usize, LoadedAdapter<B>)>>> {
    let mut all = Vec::new();
    for sequence in 0..sequences {
        let mut adapters = Vec::new();
        for (place, block) in blocks.iter().enumerate() {
            let changes = roles.iter().filter_map(|role| Some((role.clone(), change(block.tensors.get(role)?, rank as u64))));
            let adapter = Adapter { changes: changes.collect() };
            if !adapter.changes.is_empty() {
                let source = Noise((sequence * blocks.len() + place) as u32);
                adapters.push((place, LoadedAdapter::load(ops, block, &adapter, &source).context("load an adapter of noise")?));
            }
        }
        if adapters.is_empty() {
            bail!("the model has none of these matrices");
        }
        all.push(adapters);
    }
    Ok(all)
}

fn change(weights: &TensorRef, rank: u64) -> Change {
    let factor = |shape: [u64; 2]| TensorRef { digest: Digest([0; 32]), dtype: Dtype::Bf16, shape: shape.to_vec() };
    Change::LowRank { scale: 2.0, a: factor([rank, weights.shape[1]]), b: factor([weights.shape[0], rank]) }
}

/// Small numbers of both signs, others for each number of it.
struct Noise(u32);

impl TensorSource for Noise {
    fn tensor(&self, tensor: &TensorRef) -> Result<TensorBytes, SourceError> {
        let (rows, cols) = (tensor.shape[0] as usize, tensor.shape[1] as usize);
        let mut state = self.0.wrapping_mul(0x9e37_79b9) | 1;
        let mut value = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            // From 2^-8 to 2^-7.
            (0x3b80 | state as u16 & 0x807f).to_le_bytes()
        };
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|_| value()).collect();
        Ok(TensorBytes { dtype: Dtype::Bf16, rows, cols, keep: Arc::new(bytes) })
    }
}
