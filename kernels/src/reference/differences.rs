//! Floats of 16 bits as integers, and their differences. An *ordinal* grows with the float that it stands for, and every bit pattern has its own.
//! Plain loops: `cpu::differences` compiles the same for each instruction set.

/// Bounds of classes; classes are models of a code, of which there are at most 16.
pub const BOUNDS_MAX: usize = 15;

/// The ordinal of a float of 16 bits.
#[inline(always)]
pub fn ordinal(bits: u16) -> u16 {
    bits ^ (((bits as i16) >> 15) as u16 | 0x8000)
}

/// The float of an ordinal.
#[inline(always)]
pub fn of_ordinal(ordinal: u16) -> u16 {
    ordinal ^ (!((ordinal as i16) >> 15) as u16 | 0x8000)
}

/// Differences 0, -1, 1, -2, 2 .. as 0, 1, 2, 3, 4 ..
#[inline(always)]
pub fn zigzag(difference: u16) -> u16 {
    difference << 1 ^ ((difference as i16) >> 15) as u16
}

/// The difference of a zigzag value.
#[inline(always)]
pub fn of_zigzag(value: u16) -> u16 {
    value >> 1 ^ (value & 1).wrapping_neg()
}

/// `out = base + difference` in ordinals; `differences` are zigzag values of a byte, `base` and `out` little-endian floats of 16 bits.
///
/// # Panics
/// If lengths differ.
#[inline(always)]
pub fn add_differences(differences: &[u8], base: &[u8], out: &mut [u8]) {
    let ((base, []), (out, [])) = (base.as_chunks::<2>(), out.as_chunks_mut::<2>()) else { panic!("whole floats") };
    assert!(base.len() == differences.len() && out.len() == differences.len(), "a base and a place for each difference");
    for i in 0..differences.len() {
        out[i] = of_ordinal(ordinal(u16::from_le_bytes(base[i])).wrapping_add(of_zigzag(u16::from(differences[i])))).to_le_bytes();
    }
}

/// For each float of 16 bits of `base`, 2,048 times how many of `bounds` are not above its exponent (bits 7 to 15, which is without the sign).
///
/// # Panics
/// If lengths differ, or there are more than [`BOUNDS_MAX`] bounds.
pub fn exponent_classes(base: &[u8], bounds: &[u8], out: &mut [u16]) {
    let (base, []) = base.as_chunks::<2>() else { panic!("whole floats") };
    assert!(base.len() == out.len() && bounds.len() <= BOUNDS_MAX, "a place for each float, and classes that fit 16 bits");
    for (base, out) in base.iter().zip(out) {
        let exponent = (u16::from_le_bytes(*base) >> 7) as u8;
        *out = 2048 * bounds.iter().map(|bound| u16::from(exponent >= *bound)).sum::<u16>();
    }
}
