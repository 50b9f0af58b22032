//! Reads every object of a zoo and follows every name: what is damaged or missing, and which blocks, adapters and models that hits.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::digest::Digest;
use crate::encoding::DEPTH_MAX;
use crate::ingest::Progress;
use crate::ingest::Stage;
use crate::joint::{self, Joint};
use crate::manifest::{Adapter, Block, Chain};
use crate::store::{Object, StoreError, Zoo, object};

/// What [`verify`] found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct VerifyReport {
    /// Objects read.
    pub object_count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Names followed.
    pub model_count: u64,
    /// Objects that no name leads to; `gc` takes them.
    pub unreferenced_count: u64,
    /// What is wrong. Empty: the zoo is sound.
    pub damage: Vec<Damage>,
    /// The same objects, for [`crate::repair::repair`].
    #[serde(skip)]
    pub broken: Vec<Object>,
}

/// One object that is damaged, missing or cannot be read.
#[derive(Debug, Clone, Serialize)]
pub struct Damage {
    /// Which.
    pub object: String,
    /// How.
    pub reason: String,
    /// Blocks that need it.
    pub blocks: Vec<String>,
    /// Adapters that need it.
    pub adapters: Vec<String>,
    /// Names that need it.
    pub models: Vec<String>,
}

/// Who needs an object.
#[derive(Debug, Clone, Default)]
struct Needs {
    blocks: BTreeSet<String>,
    adapters: BTreeSet<String>,
    models: BTreeSet<String>,
}

/// Checks the whole zoo.
///
/// # Errors
/// When the store fails in a way that says nothing about the objects.
pub async fn verify(zoo: &Zoo, progress: &dyn Progress) -> Result<VerifyReport, StoreError> {
    let mut report = VerifyReport::default();
    let mut broken: BTreeMap<Object, String> = BTreeMap::new();
    let mut present = BTreeSet::new();
    let mut listed = Vec::new();
    let mut bases = BTreeSet::new();
    // Manifests first: they are small, and tell who needs a damaged tensor.
    for folder in ["equivalences", "chains", "blocks", "adapters", "sketches", "measures", "profiles", "assets", "bases", "tensors"] {
        let metas = zoo.list(folder).await?;
        listed.extend(metas.into_iter().filter_map(|meta| Some((object(&meta.location)?, meta.size))));
    }
    progress.begin(Stage::Hash, listed.iter().map(|(_, size)| size).sum());
    for (object, size) in listed {
        report.object_count += 1;
        report.bytes += size;
        let checked = match &object {
            Object::Tensor(digest) => zoo.check_tensor(*digest).await.map(|base| bases.extend(base.map(|base| (*digest, base)))),
            other => check(zoo, other).await,
        };
        match checked {
            Ok(()) => {}
            Err(StoreError::Missing { .. }) => continue, // Taken by a gc since the listing.
            Err(StoreError::Damaged { reason, .. }) => {
                broken.insert(object.clone(), reason);
            }
            Err(other) => return Err(other),
        }
        present.insert(object);
        progress.advance(size);
    }
    progress.end();
    if let Err(StoreError::Damaged { object, reason }) = zoo.read_domains().await {
        broken.insert(object, reason);
    }
    let mut needs = follow_names(zoo, &mut report, &mut broken).await?;
    follow_bases(&bases, &mut needs);
    for (tensor, base) in &bases {
        // Without it `gc` may take the base, and the delta is lost.
        let mark = Object::Base { tensor: *tensor, base: *base };
        if !present.contains(&mark) && needs.contains_key(&Object::Tensor(*tensor)) {
            broken.insert(mark, "it is missing".to_owned());
        }
    }
    for object in needs.keys().filter(|object| !present.contains(*object) && !matches!(object, Object::Model(_))) {
        broken.entry(object.clone()).or_insert_with(|| "it is missing".to_owned());
    }
    let is_needed = |object: &&Object| match object {
        Object::Base { tensor, .. } => needs.contains_key(&Object::Tensor(*tensor)),
        // Both go with their chain; a missing sketch is made when it is wanted.
        Object::Sketch(chain) | Object::Measure { chain, .. } => needs.contains_key(&Object::Chain(*chain)),
        Object::Profile { block, .. } => needs.contains_key(&Object::Block(*block)),
        object => needs.contains_key(*object),
    };
    report.unreferenced_count = present.iter().filter(|object| !is_needed(object)).count() as u64;
    let of = |object: &Object| match object {
        Object::Base { tensor, .. } => needs.get(&Object::Tensor(*tensor)),
        Object::Measure { chain, .. } => needs.get(&Object::Chain(*chain)),
        Object::Profile { block, .. } => needs.get(&Object::Block(*block)),
        object => needs.get(object),
    };
    report.damage = broken.iter().map(|(object, reason)| damage(object, reason.clone(), of(object))).collect();
    report.broken = broken.into_keys().collect();
    Ok(report)
}

