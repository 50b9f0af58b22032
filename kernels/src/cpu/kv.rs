//! KV memory: pages of bytes, in one of three formats. Within a page, kv head by kv head: keys as
//! `[page_tokens/16][head_dim][16]` (scores have their lanes along tokens), values as `[page_tokens][head_dim]` (outputs
//! have theirs along the head), then for int8 the keys' scales `[page_tokens]` and the values', f32.

use std::ops::Range;

use half::bf16;

use super::isa::Kernel;
use super::lanes::{Lanes, load_some};
use super::memory::{Aligned, Element, Shared, elements, elements_mut};
use crate::ops::{AttentionShape, KvFormat, KvPlace, KvShape, PIECE_TOKENS, PackError};

/// Keys and values of all page slots of one class.
#[derive(Debug)]
pub struct Kv {
    pub(super) shape: KvShape,
    slot_count: usize,
    data: Aligned<u8>,
}

/// Stored elements of one format. `Self` is f32, u16 for bf16, or i8.
pub(super) trait Stored: Element {
    const FORMAT: KvFormat;
    /// Nothing was stored.
    const ZERO: Self;

    /// 16 elements, converted exactly.
    fn load<S: Lanes>(s: S, x: &[Self; 16]) -> S::F;
    /// Converts one key or value of a kv head and returns its scale, 1 in formats without.
    fn store<S: Lanes>(s: S, x: &[f32], out: &mut [Self]) -> f32;
}

impl Stored for f32 {
    const FORMAT: KvFormat = KvFormat::F32;
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn load<S: Lanes>(s: S, x: &[f32; 16]) -> S::F {
        s.load(x)
    }
    #[inline(always)]
    fn store<S: Lanes>(_: S, x: &[f32], out: &mut [f32]) -> f32 {
        out.copy_from_slice(x);
        1.0
    }
}

impl Stored for u16 {
    const FORMAT: KvFormat = KvFormat::Bf16;
    const ZERO: Self = 0;

    #[inline(always)]
    fn load<S: Lanes>(s: S, x: &[u16; 16]) -> S::F {
        s.load_bf16(x)
    }
    #[inline(always)]
    fn store<S: Lanes>(_: S, x: &[f32], out: &mut [u16]) -> f32 {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = bf16::from_f32(x).to_bits();
        }
        1.0
    }
}

impl Stored for i8 {
    const FORMAT: KvFormat = KvFormat::Int8;
    const ZERO: Self = 0;

    #[inline(always)]
    fn load<S: Lanes>(s: S, x: &[i8; 16]) -> S::F {
        s.load_i8(x)
    }
    /// Rule 3 of docs/numerics.md, the head being one group.
    #[inline(always)]
    fn store<S: Lanes>(s: S, x: &[f32], out: &mut [i8]) -> f32 {
        let mut lanes = s.splat(0.0);
        for x in x.chunks(16) {
            lanes = s.max(s.abs(load_some(s, x)), lanes);
        }
        let amax = s.max_lane(lanes);
        let inverse = 127.0 / amax;
        if inverse == f32::INFINITY {
            out.fill(0);
            return 0.0;
        }
        for (x, out) in x.chunks(16).zip(out.chunks_mut(16)) {
            let mut codes = [0; 16];
            s.store_codes(s.to_int(s.mul(load_some(s, x), s.splat(inverse))), &mut codes);
            out.copy_from_slice(&codes[..out.len()]);
        }
        amax / 127.0
    }
}

/// 16 tokens of one kv head.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a, T> {
    /// `[head_dim][16]`.
    pub(super) keys: &'a [[T; PIECE_TOKENS]],
    /// `[16][head_dim]`.
    pub(super) values: &'a [T],
    /// Of keys and of values, in formats that have them.
    pub(super) scales: Option<(&'a [f32; PIECE_TOKENS], &'a [f32; PIECE_TOKENS])>,
}

