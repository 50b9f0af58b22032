//! Norms, RoPE, embeddings, element-wise ops and row moves: equal bits over odd widths and values.

use std::sync::Arc;

use super::values::{Random, Tensor};
use super::{Case, check, download, upload};
use ashlar_kernels::format::{Dtype, TensorView};
use ashlar_kernels::ops::{Activation, Columns, NormKind, Ops};
use proptest::prelude::*;

struct Norm {
    x: Vec<f32>,
    width: usize,
    kind: NormKind,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Case for Norm {
    fn run<O: Ops>(&self, ops: &O) -> Vec<f32> {
        let x = upload(ops, &self.x);
        let mut out = ops.buffer(self.x.len()).unwrap();
        let weight = ops.vector_f32(&self.weight).unwrap();
        let bias = self.bias.as_ref().map(|bias| ops.vector_f32(bias).unwrap());
        // Rows in two calls, the later ones first.
        let (rows, split) = (self.x.len() / self.width, self.x.len() / self.width / 3);
        for rows in [split..rows, 0..split] {
            ops.norm(&mut out, &x, rows, self.width, self.kind, 1e-5, &weight, bias.as_ref());
        }
        download(ops, &out, self.x.len())
    }
}

struct Heads {
    x: Vec<f32>,
    row_count: usize,
    columns: Columns,
    head_dim: usize,
    half: usize,
    positions: Vec<u32>,
    weight: Vec<f32>,
}

impl Case for Heads {
    /// Head norms, then RoPE, in the same columns.
    fn run<O: Ops>(&self, ops: &O) -> Vec<f32> {
        let mut x = upload(ops, &self.x);
        let weight = ops.vector_f32(&self.weight).unwrap();
        let split = self.row_count / 3;
        for rows in [split..self.row_count, 0..split] {
            ops.norm_heads(&mut x, rows, self.columns, self.head_dim, 1.0, 1e-6, &weight);
        }
        let frequencies: Vec<f32> = (0..self.half).map(|i| 10_000f32.powf(-(i as f32) / self.half as f32)).collect();
        let frequencies = ops.vector_f32(&frequencies).unwrap();
        let mut rope_rows = ops.buffer(self.row_count * 2 * self.half).unwrap();
        ops.rope_rows(&mut rope_rows, &self.positions, &frequencies, 1.25);
        ops.rope(&mut x, self.row_count, self.columns, self.head_dim, self.half, &rope_rows);
        let mut out = download(ops, &x, self.x.len());
        out.extend(download(ops, &rope_rows, self.row_count * 2 * self.half));
        out
    }
}

struct Elements {
    x: Vec<f32>,
    row_count: usize,
    width: usize,
    activation: Activation,
}

impl Case for Elements {
    /// Gate, then activation, addition and soft cap on the result and on the raw values.
    fn run<O: Ops>(&self, ops: &O) -> Vec<f32> {
        let count = self.row_count * self.width;
        let mut x = upload(ops, &self.x);
        let mut out = ops.buffer(count).unwrap();
        ops.gate(&mut out, &x, self.row_count, self.width, self.activation);
        let mut all = download(ops, &out, count);
        ops.activate(&mut out, count, self.activation);
        ops.activate(&mut x, self.x.len(), self.activation);
        ops.add(&mut x, &out, count);
        all.extend(download(ops, &x, self.x.len()));
        ops.softcap(&mut x, self.x.len().saturating_sub(1), 30.0);
        all.extend(download(ops, &x, self.x.len()));
        all
    }
}

/// Where rows are largest; 0 stands for nowhere.
struct Largest {
    x: Vec<f32>,
    width: usize,
}

impl Case for Largest {
    fn run<O: Ops>(&self, ops: &O) -> Vec<f32> {
        let mut places = vec![Some(u32::MAX); self.x.len() / self.width];
        ops.largest(&upload(ops, &self.x), self.width, &mut places);
        places.into_iter().map(|place| place.map_or(0.0, |place| place as f32 + 1.0)).collect()
    }
}

struct Lookup {
    table: Arc<Vec<u8>>,
    dtype: Dtype,
    rows: usize,
    width: usize,
    tokens: Vec<u32>,
}

impl Case for Lookup {
    fn run<O: Ops>(&self, ops: &O) -> Vec<f32> {
        // The tensor lies somewhere inside of what is kept, as in a map of a file.
        let view = TensorView { dtype: self.dtype, rows: self.rows, cols: self.width, bytes: &self.table[64..] };
        let table = ops.table(view, Arc::clone(&self.table) as Arc<dyn AsRef<[u8]> + Send + Sync>).unwrap();
        let count = self.tokens.len() * self.width;
        let mut out = ops.buffer(count).unwrap();
        let split = self.tokens.len() / 3;
        ops.embed(&mut out, split, &table, &self.tokens[split..], 1.7);
        ops.embed(&mut out, 0, &table, &self.tokens[..split], 1.7);
        let reversed: Vec<u32> = self.tokens.iter().rev().copied().collect();
        ops.embed_add(&mut out, 0, &table, &reversed[..split]);
        ops.embed_add(&mut out, split, &table, &reversed[split..]);
        // Every second row out, and back to the end of another buffer.
        let index: Vec<u32> = (0..self.tokens.len() as u32).step_by(2).collect();
        let mut some = ops.buffer(index.len() * self.width).unwrap();
        ops.gather_rows(&mut some, &out, &index, self.width);
        let mut spread = ops.buffer(count).unwrap();
        let places: Vec<u32> = index.iter().map(|i| self.tokens.len() as u32 - 1 - i).collect();
        ops.scatter_rows(&mut spread, &places, &some, self.width);
        let mut all = download(ops, &out, count);
        all.extend(download(ops, &spread, count));
        all
    }
}

const ACTIVATIONS: [Activation; 4] = [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu];

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn norms_have_the_reference_bits(seed in any::<u64>(), row_count in 0usize..70) {
        let mut random = Random(seed);
        let width = if random.below(3) == 0 { 576 } else { 1 + random.below(200) };
        for kind in [NormKind::Rms { weight_offset: 0.0 }, NormKind::Rms { weight_offset: 1.0 }, NormKind::Layer] {
            let bias = (kind == NormKind::Layer).then(|| random.tame(width));
            check(&Norm { x: random.wild(row_count, width), width, kind, weight: random.tame(width), bias });
        }
    }

