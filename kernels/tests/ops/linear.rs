//! Linear layers of every format: equal bits over shapes, batches and fused parts.

use super::values::{Random, Tensor};
use super::{Case, assert_same, backends, backends_of, check, download, upload};
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::{Activation, Bf16Compute, Finish, Ops, PackError};
use ashlar_kernels::reference::Reference;
use proptest::prelude::*;

pub(super) struct LinearCase {
    finish: Finish,
    x: Vec<f32>,
    row_count: usize,
    parts: Vec<Tensor>,
    bias: Option<Vec<f32>>,
    bf16_compute: Bf16Compute,
}

impl LinearCase {
    fn inputs(&self) -> usize {
        self.parts[0].cols
    }

    fn outputs(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    pub(super) fn random(random: &mut Random, dtypes: &[Dtype], row_count: usize, cols: usize, rows_max: usize) -> Self {
        let parts: Vec<_> = dtypes
            .iter()
            .map(|&dtype| {
                let rows = 1 + random.below(rows_max);
                random.tensor(dtype, rows, cols)
            })
            .collect();
        let outputs = parts.iter().map(|part| part.rows).sum();
        let bias = (random.below(2) == 0).then(|| random.tame(outputs));
        Self { bias, ..Self::of(random.wild(row_count, cols), row_count, parts) }
    }

    pub(super) fn of(x: Vec<f32>, row_count: usize, parts: Vec<Tensor>) -> Self {
        Self { finish: Finish::Store, x, row_count, parts, bias: None, bf16_compute: Bf16Compute::F32 }
    }

    /// The same on devices that compute bf16 weights from bf16.
    pub(super) fn paired(self) -> Self {
        Self { bf16_compute: Bf16Compute::Bf16, ..self }
    }

    /// The layer added to what is there, then gated: equal bits for both.
    pub(super) fn check_added_and_gated(mut self, random: &mut Random) {
        self.finish = Finish::Add;
        check(&self);
        let up = random.tensor(self.parts[0].dtype, self.parts[0].rows, self.inputs());
        self.parts.push(up);
        self.bias = self.bias.map(|bias| [bias.clone(), random.tame(bias.len())].concat());
        self.finish = Finish::Gate(random.pick(&[Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu]));
        check(&self);
    }
}

impl Case for LinearCase {
    fn bf16_compute(&self) -> Bf16Compute {
        self.bf16_compute
    }

    fn run<O: Ops>(&self, ops: &O) -> Vec<f32> {
        let views: Vec<_> = self.parts.iter().map(Tensor::view).collect();
        let linear = ops.linear(&views).unwrap();
        let bias = self.bias.as_ref().map(|bias| ops.vector_f32(bias).unwrap());
        let x = upload(ops, &self.x);
        let len = self.row_count * self.outputs();
        let mut out = match self.finish {
            Finish::Add => upload(ops, &(0..len).map(|i| (i % 37) as f32 * 0.25 - 3.0).collect::<Vec<_>>()),
            // What a buffer held before must not matter.
            Finish::Store | Finish::Gate(_) => upload(ops, &vec![f32::NAN; len]),
        };
        ops.linear_apply(&mut out, &x, self.row_count, &linear, bias.as_ref(), self.finish);
        let len = if let Finish::Gate(_) = self.finish { len / 2 } else { len };
        download(ops, &out, len)
    }
}

/// Equal bits on all backends, and row r alone equals row r of the batch.
pub(super) fn check_rows(case: &LinearCase, random: &mut Random) {
    let batch = check(case);
    if case.row_count < 2 {
        return;
    }
    let (inputs, outputs) = (case.inputs(), case.outputs());
    let row = random.below(case.row_count);
    let views: Vec<_> = case.parts.iter().map(Tensor::view).collect();
    for cpu in backends_of(case.bf16_compute) {
        let linear = cpu.linear(&views).unwrap();
        let bias = case.bias.as_ref().map(|bias| cpu.vector_f32(bias).unwrap());
        let x = upload(cpu, &case.x[row * inputs..][..inputs]);
        let mut out = cpu.buffer(outputs).unwrap();
        cpu.linear_apply(&mut out, &x, 1, &linear, bias.as_ref(), case.finish);
        assert_same(&format!("{}, row {row} alone", cpu.describe()), &batch[row * outputs..][..outputs], &download(cpu, &out, outputs));
    }
}

/// Columns that a format can have, with a taste for the borders of slices.
fn columns(random: &mut Random, dtype: Dtype) -> usize {
    match dtype.block_columns() {
        1 if random.below(3) == 0 => random.pick(&[511, 512, 513, 576, 1023, 1024, 1030]),
        1 => 1 + random.below(140),
        32 => 32 * random.pick(&[1, 2, 3, 15, 16, 17, 18, 33]),
        block => block * random.pick(&[1, 2, 3, 5]),
    }
}

/// Mostly small batches, and the heights around tiles and blocks.
fn rows(random: &mut Random) -> usize {
    random.pick(&[1, 1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 31, 70])
}

macro_rules! formats {
    ($($name:ident: $dtype:expr;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 10, failure_persistence: None, ..ProptestConfig::default() })]
            $(
                #[test]
                fn $name(seed in any::<u64>()) {
                    let mut random = Random(seed);
                    let dtype = $dtype(&mut random);
                    let (row_count, cols) = (rows(&mut random), columns(&mut random, dtype));
                    // Long rows and large batches come with fewer outputs, which keeps the scalar sides quick.
                    let rows_max = (1_500_000 / (row_count * cols)).clamp(4, 70);
                    let case = LinearCase::random(&mut random, &[dtype], row_count, cols, rows_max);
                    check_rows(&case, &mut random);
                }
            )*
        }
    };
}

