//! Matrices of 4-bit and 8-bit integers: `w = (code - zero) * scale`, with codes and zero points unsigned. GPTQ and AWQ have them with inputs
//! first, compressed-tensors with outputs first.
//!
//! | layout | word of code (n, k), 8 or 4 codes a word of 32 bits |
//! | --- | --- |
//! | GPTQ | `[k / 8][n]`, k ascending from the lowest bits |
//! | AWQ | `[k][n / 8]`, nibbles of outputs 0, 2, 4, 6, 1, 3, 5, 7 |
//! | packed | `[n][k / 8]`, k ascending; a row is padded to whole words |
//! | bytes | `[n][k]`, a signed byte each |

use std::ops::Range;

use ashlar_kernels::format::Dtype;
use half::f16;

use super::scales::{Scales, to_usize};
use super::scheme::Scheme;
use super::zeros::{AWQ_SLOTS, ZeroReader, Zeros, unpacked, word};
use super::{Codes, Matrix, Part, QuantisedError, Widened, is, stored_group};
use crate::formats::TensorFiles;

/// Where codes, scales and zero points lie.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Integers {
    layout: Layout,
    bits: u32,
    /// N.
    outputs: usize,
    codes: String,
    scales: Scales,
    zeros: Zeros,
    groups: Groups,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    Gptq,
    Awq,
    Packed,
    Bytes,
}

/// Which group an input is in.
#[derive(Debug, Clone, PartialEq)]
enum Groups {
    /// So many inputs each, one after another.
    Size(usize),
    /// As this tensor says, which of so many.
    Index { name: String, count: usize },
}

/// The matrix whose codes are `base.qweight`, packed as GPTQ packs.
pub(super) fn gptq(files: &TensorFiles, scheme: &Scheme, base: &str, less_one: bool) -> Result<Matrix, QuantisedError> {
    let (bits, per_word) = (scheme.bits[0], u64::from(32 / scheme.bits[0]));
    let codes = Part::need(files, base, "qweight", "qweight")?.of_type("I32")?;
    let [words, outputs] = codes.matrix("[inputs / codes of a word, outputs]")?;
    let inputs = words * per_word;
    let (size, groups) = sizes(scheme.group_sizes[0], inputs);
    let scale = Part::need(files, base, "scales", "qweight")?;
    let scales = Scales::by_group(&scale, [groups, outputs], &format!("groups of {size} inputs, outputs"))?;
    let zeros = Part::need(files, base, "qzeros", "qweight")?.of_type("I32")?;
    zeros.has_shape(&[groups, outputs.div_ceil(per_word)], "groups, words of zero points")?;
    let index = Part::seek(files, base, "g_idx").map(|index| index.of_type("I32")).transpose()?;
    let integers = Integers {
        layout: Layout::Gptq,
        bits,
        outputs: to_usize(outputs),
        codes: codes.name.clone(),
        scales,
        zeros: Zeros::ByGroup { name: zeros.name.clone(), awq: false, less_one },
        groups: Groups::Size(to_usize(size)),
    };
    integers.matrix(files, [outputs, inputs], [size, groups], &scale, Some(zeros), index)
}

/// The matrix whose codes are `base.qweight`, packed as AWQ's GEMM kernels want it.
pub(super) fn awq(files: &TensorFiles, scheme: &Scheme, base: &str) -> Result<Matrix, QuantisedError> {
    let codes = Part::need(files, base, "qweight", "qweight")?.of_type("I32")?;
    let [inputs, words] = codes.matrix("[inputs, outputs / 8]")?;
    let outputs = words * 8;
    let (size, groups) = sizes(scheme.group_sizes[0], inputs);
    let scale = Part::need(files, base, "scales", "qweight")?;
    let scales = Scales::by_group(&scale, [groups, outputs], &format!("groups of {size} inputs, outputs"))?;
    let zeros = Part::need(files, base, "qzeros", "qweight")?.of_type("I32")?;
    zeros.has_shape(&[groups, words], "groups, words of zero points")?;
    let integers = Integers {
        layout: Layout::Awq,
        bits: 4,
        outputs: to_usize(outputs),
        codes: codes.name.clone(),
        scales,
        zeros: Zeros::ByGroup { name: zeros.name.clone(), awq: true, less_one: false },
        groups: Groups::Size(to_usize(size)),
    };
    integers.matrix(files, [outputs, inputs], [size, groups], &scale, Some(zeros), None)
}

