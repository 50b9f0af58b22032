//! What the one who adds a model may know of what is there. An object that only others have is converted and written like one that nobody
//! has, and counts as new: neither the report nor the time of an `add` tells a tenant what other tenants store.

use std::collections::BTreeMap;

use super::AddOptions;
use super::plan::Plan;
use crate::digest::Digest;
use crate::manifest::{Block, TensorRef};
use crate::relatives::{Candidates, Kinship, RANK_SOUGHT_MAX, Relative, Sketch, Survey, Viewer, compare, survey};
use crate::store::{StoreError, Zoo};

/// Blocks that are compared at a time: each may hold a few copies of a matrix in f32.
const COMPARED_AT_ONCE: usize = 2;

/// A zoo as one tenant sees it.
pub(super) struct Sight {
    zoo: Zoo,
    blind: Zoo,
    viewer: Viewer,
    pub(super) survey: Survey,
}

impl Sight {
    /// Looks for what of a chain is there, and for its nearest relative.
    pub(super) async fn of(zoo: &Zoo, viewer: &Viewer, sketch: &Sketch, options: &AddOptions, chain: Digest) -> Result<Self, StoreError> {
        let survey = survey(zoo, viewer, sketch, Some((&options.model, chain)), Candidates::All).await?;
        Ok(Self { zoo: zoo.clone(), blind: zoo.blind(), viewer: viewer.clone(), survey })
    }

    /// The tensors that the plan's may be close to, to store them over: those in the same places of the model that it was tuned from, where that
    /// is said and may be seen, or else of the nearest relative. By index into the plan's tensors.
    pub(super) async fn near(&self, options: &AddOptions, plan: &Plan) -> Result<BTreeMap<usize, TensorRef>, StoreError> {
        let parent = options.parent.as_ref().filter(|parent| self.viewer.sees(parent));
        let blocks = match (parent, &self.survey.nearest) {
            (Some(parent), _) => self.zoo.resolve(parent).await.map(|parent| parent.blocks),
            (None, Some((id, chain, _))) => Relative::read(&self.zoo, id.clone(), *chain).await.map(|relative| relative.blocks),
            (None, None) => Ok(Vec::new()),
        };
        let blocks = match blocks {
            Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) => Vec::new(),
            blocks => blocks?,
        };
        let mut near = BTreeMap::new();
        for (block, other) in plan.blocks.iter().zip(&blocks) {
            for (role, index) in &block.tensors {
                near.extend(other.tensors.get(*role).map(|tensor| (*index, tensor.clone())));
            }
        }
        Ok(near)
    }

    /// How the nearest relative's blocks and these differ; none where there is no relative. What cannot be compared is a note.
    pub(super) async fn kinship(&self, blocks: &[(Digest, Block)], notes: &mut Vec<String>) -> Option<Kinship> {
        let (id, chain, rank) = self.survey.nearest.as_ref()?;
        let blocks: Vec<Block> = blocks.iter().map(|(_, block)| block.clone()).collect();
        let compared = match Relative::read(&self.zoo, id.clone(), *chain).await {
            Ok(relative) => compare(&self.zoo, &relative.blocks, &blocks, RANK_SOUGHT_MAX, COMPARED_AT_ONCE).await,
            Err(error) => Err(error),
        };
        match compared {
            Ok(compared) => Some(Kinship::new((id, *chain), rank.distance, self.survey.visible_count, &compared)),
            Err(error) => {
                notes.push(format!("it is a relative of {id}, but cannot be compared with it: {error}"));
                None
            }
        }
    }

    /// What the user should know of the survey.
    pub(super) fn notes(&self) -> Vec<String> {
        match self.survey.unsketched_count {
            0 => Vec::new(),
            count => {
                vec![format!("{count} models that an older build added are not yet known to be here: each add gets to know some of them")]
            }
        }
    }

    /// The zoo to put an object in: one that knows it is there, or one that does not.
    pub(super) fn zoo(&self, object: Digest) -> &Zoo {
        if self.survey.known.has(object) { &self.zoo } else { &self.blind }
    }
}
