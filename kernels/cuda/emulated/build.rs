//! Compiles the kernels' own sources for the CPU (kernels/cuda/cuda_shim.h), once into this crate and into a library that stands where NVIDIA's driver would,
//! beside one that stands where NVRTC would. The emulation switches stacks by hand, for x86-64 Linux alone.

use std::path::{Path, PathBuf};

fn main() {
    let sources = Path::new("..");
    for folder in [sources.to_owned(), sources.join("emulate")] {
        for entry in std::fs::read_dir(folder).expect("this crate lies in the folder of the sources") {
            let path = entry.expect("a folder that can be read").path();
            if path.extension().is_some_and(|extension| ["cu", "cuh", "h"].iter().any(|of_source| extension == *of_source)) {
                println!("cargo::rerun-if-changed={}", path.display());
            }
        }
    }
    let [device, driver, compiler] = ["device", "driver", "nvrtc"].map(|name| sources.join(format!("emulate/{name}.cc")));
    for source in [&device, &driver, &compiler] {
        println!("cargo::rerun-if-changed={}", source.display());
    }
    println!("cargo::rustc-check-cfg=cfg(emulation)");
    let of_target = |key: &str| std::env::var(key).unwrap_or_default();
    if of_target("CARGO_CFG_TARGET_ARCH") != "x86_64" || of_target("CARGO_CFG_TARGET_OS") != "linux" {
        return;
    }
    println!("cargo::rustc-cfg=emulation");
    let device = compiled(&device).compile_intermediates();
    cc::Build::new().cpp(true).objects(&device).compile("ashlar_emulated_cuda");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo says where"));
    linked(&out.join("driver/libcuda.so.1"), &[device, compiled(&driver).compile_intermediates()].concat());
    linked(&out.join("compiler/libnvrtc.so.13"), &compiled(&compiler).compile_intermediates());
}

fn compiled(source: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(false).warnings(false).pic(true).file(source);
    // No product and sum becomes one, and lanes may see the same memory by other types, as on a card.
    build.flag("-march=x86-64-v3").flag("-ffp-contract=off").flag("-fno-strict-aliasing");
    build
}

/// A shared library that exports what its sources mark, and stays once it is loaded.
fn linked(library: &Path, objects: &[PathBuf]) {
    let folder = library.parent().expect("libraries lie in folders");
    std::fs::create_dir_all(folder).expect("the folder of outputs can be written");
    let exported = folder.join("exported.map");
    std::fs::write(&exported, "{ global: cu*; nvrtc*; local: *; };").expect("the folder of outputs can be written");
    let mut link = cc::Build::new().cpp(true).get_compiler().to_command();
    link.args(["-shared", "-Wl,-z,nodelete", "-Wl,-z,defs"]).arg(format!("-Wl,--version-script={}", exported.display()));
    let status = link.args(objects).arg("-o").arg(library).status().expect("the compiler was just called");
    assert!(status.success(), "{} is not linked: {status}", library.display());
    // Those who look for a library without a version first must not find a real one.
    std::fs::copy(library, library.with_extension("")).expect("the folder of outputs can be written");
}
