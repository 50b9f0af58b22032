//! Steps of a model as they come: the same launches again and again, over lists that differ. They are recorded, replayed and amended, and the bits are
//! those of the reference.

use std::sync::Arc;

use ashlar_cuda::{Counts, Cuda};
use ashlar_kernels::format::{Dtype, TensorView};
use ashlar_kernels::ops::{Activation, AttentionShape, Columns, Finish, KvFormat, KvPlace, KvShape, NormKind, Ops, Query};
use ashlar_kernels::reference::Reference;

use super::values::{Random, Tensor};
use super::{Case, assert_same, download, open, upload};

const SHAPE: AttentionShape = AttentionShape {
    heads: 2,
    kv: KvShape { kv_heads: 1, head_dim: 64, page_tokens: 16, format: KvFormat::Bf16 },
    scale: 0.125,
    softcap: None,
    window: None,
};
const WIDTH: usize = 128;
const VOCAB: usize = 24;
const PAGES: usize = 24;

/// Positions of each step's rows: one row, or several, each of a sequence of its own.
struct Steps {
    steps: Vec<Vec<u32>>,
    embedding: Tensor,
    qkv: Tensor,
    o: Tensor,
    head: Tensor,
}

impl Steps {
    fn of(steps: Vec<Vec<u32>>) -> Self {
        let mut random = Random(5);
        let mut tensor = |dtype, rows| random.tensor(dtype, rows, WIDTH);
        let [embedding, head] = [Dtype::F16, Dtype::Bf16].map(|dtype| tensor(dtype, VOCAB));
        let (qkv, o) = (tensor(Dtype::Int4 { group: 32 }, SHAPE.qkv_width()), tensor(Dtype::Int8 { group: 64 }, WIDTH));
        Self { steps, embedding, qkv, o, head }
    }
}

impl Case for Steps {
    fn run<O: Ops>(&self, ops: &O) -> Vec<f32> {
        let rows_max = self.steps.iter().map(Vec::len).max().unwrap();
        let keep = Arc::new(self.embedding.view().bytes.to_vec());
        let view = TensorView { bytes: keep.as_slice(), ..self.embedding.view() };
        let table = ops.table(view, Arc::clone(&keep) as _).unwrap();
        let layer = |tensor: &Tensor| ops.linear(&[tensor.view()]).unwrap();
        let (qkv, o, head) = (layer(&self.qkv), layer(&self.o), layer(&self.head));
        let (weight, frequencies) = (ops.vector_f32(&[1.25; WIDTH]).unwrap(), ops.vector_f32(&[1.0, 0.1, 0.01, 0.003]).unwrap());
        let mut kv = ops.kv(SHAPE.kv, rows_max * PAGES).unwrap();
        let buffer = |width: usize| upload(ops, &vec![f32::NAN; rows_max * width]);
        let (mut hidden, mut normed, mut wide, mut attended) = (buffer(WIDTH), buffer(WIDTH), buffer(SHAPE.qkv_width()), buffer(WIDTH));
        let (mut ropes, mut logits) = (buffer(8), buffer(VOCAB));
        let mut results = Vec::new();
        for positions in &self.steps {
            let rows = positions.len();
            let tokens: Vec<u32> = positions.iter().map(|position| position * 7 % VOCAB as u32).collect();
            let places: Vec<KvPlace> = std::iter::zip(0.., positions)
                .map(|(row, position)| KvPlace { slot: row * PAGES as u32 + position / 16, offset: position % 16 })
                .collect();
            let (mut tables, mut queries) = (Vec::new(), Vec::new());
            for (row, &position) in std::iter::zip(0.., positions) {
                queries.push(Query { table_start: tables.len() as u32, position });
                tables.extend(row * PAGES as u32..=row * PAGES as u32 + position / 16);
            }
            ops.embed(&mut hidden, 0, &table, &tokens, 1.5);
            ops.norm(&mut normed, &hidden, 0..rows, WIDTH, NormKind::Rms { weight_offset: 0.0 }, 1e-5, &weight, None);
            ops.linear_apply(&mut wide, &normed, rows, &qkv, None, Finish::Store);
            ops.rope_rows(&mut ropes, positions, &frequencies, 1.0);
            let q_and_k = Columns { stride: SHAPE.qkv_width(), offset: 0, width: 192 };
            ops.rope(&mut wide, rows, q_and_k, 64, 4, &ropes);
            ops.kv_write(&mut kv, &wide, &SHAPE, &places);
            ops.attend(&mut attended, &wide, &kv, &SHAPE, &queries, &tables);
            ops.linear_apply(&mut hidden, &attended, rows, &o, None, Finish::Add);
            ops.activate(&mut hidden, rows * WIDTH, Activation::Silu);
            ops.linear_apply(&mut logits, &hidden, rows, &head, None, Finish::Store);
            let mut largest = vec![None; rows];
            ops.largest(&logits, VOCAB, &mut largest);
            results.extend(largest.iter().map(|index| index.map_or(-1.0, |index| index as f32)));
            results.extend(download(ops, &logits, rows * VOCAB));
        }
        results
    }
}

