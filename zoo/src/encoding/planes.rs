//! A chunk's elements as planes of bytes, and back. The first plane is what coding gains most on: the exponents (solo), or the symbols of the
//! differences (delta). Floats are turned left by one bit so that the exponent is a whole byte and the sign lies with the mantissa.

use ashlar_kernels::cpu::{Isa, add_differences};
use ashlar_kernels::format::Dtype;
use ashlar_kernels::reference::{of_ordinal, of_zigzag, ordinal, zigzag};

use super::symbols::{self, of_ordinal_32, of_zigzag_32, ordinal_32, zigzag_32};

/// Planes of an element of the widest layout.
pub(super) const PLANES_MAX: usize = 4;

/// How elements become planes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// f16, bf16: exponent and mantissa.
    Solo16,
    /// f32: exponent, then the mantissa's bytes, highest first.
    Solo32,
    /// f16, bf16: symbols of the differences.
    Delta16,
    /// f32: symbols of the upper halves of the zigzag differences, then the lower halves' bytes, highest first.
    Delta32,
    /// Formats of codes: bytes as they are.
    SoloBytes,
    /// Formats of codes: bytes XOR the base's.
    DeltaBytes,
}

impl Layout {
    pub(super) fn of(dtype: Dtype, delta: bool) -> Self {
        match (dtype, delta) {
            (Dtype::F32, false) => Self::Solo32,
            (Dtype::F32, true) => Self::Delta32,
            (Dtype::F16 | Dtype::Bf16, false) => Self::Solo16,
            (Dtype::F16 | Dtype::Bf16, true) => Self::Delta16,
            (_, false) => Self::SoloBytes,
            (_, true) => Self::DeltaBytes,
        }
    }

    /// Bytes of an element.
    pub(super) fn width(self) -> usize {
        match self {
            Self::Solo32 | Self::Delta32 => 4,
            Self::Solo16 | Self::Delta16 => 2,
            Self::SoloBytes | Self::DeltaBytes => 1,
        }
    }

    /// Planes of one byte an element.
    pub(super) fn plane_count(self) -> usize {
        match self {
            Self::Solo32 => 4,
            Self::Delta32 => 3,
            Self::Solo16 => 2,
            Self::Delta16 | Self::SoloBytes | Self::DeltaBytes => 1,
        }
    }

    /// Whether the first plane's symbols have side bytes, and models by the base's exponent.
    pub(super) fn is_difference(self) -> bool {
        matches!(self, Self::Delta16 | Self::Delta32)
    }
}

/// Planes of a chunk.
#[derive(Debug, Default)]
pub(super) struct Planes {
    pub(super) planes: [Vec<u8>; PLANES_MAX],
    /// Side bytes of the first plane's symbols.
    pub(super) side: Vec<u8>,
    /// The base's exponents, one an element (differences only).
    pub(super) exponents: Vec<u8>,
}

fn u16s(bytes: &[u8]) -> impl ExactSizeIterator<Item = u16> {
    bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes))
}

fn u32s(bytes: &[u8]) -> impl ExactSizeIterator<Item = u32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes))
}

/// Exponents of floats of 16 bits: the eight bits of bf16; of f16 its five and the three highest of the mantissa.
fn exponents_16(bytes: &[u8]) -> impl ExactSizeIterator<Item = u8> {
    u16s(bytes).map(|bits| (bits >> 7) as u8)
}

/// Exponents of f32.
fn exponents_32(bytes: &[u8]) -> impl ExactSizeIterator<Item = u8> {
    u32s(bytes).map(|bits| (bits >> 23) as u8)
}

