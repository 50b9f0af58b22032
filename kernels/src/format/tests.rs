use super::*;
use proptest::prelude::*;

const ALL: [Dtype; 22] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::Int8 { group: 32 },
    Dtype::Int8 { group: 4 },
    Dtype::Int4 { group: 32 },
    Dtype::Int4 { group: 512 },
    Dtype::Int8Minimum { group: 32 },
    Dtype::Int8Minimum { group: 1 },
    Dtype::Int4Minimum { group: 64 },
    Dtype::Int4Zero { group: 64 },
    Dtype::Fp8 { group: 128 },
    Dtype::Int1 { group: 128 },
    Dtype::Int1 { group: 2 },
    Dtype::Q8_0,
    Dtype::Q4_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q5_1,
    Dtype::Q4K,
    Dtype::Q5K,
    Dtype::Q6K,
];

#[test]
fn names_round_trip() {
    for dtype in ALL {
        assert_eq!(dtype.to_string().parse(), Ok(dtype));
        let json = serde_json::to_string(&dtype).unwrap();
        assert_eq!(json, format!("\"{dtype}\""));
        assert_eq!(serde_json::from_str::<Dtype>(&json).unwrap(), dtype);
    }
    assert_eq!(Dtype::Int8Minimum { group: 32 }.to_string(), "int8mg32");
    assert_eq!(Dtype::Int4Minimum { group: 64 }.to_string(), "int4mg64");
    assert_eq!(Dtype::Int4Zero { group: 64 }.to_string(), "int4zg64");
    assert_eq!(Dtype::Fp8 { group: 128 }.to_string(), "fp8g128");
    assert_eq!(Dtype::Int1 { group: 128 }.to_string(), "int1g128");
    for bad in [
        "int1mg32",
        "int4m64",
        "int4g64m",
        "int4mmg64",
        "int8m",
        "int1g0",
        "int1g1024",
        "",
        "int8",
        "int8g",
        "int8g3",
        "int8g0",
        "int8g032",
        "int4g1024",
        "Q8_0",
        "int9g32",
        "g32",
    ] {
        assert_eq!(bad.parse::<Dtype>(), Err(UnknownDtype(bad.to_owned())), "{bad}");
    }
}

#[test]
fn sizes_follow_the_layouts() {
    assert_eq!(Dtype::F32.bytes(3, 5), Some(60));
    assert_eq!(Dtype::Bf16.bytes(3, 5), Some(30));
    assert_eq!(Dtype::Int8 { group: 32 }.bytes(2, 33), Some(2 * (33 + 4)));
    assert_eq!(Dtype::Int4 { group: 32 }.bytes(2, 33), Some(2 * (17 + 4)));
    assert_eq!(Dtype::Int8Minimum { group: 32 }.bytes(2, 33), Some(2 * (33 + 4 + 4)));
    assert_eq!(Dtype::Int4Minimum { group: 32 }.bytes(2, 33), Some(2 * (17 + 4 + 4)));
    assert_eq!(Dtype::Int4Minimum { group: 128 }.bytes(3, 576), Some(3 * (288 + 10 + 10)));
    assert_eq!(Dtype::Int1 { group: 32 }.bytes(2, 33), Some(2 * (5 + 4)));
    assert_eq!(Dtype::Int1 { group: 128 }.bytes(1, 7), Some(1 + 2));
    assert_eq!(Dtype::Int1 { group: 128 }.bytes(usize::MAX / 2, 128), None);
    assert_eq!(Dtype::Int4Minimum { group: 32 }.sections(2, 33), Some([34, 8, 8]));
    assert_eq!(Dtype::Int4 { group: 32 }.sections(2, 33), Some([34, 8, 0]));
    assert_eq!(Dtype::Int4Zero { group: 32 }.sections(2, 33), Some([34, 8, 4]));
    assert_eq!(Dtype::Fp8 { group: 32 }.sections(2, 33), Some([66, 16, 0]));
    assert_eq!(Dtype::Q4_1.sections(2, 64), None);
    assert_eq!(Dtype::Int4 { group: 3 }.bytes(2, 33), None);
    assert_eq!(Dtype::Int4 { group: 0 }.bytes(2, 33), None);
    assert_eq!(Dtype::Q4_1.bytes(2, 64), Some(2 * 2 * 20));
    assert_eq!(Dtype::Q4_1.bytes(2, 65), None);
    assert_eq!(Dtype::Q6K.bytes(1, 512), Some(420));
    assert_eq!(Dtype::Q6K.bytes(1, 128), None);
    assert_eq!(Dtype::F32.bytes(usize::MAX / 8, 4), None);
    assert_eq!(Dtype::F32.bytes(0, 4), Some(0));
}

