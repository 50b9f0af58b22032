//! The sources of the kernels, as they lie in the binary.

/// A file of `kernels/cuda`.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Its name, by which others include it.
    pub name: &'static str,
    /// What it holds.
    pub text: &'static str,
    /// A macro that is defined for it, as `GROUP=32`; empty: none. A file may be several units so.
    pub define: &'static str,
    /// Compiled when a card is opened, and not when something is loaded that needs it.
    pub always: bool,
}

macro_rules! source {
    ($name:literal) => {
        source!($name, "", true)
    };
    ($name:literal, $define:literal, $always:literal) => {
        Source { name: $name, text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/", $name)), define: $define, always: $always }
    };
}

/// Units that are compiled each by itself.
pub const SOURCES: &[Source] = &[
    source!("rows.cu"),
    source!("linear_exact.cu"),
    source!("attend.cu"),
    source!("linear_integer.cu", "GROUP=32", false),
    source!("linear_integer.cu", "GROUP=64", false),
    source!("linear_integer.cu", "GROUP=128", false),
    source!("attention.cu", "HEAD=64", false),
    source!("attention.cu", "HEAD=128", false),
    source!("chunk.cu", "HEAD=64", false),
    source!("chunk.cu", "HEAD=128", false),
    source!("chunk.cu", "HEAD=256", false),
];
/// What they include.
pub(crate) const HEADERS: &[Source] = &[source!("integer.cuh"), source!("linear.cuh"), source!("numerics.cuh"), source!("ptx.cuh")];
/// How all are compiled, whatever the card: a product and a sum are never made one, and nothing is flushed to zero.
pub const OPTIONS: &[&str] = &["--std=c++17", "-default-device", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"];

/// The kernels that the device launches, each with the unit that has it: the file's name and what is defined for it.
pub fn entries() -> impl Iterator<Item = ((&'static str, &'static str), &'static str)> {
    let plain = ENTRIES.iter().flat_map(|(file, names)| names.iter().map(|name| ((*file, ""), *name)));
    let tiles = crate::tiles::entries().map(|(define, name)| (("linear_integer.cu", define), name));
    let decodes = crate::decode::entries().map(|(define, name)| (("attention.cu", define), name));
    plain.chain(tiles).chain(decodes).chain(crate::chunk::entries().map(|(define, name)| (("chunk.cu", define), name)))
}

impl Source {
    /// Names of its kernels that the device launches.
    pub fn entries(&self) -> impl Iterator<Item = &'static str> {
        let unit = (self.name, self.define);
        entries().filter(move |(of, _)| *of == unit).map(|(_, name)| name)
    }
}

const ENTRIES: &[(&str, &[&str])] = &[
    (
        "rows.cu",
        &[
            "gather_rows",
            "scatter_rows",
            "rows_from",
            "norm_rows",
            "norm_heads",
            "rope_heads",
            "gate_rows",
            "activate_elements",
            "add_elements",
            "softcap_elements",
            "largest_of_rows",
            "read_all",
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
        ],
    ),
    ("attend.cu", &["kv_write_f32", "kv_write_bf16", "kv_write_int8", "attend_f32", "attend_bf16", "attend_int8"]),
];
