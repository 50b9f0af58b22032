//! Attention of rows that read the same pages by `kernels/cuda/chunk.cu`: chunks of prompts, and prefixes that decodes share. `plan.rs` says which rows those are.

use ashlar_kernels::ops::{AttentionShape, KvFormat, PIECE_TOKENS, SEGMENT_TOKENS};

use crate::Cuda;
use crate::driver::{Address, Argument, DriverError};
use crate::kv::Kv;
use crate::plan::{Pass, Plan};

/// (row, head)s of a tile at most: `CHUNK_LINES` of chunk.cu.
pub(crate) const LINES: usize = 64;
/// Segments of a split of a prefix that rows share.
const SPLIT_SEGMENTS: usize = 4;

/// A kernel for heads of one size in one format.
#[derive(Debug)]
pub(crate) struct Kernel {
    head_dim: usize,
    format: KvFormat,
    /// What is defined for the unit that has it.
    define: &'static str,
    name: &'static str,
    /// The form that leaves segments to a merge, where there is one.
    split: Option<&'static str>,
    /// Lines of a thread.
    each: usize,
}

macro_rules! kernel {
    ($format:ident, $name:literal, $head_dim:literal, $each:literal, $split:expr) => {
        Kernel {
            head_dim: $head_dim,
            format: KvFormat::$format,
            define: concat!("HEAD=", $head_dim),
            name: concat!("chunk_", $name, "_d", $head_dim),
            split: $split,
            each: $each,
        }
    };
}

const KERNELS: [Kernel; 7] = [
    kernel!(F32, "f32", 64, 8, None),
    kernel!(Bf16, "bf16", 64, 8, Some("chunk_split_bf16_d64")),
    kernel!(Int8, "int8", 64, 8, None),
    kernel!(F32, "f32", 128, 8, None),
    kernel!(Bf16, "bf16", 128, 8, Some("chunk_split_bf16_d128")),
    kernel!(Int8, "int8", 128, 8, None),
    kernel!(Bf16, "bf16", 256, 4, None),
];

/// All entries that may be launched, each with what is defined for its unit.
pub(crate) fn entries() -> impl Iterator<Item = (&'static str, &'static str)> {
    KERNELS.iter().flat_map(|kernel| std::iter::once(kernel.name).chain(kernel.split).map(|name| (kernel.define, name)))
}

/// A kernel of the unit for heads of a size, if there is one.
pub(crate) fn any_of(head_dim: usize, format: KvFormat) -> Option<&'static str> {
    KERNELS.iter().find(|kernel| kernel.head_dim == head_dim && kernel.format == format).map(|kernel| kernel.name)
}

/// The one for a shape, if there is one and a card with so much shared memory runs it.
pub(crate) fn of(shape: &AttentionShape, shared_bytes_max: usize) -> Option<&'static Kernel> {
    let fits = |kernel: &&Kernel| kernel.head_dim == shape.kv.head_dim && kernel.format == shape.kv.format;
    KERNELS.iter().find(fits).filter(|kernel| group(shape) <= LINES && kernel.shared_bytes() <= shared_bytes_max)
}

/// Heads on a kv head.
pub(crate) fn group(shape: &AttentionShape) -> usize {
    shape.heads / shape.kv.kv_heads
}

impl Kernel {
    /// `chunk_shared_bytes` of chunk.cu.
    fn shared_bytes(&self) -> usize {
        let row = (self.head_dim + 4) * size_of::<f32>();
        let line = row + SEGMENT_TOKENS * size_of::<f32>() + 2 * size_of::<u32>();
        SEGMENT_TOKENS * row + LINES * line + SEGMENT_TOKENS * self.head_dim * self.format.element_bytes()
    }

    /// Whether it has a form that leaves segments to a merge.
    pub(crate) fn has_split(&self) -> bool {
        self.split.is_some()
    }

    /// Attends for the tiles that are no pass's. Queries, tables and tiles are those of the plan on the card.
    pub(crate) fn run(
        &self,
        cuda: &Cuda,
        out: Address,
        from: (Address, &Kv),
        shape: &AttentionShape,
        plan: &Plan,
        at: [Address; 3],
    ) -> Result<(), DriverError> {
        let grid = [shape.kv.kv_heads as u32, plan.whole_tiles as u32, 1];
        cuda.launch(self.name, grid, 16 * LINES / self.each, self.shared_bytes(), &arguments(out, from, shape, at, 0))
    }

    /// Leaves segments of a pass's tiles in `partial`. Queries and tiles are the pass's.
    pub(crate) fn run_split(
        &self,
        cuda: &Cuda,
        partial: Address,
        from: (Address, &Kv),
        shape: &AttentionShape,
        pass: &Pass,
        at: [Address; 3],
    ) -> Result<(), DriverError> {
        let name = self.split.expect("passes are planned where there is a kernel for them");
        let grid = [shape.kv.kv_heads as u32, pass.tiles.len() as u32, pass.shared.end.div_ceil(SPLIT_SEGMENTS) as u32];
        cuda.launch(name, grid, 16 * LINES / self.each, self.shared_bytes(), &arguments(partial, from, shape, at, pass.segments))
    }
}

/// Of both forms; `segments` is how many a row may have in `out` if it is partial.
fn arguments(
    out: Address,
    (qkv, kv): (Address, &Kv),
    shape: &AttentionShape,
    [queries, tables, tiles]: [Address; 3],
    segments: usize,
) -> [Argument; 16] {
    let [keys, values, key_scales, value_scales] = kv.sections().map(Argument::Address);
    [
        out.into(),
        qkv.into(),
        keys,
        values,
        key_scales,
        value_scales,
        queries.into(),
        tables.into(),
        tiles.into(),
        group(shape).into(),
        (shape.kv.page_tokens / PIECE_TOKENS).into(),
        Argument::Int(window(shape)),
        shape.scale.into(),
        shape.softcap.unwrap_or(0.0).into(),
        SPLIT_SEGMENTS.into(),
        segments.into(),
    ]
}

/// As kernels take it: 0 is none, and what no position reaches is as good as none.
pub(crate) fn window(shape: &AttentionShape) -> i32 {
    shape.window.map_or(0, |window| window.min(i32::MAX.cast_unsigned()).cast_signed())
}