#[test]
fn wrong_length_and_shape_are_refused() {
    let view = TensorView { dtype: Dtype::Q8_0, rows: 2, cols: 32, bytes: &[0; 67] };
    assert!(matches!(view.check(), Err(PackError::Length { expected_bytes: 68, actual_bytes: 67, .. })));
    let view = TensorView { cols: 33, ..view };
    assert!(matches!(view.check(), Err(PackError::Shape { cols: 33, .. })));
}

#[test]
fn gguf_formats_dequantise_as_the_gguf_package_does() {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gguf_dequant.safetensors")).unwrap();
    let fixture = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for dtype in ALL.into_iter().filter(|dtype| dtype.block_columns() > 1) {
        let stored = fixture.tensor(&format!("{dtype}.bytes")).unwrap();
        let expected = fixture.tensor(&format!("{dtype}.f32")).unwrap();
        let view = TensorView { dtype, rows: expected.shape()[0], cols: expected.shape()[1], bytes: stored.data() };
        view.check().unwrap();
        assert_eq!(first_non_finite(&view), None);
        let (expected, _) = expected.data().as_chunks::<4>();
        for (index, (got, expected)) in dequantise(&view).iter().zip(expected).enumerate() {
            let expected = f32::from_le_bytes(*expected);
            // The sign of a zero depends on whether a minimum was added or subtracted; it is no part of the format.
            assert!(
                got.to_bits() == expected.to_bits() || (*got == 0.0 && expected == 0.0),
                "{dtype} element {index}: {got} is not {expected}"
            );
        }
    }
}

#[test]
fn non_finite_values_are_found_where_they_are() {
    let mut weights = vec![1.0f32; 9000];
    assert_eq!(
        first_non_finite(&TensorView { dtype: Dtype::F32, rows: 9, cols: 1000, bytes: &quantise(Dtype::F32, 9, 1000, &weights).unwrap() }),
        None
    );
    weights[8123] = f32::NEG_INFINITY;
    weights[8999] = f32::NAN;
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let bytes = quantise(dtype, 9, 1000, &weights).unwrap();
        assert_eq!(first_non_finite(&TensorView { dtype, rows: 9, cols: 1000, bytes: &bytes }), Some(8123));
    }
    let dtype = Dtype::Int8 { group: 32 };
    let mut bytes = quantise(dtype, 3, 70, &[0.5; 210]).unwrap();
    let scale = 210 + (3 + 2) * 2; // row 1, group 2 of 3
    bytes[scale..scale + 2].copy_from_slice(&half::f16::NAN.to_le_bytes());
    assert_eq!(first_non_finite(&TensorView { dtype, rows: 3, cols: 70, bytes: &bytes }), Some(70 + 64));
    let dtype = Dtype::Int4Minimum { group: 32 };
    let good = quantise(dtype, 3, 70, &[0.5; 210]).unwrap();
    let [codes, scales, _] = dtype.sections(3, 70).unwrap();
    let mut bytes = good.clone();
    let minimum = codes + scales + (2 * 3 + 1) * 2; // row 2, group 1 of 3
    bytes[minimum..minimum + 2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    let view = TensorView { dtype, rows: 3, cols: 70, bytes: &bytes };
    assert_eq!(first_non_finite(&view), Some(2 * 70 + 32));
    assert_eq!(first_non_finite(&TensorView { bytes: &good, ..view }), None);
    let mut bytes = vec![0; 3 * 144];
    bytes[2 * 144 + 2..2 * 144 + 4].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    assert_eq!(first_non_finite(&TensorView { dtype: Dtype::Q4K, rows: 3, cols: 256, bytes: &bytes }), Some(512));
}

#[test]
fn gguf_formats_are_not_written() {
    assert_eq!(quantise(Dtype::Q8_0, 1, 32, &[0.0; 32]), None);
    assert_eq!(quantise(Dtype::F32, 2, 32, &[0.0; 32]), None);
}

