//! Attention over pages: docs/numerics.md, rule 6. Keys and values lie plainly, `[slot][token][kv head][head_dim]`.

use super::math;
use super::norm::halving_sum;
use crate::ops::{AttentionShape, KvPlace, KvShape, PIECE_TOKENS, Query};

/// Keys and values of all slots.
#[derive(Debug)]
pub struct Kv {
    shape: KvShape,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Kv {
    pub(super) fn new(shape: KvShape, slot_count: usize) -> Self {
        let elements = shape.page_elements() / 2 * slot_count;
        Self { shape, keys: vec![0.0; elements], values: vec![0.0; elements] }
    }

    /// First element of one token's head.
    fn at(&self, slot: u32, offset: usize, kv_head: usize) -> usize {
        assert!(offset < self.shape.page_tokens, "offset {offset} of a page of {}", self.shape.page_tokens);
        ((slot as usize * self.shape.page_tokens + offset) * self.shape.kv_heads + kv_head) * self.shape.head_dim
    }

    /// Stores k and v of one fused row.
    pub(super) fn write(&mut self, row: &[f32], shape: &AttentionShape, place: KvPlace) {
        assert_eq!(shape.kv, self.shape, "one slot class");
        let d = self.shape.head_dim;
        let (k, v) = row[shape.heads * d..].split_at(self.shape.kv_heads * d);
        for kv_head in 0..self.shape.kv_heads {
            let at = self.at(place.slot, place.offset as usize, kv_head);
            self.keys[at..][..d].copy_from_slice(&k[kv_head * d..][..d]);
            self.values[at..][..d].copy_from_slice(&v[kv_head * d..][..d]);
        }
    }
}

/// One query row and head; `table` starts at the sequence's first entry.
pub(super) fn attend(out: &mut [f32], q: &[f32], kv: &Kv, shape: &AttentionShape, head: usize, query: Query, table: &[u32]) {
    assert!(shape.window != Some(0), "a window sees at least the query's own position");
    let position = query.position as usize;
    let first = shape.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
    let kv_head = head / (shape.heads / shape.kv.kv_heads);
    let at = |t: usize| kv.at(table[t / shape.kv.page_tokens], t % shape.kv.page_tokens, kv_head);

    let (mut m, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    out.fill(0.0);
    for piece in first / PIECE_TOKENS..=position / PIECE_TOKENS {
        let seen = |lane: usize| (first..=position).contains(&(piece * PIECE_TOKENS + lane));
        let mut s = [f32::NEG_INFINITY; PIECE_TOKENS];
        for lane in (0..PIECE_TOKENS).filter(|&lane| seen(lane)) {
            let k = &kv.keys[at(piece * PIECE_TOKENS + lane)..][..q.len()];
            let mut acc = 0.0f32;
            for d in 0..q.len() {
                acc = q[d].mul_add(k[d], acc);
            }
            let scaled = acc * shape.scale;
            s[lane] = shape.softcap.map_or(scaled, |cap| math::softcap(scaled, cap));
        }
        let new_m = s.iter().fold(m, |m, &s| math::max(m, s));
        let factor = math::exp(m - new_m);
        sum *= factor;
        out.iter_mut().for_each(|o| *o *= factor);
        m = new_m;

        let mut p = [0.0f32; PIECE_TOKENS];
        for lane in (0..PIECE_TOKENS).filter(|&lane| seen(lane)) {
            p[lane] = math::exp(s[lane] - m);
            let v = &kv.values[at(piece * PIECE_TOKENS + lane)..][..q.len()];
            for d in 0..q.len() {
                out[d] = p[lane].mul_add(v[d], out[d]);
            }
        }
        sum += halving_sum(p);
    }
    out.iter_mut().for_each(|o| *o /= sum);
}
