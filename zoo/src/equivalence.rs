//! Which blocks of one model may stand for another's, by measurement: what `equivalences/<digest>.json` holds. A record says what came out
//! where blocks of one chain were put into the places of another's, on which text; nobody is served by it unless a deployment's policy
//! allows as much divergence. It is a plain object: listed, and revoked by taking it away. Its arithmetic is in `similar`, its storage in
//! `store/equivalences.rs`.

mod similar;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::manifest::{Block, Chain};
use crate::measures::{Divergence, MeasureError, check_figures};
use crate::model_id::ModelId;
use crate::store::{StoreError, Zoo};

pub use similar::cosine;

/// How the figures of records of this format came about: each block alone in its place, then all so far together, from the least divergence up.
pub const METHOD: &str = "swap-in-order-of-divergence";
/// Most steps of a record: the blocks of a chain of 500 layers.
pub const STEPS_MAX: usize = 1024;

/// How far next-token distributions are from the exact chain's, over the rows of a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// Predictions, at least one.
    pub rows: u64,
    /// KL(exact || exchanged), nats.
    pub kl: Divergence,
    /// Share of the rows with the exact chain's most likely token.
    pub same_top_share: f64,
}

/// One more block exchanged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Its place in the chain.
    pub block_index: u32,
    /// The block that the chain has there.
    pub own: Digest,
    /// The block that may stand for it.
    pub other: Digest,
    /// Cosine of the two blocks' parameters, as vectors: a sieve, no measure.
    pub cosine: f64,
    /// With this block alone exchanged.
    pub alone: Figures,
    /// With this one and those of all steps before.
    pub together: Figures,
    /// The chain with this one and those of all steps before.
    pub chain: Digest,
}

/// A measured equivalence of two chains' blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Equivalence {
    /// 1.
    pub format: u32,
    /// How it was measured: [`METHOD`].
    pub method: String,
    /// `tenant/name` of the model whose blocks may be exchanged.
    pub model: String,
    /// The chain that it was.
    pub chain: Digest,
    /// `tenant/name` of the model whose blocks stand for them.
    pub other: String,
    /// The chain that it was.
    pub other_chain: Digest,
    /// BLAKE3 of the text.
    pub text: Digest,
    /// Unix time of the measurement.
    pub created_ms: u64,
    /// From the least divergence up; not empty.
    pub steps: Vec<Step>,
}

/// What is wrong with a record.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum EquivalenceError {
    /// A later version wrote it.
    #[error("it has format {0}, this build reads 1")]
    Format(u32),
    /// One of its models is none.
    #[error("`{0}` is no TENANT/MODEL")]
    Model(String),
    /// It has none, or more than are believed.
    #[error("it has {0} steps, not 1 to {STEPS_MAX}")]
    Steps(usize),
    /// A step that says nothing new.
    #[error("step {step} exchanges block {block_index} {how}")]
    Repeated {
        /// Which step, from 0.
        step: usize,
        /// Of which block.
        block_index: u32,
        /// In which way that is nothing.
        how: &'static str,
    },
    /// A cosine that cannot be.
    #[error("step {step} has the cosine {cosine}")]
    Cosine {
        /// Which step, from 0.
        step: usize,
        /// The number.
        cosine: f64,
    },
    /// Figures that no measurement has.
    #[error("step {step} was not measured: {source}")]
    Figures {
        /// Which step, from 0.
        step: usize,
        /// What is wrong.
        source: MeasureError,
    },
}

impl Equivalence {
    /// Checks all that can be checked without the chains.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), EquivalenceError> {
        if self.format != 1 {
            return Err(EquivalenceError::Format(self.format));
        }
        for model in [&self.model, &self.other] {
            model.parse::<ModelId>().map_err(|_| EquivalenceError::Model(model.chars().take(200).collect()))?;
        }
        if !(1..=STEPS_MAX).contains(&self.steps.len()) {
            return Err(EquivalenceError::Steps(self.steps.len()));
        }
        let mut seen = BTreeSet::new();
        for (step, exchange) in self.steps.iter().enumerate() {
            let block_index = exchange.block_index;
            let repeated = |how| EquivalenceError::Repeated { step, block_index, how };
            if exchange.own == exchange.other {
                return Err(repeated("for itself"));
            }
            if !seen.insert(block_index) {
                return Err(repeated("a second time"));
            }
            exchange.check(step)?;
        }
        Ok(())
    }

    /// The last step whose divergence together is within a bound: the most blocks exchanged. Divergence need not grow with every step, so
    /// all are looked at.
    pub fn within(&self, kl_max: f64) -> Option<(usize, &Step)> {
        self.steps.iter().enumerate().rev().find(|(_, step)| step.together.kl.mean <= kl_max)
    }
}