const GROUPS: [u16; 9] = [1, 4, 8, 16, 32, 64, 128, 256, 512];

formats! {
    linear_f32_has_the_reference_bits: |_: &mut Random| Dtype::F32;
    linear_f16_has_the_reference_bits: |_: &mut Random| Dtype::F16;
    linear_bf16_has_the_reference_bits: |_: &mut Random| Dtype::Bf16;
    linear_int8_has_the_reference_bits: |random: &mut Random| Dtype::Int8 { group: random.pick(&GROUPS) };
    linear_int4_has_the_reference_bits: |random: &mut Random| Dtype::Int4 { group: random.pick(&GROUPS) };
    linear_int8m_has_the_reference_bits: |random: &mut Random| Dtype::Int8Minimum { group: random.pick(&GROUPS) };
    linear_int4m_has_the_reference_bits: |random: &mut Random| Dtype::Int4Minimum { group: random.pick(&GROUPS) };
    linear_int4z_has_the_reference_bits: |random: &mut Random| Dtype::Int4Zero { group: random.pick(&GROUPS) };
    linear_fp8_has_the_reference_bits: |random: &mut Random| Dtype::Fp8 { group: random.pick(&GROUPS) };
    linear_int1_has_the_reference_bits: |random: &mut Random| Dtype::Int1 { group: random.pick(&GROUPS) };
    linear_q8_0_has_the_reference_bits: |_: &mut Random| Dtype::Q8_0;
    linear_q4_0_has_the_reference_bits: |_: &mut Random| Dtype::Q4_0;
    linear_q4_1_has_the_reference_bits: |_: &mut Random| Dtype::Q4_1;
    linear_q5_0_has_the_reference_bits: |_: &mut Random| Dtype::Q5_0;
    linear_q5_1_has_the_reference_bits: |_: &mut Random| Dtype::Q5_1;
    linear_q4_k_has_the_reference_bits: |_: &mut Random| Dtype::Q4K;
    linear_q5_k_has_the_reference_bits: |_: &mut Random| Dtype::Q5K;
    linear_q6_k_has_the_reference_bits: |_: &mut Random| Dtype::Q6K;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 10, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn parts_of_different_formats_make_one_layer(seed in any::<u64>()) {
        let mut random = Random(seed);
        let floats = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        let gguf = [Dtype::Q8_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q6K, Dtype::Q5K, Dtype::Q4K];
        let dtypes: Vec<_> = (0..1 + random.below(4)).map(|_| match random.below(5) {
            0 => random.pick(&floats),
            1 | 2 => random.pick(&gguf),
            // Several groups, so that parts share quantised activations, or must not.
            _ => {
                let group = random.pick(&[16, 32, 128]);
                random.pick(&planar(group))
            }
        }).collect();
        let row_count = 1 + random.below(9);
        let case = LinearCase::random(&mut random, &dtypes, row_count, 768, 40);
        check_rows(&case, &mut random);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 5, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sums_are_added_and_gated_as_the_ops_would_one_after_the_other(seed in any::<u64>()) {
        let mut random = Random(seed);
        let dtype = random.pick(&[Dtype::F32, Dtype::Bf16, Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 64 }, Dtype::Q4_1]);
        let (row_count, cols) = (rows(&mut random), random.pick(&[32, 96, 544, 2080]));
        let rows_max = (1_500_000 / (row_count * cols)).clamp(4, 150);
        LinearCase::random(&mut random, &[dtype], row_count, cols, rows_max).check_added_and_gated(&mut random);
    }
}

