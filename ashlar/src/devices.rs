//! `ashlar devices`: what this machine offers; what to say of an instruction set that it lacks, or that is slow; and by what key profiles of a
//! device are kept.

use anyhow::bail;
use ashlar_cuda::{Found, compiler_version, find};
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa};
use ashlar_kernels::ops::Ops;
use ashlar_zoo::ingest::human_bytes;
use ashlar_zoo::profiles::DeviceKey;

use crate::output::{self, OutputError};

/// Prints the devices that this build can drive.
///
/// # Errors
/// When they cannot be printed.
pub fn print() -> Result<(), OutputError> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cpu = Cpu::new(CpuOptions { threads, ..CpuOptions::default() });
    output::line(format_args!("cpu    {}", cpu.describe()))?;
    for isa in Isa::ALL {
        let state = if isa.available() { "available" } else { "not on this processor" };
        output::line(format_args!("       {}: {state}", isa.name()))?;
    }
    for line in cards() {
        output::line(format_args!("cuda   {line}"))?;
    }
    Ok(())
}

/// A line for each card, or one that says why there is none; then whence their kernels come.
fn cards() -> Vec<String> {
    let (driver, cards) = match find() {
        Ok(found) => found,
        Err(error) => return vec![format!("not used: {error}")],
    };
    let line = |card: &Found| {
        let Found { ordinal, name, capability: (major, minor), memory_bytes } = card;
        let why_not = card.check().map_or_else(|error| format!("; not used: {error}"), |()| String::new());
        format!("cuda:{ordinal}  {name}, compute capability {major}.{minor}, {}{why_not}", human_bytes(*memory_bytes))
    };
    let mut lines: Vec<String> = cards.iter().map(line).collect();
    let compiler = compiler_version()
        .map_or_else(|error| format!("new kernels cannot be compiled: {error}"), |v| format!("kernels are compiled by NVRTC {v}"));
    lines.push(format!("driver of CUDA {driver}; {compiler}"));
    lines
}

/// The key of a device that this process uses: those who serve find what `zoo profile` measured, where processor, instruction set, threads and
/// arithmetic are the same.
pub fn device_key(ops: &impl Ops) -> DeviceKey {
    DeviceKey::new(&processor().unwrap_or_default(), &ops.describe())
}

/// The processor's name, where the system tells it.
pub fn processor() -> Option<String> {
    value_of(&std::fs::read_to_string("/proc/cpuinfo").ok()?, "model name").map(str::to_owned)
}

/// The first value of a name in a file of `/proc`.
pub fn value_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| Some(line.strip_prefix(name)?.trim_start().strip_prefix(':')?.trim()))
}

/// Whether this machine runs the instruction set that `setting` asks for; `None` asks for none.
///
/// # Errors
/// When it does not, with those that it runs.
pub fn check_isa(setting: &str, isa: Option<Isa>) -> anyhow::Result<()> {
    check_isa_among(setting, isa, &Isa::ALL.map(|isa| (isa, isa.available())))
}

fn check_isa_among(setting: &str, isa: Option<Isa>, machine: &[(Isa, bool)]) -> anyhow::Result<()> {
    let here: Vec<Isa> = machine.iter().filter(|(_, available)| *available).map(|(isa, _)| *isa).collect();
    match isa.filter(|isa| !here.contains(isa)) {
        None => Ok(()),
        Some(missing) => {
            let here: Vec<&str> = here.into_iter().map(Isa::name).collect();
            bail!("use {setting} `{}`: this processor lacks it and runs {}", missing.name(), here.join(", "))
        }
    }
}

/// What whoever runs a server should know of the instruction set in use.
pub fn isa_warning(isa: Isa) -> Option<&'static str> {
    match isa {
        Isa::Avx512Bf16 | Isa::Avx512Vnni | Isa::AvxVnni | Isa::Avx2 => None,
        Isa::Scalar => Some(
            "the scalar kernels are used: this processor lacks AVX2, FMA or F16C, or executor.isa asks for them; tokens are the same, but \
             each takes many times as long",
        ),
    }
}

#[cfg(test)]
mod tests {
    use ashlar_kernels::ops::Bf16Compute;

    use super::*;

    #[test]
    fn a_device_is_known_by_all_that_its_times_depend_on() {
        let key = |options| device_key(&Cpu::new(options)).to_string();
        let one = key(CpuOptions { threads: 1, isa: Some(Isa::Scalar), ..CpuOptions::default() });
        assert!(one.ends_with("-cpu-scalar-1-thread") || one == "cpu-scalar-1-thread", "{one}");
        assert_eq!(key(CpuOptions { threads: 1, isa: Some(Isa::Scalar), ..CpuOptions::default() }), one);
        assert_ne!(key(CpuOptions { threads: 2, isa: Some(Isa::Scalar), ..CpuOptions::default() }), one);
        let bf16 = CpuOptions { threads: 1, isa: Some(Isa::Scalar), bf16_compute: Bf16Compute::Bf16 };
        assert_eq!(key(bf16), format!("{one}-bf16-products"));
        let cpuinfo = "processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\nmodel name\t: Other\n";
        assert_eq!((value_of(cpuinfo, "model name"), value_of(cpuinfo, "flags")), (Some("Some CPU @ 2.0GHz"), None));
    }

    #[test]
    fn only_the_scalar_kernels_are_warned_of() {
        for isa in Isa::ALL {
            assert_eq!(isa_warning(isa).is_some(), isa == Isa::Scalar, "{isa:?}");
        }
        let warning = isa_warning(Isa::Scalar).unwrap();
        assert!(warning.contains("AVX2") && warning.contains("many times as long") && !warning.contains("  "), "{warning}");
    }

    #[test]
    fn a_missing_instruction_set_is_told_with_those_that_are_there() {
        let machine = [(Isa::Avx512Vnni, false), (Isa::AvxVnni, false), (Isa::Avx2, true), (Isa::Scalar, true)];
        for fits in [None, Some(Isa::Avx2), Some(Isa::Scalar)] {
            check_isa_among("executor.isa", fits, &machine).unwrap();
        }
        let error = check_isa_among("executor.isa", Some(Isa::Avx512Vnni), &machine).unwrap_err().to_string();
        assert_eq!(error, "use executor.isa `avx512`: this processor lacks it and runs avx2, scalar");
        check_isa("--isa", Some(Isa::detect())).unwrap();
    }
}
