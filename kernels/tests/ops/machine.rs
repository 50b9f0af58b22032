//! What the machine and the caller's memory happen to be changes no bit: more threads than cores, and bytes that lie unaligned.

use std::sync::Arc;

use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa};
use ashlar_kernels::format::{Dtype, TensorView};
use ashlar_kernels::ops::{Finish, Ops};
use ashlar_kernels::reference::Reference;

use super::attention::Chunk;
use super::linear::LinearCase;
use super::values::{Random, Tensor};
use super::{Case, assert_same, backends, download, upload};

#[test]
fn more_threads_than_cores_change_no_bit() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for isa in [Isa::detect(), Isa::Scalar] {
        let [alone, crowded] = [1, 3 * cores].map(|threads| Cpu::new(CpuOptions { threads, isa: Some(isa), ..CpuOptions::default() }));
        assert_eq!(crowded.threads(), 3 * cores);
        let mut random = Random(12);
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 32 }, Dtype::Q4K] {
            // One row, and more than a tile.
            for row_count in [1, 13] {
                let parts = [dtype, dtype, dtype];
                let case = LinearCase::random(&mut random, &parts, row_count, 512, 400);
                assert_same(&format!("{}, {dtype}", crowded.describe()), &case.run(&alone), &case.run(&crowded));
            }
        }
        for _ in 0..20 {
            let chunk = Chunk::random(&mut random);
            assert_same(&format!("{}, attention", crowded.describe()), &chunk.run(&alone), &chunk.run(&crowded));
        }
        // Else the pool was never asked, and nothing is shown.
        assert!(alone.barriers() == 0 && crowded.barriers() > 30, "{} barriers", crowded.barriers());
    }
}

/// The tensor's bytes at an address that is `remainder` modulo 64, within a vector that holds them.
fn placed(tensor: &Tensor, remainder: usize) -> (Arc<Vec<u8>>, std::ops::Range<usize>) {
    let mut memory = vec![0xa5; tensor.bytes.len() + 128];
    let start = memory.as_ptr().align_offset(64) + remainder;
    let range = start..start + tensor.bytes.len();
    memory[range.clone()].copy_from_slice(&tensor.bytes);
    assert_eq!(memory[range.clone()].as_ptr().addr() % 64, remainder);
    (Arc::new(memory), range)
}

/// What a layer, a table and (of floats) a vector made from bytes at this address give.
fn values_at<O: Ops>(ops: &O, tensor: &Tensor, remainder: usize, x: &[f32], row_count: usize) -> [Vec<f32>; 3] {
    let (memory, range) = placed(tensor, remainder);
    let view = TensorView { bytes: &memory[range], ..tensor.view() };
    let linear = ops.linear(&[view]).unwrap();
    let mut out = ops.buffer(row_count * tensor.rows).unwrap();
    ops.linear_apply(&mut out, &upload(ops, x), row_count, &linear, None, Finish::Store);

    let table = ops.table(view, Arc::<Vec<u8>>::clone(&memory)).unwrap();
    let mut rows = ops.buffer(2 * tensor.cols).unwrap();
    ops.embed(&mut rows, 0, &table, &[tensor.rows as u32 - 1, 0], 1.0);

    let mut normed = ops.buffer(tensor.cols).unwrap();
    if tensor.dtype.group().is_none() {
        let first = TensorView { rows: 1, bytes: &view.bytes[..view.bytes.len() / tensor.rows], ..view };
        let weight = ops.vector(&[first]).unwrap();
        let kind = ashlar_kernels::ops::NormKind::Rms { weight_offset: 0.0 };
        ops.norm(&mut normed, &upload(ops, &x[..tensor.cols]), 0..1, tensor.cols, kind, 1e-5, &weight, None);
    }
    [download(ops, &out, row_count * tensor.rows), download(ops, &rows, 2 * tensor.cols), download(ops, &normed, tensor.cols)]
}

#[test]
fn bytes_may_lie_at_any_address() {
    let mut random = Random(13);
    let ours = [Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 32 }, Dtype::Int8Minimum { group: 32 }, Dtype::Int1 { group: 128 }];
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Q8_0, Dtype::Q4_1, Dtype::Q4K, Dtype::Q6K];
    for dtype in dtypes.into_iter().chain(ours) {
        let tensor = random.tensor(dtype, 37, 512);
        let x = random.tame(3 * 512);
        let expected = values_at(&Reference::default(), &tensor, 0, &x, 3);
        for remainder in [0, 1, 3, 63] {
            let odd = values_at(&Reference::default(), &tensor, remainder, &x, 3);
            for (expected, odd) in expected.iter().zip(&odd) {
                assert_same(&format!("reference, {dtype} at {remainder}"), expected, odd);
            }
            for cpu in backends() {
                for (expected, got) in expected.iter().zip(&values_at(cpu, &tensor, remainder, &x, 3)) {
                    assert_same(&format!("{}, {dtype} at {remainder}", cpu.describe()), expected, got);
                }
            }
        }
    }
}

#[test]
fn packed_layers_keep_their_size() {
    let mut random = Random(9);
    let cpu = &backends()[0];
    for (dtype, bits) in [
        (Dtype::F32, 32.0),
        (Dtype::Bf16, 16.0),
        (Dtype::Q8_0, 8.5),
        (Dtype::Int4 { group: 128 }, 4.125),
        (Dtype::Q4_1, 5.0),
        (Dtype::Int8Minimum { group: 32 }, 9.0),
        (Dtype::Int4Minimum { group: 64 }, 4.5),
        (Dtype::Int1 { group: 128 }, 1.125),
        (Dtype::Q4K, 4.625),
        (Dtype::Q5K, 8.625),
        (Dtype::Q6K, 8.5625),
    ] {
        let tensor = random.tensor(dtype, 64, 512);
        let linear = cpu.linear(&[tensor.view()]).unwrap();
        assert_eq!(cpu.linear_bytes(&linear) as f64 * 8.0 / (64.0 * 512.0), bits, "{dtype}");
    }
}
