//! A chain of two models: the first layers of one, a linear map between their hidden rows, the last layers of the other (docs/stitch.md). Here is
//! where two models can be joined, and the chain that comes of it, which can be loaded and measured before it is stored. What fits the map is
//! `ashlar_executor::model::stitch`. Start with [`Seam`].

use std::collections::BTreeMap;

use ashlar_kernels::format::{Dtype, quantise};
use bytes::Bytes;

use crate::canonical;
use crate::digest::Digest;
use crate::inspect::Resolved;
use crate::joint::{self, Joint};
use crate::manifest::{Assets, Block, BlockKind, Chain, TensorRef};
use crate::measures::Measure;
use crate::model_id::ModelId;
use crate::roles::ManifestError;
use crate::store::{Derived, MappedBlock, StoreError, Zoo};
use crate::tensor::MappedTensor;
use crate::tensor_file;

/// Why two models were not joined. No name changed.
#[derive(Debug, thiserror::Error)]
pub enum StitchError {
    /// What changes its blocks would be lost.
    #[error("{0} is base and adapters: stitch its base")]
    Adapted(ModelId),
    /// They say different tokens, or nobody knows which.
    #[error("{0} and {1} do not have the same tokenizer, so a row of one stands for no token of the other")]
    Tokenizer(ModelId, ModelId),
    /// A cut where the model has none.
    #[error("{model} has {layer_count} layers: {flag} {asked} is not within {least} and {most}")]
    Cut {
        /// The model.
        model: ModelId,
        /// Its layers.
        layer_count: usize,
        /// `--from` or `--to`.
        flag: &'static str,
        /// What was asked for.
        asked: usize,
        /// The first cut that there is.
        least: usize,
        /// The last.
        most: usize,
    },
    /// Tokens that could be said and not be read again.
    #[error("the head of {head} says {vocab} tokens, and the token table of {table} has {rows} only")]
    Vocab {
        /// Whose head.
        head: ModelId,
        /// Its rows.
        vocab: u32,
        /// Whose token table.
        table: ModelId,
        /// Its rows.
        rows: u64,
    },
    /// The model belongs to someone who is not public.
    #[error("{model} is not {tenant}'s to see: `ashlar zoo public {}` lets every tenant see and share what {} has", .model.tenant(), .model.tenant())]
    Hidden {
        /// Which.
        model: ModelId,
        /// For whom.
        tenant: String,
    },
    /// The name is taken.
    #[error("{0} exists: give another name with --name")]
    Exists(ModelId),
    /// Too many blocks for one chain.
    #[error(transparent)]
    Chain(#[from] ManifestError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The position feature f(p) of a stitch: `1 / (1 + p)` at position p (from 0), rounded once. Hidden rows of the first tokens, above all of the very
/// first, are of another kind than all others (Sun et al., arXiv 2402.17762, section 2), and this is far from its limit for these alone.
pub fn position_feature(position: u32) -> f32 {
    1.0 / (position as f32 + 1.0)
}

/// `y = W x + b + f(p) u`.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearMap {
    /// D, elements of x.
    pub inputs: usize,
    /// D', elements of y.
    pub outputs: usize,
    /// W, `[D', D]`, row-major.
    pub weight: Vec<f32>,
    /// b, `[D']`.
    pub bias: Vec<f32>,
    /// u, `[D']`.
    pub position: Vec<f32>,
}

impl LinearMap {
    /// One row: x `[D]`, of the token at `position`, to y `[D']`, in f64.
    ///
    /// # Panics
    /// When x has not D elements.
    pub fn apply(&self, x: &[f32], position: u32) -> Vec<f64> {
        assert_eq!(x.len(), self.inputs, "a row of D elements");
        let feature = f64::from(position_feature(position));
        let row = |(n, weight): (usize, &[f32])| {
            let product: f64 = std::iter::zip(weight, x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            product + f64::from(self.bias[n]) + feature * f64::from(self.position[n])
        };
        self.weight.chunks_exact(self.inputs).enumerate().map(row).collect()
    }
}

/// Where two models are to be joined.
#[derive(Debug, Clone)]
pub struct Seam {
    a: Resolved,
    b: Resolved,
    /// Layers of a that are kept, from its first.
    from: usize,
    /// Layers of b that are left out, from its first.
    to: usize,
    /// Blocks of a that are kept.
    a_end: usize,
    /// Blocks of b that are left out.
    b_start: usize,
}

impl Seam {
    /// Layers `0..from` of `a`, and then layers `to..` of `b` with its head.
    ///
    /// # Errors
    /// Why they cannot be joined so.
    pub fn new(a: Resolved, b: Resolved, from: usize, to: usize) -> Result<Self, StitchError> {
        for model in [&a, &b] {
            if !model.chain.adapters.is_empty() {
                return Err(StitchError::Adapted(model.id.clone()));
            }
        }
        if a.chain.assets.tokenizer.is_none() || a.chain.assets.tokenizer != b.chain.assets.tokenizer {
            return Err(StitchError::Tokenizer(a.id, b.id));
        }
        let attention = |model: &Resolved| -> Vec<usize> {
            let is_attention = |block: &Block| matches!(block.params, BlockKind::Attention { .. });
            (0..model.blocks.len()).filter(|index| is_attention(&model.blocks[*index])).collect()
        };
        let (of_a, of_b) = (attention(&a), attention(&b));
        let cut = |model: &Resolved, layer_count, flag, asked, least, most| {
            let model = model.id.clone();
            StitchError::Cut { model, layer_count, flag, asked, least, most }
        };
        // Behind the feed-forward block of the last layer that is kept.
        let last = from.checked_sub(1).and_then(|last| of_a.get(last));
        let a_end = 2 + *last.ok_or_else(|| cut(&a, of_a.len(), "--from", from, 1, of_a.len()))?;
        let b_start = *of_b.get(to).ok_or_else(|| cut(&b, of_b.len(), "--to", to, 0, of_b.len() - 1))?;
        let rows = a.blocks[0].tensors.get("token.weight").map_or(0, |tensor| tensor.shape[0]);
        if rows < u64::from(b.chain.vocab) {
            return Err(StitchError::Vocab { head: b.id, vocab: b.chain.vocab, table: a.id, rows });
        }
        Ok(Self { a, b, from, to, a_end, b_start })
    }

