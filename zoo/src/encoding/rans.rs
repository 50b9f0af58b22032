//! Range asymmetric numeral systems (Duda, arXiv 1311.2540, section 3) with 64 interleaved states over one stream of 16-bit words: a symbol
//! costs the logarithm of its share, also less than a bit, and each may have a model of its own at no cost to the decoder. The decoder is
//! `ashlar_kernels::cpu::decode_symbols`, which has the formula; its inverse is here.

use ashlar_kernels::cpu::{Isa, decode_symbols};
use ashlar_kernels::reference::{SYMBOL_STATES, SymbolCode};

use super::ChunkError;
use super::model::{Model, SCALE_BITS, Tables};

/// A state lies in `LOW..2^32` between symbols, and is LOW before the first symbol that is encoded.
const LOW: u32 = 1 << 16;

/// What a symbol takes of a state: where its share begins and how large it is.
#[derive(Clone, Copy)]
struct Share {
    start: u32,
    frequency: u32,
    /// `2^63 / frequency`, rounded up: a product with it is a division by the frequency, exact for all states and twice as fast.
    inverse: u64,
}

/// Shares of all symbols of some models.
pub(super) struct Shares(Vec<[Share; 256]>);

impl Shares {
    pub(super) fn of(models: &[Model]) -> Self {
        let shares = models.iter().map(|model| {
            let mut start = 0;
            model.frequencies.map(|frequency| {
                let share = Share { start, frequency: u32::from(frequency), inverse: (1 << 63) / u64::from(frequency.max(1)) + 1 };
                start += share.frequency;
                share
            })
        });
        Self(shares.collect())
    }
}

/// Appends the code of `symbols`: the states, u32 each, then the words. `model(i)` is symbol i's; the symbol has a share in it.
pub(super) fn encode(shares: &Shares, symbols: &[u8], model: impl Fn(usize) -> usize, out: &mut Vec<u8>) {
    let mut states = [LOW; SYMBOL_STATES];
    let mut words: Vec<u16> = Vec::with_capacity(symbols.len() / 2);
    // The decoder takes back what came last, so the last symbol goes first.
    for (i, symbol) in symbols.iter().enumerate().rev() {
        let share = shares.0[model(i)][usize::from(*symbol)];
        let state = &mut states[i % SYMBOL_STATES];
        if u64::from(*state) >= u64::from(share.frequency) << (32 - SCALE_BITS) {
            words.push(*state as u16);
            *state >>= 16;
        }
        let quotient = ((u128::from(*state) * u128::from(share.inverse)) >> 63) as u32;
        *state = (quotient << SCALE_BITS) + (*state - quotient * share.frequency) + share.start;
    }
    states.iter().for_each(|state| out.extend_from_slice(&state.to_le_bytes()));
    words.iter().rev().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
}

/// A code that is decoded piece by piece.
pub(super) struct Code<'a> {
    tables: &'a Tables,
    words: &'a [u8],
    states: [u32; SYMBOL_STATES],
    isa: Isa,
}

impl<'a> Code<'a> {
    pub(super) fn new(isa: Isa, tables: &'a Tables, code: &'a [u8]) -> Result<Self, ChunkError> {
        let (heads, words) = code.split_at_checked(4 * SYMBOL_STATES).ok_or(ChunkError::Short)?;
        let mut states = [0; SYMBOL_STATES];
        for (state, head) in states.iter_mut().zip(heads.as_chunks::<4>().0) {
            *state = u32::from_le_bytes(*head);
        }
        Ok(Self { tables, words, states, isa })
    }

    /// Decodes the next `out.len()` symbols, a multiple of the states but for the last piece. `starts` says where each one's model
    /// begins in the tables.
    pub(super) fn next(&mut self, starts: &[u16], out: &mut [u8]) -> Result<(), ChunkError> {
        let code = SymbolCode { tables: self.tables.entries(), starts, words: self.words };
        let taken = decode_symbols(self.isa, &code, &mut self.states, out).ok_or(ChunkError::Stream)?;
        self.words = &self.words[taken..];
        Ok(())
    }

    /// Whether all of it was taken. The encoder began with these states and no word: a damaged code is most unlikely to end there.
    pub(super) fn is_at_end(&self) -> bool {
        self.words.is_empty() && self.states == [LOW; SYMBOL_STATES]
    }
}
