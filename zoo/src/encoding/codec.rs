//! The code of one tensor: how its elements lie in planes, and the models of each plane. Chosen by what the tensor holds, written into the prelude.

use ashlar_kernels::format::Dtype;

use super::contexts::{CONTEXTS_MAX, Contexts, choose, cost};
use super::model::{Counts, Model, SCALE, Tables};
use super::planes::{Layout, Planes};
use super::{CHUNK_BYTES, EncodingError};

/// A plane is coded if that saves a sixteenth of it: below, its part of the file is copied at decode, some ten times as fast.
const WORTH_DIVISOR: f64 = 16.0;

/// How a plane may be coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plane {
    /// Raw or constant only.
    Uncoded,
    /// All symbols by this model.
    Model(usize),
    /// Each symbol by the model of its context; contexts are the first models.
    ByExponent,
}

/// Layout, planes and models of one tensor.
#[derive(Debug, Clone)]
pub(super) struct Codec {
    pub(super) layout: Layout,
    pub(super) planes: Vec<Plane>,
    pub(super) contexts: Contexts,
    pub(super) models: Vec<Model>,
    pub(super) tables: Tables,
}

impl PartialEq for Codec {
    fn eq(&self, other: &Self) -> bool {
        (self.layout, &self.planes, &self.contexts, &self.models) == (other.layout, &other.planes, &other.contexts, &other.models)
    }
}

impl Eq for Codec {}

impl Codec {
    fn new(layout: Layout, planes: Vec<Plane>, contexts: Contexts, models: Vec<Model>) -> Self {
        let tables = Tables::of(&models);
        Self { layout, planes, contexts, models, tables }
    }

    /// Where a model begins in the tables.
    pub(super) fn at(&self, model: usize) -> u16 {
        u16::try_from(model * SCALE).expect("a model of at most MODELS_MAX")
    }

    /// The code that suits a payload.
    pub(super) fn choose(dtype: Dtype, payload: &[u8], base: Option<&[u8]>) -> Self {
        let layout = Layout::of(dtype, base.is_some());
        let mut by_exponent: Vec<Counts> = vec![[0; 256]; if layout.is_difference() { 256 } else { 0 }];
        let mut counts: Vec<Counts> = vec![[0; 256]; layout.plane_count()];
        let mut planes = Planes::default();
        for (index, raw) in payload.chunks(CHUNK_BYTES).enumerate() {
            let at = index * CHUNK_BYTES;
            planes.split(layout, raw, base.map_or(&[], |base| &base[at..at + raw.len()]));
            for (counts, symbols) in counts.iter_mut().zip(&planes.planes).skip(usize::from(layout.is_difference())) {
                symbols.iter().for_each(|symbol| counts[usize::from(*symbol)] += 1);
            }
            for (exponent, symbol) in planes.exponents.iter().zip(&planes.planes[0]) {
                by_exponent[usize::from(*exponent)][usize::from(*symbol)] += 1;
            }
        }
        let (contexts, mut models) = if layout.is_difference() { choose(by_exponent) } else { Default::default() };
        let planes = counts.iter().enumerate().map(|(index, counts)| {
            if index == 0 && layout.is_difference() {
                return Plane::ByExponent;
            }
            let bits = 8.0 * (payload.len() / layout.width()) as f64;
            if cost(counts) > bits - bits / WORTH_DIVISOR {
                return Plane::Uncoded;
            }
            models.push(Model::of(counts));
            Plane::Model(models.len() - 1)
        });
        let planes = planes.collect();
        Self::new(layout, planes, contexts, models)
    }

    /// Appends planes and models: for each plane a byte with the count of its models, for the first plane of a difference then where
    /// contexts begin, then the models.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let mut models = self.models.iter();
        for plane in &self.planes {
            let count = match plane {
                Plane::Uncoded => 0,
                Plane::Model(_) => 1,
                Plane::ByExponent => self.contexts.starts.len() + 1,
            };
            out.push(u8::try_from(count).expect("at most CONTEXTS_MAX"));
            if *plane == Plane::ByExponent {
                out.extend_from_slice(&self.contexts.starts);
            }
            models.by_ref().take(count).for_each(|model| model.write(out));
        }
    }

    /// Takes a code off the start of `bytes`.
    pub(super) fn read(dtype: Dtype, delta: bool, bytes: &mut &[u8]) -> Result<Self, EncodingError> {
        let layout = Layout::of(dtype, delta);
        let mut models = Vec::new();
        let mut contexts = Contexts::default();
        let mut planes = Vec::with_capacity(layout.plane_count());
        for index in 0..layout.plane_count() {
            let by_exponent = index == 0 && layout.is_difference();
            let count = usize::from(*bytes.split_off_first().ok_or(EncodingError::Prelude("count of models"))?);
            if count > if by_exponent { CONTEXTS_MAX } else { 1 } || (by_exponent && count == 0) {
                return Err(EncodingError::Prelude("count of models"));
            }
            if by_exponent {
                contexts.starts = bytes.split_off(..count - 1).ok_or(EncodingError::Prelude("context"))?.to_vec();
                if !contexts.starts.is_sorted_by(|a, b| a < b) || contexts.starts.first() == Some(&0) {
                    return Err(EncodingError::Prelude("context"));
                }
            }
            planes.push(match count {
                _ if by_exponent => Plane::ByExponent,
                0 => Plane::Uncoded,
                _ => Plane::Model(models.len()),
            });
            for _ in 0..count {
                models.push(Model::read(bytes)?);
            }
        }
        Ok(Self::new(layout, planes, contexts, models))
    }
}
