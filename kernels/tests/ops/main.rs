//! One suite for every op and every CPU backend: the result must have the reference's bits, for any instruction set,
//! thread count, batch and chunk. A new op adds a [`Case`]; a new backend adds a line in [`backends`].

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

mod attention;
mod case;
mod claims;
mod linear;
mod linear_runs;
mod machine;
mod pairs;
mod rows;
mod symbols;
mod tables;
mod values;

use std::sync::OnceLock;

use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa};
use ashlar_kernels::ops::{Bf16Compute, Ops};
use ashlar_kernels::reference::Reference;
use case::{Case, assert_same, download, upload};

/// Runs the case on every backend, asserts equal bits, and gives the result back.
#[track_caller]
fn check(case: &impl Case) -> Vec<f32> {
    let expected = case.run(&Reference { bf16_compute: case.bf16_compute() });
    for cpu in backends_of(case.bf16_compute()) {
        assert_same(&cpu.describe(), &expected, &case.run(cpu));
    }
    expected
}

fn backends() -> &'static [Cpu] {
    backends_of(Bf16Compute::F32)
}

fn backends_of(bf16_compute: Bf16Compute) -> &'static [Cpu] {
    static BACKENDS: [OnceLock<Vec<Cpu>>; 2] = [OnceLock::new(), OnceLock::new()];
    BACKENDS[usize::from(bf16_compute == Bf16Compute::Bf16)].get_or_init(|| {
        let here = Isa::ALL.into_iter().filter(|isa| isa.available());
        let one_and_two = here.flat_map(|isa| [1, 2].map(|threads| Cpu::new(CpuOptions { threads, isa: Some(isa), bf16_compute })));
        // More threads than most machines have cores.
        one_and_two.chain([Cpu::new(CpuOptions { threads: 7, isa: None, bf16_compute })]).collect()
    })
}

#[test]
fn every_instruction_set_of_this_machine_is_tested() {
    let missing = Isa::ALL.iter().filter(|isa| !isa.available()).count();
    println!("{} backends; skipped: {missing} instruction sets that this machine lacks", backends().len());
    assert_eq!(backends().len(), 2 * (Isa::ALL.len() - missing) + 1);
    assert_eq!(Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() }).isa(), backends()[0].isa());
}
