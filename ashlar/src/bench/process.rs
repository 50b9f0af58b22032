//! What a process has used, and what the machine is, read from /proc. Linux only; elsewhere the figures are missing with a reason.

use std::fs;

use anyhow::{Context, ensure};

use crate::devices::{processor, value_of};

/// Ticks of /proc/PID/stat in a second: `USER_HZ`, which Linux fixes at 100 towards user space on every machine that we build for.
const TICKS_PER_SECOND: f64 = 100.0;

/// What one process, or several together, have used since they began.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct ProcessUse {
    /// User and system time of all threads.
    pub(crate) cpu_seconds: f64,
    /// The most memory resident at any one time.
    pub(crate) peak_rss_bytes: u64,
}

impl ProcessUse {
    /// Of all of `pids` together.
    pub(crate) fn read(pids: &[u32]) -> anyhow::Result<Self> {
        let mut total = Self::default();
        for pid in pids {
            let file = |name| fs::read_to_string(format!("/proc/{pid}/{name}")).with_context(|| format!("read {name} of process {pid}"));
            let one = parse(&file("stat")?, &file("status")?).with_context(|| format!("process {pid} has an unknown form"))?;
            total.cpu_seconds += one.cpu_seconds;
            total.peak_rss_bytes += one.peak_rss_bytes;
        }
        Ok(total)
    }
}

fn parse(stat: &str, status: &str) -> anyhow::Result<ProcessUse> {
    // The name in parentheses may hold anything, so fields are counted after the last one.
    let (_, fields) = stat.rsplit_once(')').context("no name")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    ensure!(fields.len() > 12, "too few fields");
    let (user, system): (u64, u64) = (fields[11].parse().context("utime")?, fields[12].parse().context("stime")?);
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let peak_kib: u64 = peak.trim().trim_end_matches("kB").trim().parse().context("VmHWM")?;
    Ok(ProcessUse { cpu_seconds: (user + system) as f64 / TICKS_PER_SECOND, peak_rss_bytes: peak_kib << 10 })
}

/// Processor, cores and memory in one line.
pub(crate) fn machine() -> String {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = value_of(&memory, "MemTotal").unwrap_or("unknown");
    format!("{}, {} cores, memory {memory}", processor().unwrap_or_else(|| "unknown".to_owned()), core_count())
}

/// Cores that this process may use.
pub(crate) fn core_count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_is_read_past_any_name() {
        let stat = "12 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 5 0 100 200 300";
        let read = parse(stat, "Name:\ta\nVmPeak:\t 9 kB\nVmHWM:\t    2048 kB\nThreads:\t1\n").expect("both files");
        assert_eq!(read, ProcessUse { cpu_seconds: 3.0, peak_rss_bytes: 2 << 20 });
        assert!(parse("12 (a) S 1", "VmHWM: 1 kB").is_err() && parse(stat, "").is_err());
    }

    #[test]
    fn own_use_can_be_read() {
        let pid = std::process::id();
        assert!(ProcessUse::read(&[pid]).expect("the test's own process").peak_rss_bytes > 0);
        assert!(ProcessUse::read(&[pid, u32::MAX]).is_err());
    }
}