#[test]
fn empty_matrices_have_no_bytes() {
    for dtype in ALL.into_iter().filter(|dtype| quantise(*dtype, 0, 0, &[]).is_some()) {
        for (rows, cols) in [(0, 0), (0, 5), (5, 0)] {
            assert_eq!(quantise(dtype, rows, cols, &[]), Some(vec![]));
            let view = TensorView { dtype, rows, cols, bytes: &[] };
            assert!(dequantise(&view).is_empty());
            assert_eq!(first_non_finite(&view), None);
        }
    }
}

/// The layouts of docs/block-format.md, byte by byte: two rows of three weights in groups of two.
#[test]
fn planar_layouts_are_codes_then_scales_then_minima() {
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    let stored = |dtype, codes: &[u8], halves: &[f32]| {
        let bytes: Vec<u8> = codes.iter().copied().chain(halves.iter().flat_map(|x| half(*x))).collect();
        let view = TensorView { dtype, rows: 2, cols: 3, bytes: &bytes };
        view.check().unwrap();
        dequantise(&view)
    };
    let group = 2;
    let scales = [1.0, 2.0, 0.5, 4.0];
    let both = [1.0, 2.0, 0.5, 4.0, 10.0, 20.0, 30.0, 40.0];
    assert_eq!(stored(Dtype::Int8 { group }, &[1, 0xff, 3, 4, 5, 0x80], &scales), [1.0, -1.0, 6.0, 2.0, 2.5, -512.0]);
    assert_eq!(stored(Dtype::Int8Minimum { group }, &[1, 0xff, 3, 4, 5, 0x80], &both), [11.0, 9.0, 26.0, 32.0, 32.5, -472.0]);
    assert_eq!(stored(Dtype::Int4 { group }, &[0x90, 0x08, 0xf7, 0x07], &scales), [-8.0, 1.0, 0.0, -0.5, 3.5, -4.0]);
    assert_eq!(stored(Dtype::Int4Minimum { group }, &[0x90, 0x08, 0xf7, 0x07], &both), [10.0, 19.0, 36.0, 33.5, 37.5, 68.0]);
    assert_eq!(stored(Dtype::Int1 { group }, &[0b101, 0b010], &scales), [1.0, -1.0, 2.0, -0.5, 0.5, -4.0]);
}

#[test]
fn zero_points_are_bytes_behind_the_scales() {
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    let mut bytes = vec![0x90, 0x08, 0xf7, 0x07];
    bytes.extend([1.0, 2.0, 0.5, 4.0].into_iter().flat_map(half));
    bytes.extend([8, 0, 16, 7]);
    let view = TensorView { dtype: Dtype::Int4Zero { group: 2 }, rows: 2, cols: 3, bytes: &bytes };
    view.check().unwrap();
    assert_eq!(dequantise(&view), [-8.0, 1.0, 16.0, -4.5, -0.5, 0.0]);
}

#[test]
fn eight_bit_floats_lie_before_their_f32_scales() {
    let mut bytes = vec![0x38, 0xbc, 0x01, 0x7e, 0x00, 0x80];
    bytes.extend([1.0f32, 0.1, 0.5, 3.0].into_iter().flat_map(f32::to_le_bytes));
    let dtype = Dtype::Fp8 { group: 2 };
    let view = TensorView { dtype, rows: 2, cols: 3, bytes: &bytes };
    view.check().unwrap();
    assert_eq!(dequantise(&view), [1.0, -1.5, 0.001953125 * 0.1, 224.0, 0.0, -0.0]);
    assert_eq!(first_non_finite(&view), None);
    for (at, broken, index) in [(4, 0xff, 4), (13, 0xff, 2), (9, 0x7f, 0)] {
        let mut bytes = bytes.clone();
        bytes[at] = broken;
        if at > 6 {
            bytes[at - 1] = 0xff;
        }
        assert_eq!(first_non_finite(&TensorView { dtype, rows: 2, cols: 3, bytes: &bytes }), Some(index), "byte {at}");
    }
}

const WITH_MINIMUM: [Dtype; 2] = [Dtype::Int8Minimum { group: 32 }, Dtype::Int4Minimum { group: 32 }];