/// Whoever needs a delta needs all that it is stored over.
fn follow_bases(bases: &BTreeSet<(Digest, Digest)>, needs: &mut BTreeMap<Object, Needs>) {
    let bases: BTreeMap<Digest, Digest> = bases.iter().copied().collect();
    let deltas: Vec<Digest> = bases.keys().filter(|tensor| needs.contains_key(&Object::Tensor(**tensor))).copied().collect();
    for tensor in deltas {
        let of_delta = needs[&Object::Tensor(tensor)].clone();
        let below = std::iter::successors(bases.get(&tensor), |base| bases.get(*base)).take(usize::from(DEPTH_MAX));
        for base in below {
            let entry = needs.entry(Object::Tensor(*base)).or_default();
            entry.blocks.extend(of_delta.blocks.iter().cloned());
            entry.adapters.extend(of_delta.adapters.iter().cloned());
            entry.models.extend(of_delta.models.iter().cloned());
        }
    }
}

fn damage(object: &Object, reason: String, needs: Option<&Needs>) -> Damage {
    let list = |set: fn(&Needs) -> &BTreeSet<String>| needs.map(|needs| set(needs).iter().cloned().collect()).unwrap_or_default();
    let (blocks, adapters, models) = (list(|needs| &needs.blocks), list(|needs| &needs.adapters), list(|needs| &needs.models));
    Damage { object: object.to_string(), reason, blocks, adapters, models }
}

/// Reads one object to its end.
///
/// # Errors
/// `Damaged` where its bytes are not those of its name.
pub(crate) async fn check(zoo: &Zoo, object: &Object) -> Result<(), StoreError> {
    match object {
        Object::Block(digest) => zoo.read_block(*digest).await.map(|_| ()),
        Object::Adapter(digest) => zoo.read_adapter(*digest).await.map(|_| ()),
        Object::Chain(digest) => zoo.read_chain(*digest).await.map(|_| ()),
        Object::Asset(digest) => zoo.read_asset(*digest).await.map(|_| ()),
        Object::Tensor(digest) => zoo.check_tensor(*digest).await.map(|_| ()),
        // It says all by being there.
        Object::Base { .. } => Ok(()),
        Object::Sketch(chain) => zoo.checked_sketch(*chain).await.map(|_| ()),
        Object::Measure { chain, record } => zoo.read_measure(*chain, *record).await.map(|_| ()),
        Object::Profile { block, device } => zoo.read_profile(*block, device).await.map(|_| ()),
        Object::Equivalence(digest) => zoo.read_equivalence(*digest).await.map(|_| ()),
        Object::Domains => zoo.read_domains().await.map(|_| ()),
        Object::Scratch(_) => Ok(()),
        Object::Format | Object::TensorOf { .. } | Object::TensorOfAdapter { .. } | Object::Model(_) => Ok(()),
    }
}

