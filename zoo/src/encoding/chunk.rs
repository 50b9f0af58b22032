//! One chunk: its planes, each a stream in the form that is shortest, then (differences of floats) the side bytes. How much a stream decodes to
//! is never in the file: dtype, shape and chunk size say it, so no stream grows beyond its chunk.

use super::ChunkError;
use super::codec::{Codec, Plane};
use super::planes::{Layout, Planes, exponents_16, exponents_32, join};
use super::rans::{self, Shares};

/// As it is.
const FORM_RAW: u8 = 0;
/// One byte, repeated.
const FORM_CONSTANT: u8 = 1;
/// Coded by the plane's models.
const FORM_CODED: u8 = 2;
/// Bytes of form and length.
const HEAD_BYTES: usize = 4;

/// Encodes chunks of one tensor.
pub(super) struct Encoder<'a> {
    codec: &'a Codec,
    shares: Shares,
    contexts: [u8; 256],
    planes: Planes,
    code: Vec<u8>,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(codec: &'a Codec) -> Self {
        let shares = Shares::of(&codec.models);
        Self { codec, shares, contexts: codec.contexts.of_exponents(), planes: Planes::default(), code: Vec::new() }
    }

    /// Appends the encoded form of `raw`; `base` has its length where the layout is a delta's.
    pub(super) fn encode(&mut self, raw: &[u8], base: &[u8], out: &mut Vec<u8>) {
        let layout = self.codec.layout;
        self.planes.split(layout, raw, base);
        for (index, plane) in self.codec.planes.iter().enumerate() {
            let symbols = &self.planes.planes[index];
            if symbols.iter().all(|symbol| *symbol == symbols[0]) {
                stream(FORM_CONSTANT, &symbols[..1], out);
                continue;
            }
            self.code.clear();
            match plane {
                Plane::Uncoded => {}
                Plane::Model(model) => rans::encode(&self.shares, symbols, |_| *model, &mut self.code),
                Plane::ByExponent => {
                    let (contexts, exponents) = (&self.contexts, &self.planes.exponents);
                    rans::encode(&self.shares, symbols, |i| usize::from(contexts[usize::from(exponents[i])]), &mut self.code);
                }
            }
            if !self.code.is_empty() && self.code.len() < symbols.len() {
                stream(FORM_CODED, &self.code, out);
            } else {
                stream(FORM_RAW, symbols, out);
            }
        }
        if layout.is_difference() {
            stream(FORM_RAW, &self.planes.side, out);
        }
    }
}

fn stream(form: u8, bytes: &[u8], out: &mut Vec<u8>) {
    let [a, b, c, 0] = u32::try_from(bytes.len()).expect("at most a chunk").to_le_bytes() else { panic!("a stream is at most a chunk") };
    out.extend_from_slice(&[form, a, b, c]);
    out.extend_from_slice(bytes);
}

/// Takes a stream's form and bytes off the start of `bytes`.
fn take<'a>(bytes: &mut &'a [u8]) -> Result<(u8, &'a [u8]), ChunkError> {
    let ([form, a, b, c], rest) = bytes.split_first_chunk::<HEAD_BYTES>().ok_or(ChunkError::Short)?;
    let (stored, rest) = rest.split_at_checked(u32::from_le_bytes([*a, *b, *c, 0]) as usize).ok_or(ChunkError::Short)?;
    *bytes = rest;
    Ok((*form, stored))
}

/// Decodes chunks of tensors. It holds scratch only.
#[derive(Default)]
pub(super) struct Decoder {
    planes: [Vec<u8>; 4],
    values: Vec<u16>,
    /// Where each symbol's model begins.
    starts: Vec<u16>,
}

impl Decoder {
    /// Decodes to exactly `out`; `base` has its length where the layout is a delta's.
    pub(super) fn decode(&mut self, codec: &Codec, mut bytes: &[u8], base: &[u8], out: &mut [u8]) -> Result<(), ChunkError> {
        let count = out.len() / codec.layout.width();
        let mut planes: [&[u8]; 4] = [&[]; 4];
        for ((plane, room), decoded) in codec.planes.iter().zip(&mut self.planes).zip(&mut planes) {
            let (form, stored) = take(&mut bytes)?;
            *decoded = match (form, stored) {
                (FORM_RAW, _) if stored.len() == count => stored,
                (FORM_CONSTANT, [byte]) => {
                    room.clear();
                    room.resize(count, *byte);
                    room
                }
                (FORM_CODED, _) => {
                    room.resize(count, 0);
                    let at = &codec.at_exponent;
                    self.starts.clear();
                    match (plane, codec.layout) {
                        (Plane::Uncoded, _) => return Err(ChunkError::Head),
                        (Plane::Model(model), _) => self.starts.resize(count, codec.at(*model)),
                        (Plane::ByExponent, Layout::Delta32) => self.starts.extend(exponents_32(base).map(|e| at[usize::from(e)])),
                        (Plane::ByExponent, _) => self.starts.extend(exponents_16(base).map(|e| at[usize::from(e)])),
                    }
                    rans::decode(&codec.tables, &self.starts, stored, room)?;
                    room
                }
                (FORM_RAW | FORM_CONSTANT, _) => return Err(ChunkError::Stream),
                _ => return Err(ChunkError::Head),
            };
        }
        let side = match codec.layout.is_difference() {
            false => &[][..],
            true => match take(&mut bytes)? {
                (FORM_RAW, side) => side,
                _ => return Err(ChunkError::Head),
            },
        };
        if !bytes.is_empty() {
            return Err(ChunkError::Trailing);
        }
        join(codec.layout, &planes[..codec.planes.len()], side, base, &mut self.values, out).ok_or(ChunkError::Side)
    }
}
