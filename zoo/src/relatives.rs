//! Which model an uploaded one was tuned from, found among those that its tenant may see: nobody names it. Start with [`survey`]; what
//! is compared is a [`Sketch`], and docs/relatives.md says how well that works. `difference` then tells how the two differ.

mod adapted;
mod compress;
mod difference;
mod low_rank;
mod nearest;
mod samples;
mod sketch;
mod survey;
#[cfg(test)]
mod testing;
mod truncated;
mod unmerge;
mod viewer;

pub use adapted::{AdaptError, Adapted};
pub use compress::{Compressed, CompressedMatrix, Kept, Method, ONE_BIT_GROUP, UnknownMethod, compress};
pub use difference::{BlockDifference, Compared, Kind, Kinship, RANK_SOUGHT_MAX, TensorDifference, UNRELATED_MIN, compare};
pub use low_rank::{LowRank, Proof, REPRODUCED_MIN, low_rank};
pub use nearest::{Known, RELATED_MAX, Rank, Search};
pub use samples::{SAMPLE_COUNT, Samples, places};
pub use sketch::{Prefix, SAMPLED_LAYERS_MAX, SKETCH_BYTES_MAX, Sketch, SketchError, sampled_roles};
pub use survey::{Candidates, Relative, Survey, relative_for, survey};
pub use unmerge::{Proposal, propose};
pub use viewer::Viewer;