impl Step {
    fn check(&self, step: usize) -> Result<(), EquivalenceError> {
        if !(-1.0001..=1.0001).contains(&self.cosine) {
            return Err(EquivalenceError::Cosine { step, cosine: self.cosine });
        }
        for Figures { rows, kl, same_top_share } in [self.alone, self.together] {
            check_figures(rows, kl, same_top_share).map_err(|source| EquivalenceError::Figures { step, source })?;
        }
        Ok(())
    }
}

/// Two blocks in the same place of two chains, of which one could stand for the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// Its place in both chains.
    pub block_index: usize,
    /// The first chain's.
    pub own: Digest,
    /// The second chain's.
    pub other: Digest,
}

/// Why no blocks of two models can be compared.
#[derive(Debug, thiserror::Error)]
pub enum PairsError {
    /// Layers that do not correspond.
    #[error("{0} has {1} blocks, {2} has {3}")]
    Blocks(ModelId, usize, ModelId, usize),
    /// They say different tokens.
    #[error("{0} and {1} do not have the same tokenizer")]
    Tokenizer(ModelId, ModelId),
    /// What changes its blocks is not measured with them.
    #[error("{0} is base and adapters: exchange blocks of its base")]
    Adapted(ModelId),
    /// Nothing can be exchanged.
    #[error("{0} and {1} have no two different blocks in one place that have the same shape and hyper-parameters")]
    None(ModelId, ModelId),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The places where two models have different blocks, one of which could stand for the other: of the same kind, hyper-parameters and tensors'
/// shapes. What they hold as weights may be of different formats.
///
/// # Errors
/// When there is none, or the store fails.
pub async fn pairs(zoo: &Zoo, (id, chain): (&ModelId, &Chain), (other_id, other): (&ModelId, &Chain)) -> Result<Vec<Pair>, PairsError> {
    for (id, chain) in [(id, chain), (other_id, other)] {
        if !chain.adapters.is_empty() {
            return Err(PairsError::Adapted(id.clone()));
        }
    }
    if chain.blocks.len() != other.blocks.len() {
        return Err(PairsError::Blocks(id.clone(), chain.blocks.len(), other_id.clone(), other.blocks.len()));
    }
    if chain.assets.tokenizer != other.assets.tokenizer {
        return Err(PairsError::Tokenizer(id.clone(), other_id.clone()));
    }
    let mut pairs = Vec::new();
    for (block_index, (own, other)) in std::iter::zip(&chain.blocks, &other.blocks).enumerate() {
        if own == other {
            continue;
        }
        if interchangeable(&zoo.read_block(*own).await?, &zoo.read_block(*other).await?) {
            pairs.push(Pair { block_index, own: *own, other: *other });
        }
    }
    match pairs.is_empty() {
        true => Err(PairsError::None(id.clone(), other_id.clone())),
        false => Ok(pairs),
    }
}

fn interchangeable(a: &Block, b: &Block) -> bool {
    let shapes = |block: &Block| block.tensors.iter().map(|(role, tensor)| (role.clone(), tensor.shape.clone())).collect::<Vec<_>>();
    (a.width, &a.params) == (b.width, &b.params) && shapes(a) == shapes(b)
}

/// A chain with some of its blocks exchanged.
pub fn exchanged(chain: &Chain, steps: impl IntoIterator<Item = (usize, Digest)>) -> Chain {
    let mut chain = chain.clone();
    for (index, block) in steps {
        chain.blocks[index] = block;
    }
    chain
}

#[cfg(test)]
mod tests;
