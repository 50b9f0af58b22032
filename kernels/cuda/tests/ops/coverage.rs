//! Each kernel that the device can launch is launched here, so that none is believed untested: its bits are compared where a case of the suite does so.

use std::collections::BTreeSet;
use std::sync::Arc;

use ashlar_cuda::{Cuda, Driver, entries};
use ashlar_kernels::format::{Dtype, TensorView};
use ashlar_kernels::ops::{Activation, AttentionShape, Columns, KvFormat, KvPlace, KvShape, NormKind, Ops, Query};
use ashlar_kernels::reference::Reference;

use super::linear::LinearCase;
use super::recorded::recorded;
use super::values::Random;
use super::{Case, assert_same, upload};

/// Layers of every format, in few rows and many, of few outputs and many.
fn linears(cuda: &Cuda) {
    let mut random = Random(3);
    let tiles = [32, 64, 128].into_iter().flat_map(|group| [Dtype::Int4 { group }, Dtype::Int4Minimum { group }, Dtype::Int8 { group }]);
    let tiles: Vec<Dtype> = tiles.collect();
    let plain = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Fp8 { group: 32 }, Dtype::Int8Minimum { group: 32 }];
    let mut shapes: Vec<(Dtype, usize, usize, usize)> = plain.iter().flat_map(|dtype| [1, 9].map(|rows| (*dtype, rows, 40, 96))).collect();
    for dtype in tiles {
        shapes.extend([1, 12, 20].map(|rows| (dtype, rows, 40, 96)));
        shapes.extend([1, 12].map(|rows| (dtype, rows, 40, 512)));
        // So many outputs that a warp takes two tiles of them.
        shapes.extend([1, 12].map(|rows| (dtype, rows, 8192, 512)));
    }
    for (dtype, row_count, outputs, inputs) in shapes {
        let parts = vec![random.tensor(dtype, outputs, inputs)];
        let case = LinearCase::of(random.tame(row_count * inputs), row_count, parts);
        assert_same(&format!("{dtype} {row_count} x {outputs}"), &case.run(&Reference::default()), &case.run(cuda));
    }
}

/// Gate and up of so many outputs that a warp takes two tiles of a side.
#[test]
fn many_outputs_are_gated_side_by_side() {
    let mut random = Random(4);
    for row_count in [1, 12] {
        let parts = vec![random.tensor(Dtype::Int4 { group: 128 }, 4096 + 16, 512)];
        LinearCase::of(random.tame(row_count * 512), row_count, parts).check_added_and_gated(&mut random);
    }
}

/// Pages of every format, and heads of every form.
fn attention(cuda: &Cuda) {
    let heads = [(1, 64), (3, 64), (4, 64), (7, 64), (2, 128), (4, 128), (8, 128)];
    let bf16 = heads.map(|(heads, head_dim)| (heads, head_dim, KvFormat::Bf16));
    let plain = [(1, 32, KvFormat::F32), (1, 32, KvFormat::Bf16), (1, 32, KvFormat::Int8)];
    let tiles = [KvFormat::F32, KvFormat::Int8].into_iter().flat_map(|format| [64, 128].map(|head_dim| (1, head_dim, format)));
    for (heads, head_dim, format) in bf16.into_iter().chain(plain).chain(tiles).chain([(1, 256, KvFormat::Bf16)]) {
        let kv = KvShape { kv_heads: 1, head_dim, page_tokens: 16, format };
        let shape = AttentionShape { heads, kv, scale: 1.0, softcap: None, window: None };
        let mut pages = cuda.kv(kv, 20).unwrap();
        let tables: Vec<u32> = (0..20).chain(0..20).collect();
        // A row at the beginning of many sequences, a chunk of one, one long row alone, which is cut, and long ones that share their pages.
        for (positions, apart) in [(vec![0u32; 140], true), (vec![0; 20], false), (vec![310], false), (vec![280; 16], true)] {
            let qkv = upload(cuda, &vec![0.5; positions.len() * shape.qkv_width()]);
            let mut out = cuda.buffer(positions.len() * heads * head_dim).unwrap();
            let places: Vec<KvPlace> = positions.iter().map(|position| KvPlace { slot: position / 16, offset: position % 16 }).collect();
            cuda.kv_write(&mut pages, &qkv, &shape, &places[..1]);
            let table_start = |row: u32| if apart { 20 * (row % 2) } else { 0 };
            let queries: Vec<Query> =
                (0..).zip(&positions).map(|(row, position)| Query { table_start: table_start(row), position: *position }).collect();
            cuda.attend(&mut out, &qkv, &pages, &shape, &queries, &tables);
        }
    }
}

