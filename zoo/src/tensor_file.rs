//! The 64-byte header of a stored tensor, and the digest that identifies it (docs/block-format.md, "Tensors"). No IO.

use ashlar_kernels::format::Dtype;

use crate::digest::Digest;
use crate::manifest::TensorRef;

/// Bytes before the payload; a map of the file is page-aligned, so the payload is 64-byte aligned.
pub const HEADER_BYTES: usize = 64;

const MAGIC: &[u8; 8] = b"ASHLART1";
/// The header's byte of a file whose payload is the tensor's bytes as they are; others are [`crate::encoding`]'s.
pub const ENCODING_RAW: u8 = 0;

/// What a header states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// [`ENCODING_RAW`], or how what follows is encoded.
    pub encoding: u8,
    /// Element format.
    pub dtype: Dtype,
    /// `[K]` or `[N, K]`.
    pub shape: Vec<u64>,
}

/// Why the bytes are not the tensor that they should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TensorFileError {
    /// Shorter than a header.
    #[error("it has {0} bytes, less than a header")]
    Short(usize),
    /// Another kind of file, or an overwritten header.
    #[error("its header does not start with ASHLART1")]
    Magic,
    /// An encoded payload where a raw one belongs, or an encoding that this build does not know.
    #[error("its encoding is {0}, and raw bytes are expected")]
    Encoding(u8),
    /// Header fields that do not agree with themselves.
    #[error("its header is malformed")]
    Header,
    /// Header of another tensor.
    #[error("its header says {actual}, the block says {expected}")]
    Mismatch {
        /// What the block refers to.
        expected: String,
        /// What the file says.
        actual: String,
    },
    /// Payload of another length.
    #[error("its payload has {actual} bytes, {expected} belong there")]
    Length {
        /// Bytes that dtype and shape imply.
        expected: usize,
        /// Bytes that are there.
        actual: usize,
    },
    /// A flipped bit, or the wrong payload.
    #[error("its bytes have the digest {0}")]
    Digest(Digest),
}

/// Rows and columns of a shape of one or two dimensions, where both fit `usize` and none is zero.
pub fn rows_cols(shape: &[u64]) -> Option<(usize, usize)> {
    let dim = |d: u64| usize::try_from(d).ok().filter(|d| *d > 0);
    match shape {
        [cols] => Some((1, dim(*cols)?)),
        [rows, cols] => Some((dim(*rows)?, dim(*cols)?)),
        _ => None,
    }
}

/// Bytes of the payload of a tensor; `None` when the shape is not one that the format stores.
pub fn payload_bytes(dtype: Dtype, shape: &[u64]) -> Option<usize> {
    let (rows, cols) = rows_cols(shape)?;
    dtype.bytes(rows, cols)
}

/// Identity of dtype, shape and payload.
pub fn digest(dtype: Dtype, shape: &[u64], payload: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(dtype.to_string().as_bytes());
    hasher.update(&[0, u8::try_from(shape.len()).expect("shapes have one or two dimensions")]);
    for dim in shape {
        hasher.update(&dim.to_le_bytes());
    }
    hasher.update(payload);
    Digest(*hasher.finalize().as_bytes())
}

/// The header of a tensor whose payload is raw or encoded so.
pub fn header(encoding: u8, dtype: Dtype, shape: &[u64]) -> [u8; HEADER_BYTES] {
    let name = dtype.to_string();
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8] = encoding;
    header[9] = u8::try_from(shape.len()).expect("shapes have one or two dimensions");
    header[10..12].copy_from_slice(&u16::try_from(name.len()).expect("dtype names are short").to_le_bytes());
    let mut at = 16;
    for dim in shape {
        header[at..at + 8].copy_from_slice(&dim.to_le_bytes());
        at += 8;
    }
    header[at..at + name.len()].copy_from_slice(name.as_bytes());
    header
}

