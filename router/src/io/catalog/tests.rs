//! The catalog over a real zoo: borders of layers, and which chain a model is served by.

use ashlar_registry::embedded::Embedded;
use ashlar_registry::record::{self, DeploymentRecord};
use ashlar_registry::{Registry, key};
use ashlar_zoo::equivalence::{Figures, METHOD, Step, exchanged};
use ashlar_zoo::measures::Divergence;

use super::*;
use crate::io::cluster::ClusterOptions;
use crate::io::testing::{block, stored_chain};

#[test]
fn borders_lie_between_layers_and_around_a_stitch() {
    let joints = |kinds: &str| -> Vec<Joint> { kinds.chars().map(|kind| Joint::of(&block(kind, 0))).collect() };
    assert_eq!(borders(&joints("EAFH")), Vec::<u32>::new());
    assert_eq!(borders(&joints("EAFAFH")), [3]);
    assert_eq!(borders(&joints("EAFAFAFAFH")), [3, 5, 7]);
    assert_eq!(borders(&joints("EAFAFSAFAFH")), [3, 5, 6, 8]);
}

#[tokio::test]
async fn a_chain_whose_blocks_do_not_fit_is_left_out_and_others_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(folder.path()).await.unwrap();
    let sound = stored_chain(&zoo, 1).await;
    // Feed-forward before attention.
    let mut wrong = stored_chain(&zoo, 2).await;
    wrong.blocks.swap(1, 2);
    name(&zoo, "acme/sound", &sound).await;
    name(&zoo, "acme/wrong", &wrong).await;
    let (_registry, cluster) = deployed(None).await;
    let catalog = Catalog::start(zoo, Duration::from_secs(60), &cluster).await;
    assert_eq!(catalog.view().models.keys().collect::<Vec<_>>(), ["acme/sound"]);
}

async fn name(zoo: &Zoo, id: &str, chain: &Chain) -> Digest {
    let chain = zoo.put_chain(chain).await.unwrap().0;
    let name = ModelName { chain, created_ms: 5000, parent: None, history: vec![], loaded: false };
    zoo.set_model(&id.parse().unwrap(), None, &name).await.unwrap();
    chain
}

/// Two exchanges of `acme/one`'s blocks for the other model's: of 0.01 and, with both, 0.03 nats.
async fn record(zoo: &Zoo, one: (&Chain, Digest), other: &str, others: (&Chain, Digest)) -> (Digest, [Digest; 2]) {
    let (mut steps, mut swaps) = (Vec::new(), Vec::new());
    for (block_index, kl) in [(2u32, 0.01), (4, 0.03)] {
        let index = block_index as usize;
        swaps.push((index, others.0.blocks[index]));
        let chain = zoo.put_chain(&exchanged(one.0, swaps.iter().copied())).await.unwrap().0;
        let figures = Figures { rows: 63, kl: Divergence { mean: kl, p99: kl, max: kl }, same_top_share: 0.99 };
        let (own, other) = (one.0.blocks[index], others.0.blocks[index]);
        steps.push(Step { block_index, own, other, cosine: 0.99, alone: figures, together: figures, chain });
    }
    let chains = [steps[0].chain, steps[1].chain];
    let (model, other, text) = ("acme/one".to_owned(), other.to_owned(), Digest::of(b"text"));
    let (method, chain, other_chain) = (METHOD.to_owned(), one.1, others.1);
    let record = Equivalence { format: 1, method, model, chain, other, other_chain, text, created_ms: 5, steps };
    (zoo.put_equivalence(&record).await.unwrap().0, chains)
}

/// A registry in which `acme/one` is deployed with a bound.
async fn deployed(kl: Option<f64>) -> (Arc<dyn Registry>, Arc<Cluster>) {
    let registry: Arc<dyn Registry> = Arc::new(Embedded::in_memory());
    deploy(&*registry, kl).await;
    let cluster = Cluster::start(registry.clone(), ClusterOptions::default());
    cluster.loaded().await;
    (registry, cluster)
}

async fn deploy(registry: &dyn Registry, equivalent_kl: Option<f64>) {
    let record = DeploymentRecord { equivalent_kl, ..DeploymentRecord::default() };
    registry.put(&key::deployment("acme/one"), &record::to_value(&record), None).await.unwrap();
}