    /// Asks whether a stitched model may have a name: its tenant must see both models, and the name must be free.
    ///
    /// # Errors
    /// Why not.
    pub async fn check_name(&self, zoo: &Zoo, name: &ModelId) -> Result<(), StitchError> {
        self.check_sight(zoo, name.tenant()).await?;
        match zoo.is_free(name).await? {
            true => Ok(()),
            false => Err(StitchError::Exists(name.clone())),
        }
    }

    /// Whether a tenant may see both models, and so learn how near they are.
    ///
    /// # Errors
    /// The one that it may not see.
    pub async fn check_sight(&self, zoo: &Zoo, tenant: &str) -> Result<(), StitchError> {
        let viewer = zoo.viewer(tenant).await?;
        match [&self.a.id, &self.b.id].into_iter().find(|model| !viewer.sees(model)) {
            Some(model) => Err(StitchError::Hidden { model: model.clone(), tenant: tenant.to_owned() }),
            None => Ok(()),
        }
    }

    /// The blocks of a whose rows the map takes, and those of b whose rows it is to give.
    pub fn fitted(&self) -> [&[Digest]; 2] {
        [&self.a.chain.blocks[..self.a_end], &self.b.chain.blocks[..self.b_start]]
    }

    /// Elements D of the rows that the map takes, and D' of those that it gives.
    pub fn widths(&self) -> [usize; 2] {
        [&self.a.blocks[self.a_end - 1], &self.b.blocks[self.b_start - 1]].map(|block| block.output_width() as usize)
    }

    /// Positions that both models take.
    pub fn context_tokens(&self) -> u32 {
        self.a.chain.context_tokens.min(self.b.chain.context_tokens)
    }

    /// The two models.
    pub fn models(&self) -> [&Resolved; 2] {
        [&self.a, &self.b]
    }

    /// How records of measurement name it.
    pub fn method(&self) -> String {
        format!("stitch:{}>{}", self.from, self.to)
    }

