//! Sketches as bytes, what they hold of deep chains, and what their distance says.

use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::relatives::samples::SAMPLE_COUNT;
use crate::relatives::testing::{blocks, chain};

fn sketch(blocks: &[Block], sample: impl Fn(usize) -> u16) -> Sketch {
    let blocks: Vec<(Digest, &Block)> = blocks.iter().map(|block| (crate::canonical::digest(block), block)).collect();
    let samples = |index: usize, _: &str| Ok::<_, Infallible>(Samples([sample(index); SAMPLE_COUNT]));
    Sketch::new(&blocks, &[], &Assets::default(), samples).unwrap()
}

fn one() -> u16 {
    half::bf16::from_f32(1.0).to_bits()
}

#[test]
fn a_sketch_reads_back_and_every_flipped_byte_is_noticed() {
    let sketch = sketch(&blocks(2, 0), |index| index as u16);
    let bytes = sketch.to_bytes();
    assert_eq!(Sketch::parse(&bytes).unwrap(), sketch);
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        assert!(Sketch::parse(&bad).is_err(), "byte {at}");
    }
    for len in [0, 7, 63, 64, bytes.len() - 1] {
        assert!(Sketch::parse(&bytes[..len]).is_err(), "{len} bytes");
    }
    assert!(Sketch::parse(&[bytes.as_slice(), &[0]].concat()).is_err(), "one byte more");
}

#[test]
fn counts_that_no_chain_has_are_refused_before_anything_is_taken() {
    let mut bytes = sketch(&blocks(1, 0), |_| 0).to_bytes();
    bytes[52..56].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(Sketch::parse(&bytes), Err(SketchError::Count("tensors")));
    bytes[52..56].copy_from_slice(&1000u32.to_le_bytes());
    assert!(matches!(Sketch::parse(&bytes), Err(SketchError::Length { .. })));
}

#[test]
fn deep_chains_are_sampled_in_some_layers_and_stay_small() {
    for (layers, sampled) in [(1, 1), (16, 16), (17, 16), (126, 16)] {
        let blocks = blocks(layers, 0);
        let roles = sampled_roles(&blocks.iter().collect::<Vec<_>>());
        assert_eq!(roles.len(), 6 * sampled, "{layers} layers");
        assert_eq!((roles[0], roles[roles.len() - 1]), ((1, "q.weight"), (2 * layers, "down.weight")), "first and last, {layers} layers");
        let distinct: std::collections::BTreeSet<_> = roles.iter().collect();
        assert_eq!(distinct.len(), roles.len());
        let bytes = sketch(&blocks, |_| one()).to_bytes().len();
        assert!(bytes < 18_000, "{layers} layers: {bytes} bytes");
    }
    assert!(sketch(&blocks(0, 0), |_| 0).distance(&sketch(&blocks(0, 0), |_| 0)).is_none(), "nothing to compare");
}

#[test]
fn shapes_must_agree_but_for_tables_and_formats_count() {
    let base = sketch(&blocks(2, 0), |_| one());
    assert_eq!(base.distance(&sketch(&chain(2, 16, Dtype::Bf16, 0, 107), |_| one())), Some(0.0), "the table may have more rows");
    assert_eq!(base.distance(&sketch(&chain(2, 17, Dtype::Bf16, 0, 100), |_| one())), None);
    assert_eq!(base.distance(&sketch(&blocks(3, 0), |_| one())), None);
    let other_format = base.distance(&sketch(&chain(2, 16, Dtype::Int8 { group: 32 }, 0, 100), |_| one())).unwrap();
    assert!((other_format - FORMAT_PENALTY).abs() < 1e-6, "{other_format}");
    // One block of four differs in all of its matrices: 4 of 12.
    let part = base.distance(&sketch(&blocks(2, 0), |index| if index == 1 { 0 } else { one() })).unwrap();
    assert!((part - 4.0 / 12.0).abs() < 1e-6, "{part}");
}

proptest! {
    #[test]
    fn no_bytes_make_parsing_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), counts in any::<[u8; 5]>()) {
        if bytes.len() >= HEADER_BYTES {
            bytes[..8].copy_from_slice(MAGIC);
            for (index, count) in counts.into_iter().enumerate() {
                bytes[40 + 4 * index..44 + 4 * index].copy_from_slice(&u32::from(count % 6).to_le_bytes());
            }
        }
        let _ = Sketch::parse(&bytes);
    }
}
