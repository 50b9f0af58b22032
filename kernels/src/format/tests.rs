use super::*;
use proptest::prelude::*;

const ALL: [Dtype; 15] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::Int8 { group: 32 },
    Dtype::Int8 { group: 4 },
    Dtype::Int4 { group: 32 },
    Dtype::Int4 { group: 512 },
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
    for bad in ["", "int8", "int8g", "int8g3", "int8g0", "int8g032", "int4g1024", "Q8_0", "int9g32", "g32"] {
        assert_eq!(bad.parse::<Dtype>(), Err(UnknownDtype(bad.to_owned())), "{bad}");
    }
}

#[test]
fn sizes_follow_the_layouts() {
    assert_eq!(Dtype::F32.bytes(3, 5), Some(60));
    assert_eq!(Dtype::Bf16.bytes(3, 5), Some(30));
    assert_eq!(Dtype::Int8 { group: 32 }.bytes(2, 33), Some(2 * (33 + 4)));
    assert_eq!(Dtype::Int4 { group: 32 }.bytes(2, 33), Some(2 * (17 + 4)));
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
    for dtype in [Dtype::F32, Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 32 }] {
        for (rows, cols) in [(0, 0), (0, 5), (5, 0)] {
            assert_eq!(quantise(dtype, rows, cols, &[]), Some(vec![]));
            let view = TensorView { dtype, rows, cols, bytes: &[] };
            assert!(dequantise(&view).is_empty());
            assert_eq!(first_non_finite(&view), None);
        }
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
}
