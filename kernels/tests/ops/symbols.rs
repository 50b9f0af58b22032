//! What restores stored tensors: every instruction set decodes the reference's symbols, takes as many words, and ends where they end.

use ashlar_kernels::cpu::{self, Isa};
use ashlar_kernels::reference::{self, SYMBOL_STATES, SymbolCode, of_ordinal, of_zigzag, ordinal, zigzag};
use proptest::prelude::*;

use crate::values::Random;

/// Tables of `models` models, each of random shares.
fn tables(models: usize, random: &mut Random) -> Vec<u32> {
    let mut tables = Vec::new();
    for _ in 0..models {
        let end = tables.len() + 2048;
        while tables.len() < end {
            let symbol = random.next() as u32 & 255;
            let frequency = (1 + random.next() as u32 % 700).min((end - tables.len()) as u32);
            tables.extend((0..frequency).map(|offset| symbol | (frequency - 1) << 8 | offset << 20));
        }
    }
    tables
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

proptest! {
    #[test]
    fn symbols_are_the_references(seed in any::<u64>(), models in 0u32..5, count in 0usize..1000, words in 0usize..1200) {
        let mut random = Random(seed);
        let tables = tables(1 << models, &mut random);
        let starts: Vec<u16> = (0..count).map(|_| (random.next() % 32 * 2048) as u16).collect();
        let words: Vec<u8> = (0..2 * words).map(|_| random.next() as u8).collect();
        let code = SymbolCode { tables: &tables, starts: &starts, words: &words };
        let states: [u32; SYMBOL_STATES] = std::array::from_fn(|_| random.next() as u32 | 1 << 16);
        let mut expected = (states, vec![0; count]);
        let taken = reference::decode_symbols(&code, &mut expected.0, &mut expected.1);
        for isa in isas() {
            let mut got = (states, vec![0; count]);
            assert_eq!(cpu::decode_symbols(isa, &code, &mut got.0, &mut got.1), taken, "{isa:?}");
            assert!(taken.is_none() || got == expected, "{isa:?}");
        }
    }

    #[test]
    fn sums_and_classes_are_the_references(seed in any::<u64>(), count in 0usize..300, bounds in 0usize..16) {
        let mut random = Random(seed);
        let base: Vec<u8> = (0..2 * count).map(|_| random.next() as u8).collect();
        let differences: Vec<u8> = (0..count).map(|_| random.next() as u8).collect();
        let bounds: Vec<u8> = (0..bounds).map(|_| random.next() as u8).collect();
        let (mut sums, mut classes) = (vec![0; 2 * count], vec![0; count]);
        reference::add_differences(&differences, &base, &mut sums);
        reference::exponent_classes(&base, &bounds, &mut classes);
        for isa in isas() {
            let mut got = (vec![0; 2 * count], vec![0; count]);
            cpu::add_differences(isa, &differences, &base, &mut got.0);
            cpu::exponent_classes(isa, &base, &bounds, &mut got.1);
            assert!(got == (sums.clone(), classes.clone()), "{isa:?}");
        }
    }
}

#[test]
fn ordinals_grow_with_their_floats_and_turn_back() {
    for bits in 0..=u16::MAX {
        assert_eq!(of_ordinal(ordinal(bits)), bits);
        assert_eq!(of_zigzag(zigzag(bits)), bits);
    }
    let floats: Vec<u16> =
        [f32::NEG_INFINITY, -2.0, -1.0, -0.0, 0.0, 1e-40, 1.0, 1.5, f32::INFINITY].map(|f| (f.to_bits() >> 16) as u16).into();
    assert!(floats.windows(2).all(|pair| ordinal(pair[0]) < ordinal(pair[1])));
}
