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

const DTYPES: [Dtype; 14] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::Int8 { group: 32 },
    Dtype::Int4 { group: 32 },
    Dtype::Int8Minimum { group: 64 },
    Dtype::Int4Minimum { group: 16 },
    Dtype::Int4Zero { group: 32 },
    Dtype::Fp8 { group: 128 },
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

/// A bf16 payload whose weights are about 0.02, and one that training moved by about `step`.
fn family(count: usize, step: f32) -> (Vec<u8>, Vec<u8>) {
    let mut state = 1u64;
    let mut unit = || {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let mut normal = || (0..6).map(|_| unit()).sum::<f32>() * 0.7;
    let weights: Vec<half::bf16> = (0..count).map(|_| half::bf16::from_f32(0.02 * normal())).collect();
    let tuned = weights.iter().map(|weight| half::bf16::from_f32(weight.to_f32() + step * normal()));
    let bytes = |weights: Vec<half::bf16>| weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    (bytes(tuned.collect()), bytes(weights))
}

#[test]
fn a_tuned_tensor_saves_four_fifths_over_its_base_and_a_third_alone() {
    let (tuned, base) = family(1 << 19, 1e-4);
    let delta = encode(Dtype::Bf16, 512, 1024, &tuned, Some(&Base { digest: Digest([1; 32]), depth: 0, payload: &base })).unwrap();
    assert_eq!(delta.encoding, Encoding::Delta);
    assert!(delta.bytes.len() * 5 < tuned.len(), "{} of {}", delta.bytes.len(), tuned.len());
    let solo = encode(Dtype::Bf16, 512, 1024, &tuned, None).unwrap();
    assert_eq!(solo.encoding, Encoding::Solo);
    assert!(solo.bytes.len() * 10 < tuned.len() * 7, "{} of {}", solo.bytes.len(), tuned.len());
}

#[test]
fn several_chunks_come_back_apart_and_together() {
    let (tuned, base) = family(CHUNK_BYTES + 4097, 1e-3);
    check(Dtype::Bf16, (1, CHUNK_BYTES + 4097), &tuned, &base);
    let base = Base { digest: Digest([1; 32]), depth: 0, payload: &base };
    let encoded = write(Dtype::Bf16, &tuned, Some(&base));
    let prelude = parse(2, Dtype::Bf16, 1, CHUNK_BYTES + 4097, &encoded.bytes).unwrap();
    assert_eq!(prelude.chunk_count(), 3);
    for index in (0..3).rev() {
        let range = prelude.chunk_range(index).unwrap();
        let mut out = vec![0; range.len()];
        decode_chunk(&prelude, &encoded.bytes, index, Some(base.payload), &mut out).unwrap();
        assert!(out == tuned[range], "chunk {index}");
    }
    assert_eq!(decode_chunk(&prelude, &encoded.bytes, 3, Some(base.payload), &mut []), Err(EncodingError::NoChunk(3)));
}

#[test]
fn noise_is_left_raw_and_a_long_chain_is_not_made_longer() {
    let mut state = 3u64;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (state >> 56) as u8
    });
    let noise: Vec<u8> = noise.take(1 << 16).collect();
    assert_eq!(encode(Dtype::Int4 { group: 512 }, 1, 130_000, &noise[..65_508], None), None);
    assert_eq!(encode(Dtype::Bf16, 1, 1 << 15, &noise, None), None);
    let base = |depth| Base { digest: Digest([1; 32]), depth, payload: &noise };
    let encoding = |depth| encode(Dtype::Bf16, 1, 1 << 15, &noise, Some(&base(depth))).map(|encoded| encoded.encoding);
    assert_eq!(encoding(DEPTH_MAX - 1), Some(Encoding::Delta));
    assert_eq!(encoding(DEPTH_MAX), None);
    assert_eq!(encode(Dtype::Bf16, 1, 7, &noise, None), None, "a payload of another length");
}

