//! What stands before the chunks of an encoded tensor: who the base is, and how long each chunk is. Parsed before anything is decoded,
//! so that a reader can fetch the base first and knows every length.

use std::ops::Range;

use ashlar_kernels::format::Dtype;

use super::codec::Codec;
use super::{Base, CHUNK_BYTES, DEPTH_MAX, Encoding, EncodingError};
use crate::digest::Digest;

/// Bytes before base and chunk table.
const FIXED_BYTES: usize = 8;
const DIGEST_BYTES: usize = 32;
const CHUNK_LOG_MIN: u8 = 12;
const CHUNK_LOG_MAX: u8 = 20;
const _: () = assert!(CHUNK_BYTES.is_power_of_two() && CHUNK_BYTES <= 1 << CHUNK_LOG_MAX && CHUNK_BYTES >= 1 << CHUNK_LOG_MIN);

/// The base that a delta names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseName {
    /// Its tensor digest; its dtype and shape are the delta's own.
    pub digest: Digest,
    /// Deltas that its writer knew to lie under it: less than [`DEPTH_MAX`]. It may have been stored anew since, in another form; a reader
    /// that follows bases stops after [`DEPTH_MAX`] of them.
    pub depth: u8,
}

/// What a reader must know before it decodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prelude {
    /// `Some` for a delta.
    pub base: Option<BaseName>,
    /// Deltas on the way to a tensor that needs no base: 0 for solo, else one more than the base's depth.
    pub depth: u8,
    /// Bytes of the decoded payload.
    pub raw_bytes: usize,
    /// Raw bytes of every chunk but the last, which may be shorter.
    pub chunk_bytes: usize,
    /// Bytes of the encoded form, prelude included.
    pub encoded_bytes: usize,
    pub(super) codec: Codec,
    /// Where each chunk ends in the encoded form, after where the first begins.
    ends: Vec<usize>,
}

impl Prelude {
    /// How many chunks there are.
    pub fn chunk_count(&self) -> usize {
        self.ends.len() - 1
    }

    /// Where chunk `index` lies in the decoded payload.
    pub fn chunk_range(&self, index: usize) -> Option<Range<usize>> {
        let start = (index < self.chunk_count()).then(|| index * self.chunk_bytes)?;
        Some(start..self.raw_bytes.min(start + self.chunk_bytes))
    }

    /// Where an existing chunk lies in the encoded form.
    pub(super) fn encoded_range(&self, index: usize) -> Range<usize> {
        self.ends[index]..self.ends[index + 1]
    }
}

/// Bytes after a tensor file's header that tell its base.
pub const BASE_NAME_BYTES: usize = FIXED_BYTES + DIGEST_BYTES;

/// Reads what a tensor is stored over from the first [`BASE_NAME_BYTES`] (or more) after its file's header; `None` for solo.
///
/// # Errors
/// When the encoding is unknown or raw, or the depth is impossible.
pub fn parse_base(encoding: u8, start: &[u8]) -> Result<Option<BaseName>, EncodingError> {
    let digest_bytes = digest_bytes(encoding)?;
    let expected = FIXED_BYTES + digest_bytes;
    let start = start.get(..expected).ok_or(EncodingError::Short { expected, actual: start.len() })?;
    base_name(start[1], &start[FIXED_BYTES..])
}

fn digest_bytes(encoding: u8) -> Result<usize, EncodingError> {
    match encoding {
        e if e == Encoding::Solo as u8 => Ok(0),
        e if e == Encoding::Delta as u8 => Ok(DIGEST_BYTES),
        other => Err(EncodingError::Unknown(other)),
    }
}

/// The base out of depth and digest, which has no bytes for solo.
fn base_name(depth: u8, digest: &[u8]) -> Result<Option<BaseName>, EncodingError> {
    match <[u8; DIGEST_BYTES]>::try_from(digest) {
        Ok(digest) if (1..=DEPTH_MAX).contains(&depth) => Ok(Some(BaseName { digest: Digest(digest), depth: depth - 1 })),
        Err(_) if depth == 0 => Ok(None),
        _ => Err(EncodingError::Prelude("depth")),
    }
}