impl Planes {
    /// Takes a chunk apart. `base` is there for the layouts of deltas, and has the length of `raw`.
    pub(super) fn split(&mut self, layout: Layout, raw: &[u8], base: &[u8]) {
        self.planes.iter_mut().for_each(Vec::clear);
        self.side.clear();
        self.exponents.clear();
        let [first, second, third, fourth] = &mut self.planes;
        match layout {
            Layout::Solo16 => {
                first.extend(u16s(raw).map(|bits| (bits.rotate_left(1) >> 8) as u8));
                second.extend(u16s(raw).map(|bits| bits.rotate_left(1) as u8));
            }
            Layout::Solo32 => {
                for (plane, shift) in [(first, 24), (second, 16), (third, 8), (fourth, 0)] {
                    plane.extend(u32s(raw).map(|bits| (bits.rotate_left(1) >> shift) as u8));
                }
            }
            Layout::Delta16 => {
                for (bits, base) in u16s(raw).zip(u16s(base)) {
                    let value = zigzag(ordinal(bits).wrapping_sub(ordinal(base)));
                    first.push(symbols::split(value, &mut self.side));
                }
                self.exponents.extend(exponents_16(base));
            }
            Layout::Delta32 => {
                for (bits, base) in u32s(raw).zip(u32s(base)) {
                    let value = zigzag_32(ordinal_32(bits).wrapping_sub(ordinal_32(base)));
                    first.push(symbols::split((value >> 16) as u16, &mut self.side));
                    second.push((value >> 8) as u8);
                    third.push(value as u8);
                }
                self.exponents.extend(exponents_32(base));
            }
            Layout::SoloBytes => first.extend_from_slice(raw),
            Layout::DeltaBytes => first.extend(raw.iter().zip(base).map(|(raw, base)| raw ^ base)),
        }
    }
}

/// Puts elements together again. Each plane has one byte an element of `out`; side bytes are taken off the start of `side`. `None` when
/// those end too early. `values` is scratch of as many.
pub(super) fn join(
    isa: Isa,
    layout: Layout,
    planes: &[&[u8]],
    side: &mut &[u8],
    base: &[u8],
    values: &mut [u16],
    out: &mut [u8],
) -> Option<()> {
    match (layout, planes) {
        (Layout::Solo16, [high, low]) => {
            for ((out, high), low) in out.as_chunks_mut::<2>().0.iter_mut().zip(*high).zip(*low) {
                *out = u16::from_le_bytes([*low, *high]).rotate_right(1).to_le_bytes();
            }
        }
        (Layout::Solo32, [a, b, c, d]) => {
            for ((((out, a), b), c), d) in out.as_chunks_mut::<4>().0.iter_mut().zip(*a).zip(*b).zip(*c).zip(*d) {
                *out = u32::from_le_bytes([*d, *c, *b, *a]).rotate_right(1).to_le_bytes();
            }
        }
        (Layout::Delta16, [first]) => {
            // All as if they were small, then those anew that are not: few are.
            add_differences(isa, first, base, out);
            let (out, base) = (out.as_chunks_mut::<2>().0, base.as_chunks::<2>().0);
            symbols::for_large(first, side, |i, value| {
                out[i] = of_ordinal(ordinal(u16::from_le_bytes(base[i])).wrapping_add(of_zigzag(value))).to_le_bytes();
            })?;
        }
        (Layout::Delta32, [first, second, third]) => {
            let values = &mut values[..first.len()];
            values.iter_mut().zip(*first).for_each(|(value, symbol)| *value = u16::from(*symbol));
            symbols::for_large(first, side, |i, value| values[i] = value)?;
            let values = values.iter().zip(*second).zip(*third);
            for ((out, ((a, b), c)), base) in out.as_chunks_mut::<4>().0.iter_mut().zip(values).zip(u32s(base)) {
                let value = u32::from(*a) << 16 | u32::from(*b) << 8 | u32::from(*c);
                *out = of_ordinal_32(ordinal_32(base).wrapping_add(of_zigzag_32(value))).to_le_bytes();
            }
        }
        (Layout::SoloBytes, [first]) => out.copy_from_slice(first),
        (Layout::DeltaBytes, [first]) => out.iter_mut().zip(*first).zip(base).for_each(|((out, symbol), base)| *out = symbol ^ base),
        _ => unreachable!("planes are those of the layout"),
    }
    Some(())
}