    /// The chain with a map between the two. Nothing of it is stored yet.
    ///
    /// # Errors
    /// When it has more blocks than a chain may have.
    ///
    /// # Panics
    /// When the map is of other widths, or has numbers that are not finite.
    pub fn joined(&self, map: &LinearMap) -> Result<Stitched, StitchError> {
        let [width, to] = self.widths();
        assert_eq!((map.inputs, map.outputs), (width, to), "a map of the widths at the cuts");
        let numbers = map.weight.iter().chain(&map.bias).chain(&map.position);
        assert!(numbers.clone().all(|number| number.is_finite()), "a map of finite numbers");
        let (rows, cols) = (to as u64, width as u64);
        let tensors = [
            ("map.weight", vec![rows, cols], &map.weight),
            ("map.bias", vec![rows], &map.bias),
            ("map.position", vec![rows], &map.position),
        ];
        let (mut stitch, mut new) = (BTreeMap::new(), Vec::new());
        for (role, shape, values) in tensors {
            let tensor = stored(shape, values);
            stitch.insert(role.to_owned(), tensor.0.clone());
            new.push(tensor);
        }
        let small = |width: usize| u32::try_from(width).expect("the width of a block");
        let stitch = Block { width: small(width), params: BlockKind::Stitch { to: small(to) }, tensors: stitch };
        let mut blocks = self.a.blocks[..self.a_end].to_vec();
        blocks.push(stitch);
        blocks.extend_from_slice(&self.b.blocks[self.b_start..]);
        let (a, b) = (&self.a.chain, &self.b.chain);
        let chain = Chain {
            architecture: format!("{}+{}", a.architecture, b.architecture),
            width: a.width,
            context_tokens: self.context_tokens(),
            blocks: blocks.iter().map(canonical::digest).collect(),
            // A card tells of one model, and this is another.
            assets: Assets { card: None, ..b.assets.clone() },
            licence: licence(a.licence.as_deref(), b.licence.as_deref()),
            source: format!("layers 0..{} of {}, layers {}.. of {}", self.from, self.a.id, self.to, self.b.id),
            ..b.clone()
        };
        chain.check()?;
        joint::check(0, blocks.len(), blocks.iter().map(Joint::of))?;
        Ok(Stitched { chain, blocks, index: self.a_end, new, parent: self.b.id.clone() })
    }
}

/// Both hold for what is made of both.
fn licence(a: Option<&str>, b: Option<&str>) -> Option<String> {
    match (a, b) {
        (a, b) if a == b => a.map(str::to_owned),
        (a, b) => Some([a, b].map(|licence| licence.unwrap_or("unstated")).join(" AND ")),
    }
}

/// A tensor that is not stored yet.
type NewTensor = (TensorRef, Bytes);

fn stored(shape: Vec<u64>, values: &[f32]) -> NewTensor {
    let payload = quantise(Dtype::F32, 1, values.len(), values).expect("a format that is written");
    (TensorRef { digest: tensor_file::digest(Dtype::F32, &shape, &payload), dtype: Dtype::F32, shape }, Bytes::from(payload))
}

/// A chain of two models and a map. Nothing of it is stored yet.
#[derive(Debug, Clone)]
pub struct Stitched {
    /// The chain.
    pub chain: Chain,
    /// The chain's blocks, in order. All but the stitch are stored already.
    blocks: Vec<Block>,
    /// Place of the stitch.
    index: usize,
    /// The stitch's tensors.
    new: Vec<NewTensor>,
    parent: ModelId,
}

impl Stitched {
    /// Blocks of the chain.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Place of the stitch.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Bytes of the stitch: what is new.
    pub fn new_bytes(&self) -> u64 {
        self.new.iter().map(|(_, payload)| payload.len() as u64).sum()
    }

    /// A block of the chain with its tensors: the stitch out of memory, others out of the zoo.
    ///
    /// # Errors
    /// When a tensor is missing or damaged, or the store fails.
    pub async fn map_block(&self, zoo: &Zoo, index: usize) -> Result<MappedBlock, StoreError> {
        if index != self.index {
            return zoo.map_block(self.chain.blocks[index]).await;
        }
        let block = self.blocks[index].clone();
        let payload = |tensor: &TensorRef| &self.new.iter().find(|(new, _)| new.digest == tensor.digest).expect("made with the block").1;
        let mapped = block.tensors.iter().map(|(role, tensor)| (role.clone(), MappedTensor::owned(tensor, payload(tensor))));
        Ok(MappedBlock { tensors: mapped.collect(), block })
    }

    /// Stores the stitch, the chain with its sketch and what was measured of it, and then a new name for it, whose parent is the model of the head.
    ///
    /// # Errors
    /// When the name exists, or the store fails; then no name is set.
    ///
    /// # Panics
    /// When the record does not pass [`Measure::check`].
    pub async fn store(&self, zoo: &Zoo, name: &ModelId, created_ms: u64, measured: Option<&Measure>) -> Result<Digest, StitchError> {
        let derived = Derived {
            chain: &self.chain,
            blocks: &self.blocks,
            adapters: Vec::new(),
            new: self.new.iter().collect(),
            sketch: None,
            measured,
            parent: &self.parent,
        };
        zoo.store_derived(name, created_ms, &derived).await?.ok_or_else(|| StitchError::Exists(name.clone()))
    }
}
