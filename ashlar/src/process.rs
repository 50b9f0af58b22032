//! Facts about this process and machine: memory that is available, signals that ask it to stop, random ids.

use std::path::{Path, PathBuf};

use anyhow::Context;

/// Bytes of memory that could be taken without swapping: by the kernel's estimate for the machine, or what the control groups of this
/// process leave it (a container's limit) where that is less. 4 GiB where nobody says.
pub fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")).and_then(|number| number.trim().parse::<u64>().ok());
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let of_groups = group_bytes(&groups, Path::new("/sys/fs/cgroup"));
    kib.map(|kib| kib * 1024).into_iter().chain(of_groups).min().unwrap_or(4 << 30)
}

/// What is left under the tightest memory limit among the groups that `groups` (as `/proc/self/cgroup`) names and those above them, in either
/// version's files below `root`; `None` where there is no limit. In a container a group's path may be the host's: what is not there is skipped.
fn group_bytes(groups: &str, root: &Path) -> Option<u64> {
    let left = |group: &str| {
        let (_, rest) = group.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let (root, limit, usage, cache) = if controllers.is_empty() {
            (root.to_owned(), "memory.max", "memory.current", "inactive_file ")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        } else {
            return None;
        };
        let number = |file: PathBuf| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
        // Cached pages of files go when memory is wanted.
        let cached = |group: &Path| {
            let text = std::fs::read_to_string(group.join("memory.stat")).ok()?;
            text.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse::<u64>().ok())
        };
        let of_group = |group: &Path| {
            let group = root.join(group);
            let used = number(group.join(usage))?.saturating_sub(cached(&group).unwrap_or(0));
            Some(number(group.join(limit))?.saturating_sub(used))
        };
        Path::new(path.trim_start_matches('/')).ancestors().filter_map(of_group).min()
    };
    groups.lines().filter_map(left).min()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (file, text) in files {
            let file = root.join(file);
            std::fs::create_dir_all(file.parent().expect("files lie in folders")).expect("a folder");
            std::fs::write(file, text).expect("a file");
        }
    }

    #[test]
    fn the_tightest_limit_of_a_group_and_those_above_it_counts() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path();
        write(
            root,
            &[
                ("pod/memory.max", "1000\n"),
                ("pod/memory.current", "700\n"),
                ("pod/memory.stat", "anon 500\ninactive_file 150\n"),
                ("pod/one/memory.max", "max\n"),
                ("pod/one/memory.current", "300\n"),
                ("memory/a/memory.limit_in_bytes", "800\n"),
                ("memory/a/memory.usage_in_bytes", "900\n"),
                ("memory/b/memory.limit_in_bytes", "5000\n"),
                ("memory/b/memory.usage_in_bytes", "1000\n"),
            ],
        );
        let of = |groups: &str| group_bytes(groups, root);
        assert_eq!(of("0::/pod/one\n"), Some(450));
        assert_eq!(of("4:cpu,cpuacct:/a\n3:memory:/b\n"), Some(4000));
        assert_eq!(of("3:memory:/a\n0::/elsewhere\n"), Some(0));
        assert_eq!(of("0::/elsewhere\n"), None);
        assert_eq!(of("nonsense\n"), None);
    }
}
