//! Linear layers as the CPU reads them. Outputs lie along the 16 lanes: a *panel* is 16 outputs over all of K, and
//! padding outputs have zero weights.
//!
//! | weights | panel |
//! | --- | --- |
//! | f32, f16, bf16 | `[K][16]` elements as stored |
//! | codes of a byte | `[K'/4][16][4]` unsigned: code + offset |
//! | codes of a nibble | `[K'/8][16][4]` bytes: low nibbles are the first four k of eight, high nibbles the next four |
//! | scales, minima | `[groups][16]`, f16 where the source has f16, else f32 |
//!
//! K' is K with each group padded to a multiple of 8 (code 0 meets activation 0 there). The dot product runs on the
//! unsigned codes; `offset * asum` is subtracted exactly.

use half::f16;

use super::memory::{Aligned, Element, Shared};
use super::pool::Pool;
use crate::format::{CodeRow, Dtype, TensorView};
use crate::ops::PackError;
use crate::reference::check_parts;

/// Outputs of a panel.
pub(super) const LANES: usize = 16;

/// A packed linear layer `[N, K]`.
#[derive(Debug)]
pub struct Linear {
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) parts: Vec<Part>,
}

/// Outputs that were packed from one tensor.
#[derive(Debug)]
pub(super) struct Part {
    /// Where this part's outputs begin in a row of the result.
    pub(super) first_output: usize,
    pub(super) outputs: usize,
    pub(super) weights: Weights,
}

#[derive(Debug)]
pub(super) enum Weights {
    F32(Aligned<f32>),
    F16(Aligned<u16>),
    Bf16(Aligned<u16>),
    Integer(IntegerWeights),
}

#[derive(Debug)]
pub(super) struct IntegerWeights {
    pub(super) groups: Groups,
    /// Two codes a byte.
    pub(super) nibbles: bool,
    /// Added to every code to make it unsigned.
    pub(super) offset: i32,
    pub(super) codes: Aligned<u8>,
    pub(super) scales: Scales,
    pub(super) minima: Option<Scales>,
}

#[derive(Debug)]
pub(super) enum Scales {
    F16(Aligned<u16>),
    F32(Aligned<f32>),
}

/// How K is cut in groups, and where the groups lie once padded to multiples of 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Groups {
    pub(super) inputs: usize,
    /// Weights that share a scale.
    pub(super) group: usize,
    /// Groups of a row; the last may be short.
    pub(super) count: usize,
}

impl Groups {
    pub(super) fn new(inputs: usize, group: usize) -> Self {
        Self { inputs, group, count: inputs.div_ceil(group) }
    }

    /// Padded elements of all groups but the last.
    pub(super) fn padded_group(&self) -> usize {
        self.group.next_multiple_of(8)
    }

    /// Padded elements of group `index`.
    pub(super) fn padded(&self, index: usize) -> usize {
        self.members(index).len().next_multiple_of(8)
    }

    /// The columns of group `index`.
    pub(super) fn members(&self, index: usize) -> std::ops::Range<usize> {
        index * self.group..((index + 1) * self.group).min(self.inputs)
    }

    /// K'.
    pub(super) fn padded_inputs(&self) -> usize {
        if self.count == 0 { 0 } else { (self.count - 1) * self.padded_group() + self.padded(self.count - 1) }
    }
}

impl Part {
    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Bytes of one panel, scales included.
    pub(super) fn panel_bytes(&self) -> usize {
        self.bytes() / self.panels().max(1)
    }

    fn bytes(&self) -> usize {
        match &self.weights {
            Weights::F32(w) => w.bytes(),
            Weights::F16(w) | Weights::Bf16(w) => w.bytes(),
            Weights::Integer(w) => w.codes.bytes() + w.scales.bytes() + w.minima.as_ref().map_or(0, Scales::bytes),
        }
    }
}

impl Scales {
    fn duplicate(&self) -> Result<Self, PackError> {
        Ok(match self {
            Self::F16(scales) => Self::F16(Aligned::from_slice(scales)?),
            Self::F32(scales) => Self::F32(Aligned::from_slice(scales)?),
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F16(scales) => scales.bytes(),
            Self::F32(scales) => scales.bytes(),
        }
    }
}

impl Linear {
    pub(super) fn new(pool: &Pool, views: &[TensorView<'_>]) -> Result<Self, PackError> {
        let inputs = check_parts(views)?;
        let mut parts = Vec::with_capacity(views.len());
        let mut outputs = 0;
        for view in views {
            parts.push(Part { first_output: outputs, outputs: view.rows, weights: pack(pool, view)? });
            outputs += view.rows;
        }
        Ok(Self { inputs, outputs, parts })
    }

    /// Outputs (N).
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Inputs (K).
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes that the packed weights take.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Part::bytes).sum()
    }

    /// A copy in memory of its own, for measurements that must not be served by a cache.
    pub(crate) fn duplicate(&self) -> Result<Self, PackError> {
        let parts = self.parts.iter().map(|part| {
            let weights = match &part.weights {
                Weights::F32(w) => Weights::F32(Aligned::from_slice(w)?),
                Weights::F16(w) => Weights::F16(Aligned::from_slice(w)?),
                Weights::Bf16(w) => Weights::Bf16(Aligned::from_slice(w)?),
                Weights::Integer(w) => Weights::Integer(IntegerWeights {
                    codes: Aligned::from_slice(&w.codes)?,
                    scales: w.scales.duplicate()?,
                    minima: w.minima.as_ref().map(Scales::duplicate).transpose()?,
                    ..*w
                }),
            };
            Ok(Part { weights, ..*part })
        });
        Ok(Self { parts: parts.collect::<Result<_, PackError>>()?, ..*self })
    }
}

