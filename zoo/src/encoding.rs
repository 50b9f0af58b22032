//! Lossless forms of a tensor's payload: alone (solo), or as the difference to a relative of the same dtype and shape (delta).
//! Owns the bytes that follow the header of a tensor file that is not raw (docs/block-format.md, "Encodings"). It does no IO, and
//! knows neither where a base lies nor who its own base is. Start with [`encode`], then `chunk`.

mod chunk;
mod codec;
mod contexts;
mod model;
mod planes;
mod prelude;
mod rans;
mod symbols;

use ashlar_kernels::format::Dtype;

use crate::digest::Digest;
use codec::Codec;
pub use prelude::{BASE_NAME_BYTES, BaseName, Prelude, parse, parse_base};

/// Deltas that may lie under one another: a restore reads at most this many files and one more.
pub const DEPTH_MAX: u8 = 4;

/// Raw bytes of a chunk; the last one of a tensor may be shorter. Chunks are decoded apart from each other.
pub const CHUNK_BYTES: usize = 1 << 19;

/// A form that saves less than a 33rd (3 %) is not stored: a raw tensor is mapped, shared between processes and read at the speed of
/// memory, an encoded one is decoded into memory of its own.
const WORTH_DIVISOR: usize = 33;

/// How the bytes after a tensor file's header are to be read; the value is the header's encoding byte (0 is raw).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// Compressed by itself.
    Solo = 1,
    /// Compressed as the difference to a base.
    Delta = 2,
}

/// What follows the header of a tensor file that is not raw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The header's encoding byte.
    pub encoding: Encoding,
    /// Prelude and chunks.
    pub bytes: Vec<u8>,
}

/// The base of a delta.
#[derive(Debug, Clone, Copy)]
pub struct Base<'a> {
    /// Its tensor digest.
    pub digest: Digest,
    /// Deltas that lie under it: 0 where it is raw or solo.
    pub depth: u8,
    /// Its payload, of the same dtype and shape.
    pub payload: &'a [u8],
}

/// Why bytes are no encoded tensor of their dtype and shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodingError {
    /// An encoding byte of a later version, or raw.
    #[error("its encoding {0} is not known to this build")]
    Unknown(u8),
    /// The shape is none that the format stores.
    #[error("its shape has no size")]
    Shape,
    /// The file ends within prelude or chunk table.
    #[error("its encoded form has {actual} bytes, its prelude and chunk table alone take {expected}")]
    Short {
        /// Bytes of prelude and chunk table.
        expected: usize,
        /// Bytes that are there.
        actual: usize,
    },
    /// A field of the prelude holds what cannot be.
    #[error("its encoded form has a bad {0}")]
    Prelude(&'static str),
    /// Chunks are missing or something follows them.
    #[error("its chunks end at byte {expected} of its encoded form, which has {actual}")]
    Length {
        /// Where the chunk table says that the last chunk ends.
        expected: usize,
        /// Bytes that are there.
        actual: usize,
    },
    /// A delta was to be decoded without its base.
    #[error("it is a delta and its base was not given")]
    BaseMissing,
    /// The base is none, being of another length.
    #[error("its base has {actual} bytes, {expected} belong there")]
    BaseLength {
        /// Raw bytes of the tensor.
        expected: usize,
        /// Bytes of the base.
        actual: usize,
    },
    /// A chunk that the tensor does not have.
    #[error("it has no chunk {0}")]
    NoChunk(usize),
    /// The room for the decoded bytes is not what they need.
    #[error("{expected} bytes were to be decoded into room for {actual}")]
    OutLength {
        /// Raw bytes of the tensor or chunk.
        expected: usize,
        /// Bytes of the room.
        actual: usize,
    },
    /// A chunk that does not decode to exactly its raw bytes.
    #[error("its chunk {index} is damaged: {what}")]
    Chunk {
        /// Which one.
        index: usize,
        /// What is wrong with it.
        what: ChunkError,
    },
}

/// What is wrong with a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// It ends within a stream or its head.
    #[error("it ends too early")]
    Short,
    /// Bytes follow its last stream.
    #[error("bytes follow its last stream")]
    Trailing,
    /// A head that no writer writes.
    #[error("a head is malformed")]
    Head,
    /// A stream that the entropy coder refuses, or of another length than it must have.
    #[error("a stream does not decode to its length")]
    Stream,
    /// Side bytes of the differences are missing or left over.
    #[error("its side bytes are not those that its symbols take")]
    Side,
}

