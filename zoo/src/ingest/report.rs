//! What `add` says while it works and when it is done.

use std::fmt;

use crate::digest::Digest;
use crate::model_id::ModelId;
use crate::relatives::Kinship;

/// How much of something was there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Shared {
    /// Distinct ones that the model has.
    pub total: u64,
    /// Of these, what a model has that the tenant may see.
    pub present: u64,
}

/// What an `add` did. Displays as "61 of 62 blocks, 271 of 272 tensors already here; 1.8 MB new of 269 MB, stored as 1.2 MB", of an adapter as
/// "18 of 18 blocks, 0 of 16 adapters, 130 of 194 tensors already here; 102 kB new of 2.1 MB".
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct AddReport {
    /// The name.
    #[serde(serialize_with = "as_text")]
    pub model: ModelId,
    /// What it points to now.
    pub chain: Digest,
    /// What it pointed to before, if that was another chain.
    pub replaced: Option<Digest>,
    /// Family.
    pub architecture: String,
    /// The model that an adapter is over.
    #[serde(serialize_with = "as_text_if_any")]
    pub base: Option<ModelId>,
    /// Distinct blocks.
    pub blocks: Shared,
    /// Distinct adapters.
    pub adapters: Shared,
    /// Distinct tensors.
    pub tensors: Shared,
    /// Bytes of the model's distinct tensors.
    pub bytes_total: u64,
    /// Of these, bytes that no model has that the tenant may see.
    pub bytes_new: u64,
    /// What they take in the store: less where they are encoded.
    pub bytes_stored: u64,
    /// The nearest relative that the tenant may see, and how it differs; none of an adapter, which has a base.
    pub nearest: Option<Kinship>,
    /// Things that the user should know.
    pub notes: Vec<String>,
}

impl fmt::Display for AddReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { blocks, adapters, tensors, .. } = self;
        write!(f, "{} of {} blocks, ", blocks.present, blocks.total)?;
        if self.base.is_some() {
            write!(f, "{} of {} adapters, ", adapters.present, adapters.total)?;
        }
        write!(f, "{} of {} tensors already here; ", tensors.present, tensors.total)?;
        write!(f, "{} new of {}", human_bytes(self.bytes_new), human_bytes(self.bytes_total))?;
        match (human_bytes(self.bytes_stored), human_bytes(self.bytes_new)) {
            (stored, new) if self.bytes_stored < self.bytes_new && stored != new => write!(f, ", stored as {stored}"),
            _ => Ok(()),
        }
    }
}

fn as_text<S: serde::Serializer>(id: &ModelId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

fn as_text_if_any<S: serde::Serializer>(id: &Option<ModelId>, serializer: S) -> Result<S::Ok, S::Error> {
    serde::Serialize::serialize(&id.as_ref().map(ToString::to_string), serializer)
}

/// Bytes in powers of 1000, with two or three digits: "0 B", "1.8 MB", "269 MB".
pub fn human_bytes(bytes: u64) -> String {
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["kB", "MB", "GB", "TB", "PB"] {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    if value < 9.95 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

/// A phase of `add`, or of other long work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Fetching files from a hub.
    Download,
    /// Converting and hashing every tensor.
    Hash,
    /// Storing those that are new.
    Store,
    /// Reading the weights of two models.
    Compare,
    /// Making the matrices of a quantised model.
    Quantise,
    /// Making blocks of fewer columns or heads.
    Cut,
    /// Measuring what blocks cost.
    Profile,
}

/// Hears how far long work has come.
pub trait Progress: Send + Sync {
    /// A stage begins, with so many bytes ahead.
    fn begin(&self, stage: Stage, bytes: u64);
    /// So many bytes more are done.
    fn advance(&self, bytes: u64);
    /// The stage is done.
    fn end(&self);
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: Stage, _: u64) {}
    fn advance(&self, _: u64) {}
    fn end(&self) {}
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_are_written_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1800, "1.8 kB"),
            (1_800_000, "1.8 MB"),
            (268_900_000, "269 MB"),
            (999_999, "1.0 MB"),
            (12_345_678_901, "12 GB"),
        ] {
            assert_eq!(super::human_bytes(bytes), text);
        }
    }
}
