//! What this machine offers (`ashlar devices`), and which of it is used.

use anyhow::bail;
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa};
use ashlar_kernels::ops::Ops;
use serde::{Deserialize, Serialize};

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

/// Which code the CPU kernels run; all of it gives the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum InstructionSet {
    /// The best that the machine has.
    Auto,
    /// AVX-512 with VNNI.
    Avx512,
    /// AVX2 with AVX-VNNI.
    AvxVnni,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Any machine.
    Scalar,
}

impl InstructionSet {
    /// What the kernels are asked for; `None` lets them choose.
    ///
    /// # Errors
    /// When this machine does not run it.
    pub(crate) fn choose(self) -> anyhow::Result<Option<Isa>> {
        let isa = match self {
            Self::Auto => return Ok(None),
            Self::Avx512 => Isa::Avx512Vnni,
            Self::AvxVnni => Isa::AvxVnni,
            Self::Avx2 => Isa::Avx2,
            Self::Scalar => Isa::Scalar,
        };
        if !isa.available() {
            bail!("use executor.instruction_set: this processor does not run {isa:?}; `ashlar devices` tells what it runs");
        }
        Ok(Some(isa))
    }

    /// What to warn of when the kernels end up with `isa`.
    pub(crate) fn warning(self, isa: Isa) -> Option<&'static str> {
        let slow = "the processor has neither AVX2 with FMA and F16C nor AVX-512: models run in scalar code, many times slower";
        (self == Self::Auto && isa == Isa::Scalar).then_some(slow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_code_is_warned_of_unless_it_was_asked_for() {
        assert!(InstructionSet::Auto.warning(Isa::Scalar).is_some_and(|warning| warning.contains("many times slower")));
        assert_eq!(InstructionSet::Auto.warning(Isa::Avx2), None);
        assert_eq!(InstructionSet::Scalar.warning(Isa::Scalar), None);
    }

    #[test]
    fn what_the_machine_lacks_cannot_be_forced() {
        assert_eq!(InstructionSet::Auto.choose().unwrap(), None);
        assert_eq!(InstructionSet::Scalar.choose().unwrap(), Some(Isa::Scalar));
        for (set, isa) in
            [(InstructionSet::Avx512, Isa::Avx512Vnni), (InstructionSet::AvxVnni, Isa::AvxVnni), (InstructionSet::Avx2, Isa::Avx2)]
        {
            match set.choose() {
                Ok(chosen) => assert!(isa.available() && chosen == Some(isa)),
                Err(error) => assert!(!isa.available() && error.to_string().contains("executor.instruction_set"), "{error}"),
            }
        }
    }
}
