//! Every kernel is compiled by NVRTC, as on a card, for the architectures named below: what it needs to spill is listed here or is a failure. Where there is no
//! NVRTC this is left out, unless ASHLAR_NVRTC says that there is one; scripts/test.sh brings it and says so.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use std::collections::BTreeSet;

use ashlar_cuda::{Cache, SOURCES, Source, architecture, compile, compiler_version, entries, has_compiler};

const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];
/// Bytes of stack and spills that kernels may have: (architecture, kernel, bytes). Those for few rows hold two tiles of weights a warp ahead of their use.
const ALLOWED: &[(&str, &str, u64)] = &[
    ("sm_80", "linear_8s_g128_rows2_t2", 76),
    ("sm_80", "linear_8s_g128_rows2_t1", 16),
    ("sm_80", "linear_8s_g128_rows2_any", 20),
    ("sm_80", "linear_4m_g128_rows2_t2", 64),
    ("sm_80", "linear_4m_g128_rows1_t2", 68),
    ("sm_80", "linear_4m_g128_rows2_t1", 28),
    ("sm_80", "linear_4m_g128_rows2_any", 80),
    ("sm_80", "linear_4s_g128_rows2_t2", 76),
    ("sm_80", "linear_4s_g128_rows1_t2", 64),
    ("sm_80", "linear_8s_g64_rows2_t2", 24),
    ("sm_80", "linear_4m_g64_rows2_t2", 64),
    ("sm_80", "linear_4m_g64_rows1_t2", 48),
    ("sm_80", "linear_4m_g64_rows2_t1", 16),
    ("sm_80", "linear_4m_g64_rows2_any", 76),
    ("sm_80", "linear_4s_g64_rows2_t2", 48),
    ("sm_80", "linear_8s_g32_rows2_t2", 16),
    ("sm_80", "linear_8s_g32_rows2_t1", 96),
    ("sm_80", "linear_4m_g32_rows2_t2", 252),
    ("sm_80", "linear_4m_g32_rows1_t2", 24),
    ("sm_80", "linear_4m_g32_rows2_any", 308),
    ("sm_80", "linear_4s_g32_rows2_t1", 16),
    ("sm_90a", "linear_8s_g128_rows2_t2", 64),
    ("sm_90a", "linear_8s_g128_rows1_t2", 16),
    ("sm_90a", "linear_8s_g128_rows2_t1", 20),
    ("sm_90a", "linear_4m_g128_rows2_t2", 88),
    ("sm_90a", "linear_4m_g128_rows1_t2", 28),
    ("sm_90a", "linear_4m_g128_rows2_t1", 28),
    ("sm_90a", "linear_4m_g128_rows2_any", 16),
    ("sm_90a", "linear_4s_g128_rows2_t2", 24),
    ("sm_90a", "linear_4s_g128_rows1_t2", 28),
    ("sm_90a", "linear_4s_g128_rows2_t1", 48),
    ("sm_90a", "linear_8s_g64_rows2_t2", 96),
    ("sm_90a", "linear_8s_g64_rows1_t2", 28),
    ("sm_90a", "linear_8s_g64_rows2_t1", 20),
    ("sm_90a", "linear_4m_g64_rows2_t2", 48),
    ("sm_90a", "linear_4m_g64_rows1_t2", 48),
    ("sm_90a", "linear_4m_g64_rows2_any", 16),
    ("sm_90a", "linear_4s_g64_rows2_t2", 76),
    ("sm_90a", "linear_4s_g64_rows1_t2", 24),
    ("sm_90a", "linear_8s_g32_rows2_t2", 44),
    ("sm_90a", "linear_8s_g32_rows2_t1", 24),
    ("sm_90a", "linear_4m_g32_rows2_t2", 100),
    ("sm_90a", "linear_4m_g32_rows2_t1", 32),
    ("sm_90a", "linear_4m_g32_rows2_any", 264),
    ("sm_90a", "linear_4s_g32_rows2_t2", 40),
    ("sm_90a", "linear_4s_g32_rows2_t1", 24),
];

/// Whether there is a compiler; that there is none where one was promised is a failure.
fn can_compile() -> bool {
    let promised = std::env::var_os("ASHLAR_NVRTC").is_some();
    assert!(has_compiler() || !promised, "ASHLAR_NVRTC is set, and libnvrtc.so is not among the libraries (LD_LIBRARY_PATH)");
    if !has_compiler() {
        println!("NVRTC is not here: left out");
    }
    has_compiler()
}

/// What `ptxas -v` says of each kernel: its name, and its bytes of stack and spills together.
fn usage(log: &str) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    let mut kernel = None;
    for line in log.lines() {
        if let Some((_, name)) = line.split_once("Compiling entry function '") {
            kernel = name.split('\'').next().map(str::to_owned);
        } else if line.contains("bytes stack frame") {
            let bytes = line.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum();
            found.extend(kernel.take().map(|kernel| (kernel, bytes)));
        }
    }
    found
}