impl<T> Piece<'_, T> {
    /// Stands where no piece is read.
    pub(super) const NONE: Self = Self { keys: &[], values: &[], scales: None };
}

/// The pages while threads write them.
#[derive(Clone, Copy)]
pub(super) struct Pages<'a> {
    shape: KvShape,
    slot_count: usize,
    data: Shared<'a, u8>,
}

impl Pages<'_> {
    fn head_start(&self, slot: u32, kv_head: usize) -> usize {
        head_start(self.shape, self.slot_count, slot, kv_head)
    }
}

/// First byte of `kv_head` in a slot. 16 tokens of anything are a multiple of 16 bytes, so f32 stay aligned.
fn head_start(shape: KvShape, slot_count: usize, slot: u32, kv_head: usize) -> usize {
    let slot = slot as usize;
    assert!(slot < slot_count, "slot {slot} of {slot_count}");
    slot * shape.page_bytes() + kv_head * (shape.page_bytes() / shape.kv_heads)
}

impl Kv {
    pub(super) fn new(shape: KvShape, slot_count: usize) -> Result<Self, PackError> {
        assert!(shape.page_tokens > 0 && shape.page_tokens.is_multiple_of(PIECE_TOKENS), "a page of {} tokens", shape.page_tokens);
        let bytes = shape.page_bytes().checked_mul(slot_count).ok_or(PackError::Memory(usize::MAX))?;
        Ok(Self { shape, slot_count, data: Aligned::new(bytes)? })
    }

    /// Writes to memory of slots what is there, once for each of the system's smallest pages; slots that there are not are left out.
    pub(super) fn touch(&mut self, slots: Range<usize>) {
        let page_bytes = self.shape.page_bytes();
        let end = slots.end.min(self.slot_count);
        let bytes = &mut self.data[slots.start.min(end) * page_bytes..end * page_bytes];
        for byte in bytes.iter_mut().step_by(SYSTEM_PAGE_BYTES) {
            // Otherwise a write of what is there is no write.
            *byte = std::hint::black_box(*byte);
        }
    }

    /// Bytes of one kv head of one page.
    fn head_bytes(&self) -> usize {
        self.shape.page_bytes() / self.shape.kv_heads
    }

    /// To be written by several threads.
    pub(super) fn pages(&mut self) -> Pages<'_> {
        Pages { shape: self.shape, slot_count: self.slot_count, data: Shared::new(&mut self.data) }
    }

    /// Piece `piece` of a page (tokens `16 * piece ..`).
    #[inline(always)]
    pub(super) fn piece<T: Stored>(&self, slot: u32, kv_head: usize, piece: usize) -> Piece<'_, T> {
        let (d, page_tokens) = (self.shape.head_dim, self.shape.page_tokens);
        let head = &self.data[head_start(self.shape, self.slot_count, slot, kv_head)..][..self.head_bytes()];
        let (keys, rest) = head.split_at(page_tokens * d * size_of::<T>());
        let (values, scales) = rest.split_at(keys.len());
        let size = PIECE_TOKENS * d * size_of::<T>();
        let scales = (T::FORMAT.scale_bytes() > 0).then(|| {
            let (of_keys, of_values) = elements::<f32>(scales).split_at(page_tokens);
            (&of_keys.as_chunks().0[piece], &of_values.as_chunks().0[piece])
        });
        Piece { keys: elements(&keys[piece * size..][..size]).as_chunks().0, values: elements(&values[piece * size..][..size]), scales }
    }
}

/// Stores k and v of fused rows `rows`; row i of `qkv` goes to `places[i]`.
pub(super) struct Write<'a> {
    pub(super) pages: Pages<'a>,
    pub(super) qkv: &'a [f32],
    pub(super) shape: &'a AttentionShape,
    pub(super) places: &'a [KvPlace],
    pub(super) rows: Range<usize>,
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        match self.pages.shape.format {
            KvFormat::F32 => self.write::<S, f32>(s),
            KvFormat::Bf16 => self.write::<S, u16>(s),
            KvFormat::Int8 => self.write::<S, i8>(s),
        }
    }
}