#[test]
fn what_is_wrong_is_named() {
    let (tuned, base) = family(5000, 1e-4);
    let encoded = write(Dtype::Bf16, &tuned, Some(&Base { digest: Digest([1; 32]), depth: 0, payload: &base }));
    let bytes = &encoded.bytes;
    let parse_of = |bytes: &[u8]| parse(2, Dtype::Bf16, 1, 5000, bytes).map(|_| ());
    assert_eq!(parse(3, Dtype::Bf16, 1, 5000, bytes).map(|_| ()), Err(EncodingError::Unknown(3)));
    assert_eq!(parse(2, Dtype::Bf16, 0, 5000, bytes).map(|_| ()), Err(EncodingError::Shape));
    assert_eq!(parse(2, Dtype::Bf16, usize::MAX, 5000, bytes).map(|_| ()), Err(EncodingError::Shape));
    assert!(matches!(parse_of(&bytes[..5]), Err(EncodingError::Short { .. })));
    assert!(matches!(parse_of(&bytes[..60]), Err(EncodingError::Short { .. })));
    assert!(matches!(parse_of(&bytes[..bytes.len() - 1]), Err(EncodingError::Length { .. })));
    assert!(matches!(parse_of(&[&bytes[..], &[0]].concat()), Err(EncodingError::Length { .. })));
    let changed = |at: usize, to: u8| [&bytes[..at], &[to], &bytes[at + 1..]].concat();
    assert_eq!(parse_of(&changed(0, 40)), Err(EncodingError::Prelude("chunk size")));
    assert_eq!(parse_of(&changed(1, 0)), Err(EncodingError::Prelude("depth")));
    assert_eq!(parse_of(&changed(1, DEPTH_MAX + 1)), Err(EncodingError::Prelude("depth")));
    assert_eq!(parse_of(&changed(3, 1)), Err(EncodingError::Prelude("reserved byte")));
    assert_eq!(parse_of(&changed(40, 13)), Err(EncodingError::Prelude("count of models")));
    let prelude = parse(2, Dtype::Bf16, 1, 5000, bytes).unwrap();
    let mut out = vec![0; tuned.len()];
    assert_eq!(decode(&prelude, bytes, None, &mut out), Err(EncodingError::BaseMissing));
    assert_eq!(decode(&prelude, bytes, Some(&base[2..]), &mut out), Err(EncodingError::BaseLength { expected: 10_000, actual: 9_998 }));
    assert_eq!(decode(&prelude, bytes, Some(&base), &mut out[1..]), Err(EncodingError::OutLength { expected: 10_000, actual: 9_999 }));
    // Each byte of the chunk: its heads, the states and the words.
    let chunk = prelude.encoded_range(0);
    for at in chunk.clone() {
        let bad = changed(at, bytes[at] ^ 0x81);
        let result = decode(&prelude, &bad, Some(&base), &mut out);
        assert!(matches!(result, Err(EncodingError::Chunk { index: 0, .. })) || out != tuned, "byte {at} of the file");
    }
    assert!(matches!(
        decode(&prelude, &changed(chunk.start, 9), Some(&base), &mut out),
        Err(EncodingError::Chunk { index: 0, what: ChunkError::Head })
    ));
}

proptest! {
    #[test]
    fn damaged_bytes_never_panic(
        dtype in prop::sample::select(&DTYPES[..]),
        delta in any::<bool>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (tuned, base) = family(256 * 20, 1e-4);
        let (rows, cols) = (2, 768);
        let len = dtype.bytes(rows, cols).unwrap();
        let base = Base { digest: Digest([7; 32]), depth: 0, payload: &base[..len] };
        let encoded = write(dtype, &tuned[..len], delta.then_some(&base));
        let mut bytes = encoded.bytes;
        for (at, to) in damage {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(prelude) = parse(encoded.encoding as u8, dtype, rows, cols, &bytes) {
            let mut out = vec![0; len];
            let _ = decode(&prelude, &bytes, delta.then_some(base.payload), &mut out);
        }
    }
}
