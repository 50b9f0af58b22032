//! A sketch of a chain: what of it is needed to find relatives among thousands and to tell what of it others have, in about 16 KiB
//! and without reading a tensor. Bytes are in docs/block-format.md, "Sketches". No IO. Start with [`Sketch::new`].

use ashlar_kernels::format::Dtype;

use super::samples::{SAMPLE_COUNT, Samples};
use crate::adapter::ADAPTED_ROLES;
use crate::digest::Digest;
use crate::manifest::{Adapter, Assets, Block, BlockKind};
use crate::roles::CHAIN_BLOCKS_MAX;

/// Layers whose matrices are sampled; of deeper models so many, spread evenly.
pub const SAMPLED_LAYERS_MAX: usize = 16;

/// How much farther a matrix counts when it is stored in another format: its relative can be shared with it in no way, so one in
/// the same format is preferred unless it is clearly another model. It is more than quantising to eight bits moves a matrix.
const FORMAT_PENALTY: f32 = 0.05;

const MAGIC: &[u8; 8] = b"ASHLARS1";
const HEADER_BYTES: usize = 64;
const SAMPLED_BYTES: usize = 2 + 2 * SAMPLE_COUNT;
const CHECKSUM_BYTES: usize = 32;
const ASSETS_MAX: usize = 3;
/// Tensors of blocks (at most 13 roles), and two factors for each of 7 matrices.
const TENSORS_MAX: usize = CHAIN_BLOCKS_MAX * (13 + 2 * ADAPTED_ROLES.len());
const SAMPLED_MAX: usize = SAMPLED_LAYERS_MAX * ADAPTED_ROLES.len();

/// Largest file that is read as a sketch.
pub const SKETCH_BYTES_MAX: u64 =
    (HEADER_BYTES + 8 * (2 * CHAIN_BLOCKS_MAX + ASSETS_MAX + TENSORS_MAX) + SAMPLED_BYTES * SAMPLED_MAX + CHECKSUM_BYTES) as u64;

/// The first eight bytes of a digest. Two different objects of a zoo have one prefix with a chance of 2^-64 for each pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix(u64);

impl From<Digest> for Prefix {
    fn from(digest: Digest) -> Self {
        Self(u64::from_le_bytes(digest.0[..8].try_into().expect("eight of 32 bytes")))
    }
}

/// A sampled matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sampled {
    /// [`class`] of its format.
    class: u16,
    samples: Samples,
}

/// A sketch. Equal chains have equal sketches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sketch {
    /// Digest of the shapes of all layers' matrices. Tables of tokens are not in it: fine-tunes add rows to them.
    shape: Digest,
    /// In the order of the chain.
    blocks: Vec<Prefix>,
    adapters: Vec<Prefix>,
    assets: Vec<Prefix>,
    /// Of blocks, then of adapters, each in the order of the manifests.
    tensors: Vec<Prefix>,
    /// What [`sampled_roles`] of the shape says, in its order.
    sampled: Vec<Sampled>,
}

/// Why bytes are no sketch.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SketchError {
    /// Another kind of file.
    #[error("it does not start with ASHLARS1")]
    Magic,
    /// Counts that no chain has.
    #[error("it has more {0} than a chain can have")]
    Count(&'static str),
    /// Length that the counts do not imply.
    #[error("it has {actual} bytes, its header says {expected}")]
    Length {
        /// Bytes that there should be.
        expected: usize,
        /// Bytes that there are.
        actual: usize,
    },
    /// A flipped bit.
    #[error("its checksum is wrong")]
    Checksum,
}

