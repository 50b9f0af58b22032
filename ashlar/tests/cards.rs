//! What the binary does with a card, and without one for every fault that a card, its driver or NVRTC may have. All of them are emulated libraries.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ashlar_cuda_emulated::{Libraries, libraries};
use ashlar_zoo::store::Zoo;

/// A folder with an empty zoo, and the libraries that the binary is to find.
struct Machine {
    folder: tempfile::TempDir,
    libraries: Libraries,
}

impl Machine {
    /// `None` where the libraries do not run.
    fn new() -> Option<Self> {
        let machine = Self { folder: tempfile::tempdir().unwrap(), libraries: libraries()? };
        tokio::runtime::Runtime::new().unwrap().block_on(Zoo::create_dir(&machine.folder.path().join("zoo"))).unwrap();
        Some(machine)
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("ashlar/cuda")
    }

    /// The binary, with faults: `card=...`, `nvrtc=...`, and `nvrtc=none` for a machine without NVRTC.
    fn ashlar(&self, args: &[&str], faults: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ashlar"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ASHLAR_")) {
            command.env_remove(name);
        }
        let mut libraries = vec![self.libraries.driver];
        if !faults.contains(&"nvrtc=none") {
            libraries.push(self.libraries.compiler);
        }
        command.env("LD_LIBRARY_PATH", libraries.join(":")).env("XDG_CACHE_HOME", self.folder.path()).env("NO_COLOR", "1");
        for fault in faults {
            match fault.split_once('=').unwrap() {
                ("card", fault) => command.env("EMULATED_CARD_FAULT", fault),
                (_, fault) => command.env("EMULATED_NVRTC_FAULT", fault),
            };
        }
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn serve(&self, device: &str, faults: &[&str]) -> Command {
        let zoo = self.folder.path().join("zoo");
        let args = ["serve", "--zoo", zoo.to_str().unwrap(), "--registry", "memory:", "--listen", "127.0.0.1:0", "--device", device];
        self.ashlar(&args, faults)
    }

    fn devices(&self, faults: &[&str]) -> Vec<String> {
        let output = self.ashlar(&["devices"], faults).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().filter_map(|line| Some(line.strip_prefix("cuda   ")?.to_owned())).collect()
    }

    /// All that a server logs until it says what it computes on.
    fn log_of_start(&self, device: &str, faults: &[&str]) -> Vec<String> {
        let mut server = self.serve(device, faults).spawn().unwrap();
        let mut lines = Vec::new();
        for line in BufReader::new(server.stderr.take().unwrap()).lines().map(Result::unwrap) {
            let is_last = line.contains("executor starts");
            lines.push(line);
            if is_last {
                break;
            }
        }
        server.kill().unwrap();
        server.wait().unwrap();
        lines
    }

    /// The one line with which a server ends that was to compute on a card.
    fn error_of_start(&self, device: &str, faults: &[&str]) -> String {
        let output = self.serve(device, faults).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), error.lines().filter(|line| line.starts_with("error: ")).count()), (Some(1), 1), "{error}");
        let last = error.lines().last().unwrap();
        last.strip_prefix("error: failed to ").unwrap_or_else(|| panic!("{error}")).to_owned()
    }
}

fn lines_with<'a>(lines: &'a [String], words: &str) -> Vec<&'a str> {
    lines.iter().map(String::as_str).filter(|line| line.contains(words)).collect()
}

#[test]
fn card_is_shown_and_used() {
    let Some(machine) = Machine::new() else { return };
    assert_eq!(
        machine.devices(&[]),
        ["cuda:0  Emulated card, compute capability 9.0, 1.1 GB", "driver of CUDA 13.0; kernels are compiled by NVRTC 13.0"]
    );
    for device in ["auto", "cuda:0"] {
        let log = machine.log_of_start(device, &[]);
        assert!(log.last().unwrap().contains("cuda sm_90a Emulated card"), "{log:?}");
        assert!(lines_with(&log, "WARN").is_empty() && lines_with(&log, "no card is used").is_empty(), "{log:?}");
        // Kept from the first start on.
        assert_eq!(lines_with(&log, "compiling kernels").len(), if device == "auto" { 3 } else { 0 }, "{log:?}");
    }
    assert_eq!(
        machine.error_of_start("cuda:1", &[]),
        "use executor.device = `cuda:1`: there is no card 1: the driver shows 1, counted from 0"
    );
}

