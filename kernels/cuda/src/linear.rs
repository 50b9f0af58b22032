//! Linear layers of every format on a card: parts of one format that lie on top of each other are packed as one. How they are launched: `runs.rs`.

use std::sync::Arc;

use ashlar_kernels::SLICE;
use ashlar_kernels::format::{Dtype, TensorView};
use ashlar_kernels::ops::{PackError, PlacedPart};
use ashlar_kernels::reference::{check_parts, check_placed};

use crate::driver::{Address, Driver};
use crate::memory::Memory;
use crate::plain::{Plain, Shape};
use crate::stacked::Stacked;
use crate::tiles::{TILE, Tiles};

/// A packed layer `[N outputs, K inputs]`.
#[derive(Debug)]
pub struct Linear {
    inputs: usize,
    outputs: usize,
    parts: Vec<Part>,
}

/// Outputs that read the same inputs and have one format.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) first_input: usize,
    pub(crate) inputs: usize,
    pub(crate) first_output: usize,
    pub(crate) outputs: usize,
    pub(crate) form: Form,
    pub(crate) weights: Weights,
}

/// Weights as a form has them.
#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) codes: Memory,
    pub(crate) scales: Option<Memory>,
    pub(crate) minima: Option<Memory>,
    /// Inputs that share a scale; 1 where there are none.
    pub(crate) group: usize,
}

/// Which kernels take a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Plain(Plain),
    Tiles(Tiles),
}

/// The most that any task of a launch has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Most {
    /// Tasks.
    pub(crate) count: usize,
    pub(crate) rows: usize,
    /// Outputs of a side.
    pub(crate) width: usize,
    /// Those of all tasks.
    pub(crate) widths: usize,
    pub(crate) slices: usize,
    /// All have whole slices.
    pub(crate) is_whole: bool,
}

impl Linear {
    pub(crate) fn new(driver: &Arc<dyn Driver>, parts: &[TensorView<'_>]) -> Result<Self, PackError> {
        let inputs = check_parts(parts)?;
        let (mut outputs, mut stacked) = (0, Vec::with_capacity(parts.len()));
        for views in parts.chunk_by(joins) {
            let part = Part::new(driver, views, 0, outputs)?;
            outputs += part.outputs;
            stacked.push(part);
        }
        Ok(Self { inputs, outputs, parts: stacked })
    }

    pub(crate) fn placed(driver: &Arc<dyn Driver>, parts: &[PlacedPart<'_>]) -> Result<Self, PackError> {
        let (inputs, outputs) = check_placed(parts)?;
        let along: Result<_, PackError> =
            parts.iter().map(|part| Part::new(driver, std::slice::from_ref(&part.weights), part.first_input, part.first_output)).collect();
        Ok(Self { inputs, outputs, parts: along? })
    }

    /// Inputs (K).
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Outputs (N).
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.weights.bytes()).sum()
    }

    /// Its two halves are gated where they are computed.
    pub(crate) fn gates(&self) -> bool {
        matches!(self.parts.as_slice(), [part] if part.form.gates(part.outputs))
    }
}

/// Whether what is below can be packed with it: tiles may not be shared.
fn joins(above: &TensorView<'_>, below: &TensorView<'_>) -> bool {
    let is_even = matches!(Form::of(above.dtype), Form::Plain(_)) || above.rows.is_multiple_of(TILE);
    above.dtype == below.dtype && is_even
}

impl Weights {
    fn bytes(&self) -> usize {
        let of = |memory: &Option<Memory>| memory.as_ref().map_or(0, Memory::bytes);
        self.codes.bytes() + of(&self.scales) + of(&self.minima)
    }
}

impl Part {
    fn new(driver: &Arc<dyn Driver>, views: &[TensorView<'_>], first_input: usize, first_output: usize) -> Result<Self, PackError> {
        let (form, stacked) = (Form::of(views[0].dtype), Stacked::new(views));
        let weights = match form {
            Form::Tiles(tiles) => tiles.pack(driver, &stacked)?,
            Form::Plain(plain) => plain.pack(driver, &stacked)?,
        };
        Ok(Self { first_input, inputs: stacked.cols, first_output, outputs: stacked.rows, form, weights })
    }

    pub(crate) fn slices(&self) -> usize {
        self.inputs.div_ceil(SLICE)
    }

    /// Bytes of so many rows' codes, scales and sums, where weights are integers.
    pub(crate) fn quantised_bytes(&self, rows: usize) -> Option<[usize; 3]> {
        match &self.form {
            Form::Plain(plain) if plain.is_integer => Some(plain.quantised_bytes(self.inputs, self.weights.group, rows)),
            Form::Plain(_) => None,
            Form::Tiles(tiles) => Some(tiles.quantised_bytes(self.inputs, rows)),
        }
    }

    /// The kernel that quantises rows for it, and ctas along x and threads for that.
    pub(crate) fn quantise(&self) -> (&'static str, usize, usize) {
        match &self.form {
            Form::Plain(_) => ("quantise_exact", self.inputs.div_ceil(self.weights.group), 32),
            Form::Tiles(tiles) => {
                let (ctas, threads) = tiles.quantise_shape(self.inputs);
                (tiles.quantise(), ctas, threads)
            }
        }
    }
}

impl Form {
    fn of(dtype: Dtype) -> Self {
        Tiles::of(dtype).map_or_else(|| Self::Plain(Plain::of(dtype)), Self::Tiles)
    }

    /// What its kernels are told apart by.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Plain(plain) => plain.name(),
            Self::Tiles(tiles) => tiles.name(),
        }
    }

    fn gates(&self, outputs: usize) -> bool {
        match self {
            Self::Plain(plain) => plain.gates(outputs),
            Self::Tiles(_) => Tiles::gates(outputs),
        }
    }

    /// How tasks of it are launched, of which only one may have more than few rows.
    pub(crate) fn shape(&self, most: &Most, sides: usize, shared_bytes_max: usize) -> Shape {
        match self {
            Self::Plain(plain) => plain.shape(most.count, most.rows, most.width, most.slices, sides),
            Self::Tiles(tiles) => tiles.shape(most, sides, shared_bytes_max),
        }
    }
}

/// An address, or null.
pub(crate) fn address(memory: &Option<Memory>) -> Address {
    memory.as_ref().map_or(Address(0), Memory::address)
}
