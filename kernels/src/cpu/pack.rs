//! Linear layers as the CPU reads them. Outputs lie along the 16 lanes: a *panel* is 16 outputs over all of K, and
//! padding outputs have zero weights.
//!
//! | weights | panel |
//! | --- | --- |
//! | f32, f16, bf16 | `[K][16]` elements as stored |
//! | fp8 | `[K][16]` codes as stored, and `[groups][16]` f32: scales times 256 (`format::fp8`) |
//! | bf16 that meets bf16 | `[K/2][16][2]` elements; an odd K is padded with a zero |
//! | codes of a byte | `[K'/4][16][4]` unsigned: code + offset |
//! | codes of a nibble | `[K'/8][16][4]` bytes: low nibbles are the first four k of eight, high nibbles the next four |
//! | codes of a bit | `[K'/8][2][16][4]` bits: code + offset is 0 or 2 |
//! | scales, minima | `[groups][16]` f16 |
//! | zero points | `[groups][16]` i8, negated: the minimum is theirs times the scale |
//! | two-level scales, minima | `[groups][16]` i8, and `[blocks][16]` f16: multiplied out they would take 1 bit a weight and more |
//!
//! K' is K with each group padded to a multiple of 8 (what the code is there does not matter, it meets activation 0). The dot
//! product runs on the unsigned codes; `offset * asum` is subtracted exactly.

use half::f16;

use super::memory::{Aligned, Element, Shared};
use super::pairs::{flush, smallest_exponent};
use super::pool::Pool;
use crate::SLICE;
use crate::format::{CodeRow, Dtype, TensorView, fp8};
use crate::ops::{Bf16Compute, Columns, PackError, PlacedPart};
use crate::reference::{check_parts, check_placed};

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
    /// Where the inputs that it reads begin in a row: 0 but of a part with a place.
    pub(super) first_input: usize,
    /// K.
    pub(super) inputs: usize,
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
    Fp8(Fp8Weights),
    Pairs(PairWeights),
    Integer(IntegerWeights),
}

/// Eight-bit floats with scales.
#[derive(Debug)]
pub(super) struct Fp8Weights {
    /// `[panels][K][16]`.
    pub(super) codes: Aligned<u8>,
    /// `[panels][groups][16]`, 256 times what was stored.
    pub(super) scales: Aligned<f32>,
    /// K of a group; the last may be short.
    pub(super) group: usize,
}

/// bf16 weights for docs/numerics.md, rule 9; subnormal ones are zeros.
#[derive(Debug)]
pub(super) struct PairWeights {
    pub(super) inputs: usize,
    /// `[panels][K/2][16]`: an even k in the lower half.
    pub(super) pairs: Aligned<u32>,
    /// `[panels][slices]`: see [`smallest_exponent`].
    pub(super) exponents: Aligned<u16>,
}

#[derive(Debug)]
pub(super) struct IntegerWeights {
    pub(super) groups: Groups,
    pub(super) width: CodeWidth,
    /// Added to every code to make it unsigned.
    pub(super) offset: i32,
    pub(super) codes: Aligned<u8>,
    pub(super) scales: Scales,
    pub(super) minima: Option<Scales>,
}

/// How many bits a packed code takes, and what that allows (see [`super::lanes::Lanes`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CodeWidth {
    /// 0 or 2, and the offset is 1.
    Bit,
    /// 0..=15.
    Nibble,
    /// A byte within 0..=127.
    Byte,
    /// A byte within 0..=255, and the offset is 128.
    WholeByte,
}

impl CodeWidth {
    pub(super) fn bits(self) -> usize {
        match self {
            Self::Bit => 1,
            Self::Nibble => 4,
            Self::Byte | Self::WholeByte => 8,
        }
    }
}

/// Scales or minima of all groups, lanes innermost.
#[derive(Debug)]
pub(super) enum Scales {
    F16(Aligned<u16>),
    /// Minima only: `scales[g] * zeros[g]`, which f32 holds.
    Zeros(Aligned<i8>),
    /// K-quants: the f32 product of `subs[g]` and `supers[g / block_groups]`.
    TwoLevel {
        subs: Aligned<i8>,
        supers: Aligned<u16>,
        block_groups: usize,
    },
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
    fn new(
        pool: &Pool,
        view: &TensorView<'_>,
        first_input: usize,
        first_output: usize,
        bf16_compute: Bf16Compute,
    ) -> Result<Self, PackError> {
        let weights = pack(pool, view, bf16_compute)?;
        Ok(Self { first_input, inputs: view.cols, first_output, outputs: view.rows, weights })
    }

