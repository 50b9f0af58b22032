//! Ready-quantised matrices of Hugging Face checkpoints (GPTQ, AWQ, compressed-tensors, FP8): several tensors that are one weight. Here they
//! are found and checked, and read as the dtype of the zoo that says the same numbers. `scheme` reads `quantization_config`; `integers` and
//! `floats` know the layouts; `scales` what they have in common. Knows nothing of families: what a matrix is for is the plan's business.

mod floats;
mod integers;
mod scales;
mod scheme;
mod zeros;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use ashlar_kernels::format::Dtype;
use bytes::Bytes;

pub use scheme::Scheme;

use crate::formats::{ElementType, FileSlice, TensorEntry, TensorFiles};
use floats::Floats;
use integers::Integers;
use scheme::Method;

/// What is wrong with the tensors of a quantised matrix.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum QuantisedError {
    /// A part that must be there.
    #[error("tensor `{name}` is missing (it belongs to `{of}`)")]
    Missing {
        /// The part.
        name: String,
        /// The tensor with the codes.
        of: String,
    },
    /// A part of another type.
    #[error("tensor `{name}` has type {element}, expected {expected}")]
    Type {
        /// The part.
        name: String,
        /// Its type.
        element: String,
        /// What can be read.
        expected: &'static str,
    },
    /// A part whose shape does not fit the others or the configuration.
    #[error("tensor `{name}` has shape {actual:?}, expected {expected}")]
    Shape {
        /// The part.
        name: String,
        /// Its shape.
        actual: Vec<u64>,
        /// What would fit, and why.
        expected: String,
    },
    /// A value that no matrix can have.
    #[error("tensor `{name}` holds {value} (element {index}), expected {expected}")]
    Value {
        /// The part.
        name: String,
        /// What it holds.
        value: String,
        /// Where.
        index: usize,
        /// What may be there.
        expected: String,
    },
    /// Zero points that codes of four bits cannot have.
    #[error("tensor `{name}` holds {value}, expected 0 to 16")]
    Zeros {
        /// The part.
        name: String,
        /// What it holds.
        value: String,
    },
    /// A weight that is there quantised and not.
    #[error("tensor `{name}` is there beside `{codes}`: only one of them can be the weight")]
    Twice {
        /// The plain weight.
        name: String,
        /// The quantised one.
        codes: String,
    },
}

/// Why a matrix is stored as f32, four bytes a weight: no smaller dtype of the zoo says the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Widened {
    Order,
    Scales,
    Zeros,
}

/// One weight that several tensors hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// The tensors that it is made of.
    pub(crate) parts: Vec<String>,
    /// What it is read as.
    pub(crate) dtype: Dtype,
    /// `[outputs, inputs]`.
    pub(crate) shape: [u64; 2],
    widened: Option<Widened>,
    /// Whether a zero point is 0 that tools read in two ways.
    wrapped: bool,
    codes: Codes,
}

#[derive(Debug, Clone, PartialEq)]
enum Codes {
    Integers(Integers),
    Floats(Floats),
}

impl Matrix {
    /// What it is read as.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// `[outputs, inputs]`.
    pub fn shape(&self) -> [u64; 2] {
        self.shape
    }

    /// The payload of some rows, in this matrix's dtype, out of the files in which it was found.
    pub fn rows(&self, files: &TensorFiles, rows: Range<usize>) -> Bytes {
        let inputs = usize::try_from(self.shape[1]).expect("checked when it was found");
        Bytes::from(match &self.codes {
            Codes::Integers(integers) => integers.rows(files, self.dtype, inputs, rows),
            Codes::Floats(floats) => floats.rows(files, inputs, rows),
        })
    }
}

/// The quantised matrices of a checkpoint; none for most.
#[derive(Debug, Default)]
pub struct Quantised {
    /// By the name that the plain weight would have.
    matrices: BTreeMap<String, Arc<Matrix>>,
    /// Tensors that are no weights and change nothing here.
    ignored: BTreeSet<String>,
    /// What whoever adds the model should know.
    pub(crate) notes: Vec<String>,
}

impl Quantised {
    /// Finds and checks all quantised matrices.
    ///
    /// # Errors
    /// The first tensor that does not fit.
    pub fn find(files: &TensorFiles, scheme: &Scheme) -> Result<Self, QuantisedError> {
        let mut found = Self::default();
        for name in files.names() {
            let entry = files.get(name).expect("just listed");
            let (base, codes) = match (scheme.method, name.rsplit_once('.')) {
                (Method::Gptq { less_one }, Some((base, "qweight"))) => (base, integers::gptq(files, scheme, base, less_one)?),
                (Method::Awq, Some((base, "qweight"))) => (base, integers::awq(files, scheme, base)?),
                (Method::Compressed, Some((base, "weight_packed"))) => (base, integers::packed(files, scheme, base)?),
                (Method::Compressed, Some((base, "weight"))) if is(entry, "I8") => (base, integers::bytes(files, scheme, base)?),
                (Method::Compressed | Method::Fp8, Some((base, "weight"))) if is(entry, "F8_E4M3") => {
                    (base, floats::find(files, scheme, base)?)
                }
                _ => continue,
            };
            let weight = format!("{base}.weight");
            if weight != name && files.get(&weight).is_some() {
                return Err(QuantisedError::Twice { name: weight, codes: name.to_owned() });
            }
            found.ignore_beside(files, base);
            found.matrices.insert(weight, Arc::new(codes));
        }
        found.notes = notes(scheme, &found);
        Ok(found)
    }