/// The smaller form (a delta that saves half is taken at once) if it is worth it, or `None` where raw is best: less than 3 % saved, or no such shape. A base that would make the
/// chain longer than [`DEPTH_MAX`], or whose payload has another length, is passed over.
pub fn encode(dtype: Dtype, rows: usize, cols: usize, payload: &[u8], base: Option<&Base<'_>>) -> Option<Encoded> {
    if payload.is_empty() || dtype.bytes(rows, cols) != Some(payload.len()) {
        return None;
    }
    let base = base.filter(|base| base.depth < DEPTH_MAX && base.payload.len() == payload.len());
    let delta = base.map(|base| write(dtype, payload, Some(base)));
    // Solo forms seldom save half (a third of bf16), so a delta that does is not measured against one.
    let best = match delta {
        Some(delta) if delta.bytes.len() <= payload.len() / 2 => delta,
        delta => {
            let solo = write(dtype, payload, None);
            delta.filter(|delta| delta.bytes.len() < solo.bytes.len()).unwrap_or(solo)
        }
    };
    (best.bytes.len() <= payload.len() - payload.len().div_ceil(WORTH_DIVISOR)).then_some(best)
}

/// Prelude and chunks of one form.
fn write(dtype: Dtype, payload: &[u8], base: Option<&Base<'_>>) -> Encoded {
    let codec = Codec::choose(dtype, payload, base.map(|base| base.payload));
    let mut encoder = chunk::Encoder::new(&codec);
    let mut bytes = prelude::head(payload.len(), base, &codec);
    let table = bytes.len() - 4 * payload.len().div_ceil(CHUNK_BYTES);
    for (index, raw) in payload.chunks(CHUNK_BYTES).enumerate() {
        let start = bytes.len();
        let at = index * CHUNK_BYTES;
        encoder.encode(raw, base.map_or(&[], |base| &base.payload[at..at + raw.len()]), &mut bytes);
        let len = u32::try_from(bytes.len() - start).expect("a chunk is at most little longer than its raw bytes");
        bytes[table + 4 * index..table + 4 * index + 4].copy_from_slice(&len.to_le_bytes());
    }
    Encoded { encoding: if base.is_some() { Encoding::Delta } else { Encoding::Solo }, bytes }
}

/// Decodes all of a tensor into `out`, which has exactly its raw length. `bytes` is what [`parse`] read, `base` the payload of
/// `prelude.base`, `None` for solo.
///
/// # Errors
/// When `out` or `base` has another length, or a chunk is damaged; `out` then holds anything.
pub fn decode(prelude: &Prelude, bytes: &[u8], base: Option<&[u8]>, out: &mut [u8]) -> Result<(), EncodingError> {
    if out.len() != prelude.raw_bytes {
        return Err(EncodingError::OutLength { expected: prelude.raw_bytes, actual: out.len() });
    }
    for (index, out) in out.chunks_mut(prelude.chunk_bytes).enumerate() {
        decode_chunk(prelude, bytes, index, base, out)?;
    }
    Ok(())
}

/// Decodes chunk `index` into `out`, which has exactly `prelude.chunk_range(index)` bytes, so that callers may spread chunks over
/// cores. `bytes` and `base` are the whole tensor's, as for [`decode`].
///
/// # Errors
/// As [`decode`], and when there is no such chunk.
pub fn decode_chunk(prelude: &Prelude, bytes: &[u8], index: usize, base: Option<&[u8]>, out: &mut [u8]) -> Result<(), EncodingError> {
    let raw = prelude.chunk_range(index).ok_or(EncodingError::NoChunk(index))?;
    if out.len() != raw.len() {
        return Err(EncodingError::OutLength { expected: raw.len(), actual: out.len() });
    }
    if bytes.len() != prelude.encoded_bytes {
        return Err(EncodingError::Length { expected: prelude.encoded_bytes, actual: bytes.len() });
    }
    let base = match (prelude.base, base) {
        (None, _) => &[][..],
        (Some(_), None) => return Err(EncodingError::BaseMissing),
        (Some(_), Some(base)) if base.len() != prelude.raw_bytes => {
            return Err(EncodingError::BaseLength { expected: prelude.raw_bytes, actual: base.len() });
        }
        (Some(_), Some(base)) => &base[raw],
    };
    chunk::decode(&prelude.codec, &bytes[prelude.encoded_range(index)], base, out).map_err(|what| EncodingError::Chunk { index, what })
}

#[cfg(test)]
mod tests;
