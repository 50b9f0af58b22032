//! The sources of the kernels, as they lie in the binary.

/// A file of `kernels/cuda`.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Its name, by which others include it.
    pub name: &'static str,
    /// What it holds.
    pub text: &'static str,
}

macro_rules! sources {
    ($($name:literal)*) => {
        &[$(Source { name: $name, text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/", $name)) }),*]
    };
}

/// Units that are compiled each by itself.
pub const SOURCES: &[Source] = sources!["rows.cu" "linear_exact.cu" "attend.cu"];
/// What they include.
pub(crate) const HEADERS: &[Source] = sources!["numerics.cuh" "ptx.cuh"];
/// How all are compiled, whatever the card: a product and a sum are never made one, and nothing is flushed to zero.
pub const OPTIONS: &[&str] = &["--std=c++17", "-default-device", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"];

/// Names of the kernels that the device launches, by unit.
pub fn entries() -> impl Iterator<Item = (&'static str, &'static str)> {
    ENTRIES.iter().flat_map(|(unit, names)| names.iter().map(|name| (*unit, *name)))
}

const ENTRIES: &[(&str, &[&str])] = &[
    (
        "rows.cu",
        &[
            "gather_rows",
            "scatter_rows",
            "norm_rows",
            "norm_heads",
            "rope_heads",
            "gate_rows",
            "activate_elements",
            "add_elements",
            "softcap_elements",
            "largest_of_rows",
        ],
    ),
    (
        "linear_exact.cu",
        &[
            "linear_f32_rows1",
            "linear_f32_rows8",
            "linear_f16_rows1",
            "linear_f16_rows8",
            "linear_bf16_rows1",
            "linear_bf16_rows8",
            "linear_fp8_rows1",
            "linear_fp8_rows8",
            "linear_integer_rows1",
            "linear_integer_rows8",
            "quantise_exact",
            "linear_finish",
        ],
    ),
    ("attend.cu", &["kv_write_f32", "kv_write_bf16", "kv_write_int8", "attend_f32", "attend_bf16", "attend_int8"]),
];