impl Sketch {
    /// The sketch of a chain of these blocks and adapters; `samples` gives those of the tensor of a role of a block, for the roles that
    /// [`sampled_roles`] lists.
    ///
    /// # Errors
    /// The first of `samples`.
    pub fn new<E>(
        blocks: &[(Digest, &Block)],
        adapters: &[(Digest, &Adapter)],
        assets: &Assets,
        mut samples: impl FnMut(usize, &'static str) -> Result<Samples, E>,
    ) -> Result<Self, E> {
        let alone: Vec<&Block> = blocks.iter().map(|(_, block)| *block).collect();
        let mut sampled = Vec::new();
        for (index, role) in sampled_roles(&alone) {
            sampled.push(Sampled { class: class(alone[index].tensors[role].dtype), samples: samples(index, role)? });
        }
        let of_blocks = alone.iter().flat_map(|block| block.tensors.values()).map(|tensor| tensor.digest.into());
        let of_adapters = adapters.iter().flat_map(|(_, adapter)| adapter.tensors()).map(|(_, tensor)| tensor.digest.into());
        Ok(Self {
            shape: shape(&alone),
            blocks: blocks.iter().map(|(digest, _)| (*digest).into()).collect(),
            adapters: adapters.iter().map(|(digest, _)| (*digest).into()).collect(),
            assets: [assets.tokenizer, assets.chat_template, assets.card].into_iter().flatten().map(Prefix::from).collect(),
            tensors: of_blocks.chain(of_adapters).collect(),
            sampled,
        })
    }

    /// Samples of the `index`-th of [`sampled_roles`].
    pub fn samples(&self, index: usize) -> Option<Samples> {
        self.sampled.get(index).map(|sampled| sampled.samples)
    }

    /// How far the matrices of two chains are apart: 0 for the same, at most a little over 1; `None` where their shapes differ.
    pub fn distance(&self, other: &Self) -> Option<f32> {
        if self.shape != other.shape || self.sampled.len() != other.sampled.len() || self.sampled.is_empty() {
            return None;
        }
        let apart = |(a, b): (&Sampled, &Sampled)| {
            let penalty = if a.class == b.class { 0.0 } else { FORMAT_PENALTY };
            a.samples.distance(&b.samples) + penalty
        };
        Some(std::iter::zip(&self.sampled, &other.sampled).map(apart).sum::<f32>() / self.sampled.len() as f32)
    }

    /// Whether adapters lie over its blocks.
    pub fn is_adapted(&self) -> bool {
        !self.adapters.is_empty()
    }

    /// Prefixes of all that the chain is made of: blocks, adapters, assets, tensors. Some repeat.
    pub fn objects(&self) -> impl Iterator<Item = Prefix> {
        [&self.blocks, &self.adapters, &self.assets, &self.tensors].into_iter().flatten().copied()
    }

    /// Prefixes of its tensors. Some repeat.
    pub fn tensors(&self) -> &[Prefix] {
        &self.tensors
    }

    /// The bytes of `sketches/<chain>`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 8 * self.tensors.len() + SAMPLED_BYTES * self.sampled.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.shape.0);
        for count in [self.blocks.len(), self.adapters.len(), self.assets.len(), self.tensors.len(), self.sampled.len()] {
            bytes.extend_from_slice(&u32::try_from(count).expect("a chain's parts are bounded").to_le_bytes());
        }
        bytes.resize(HEADER_BYTES, 0);
        self.objects().for_each(|Prefix(prefix)| bytes.extend_from_slice(&prefix.to_le_bytes()));
        for Sampled { class, samples } in &self.sampled {
            bytes.extend_from_slice(&class.to_le_bytes());
            samples.0.iter().for_each(|sample| bytes.extend_from_slice(&sample.to_le_bytes()));
        }
        let checksum = Digest::of(&bytes);
        bytes.extend_from_slice(&checksum.0);
        bytes
    }

