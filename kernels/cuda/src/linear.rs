//! Linear layers of every format on a card: packed for `kernels/cuda/linear_exact.cu`, whose page of layouts this follows.

use std::sync::Arc;

use crate::Cuda;
use crate::arguments::{NULL, or_null};
use crate::driver::{Address, Argument, Driver, DriverError};
use crate::memory::Memory;
use crate::scratch::Scratch;
use crate::tiles::Tiles;
use ashlar_kernels::SLICE;
use ashlar_kernels::format::{CodeRow, Dtype, TensorView};
use ashlar_kernels::ops::{Activation, Finish, PackError, PlacedPart};
use ashlar_kernels::reference::{check_parts, check_placed};

/// Threads of a cta that computes, and rows that it takes at most.
const THREADS: usize = 128;
const ROWS: usize = 8;
/// With more rows than this their number alone keeps the card busy, and sums of slices stay in registers.
const SPLIT_ROWS_MAX: usize = 64;
/// Threads of a cta of `linear_finish`.
const FINISH_THREADS: usize = 256;
/// Ctas along y, at most.
const GRID_Y_MAX: usize = 65_535;

/// A packed layer `[N outputs, K inputs]`.
#[derive(Debug)]
pub struct Linear {
    inputs: usize,
    outputs: usize,
    parts: Vec<Part>,
    /// Parts have inputs and outputs of their own.
    is_placed: bool,
}

/// Outputs that read the same inputs and have one format.
#[derive(Debug)]
struct Part {
    first_input: usize,
    inputs: usize,
    first_output: usize,
    outputs: usize,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Float {
        /// Of the entry that takes it.
        name: [&'static str; 2],
        codes: Memory,
        scales: Option<Memory>,
        group: usize,
    },
    Integer {
        codes: Memory,
        scales: Memory,
        minima: Option<Memory>,
        group: usize,
    },
    Tiles(Tiles),
}

/// Rows that a layer reads or writes: dense but for a stride, from a first element on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowsAt {
    pub(crate) first: Address,
    /// Elements from row to row.
    pub(crate) stride: usize,
}

impl RowsAt {
    fn row(self, row: usize) -> Address {
        self.first.plus(row * self.stride * size_of::<f32>())
    }
}

impl Linear {
    pub(crate) fn new(driver: &Arc<dyn Driver>, parts: &[TensorView<'_>]) -> Result<Self, PackError> {
        let inputs = check_parts(parts)?;
        let (mut outputs, mut stacked) = (0, Vec::with_capacity(parts.len()));
        for view in parts {
            stacked.push(Part::new(driver, view, 0, outputs)?);
            outputs += view.rows;
        }
        Ok(Self { inputs, outputs, parts: stacked, is_placed: false })
    }

    pub(crate) fn placed(driver: &Arc<dyn Driver>, parts: &[PlacedPart<'_>]) -> Result<Self, PackError> {
        let (inputs, outputs) = check_placed(parts)?;
        let along: Result<_, PackError> =
            parts.iter().map(|part| Part::new(driver, &part.weights, part.first_input, part.first_output)).collect();
        Ok(Self { inputs, outputs, parts: along?, is_placed: true })
    }

    /// Inputs (K).
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Outputs (N).
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.weights.bytes()).sum()
    }
}

impl Weights {
    fn bytes(&self) -> usize {
        let of = |memory: &Option<Memory>| memory.as_ref().map_or(0, Memory::bytes);
        match self {
            Self::Float { codes, scales, .. } => codes.bytes() + of(scales),
            Self::Integer { codes, scales, minima, .. } => codes.bytes() + scales.bytes() + of(minima),
            Self::Tiles(tiles) => tiles.bytes(),
        }
    }
}

/// Outputs of a layer as they lie: an even number.
fn padded(outputs: usize) -> usize {
    outputs.next_multiple_of(2)
}

