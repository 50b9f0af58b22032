//! One chunk: its planes, each a stream in the form that is shortest, then (differences of floats) the side bytes. How much a stream decodes to
//! is never in the file: dtype, shape and chunk size say it, so no stream grows beyond its chunk.

use ashlar_kernels::cpu::{Isa, exponent_classes};
use ashlar_kernels::reference::SYMBOL_STATES;

use super::ChunkError;
use super::codec::{Codec, Plane};
use super::planes::{Layout, PLANES_MAX, Planes, join};
use super::rans::{self, Code, Shares};

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

/// Elements that are decoded at a time: all that one piece needs lies in the first cache.
const PIECE: usize = 1024;
const _: () = assert!(PIECE.is_multiple_of(SYMBOL_STATES), "a piece begins with the first state");

/// A plane, read piece by piece.
#[expect(clippy::large_enum_variant, reason = "a chunk has at most four, on the stack")]
enum Reader<'a> {
    Raw(&'a [u8]),
    Constant,
    Coded(Code<'a>, Plane),
}

/// What a piece needs besides its planes.
struct Scratch {
    /// Where each symbol's model begins in the tables.
    starts: [u16; PIECE],
    /// The model that all starts are of.
    starts_model: Option<usize>,
    values: [u16; PIECE],
}

impl<'a> Reader<'a> {
    /// Takes the plane of `count` symbols off the start of `bytes`. `room` holds the symbol of a constant plane from then on.
    fn take(
        isa: Isa,
        codec: &'a Codec,
        plane: Plane,
        bytes: &mut &'a [u8],
        count: usize,
        room: &mut [u8; PIECE],
    ) -> Result<Self, ChunkError> {
        match (take(bytes)?, plane) {
            ((FORM_RAW, stored), _) if stored.len() == count => Ok(Self::Raw(stored)),
            ((FORM_CONSTANT, [symbol]), _) => {
                room.fill(*symbol);
                Ok(Self::Constant)
            }
            ((FORM_RAW | FORM_CONSTANT, _), _) => Err(ChunkError::Stream),
            ((FORM_CODED, stored), Plane::Model(_) | Plane::ByExponent) => Ok(Self::Coded(Code::new(isa, &codec.tables, stored)?, plane)),
            _ => Err(ChunkError::Head),
        }
    }

    /// The next `count` symbols. `base` is theirs.
    fn next<'b>(
        &mut self,
        isa: Isa,
        codec: &Codec,
        count: usize,
        base: &[u8],
        scratch: &mut Scratch,
        room: &'b mut [u8; PIECE],
    ) -> Result<&'b [u8], ChunkError>
    where
        'a: 'b,
    {
        match self {
            Self::Raw(stored) => {
                let (symbols, rest) = stored.split_at(count);
                *stored = rest;
                Ok(symbols)
            }
            Self::Constant => Ok(&room[..count]),
            Self::Coded(code, plane) => {
                match *plane {
                    Plane::Model(model) if scratch.starts_model == Some(model) => {}
                    Plane::Model(model) => {
                        scratch.starts.fill(codec.at(model));
                        scratch.starts_model = Some(model);
                    }
                    _ => {
                        let bounds = &codec.contexts.starts;
                        match codec.layout {
                            Layout::Delta32 => {
                                // The upper half of an f32 is a bf16.
                                let mut upper = [[0; 2]; PIECE];
                                upper.iter_mut().zip(base.as_chunks::<4>().0).for_each(|(upper, base)| *upper = [base[2], base[3]]);
                                exponent_classes(isa, upper[..count].as_flattened(), bounds, &mut scratch.starts[..count]);
                            }
                            _ => exponent_classes(isa, base, bounds, &mut scratch.starts[..count]),
                        }
                        scratch.starts_model = None;
                    }
                }
                code.next(&scratch.starts[..count], &mut room[..count])?;
                Ok(&room[..count])
            }
        }
    }

    fn is_at_end(&self) -> bool {
        match self {
            Self::Raw(stored) => stored.is_empty(),
            Self::Constant => true,
            Self::Coded(code, _) => code.is_at_end(),
        }
    }
}

/// Decodes a chunk to exactly `out`; `base` has its length where the layout is a delta's, and is empty elsewhere.
pub(super) fn decode<'a>(codec: &'a Codec, mut bytes: &'a [u8], base: &[u8], out: &mut [u8]) -> Result<(), ChunkError> {
    let isa = Isa::detect();
    let width = codec.layout.width();
    let count = out.len() / width;
    let mut rooms = [[0; PIECE]; PLANES_MAX];
    let mut scratch = Scratch { starts: [0; PIECE], starts_model: None, values: [0; PIECE] };
    let mut readers = Vec::with_capacity(PLANES_MAX);
    for (plane, room) in codec.planes.iter().zip(&mut rooms) {
        readers.push(Reader::take(isa, codec, *plane, &mut bytes, count, room)?);
    }
    let mut side = match codec.layout.is_difference() {
        false => &[][..],
        true => match take(&mut bytes)? {
            (FORM_RAW, side) => side,
            _ => return Err(ChunkError::Head),
        },
    };
    if !bytes.is_empty() {
        return Err(ChunkError::Trailing);
    }
    for (piece, out) in out.chunks_mut(PIECE * width).enumerate() {
        let base = if base.is_empty() { base } else { &base[piece * PIECE * width..][..out.len()] };
        let mut planes: [&[u8]; PLANES_MAX] = [&[]; PLANES_MAX];
        for ((reader, room), plane) in readers.iter_mut().zip(&mut rooms).zip(&mut planes) {
            *plane = reader.next(isa, codec, out.len() / width, base, &mut scratch, room)?;
        }
        let planes = &planes[..readers.len()];
        join(isa, codec.layout, planes, &mut side, base, &mut scratch.values, out).ok_or(ChunkError::Side)?;
    }
    if !side.is_empty() {
        return Err(ChunkError::Side);
    }
    if readers.iter().all(Reader::is_at_end) { Ok(()) } else { Err(ChunkError::Stream) }
}
