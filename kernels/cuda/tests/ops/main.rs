//! The suite of the op set (kernels/tests/ops) on the CUDA device: the bits of the reference, for any input. The card is emulated, or a real one where
//! ASHLAR_CARD has its number, as scripts/gpu-check.sh sets it.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

#[path = "../../../tests/ops/attention.rs"]
mod attention;
#[path = "../../../tests/ops/case.rs"]
mod case;
mod coverage;
mod driven;
mod launches;
#[path = "../../../tests/ops/linear.rs"]
#[expect(dead_code, reason = "cards have no paired products")]
mod linear;
#[path = "../../../tests/ops/linear_runs.rs"]
mod linear_runs;
mod recorded;
#[path = "../../../tests/ops/rows.rs"]
mod rows;
mod steps;
#[path = "../../../tests/ops/values.rs"]
mod values;

use std::sync::{Arc, OnceLock};

use ashlar_cuda::{Cache, Card, Cuda, Driver};
use ashlar_cuda_emulated::{Emulated, Order};
use ashlar_kernels::ops::{Bf16Compute, Ops};
use ashlar_kernels::reference::Reference;
use case::{Case, assert_same, download, upload};

/// Runs the case on the device, asserts equal bits, and gives the result back.
#[track_caller]
fn check(case: &impl Case) -> Vec<f32> {
    let expected = case.run(&Reference { bf16_compute: case.bf16_compute() });
    for cuda in backends_of(case.bf16_compute()) {
        assert_same(&cuda.describe(), &expected, &case.run(cuda));
    }
    expected
}

fn backends() -> &'static [Cuda] {
    backends_of(Bf16Compute::F32)
}

/// The device, where this machine has a card or can emulate one. It computes bf16 weights from f32 alone.
fn backends_of(bf16_compute: Bf16Compute) -> &'static [Cuda] {
    static CUDA: OnceLock<Vec<Cuda>> = OnceLock::new();
    let open = || open().map(|driver| Cuda::new(driver).unwrap()).into_iter().collect();
    if bf16_compute == Bf16Compute::F32 { CUDA.get_or_init(open) } else { &[] }
}

fn open() -> Option<Arc<dyn Driver>> {
    if let Ok(ordinal) = std::env::var("ASHLAR_CARD") {
        return Some(Arc::new(Card::open(ordinal.parse().unwrap(), &Cache::of_user().unwrap()).unwrap()));
    }
    // An order of each process's own, which is printed.
    let order = match std::process::id() % 3 {
        0 => Order::Ascending,
        1 => Order::Descending,
        seed => Order::Shuffled(seed.into()),
    };
    println!("the emulated card runs in order {order:?}");
    Some(Arc::new(Emulated::new(order, 1 << 32)?))
}