    /// Where the inputs lie that it reads, in rows whose layers read from the beginning of `columns`.
    pub(super) fn inputs_in(&self, columns: Columns) -> Columns {
        Columns { offset: columns.offset + self.first_input, ..columns }
    }

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
            Weights::Fp8(w) => w.codes.bytes() + w.scales.bytes(),
            Weights::Pairs(w) => w.pairs.bytes() + w.exponents.bytes(),
            Weights::Integer(w) => w.codes.bytes() + w.scales.bytes() + w.minima.as_ref().map_or(0, Scales::bytes),
        }
    }
}

impl Scales {
    /// Zeros for `panels` panels; `block_groups` is 0 for one level.
    fn new(panels: usize, groups: usize, block_groups: usize) -> Result<Self, PackError> {
        let elements = panels * groups * LANES;
        Ok(match elements.checked_div(block_groups) {
            None => Self::F16(Aligned::new(elements)?),
            Some(supers) => Self::TwoLevel { subs: Aligned::new(elements)?, supers: Aligned::new(supers)?, block_groups },
        })
    }

    fn duplicate(&self) -> Result<Self, PackError> {
        Ok(match self {
            Self::F16(scales) => Self::F16(Aligned::from_slice(scales)?),
            Self::Zeros(zeros) => Self::Zeros(Aligned::from_slice(zeros)?),
            Self::TwoLevel { subs, supers, block_groups } => {
                Self::TwoLevel { subs: Aligned::from_slice(subs)?, supers: Aligned::from_slice(supers)?, block_groups: *block_groups }
            }
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F16(scales) => scales.bytes(),
            Self::Zeros(zeros) => zeros.bytes(),
            Self::TwoLevel { subs, supers, .. } => subs.bytes() + supers.bytes(),
        }
    }

    fn share(&mut self) -> SharedScales<'_> {
        match self {
            Self::F16(scales) => SharedScales::F16(Shared::new(scales)),
            Self::Zeros(zeros) => SharedScales::Zeros(Shared::new(zeros)),
            Self::TwoLevel { subs, supers, .. } => SharedScales::TwoLevel { subs: Shared::new(subs), supers: Shared::new(supers) },
        }
    }
}

/// [`Scales`] while threads fill them.
#[derive(Clone, Copy)]
enum SharedScales<'a> {
    F16(Shared<'a, u16>),
    Zeros(Shared<'a, i8>),
    TwoLevel { subs: Shared<'a, i8>, supers: Shared<'a, u16> },
}

impl SharedScales<'_> {
    /// Sets one lane of a panel: `scales` and `subs` a group, `supers` a block of groups; those that the kind lacks are not read.
    ///
    /// # Safety
    /// No other thread works on this panel.
    unsafe fn set(&self, panel: usize, lane: usize, scales: &[f32], subs: &[i8], supers: &[f16]) {
        /// # Safety
        /// No other thread works on this panel.
        unsafe fn spread<T: Copy>(out: Shared<'_, T>, panel: usize, lane: usize, values: impl ExactSizeIterator<Item = T>) {
            let size = values.len() * LANES;
            // SAFETY: the caller's promise; panels do not overlap.
            let out = unsafe { out.part(panel * size..(panel + 1) * size) };
            out.iter_mut().skip(lane).step_by(LANES).zip(values).for_each(|(out, value)| *out = value);
        }
        // SAFETY: the caller's promise, for each.
        unsafe {
            match *self {
                // Exact: the source has f16.
                Self::F16(out) => spread(out, panel, lane, scales.iter().map(|scale| f16::from_f32(*scale).to_bits())),
                Self::Zeros(out) => spread(out, panel, lane, subs.iter().copied()),
                Self::TwoLevel { subs: out_subs, supers: out_supers } => {
                    spread(out_subs, panel, lane, subs.iter().copied());
                    spread(out_supers, panel, lane, supers.iter().map(|scale| scale.to_bits()));
                }
            }
        }
    }
}

