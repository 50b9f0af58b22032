//! Cases of the suite, every kernel among them, through `Card`: the code that speaks to NVIDIA's driver and to NVRTC, over libraries that stand in their places.

use std::process::Command;

use ashlar_cuda::Cuda;
use ashlar_cuda_emulated::libraries;
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::Ops;

use super::open;
use super::values::Random;

/// Runs a test of this binary in a process of its own, which finds the libraries and has the variables; how many files of kernels it kept.
fn run(test: &str, variables: &[(&str, &str)]) -> Option<usize> {
    let libraries = libraries()?;
    let cache = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test]).env("ASHLAR_CARD", "0").env("XDG_CACHE_HOME", cache.path());
    command.env("LD_LIBRARY_PATH", format!("{}:{}", libraries.driver, libraries.compiler)).envs(variables.iter().copied());
    let output = command.output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{variables:?}: {said}{complained}");
    Some(std::fs::read_dir(cache.path().join("ashlar/cuda")).unwrap().count())
}

#[test]
fn every_kernel_runs_through_the_driver() {
    // Order 1 would do at once what is done as late as it may otherwise.
    let order = (std::process::id() % 50 * 2).to_string();
    let kept = run("coverage::every_kernel_is_launched", &[("EMULATED_CARD_ORDER", &order)]);
    assert!(kept.is_none_or(|kept| kept == 2 * ashlar_cuda::SOURCES.len()), "each unit is kept under two names, not {kept:?}");
}

/// What is compiled when a layer needs it may fail then: the layer is refused with the reason, and all others go on.
#[test]
fn layers_whose_kernels_do_not_compile_are_refused() {
    const FAULT: &str = "EMULATED_NVRTC_FAULT";
    if std::env::var_os(FAULT).is_none() {
        run("driven::layers_whose_kernels_do_not_compile_are_refused", &[(FAULT, "fails:GROUP=32")]);
        return;
    }
    let cuda = Cuda::new(open().unwrap()).unwrap();
    let layer = |group| cuda.linear(&[Random(1).tensor(Dtype::Int4 { group }, 40, 128).view()]);
    for _ in 0..2 {
        let error = layer(32).unwrap_err().to_string();
        assert!(
            error.contains("NVRTC does not compile linear_integer.cu for sm_90a: linear_integer.cu(1): error: this compiler fails"),
            "{error}"
        );
        layer(64).unwrap();
    }
}