    #[test]
    fn heads_have_the_reference_bits(seed in any::<u64>(), row_count in 0usize..40, heads in 1usize..6) {
        let mut random = Random(seed);
        let head_dim = random.pick(&[2, 6, 16, 40, 64, 80, 128]);
        let half = 1 + random.below(head_dim / 2);
        let (offset, rest) = (random.below(20), random.below(20));
        let columns = Columns { stride: offset + heads * head_dim + rest, offset, width: heads * head_dim };
        let positions = (0..row_count).map(|_| random.below(100_000) as u32).collect();
        let x = random.wild(row_count, columns.stride);
        check(&Heads { x, row_count, columns, head_dim, half, positions, weight: random.tame(head_dim) });
    }

    #[test]
    fn element_wise_ops_have_the_reference_bits(seed in any::<u64>(), row_count in 0usize..30) {
        let mut random = Random(seed);
        let width = 1 + random.below(400);
        for activation in ACTIVATIONS {
            check(&Elements { x: random.wild(row_count, 2 * width), row_count, width, activation });
        }
    }

    #[test]
    fn the_first_of_the_largest_is_found(seed in any::<u64>(), row_count in 0usize..9) {
        let mut random = Random(seed);
        let width = 1 + random.below(3000);
        // Few values, so that the largest is there more than once; both zeros, what is no number, and rows of nothing else.
        let values = [0.0, -0.0, 1.0, -1.0, f32::NAN, -f32::NAN, f32::NEG_INFINITY, f32::INFINITY, 3.5e-39];
        let mut x = Vec::new();
        for _ in 0..row_count {
            let kinds = 1 + random.below(values.len());
            let (common, begin) = (random.below(3) > 0, random.below(values.len()));
            x.extend((0..width).map(|_| match common && random.below(50) > 0 {
                true => f32::NEG_INFINITY,
                false => values[(begin + random.below(kinds)) % values.len()],
            }));
        }
        check(&Largest { x, width });
        check(&Largest { x: random.wild(row_count, width), width });
    }

    #[test]
    fn lookups_have_the_reference_bits(seed in any::<u64>(), token_count in 0usize..70) {
        let mut random = Random(seed);
        let dtype = random.pick(&[Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 32 }, Dtype::Q8_0, Dtype::Q4_1, Dtype::Q6K]);
        let width = if dtype.block_columns() == 1 { 1 + random.below(600) } else { 256 * (1 + random.below(2)) };
        let rows = 1 + random.below(9);
        let Tensor { bytes, .. } = random.tensor(dtype, rows, width);
        let mut table = vec![0xff; 64];
        table.extend(bytes);
        let tokens = (0..token_count).map(|_| random.below(rows) as u32).collect();
        check(&Lookup { table: Arc::new(table), dtype, rows, width, tokens });
    }
}

#[test]
fn every_exponent_goes_through_the_polynomials_alike() {
    // 2^17 patterns spread over all floats, both signs, infinities included.
    let x: Vec<f32> = (0..1u32 << 17).map(|i| f32::from_bits((i << 15) | 0x1234)).filter(|x| !x.is_nan()).collect();
    let width = x.len() / 2;
    for activation in ACTIVATIONS {
        check(&Elements { x: x[..2 * width].to_vec(), row_count: 1, width, activation });
    }
}