#[test]
fn equal_weights_are_kept() {
    // 1, 0.1 and the like are no f16: what the minimum leaves over is for the scale.
    for value in [0.0f32, -0.0, 1.0, -1.0, 0.1, -0.3333, 1234.5, -60_000.0, 1e-4] {
        for dtype in WITH_MINIMUM.into_iter().chain([Dtype::Int8 { group: 32 }, Dtype::Int1 { group: 32 }]) {
            let bytes = quantise(dtype, 2, 40, &[value; 80]).unwrap();
            // An f16 scale is off by up to 2^-11 of itself; with a minimum only of the little that is left over. Or it is 2^-25 off,
            // times a code of 127.
            let bound = value.abs() * if dtype.has_minimum() { 1e-6 } else { 4.9e-4 } + 4e-6;
            for got in dequantise(&TensorView { dtype, rows: 2, cols: 40, bytes: &bytes }) {
                assert!((got - value).abs() <= bound, "{dtype}: {value} became {got}");
            }
        }
    }
}

#[test]
fn extreme_weights_stay_finite() {
    let tiny: Vec<f32> = (0..64).map(|i| f32::from_bits(i * 0x1_0001) * if i % 3 == 0 { -1.0 } else { 1.0 }).collect();
    let small: Vec<f32> = (0..64).map(|i| (i as f32 - 40.0) * 3e-9).collect();
    let huge: Vec<f32> = (0..64).map(|i| (i as f32 - 31.5) * 1e37).collect();
    let mut lonely = vec![0.0; 64];
    lonely[5] = f32::MAX;
    lonely[40] = -f32::MIN_POSITIVE;
    for weights in [&tiny, &small, &huge, &lonely, &vec![f32::MAX; 64], &vec![f32::MIN; 64]] {
        for dtype in ALL {
            if let Some(bytes) = quantise(dtype, 2, 32, weights)
                && dtype.group().is_some()
            {
                let view = TensorView { dtype, rows: 2, cols: 32, bytes: &bytes };
                assert_eq!(first_non_finite(&view), None, "{dtype}");
                let got = dequantise(&view);
                assert!(got.iter().all(|w| w.is_finite()), "{dtype}");
                let amax = weights.iter().fold(0f32, |max, w| max.max(w.abs()));
                assert!(amax > 1.0 || got.iter().all(|w| w.abs() < 1e-5), "{dtype}");
            }
        }
    }
}

#[test]
fn one_bit_weights_are_signs_of_the_mean_magnitude() {
    let dtype = Dtype::Int1 { group: 4 };
    let weights = [1.0, -3.0, 0.0, 4.0, -0.5, 0.25];
    let bytes = quantise(dtype, 1, 6, &weights).unwrap();
    assert_eq!(bytes[0], 0b10_1101);
    assert_eq!(dequantise(&TensorView { dtype, rows: 1, cols: 6, bytes: &bytes }), [2.0, -2.0, 2.0, 2.0, -0.375, 0.375]);
}

/// What is read is what would be written again: codes, scales and minima survive.
#[test]
fn dequantised_weights_quantise_to_themselves() {
    for (dtype, levels) in [(Dtype::Int8Minimum { group: 16 }, 127), (Dtype::Int4Minimum { group: 16 }, 15), (Dtype::Int1 { group: 16 }, 1)]
    {
        // Each group has its outermost codes.
        let base = if levels == 15 { 0.0 } else { -1.0 };
        let weights: Vec<f32> = (0..99)
            .map(|k| match k % 16 {
                0 => levels as f32,
                1 => base * levels as f32,
                _ => ((k * 7) % (levels + 1)) as f32,
            })
            .collect();
        let weights: Vec<f32> = if levels == 1 {
            weights.iter().map(|w| if *w > 0.0 { 0.5 } else { -0.5 }).collect()
        } else {
            weights.iter().map(|w| w * 0.25 - 3.0).collect()
        };
        let bytes = quantise(dtype, 1, 99, &weights).unwrap();
        let got = dequantise(&TensorView { dtype, rows: 1, cols: 99, bytes: &bytes });
        assert_eq!(got, weights, "{dtype}");
        assert_eq!(quantise(dtype, 1, 99, &got).unwrap(), bytes, "{dtype}");
    }
}

