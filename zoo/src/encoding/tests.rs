//! What is encoded comes back, and what is damaged is an error.

use ashlar_kernels::format::Dtype;
use proptest::prelude::*;

use super::*;

/// Encodes both ways whether worth it or not, and checks that each decodes to `payload`.
fn check(dtype: Dtype, (rows, cols): (usize, usize), payload: &[u8], base: &[u8]) {
    let base = Base { digest: Digest([7; 32]), depth: 2, payload: base };
    for base in [None, Some(&base)] {
        let encoded = write(dtype, payload, base);
        let prelude = parse(encoded.encoding as u8, dtype, rows, cols, &encoded.bytes).unwrap();
        assert_eq!(prelude.base, base.map(|base| BaseName { digest: base.digest, depth: base.depth }));
        let mut out = vec![0xa5; payload.len()];
        decode(&prelude, &encoded.bytes, base.map(|base| base.payload), &mut out).unwrap();
        assert!(out == payload, "{dtype} [{rows}, {cols}]");
    }
}

const DTYPES: [Dtype; 12] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::Int8 { group: 32 },
    Dtype::Int4 { group: 32 },
    Dtype::Int8Minimum { group: 64 },
    Dtype::Int4Minimum { group: 16 },
    Dtype::Int1 { group: 128 },
    Dtype::Q8_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q6K,
];

proptest! {
    #[test]
    fn every_payload_comes_back(
        dtype in prop::sample::select(&DTYPES[..]),
        rows in 1usize..5,
        blocks in 1usize..300,
        seed in any::<u64>(),
        kind in 0u8..4,
    ) {
        let cols = blocks * dtype.block_columns();
        let len = dtype.bytes(rows, cols).unwrap();
        let mut state = seed;
        let mut next = || { state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F); (state >> 56) as u8 };
        let base: Vec<u8> = (0..len).map(|_| next()).collect();
        let payload: Vec<u8> = match kind {
            0 => (0..len).map(|_| next()).collect(),
            1 => vec![0; len],
            2 => base.clone(),
            _ => base.iter().map(|byte| if next() < 40 { byte.wrapping_add(next() & 3) } else { *byte }).collect(),
        };
        check(dtype, (rows, cols), &payload, &base);
    }
}