    /// All matrices, by the name that the plain weight would have.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Arc<Matrix>)> {
        self.matrices.iter().map(|(name, matrix)| (name.as_str(), matrix))
    }

    /// The quantised matrix of the weight `name`.
    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Matrix>> {
        self.matrices.get(name)
    }

    /// Whether a tensor is known to change nothing.
    pub(crate) fn ignores(&self, name: &str) -> bool {
        self.ignored.contains(name)
    }

    /// Scales of activations and caches, which are not quantised by the checkpoint's rules here; and biases that add nothing, which some tools
    /// write for layers that have none.
    fn ignore_beside(&mut self, files: &TensorFiles, base: &str) {
        const BESIDE: [&str; 6] =
            ["input_scale", "activation_scale", "input_zero_point", "output_scale", "output_zero_point", "input_g_idx"];
        self.ignored.extend(BESIDE.iter().map(|part| format!("{base}.{part}")));
        if let Some((attention, _)) = base.rsplit_once('.') {
            let caches =
                ["q", "k", "v"].into_iter().flat_map(|part| ["scale", "zero_point"].map(|what| format!("{attention}.{part}_{what}")));
            self.ignored.extend(caches);
        }
        let bias = format!("{base}.bias");
        if files.bytes(&bias).is_some_and(|bytes| bytes.as_ref().iter().all(|byte| *byte == 0)) {
            self.ignored.insert(bias);
        }
    }
}

fn notes(scheme: &Scheme, found: &Quantised) -> Vec<String> {
    let mut counts = BTreeMap::<Widened, usize>::new();
    found.matrices.values().filter_map(|matrix| matrix.widened).for_each(|why| *counts.entry(why).or_default() += 1);
    let mut notes: Vec<String> = counts
        .into_iter()
        .map(|(why, count)| {
            let why = match why {
                Widened::Order => "their groups lie in the order of activations (g_idx)",
                Widened::Scales => "their scales are no f16",
                Widened::Zeros => "their 8-bit codes have zero points",
            };
            format!("quantised matrices that are read as f32 (4 bytes a weight; --dtype bf16 makes it 2, and rounds), since {why}: {count}")
        })
        .collect();
    let wrapped = found.matrices.values().filter(|matrix| matrix.wrapped).count();
    if wrapped > 0 {
        notes.push(format!("quantised matrices with zero points that wrap: they are read as 0, as GPTQ's own tools do, where some servers add one and go on: {wrapped}"));
    }
    if scheme.activations {
        notes.push("quantization_config quantises activations or the cache, too; only its weights are obeyed".to_owned());
    }
    notes
}

fn is(entry: &TensorEntry, element: &str) -> bool {
    matches!(&entry.element, ElementType::Other(name) if name == element)
}

/// A part of a matrix, looked up.
struct Part {
    name: String,
    entry: TensorEntry,
    bytes: FileSlice,
}

impl Part {
    fn need(files: &TensorFiles, base: &str, part: &str, of: &str) -> Result<Self, QuantisedError> {
        Self::seek(files, base, part).ok_or_else(|| QuantisedError::Missing { name: format!("{base}.{part}"), of: format!("{base}.{of}") })
    }

    fn seek(files: &TensorFiles, base: &str, part: &str) -> Option<Self> {
        let name = format!("{base}.{part}");
        Some(Self { entry: files.get(&name)?.clone(), bytes: files.bytes(&name)?, name })
    }

    fn of_type(self, element: &'static str) -> Result<Self, QuantisedError> {
        if is(&self.entry, element) {
            return Ok(self);
        }
        Err(QuantisedError::Type { name: self.name, element: self.entry.element.to_string(), expected: element })
    }

    /// Both dimensions, neither zero.
    fn matrix(&self, expected: &str) -> Result<[u64; 2], QuantisedError> {
        match *self.entry.shape {
            [rows, cols] if rows > 0 && cols > 0 => Ok([rows, cols]),
            _ => Err(self.misshapen(expected.to_owned())),
        }
    }

    fn has_shape(&self, shape: &[u64], why: &str) -> Result<(), QuantisedError> {
        if self.entry.shape == shape { Ok(()) } else { Err(self.misshapen(format!("{shape:?} ({why})"))) }
    }

    fn misshapen(&self, expected: String) -> QuantisedError {
        QuantisedError::Shape { name: self.name.clone(), actual: self.entry.shape.clone(), expected }
    }

    fn words(&self) -> impl ExactSizeIterator<Item = u32> {
        let (words, _) = self.bytes.as_ref().as_chunks::<4>();
        words.iter().map(|word| u32::from_le_bytes(*word))
    }
}

/// The largest group of the zoo that divides groups of `size` weights, where a row has `inputs`.
fn stored_group(size: u64, inputs: u64) -> u16 {
    const MAX: u16 = ashlar_kernels::format::GROUP_MAX as u16;
    if size >= inputs {
        return MAX;
    }
    // Divisors of the largest group are powers of two.
    MAX.min(1 << size.trailing_zeros().min(15))
}

/// All weights of a matrix as f32, for tests.
#[cfg(test)]
fn weights(matrix: &Matrix, files: &TensorFiles) -> Vec<f32> {
    use ashlar_kernels::format::{TensorView, dequantise, first_non_finite};

    let [rows, cols] = matrix.shape.map(|dim| usize::try_from(dim).unwrap());
    let bytes = matrix.rows(files, 0..rows);
    let view = TensorView { dtype: matrix.dtype, rows, cols, bytes: &bytes };
    view.check().unwrap();
    assert_eq!(first_non_finite(&view), None);
    dequantise(&view)
}

#[cfg(test)]
mod tests;