impl Write<'_> {
    #[inline(always)]
    fn write<S: Lanes, T: Stored>(&self, s: S) {
        let KvShape { kv_heads, head_dim: d, page_tokens, .. } = self.pages.shape;
        let width = self.shape.qkv_width();
        // A key's elements lie a cache line apart: they are collected here.
        let mut memory = [T::ZERO; HEAD_MAX];
        let mut long = Vec::new();
        let stored = if d <= HEAD_MAX {
            &mut memory[..d]
        } else {
            long.resize(d, T::ZERO);
            &mut long[..]
        };
        let line = PIECE_TOKENS * size_of::<T>();
        let key_at = |row: usize, kv_head: usize| {
            let (slot, offset) = (self.places[row].slot, self.places[row].offset as usize);
            self.pages.head_start(slot, kv_head) + (offset / PIECE_TOKENS * PIECE_TOKENS * d + offset % PIECE_TOKENS) * size_of::<T>()
        };
        let fetch = |key: usize| {
            for i in 0..d {
                s.prefetch_write(self.pages.data.address(key + i * line));
            }
        };
        if let Some(row) = self.rows.clone().next() {
            fetch(key_at(row, 0));
        }
        for row in self.rows.clone() {
            let place = self.places[row];
            let offset = place.offset as usize;
            assert!(offset < page_tokens, "offset {offset} of a page of {page_tokens}");
            let (keys, values) = self.qkv[row * width..][..width][self.shape.heads * d..].split_at(kv_heads * d);
            for kv_head in 0..kv_heads {
                let start = self.pages.head_start(place.slot, kv_head);
                let elements = page_tokens * d;
                let key = key_at(row, kv_head);
                // The next one's lines are asked for before this one's are written.
                if kv_head + 1 < kv_heads {
                    fetch(key_at(row, kv_head + 1));
                } else if row + 1 < self.rows.end {
                    fetch(key_at(row + 1, 0));
                }
                let key_scale = T::store(s, &keys[kv_head * d..][..d], stored);
                for (i, element) in stored.iter().enumerate() {
                    // SAFETY: the element is of this row, places are distinct and threads have disjoint rows.
                    elements_mut::<T>(unsafe { self.pages.data.part(key + i * line..key + i * line + size_of::<T>()) })[0] = *element;
                }
                let value = start + (elements + offset * d) * size_of::<T>();
                // SAFETY: as above.
                let of_token = elements_mut::<T>(unsafe { self.pages.data.part(value..value + d * size_of::<T>()) });
                let value_scale = T::store(s, &values[kv_head * d..][..d], of_token);
                if T::FORMAT.scale_bytes() > 0 {
                    let scales = start + 2 * elements * size_of::<T>();
                    for (scale, at) in [(key_scale, offset), (value_scale, page_tokens + offset)] {
                        let at = scales + at * size_of::<f32>();
                        // SAFETY: as above.
                        elements_mut::<f32>(unsafe { self.pages.data.part(at..at + size_of::<f32>()) })[0] = scale;
                    }
                }
            }
        }
    }
}

/// Heads of up to as many elements are written without an allocation.
const HEAD_MAX: usize = 256;
/// The smallest page of memory that systems have.
const SYSTEM_PAGE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::KvFormat;

    #[test]
    fn touched_pages_keep_what_they_hold() {
        let shape = KvShape { kv_heads: 3, head_dim: 40, page_tokens: 16, format: KvFormat::F32 };
        let mut kv = Kv::new(shape, 7).unwrap();
        for (i, byte) in kv.data.iter_mut().enumerate() {
            *byte = (i % 251) as u8;
        }
        for slots in [0..7, 2..3, 5..90, 40..50, 3..3] {
            kv.touch(slots);
        }
        assert!(kv.data.iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8));
    }
}
