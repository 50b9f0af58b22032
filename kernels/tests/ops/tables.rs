//! Rows read out of a packed layer have the bits of rows read where the tensor is stored: every format, over odd numbers of rows
//! and columns, short last groups and groups that are padded.

use std::sync::Arc;

use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::format::{Dtype, TensorView};
use ashlar_kernels::ops::{Bf16Compute, Ops};
use ashlar_kernels::reference::Reference;
use ashlar_kernels::timed::Timed;
use proptest::prelude::*;

use super::values::{Random, Tensor};
use super::{assert_same, backends, backends_of, download};

const GGUF: [Dtype; 8] = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];

/// All rows, and then all of them from the last to the first added.
fn rows_of<O: Ops>(ops: &O, table: &O::Table, tensor: &Tensor) -> Vec<f32> {
    let rows: Vec<u32> = (0..tensor.rows as u32).collect();
    let mut out = ops.buffer(tensor.rows * tensor.cols).unwrap();
    ops.embed(&mut out, 0, table, &rows, 1.0);
    let mut all = download(ops, &out, tensor.rows * tensor.cols);
    ops.embed_add(&mut out, 0, table, &rows.iter().rev().copied().collect::<Vec<_>>());
    all.extend(download(ops, &out, tensor.rows * tensor.cols));
    all
}

fn stored_rows(tensor: &Tensor) -> Vec<f32> {
    let ops = Reference::default();
    let keep = Arc::new(tensor.bytes.clone());
    let view = TensorView { bytes: &keep, ..tensor.view() };
    let table = ops.table(view, Arc::<Vec<u8>>::clone(&keep)).unwrap();
    rows_of(&ops, &table, tensor)
}

fn check(tensor: &Tensor) {
    let expected = stored_rows(tensor);
    for cpu in backends() {
        let linear = Arc::new(cpu.linear(&[tensor.view()]).unwrap());
        let table = cpu.table_of(&linear).expect("every format that keeps its bits");
        // The table keeps what it reads.
        drop(linear);
        let what = format!("{}, {} {}x{}", cpu.describe(), tensor.dtype, tensor.rows, tensor.cols);
        assert_same(&what, &expected, &rows_of(cpu, &table, tensor));
    }
}

fn dtypes(group: u16) -> impl Iterator<Item = Dtype> {
    let planar =
        [Dtype::Int8 { group }, Dtype::Int4 { group }, Dtype::Int8Minimum { group }, Dtype::Int4Minimum { group }, Dtype::Int1 { group }];
    [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Int4Zero { group }, Dtype::Fp8 { group }].into_iter().chain(planar).chain(GGUF)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows_of_a_packed_layer_have_the_bits_of_the_stored_ones(seed in any::<u64>(), rows in 1usize..40) {
        let mut random = Random(seed);
        // Groups of 1 to 4 are padded to 8 each.
        for dtype in dtypes(random.pick(&[1, 2, 4, 8, 16, 32, 64, 128, 512])) {
            let cols = match dtype.block_columns() {
                1 => random.pick(&[1, 2, 7, 33]) + random.below(600) * random.below(2),
                block => block * (1 + random.below(3)),
            };
            check(&random.tensor(dtype, rows, cols));
        }
    }
}

#[test]
fn one_column_one_row_and_whole_panels() {
    let mut random = Random(5);
    for dtype in dtypes(32) {
        let block = dtype.block_columns();
        for (rows, cols) in [(1, block), (16, block), (17, 2 * block), (32, 4 * block)] {
            check(&random.tensor(dtype, rows, cols));
        }
    }
}

#[test]
fn a_device_that_times_another_gives_its_tables() {
    let tensor = Random(6).tensor(Dtype::Int8 { group: 32 }, 37, 70);
    let ops = Timed::new(Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() }));
    let table = ops.table_of(&Arc::new(ops.linear(&[tensor.view()]).unwrap())).unwrap();
    assert_same("timed", &stored_rows(&tensor), &rows_of(&ops, &table, &tensor));
}

/// Bf16 that meets bf16 is packed without its subnormal weights; layers of several tensors have no rows of one; the reference keeps the
/// plain way.
#[test]
fn what_has_lost_bits_or_is_not_one_tensor_gives_no_table() {
    let mut random = Random(7);
    let (tensor, codes) = (random.tensor(Dtype::Bf16, 20, 40), random.tensor(Dtype::Int4 { group: 32 }, 20, 40));
    for cpu in backends_of(Bf16Compute::Bf16) {
        assert!(cpu.table_of(&Arc::new(cpu.linear(&[tensor.view()]).unwrap())).is_none());
        assert!(cpu.table_of(&Arc::new(cpu.linear(&[codes.view()]).unwrap())).is_some());
    }
    for cpu in backends() {
        assert!(cpu.table_of(&Arc::new(cpu.linear(&[codes.view(), codes.view()]).unwrap())).is_none());
    }
    let reference = Reference::default();
    assert!(reference.table_of(&Arc::new(reference.linear(&[codes.view()]).unwrap())).is_none());
}

#[test]
#[should_panic(expected = "row 17 of a table of 17")]
fn a_row_in_the_padding_of_the_last_panel_is_refused() {
    let tensor = Random(8).tensor(Dtype::Int8 { group: 32 }, 17, 32);
    let ops = Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() });
    let table = ops.table_of(&Arc::new(ops.linear(&[tensor.view()]).unwrap())).unwrap();
    ops.embed(&mut ops.buffer(32).unwrap(), 0, &table, &[17], 1.0);
}