fn pack(pool: &Pool, view: &TensorView<'_>) -> Result<Weights, PackError> {
    Ok(match view.dtype {
        Dtype::F32 => Weights::F32(pack_elements(pool, view, |at| {
            f32::from_le_bytes([view.bytes[at * 4], view.bytes[at * 4 + 1], view.bytes[at * 4 + 2], view.bytes[at * 4 + 3]])
        })?),
        Dtype::F16 => Weights::F16(pack_elements(pool, view, |at| u16::from_le_bytes([view.bytes[at * 2], view.bytes[at * 2 + 1]]))?),
        Dtype::Bf16 => Weights::Bf16(pack_elements(pool, view, |at| u16::from_le_bytes([view.bytes[at * 2], view.bytes[at * 2 + 1]]))?),
        _ => Weights::Integer(pack_codes(pool, view)?),
    })
}

/// Transposes each 16 rows to `[K][16]`.
fn pack_elements<T: Element>(pool: &Pool, view: &TensorView<'_>, element: impl Fn(usize) -> T + Sync) -> Result<Aligned<T>, PackError> {
    let (cols, panels) = (view.cols, view.rows.div_ceil(LANES));
    let mut out = Aligned::new(panels * cols * LANES)?;
    let shared = Shared::new(&mut out);
    pool.run(panels, &|panel| {
        // SAFETY: each unit takes its own panel.
        let out = unsafe { shared.part(panel * cols * LANES..(panel + 1) * cols * LANES) };
        for lane in 0..LANES.min(view.rows - panel * LANES) {
            let row = (panel * LANES + lane) * cols;
            for k in 0..cols {
                out[k * LANES + lane] = element(row + k);
            }
        }
    });
    Ok(out)
}

fn pack_codes(pool: &Pool, view: &TensorView<'_>) -> Result<IntegerWeights, PackError> {
    let group = view.dtype.group().expect("floats are packed as elements");
    let groups = Groups::new(view.cols, group);
    let (nibbles, offset) = match view.dtype {
        Dtype::Int4 { .. } | Dtype::Q4_0 => (true, 8),
        Dtype::Q4_1 | Dtype::Q4K => (true, 0),
        Dtype::Q5_0 => (false, 16),
        Dtype::Q5_1 | Dtype::Q5K => (false, 0),
        Dtype::Q6K => (false, 32),
        _ => (false, 128),
    };
    let panels = view.rows.div_ceil(LANES);
    let panel_codes = groups.padded_inputs() * LANES / if nibbles { 2 } else { 1 };
    let panel_scales = groups.count * LANES;
    let minimum_count = if view.dtype.has_minimum() { panels * panel_scales } else { 0 };

    let mut codes = Aligned::<u8>::new(panels * panel_codes)?;
    let mut scales = Aligned::<f32>::new(panels * panel_scales)?;
    let mut minima = Aligned::<f32>::new(minimum_count)?;
    let (all_codes, all_scales, all_minima) = (Shared::new(&mut codes), Shared::new(&mut scales), Shared::new(&mut minima));
    pool.run(panels, &|panel| {
        let range = |size: usize| panel * size..(panel + 1) * size;
        // SAFETY: each unit takes its own panel's codes.
        let codes = unsafe { all_codes.part(range(panel_codes)) };
        // SAFETY: likewise its scales.
        let scales = unsafe { all_scales.part(range(panel_scales)) };
        // SAFETY: likewise its minima; without minima the part is empty.
        let minima = unsafe { all_minima.part(range(if minimum_count > 0 { panel_scales } else { 0 })) };
        let mut row = CodeRow::default();
        for lane in 0..LANES.min(view.rows - panel * LANES) {
            row.read(view, panel * LANES + lane);
            for g in 0..groups.count {
                scales[g * LANES + lane] = row.scales[g];
                if let Some(minimum) = row.minima.get(g) {
                    minima[g * LANES + lane] = *minimum;
                }
                let start = g * groups.padded_group();
                for (i, &code) in row.codes[groups.members(g)].iter().enumerate() {
                    let (k, code) = (start + i, (i32::from(code) + offset) as u8);
                    if nibbles {
                        codes[k / 8 * 64 + lane * 4 + k % 4] |= code << (4 * (k / 4 % 2));
                    } else {
                        codes[k / 4 * 64 + lane * 4 + k % 4] = code;
                    }
                }
            }
        }
    });
    let half_scales = !matches!(view.dtype, Dtype::Q4K | Dtype::Q5K | Dtype::Q6K);
    let minima = if view.dtype.has_minimum() { Some(keep_scales(minima, half_scales)?) } else { None };
    Ok(IntegerWeights { groups, nibbles, offset, codes, scales: keep_scales(scales, half_scales)?, minima })
}

/// Back to f16, exactly, where the source had f16.
fn keep_scales(scales: Aligned<f32>, half: bool) -> Result<Scales, PackError> {
    if !half {
        return Ok(Scales::F32(scales));
    }
    let mut out = Aligned::<u16>::new(scales.len())?;
    out.iter_mut().zip(scales.iter()).for_each(|(out, scale)| *out = f16::from_f32(*scale).to_bits());
    Ok(Scales::F16(out))
}