proptest! {
    #[test]
    fn quantised_weights_stay_within_half_a_step(
        rows in 1usize..4, cols in 1usize..80, group in prop::sample::select(vec![4u16, 32, 128]), seed in any::<u64>(), magnitude in -3i32..4,
    ) {
        let mut state = seed | 1;
        let weights: Vec<f32> = (0..rows * cols).map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 10f32.powi(magnitude)
        }).collect();
        for (dtype, steps) in [(Dtype::Int8 { group }, 127.0), (Dtype::Int4 { group }, 7.0)] {
            let bytes = quantise(dtype, rows, cols, &weights).unwrap();
            let view = TensorView { dtype, rows, cols, bytes: &bytes };
            prop_assert!(view.check().is_ok());
            let got = dequantise(&view);
            for (row, got) in weights.chunks(cols).zip(got.chunks(cols)) {
                for (weights, got) in row.chunks(usize::from(group)).zip(got.chunks(usize::from(group))) {
                    let amax = weights.iter().fold(0f32, |m, w| m.max(w.abs()));
                    // Scales are f16: half a unit of a small one times a code of 127 is 4e-6. int4 may clip at the far end.
                    let bound = if steps > 100.0 { amax * (0.51 / steps + 1e-3) } else { amax * 0.26 } + 4.5e-6;
                    for (w, g) in weights.iter().zip(got) {
                        prop_assert!((w - g).abs() <= bound, "{dtype}: {w} became {g}, amax {amax}");
                    }
                }
            }
        }
    }

    #[test]
    fn weights_with_a_minimum_stay_within_half_a_step_of_their_range(
        rows in 1usize..4, cols in 1usize..80, group in prop::sample::select(vec![4u16, 16, 32, 64, 128]), seed in any::<u64>(),
        magnitude in -3i32..4, centre in -3f32..3.0,
    ) {
        let mut state = seed | 1;
        let weights: Vec<f32> = (0..rows * cols).map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0 + centre) * 10f32.powi(magnitude)
        }).collect();
        for (dtype, steps) in [(Dtype::Int8Minimum { group }, 254.0), (Dtype::Int4Minimum { group }, 15.0)] {
            let bytes = quantise(dtype, rows, cols, &weights).unwrap();
            let view = TensorView { dtype, rows, cols, bytes: &bytes };
            prop_assert!(view.check().is_ok());
            let got = dequantise(&view);
            for (row, got) in weights.chunks(cols).zip(got.chunks(cols)) {
                for (weights, got) in row.chunks(usize::from(group)).zip(got.chunks(usize::from(group))) {
                    let (least, most) = weights.iter().fold((f32::MAX, f32::MIN), |(l, m), &w| (l.min(w), m.max(w)));
                    // The f16 minimum lies up to 2^-10 of itself off, which widens the range; an f16 scale adds 2^-11 of it, and
                    // where it is subnormal 2^-25 for each code.
                    let spread = most - least + 2.0 * least.abs().max(most.abs()) / 1024.0;
                    let bound = spread * (0.51 / steps + 5e-4) + 4.5e-6;
                    for (w, g) in weights.iter().zip(got) {
                        prop_assert!((w - g).abs() <= bound, "{dtype}: {w} became {g}, within {least}..{most}");
                    }
                }
            }
        }
    }

    #[test]
    fn one_bit_weights_keep_sign_and_mean(cols in 1usize..300, group in prop::sample::select(vec![32u16, 64, 128, 512]), seed in any::<u64>()) {
        let mut state = seed | 1;
        let weights: Vec<f32> = (0..cols).map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }).collect();
        let dtype = Dtype::Int1 { group };
        let bytes = quantise(dtype, 1, cols, &weights).unwrap();
        let got = dequantise(&TensorView { dtype, rows: 1, cols, bytes: &bytes });
        for (weights, got) in weights.chunks(usize::from(group)).zip(got.chunks(usize::from(group))) {
            let mean = weights.iter().map(|w| w.abs()).sum::<f32>() / weights.len() as f32;
            for (w, g) in weights.iter().zip(got) {
                prop_assert!((w >= &0.0) == (g > &0.0) || *g == 0.0);
                prop_assert!((g.abs() - mean).abs() <= mean * 1e-3 + 1e-6, "{g} of {mean}");
            }
        }
    }
}