#[test]
fn kernels_compile_for_each_architecture_and_spill_what_is_listed() {
    if !can_compile() {
        return;
    }
    let (mut compiled, mut beyond) = (BTreeSet::new(), Vec::new());
    let units: Vec<_> = ARCHITECTURES.iter().flat_map(|architecture| SOURCES.iter().map(move |source| (*architecture, source))).collect();
    // Two at a time: each takes a while.
    let compile_each = |first: usize| {
        let each = units
            .iter()
            .skip(first)
            .step_by(2)
            .map(|(architecture, source)| (*architecture, *source, compile(source, architecture).unwrap()));
        each.collect::<Vec<_>>()
    };
    let outcomes = std::thread::scope(|scope| {
        let threads = [scope.spawn(|| compile_each(0)), scope.spawn(|| compile_each(1))];
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    for (architecture, source, outcome) in outcomes {
        assert!(outcome.code.starts_with(b"\x7fELF"), "{}: a cubin", source.name);
        for (kernel, bytes) in usage(&outcome.log) {
            let allowed = ALLOWED.iter().find(|(on, of, _)| *on == architecture && *of == kernel).map_or(0, |(_, _, bytes)| *bytes);
            if bytes > allowed {
                beyond.push(format!("({architecture:?}, {kernel:?}, {bytes})"));
            }
            compiled.insert((source.define, kernel, architecture));
        }
    }
    assert!(beyond.is_empty(), "more bytes of stack and spills than are listed: {}", beyond.join(", "));
    for ((source, define), entry) in entries() {
        for architecture in ARCHITECTURES {
            assert!(
                compiled.contains(&(define, entry.to_owned(), architecture)),
                "{source} {define} has no kernel {entry} for {architecture}"
            );
        }
    }
}

#[test]
fn what_the_compiler_says_is_told_with_source_and_architecture() {
    if !can_compile() {
        return;
    }
    let wrong = Source {
        define: "",
        always: true,
        name: "wrong.cu",
        text: "#include \"numerics.cuh\"\nextern \"C\" __global__ void k() { nothing(); }",
    };
    let error = compile(&wrong, "sm_80").unwrap_err().to_string();
    assert!(
        error.starts_with("NVRTC does not compile wrong.cu for sm_80: ") && error.contains("nothing") && error.lines().count() == 1,
        "{error}"
    );
    let error = compile(&SOURCES[0], "sm_10").unwrap_err().to_string();
    assert!(error.starts_with("NVRTC does not compile rows.cu for sm_10: ") && error.contains("architecture"), "{error}");
}

#[test]
fn a_usage_report_is_read_by_kernel() {
    let log = "ptxas info    : Compiling entry function 'a' for 'sm_80'\nptxas info    : Function properties for a\n    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n";
    assert_eq!(usage(log), [("a".to_owned(), 16)]);
}

#[test]
fn architectures_have_the_features_of_their_cards() {
    assert_eq!([(8, 0), (8, 9), (9, 0), (10, 0)].map(|(major, minor)| architecture(major, minor)), ["sm_80", "sm_89", "sm_90a", "sm_100a"]);
}

#[test]
fn code_is_kept_and_read_back_and_a_damaged_file_is_compiled_again() {
    if !can_compile() {
        return;
    }
    assert!(compiler_version().unwrap().split('.').all(|part| part.parse::<u32>().is_ok()));
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::new(folder.path().join("kept"));
    let source = &SOURCES[0];
    let code = cache.code(source, "sm_80", "13.0").unwrap();
    let files = || {
        let mut files: Vec<_> = std::fs::read_dir(cache.folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    };
    let kept = files();
    assert!(!kept.is_empty() && kept.iter().all(|path| path.extension().is_some_and(|extension| extension == "cubin")), "{kept:?}");
    let times = || files().iter().map(|path| std::fs::metadata(path).unwrap().modified().unwrap()).collect::<Vec<_>>();
    let before = times();
    assert_eq!((cache.code(source, "sm_80", "13.0").unwrap() == code, times()), (true, before.clone()), "read, not compiled");
    // Another driver, another architecture, another compiler: other files.
    cache.code(source, "sm_80", "12.0").unwrap();
    assert_eq!(files().len(), 2 * kept.len());
    for path in &kept {
        let mut bytes = std::fs::read(path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    assert!(cache.code(source, "sm_80", "13.0").unwrap() == code, "damaged files are not used");
    assert_ne!(times()[..1], before[..1]);
    // A folder that cannot be made is no reason not to compute.
    std::fs::write(folder.path().join("file"), "").unwrap();
    assert!(Cache::new(folder.path().join("file/kept")).code(source, "sm_80", "13.0").unwrap() == code);
}
