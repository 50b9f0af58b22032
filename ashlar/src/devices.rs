//! `ashlar devices`: what this machine offers.

use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa};
use ashlar_kernels::ops::Ops;

/// Prints the devices that this build can drive.
pub fn print() {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cpu = Cpu::new(CpuOptions { threads, isa: None });
    println!("cpu    {}", cpu.describe());
    for (name, isa) in [("avx512", Isa::Avx512Vnni), ("avx-vnni", Isa::AvxVnni), ("avx2", Isa::Avx2), ("scalar", Isa::Scalar)] {
        let state = if isa.available() { "available" } else { "not on this processor" };
        println!("       {name}: {state}");
    }
    println!("cuda   this build has no CUDA device");
}
