//! The op set that a device must offer: the forward pass (`executor/model`) is written once over it.
//! Implementors: `reference` (scalar, the specification), `cpu` (SIMD over a thread pool); CUDA comes behind the
//! same trait. It knows rows, widths and pages; it does not know models, tenants or sequences.
//! Numbers: docs/numerics.md. Every op is row-local: row r of an output depends on row r of its inputs alone.

use std::ops::Range;

use crate::format::TensorView;

/// Tokens that one step of the attention walk covers: KV pieces are aligned to absolute positions that are
/// multiples of it, so that the walk never depends on a page size, a chunk or a batch.
pub const PIECE_TOKENS: usize = 16;
/// Tokens whose softmax is computed as one before it is merged with the others': docs/numerics.md, rule 6.
pub const SEGMENT_TOKENS: usize = 4 * PIECE_TOKENS;

/// Why weights could not be taken by a device.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The bytes do not have the length that dtype and shape imply.
    #[error("tensor of {dtype} {rows}x{cols} needs {expected_bytes} bytes, got {actual_bytes}")]
    Length {
        /// Name of the dtype.
        dtype: String,
        /// Rows (output features).
        rows: usize,
        /// Columns (input features).
        cols: usize,
        /// Bytes that dtype and shape imply.
        expected_bytes: usize,
        /// Bytes given.
        actual_bytes: usize,
    },
    /// The format cannot have such a shape: columns do not fit its block, or the size overflows.
    #[error("a tensor of {dtype} cannot be {rows}x{cols}")]
    Shape {
        /// Name of the dtype.
        dtype: String,
        /// Rows (output features).
        rows: usize,
        /// Columns (input features).
        cols: usize,
    },
    /// The parts of one fused linear layer differ in columns or dtype.
    #[error("parts of one linear layer differ: {0}")]
    Parts(String),
    /// The device has no memory left for it.
    #[error("no device memory for {0} bytes")]
    Memory(usize),
    /// The device cannot take it for another reason, or fails.
    #[error("{0}")]
    Device(String),
}

/// Columns of a buffer that an op reads or writes: row r covers elements `r * stride + offset ..+ width`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// Elements between the starts of consecutive rows.
    pub stride: usize,
    /// First column.
    pub offset: usize,
    /// Columns used.
    pub width: usize,
}

impl Columns {
    /// All columns of a dense matrix of `width` columns.
    pub fn dense(width: usize) -> Self {
        Self { stride: width, offset: 0, width }
    }
}

/// RMSNorm, `y = x / sqrt(mean(x^2) + eps) * (offset + w)`, or LayerNorm, `y = (x - mean) / sqrt(var + eps) * w + b`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// Root mean square; `weight_offset` is 0, or 1 for Gemma.
    Rms {
        /// Added to every weight.
        weight_offset: f32,
    },
    /// Mean and variance (GPT-2).
    Layer,
}

/// Element-wise non-linearities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// The tanh approximation of GELU (GPT-2's gelu_new, Gemma's gelu_pytorch_tanh).
    GeluTanh,
    /// GELU by the error function.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

/// What becomes of the outputs `y[T, N]` of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// `out = y`.
    Store,
    /// `out += y`: the bits of [`Finish::Store`] and then [`Ops::add`].
    Add,
    /// `out[t, j] = act(y[t, j]) * y[t, N/2 + j]`: the bits of [`Finish::Store`] and then [`Ops::gate`]. The layer has two parts of equal outputs, gate
    /// and up.
    Gate(Activation),
}

/// How keys and values are stored (docs/numerics.md, "KV formats"): a row is read back in it by every query, its own too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvFormat {
    /// As computed.
    F32,
    /// Rounded to nearest, ties to even.
    Bf16,
    /// Codes within ±127, with an f32 scale for the key and one for the value of each token and kv head.
    Int8,
}

impl std::fmt::Display for KvFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for KvFormat {
    type Err = UnknownKvFormat;

    fn from_str(text: &str) -> Result<Self, UnknownKvFormat> {
        [Self::F32, Self::Bf16, Self::Int8].into_iter().find(|format| format.name() == text).ok_or_else(|| UnknownKvFormat(text.to_owned()))
    }
}