/// What a header states; its encoding may be any.
///
/// # Errors
/// When it is no header that this build can read.
pub fn parse_header(file: &[u8]) -> Result<Header, TensorFileError> {
    let header = file.get(..HEADER_BYTES).ok_or(TensorFileError::Short(file.len()))?;
    if &header[..8] != MAGIC {
        return Err(TensorFileError::Magic);
    }
    let dims = usize::from(header[9]);
    let name_len = usize::from(u16::from_le_bytes([header[10], header[11]]));
    if !(1..=2).contains(&dims) || name_len > HEADER_BYTES - 16 - 8 * dims || header[12..16] != [0; 4] {
        return Err(TensorFileError::Header);
    }
    let shape = header[16..16 + 8 * dims].chunks_exact(8).map(|dim| u64::from_le_bytes(dim.try_into().expect("chunks of 8"))).collect();
    let (name, rest) = header[16 + 8 * dims..].split_at(name_len);
    let name = std::str::from_utf8(name).map_err(|_| TensorFileError::Header)?;
    let dtype = name.parse().map_err(|_| TensorFileError::Header)?;
    if rest.iter().any(|b| *b != 0) {
        return Err(TensorFileError::Header);
    }
    Ok(Header { encoding: header[8], dtype, shape })
}

/// Checks that `file` says it is of the dtype and shape of `expected`.
///
/// # Errors
/// When its header cannot be read, or says otherwise.
pub fn verify_shape(expected: &TensorRef, file: &[u8]) -> Result<(), TensorFileError> {
    let Header { dtype, shape, .. } = parse_header(file)?;
    if dtype != expected.dtype || shape != expected.shape {
        let expected = format!("{} {:?}", expected.dtype, expected.shape);
        return Err(TensorFileError::Mismatch { expected, actual: format!("{dtype} {shape:?}") });
    }
    Ok(())
}

/// Checks that `file` (header and raw payload) is the tensor `expected`.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn verify(expected: &TensorRef, file: &[u8]) -> Result<(), TensorFileError> {
    verify_shape(expected, file)?;
    let actual = verify_alone(file)?;
    if actual != expected.digest { Err(TensorFileError::Digest(actual)) } else { Ok(()) }
}

/// Digest of a file with a raw payload, having checked that header and length agree.
///
/// # Errors
/// When the header cannot be read or the payload has another length than it implies.
pub fn verify_alone(file: &[u8]) -> Result<Digest, TensorFileError> {
    let Header { encoding, dtype, shape } = parse_header(file)?;
    if encoding != ENCODING_RAW {
        return Err(TensorFileError::Encoding(encoding));
    }
    let payload = &file[HEADER_BYTES..];
    let expected = payload_bytes(dtype, &shape).ok_or(TensorFileError::Header)?;
    if payload.len() != expected {
        return Err(TensorFileError::Length { expected, actual: payload.len() });
    }
    Ok(digest(dtype, &shape, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_reads_back_and_every_flipped_byte_is_noticed() {
        let shape = vec![3, 2];
        let payload: Vec<u8> = (0..24).collect();
        let expected = TensorRef { digest: digest(Dtype::F32, &shape, &payload), dtype: Dtype::F32, shape };
        let file: Vec<u8> = header(ENCODING_RAW, Dtype::F32, &expected.shape).into_iter().chain(payload).collect();
        assert_eq!(verify(&expected, &file), Ok(()));
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 1;
            assert!(verify(&expected, &bad).is_err(), "byte {at}");
        }
        assert!(verify(&expected, &file[..file.len() - 1]).is_err());
    }

    #[test]
    fn dtype_and_shape_are_part_of_the_identity() {
        let payload = [0u8; 8];
        let digests = [
            digest(Dtype::F32, &[2], &payload),
            digest(Dtype::F32, &[1, 2], &payload),
            digest(Dtype::F32, &[2, 1], &payload),
            digest(Dtype::F16, &[4], &payload),
            digest(Dtype::Bf16, &[4], &payload),
        ];
        assert_eq!(digests.iter().collect::<std::collections::BTreeSet<_>>().len(), digests.len());
    }
}
