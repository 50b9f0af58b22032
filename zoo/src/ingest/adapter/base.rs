//! The model that an adapter is over: named by the user, or the one model that the tenant may see whose name or source is what the adapter asks for. Only
//! the last component of it is a guess, which is told.

use crate::digest::Digest;
use crate::ingest::IngestError;
use crate::manifest::{Block, Chain};
use crate::model_id::ModelId;
use crate::relatives::Viewer;
use crate::store::Zoo;

/// Most characters of the name that the adapter asks for in what people read.
const WANTED_CHARS_MAX: usize = 200;

/// A base, read.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) id: ModelId,
    pub(super) digest: Digest,
    pub(super) chain: Chain,
    pub(super) blocks: Vec<Block>,
    /// What the user should know of the choice.
    pub(super) note: Option<String>,
}

/// Finds and reads it. `wanted` is what adapter_config.json asks for.
///
/// # Errors
/// When there is none that `viewer`, who adds for `tenant`, may see, or not one.
pub(super) async fn find(
    zoo: &Zoo,
    (tenant, viewer): (&str, &Viewer),
    wanted: Option<&str>,
    given: Option<&ModelId>,
) -> Result<Base, IngestError> {
    let (id, found) = match given {
        Some(id) if !viewer.sees(id) => return Err(IngestError::BaseHidden { base: id.clone(), tenant: tenant.to_owned() }),
        Some(id) => (id.clone(), None),
        None => seek(zoo, viewer, wanted).await.map(|(id, found)| (id, Some(found)))?,
    };
    let model = zoo.resolve(&id).await?;
    let note = wanted.and_then(|wanted| {
        let short: String = wanted.chars().take(WANTED_CHARS_MAX).collect();
        match found {
            Some(Match::Last) => Some(format!("the adapter asks for {short}; taking {id}: --base names another")),
            None if matches(wanted, &id, &model.chain.source).is_none() => {
                Some(format!("the adapter asks for {short}, and {id} has neither that name nor that source"))
            }
            Some(Match::Full) | None => None,
        }
    });
    match model.chain.adapters.is_empty() {
        true => Ok(Base { id, digest: model.name.chain, chain: model.chain, blocks: model.blocks, note }),
        false => Err(IngestError::BaseAdapted { base: id, parent: model.name.parent.unwrap_or_else(|| "its own base".to_owned()) }),
    }
}

async fn seek(zoo: &Zoo, viewer: &Viewer, wanted: Option<&str>) -> Result<(ModelId, Match), IngestError> {
    let Some(wanted) = wanted else { return Err(IngestError::BaseUnsaid) };
    let (mut full, mut last) = (Vec::new(), Vec::new());
    for (id, name) in zoo.list_visible(viewer).await? {
        // What cannot be read cannot be the base; `verify` tells of it.
        // One that servers were asked to load is nobody's base unless given: it may go at any time.
        let chain = if name.loaded { None } else { zoo.read_chain(name.chain).await.ok() };
        // Nothing lies over a chain of two models' layers, whose architecture is both of theirs.
        let Some(chain) = chain.filter(|chain| chain.adapters.is_empty() && !chain.architecture.contains('+')) else { continue };
        match matches(wanted, &id, &chain.source) {
            Some(Match::Full) => full.push(id),
            Some(Match::Last) => last.push(id),
            None => {}
        }
    }
    let (mut found, how) = if full.is_empty() { (last, Match::Last) } else { (full, Match::Full) };
    match (found.len(), found.pop()) {
        (1, Some(id)) => Ok((id, how)),
        (_, id) => {
            found.extend(id);
            Err(IngestError::BaseUnclear { wanted: wanted.chars().take(WANTED_CHARS_MAX).collect(), found })
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Match {
    /// All of it.
    Full,
    /// The last component: `base` of `org/base` or `/checkpoints/base`.
    Last,
}

fn matches(wanted: &str, id: &ModelId, source: &str) -> Option<Match> {
    let component = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let wanted = wanted.trim_end_matches('/');
    // A pulled model's source ends in its commit.
    let source = source.split('@').next().unwrap_or_default();
    if wanted == source || wanted == id.to_string() {
        return Some(Match::Full);
    }
    let last = component(wanted);
    (last == id.name() || last == component(source)).then_some(Match::Last)
}

#[cfg(test)]
mod tests {
    use super::{Match, matches};

    #[test]
    fn a_base_is_known_by_its_name_its_source_or_the_last_component() {
        for (wanted, id, source, expected) in [
            ("org/base", "demo/x", "org/base@0123456789ab", Some(Match::Full)),
            ("demo/x", "demo/x", "checkpoint", Some(Match::Full)),
            ("x", "demo/y", "x", Some(Match::Full)),
            ("/checkpoints/base/", "demo/base", "other", Some(Match::Last)),
            ("org/base", "demo/y", "other-org/base@0123456789ab", Some(Match::Last)),
            ("org/base", "demo/base-2", "base-2", None),
            ("org/base", "base/y", "base.gguf", None),
        ] {
            assert_eq!(matches(wanted, &id.parse().unwrap(), source), expected, "{wanted} {id} {source}");
        }
    }
}