impl Part {
    fn new(driver: &Arc<dyn Driver>, view: &TensorView<'_>, first_input: usize, first_output: usize) -> Result<Self, PackError> {
        let weights = match (view.dtype.group(), Tiles::new(driver, view)?) {
            (_, Some(tiles)) => Weights::Tiles(tiles),
            (Some(group), None) => integer(driver, view, group)?,
            (None, None) => float(driver, view)?,
        };
        Ok(Self { first_input, inputs: view.cols, first_output, outputs: view.rows, weights })
    }

    fn slices(&self) -> usize {
        self.inputs.div_ceil(SLICE)
    }

    /// Bytes of so many rows' codes, scales and sums, where weights are integers.
    fn quantised_bytes(&self, rows: usize) -> [usize; 3] {
        match &self.weights {
            Weights::Float { .. } => [0; 3],
            Weights::Integer { group, .. } => {
                let of_groups = rows * self.inputs.div_ceil(*group) * size_of::<f32>();
                [rows * self.inputs.next_multiple_of(4), of_groups, of_groups]
            }
            Weights::Tiles(tiles) => tiles.quantised_bytes(self.inputs, rows),
        }
    }

    /// Slices' sums are left for `linear_finish` to add: what kernels on tensor cores do themselves.
    fn splits(&self) -> bool {
        !matches!(self.weights, Weights::Tiles(_))
    }
}

fn float(driver: &Arc<dyn Driver>, view: &TensorView<'_>) -> Result<Weights, PackError> {
    let (name, size) = match view.dtype {
        Dtype::F32 => (["linear_f32_rows1", "linear_f32_rows8"], 4),
        Dtype::F16 => (["linear_f16_rows1", "linear_f16_rows8"], 2),
        Dtype::Bf16 => (["linear_bf16_rows1", "linear_bf16_rows8"], 2),
        Dtype::Fp8 { .. } => (["linear_fp8_rows1", "linear_fp8_rows8"], 1),
        other => unreachable!("{other} has a group"),
    };
    let (rows, cols) = (view.rows, view.cols);
    let codes = Memory::holding(driver, &transposed(&view.bytes[..rows * cols * size], rows, cols, size))?;
    let (scales, group) = match view.dtype {
        Dtype::Fp8 { group } => {
            let group = usize::from(group);
            (Some(Memory::holding(driver, &transposed(&view.bytes[rows * cols..], rows, cols.div_ceil(group), 4))?), group)
        }
        _ => (None, 1),
    };
    Ok(Weights::Float { name, codes, scales, group })
}

/// Elements of `size` bytes, `[rows, cols]`, as `[cols, padded rows]`; by tiles, so that neither side leaves the cache.
fn transposed(bytes: &[u8], rows: usize, cols: usize, size: usize) -> Vec<u8> {
    const TILE: usize = 64;
    let stride = padded(rows);
    let mut out = vec![0; cols * stride * size];
    for row0 in (0..rows).step_by(TILE) {
        for col0 in (0..cols).step_by(TILE) {
            for row in row0..(row0 + TILE).min(rows) {
                for col in col0..(col0 + TILE).min(cols) {
                    out[(col * stride + row) * size..][..size].copy_from_slice(&bytes[(row * cols + col) * size..][..size]);
                }
            }
        }
    }
    out
}