/// Parts that may be packed as one, and halves that a device may gate where it computes them.
#[test]
fn parts_of_whole_tiles_are_one_layer() {
    let mut random = Random(12);
    let kinds = [Dtype::Int4 { group: 32 }, Dtype::Int4Minimum { group: 128 }, Dtype::Int8 { group: 64 }, Dtype::Q4K, Dtype::F32];
    for dtype in kinds {
        for (row_count, cols) in [(1, 1280), (3, 512), (13, 768), (20, 768)] {
            let parts: Vec<_> = [32, 16, 7].map(|rows| random.tensor(dtype, rows, cols)).into();
            check(&LinearCase { bias: Some(random.tame(55)), ..LinearCase::of(random.wild(row_count, cols), row_count, parts) });
            let parts = vec![random.tensor(dtype, 48, cols)];
            let case = LinearCase { bias: Some(random.tame(48)), ..LinearCase::of(random.wild(row_count, cols), row_count, parts) };
            case.check_added_and_gated(&mut random);
        }
    }
}

/// More slices than any device sums at once.
#[test]
fn long_rows_are_summed_in_order() {
    let mut random = Random(13);
    for dtype in [Dtype::Bf16, Dtype::Int8Minimum { group: 32 }, Dtype::Int4 { group: 64 }] {
        for row_count in [1, 9] {
            let parts = vec![random.tensor(dtype, 5, 17 * 512 + 96)];
            check_rows(&LinearCase::of(random.tame(row_count * parts[0].cols), row_count, parts), &mut random);
        }
    }
}

/// The planar kinds with one group.
fn planar(group: u16) -> [Dtype; 7] {
    [
        Dtype::Int8 { group },
        Dtype::Int4 { group },
        Dtype::Int8Minimum { group },
        Dtype::Int4Minimum { group },
        Dtype::Int4Zero { group },
        Dtype::Fp8 { group },
        Dtype::Int1 { group },
    ]
}

#[test]
fn planar_groups_may_end_anywhere() {
    let mut random = Random(10);
    for group in [16, 32, 64, 128] {
        for dtype in planar(group) {
            for cols in [1, 2, 7, 8, 9, 15, 17, 31, 33, 63, 65, 127, 129, 511, 512, 513, 576] {
                for row_count in [1, 3] {
                    check_rows(&LinearCase::random(&mut random, &[dtype], row_count, cols, 35), &mut random);
                }
            }
        }
    }
}