/// The matrix whose codes are `base.weight_packed`, packed as compressed-tensors packs.
pub(super) fn packed(files: &TensorFiles, scheme: &Scheme, base: &str) -> Result<Matrix, QuantisedError> {
    let codes = Part::need(files, base, "weight_packed", "weight_packed")?.of_type("I32")?;
    let of = Part::need(files, base, "weight_shape", "weight_packed")?.of_type("I64")?;
    of.has_shape(&[2], "outputs and inputs")?;
    let mut dims = of.bytes.as_ref().chunks_exact(8).map(|dim| u64::from_le_bytes(dim.try_into().expect("eight bytes")));
    let shape = [dims.next().expect("two"), dims.next().expect("two")];
    let [outputs, inputs] = shape;
    // An upper bound keeps the products below from overflowing.
    if let Some(index) = shape.iter().position(|dim| !(1..=u64::from(u32::MAX)).contains(dim)) {
        let (value, expected) = (shape[index].to_string(), "a dimension of a matrix".to_owned());
        return Err(QuantisedError::Value { name: of.name, value, index, expected });
    }
    let words = |bits: u32| inputs.div_ceil(u64::from(32 / bits));
    let Some(bits) = scheme.bits.iter().copied().find(|bits| codes.entry.shape == [outputs, words(*bits)]) else {
        let expected: Vec<String> = scheme.bits.iter().map(|bits| format!("[{outputs}, {}] for {bits} bits", words(*bits))).collect();
        return Err(codes.misshapen(format!("{} (weight_shape is {shape:?})", expected.join(" or "))));
    };
    by_rows(files, scheme, base, Layout::Packed, bits, codes, shape, vec![of.name])
}

/// The matrix whose codes are the signed bytes `base.weight`.
pub(super) fn bytes(files: &TensorFiles, scheme: &Scheme, base: &str) -> Result<Matrix, QuantisedError> {
    let codes = Part::need(files, base, "weight", "weight")?.of_type("I8")?;
    let shape = codes.matrix("[outputs, inputs]")?;
    by_rows(files, scheme, base, Layout::Bytes, 8, codes, shape, Vec::new())
}

/// What the two layouts of compressed-tensors have in common.
#[expect(clippy::too_many_arguments, reason = "they are what the two callers found")]
fn by_rows(
    files: &TensorFiles,
    scheme: &Scheme,
    base: &str,
    layout: Layout,
    bits: u32,
    codes: Part,
    [outputs, inputs]: [u64; 2],
    more: Vec<String>,
) -> Result<Matrix, QuantisedError> {
    let of = if layout == Layout::Packed { "weight_packed" } else { "weight" };
    let scale = Part::need(files, base, "weight_scale", of)?;
    // Groups of different layers may differ: the size is the one that this layer's scales fit.
    let along = scale.entry.shape.get(1).copied().unwrap_or(1);
    let mut fitting = scheme.group_sizes.iter().map(|size| sizes(*size, inputs)).filter(|(_, groups)| *groups == along);
    let (size, groups) = fitting.next().unwrap_or(sizes(scheme.group_sizes[0], inputs));
    if let Some((other, _)) = fitting.find(|(other, _)| *other != size) {
        return Err(scale.misshapen(format!("groups of one size: those of {size} and of {other} inputs fit alike")));
    }
    let scales = Scales::by_row(&scale, [outputs, groups], &format!("outputs, groups of {size} inputs"))?;
    let zeros = Part::seek(files, base, "weight_zero_point");
    let per_word = u64::from(32 / bits);
    let (name, count) = (zeros.as_ref().map(|zeros| zeros.name.clone()), to_usize(groups));
    let zero_points = match (&zeros, name) {
        (Some(part), Some(name)) if is(&part.entry, "I32") => {
            part.has_shape(&[outputs.div_ceil(per_word), groups], "words of zero points, groups")?;
            Zeros::ByRow { name, groups: count }
        }
        (Some(part), Some(name)) => {
            let all = matches!(*part.entry.shape, [] | [1] | [1, 1]);
            if !is(&part.entry, "I8") {
                return Err(QuantisedError::Type { name, element: part.entry.element.to_string(), expected: "I32 or I8" });
            }
            if !all && (part.entry.shape != [outputs] || groups != 1) {
                part.has_shape(&[outputs, groups], "outputs, groups")?;
            }
            Zeros::Bytes { name, groups: count, all }
        }
        _ if scheme.zeros => return Err(Part::need(files, base, "weight_zero_point", of).err().expect("it was sought above")),
        _ => Zeros::Middle,
    };
    let index = Part::seek(files, base, "weight_g_idx").map(|index| index.of_type("I32")).transpose()?;
    let groups_of = Groups::Size(to_usize(size));
    let integers = Integers { layout, bits, outputs: to_usize(outputs), codes: codes.name, scales, zeros: zero_points, groups: groups_of };
    let mut matrix = integers.matrix(files, [outputs, inputs], [size, groups], &scale, zeros, index)?;
    matrix.parts.extend(more);
    Ok(matrix)
}

