//! Packed output projections, by the tensor that each was made of: heads of one tensor share it, and a token table of that tensor
//! (a tied one) is read out of it, so that no map is kept beside it. Here is also how bytes that blocks share are counted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ashlar_kernels::ops::Ops;
use ashlar_zoo::digest::Digest;

/// The output projections of one device. Blocks hold them; whichever is dropped last frees one.
pub struct Outputs<B: Ops>(Mutex<BTreeMap<Digest, Weak<B::Linear>>>);

impl<B: Ops> Default for Outputs<B> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<B: Ops> Outputs<B> {
    /// The projection made of `tensor`, if a block holds it.
    pub(super) fn find(&self, tensor: Digest) -> Option<Arc<B::Linear>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&tensor).and_then(Weak::upgrade)
    }

    /// As [`Outputs::find`], or else what `pack` makes of it. Others wait meanwhile: there are never two of one tensor, which
    /// [`total_bytes`] relies on.
    pub(super) fn find_or_pack<E>(&self, tensor: Digest, pack: impl FnOnce() -> Result<B::Linear, E>) -> Result<Arc<B::Linear>, E> {
        let mut outputs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = outputs.get(&tensor).and_then(Weak::upgrade) {
            return Ok(held);
        }
        let packed = Arc::new(pack()?);
        outputs.retain(|_, output| output.strong_count() > 0);
        outputs.insert(tensor, Arc::downgrade(&packed));
        Ok(packed)
    }
}

/// What the weights of a block take on the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// Bytes of this block alone: packed layers, vectors, and the mapped bytes of lookup tables.
    pub own: u64,
    /// The output projection that it holds, by its tensor, and the bytes of that: a head's, and that of an embedding whose rows are read
    /// out of one. Each of them keeps it in memory, so each names it.
    pub output: Option<(Digest, u64)>,
}

/// Bytes that these blocks take together. The blocks are distinct; an output projection that several hold counts once, for as long as
/// one of them is there.
pub fn total_bytes(blocks: impl IntoIterator<Item = WeightBytes>) -> u64 {
    let (mut own, mut outputs) = (0, BTreeMap::new());
    for block in blocks {
        own += block.own;
        outputs.extend(block.output);
    }
    own + outputs.values().sum::<u64>()
}

#[cfg(test)]
mod tests;