/// The largest sums that there can be: where an instruction could saturate, it would here.
#[test]
fn extreme_codes_meet_extreme_activations() {
    let mut random = Random(11);
    let gguf = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];
    let planar_kinds = [32, 128, 512].into_iter().flat_map(planar);
    for dtype in gguf.into_iter().chain(planar_kinds) {
        let (rows, cols) = (20, 1024);
        for pattern in [0x00, 0x7f, 0x80, 0x81, 0xff, 0x55] {
            // A code that is no number is refused before it is packed; the largest takes its place.
            let pattern = if matches!(dtype, Dtype::Fp8 { .. }) && pattern & 0x7f == 0x7f { pattern - 1 } else { pattern };
            // Codes of one value, scales as they come.
            let mut weights = random.tensor(dtype, rows, cols);
            let halves = match dtype.sections(rows, cols) {
                Some([codes, ..]) => {
                    weights.bytes[..codes].fill(pattern);
                    vec![]
                }
                None => super::values::half_offsets(dtype).to_vec(),
            };
            if !halves.is_empty() {
                let size = dtype.bytes(1, dtype.block_columns()).unwrap();
                for (index, byte) in weights.bytes.iter_mut().enumerate() {
                    if !halves.iter().any(|half| (*half..half + 2).contains(&(index % size))) {
                        *byte = pattern;
                    }
                }
            }
            for sign in [1.0, -1.0] {
                // All codes are 127, or they alternate.
                for second in [1.0, -1.0] {
                    let x = (0..cols).map(|k| sign * if k % 2 == 0 { 1.0 } else { second }).collect();
                    let parts = vec![Tensor { bytes: weights.bytes.clone(), ..weights }];
                    check(&LinearCase::of(x, 1, parts));
                }
            }
        }
    }
}

#[test]
fn one_bit_layers_are_sums_and_differences() {
    // Scale 2, bits 1 0 1: 2 * (3 - 5 + 7), up to the rounding of the activations, which 127 is the largest of.
    let scale = half::f16::from_f32(2.0).to_le_bytes();
    let parts = vec![Tensor { dtype: Dtype::Int1 { group: 128 }, rows: 1, cols: 3, bytes: vec![0b101, scale[0], scale[1]] }];
    assert_eq!(check(&LinearCase::of(vec![3.0, -127.0, 7.0], 1, parts)), [274.0]);
}

#[test]
fn blocks_of_rows_meet_without_a_gap() {
    let mut random = Random(5);
    for dtype in [Dtype::F32, Dtype::Int8 { group: 32 }, Dtype::Int1 { group: 64 }, Dtype::Q4_1, Dtype::Q6K] {
        for row_count in [95, 96, 97, 200] {
            check_rows(&LinearCase::random(&mut random, &[dtype], row_count, 256, 150), &mut random);
        }
    }
}

#[test]
fn many_outputs_are_spread_over_units() {
    let mut random = Random(6);
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8 { group: 64 }, Dtype::Int1 { group: 128 }, Dtype::Q4_0, Dtype::Q4K] {
        let parts = vec![random.tensor(dtype, 3000, 256), random.tensor(dtype, 17, 256)];
        check(&LinearCase::of(random.tame(256), 1, parts));
    }
}

#[test]
fn no_rows_give_no_output() {
    let mut random = Random(7);
    for dtype in [Dtype::F32, Dtype::Q8_0] {
        let parts = vec![random.tensor(dtype, 5, 64)];
        assert!(check(&LinearCase::of(vec![], 0, parts)).is_empty());
    }
}

#[test]
fn layers_that_cannot_be_are_refused() {
    let mut random = Random(8);
    let (a, b) = (random.tensor(Dtype::F32, 4, 64), random.tensor(Dtype::F32, 4, 32));
    fn refuse<O: Ops>(ops: &O, parts: &[ashlar_kernels::format::TensorView<'_>]) -> PackError {
        match ops.linear(parts) {
            Ok(_) => panic!("{} takes it", ops.describe()),
            Err(error) => error,
        }
    }
    let mut short = a.view();
    short.bytes = &short.bytes[1..];
    let mut odd = random.tensor(Dtype::Q8_0, 1, 32);
    odd.cols = 31;
    for refused in
        [refuse(&Reference::default(), &[a.view(), b.view()]), refuse(&backends()[0], &[a.view(), b.view()]), refuse(&backends()[0], &[])]
    {
        assert!(matches!(refused, PackError::Parts(_)), "{refused}");
    }
    assert!(matches!(refuse(&backends()[0], &[short]), PackError::Length { .. }));
    assert!(matches!(refuse(&backends()[0], &[odd.view()]), PackError::Shape { .. }));
}
