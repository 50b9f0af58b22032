//! Cheaper forms of a model's blocks: feed-forward blocks of fewer inner columns, attention blocks of fewer heads (docs/surrogate.md). Here is which
//! blocks are cut to how much, and cutting one consistently once it is known what stays; what is worth keeping is
//! `ashlar_executor::model::surrogate`'s to say. Start with [`Plan`].

mod cut;
mod plan;

pub use cut::{CutError, Units, cut, multiply_adds};
pub use plan::{BlockRange, Plan, PlanError, Share, UnknownRange, UnknownShare};
