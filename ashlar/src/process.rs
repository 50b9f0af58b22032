//! Facts about this process and machine: memory that is available, signals that ask it to stop, random ids.

use anyhow::Context;

/// Bytes of memory that could be taken without swapping, by the kernel's estimate; 4 GiB where it does not say.
pub fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")).and_then(|number| number.trim().parse::<u64>().ok());
    kib.map_or(4 << 30, |kib| kib * 1024)
}

/// Resolves when the process is asked to stop: SIGTERM or Ctrl-C.
///
/// # Errors
/// When signals cannot be awaited.
pub async fn stop_signal() -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).context("await signals")?;
    tokio::select! {
        _ = terminate.recv() => {}
        result = tokio::signal::ctrl_c() => result.context("await signals")?,
    }
    Ok(())
}

/// 64 bits from the operating system.
pub fn random_bits() -> u64 {
    getrandom::u64().expect("the operating system has random bits")
}
