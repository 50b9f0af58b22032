//! Elements as symbols. A float of 16 bits becomes an *ordinal*, an integer that grows with it, and a delta is the difference of two ordinals
//! with its sign in the lowest bit (zigzag). Small differences are a symbol; larger ones are a symbol and one or two side bytes.

/// Zigzag values below this, whose top two bits are not both set, are their own symbol.
pub(super) const DIRECT: u16 = 192;
/// The symbol of a value that is two side bytes; those between DIRECT and it are one side byte and `(symbol - DIRECT) * 256 + DIRECT`.
pub(super) const WIDE: u8 = 255;

/// As `ordinal`, of 32 bits.
#[inline(always)]
pub(super) fn ordinal_32(bits: u32) -> u32 {
    bits ^ (((bits as i32) >> 31) as u32 | 0x8000_0000)
}

/// As `of_ordinal`, of 32 bits.
#[inline(always)]
pub(super) fn of_ordinal_32(ordinal: u32) -> u32 {
    ordinal ^ (!((ordinal as i32) >> 31) as u32 | 0x8000_0000)
}

/// As `zigzag`, of 32 bits.
#[inline(always)]
pub(super) fn zigzag_32(difference: u32) -> u32 {
    difference << 1 ^ ((difference as i32) >> 31) as u32
}

/// As `of_zigzag`, of 32 bits.
#[inline(always)]
pub(super) fn of_zigzag_32(value: u32) -> u32 {
    value >> 1 ^ (value & 1).wrapping_neg()
}

/// The symbol of a value; its side bytes are appended to `side`.
#[inline]
pub(super) fn split(value: u16, side: &mut Vec<u8>) -> u8 {
    if value < DIRECT {
        return value as u8;
    }
    let symbol = (value - DIRECT) / 256 + DIRECT;
    if symbol < u16::from(WIDE) {
        side.push((value - DIRECT) as u8);
        symbol as u8
    } else {
        side.extend_from_slice(&value.to_le_bytes());
        WIDE
    }
}

/// Calls `at` with index and value of each symbol that has side bytes, which are taken off the start of `side`; `None` when those end too
/// early.
pub(super) fn for_large(symbols: &[u8], side: &mut &[u8], mut at: impl FnMut(usize, u16)) -> Option<()> {
    const BLOCK: usize = 64;
    for (block, symbols) in symbols.chunks(BLOCK).enumerate() {
        // All of DIRECT and above have their two top bits set, and no one below has.
        if symbols.iter().fold(0, |bits, symbol| bits | (symbol & symbol << 1)) & 128 == 0 {
            continue;
        }
        for (i, symbol) in symbols.iter().enumerate().filter(|(_, symbol)| u16::from(**symbol) >= DIRECT) {
            let value = if *symbol == WIDE {
                let (value, rest) = side.split_first_chunk::<2>()?;
                *side = rest;
                u16::from_le_bytes(*value)
            } else {
                (u16::from(*symbol) - DIRECT) * 256 + DIRECT + u16::from(*side.split_off_first()?)
            };
            at(block * BLOCK + i, value);
        }
    }
    Some(())
}