async fn served(zoo: &Zoo, kl: Option<f64>) -> Digest {
    let (_registry, cluster) = deployed(kl).await;
    let view = Catalog::start(zoo.clone(), Duration::from_secs(3600), &cluster).await.view();
    let model = &view.models["acme/one"];
    assert!(view.loaded);
    assert_eq!(view.chains[&ChainDigest(model.chain_digest.0)].sized.blocks.len(), 6, "placement knows the chain that is served");
    model.chain_digest
}

/// Waits until a chain serves.
async fn comes(catalog: &Catalog, chain: Digest) {
    let is_served = |view: &Arc<CatalogView>| view.models["acme/one"].chain_digest == chain;
    tokio::time::timeout(Duration::from_secs(30), catalog.subscribe().wait_for(is_served)).await.expect("it comes").unwrap();
}

#[tokio::test]
async fn blocks_are_exchanged_as_far_as_the_deployment_allows() {
    let folder = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(folder.path()).await.unwrap();
    let (one, two) = (stored_chain(&zoo, 1).await, stored_chain(&zoo, 2).await);
    let (exact, other) = (name(&zoo, "acme/one", &one).await, name(&zoo, "acme/two", &two).await);
    let (digest, [first, both]) = record(&zoo, (&one, exact), "acme/two", (&two, other)).await;
    for kl in [None, Some(0.0), Some(-1.0), Some(0.005)] {
        assert_eq!(served(&zoo, kl).await, exact, "bound {kl:?}: a record alone changes nothing");
    }
    for (kl, expected) in [(0.01, first), (0.02, first), (0.03, both), (1.0, both)] {
        assert_eq!(served(&zoo, Some(kl)).await, expected, "bound {kl}");
    }

    // A deployment that changes is obeyed at once, and so is a record that goes at the next look.
    let (registry, cluster) = deployed(None).await;
    let catalog = Catalog::start(zoo.clone(), Duration::from_secs(3600), &cluster).await;
    assert_eq!(catalog.view().models["acme/one"].chain_digest, exact);
    deploy(&*registry, Some(0.02)).await;
    comes(&catalog, first).await;
    assert_eq!(catalog.view().models["acme/two"].chain_digest, other, "the other model did not ask for it");
    zoo.remove_equivalence(digest).await.unwrap();
    catalog.refresh().await.unwrap();
    assert_eq!(catalog.view().models["acme/one"].chain_digest, exact);
}

#[tokio::test]
async fn nothing_is_planned_before_deployments_are_known() {
    let folder = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(folder.path()).await.unwrap();
    let one = stored_chain(&zoo, 1).await;
    let exact = name(&zoo, "acme/one", &one).await;
    // Not followed yet: the watch begins with the runtime's next turn.
    let cluster = Cluster::start(Arc::new(Embedded::in_memory()), ClusterOptions::default());
    assert!(!cluster.state().loaded);
    let catalog = Catalog::start(zoo, Duration::from_secs(3600), &cluster).await;
    let mut views = catalog.subscribe();
    let view = tokio::time::timeout(Duration::from_secs(30), views.wait_for(|view| view.loaded)).await.expect("it is read").unwrap();
    assert!(cluster.state().loaded);
    assert_eq!(view.models["acme/one"].chain_digest, exact);
}

#[tokio::test]
async fn another_tenants_blocks_stand_in_only_while_it_is_public() {
    let folder = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(folder.path()).await.unwrap();
    let (one, two) = (stored_chain(&zoo, 1).await, stored_chain(&zoo, 2).await);
    let (exact, other) = (name(&zoo, "acme/one", &one).await, name(&zoo, "other/two", &two).await);
    let (_, [_, both]) = record(&zoo, (&one, exact), "other/two", (&two, other)).await;
    assert_eq!(served(&zoo, Some(1.0)).await, exact);
    zoo.update_domains(|domains| domains.public.extend(["other".to_owned()])).await.unwrap();
    assert_eq!(served(&zoo, Some(1.0)).await, both);
    zoo.update_domains(|domains| domains.public.clear()).await.unwrap();
    assert_eq!(served(&zoo, Some(1.0)).await, exact);
}
