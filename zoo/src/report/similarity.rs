//! How alike the weights of two models are, tensor by tensor: the share of equal elements, the size of the difference, and the cosine. Reads
//! both sides of every tensor whose digests differ, a few at a time.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_kernels::format::TensorView;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use crate::apart::Apart;
use crate::blocking::blocking;
use crate::ingest::{Progress, Stage};
use crate::inspect::{Resolved, kind, tensor_bytes};
use crate::manifest::TensorRef;
use crate::model_id::ModelId;
use crate::store::{StoreError, Zoo};
use crate::tensor::MappedTensor;

/// Tensors that are compared at once: each takes a thread, and pages of two maps.
const AT_ONCE: usize = 2;

/// Two models, place by place.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The two names.
    pub models: [String; 2],
    /// Places of the longer chain.
    pub places: Vec<PlaceSimilarity>,
}

/// The blocks of two chains at one place.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlaceSimilarity {
    /// Kind, of each; none where a chain has ended.
    pub kinds: [Option<&'static str>; 2],
    /// Whether an adapter lies over the block, of each. It is not part of what is compared.
    pub adapted: [bool; 2],
    /// By role, where either has it.
    pub tensors: BTreeMap<String, TensorSimilarity>,
}

/// Two tensors of one role.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum TensorSimilarity {
    /// The same tensor.
    Same {
        /// Its bytes.
        bytes: u64,
    },
    /// Of equal shapes.
    Compared(Measures),
    /// Of different shapes, or only one has it: nothing can be compared.
    Apart,
}

/// Measures of two tensors of `count` elements, as f32 makes them of what is stored.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measures {
    /// Elements.
    pub count: u64,
    /// Share of the elements that are equal, 0 to 1.
    pub equal_share: f64,
    /// Root mean square of the difference over that of the first tensor; none where that is 0 and the second is not.
    pub relative_rms: Option<f64>,
    /// Cosine of the angle between the two as vectors, -1 to 1; none where one of them is 0 everywhere and the other is not.
    pub cosine: Option<f64>,
}

/// Two tensors that are to be read.
struct Pair {
    place: usize,
    role: String,
    tensors: [TensorRef; 2],
}

impl Zoo {
    /// Compares the weights of two models.
    ///
    /// # Errors
    /// When a manifest or a tensor of either is missing or damaged, or the store fails.
    pub async fn compare_weights(&self, a: &ModelId, b: &ModelId, progress: &dyn Progress) -> Result<Comparison, StoreError> {
        let (a, b) = (self.resolve(a).await?, self.resolve(b).await?);
        let (mut comparison, pairs) = begin(&a, &b);
        progress.begin(Stage::Compare, pairs.iter().flat_map(|pair| &pair.tensors).map(tensor_bytes).sum());
        let measured = stream::iter(pairs).map(|pair| async move {
            let [a, b] = &pair.tensors;
            let (first, second) = (self.map_tensor(a).await?, self.map_tensor(b).await?);
            let measures = blocking(move || measure(&first, &second)).await;
            progress.advance(tensor_bytes(a) + tensor_bytes(b));
            Ok::<_, StoreError>((pair.place, pair.role, measures))
        });
        let measured: Vec<_> = measured.buffered(AT_ONCE).try_collect().await?;
        progress.end();
        for (place, role, measures) in measured {
            comparison.places[place].tensors.insert(role, TensorSimilarity::Compared(measures));
        }
        Ok(comparison)
    }
}

