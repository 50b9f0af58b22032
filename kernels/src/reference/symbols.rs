//! Symbols out of range asymmetric numeral systems, a symbol at a time; the formula is in `cpu::symbols`.

/// Interleaved states of a code.
pub const SYMBOL_STATES: usize = 64;

/// What symbols are decoded from.
#[derive(Debug, Clone, Copy)]
pub struct SymbolCode<'a> {
    /// Entries of 1, 2, 4, 8 or 16 models, 2,048 a model: the symbol (bits 0..8), its frequency less one (8..19), the slot's place in its
    /// share (20..32).
    pub tables: &'a [u32],
    /// Where the table of each symbol's model begins: a multiple of 2,048, taken modulo the length of `tables`.
    pub starts: &'a [u16],
    /// Words of 16 bits, little-endian.
    pub words: &'a [u8],
}

impl SymbolCode<'_> {
    /// Panics unless a slot of any start lies in the tables, and each symbol has a start.
    pub(crate) fn check(&self, symbols: usize) {
        assert!((2048..=1 << 16).contains(&self.tables.len()) && self.tables.len().is_power_of_two(), "1, 2, 4, 8 or 16 models");
        assert_eq!(self.starts.len(), symbols, "a start for each symbol");
    }
}

/// Decodes `out.len()` symbols, the first of state 0, and returns how many bytes of `code.words` that took; `None` if they end too early.
///
/// # Panics
/// If there is not one start for each symbol, or the tables have another length.
pub fn decode_symbols(code: &SymbolCode<'_>, states: &mut [u32; SYMBOL_STATES], out: &mut [u8]) -> Option<usize> {
    code.check(out.len());
    let mask = code.tables.len() - 1;
    let mut bytes = 0;
    for (i, (start, out)) in code.starts.iter().zip(out).enumerate() {
        let state = &mut states[i % SYMBOL_STATES];
        let entry = code.tables[usize::from(start | (*state & 2047) as u16) & mask];
        // It does not overflow where the offset lies below the frequency; of other tables the bits are as the formula's modulo 2^32.
        let next = ((entry >> 8 & 2047) + 1).wrapping_mul(*state >> 11).wrapping_add(entry >> 20);
        *state = next;
        if next < 1 << 16 {
            let word = code.words.get(bytes..bytes + 2)?;
            *state = next << 16 | u32::from(u16::from_le_bytes([word[0], word[1]]));
            bytes += 2;
        }
        *out = entry as u8;
    }
    Some(bytes)
}