impl Linear {
    pub(super) fn new(pool: &Pool, views: &[TensorView<'_>], bf16_compute: Bf16Compute) -> Result<Self, PackError> {
        let inputs = check_parts(views)?;
        let mut parts = Vec::with_capacity(views.len());
        let mut outputs = 0;
        for view in views {
            parts.push(Part::new(pool, view, 0, outputs, bf16_compute)?);
            outputs += view.rows;
        }
        Ok(Self { inputs, outputs, parts })
    }

    pub(super) fn placed(pool: &Pool, parts: &[PlacedPart<'_>], bf16_compute: Bf16Compute) -> Result<Self, PackError> {
        let (inputs, outputs) = check_placed(parts)?;
        let pack = |part: &PlacedPart<'_>| Part::new(pool, &part.weights, part.first_input, part.first_output, bf16_compute);
        Ok(Self { inputs, outputs, parts: parts.iter().map(pack).collect::<Result<_, _>>()? })
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
                Weights::Fp8(w) => {
                    Weights::Fp8(Fp8Weights { codes: Aligned::from_slice(&w.codes)?, scales: Aligned::from_slice(&w.scales)?, ..*w })
                }
                Weights::Pairs(w) => Weights::Pairs(PairWeights {
                    pairs: Aligned::from_slice(&w.pairs)?,
                    exponents: Aligned::from_slice(&w.exponents)?,
                    ..*w
                }),
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

fn pack(pool: &Pool, view: &TensorView<'_>, bf16_compute: Bf16Compute) -> Result<Weights, PackError> {
    Ok(match view.dtype {
        Dtype::F32 => Weights::F32(pack_elements(pool, view, |at| {
            f32::from_le_bytes([view.bytes[at * 4], view.bytes[at * 4 + 1], view.bytes[at * 4 + 2], view.bytes[at * 4 + 3]])
        })?),
        Dtype::F16 => Weights::F16(pack_elements(pool, view, |at| u16::from_le_bytes([view.bytes[at * 2], view.bytes[at * 2 + 1]]))?),
        Dtype::Bf16 if bf16_compute == Bf16Compute::Bf16 => Weights::Pairs(pack_pairs(pool, view)?),
        Dtype::Bf16 => Weights::Bf16(pack_elements(pool, view, |at| u16::from_le_bytes([view.bytes[at * 2], view.bytes[at * 2 + 1]]))?),
        Dtype::Fp8 { group } => Weights::Fp8(pack_fp8(pool, view, usize::from(group))?),
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

/// Transposes each 16 rows to `[K][16]`, and their scales to `[groups][16]`.
fn pack_fp8(pool: &Pool, view: &TensorView<'_>, group: usize) -> Result<Fp8Weights, PackError> {
    let codes = pack_elements(pool, view, |at| view.bytes[at])?;
    let groups = view.cols.div_ceil(group);
    let mut scales = Aligned::<f32>::new(view.rows.div_ceil(LANES) * groups * LANES)?;
    for row in 0..view.rows {
        let panel = &mut scales[row / LANES * groups * LANES..][..groups * LANES];
        panel[row % LANES..].iter_mut().step_by(LANES).zip(fp8::scales(view, row, group)).for_each(|(out, scale)| *out = scale * 256.0);
    }
    Ok(Fp8Weights { codes, scales, group })
}

/// Transposes each 16 rows to `[K/2][16][2]`.
fn pack_pairs(pool: &Pool, view: &TensorView<'_>) -> Result<PairWeights, PackError> {
    let (inputs, panels, slices) = (view.cols, view.rows.div_ceil(LANES), view.cols.div_ceil(SLICE));
    let panel_pairs = inputs.div_ceil(2) * LANES;
    let mut pairs = Aligned::<u32>::new(panels * panel_pairs)?;
    let mut exponents = Aligned::<u16>::new(panels * slices)?;
    let (all_pairs, all_exponents) = (Shared::new(&mut pairs), Shared::new(&mut exponents));
    pool.run(panels, &|panel| {
        // SAFETY: each unit takes its own panel's pairs.
        let pairs = unsafe { all_pairs.part(panel * panel_pairs..(panel + 1) * panel_pairs) };
        // SAFETY: likewise its exponents.
        let exponents = unsafe { all_exponents.part(panel * slices..(panel + 1) * slices) };
        exponents.fill(u16::MAX);
        let mut row = vec![0; inputs.next_multiple_of(2)];
        for lane in 0..LANES.min(view.rows - panel * LANES) {
            let (words, _) = view.bytes[(panel * LANES + lane) * inputs * 2..][..inputs * 2].as_chunks();
            row.iter_mut().zip(words).for_each(|(out, word)| *out = flush(u16::from_le_bytes(*word)));
            for (exponent, slice) in exponents.iter_mut().zip(row.chunks(SLICE)) {
                *exponent = smallest_exponent(slice).min(*exponent);
            }
            let (row, _) = row.as_chunks::<2>();
            for (out, [even, odd]) in pairs[lane..].iter_mut().step_by(LANES).zip(row) {
                *out = u32::from(*even) | u32::from(*odd) << 16;
            }
        }
    });
    Ok(PairWeights { inputs, pairs, exponents })
}

fn pack_codes(pool: &Pool, view: &TensorView<'_>) -> Result<IntegerWeights, PackError> {
    let group = view.dtype.group().expect("floats are packed as elements");
    let groups = Groups::new(view.cols, group);
    let (width, offset) = match view.dtype {
        Dtype::Int1 { .. } => (CodeWidth::Bit, 1),
        Dtype::Int4 { .. } | Dtype::Q4_0 => (CodeWidth::Nibble, 8),
        Dtype::Int4Minimum { .. } | Dtype::Int4Zero { .. } | Dtype::Q4_1 | Dtype::Q4K => (CodeWidth::Nibble, 0),
        Dtype::Q5_0 => (CodeWidth::Byte, 16),
        Dtype::Q5_1 | Dtype::Q5K => (CodeWidth::Byte, 0),
        Dtype::Q6K => (CodeWidth::Byte, 32),
        _ => (CodeWidth::WholeByte, 128),
    };
    let block_groups = match view.dtype {
        Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => view.dtype.block_columns() / group,
        _ => 0,
    };
    let panels = view.rows.div_ceil(LANES);
    let panel_codes = groups.padded_inputs() * LANES / (8 / width.bits());

    let mut codes = Aligned::<u8>::new(panels * panel_codes)?;
    let mut scales = Scales::new(panels, groups.count, block_groups)?;
    let mut minima = match view.dtype {
        Dtype::Int4Zero { .. } => Some(Scales::Zeros(Aligned::new(panels * groups.count * LANES)?)),
        dtype if dtype.has_minimum() => Some(Scales::new(panels, groups.count, block_groups)?),
        _ => None,
    };
    let (all_codes, all_scales, all_minima) = (Shared::new(&mut codes), scales.share(), minima.as_mut().map(Scales::share));
    pool.run(panels, &|panel| {
        // SAFETY: each unit takes its own panel's codes.
        let codes = unsafe { all_codes.part(panel * panel_codes..(panel + 1) * panel_codes) };
        let (mut row, mut lanes) = (CodeRow::default(), [const { Vec::new() }; LANES]);
        for lane in 0..LANES.min(view.rows - panel * LANES) {
            row.read(view, panel * LANES + lane);
            let two_level = &row.two_level;
            // SAFETY: each unit takes its own panel's scales.
            unsafe { all_scales.set(panel, lane, &row.scales, &two_level.sub_scales, &two_level.super_scales) };
            if let Some(all_minima) = all_minima {
                // SAFETY: likewise its minima.
                unsafe { all_minima.set(panel, lane, &row.minima, &two_level.sub_minima, &two_level.super_minima) };
            }
            pad_codes(&mut lanes[lane], &row.codes, groups, offset);
        }
        interleave(codes, &lanes, width);
    });
    Ok(IntegerWeights { groups, width, offset, codes, scales, minima })
}

/// The unsigned codes of a row, four a word, each group padded to a multiple of 8.
fn pad_codes(out: &mut Vec<[u8; 4]>, codes: &[i8], groups: Groups, offset: i32) {
    out.clear();
    out.resize(groups.padded_inputs() / 4, [0; 4]);
    let out = out.as_flattened_mut();
    let unsigned = |out: &mut [u8], codes: &[i8]| {
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = code.cast_unsigned().wrapping_add(offset as u8));
    };
    if groups.padded_group() == groups.group {
        return unsigned(out, codes);
    }
    for g in 0..groups.count {
        unsigned(&mut out[g * groups.padded_group()..], &codes[groups.members(g)]);
    }
}

/// Lays the rows of a panel side by side, word by word; a lane without a row stays zero.
fn interleave(out: &mut [u8], lanes: &[Vec<[u8; 4]>; LANES], width: CodeWidth) {
    for (lane, words) in lanes.iter().enumerate() {
        match width {
            CodeWidth::Byte | CodeWidth::WholeByte => {
                let (out, _) = out.as_chunks_mut::<4>();
                out[lane..].iter_mut().step_by(LANES).zip(words).for_each(|(out, word)| *out = *word);
            }
            CodeWidth::Nibble => {
                let (out, _) = out.as_chunks_mut::<4>();
                let (pairs, _) = words.as_chunks::<2>();
                for (out, [low, high]) in out[lane..].iter_mut().step_by(LANES).zip(pairs) {
                    *out = (u32::from_le_bytes(*low) | u32::from_le_bytes(*high) << 4).to_le_bytes();
                }
            }
            CodeWidth::Bit => {
                for (out, word) in out[lane / 2..].iter_mut().step_by(LANES / 2).zip(words) {
                    let bits = (0..4).fold(0, |bits, i| bits | (word[i] / 2) << i);
                    *out |= bits << (lane % 2 * 4);
                }
            }
        }
    }
}