    /// Reads the bytes of `sketches/<chain>`.
    ///
    /// # Errors
    /// The first thing that is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Self, SketchError> {
        let header = bytes.get(..HEADER_BYTES).filter(|header| header.starts_with(MAGIC)).ok_or(SketchError::Magic)?;
        let mut counts = [0; 5];
        let most = [CHAIN_BLOCKS_MAX, CHAIN_BLOCKS_MAX, ASSETS_MAX, TENSORS_MAX, SAMPLED_MAX];
        let what = ["blocks", "adapters", "assets", "tensors", "sampled matrices"];
        for (index, field) in header[40..60].chunks_exact(4).enumerate() {
            let count = u32::from_le_bytes(field.try_into().expect("chunks of 4")) as usize;
            if count > most[index] {
                return Err(SketchError::Count(what[index]));
            }
            counts[index] = count;
        }
        let [blocks, adapters, assets, tensors, sampled] = counts;
        let expected = HEADER_BYTES + 8 * (blocks + adapters + assets + tensors) + SAMPLED_BYTES * sampled + CHECKSUM_BYTES;
        if bytes.len() != expected {
            return Err(SketchError::Length { expected, actual: bytes.len() });
        }
        let (body, checksum) = bytes.split_at(expected - CHECKSUM_BYTES);
        if Digest::of(body).0 != checksum {
            return Err(SketchError::Checksum);
        }
        let mut rest = &body[HEADER_BYTES..];
        let mut take = |count: usize| {
            let (taken, left) = rest.split_at(8 * count);
            rest = left;
            taken.chunks_exact(8).map(|prefix| Prefix(u64::from_le_bytes(prefix.try_into().expect("chunks of 8")))).collect()
        };
        let (blocks, adapters, assets, tensors) = (take(blocks), take(adapters), take(assets), take(tensors));
        let half = |bytes: &[u8], index: usize| u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]);
        let sampled = rest
            .chunks_exact(SAMPLED_BYTES)
            .map(|bytes| Sampled { class: half(bytes, 0), samples: Samples(std::array::from_fn(|index| half(bytes, 1 + index))) });
        let shape = Digest(header[8..40].try_into().expect("32 bytes"));
        Ok(Self { shape, blocks, adapters, assets, tensors, sampled: sampled.collect() })
    }
}

/// Block indices and roles of the matrices of a chain that are sampled: all linear ones of at most [`SAMPLED_LAYERS_MAX`] layers, the
/// first and the last among them. A pure function of the number of layers and of what matrices they have.
pub fn sampled_roles(blocks: &[&Block]) -> Vec<(usize, &'static str)> {
    let attention: Vec<usize> = (0..blocks.len()).filter(|index| matches!(blocks[*index].params, BlockKind::Attention { .. })).collect();
    let layers = attention.len();
    let count = layers.min(SAMPLED_LAYERS_MAX);
    let layer = |index: usize| if count < 2 { index } else { index * (layers - 1) / (count - 1) };
    let blocks_of = |layer: usize| [attention[layer], attention[layer] + 1];
    let matrices = |index: usize| {
        let block = blocks.get(index);
        ADAPTED_ROLES.iter().filter(move |role| block.is_some_and(|block| block.tensors.contains_key(**role)))
    };
    (0..count).flat_map(|index| blocks_of(layer(index))).flat_map(|index| matrices(index).map(move |role| (index, *role))).collect()
}

/// Digest of widths, kinds and shapes of the linear matrices of all layers.
fn shape(blocks: &[&Block]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"ashlar-shape-1");
    for block in blocks {
        hasher.update(&block.width.to_le_bytes());
        hasher.update(&[match block.params {
            BlockKind::Embed { .. } => 0,
            BlockKind::Attention { .. } => 1,
            BlockKind::FeedForward { .. } => 2,
            BlockKind::Head { .. } => 3,
            BlockKind::Stitch { .. } => 4,
        }]);
        for (index, role) in (0u8..).zip(ADAPTED_ROLES) {
            let Some(tensor) = block.tensors.get(role) else { continue };
            hasher.update(&[index]);
            for dim in &tensor.shape {
                hasher.update(&dim.to_le_bytes());
            }
        }
    }
    Digest(*hasher.finalize().as_bytes())
}

/// Format without its group: what a sketch says of a matrix's dtype.
fn class(dtype: Dtype) -> u16 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
        Dtype::Int8 { .. } => 3,
        Dtype::Int4 { .. } => 4,
        Dtype::Int8Minimum { .. } => 5,
        Dtype::Int4Minimum { .. } => 6,
        Dtype::Int1 { .. } => 7,
        Dtype::Q8_0 => 8,
        Dtype::Q4_0 => 9,
        Dtype::Q4_1 => 10,
        Dtype::Q5_0 => 11,
        Dtype::Q5_1 => 12,
        Dtype::Q4K => 13,
        Dtype::Q5K => 14,
        Dtype::Q6K => 15,
        Dtype::Int4Zero { .. } => 16,
        Dtype::Fp8 { .. } => 17,
    }
}

#[cfg(test)]
mod tests;