/// The text names no format of keys and values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is none of f32, bf16, int8")]
pub struct UnknownKvFormat(String);

impl KvFormat {
    /// As settings and numeric classes spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of one element.
    pub fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Bytes of the scale of one key or value of one kv head.
    pub fn scale_bytes(self) -> usize {
        if self == Self::Int8 { size_of::<f32>() } else { 0 }
    }
}

/// What layers with bf16 weights are computed from (docs/numerics.md, rules 2 and 9). A device has one for all its layers: results
/// differ between the two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bf16Compute {
    /// The activations as they are: rule 2.
    #[default]
    F32,
    /// Activations rounded to bf16, two products at a time: rule 9.
    Bf16,
}

impl std::fmt::Display for Bf16Compute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Bf16Compute {
    type Err = UnknownBf16Compute;

    fn from_str(text: &str) -> Result<Self, UnknownBf16Compute> {
        [Self::F32, Self::Bf16].into_iter().find(|compute| compute.name() == text).ok_or_else(|| UnknownBf16Compute(text.to_owned()))
    }
}

/// The text names no way to compute bf16 weights.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is none of f32, bf16")]
pub struct UnknownBf16Compute(String);

impl Bf16Compute {
    /// As settings spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// The numeric class of a CPU that computes so (docs/numerics.md), the same on every instruction set.
    pub fn cpu_class(self) -> &'static str {
        match self {
            Self::F32 => "cpu-v1",
            Self::Bf16 => "cpu-v1+bf16-dot",
        }
    }
}

/// What all KV pages of a device have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageLayout {
    /// Tokens of a page, a multiple of [`PIECE_TOKENS`].
    pub tokens: usize,
    /// How keys and values are stored.
    pub format: KvFormat,
}

/// Shape of the keys and values of one attention block: a *slot class* of the page pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KvShape {
    /// Heads that keys and values have.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Tokens of one page; a multiple of [`PIECE_TOKENS`].
    pub page_tokens: usize,
    /// How they are stored.
    pub format: KvFormat,
}

impl KvShape {
    /// Bytes of K plus V of one page, scales included.
    pub fn page_bytes(&self) -> usize {
        2 * self.kv_heads * self.page_tokens * (self.head_dim * self.format.element_bytes() + self.format.scale_bytes())
    }
}

/// Where q, k and v of a token lie in the fused projection's output row `[H*d | K*d | K*d]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads; a multiple of `kv.kv_heads`.
    pub heads: usize,
    /// KV shape.
    pub kv: KvShape,
    /// Multiplies every score (usually `head_dim^-0.5`).
    pub scale: f32,
    /// `cap * tanh(score / cap)` before masking.
    pub softcap: Option<f32>,
    /// A query at position p sees keys at positions `> p - window` only.
    pub window: Option<u32>,
}

impl AttentionShape {
    /// Elements of one row of fused q, k, v.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv.kv_heads) * self.kv.head_dim
    }
}

/// Where the KV of one row is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvPlace {
    /// Page slot within the pool.
    pub slot: u32,
    /// Token within the page.
    pub offset: u32,
}

/// One query row: it attends to positions `0..=position` of the page table that starts at `tables[table_start]`
/// (entry i is the slot that holds tokens `i * page_tokens ..`). Entries wholly behind the window may be any value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Query {
    /// Index of the sequence's first page table entry.
    pub table_start: u32,
    /// Absolute position of this row's token.
    pub position: u32,
}

/// A part of a layer with its place ([`Ops::linear_placed`]).
#[derive(Debug, Clone, Copy)]
pub struct PlacedPart<'a> {
    /// Its weights, `[outputs, inputs]`.
    pub weights: TensorView<'a>,
    /// Where its inputs begin in a row of x.
    pub first_input: usize,
    /// Where its outputs begin in a row of the result.
    pub first_output: usize,
}

/// Rows of a batch that go through one layer.
#[derive(Debug, Clone)]
pub struct LinearRun<'a, L, V> {
    /// The layer.
    pub linear: &'a L,
    /// Added to its outputs.
    pub bias: Option<&'a V>,
    /// The rows.
    pub rows: std::ops::Range<usize>,
}