/// Inputs of a group, and groups; without a size there is one group.
fn sizes(size: Option<u64>, inputs: u64) -> (u64, u64) {
    let size = size.unwrap_or(inputs).clamp(1, inputs);
    (size, inputs.div_ceil(size))
}

impl Integers {
    /// Checks what the parts hold, and finds the smallest dtype that says the same numbers.
    fn matrix(
        mut self,
        files: &TensorFiles,
        shape: [u64; 2],
        [size, groups]: [u64; 2],
        scale: &Part,
        zeros: Option<Part>,
        index: Option<Part>,
    ) -> Result<Matrix, QuantisedError> {
        let mut widened = None;
        if !self.scales.check(scale, 256.0)? {
            widened = Some(Widened::Scales);
        }
        let [least, most] = self.zero_reader(files).within(to_usize(groups));
        if let Some(zeros) = zeros.as_ref().filter(|_| self.bits == 4 && (least < 0 || most > 16)) {
            let value = format!("zero points of {least} to {most}");
            return Err(QuantisedError::Zeros { name: zeros.name.clone(), value });
        }
        // No other stored value of theirs becomes 0.
        let wrapped = least == 0 && matches!(self.zeros, Zeros::ByGroup { less_one: true, .. });
        let middle = [least, most] == [1 << (self.bits - 1); 2];
        if self.bits == 8 && !middle {
            widened = Some(Widened::Zeros);
        }
        let mut parts = vec![self.codes.clone(), scale.name.clone()];
        parts.extend(zeros.map(|zeros| zeros.name));
        if let Some(index) = index {
            index.has_shape(&[shape[1]], "a group for each input")?;
            parts.push(index.name.clone());
            if out_of_order(&index, size, groups)? {
                (self.groups, widened) = (Groups::Index { name: index.name, count: to_usize(groups) }, Some(Widened::Order));
            }
        }
        let group = stored_group(size, shape[1]);
        let dtype = match (widened, self.bits) {
            (Some(_), _) => Dtype::F32,
            (None, 4) if middle => Dtype::Int4 { group },
            (None, 4) => Dtype::Int4Zero { group },
            (None, _) => Dtype::Int8 { group },
        };
        Ok(Matrix { parts, dtype, shape, widened, wrapped, codes: Codes::Integers(self) })
    }