/// Every object that a name (or its history) leads to, with who needs it.
async fn follow_names(
    zoo: &Zoo,
    report: &mut VerifyReport,
    broken: &mut BTreeMap<Object, String>,
) -> Result<BTreeMap<Object, Needs>, StoreError> {
    let mut needs: BTreeMap<Object, Needs> = BTreeMap::new();
    let records = equivalences(zoo).await?;
    let mut chains: BTreeMap<Digest, Option<Chain>> = BTreeMap::new();
    let mut blocks: BTreeMap<Digest, Option<Block>> = BTreeMap::new();
    let mut adapters: BTreeMap<Digest, Option<Adapter>> = BTreeMap::new();
    for (id, name) in zoo.list_models().await? {
        report.model_count += 1;
        let model = id.to_string();
        let name = match name {
            Ok(name) => name,
            Err(e) => {
                let object = Object::Model(id);
                needs.entry(object.clone()).or_default().models.insert(model);
                broken.insert(object, e.to_string());
                continue;
            }
        };
        let mut followed: Vec<Digest> = std::iter::once(name.chain).chain(name.history.iter().map(|past| past.chain)).collect();
        for (record, exchanged) in followed.clone().iter().filter_map(|chain| records.get(chain)).flatten() {
            needs.entry(Object::Equivalence(*record)).or_default().models.insert(model.clone());
            followed.extend(exchanged);
        }
        for chain_digest in followed {
            needs.entry(Object::Chain(chain_digest)).or_default().models.insert(model.clone());
            if let Entry::Vacant(place) = chains.entry(chain_digest) {
                place.insert(readable(zoo.read_chain(chain_digest).await)?);
            }
            let Some(chain) = &chains[&chain_digest] else { continue };
            for asset in [chain.assets.tokenizer, chain.assets.chat_template, chain.assets.card].into_iter().flatten() {
                needs.entry(Object::Asset(asset)).or_default().models.insert(model.clone());
            }
            for digest in &chain.blocks {
                let entry = needs.entry(Object::Block(*digest)).or_default();
                entry.models.insert(model.clone());
                entry.blocks.insert(digest.to_string());
                if !blocks.contains_key(digest) {
                    blocks.insert(*digest, readable(zoo.read_block(*digest).await)?);
                }
                for (role, tensor) in blocks[digest].iter().flat_map(|block| &block.tensors) {
                    let entry = needs.entry(Object::Tensor(tensor.digest)).or_default();
                    entry.models.insert(model.clone());
                    entry.blocks.insert(format!("{digest} (`{role}`)"));
                }
            }
            // Sound one by one, yet no chain.
            let joints: Option<Vec<Joint>> = chain.blocks.iter().map(|digest| blocks[digest].as_ref().map(Joint::of)).collect();
            if let Some(Err(e)) = joints.map(|joints| joint::check(0, joints.len(), joints)) {
                broken.entry(Object::Chain(chain_digest)).or_insert_with(|| e.to_string());
            }
            for adapter in &chain.adapters {
                let (digest, at) = (adapter.digest, adapter.block_index);
                let object = Object::Adapter(digest);
                let entry = needs.entry(object.clone()).or_default();
                entry.models.insert(model.clone());
                entry.adapters.insert(digest.to_string());
                if let Entry::Vacant(place) = adapters.entry(digest) {
                    place.insert(readable(zoo.read_adapter(digest).await)?);
                }
                let Some(adapter) = &adapters[&digest] else { continue };
                for (role, tensor) in adapter.tensors() {
                    let entry = needs.entry(Object::Tensor(tensor.digest)).or_default();
                    entry.models.insert(model.clone());
                    entry.adapters.insert(format!("{digest} (`{role}`)"));
                }
                // Sound alone, yet no adapter of this chain.
                let block = blocks.get(&chain.blocks[at as usize]).and_then(Option::as_ref);
                if let Some(Err(e)) = block.map(|block| adapter.check_against(block)) {
                    broken.entry(object).or_insert_with(|| format!("over block {at} of chain {chain_digest}, {e}"));
                }
            }
        }
    }
    Ok(needs)
}

/// The records of equivalence of each chain, with the chains that they exchange blocks in.
async fn equivalences(zoo: &Zoo) -> Result<BTreeMap<Digest, Vec<(Digest, Vec<Digest>)>>, StoreError> {
    let mut records: BTreeMap<Digest, Vec<(Digest, Vec<Digest>)>> = BTreeMap::new();
    for digest in zoo.list_equivalences().await? {
        if let Some(record) = readable(zoo.read_equivalence(digest).await)? {
            records.entry(record.chain).or_default().push((digest, record.steps.iter().map(|step| step.chain).collect()));
        }
    }
    Ok(records)
}

/// What is damaged or missing is reported elsewhere; a store that fails ends the run.
fn readable<T>(result: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) => Ok(None),
        Err(other) => Err(other),
    }
}
