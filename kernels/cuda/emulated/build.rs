//! Compiles the kernels' own sources for the CPU (kernels/cuda/cuda_shim.h). The emulation switches stacks by hand, for x86-64 Linux alone.

fn main() {
    let sources = std::path::Path::new("..");
    for entry in std::fs::read_dir(sources).expect("this crate lies in the folder of the sources") {
        let path = entry.expect("a folder that can be read").path();
        if path.extension().is_some_and(|extension| ["cu", "cuh", "h"].iter().any(|of_source| extension == *of_source)) {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    println!("cargo::rerun-if-changed=../emulate/device.cc");
    println!("cargo::rustc-check-cfg=cfg(emulation)");
    let of_target = |key: &str| std::env::var(key).unwrap_or_default();
    if of_target("CARGO_CFG_TARGET_ARCH") != "x86_64" || of_target("CARGO_CFG_TARGET_OS") != "linux" {
        return;
    }
    println!("cargo::rustc-cfg=emulation");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(false).warnings(false).file(sources.join("emulate/device.cc"));
    // No product and sum becomes one, and lanes may see the same memory by other types, as on a card.
    build.flag("-march=x86-64-v3").flag("-ffp-contract=off").flag("-fno-strict-aliasing");
    build.compile("ashlar_emulated_cuda");
}