fn integer(driver: &Arc<dyn Driver>, view: &TensorView<'_>, group: usize) -> Result<Weights, PackError> {
    let (stride, words, groups) = (padded(view.rows), view.cols.div_ceil(4), view.cols.div_ceil(group));
    let mut codes = vec![0u8; words * stride * 4];
    let (mut scales, mut minima) = (vec![0u8; groups * stride * 4], vec![0u8; groups * stride * 4]);
    let mut row = CodeRow::default();
    for n in 0..view.rows {
        row.read(view, n);
        for (k4, four) in row.codes.chunks(4).enumerate() {
            let to = &mut codes[(k4 * stride + n) * 4..][..four.len()];
            std::iter::zip(to, four).for_each(|(to, code)| *to = code.cast_unsigned());
        }
        for (values, to) in [(&row.scales, &mut scales), (&row.minima, &mut minima)] {
            for (g, value) in values.iter().enumerate() {
                to[(g * stride + n) * 4..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    let minima = view.dtype.has_minimum().then(|| Memory::holding(driver, &minima)).transpose()?;
    Ok(Weights::Integer { codes: Memory::holding(driver, &codes)?, scales: Memory::holding(driver, &scales)?, minima, group })
}

/// What becomes of outputs, as `linear_finish` counts it.
fn finish_number(finish: Finish) -> [Argument; 2] {
    let activation = match finish {
        Finish::Gate(activation) => activation_number(activation),
        Finish::Store | Finish::Add => Argument::Int(0),
    };
    let finish = match finish {
        Finish::Store => 0,
        Finish::Add => 1,
        Finish::Gate(_) => 2,
    };
    [Argument::Int(finish), activation]
}

/// An activation as the kernels count it.
pub(crate) fn activation_number(activation: Activation) -> Argument {
    Argument::Int(match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
        Activation::Relu => 3,
    })
}

impl Cuda {
    /// Rows through a layer, and what becomes of its outputs.
    pub(crate) fn run_linear(
        &self,
        linear: &Linear,
        (x, out): (RowsAt, RowsAt),
        rows: usize,
        bias: Option<Address>,
        finish: Finish,
    ) -> Result<(), DriverError> {
        let mut scratch = self.scratch();
        let mut done = 0;
        while done < rows {
            let count = self.rows_at_once(&mut scratch, linear, rows - done)?;
            let (x, out) = (RowsAt { first: x.row(done), ..x }, RowsAt { first: out.row(done), ..out });
            if linear.is_placed {
                assert!(!matches!(finish, Finish::Gate(_)), "parts with places of their own are not gated");
                for part in &linear.parts {
                    let at = |address: Address, element: usize| address.plus(element * size_of::<f32>());
                    let out = RowsAt { first: at(out.first, part.first_output), ..out };
                    let bias = bias.map(|bias| at(bias, part.first_output));
                    self.run_parts(
                        &mut scratch,
                        std::slice::from_ref(part),
                        part.first_output,
                        part.outputs,
                        (x, out),
                        count,
                        bias,
                        finish,
                    )?;
                }
            } else {
                self.run_parts(&mut scratch, &linear.parts, 0, linear.outputs, (x, out), count, bias, finish)?;
            }
            done += count;
        }
        Ok(())
    }

    /// So many rows that their sums fit into scratch; where one does not, scratch grows.
    fn rows_at_once(&self, scratch: &mut Scratch, linear: &Linear, rows: usize) -> Result<usize, DriverError> {
        scratch.begin(&self.driver, 0)?;
        let slices = linear.parts.iter().map(Part::slices).max().unwrap_or(1);
        // Each of the places that are taken may waste what aligns it.
        let spare = 1024 * (linear.parts.len() + 1);
        let need = |rows: usize| {
            let sums = if rows <= SPLIT_ROWS_MAX { slices } else { 1 };
            let quantised: usize = linear.parts.iter().flat_map(|part| part.quantised_bytes(rows)).sum();
            rows * sums * linear.outputs * size_of::<f32>() + quantised + spare
        };
        let mut count = rows.min(GRID_Y_MAX);
        while count > 1 && need(count) > scratch.left() {
            // The most that splits takes less than twice as many that do not, where there are several slices.
            count = if count > SPLIT_ROWS_MAX && count / 2 <= SPLIT_ROWS_MAX { SPLIT_ROWS_MAX } else { count / 2 };
        }
        scratch.begin(&self.driver, need(count))?;
        Ok(count)
    }

    /// Parts whose outputs, `outputs` from `first_output` on, are finished together.
    fn run_parts(
        &self,
        scratch: &mut Scratch,
        parts: &[Part],
        first_output: usize,
        outputs: usize,
        (x, out): (RowsAt, RowsAt),
        rows: usize,
        bias: Option<Address>,
        finish: Finish,
    ) -> Result<(), DriverError> {
        scratch.begin(&self.driver, 0)?;
        let slices = if rows <= SPLIT_ROWS_MAX && parts.iter().all(Part::splits) { parts[0].slices() } else { 1 };
        let partial = scratch.take(slices * rows * outputs * size_of::<f32>());
        let mut latest: Option<((usize, usize, bool), [Address; 3])> = None;
        let (entry, tile) = if rows == 1 { (0, 1) } else { (1, ROWS) };
        for part in parts {
            let stacked = padded(part.outputs);
            let to = partial.plus((part.first_output - first_output) * size_of::<f32>());
            let from = RowsAt { first: x.first.plus(part.first_input * size_of::<f32>()), ..x };
            let grid = |each: usize| [stacked.div_ceil(each) as u32, slices as u32, rows.div_ceil(tile) as u32];
            match &part.weights {
                Weights::Float { name, codes, scales, group } => {
                    let arguments = [
                        codes.address().into(),
                        or_null(scales.as_ref().map(Memory::address)),
                        from.first.into(),
                        to.into(),
                        rows.into(),
                        part.outputs.into(),
                        stacked.into(),
                        part.inputs.into(),
                        from.stride.into(),
                        outputs.into(),
                        (*group).into(),
                    ];
                    self.launch(name[entry], grid(2 * THREADS), THREADS, tile * SLICE * size_of::<f32>(), &arguments)?;
                }
                Weights::Tiles(tiles) => {
                    let places = self.quantised(scratch, &mut latest, part, tiles.group(), from, rows)?;
                    tiles.run(self, [part.outputs, part.inputs], rows, places, to, outputs)?;
                }
                Weights::Integer { codes, scales, minima, group } => {
                    let places = self.quantised(scratch, &mut latest, part, *group, from, rows)?;
                    let [row_codes, row_scales, row_sums] = places.map(Argument::Address);
                    let arguments = [
                        codes.address().into(),
                        scales.address().into(),
                        or_null(minima.as_ref().map(Memory::address)),
                        row_codes,
                        row_scales,
                        row_sums,
                        to.into(),
                        rows.into(),
                        part.outputs.into(),
                        stacked.into(),
                        part.inputs.into(),
                        outputs.into(),
                        (*group).into(),
                    ];
                    let name = ["linear_integer_rows1", "linear_integer_rows8"][entry];
                    self.launch(name, grid(THREADS), THREADS, tile * SLICE, &arguments)?;
                }
            }
        }
        let columns = if let Finish::Gate(_) = finish { outputs / 2 } else { outputs };
        let [finish, activation] = finish_number(finish);
        let arguments = [
            partial.into(),
            bias.map_or(NULL, Argument::from),
            out.first.into(),
            slices.into(),
            rows.into(),
            outputs.into(),
            outputs.into(),
            out.stride.into(),
            finish,
            activation,
        ];
        self.launch("linear_finish", [columns.div_ceil(FINISH_THREADS) as u32, rows as u32, 1], FINISH_THREADS, 0, &arguments)
    }

    /// Rows quantised as a part takes them, or as the part before it did.
    fn quantised(
        &self,
        scratch: &mut Scratch,
        latest: &mut Option<((usize, usize, bool), [Address; 3])>,
        part: &Part,
        group: usize,
        from: RowsAt,
        rows: usize,
    ) -> Result<[Address; 3], DriverError> {
        let key = (part.first_input, group, part.splits());
        if let Some((_, places)) = latest.filter(|(of, _)| *of == key) {
            return Ok(places);
        }
        let places = part.quantised_bytes(rows).map(|bytes| scratch.take(bytes));
        if let Weights::Tiles(tiles) = &part.weights {
            tiles.quantise(self, from, part.inputs, rows, places)?;
        } else {
            let [codes, scales, sums] = places.map(Argument::Address);
            let (k, padded_k) = (part.inputs, part.inputs.next_multiple_of(4));
            let arguments = [from.first.into(), codes, scales, sums, k.into(), padded_k.into(), from.stride.into(), group.into()];
            self.launch("quantise_exact", [k.div_ceil(group) as u32, rows as u32, 1], 32, 0, &arguments)?;
        }
        *latest = Some((key, places));
        Ok(places)
    }
}
