//! A stream of bytes within a chunk: a form, its stored length, its bytes. How many bytes it decodes to is never in the file: the
//! reader knows it from dtype, shape and base, so no stream can grow beyond its chunk.

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, ParamSwitch, Strategy};

use super::ChunkError;

/// As it is.
const FORM_RAW: u8 = 0;
/// One byte, repeated.
const FORM_CONSTANT: u8 = 1;
/// A zstd frame.
const FORM_ZSTD: u8 = 2;
/// Bytes of form and length.
const HEAD_BYTES: usize = 4;
/// What a 24-bit length can say; a stream is at most a chunk.
const LENGTH_MAX: usize = (1 << 24) - 1;

/// Writes streams.
pub(super) struct Writer {
    zstd: Compressor<'static>,
    scratch: Vec<u8>,
}

impl Writer {
    pub(super) fn new() -> Self {
        let mut zstd = Compressor::new(1).expect("a zstd context is memory only");
        // Literals only: symbols of weights do not repeat in phrases, and a frame without matches decodes at the speed of the Huffman
        // loop alone. A step of a whole block over the input looks for none.
        for parameter in [
            CParameter::Strategy(Strategy::ZSTD_fast),
            CParameter::TargetLength(1 << 17),
            CParameter::LiteralCompressionMode(ParamSwitch::Enable),
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(false),
            CParameter::DictIdFlag(false),
        ] {
            zstd.set_parameter(parameter).expect("zstd 1.5 takes these parameters");
        }
        Self { zstd, scratch: Vec::new() }
    }

    /// Appends the shortest form of `symbols`.
    pub(super) fn write(&mut self, symbols: &[u8], out: &mut Vec<u8>) {
        assert!(symbols.len() <= LENGTH_MAX);
        let (form, bytes) = match symbols {
            [] => (FORM_RAW, symbols),
            [first, rest @ ..] if rest.iter().all(|byte| byte == first) => (FORM_CONSTANT, &symbols[..1]),
            _ => {
                self.scratch.clear();
                self.scratch.reserve(zstd::zstd_safe::compress_bound(symbols.len()));
                let written = self.zstd.compress_to_buffer(symbols, &mut self.scratch).expect("there is room for what zstd writes");
                // A stream of which nearly nothing is saved is copied, which is much faster.
                if written + written / 64 < symbols.len() { (FORM_ZSTD, &self.scratch[..written]) } else { (FORM_RAW, symbols) }
            }
        };
        let [a, b, c, _] = u32::try_from(bytes.len()).expect("checked above").to_le_bytes();
        out.extend_from_slice(&[form, a, b, c]);
        out.extend_from_slice(bytes);
    }
}

/// Reads streams.
pub(super) struct Reader {
    zstd: Decompressor<'static>,
}

impl Reader {
    pub(super) fn new() -> Self {
        Self { zstd: Decompressor::new().expect("a zstd context is memory only") }
    }

    /// Takes the stream at the start of `bytes` off it and decodes it to exactly `out`.
    pub(super) fn read(&mut self, bytes: &mut &[u8], out: &mut [u8]) -> Result<(), ChunkError> {
        let ([form, a, b, c], rest) = bytes.split_first_chunk::<HEAD_BYTES>().ok_or(ChunkError::Short)?;
        let len = u32::from_le_bytes([*a, *b, *c, 0]) as usize;
        let (stored, rest) = rest.split_at_checked(len).ok_or(ChunkError::Short)?;
        *bytes = rest;
        match (*form, stored) {
            (FORM_RAW, _) if len == out.len() => out.copy_from_slice(stored),
            (FORM_CONSTANT, [byte]) if !out.is_empty() => out.fill(*byte),
            (FORM_ZSTD, _) => {
                let written = self.zstd.decompress_to_buffer(stored, out).map_err(|_| ChunkError::Stream)?;
                if written != out.len() {
                    return Err(ChunkError::Stream);
                }
            }
            (FORM_RAW | FORM_CONSTANT, _) => return Err(ChunkError::Stream),
            _ => return Err(ChunkError::Head),
        }
        Ok(())
    }
}