/// What a new device was asked for, whose results were right.
fn counted(steps: Vec<Vec<u32>>) -> Option<Counts> {
    let cuda = Cuda::new(open()?).unwrap();
    let case = Steps::of(steps);
    assert_same("steps", &case.run(&Reference::default()), &case.run(&cuda));
    Some(cuda.counts())
}

#[test]
fn a_step_that_comes_again_is_replayed() {
    // One sequence, past the end of pages, segments and a page of rotations. Where it is cut into splits, launches change.
    let Some(counts) = counted((60..70).chain(250..260).map(|position| vec![position]).collect()) else { return };
    assert!(counts.recorded >= 1 && counts.replayed >= 17, "{counts:?}");
    assert!(counts.amended <= 4, "lists are where they were: {counts:?}");
}

#[test]
fn steps_of_other_rows_have_recordings_of_their_own() {
    let one_and_three = |step: u32| if step.is_multiple_of(2) { vec![step] } else { vec![step, step + 40, 2 * step] };
    let Some(counts) = counted((0..16).map(one_and_three).collect()) else { return };
    assert_eq!((counts.recorded, counts.replayed), (2, 14), "{counts:?}");
}

#[test]
fn what_is_given_back_was_used_before() {
    let Some(card) = open() else { return };
    let cuda = Cuda::new(card).unwrap();
    let mut random = Random(9);
    let values = random.tame(32);
    let out = {
        // Nothing was fetched when the source is dropped.
        let (source, mut out) = (upload(&cuda, &values), cuda.buffer(32).unwrap());
        cuda.gather_rows(&mut out, &source, &[1, 0], 16);
        drop(source);
        out
    };
    let turned = [&values[16..], &values[..16]].concat();
    assert_same("gathered", &turned, &download(&cuda, &out, 32));
}

/// Rows of a table are sent as lists are: more than there is room for in one op, and in many before anything is fetched.
#[test]
fn lists_have_room() {
    let Some(card) = open() else { return };
    let cuda = Cuda::new(card).unwrap();
    const ROWS: usize = 250;
    const ROW: usize = 20_000;
    let rows: Vec<f32> = (0..ROWS * ROW).map(|at| (at / ROW * 3 + at % 5) as f32).collect();
    let keep = Arc::new(bytemuck::cast_slice::<f32, u8>(&rows).to_vec());
    let view = TensorView { dtype: Dtype::F32, rows: ROWS, cols: ROW, bytes: &keep };
    let table = cuda.table(view, Arc::clone(&keep) as _).unwrap();
    let (all, mut out) = ((0..ROWS as u32).collect::<Vec<_>>(), cuda.buffer(ROWS * ROW).unwrap());
    cuda.embed(&mut out, 0, &table, &all, 1.0);
    assert!(download(&cuda, &out, ROWS * ROW) == rows, "a list of more bytes than there is room at first");
    // Each of its own content, so that none is sent once for all.
    all.iter().rev().for_each(|row| cuda.embed(&mut out, ROWS - 1 - *row as usize, &table, &[*row], 1.0));
    let turned = download(&cuda, &out, ROWS * ROW);
    assert!(turned.chunks(ROW).rev().eq(rows.chunks(ROW)), "lists that are used up begin anew");
}