/// The op set. Buffers hold f32 activations; shapes are in elements. Preconditions (lengths, indices in range) are
/// asserted: breaking one is a bug of the caller, not an input error.
pub trait Ops: Send + Sync + 'static {
    /// f32 activations on the device.
    type Buffer: Send;
    /// A packed linear layer, `[N outputs, K inputs]`.
    type Linear: Send + Sync;
    /// An f32 vector (norm weight, bias, inverse frequencies).
    type Vector: Send + Sync;
    /// Rows that can be looked up (token or position embedding).
    type Table: Send + Sync;
    /// KV memory of one slot class.
    type Kv: Send;

    /// One line for logs: device, instruction set, threads.
    fn describe(&self) -> String;

    /// The caller has nothing to do for a while: memory that nobody uses may go back to the system.
    fn rest(&self) {}
    /// The caller turns to something else: what was asked for begins, on a device that gathers what it is asked for.
    fn submit(&self) {}

    /// A zeroed buffer of `element_count` f32.
    fn buffer(&self, element_count: usize) -> Result<Self::Buffer, PackError>;
    /// Packs a linear layer. `parts` are stacked along N (for example q, k, v); they agree in K, dtypes may differ.
    fn linear(&self, parts: &[TensorView<'_>]) -> Result<Self::Linear, PackError>;
    /// Packs a layer of parts that each have their own inputs, which may overlap, and their own outputs, which are disjoint and ascending.
    /// Outputs of no part stay as they are in [`Ops::linear_runs`], stored or added, and nothing else takes
    /// such a layer. So the expands of several matrices that lie in one row are one layer, whatever their ranks, and so are deltas of some of
    /// these matrices. The bits are those of each part alone.
    fn linear_placed(&self, parts: &[PlacedPart<'_>]) -> Result<Self::Linear, PackError>;
    /// Takes a vector, converting to f32. `parts` are concatenated.
    fn vector(&self, parts: &[TensorView<'_>]) -> Result<Self::Vector, PackError>;
    /// Takes a vector of f32 given by value.
    fn vector_f32(&self, values: &[f32]) -> Result<Self::Vector, PackError>;
    /// Takes a lookup table `[rows, width]`. `keep` owns the bytes (a map of the file), so that nothing is copied.
    fn table(&self, view: TensorView<'_>, keep: std::sync::Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<Self::Table, PackError>;
    /// The table of the tensor that `linear` was packed from, its rows read out of the packed form with the bits that [`Ops::table`] gives;
    /// `None` where the device or this layer cannot. The layer lives as long as the table.
    fn table_of(&self, linear: &std::sync::Arc<Self::Linear>) -> Option<Self::Table> {
        let _ = linear;
        None
    }
    /// Zeroed KV memory for `slot_count` pages; touched lazily.
    fn kv(&self, shape: KvShape, slot_count: usize) -> Result<Self::Kv, PackError>;
    /// Has the system put memory behind pages that will be used soon, so that no step waits for it. What they hold stays; a hint.
    fn touch_kv(&self, kv: &mut Self::Kv, slots: Range<usize>) {
        let _ = (kv, slots);
    }

    /// Bytes that a packed layer occupies on the device.
    fn linear_bytes(&self, linear: &Self::Linear) -> usize;

    /// Copies `values` into the buffer from element `at`.
    fn upload(&self, buffer: &mut Self::Buffer, at: usize, values: &[f32]);
    /// Copies elements from `at` into `out`.
    fn download(&self, buffer: &Self::Buffer, at: usize, out: &mut [f32]);
    /// `dst[i] = src[index[i]]`, rows of `width`.
    fn gather_rows(&self, dst: &mut Self::Buffer, src: &Self::Buffer, index: &[u32], width: usize);
    /// `dst[index[i]] = src[i]`, rows of `width`; indices are distinct.
    fn scatter_rows(&self, dst: &mut Self::Buffer, index: &[u32], src: &Self::Buffer, width: usize);

    /// `out[first + i] = table[rows[i]] * scale`, dense rows.
    fn embed(&self, out: &mut Self::Buffer, first: usize, table: &Self::Table, rows: &[u32], scale: f32);
    /// `out[first + i] += table[rows[i]]` (learned positions).
    fn embed_add(&self, out: &mut Self::Buffer, first: usize, table: &Self::Table, rows: &[u32]);
    /// Norm of these rows of `src` into those of `dst`, both dense.
    fn norm(
        &self,
        dst: &mut Self::Buffer,
        src: &Self::Buffer,
        rows: Range<usize>,
        width: usize,
        kind: NormKind,
        eps: f32,
        weight: &Self::Vector,
        bias: Option<&Self::Vector>,
    );
    /// RMSNorm in place of the heads that lie in `columns` of each of these rows (Qwen3's and Gemma 3's q and k norms).
    fn norm_heads(
        &self,
        buffer: &mut Self::Buffer,
        rows: Range<usize>,
        columns: Columns,
        head_dim: usize,
        weight_offset: f32,
        eps: f32,
        weight: &Self::Vector,
    );
    /// `y[T, N] = x[T, K] W^T + bias`, dense rows, and what becomes of y: `out` is `[T, N]`, or `[T, N/2]` of a gate.
    fn linear_apply(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        row_count: usize,
        linear: &Self::Linear,
        bias: Option<&Self::Vector>,
        finish: Finish,
    );
    /// Several layers in one call, a few rows each: `y[t, n] = x[t, K] W^T + bias` by the layer of the run that row t is in, and what becomes of it.
    /// The runs' rows are disjoint and ascending; rows of no run stay as they are. A layer reads its K inputs from the
    /// beginning of `inputs` and writes its outputs from the beginning of `outputs`, so ranks of adapters may be mixed: the
    /// shrink `h = x A^T` and the expand `y += h B^T` ([`Finish::Add`]) are one call each. The bits are those of [`Ops::linear_apply`]
    /// for each run alone.
    fn linear_runs(
        &self,
        out: &mut Self::Buffer,
        outputs: Columns,
        x: &Self::Buffer,
        inputs: Columns,
        runs: &[LinearRun<'_, Self::Linear, Self::Vector>],
        finish: Finish,
    );
    /// Cosines and sines of `positions x inverse frequencies`, times `attention_factor`: row t is
    /// `[cos 0..R/2 | sin 0..R/2]` where R/2 = the length of `inverse_frequencies`.
    fn rope_rows(&self, out: &mut Self::Buffer, positions: &[u32], inverse_frequencies: &Self::Vector, attention_factor: f32);
    /// Rotates the first `2 * half` elements of each head in `columns` (halves style, as Hugging Face's rotate_half), in place.
    fn rope(&self, buffer: &mut Self::Buffer, row_count: usize, columns: Columns, head_dim: usize, half: usize, rope_rows: &Self::Buffer);
    /// Stores k and v of fused rows `qkv` into pages; `places[t]` is where row t goes.
    fn kv_write(&self, kv: &mut Self::Kv, qkv: &Self::Buffer, shape: &AttentionShape, places: &[KvPlace]);
    /// `out[T, H*d]`: softmax attention of each query row over its pages (which already hold its own k and v).
    fn attend(&self, out: &mut Self::Buffer, qkv: &Self::Buffer, kv: &Self::Kv, shape: &AttentionShape, queries: &[Query], tables: &[u32]);
    /// `out[t, j] = act(gate_up[t, j]) * gate_up[t, width + j]`.
    fn gate(&self, out: &mut Self::Buffer, gate_up: &Self::Buffer, row_count: usize, width: usize, activation: Activation);
    /// `x = act(x)` over the first `element_count` elements.
    fn activate(&self, x: &mut Self::Buffer, element_count: usize, activation: Activation);
    /// `acc += x` over the first `element_count` elements.
    fn add(&self, acc: &mut Self::Buffer, x: &Self::Buffer, element_count: usize);
    /// `x = cap * tanh(x / cap)` over the first `element_count` elements.
    fn softcap(&self, x: &mut Self::Buffer, element_count: usize, cap: f32);
    /// `out[t]` is the lowest index of the largest element of row t of dense rows `x[T, width]`, T = `out.len()`; `None` where no
    /// element is above negative infinity. NaN counts as that.
    fn largest(&self, x: &Self::Buffer, width: usize, out: &mut [Option<u32>]);
}
