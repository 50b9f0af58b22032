//! Prints the machine's ceilings and the linear layers' shares. Arguments: threads, instruction set (avx512-bf16, avx512, avx-vnni,
//! avx2 or scalar), a format, `NxK`, rows, and what bf16 weights are computed from (f32 or bf16); `-` stands for all.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use ashlar_kernels::bench::{BenchOptions, linear};
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa, probe};
use ashlar_kernels::ops::{Bf16Compute, Ops};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize| arguments.get(index).map(String::as_str).filter(|text| *text != "-");
    let isa = argument(1).map(|name| name.parse::<Isa>().expect("an instruction set"));
    let bf16_compute = argument(5).map_or(Bf16Compute::F32, |name| name.parse().expect("f32 or bf16"));
    let threads = argument(0).map_or(0, |text| text.parse().expect("a number of threads"));
    let cpu = Cpu::new(CpuOptions { threads, isa, bf16_compute });
    let mut options = BenchOptions::default();
    if let Some(text) = argument(2) {
        options.dtypes = text.split(',').map(|name| name.parse().expect("a format")).collect();
    }
    if let Some(text) = argument(3) {
        let (outputs, inputs) = text.split_once('x').expect("NxK");
        options.shapes = vec![(outputs.parse().expect("N"), inputs.parse().expect("K"))];
    }
    if let Some(text) = argument(4) {
        options.row_counts = text.split(',').map(|rows| rows.parse().expect("rows")).collect();
    }
    println!("{}", cpu.describe());
    let ceilings = probe::ceilings(&cpu, options.rotate_bytes).expect("memory for the probe");
    println!("{ceilings}");
    linear(&cpu, &ceilings, &options, |cell| println!("{cell}")).expect("memory for the layers");
}