/// The rest.
fn rows(cuda: &Cuda) {
    let (mut a, b, weight) = (upload(cuda, &[1.0; 64]), upload(cuda, &[2.0; 64]), cuda.vector_f32(&[1.0; 16]).unwrap());
    cuda.gather_rows(&mut a, &b, &[1, 0], 16);
    cuda.scatter_rows(&mut a, &[1, 0], &b, 16);
    cuda.norm(&mut a, &b, 0..2, 16, NormKind::Layer, 1e-5, &weight, None);
    cuda.norm_heads(&mut a, 0..2, Columns::dense(16), 16, 0.0, 1e-5, &weight);
    cuda.rope(&mut a, 2, Columns::dense(16), 16, 8, &b);
    cuda.gate(&mut a, &b, 2, 16, Activation::Silu);
    cuda.activate(&mut a, 16, Activation::Gelu);
    cuda.add(&mut a, &b, 16);
    cuda.softcap(&mut a, 16, 2.0);
    let table = Arc::new(vec![0u8; 64]);
    let view = TensorView { dtype: Dtype::F16, rows: 2, cols: 16, bytes: &table };
    cuda.embed(&mut a, 0, &cuda.table(view, Arc::clone(&table) as _).unwrap(), &[1, 0], 1.0);
    let mut largest = [None; 2];
    cuda.largest(&a, 16, &mut largest);
    assert!(largest.iter().all(Option::is_some), "{largest:?}");
    assert!(cuda.read_bandwidth(1 << 20, std::time::Duration::ZERO).unwrap() > 0.0);
}

#[test]
fn every_kernel_is_launched() {
    let Some((cuda, record)) = recorded() else { return };
    linears(&cuda);
    attention(&cuda);
    rows(&cuda);
    let launched: BTreeSet<&str> = record.take(&cuda).into_iter().filter(|call| *call != "send").collect();
    let known: BTreeSet<&str> = entries().map(|(_, entry)| entry).collect();
    let left_out: Vec<_> = known.difference(&launched).collect();
    assert!(left_out.is_empty(), "nothing launches {left_out:?}");
    assert!(launched.is_subset(&known), "{launched:?}");
}

/// What does not fit is told, what was taken is given back, and the device goes on.
#[test]
fn a_full_card_says_what_did_not_fit() {
    let Some(card) = ashlar_cuda_emulated::Emulated::new(ashlar_cuda_emulated::Order::Ascending, 80 << 20) else { return };
    let card: Arc<dyn Driver> = Arc::new(card);
    let cuda = Cuda::new(Arc::clone(&card)).unwrap();
    let free = card.memory_bytes().unwrap().0;
    let buffer = cuda.buffer(1 << 20).unwrap();
    assert_eq!(free - card.memory_bytes().unwrap().0, 4 << 20);
    let weights = Random(1).tensor(Dtype::Bf16, 4096, 4096);
    let error = cuda.linear(&[weights.view()]).unwrap_err().to_string();
    assert_eq!(error, "no device memory for 33554432 bytes");
    let kv = KvShape { kv_heads: 1, head_dim: 64, page_tokens: 16, format: KvFormat::F32 };
    assert_eq!(cuda.kv(kv, 1 << 20).unwrap_err().to_string(), "no device memory for 8589934592 bytes");
    let wide = KvShape { head_dim: 1024, ..kv };
    assert!(cuda.kv(wide, 1).unwrap_err().to_string().contains("a head of 1024 elements: the card's kernels take up to 512"));
    drop(buffer);
    assert_eq!(card.memory_bytes().unwrap().0, free);
    rows(&cuda);
    let none = ashlar_cuda_emulated::Emulated::new(ashlar_cuda_emulated::Order::Ascending, 1 << 20).unwrap();
    assert_eq!(Cuda::new(Arc::new(none)).unwrap_err().to_string(), "the card has no memory for 4194304 bytes more");
}
