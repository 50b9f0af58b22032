//! How many launches linear layers take: a decode step is made of small ones, and each costs more than it computes.

use ashlar_cuda::Cuda;
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::{Activation, Columns, Finish, LinearRun, Ops, PlacedPart};

use super::recorded::recorded;
use super::upload;
use super::values::{Random, Tensor};

const INT4: Dtype = Dtype::Int4 { group: 32 };

fn layer(cuda: &Cuda, parts: &[Tensor]) -> <Cuda as Ops>::Linear {
    cuda.linear(&parts.iter().map(Tensor::view).collect::<Vec<_>>()).unwrap()
}

#[test]
fn a_block_of_int4_takes_two_launches_a_layer() {
    let Some((cuda, record)) = recorded() else { return };
    let mut random = Random(1);
    let mut of = |rows: &[usize], cols: usize| {
        let parts: Vec<Tensor> = rows.iter().map(|rows| random.tensor(INT4, *rows, cols)).collect();
        layer(&cuda, &parts)
    };
    let (qkv, o, gate_up, down) = (of(&[64, 32, 32], 64), of(&[64], 64), of(&[96, 96], 64), of(&[64], 96));
    let (mut hidden, mut wide) = (upload(&cuda, &[1.0; 64]), upload(&cuda, &[1.0; 128]));
    let mut inner = upload(&cuda, &[1.0; 96]);
    record.take(&cuda);
    cuda.linear_apply(&mut wide, &hidden, 1, &qkv, None, Finish::Store);
    cuda.linear_apply(&mut hidden, &wide, 1, &o, None, Finish::Add);
    cuda.linear_apply(&mut inner, &hidden, 1, &gate_up, None, Finish::Gate(Activation::Silu));
    cuda.linear_apply(&mut hidden, &inner, 1, &down, None, Finish::Add);
    assert_eq!(record.take(&cuda), ["quantise_g32_rows", "linear_4s_g32_rows1_any"].repeat(4));
}

/// Rows of 64 layers are copied to the card as one list, and each kernel is launched once.
#[test]
fn any_number_of_runs_take_the_launches_of_one() {
    let Some((cuda, record)) = recorded() else { return };
    let mut random = Random(2);
    let mut check = |dtype: Dtype, sizes: [usize; 2], expected: &[&str]| {
        let layers: Vec<_> = (0..64).map(|i| layer(&cuda, &[random.tensor(dtype, 16, sizes[i % 2])])).collect();
        let x = upload(&cuda, &[1.0; 64 * 96]);
        let mut out = upload(&cuda, &[1.0; 64 * 16]);
        let runs: Vec<_> = layers.iter().zip(0..).map(|(linear, row)| LinearRun { linear, bias: None, rows: row..row + 1 }).collect();
        record.take(&cuda);
        cuda.linear_runs(&mut out, Columns::dense(16), &x, Columns::dense(96), &runs, Finish::Add);
        assert_eq!(record.take(&cuda), expected, "{dtype}");
    };
    check(INT4, [96, 96], &["send", "quantise_g32_rows", "linear_4s_g32_rows1_any"]);
    // Adapters of two ranks.
    check(Dtype::Bf16, [4, 16], &["send", "linear_bf16_rows1"]);
    check(Dtype::Int1 { group: 32 }, [96, 96], &["send", "quantise_exact", "linear_integer_rows1"]);
}

/// The factors of several matrices in a row of outputs, and layers of two formats.
#[test]
fn parts_of_a_layer_share_what_they_can() {
    let Some((cuda, record)) = recorded() else { return };
    let mut random = Random(3);
    let (q, v) = (random.tensor(Dtype::F16, 20, 8), random.tensor(Dtype::F16, 12, 4));
    let part = |tensor, first_input, first_output| PlacedPart { weights: Tensor::view(tensor), first_input, first_output };
    let expand = cuda.linear_placed(&[part(&q, 0, 0), part(&v, 8, 30)]).unwrap();
    let (x, mut out) = (upload(&cuda, &[1.0; 96]), upload(&cuda, &[1.0; 96]));
    record.take(&cuda);
    let runs = [LinearRun { linear: &expand, bias: None, rows: 0..2 }];
    cuda.linear_runs(&mut out, Columns::dense(42), &x, Columns::dense(12), &runs, Finish::Add);
    assert_eq!(record.take(&cuda), ["send", "linear_f16_rows8"]);
    let formats = [INT4, INT4, Dtype::Int8 { group: 32 }, Dtype::Bf16];
    let mixed = layer(&cuda, &formats.map(|dtype| random.tensor(dtype, 16, 96)));
    record.take(&cuda);
    cuda.linear_apply(&mut out, &x, 1, &mixed, None, Finish::Store);
    let launches = ["quantise_g32_rows", "linear_4s_g32_rows1_any", "linear_8s_g32_rows1_any", "linear_bf16_rows1"];
    assert_eq!(record.take(&cuda), launches);
}
