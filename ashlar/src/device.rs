//! Which device an executor computes on: the one that is asked for, or the best that can be used.

use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use ashlar_cuda::{Cache, Card, Cuda, Driver, DriverError, find};
use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::Bf16Compute;
use ashlar_zoo::ingest::human_bytes;

use crate::config::ExecutorConfig;
use crate::devices::{check_isa, isa_warning};
use crate::process::available_bytes;

/// What `executor.device` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A card if there is one that can be used, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// This card, or nothing.
    Cuda(usize),
}

impl std::str::FromStr for Wanted {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()).map(Self::Cuda).ok_or(()),
        }
    }
}

/// A device that is ready, with what the engine must know of it.
pub enum Opened {
    /// The CPU, with so many threads.
    Cpu(Arc<Cpu>),
    /// A card, with so many bytes of memory free.
    Cuda(Arc<Cuda>, u64),
}

/// Opens the device of an executor; `threads` are the CPU's.
///
/// # Errors
/// Why the one that is asked for cannot be used.
pub fn open(settings: &ExecutorConfig, threads: usize) -> anyhow::Result<Opened> {
    let isa = settings.isa()?;
    check_isa("executor.isa =", isa)?;
    let wanted: Wanted = settings.device.parse().expect("the configuration was checked");
    let why_not = match wanted {
        Wanted::Cpu => None,
        Wanted::Auto | Wanted::Cuda(_) if settings.bf16_compute != Bf16Compute::F32 => {
            Some(anyhow::anyhow!("executor.bf16_compute = `{}` is for the CPU: cards compute bf16 weights from f32", settings.bf16_compute))
        }
        Wanted::Auto => match open_card(0) {
            Ok((card, free)) => return Ok(Opened::Cuda(card, free)),
            Err(error) => Some(error),
        },
        Wanted::Cuda(ordinal) => match open_card(ordinal) {
            Ok((card, free)) => return Ok(Opened::Cuda(card, free)),
            Err(error) => return Err(error).with_context(|| format!("use executor.device = `{}`", settings.device)),
        },
    };
    match why_not {
        Some(error) if wanted != Wanted::Auto => bail!("use executor.device = `{}`: {error:#}", settings.device),
        Some(error) => tracing::info!("no card is used, and the CPU computes: {error:#}"),
        None => {}
    }
    let cpu = Cpu::new(CpuOptions { threads, isa, bf16_compute: settings.bf16_compute });
    if let Some(warning) = isa_warning(cpu.isa()) {
        tracing::warn!("{warning}");
    }
    Ok(Opened::Cpu(Arc::new(cpu)))
}

/// Memory of a card without which nothing could be served: the device's own 64 MiB, workspace, and some weights and pages.
const FREE_BYTES_MIN: u64 = 256 << 20;

/// Opens a card; bytes of its memory that are free.
///
/// # Errors
/// Why it cannot be used.
pub fn open_card(ordinal: usize) -> anyhow::Result<(Arc<Cuda>, u64)> {
    find()?;
    let cache = Cache::of_user().context("find a place for compiled kernels: neither HOME nor XDG_CACHE_HOME is set")?;
    let card: Arc<dyn Driver> = Arc::new(Card::open(ordinal, &cache)?);
    let free = || Ok::<u64, DriverError>(card.memory_bytes()?.0);
    let at_first = free()?;
    let [there, least] = [at_first, FREE_BYTES_MIN].map(human_bytes);
    ensure!(at_first >= FREE_BYTES_MIN, "card {ordinal} has {there} of its memory free: {least} is the least to begin with");
    let cuda = Cuda::new(Arc::clone(&card))?;
    // What the device took for itself is not for weights and pages.
    Ok((Arc::new(cuda), free()?))
}

impl Opened {
    /// Bytes of memory that are free for weights and pages.
    pub fn free_bytes(&self) -> u64 {
        match self {
            Self::Cpu(_) => available_bytes(),
            Self::Cuda(_, free) => *free,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        let named = ["auto", "cpu", "cuda", "cuda:0", "cuda:3"].map(str::parse);
        assert_eq!(named, [Wanted::Auto, Wanted::Cpu, Wanted::Cuda(0), Wanted::Cuda(0), Wanted::Cuda(3)].map(Ok));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda0", "CPU"] {
            assert_eq!(text.parse::<Wanted>(), Err(()), "{text}");
        }
    }

    /// Wherever there is no driver: a card that is asked for is an error that says why, and `auto` is the CPU.
    #[test]
    fn without_a_driver_the_cpu_computes_unless_a_card_is_asked_for() {
        let settings = |device: &str| ExecutorConfig { device: device.to_owned(), ..ExecutorConfig::default() };
        if find().is_ok() {
            return;
        }
        for device in ["auto", "cpu"] {
            assert!(matches!(open(&settings(device), 1), Ok(Opened::Cpu(_))), "{device}");
        }
        let error = format!("{:#}", open(&settings("cuda:1"), 1).err().unwrap());
        assert!(error.starts_with("use executor.device = `cuda:1`: no driver of NVIDIA's is installed"), "{error}");
        let bf16 = ExecutorConfig { bf16_compute: Bf16Compute::Bf16, ..settings("cuda:0") };
        let error = format!("{:#}", open(&bf16, 1).err().unwrap());
        assert!(error.starts_with("use executor.device = `cuda:0`: executor.bf16_compute = `bf16` is for the CPU"), "{error}");
    }
}