/// `ashlar devices` says it, `auto` is the CPU with one line, and a card that is asked for is one error: all name the culprit.
#[test]
fn every_fault_at_start_is_named_and_leaves_the_cpu() {
    let Some(machine) = Machine::new() else { return };
    let old = "the driver of NVIDIA's is of CUDA 11.4: 13.0 is the least that runs the kernels, and comes with driver 580";
    let mismatch = "the driver of NVIDIA's fails at cuInit: system has unsupported display driver / cuda driver combination (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)";
    let stub = "the driver of NVIDIA's fails at cuDriverGetVersion: CUDA_ERROR_STUB_LIBRARY";
    let capability = "card 0, Emulated card, has compute capability 7.5: 8.0 is the least that runs the kernels";
    let image = "the driver of NVIDIA's does not load rows.cu for sm_90a: no kernel image is available for execution on the device (CUDA_ERROR_NO_BINARY_FOR_GPU)";
    let little = "card 0 has 84 MB of its memory free: 268 MB is the least to begin with";
    let lost =
        "the driver of NVIDIA's fails at cuDevicePrimaryCtxRetain: uncorrectable ECC error encountered (CUDA_ERROR_ECC_UNCORRECTABLE)";
    let no_compiler = "NVRTC is not there (libnvrtc.so.13)";
    let old_compiler = "NVRTC 12.4 is too old: 13.0 is the least that compiles the kernels";
    let refused = "NVRTC does not compile rows.cu for sm_90a: rows.cu(1): error: this compiler fails | 1 error detected";
    let silent = "NVRTC does not compile rows.cu for sm_90a: nvrtcCompileProgram: NvrtcError(NVRTC_ERROR_INTERNAL_ERROR)";
    // Fault, what it is called, and what `ashlar devices` can know of it.
    for (fault, why, shown) in [
        ("card=no-card", "the driver of NVIDIA's shows no card", "not used: the driver of NVIDIA's shows no card"),
        ("card=old-driver", old, old),
        ("card=init-fails", mismatch, mismatch),
        ("card=stub", stub, stub),
        ("card=old-card", capability, capability),
        ("card=wrong-image", image, "kernels are compiled by NVRTC 13.0"),
        ("card=little-memory:83886080", little, "kernels are compiled by NVRTC 13.0"),
        ("card=lost-at-start", lost, "compute capability 9.0"),
        ("nvrtc=none", no_compiler, no_compiler),
        ("nvrtc=old", old_compiler, old_compiler),
        ("nvrtc=fails", refused, "kernels are compiled by NVRTC 13.0"),
        ("nvrtc=silent", silent, "kernels are compiled by NVRTC 13.0"),
    ] {
        // Kernels that an earlier one left behind would hide a compiler's fault.
        let _ = std::fs::remove_dir_all(machine.cache());
        let devices = machine.devices(&[fault]);
        assert!(devices.iter().any(|line| line.contains(shown)), "{fault}: {devices:?}");
        let log = machine.log_of_start("auto", &[fault]);
        let said = lines_with(&log, "no card is used, and the CPU computes: ");
        assert_eq!((said.len(), lines_with(&log, " WARN ").len() + lines_with(&log, " ERROR ").len()), (1, 0), "{fault}: {log:?}");
        assert!(said[0].contains(why) && log.last().unwrap().contains("device=\"cpu"), "{fault}: {log:?}");
        let error = machine.error_of_start("cuda:0", &[fault]);
        assert!(error.starts_with(&format!("use executor.device = `cuda:0`: {why}")), "{fault}: {error}");
    }
}

/// Code that another compiler left, that is damaged or that the driver does not take is compiled anew; a folder that cannot be written is a warning.
#[test]
fn kept_kernels_are_used_only_where_they_may_be() {
    let Some(machine) = Machine::new() else { return };
    let compiled = |log: &[String]| lines_with(log, "compiling kernels").len();
    let warned = |log: &[String]| lines_with(log, "WARN").iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    let files = || {
        let mut files: Vec<PathBuf> = std::fs::read_dir(machine.cache()).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    };
    let log = machine.log_of_start("cuda:0", &[]);
    assert_eq!((compiled(&log), warned(&log).len()), (3, 0), "{log:?}");
    let log = machine.log_of_start("cuda:0", &["nvrtc=none"]);
    assert_eq!((compiled(&log), warned(&log).len()), (0, 0), "without a compiler the last one's code will do: {log:?}");

    let log = machine.log_of_start("cuda:0", &["nvrtc=new"]);
    assert_eq!((compiled(&log), warned(&log).len()), (3, 0), "another compiler's code is not used where there is one: {log:?}");
    std::fs::remove_dir_all(machine.cache()).unwrap();
    machine.log_of_start("cuda:0", &[]);

    // Whole files, of what this driver does not run.
    let foreign = |path: &Path, image: &[u8]| std::fs::write(path, [blake3::hash(image).as_bytes(), image].concat()).unwrap();
    let before: Vec<Vec<u8>> = files().iter().map(|path| std::fs::read(path).unwrap()).collect();
    for image in [&b"\x7fELF emulated\nrows.cu\nsm_80\n\0"[..], b"no image\0"] {
        files().iter().for_each(|path| foreign(path, image));
        let log = machine.log_of_start("cuda:0", &[]);
        assert_eq!((compiled(&log), warned(&log).len()), (3, 3), "{log:?}");
        assert!(
            warned(&log)[0].contains("kept kernels are compiled again: the driver of NVIDIA's does not load rows.cu for sm_90a"),
            "{log:?}"
        );
        let after: Vec<Vec<u8>> = files().iter().map(|path| std::fs::read(path).unwrap()).collect();
        assert!(before == after, "what was compiled is kept in the place of what was refused");
    }
    for path in files() {
        std::fs::write(&path, &std::fs::read(&path).unwrap()[..40]).unwrap();
    }
    let log = machine.log_of_start("cuda:0", &[]);
    assert_eq!((compiled(&log), warned(&log).len()), (3, 3), "{log:?}");
    assert!(warned(&log)[0].contains("kept kernels are damaged, and are compiled again"), "{log:?}");

    std::fs::remove_dir_all(machine.cache()).unwrap();
    std::fs::write(machine.cache(), "").unwrap();
    let log = machine.log_of_start("cuda:0", &[]);
    assert_eq!((compiled(&log), warned(&log).len()), (3, 3), "{log:?}");
    assert!(warned(&log)[0].contains("compiled kernels cannot be kept, and are compiled again at the next start"), "{log:?}");
    assert!(log.last().unwrap().contains("cuda sm_90a Emulated card"), "{log:?}");
}
