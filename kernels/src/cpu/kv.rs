//! KV memory: f32 pages. Within a page, kv head by kv head: keys as `[page_tokens/16][head_dim][16]` (scores have their
//! lanes along tokens), then values as `[page_tokens][head_dim]` (outputs have theirs along the head).

use super::memory::Aligned;
use crate::ops::{AttentionShape, KvPlace, KvShape, PIECE_TOKENS, PackError};

/// Keys and values of all page slots of one class.
#[derive(Debug)]
pub struct Kv {
    pub(super) shape: KvShape,
    pub(super) slot_count: usize,
    pub(super) data: Aligned<f32>,
}

impl Kv {
    pub(super) fn new(shape: KvShape, slot_count: usize) -> Result<Self, PackError> {
        assert!(shape.page_tokens > 0 && shape.page_tokens.is_multiple_of(PIECE_TOKENS), "a page of {} tokens", shape.page_tokens);
        let elements = shape.page_elements().checked_mul(slot_count).ok_or(PackError::Memory(usize::MAX))?;
        Ok(Self { shape, slot_count, data: Aligned::new(elements)? })
    }

    /// First element of the keys of `kv_head` in a slot; the values follow `page_tokens * head_dim` elements later.
    pub(super) fn head_start(&self, slot: u32, kv_head: usize) -> usize {
        let slot = slot as usize;
        assert!(slot < self.slot_count, "slot {slot} of {}", self.slot_count);
        slot * self.shape.page_elements() + kv_head * 2 * self.shape.page_tokens * self.shape.head_dim
    }

    /// Stores k and v of one fused row.
    pub(super) fn write(&mut self, row: &[f32], shape: &AttentionShape, place: KvPlace) {
        let (d, page_tokens) = (self.shape.head_dim, self.shape.page_tokens);
        let offset = place.offset as usize;
        assert!(offset < page_tokens, "offset {offset} of a page of {page_tokens}");
        let (keys, values) = row[shape.heads * d..].split_at(self.shape.kv_heads * d);
        for kv_head in 0..self.shape.kv_heads {
            let start = self.head_start(place.slot, kv_head);
            let piece = start + offset / PIECE_TOKENS * PIECE_TOKENS * d;
            let lanes = self.data[piece..][..PIECE_TOKENS * d].chunks_exact_mut(PIECE_TOKENS);
            for (lanes, &key) in lanes.zip(&keys[kv_head * d..][..d]) {
                lanes[offset % PIECE_TOKENS] = key;
            }
            self.data[start + (page_tokens + offset) * d..][..d].copy_from_slice(&values[kv_head * d..][..d]);
        }
    }
}
