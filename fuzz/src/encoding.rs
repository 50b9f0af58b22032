//! Encoded tensors. An input is which encoding, dtype and shape, then the encoded form; the base is made from the shape.

use ashlar_kernels::format::Dtype;
use ashlar_zoo::encoding::{decode, decode_chunk, parse};

const DTYPES: [Dtype; 6] = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Int8 { group: 32 }, Dtype::Q8_0, Dtype::Q4K];
/// Encoding, dtype, rows, and columns in units of 256.
const HEAD_BYTES: usize = 4;

/// Whatever the bytes, a tensor is decoded or refused, and both ways of decoding agree.
pub fn encoding(data: &[u8]) {
    let Some(([encoding, dtype, rows, cols], bytes)) = data.split_first_chunk::<HEAD_BYTES>() else { return };
    let dtype = DTYPES[usize::from(*dtype) % DTYPES.len()];
    let (rows, cols) = (usize::from(*rows), 256 * usize::from(*cols));
    let Ok(prelude) = parse(*encoding, dtype, rows, cols, bytes) else { return };
    let base: Vec<u8> = (0..prelude.raw_bytes).map(|i| (i * 7 + i / 256) as u8).collect();
    let mut whole = vec![0; prelude.raw_bytes];
    let mut pieces = vec![0; prelude.raw_bytes];
    let result = decode(&prelude, bytes, Some(&base), &mut whole);
    let mut chunks = pieces.chunks_mut(prelude.chunk_bytes).enumerate();
    let each = chunks.try_for_each(|(index, out)| decode_chunk(&prelude, bytes, index, Some(&base), out));
    assert_eq!(result, each);
    assert!(result.is_err() || whole == pieces);
}
