//! One chunk: the payload's bytes (solo) or their difference to the base's (delta), split in planes of one byte of each element, each
//! plane a stream.

use ashlar_kernels::format::Dtype;

use super::ChunkError;
use super::stream::{Reader, Writer};

/// Bytes of an element whose bytes lie in planes; formats whose elements are no floats have one plane.
fn width(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::Bf16 => 2,
        _ => 1,
    }
}

/// Encodes chunks of one tensor.
pub(super) struct Encoder {
    width: usize,
    writer: Writer,
    plane: Vec<u8>,
}

impl Encoder {
    pub(super) fn new(dtype: Dtype) -> Self {
        Self { width: width(dtype), writer: Writer::new(), plane: Vec::new() }
    }

    /// Appends the encoded form of `raw`; `base` has its length.
    pub(super) fn encode(&mut self, raw: &[u8], base: Option<&[u8]>, out: &mut Vec<u8>) {
        for plane in 0..self.width {
            self.plane.clear();
            let bytes = raw.iter().skip(plane).step_by(self.width).copied();
            match base {
                None => self.plane.extend(bytes),
                Some(base) => self.plane.extend(bytes.zip(base.iter().skip(plane).step_by(self.width)).map(|(a, b)| a ^ b)),
            }
            self.writer.write(&self.plane, out);
        }
    }
}

/// Decodes chunks of one tensor.
pub(super) struct Decoder {
    width: usize,
    reader: Reader,
    plane: Vec<u8>,
}

impl Decoder {
    pub(super) fn new(dtype: Dtype) -> Self {
        Self { width: width(dtype), reader: Reader::new(), plane: Vec::new() }
    }

    /// Decodes to exactly `out`; `base` has its length.
    pub(super) fn decode(&mut self, mut bytes: &[u8], base: Option<&[u8]>, out: &mut [u8]) -> Result<(), ChunkError> {
        self.plane.resize(out.len() / self.width, 0);
        for plane in 0..self.width {
            self.reader.read(&mut bytes, &mut self.plane)?;
            for (to, from) in out.iter_mut().skip(plane).step_by(self.width).zip(&self.plane) {
                *to = *from;
            }
        }
        if !bytes.is_empty() {
            return Err(ChunkError::Trailing);
        }
        if let Some(base) = base {
            out.iter_mut().zip(base).for_each(|(to, from)| *to ^= from);
        }
        Ok(())
    }
}