/// What manifests alone tell, and what has to be read for the rest.
fn begin(a: &Resolved, b: &Resolved) -> (Comparison, Vec<Pair>) {
    let mut pairs = Vec::new();
    let places = (0..a.blocks.len().max(b.blocks.len())).map(|place| {
        let blocks = [a.blocks.get(place), b.blocks.get(place)];
        let kinds = blocks.map(|block| block.map(|block| kind(&block.params)));
        let roles: BTreeSet<&String> = blocks.iter().flatten().flat_map(|block| block.tensors.keys()).collect();
        let tensors = roles.into_iter().map(|role| {
            let similarity = match blocks.map(|block| block.and_then(|block| block.tensors.get(role))) {
                [Some(a), Some(b)] if a.digest == b.digest => TensorSimilarity::Same { bytes: tensor_bytes(a) },
                [Some(a), Some(b)] if a.shape == b.shape && kinds[0] == kinds[1] => {
                    pairs.push(Pair { place, role: role.clone(), tensors: [a.clone(), b.clone()] });
                    TensorSimilarity::Apart // until it is measured
                }
                _ => TensorSimilarity::Apart,
            };
            (role.clone(), similarity)
        });
        let tensors = tensors.collect();
        PlaceSimilarity { kinds, adapted: [a, b].map(|model| model.adapters.contains_key(&place)), tensors }
    });
    let places = places.collect();
    (Comparison { models: [a.id.to_string(), b.id.to_string()], places }, pairs)
}

fn measure(a: &MappedTensor, b: &MappedTensor) -> Measures {
    let measures = Measures::of(&a.view(), &b.view());
    a.release_pages();
    b.release_pages();
    measures
}

impl Measures {
    fn of(a: &TensorView<'_>, b: &TensorView<'_>) -> Self {
        let sums = Apart::of(a, b, a.rows);
        let both = (sums.a * sums.b).sqrt();
        let is_zero = sums.a == 0.0 && sums.b == 0.0;
        // A weight that is no number makes sums that are none; JSON has no word for them.
        let finite = |value: f64| value.is_finite().then_some(value);
        Self {
            count: sums.count,
            equal_share: sums.equal_share(),
            relative_rms: if is_zero { Some(0.0) } else { finite((sums.difference / sums.a).sqrt()) },
            cosine: if is_zero { Some(1.0) } else { finite((sums.product / both).clamp(-1.0, 1.0)) },
        }
    }
}

#[cfg(test)]
mod tests {
    use ashlar_kernels::format::Dtype;

    use super::*;

    fn measures(a: &[f32], b: &[f32]) -> Measures {
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let (a_bytes, b_bytes) = (bytes(a), bytes(b));
        let view = |bytes| TensorView { dtype: Dtype::F32, rows: 2, cols: 2, bytes };
        Measures::of(&view(&a_bytes), &view(&b_bytes))
    }

    #[test]
    fn measures_are_those_of_the_formulas() {
        let near = |a: Option<f64>, b: f64| a.is_some_and(|a| (a - b).abs() < 1e-12);
        let found = measures(&[3.0, 0.0, 0.0, 4.0], &[3.0, 0.0, 0.0, 0.0]);
        assert_eq!((found.count, found.equal_share), (4, 0.75));
        assert!(near(found.relative_rms, 0.8) && near(found.cosine, 0.6), "{found:?}");
        let found = measures(&[1.0, -2.0, 3.0, 0.5], &[-1.0, 2.0, -3.0, -0.5]);
        assert!(found.equal_share == 0.0 && near(found.relative_rms, 2.0) && near(found.cosine, -1.0), "{found:?}");
    }

    #[test]
    fn nothing_and_no_numbers_have_no_measure() {
        let zero = [0.0; 4];
        let same = measures(&zero, &zero);
        assert_eq!((same.equal_share, same.relative_rms, same.cosine), (1.0, Some(0.0), Some(1.0)));
        let grown = measures(&zero, &[1.0, 0.0, 0.0, 0.0]);
        assert_eq!((grown.equal_share, grown.relative_rms, grown.cosine), (0.75, None, None));
        let broken = measures(&[f32::NAN, 1.0, 1.0, 1.0], &[1.0; 4]);
        assert_eq!((broken.relative_rms, broken.cosine), (None, None));
    }
}
