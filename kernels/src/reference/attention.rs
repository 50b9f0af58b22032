//! Attention over pages: docs/numerics.md, rule 6 and "KV formats". Keys and values lie plainly, `[slot][token][kv head]`.

use half::bf16;

use super::linear::quantise_activations;
use super::math;
use super::norm::halving_sum;
use crate::ops::{AttentionShape, KvFormat, KvPlace, KvShape, PIECE_TOKENS, Query, SEGMENT_TOKENS};

/// Keys and values of all slots.
#[derive(Debug)]
pub struct Kv {
    shape: KvShape,
    keys: Vec<Row>,
    values: Vec<Row>,
}

/// The key or value of one token and kv head, as read back: `scale` stands outside of the sums over `elements`.
#[derive(Debug, Clone)]
struct Row {
    elements: Vec<f32>,
    /// 1 in formats without scales: multiplying by it changes nothing.
    scale: f32,
}

impl Row {
    fn stored(x: &[f32], format: KvFormat) -> Self {
        match format {
            KvFormat::F32 => Self { elements: x.to_vec(), scale: 1.0 },
            KvFormat::Bf16 => Self { elements: x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(), scale: 1.0 },
            KvFormat::Int8 => {
                let quantised = quantise_activations(x, x.len());
                Self { elements: quantised.codes.iter().map(|&code| f32::from(code)).collect(), scale: quantised.scales[0] }
            }
        }
    }
}

impl Kv {
    pub(super) fn new(shape: KvShape, slot_count: usize) -> Self {
        let empty = vec![Row { elements: vec![0.0; shape.head_dim], scale: 1.0 }; shape.kv_heads * shape.page_tokens * slot_count];
        Self { shape, keys: empty.clone(), values: empty }
    }

    /// Index of one token's head.
    fn at(&self, slot: u32, offset: usize, kv_head: usize) -> usize {
        assert!(offset < self.shape.page_tokens, "offset {offset} of a page of {}", self.shape.page_tokens);
        (slot as usize * self.shape.page_tokens + offset) * self.shape.kv_heads + kv_head
    }

    /// Stores k and v of one fused row.
    pub(super) fn write(&mut self, row: &[f32], shape: &AttentionShape, place: KvPlace) {
        assert_eq!(shape.kv, self.shape, "one slot class");
        let d = self.shape.head_dim;
        let (k, v) = row[shape.heads * d..].split_at(self.shape.kv_heads * d);
        for kv_head in 0..self.shape.kv_heads {
            let at = self.at(place.slot, place.offset as usize, kv_head);
            self.keys[at] = Row::stored(&k[kv_head * d..][..d], self.shape.format);
            self.values[at] = Row::stored(&v[kv_head * d..][..d], self.shape.format);
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
    for segment in first / SEGMENT_TOKENS..=position / SEGMENT_TOKENS {
        let tokens = (segment * SEGMENT_TOKENS).max(first)..((segment + 1) * SEGMENT_TOKENS).min(position + 1);
        let scores: Vec<f32> = tokens
            .clone()
            .map(|t| {
                let k = &kv.keys[at(t)];
                let mut acc = 0.0f32;
                for d in 0..q.len() {
                    acc = q[d].mul_add(k.elements[d], acc);
                }
                let scaled = acc * k.scale * shape.scale;
                shape.softcap.map_or(scaled, |cap| math::softcap(scaled, cap))
            })
            .collect();
        let segment_m = scores.iter().fold(f32::NEG_INFINITY, |m, &s| math::max(m, s));

        let mut lanes = [0.0f32; PIECE_TOKENS];
        let mut blend = vec![0.0f32; q.len()];
        for (t, score) in tokens.zip(scores) {
            let p = math::exp(score - segment_m);
            lanes[t % PIECE_TOKENS] += p;
            let v = &kv.values[at(t)];
            let weight = p * v.scale;
            for d in 0..q.len() {
                blend[d] = weight.mul_add(v.elements[d], blend[d]);
            }
        }

        let new_m = math::max(m, segment_m);
        let (old, new) = (math::exp(m - new_m), math::exp(segment_m - new_m));
        sum = sum * old + halving_sum(lanes) * new;
        for d in 0..q.len() {
            out[d] = blend[d].mul_add(new, out[d] * old);
        }
        m = new_m;
    }
    out.iter_mut().for_each(|o| *o /= sum);
}
