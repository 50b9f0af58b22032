//! One suite for every op and every CPU backend: the result must have the reference's bits, for any instruction set,
//! thread count, batch and chunk. A new op adds a [`Case`]; a new backend adds a line in [`backends`].

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

mod attention;
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

/// One input of one op, runnable on any device.
trait Case {
    fn run<O: Ops>(&self, ops: &O) -> Vec<f32>;

    /// What the devices compute bf16 weights from.
    fn bf16_compute(&self) -> Bf16Compute {
        Bf16Compute::F32
    }
}

/// Runs the case on every backend, asserts equal bits, and gives the result back.
#[track_caller]
fn check(case: &impl Case) -> Vec<f32> {
    let expected = case.run(&Reference { bf16_compute: case.bf16_compute() });
    for cpu in backends_of(case.bf16_compute()) {
        assert_same(&cpu.describe(), &expected, &case.run(cpu));
    }
    expected
}

#[track_caller]
fn assert_same(what: &str, expected: &[f32], got: &[f32]) {
    assert_eq!(expected.len(), got.len(), "{what}: lengths");
    for (index, (e, g)) in expected.iter().zip(got).enumerate() {
        // What a NaN's bits are is nobody's contract; inputs that overflow make some.
        assert!(e.to_bits() == g.to_bits() || (e.is_nan() && g.is_nan()), "{what}: element {index} is {g:e}, expected {e:e}");
    }
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

/// A device buffer with these values.
fn upload<O: Ops>(ops: &O, values: &[f32]) -> O::Buffer {
    let mut buffer = ops.buffer(values.len()).unwrap();
    ops.upload(&mut buffer, 0, values);
    buffer
}

fn download<O: Ops>(ops: &O, buffer: &O::Buffer, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    ops.download(buffer, 0, &mut values);
    values
}

#[test]
fn every_instruction_set_of_this_machine_is_tested() {
    let missing = Isa::ALL.iter().filter(|isa| !isa.available()).count();
    println!("{} backends; skipped: {missing} instruction sets that this machine lacks", backends().len());
    assert_eq!(backends().len(), 2 * (Isa::ALL.len() - missing) + 1);
    assert_eq!(Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() }).isa(), backends()[0].isa());
}