    fn zero_reader(&self, files: &TensorFiles) -> ZeroReader<'_> {
        ZeroReader::new(&self.zeros, files, self.bits, self.outputs)
    }

    /// The payload of some rows as `dtype`, the one that `matrix` chose.
    pub(super) fn rows(&self, files: &TensorFiles, dtype: Dtype, inputs: usize, rows: Range<usize>) -> Vec<u8> {
        let bytes = files.bytes(&self.codes).expect("found in these files");
        let (outputs, bits, per_word) = (self.outputs, self.bits, (32 / self.bits) as usize);
        let (row_words, awq_words) = (inputs.div_ceil(per_word), outputs / 8);
        match self.layout {
            Layout::Gptq => {
                let code = |n: usize, k: usize| unpacked(word(&bytes, k / per_word * outputs + n), (k % per_word) as u32, bits);
                self.write(files, dtype, inputs, rows, code)
            }
            Layout::Awq => {
                let code = |n: usize, k: usize| unpacked(word(&bytes, k * awq_words + n / 8), AWQ_SLOTS[n % 8], 4);
                self.write(files, dtype, inputs, rows, code)
            }
            Layout::Packed => {
                let code = |n: usize, k: usize| unpacked(word(&bytes, n * row_words + k / per_word), (k % per_word) as u32, bits);
                self.write(files, dtype, inputs, rows, code)
            }
            // Flipping the sign adds 128, modulo 256.
            Layout::Bytes => self.write(files, dtype, inputs, rows, |n, k| u32::from(bytes.as_ref()[n * inputs + k] ^ 0x80)),
        }
    }

    fn write(&self, files: &TensorFiles, dtype: Dtype, inputs: usize, rows: Range<usize>, code: impl Fn(usize, usize) -> u32) -> Vec<u8> {
        let (scales, zeros) = (self.scales.reader(files), self.zero_reader(files));
        let mut out = Vec::with_capacity(dtype.bytes(rows.len(), inputs).expect("checked by the plan"));
        let stored = dtype.group().unwrap_or(1);
        let Groups::Size(size) = self.groups else { return self.write_indexed(files, inputs, rows, code) };
        for n in rows.clone() {
            match dtype {
                Dtype::Int4 { .. } | Dtype::Int4Zero { .. } => {
                    out.extend((0..inputs).step_by(2).map(|k| {
                        let high = if k + 1 < inputs { code(n, k + 1) } else { 0 };
                        (code(n, k) | high << 4) as u8
                    }));
                }
                Dtype::Int8 { .. } => out.extend((0..inputs).map(|k| code(n, k) as u8 ^ 0x80)),
                _ => {
                    for first in (0..inputs).step_by(size) {
                        let (scale, zero) = (scales.get(n, first / size), zeros.get(n, first / size));
                        let members = first..(first + size).min(inputs);
                        out.extend(members.flat_map(|k| ((code(n, k) as i32 - zero) as f32 * scale).to_le_bytes()));
                    }
                }
            }
        }
        if dtype == Dtype::F32 {
            return out;
        }
        let groups = || rows.clone().flat_map(move |n| (0..inputs).step_by(stored).map(move |first| (n, first / size)));
        // Exact: `matrix` has seen that f16 holds them.
        out.extend(groups().flat_map(|(n, g)| f16::from_f32(scales.get(n, g)).to_le_bytes()));
        if let Dtype::Int4Zero { .. } = dtype {
            out.extend(groups().map(|(n, g)| zeros.get(n, g) as u8));
        }
        out
    }

    /// As f32, each input by the group that the index says.
    fn write_indexed(&self, files: &TensorFiles, inputs: usize, rows: Range<usize>, code: impl Fn(usize, usize) -> u32) -> Vec<u8> {
        let Groups::Index { name, count } = &self.groups else { unreachable!("the caller has looked") };
        let (scales, zeros, index) = (self.scales.reader(files), self.zero_reader(files), files.bytes(name).expect("found in these files"));
        // A file that was changed since it was checked gives other weights, which their digest tells, and no panic.
        let of: Vec<usize> = (0..inputs).map(|k| (word(&index, k) as usize).min(count - 1)).collect();
        let mut out = Vec::with_capacity(rows.len() * inputs * 4);
        for n in rows {
            out.extend((0..inputs).flat_map(|k| ((code(n, k) as i32 - zeros.get(n, of[k])) as f32 * scales.get(n, of[k])).to_le_bytes()));
        }
        out
    }
}

/// Whether groups are not simply one after another. An index of nothing but -1 was never set.
fn out_of_order(index: &Part, size: u64, groups: u64) -> Result<bool, QuantisedError> {
    if index.words().all(|group| group == u32::MAX) {
        return Ok(false);
    }
    if let Some(at) = index.words().position(|group| u64::from(group) >= groups) {
        let value = index.words().nth(at).unwrap_or_default().cast_signed().to_string();
        return Err(QuantisedError::Value {
            name: index.name.clone(),
            value,
            index: at,
            expected: format!("a group, 0 to {}", groups - 1),
        });
    }
    Ok((0u64..).zip(index.words()).any(|(k, group)| u64::from(group) != k / size))
}