/// Reads the prelude of a tensor of this dtype and shape. `bytes` is all that follows the file's header, `encoding` the header's byte.
///
/// # Errors
/// When the encoding is unknown or raw, a field is impossible, or the chunks do not end where `bytes` does. Allocates the decoding tables
/// (at most 128 KiB) and eight bytes for each chunk that dtype and shape imply, once `bytes` is known to hold what describes them.
pub fn parse(encoding: u8, dtype: Dtype, rows: usize, cols: usize, bytes: &[u8]) -> Result<Prelude, EncodingError> {
    let raw_bytes = dtype.bytes(rows, cols).filter(|bytes| *bytes > 0).ok_or(EncodingError::Shape)?;
    let digest_bytes = digest_bytes(encoding)?;
    let short = |expected| EncodingError::Short { expected, actual: bytes.len() };
    let (fixed, rest) = bytes.split_first_chunk::<FIXED_BYTES>().ok_or(short(FIXED_BYTES))?;
    let [chunk_log, depth, zeros @ .., a, b] = fixed;
    let codec_bytes = usize::from(u16::from_le_bytes([*a, *b]));
    if !(CHUNK_LOG_MIN..=CHUNK_LOG_MAX).contains(chunk_log) {
        return Err(EncodingError::Prelude("chunk size"));
    }
    if zeros.iter().any(|byte| *byte != 0) {
        return Err(EncodingError::Prelude("reserved byte"));
    }
    let chunk_bytes = 1usize << chunk_log;
    let chunk_count = raw_bytes.div_ceil(chunk_bytes);
    let expected = chunk_count
        .checked_mul(4)
        .and_then(|table| table.checked_add(FIXED_BYTES + digest_bytes + codec_bytes))
        .ok_or(EncodingError::Shape)?;
    let (digest, rest) = rest.split_at_checked(digest_bytes).ok_or(short(expected))?;
    let (mut code, rest) = rest.split_at_checked(codec_bytes).ok_or(short(expected))?;
    let table = rest.get(..4 * chunk_count).ok_or(short(expected))?;
    let base = base_name(*depth, digest)?;
    let codec = Codec::read(dtype, base.is_some(), &mut code)?;
    if !code.is_empty() {
        return Err(EncodingError::Prelude("length of its models"));
    }
    let mut ends = Vec::with_capacity(chunk_count + 1);
    let mut end = expected;
    ends.push(end);
    for len in table.chunks_exact(4) {
        let len = u32::from_le_bytes(len.try_into().expect("chunks of 4"));
        end = end.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
        ends.push(end);
    }
    if end != bytes.len() {
        return Err(EncodingError::Length { expected: end, actual: bytes.len() });
    }
    Ok(Prelude { base, depth: *depth, raw_bytes, chunk_bytes, encoded_bytes: end, codec, ends })
}

/// A prelude whose chunk table, its last bytes, is still all zero.
pub(super) fn head(raw_bytes: usize, base: Option<&Base<'_>>, codec: &Codec) -> Vec<u8> {
    let mut code = Vec::new();
    codec.write(&mut code);
    let [a, b] = u16::try_from(code.len()).expect("16 models of at most 512 bytes").to_le_bytes();
    let depth = base.map_or(0, |base| base.depth + 1);
    let mut head = vec![CHUNK_BYTES.trailing_zeros() as u8, depth, 0, 0, 0, 0, a, b];
    if let Some(base) = base {
        head.extend_from_slice(&base.digest.0);
    }
    head.extend_from_slice(&code);
    head.resize(head.len() + 4 * raw_bytes.div_ceil(CHUNK_BYTES), 0);
    head
}
