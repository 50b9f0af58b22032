//! The planner over a real zoo and an embedded registry: who is there and what is named becomes a plan.

use ashlar_registry::embedded::Embedded;
use ashlar_registry::record::ExecutorRecord;
use ashlar_wire::id::ExecutorId;
use ashlar_zoo::manifest::{Chain, ModelName};
use ashlar_zoo::store::Zoo;
use serde_json::json;

use super::*;
use crate::io::cluster::ClusterOptions;
use crate::io::testing::{stored_chain, stored_chain_of};

struct World {
    registry: Arc<dyn Registry>,
    zoo: Zoo,
    catalog: Arc<Catalog>,
    cluster: Arc<Cluster>,
    _directory: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let registry: Arc<dyn Registry> = Arc::new(Embedded::in_memory());
        let directory = tempfile::tempdir().unwrap();
        let zoo = Zoo::create_dir(directory.path()).await.unwrap();
        let options = ClusterOptions { departed_keep: Duration::from_millis(300), ..ClusterOptions::default() };
        let cluster = Cluster::start(registry.clone(), options);
        let catalog = Catalog::start(zoo.clone(), Duration::from_millis(50), &cluster).await;
        Self { registry, zoo, catalog, cluster, _directory: directory }
    }

    fn planner(&self, router: &str) -> Planner {
        self.planner_of(router, PlanPolicy::default())
    }

    fn planner_of(&self, router: &str, policy: PlanPolicy) -> Planner {
        let options = PlannerOptions {
            policy,
            election_ttl: Duration::from_secs(2),
            settle: Duration::from_millis(20),
            return_wait: Duration::from_millis(300),
        };
        Planner::start(self.registry.clone(), self.cluster.clone(), self.catalog.clone(), &RouterId(router.to_owned()), options)
    }

    /// A model of two layers; blocks are distinct by seed, of 4,000 bytes each.
    async fn name_model(&self, name: &str, seed: u8) -> ashlar_registry::ChainDigest {
        self.name_chain(name, stored_chain(&self.zoo, seed).await).await
    }

    async fn name_chain(&self, name: &str, chain: Chain) -> ashlar_registry::ChainDigest {
        let chain = self.zoo.put_chain(&chain).await.unwrap().0;
        let model = ModelName { chain, created_ms: 5000, parent: Some("public/root".to_owned()), history: vec![], loaded: false };
        self.zoo.set_model(&name.parse().unwrap(), None, &model).await.unwrap();
        ashlar_registry::ChainDigest(chain.0)
    }

    async fn join(&self, name: &str, memory_bytes: u64) -> ExecutorRecord {
        let record = ExecutorRecord {
            id: ExecutorId(name.to_owned()),
            address: "a:1".to_owned(),
            device: "test".to_owned(),
            profiled_on: "test-cpu".to_owned(),
            numeric_class: "cpu".to_owned(),
            memory_bytes,
            kv_bytes: 0,
            threads: 1,
            spans: vec![],
            plan_generation: 0,
            draining: false,
            incarnation: 1,
        };
        self.registry.put(&key::executor(&record.id), &record::to_value(&record), None).await.unwrap();
        record
    }

    async fn plan_where(&self, holds: impl Fn(&Plan) -> bool) -> Plan {
        let mut states = self.cluster.subscribe();
        let found = tokio::time::timeout(Duration::from_secs(20), states.wait_for(|state| holds(&state.plan))).await;
        found.expect("in time").unwrap().plan.clone()
    }
}

fn holder_names(plan: &Plan, chain: ashlar_registry::ChainDigest) -> Vec<&str> {
    let holds = plan.assignments.iter().filter(|(_, spans)| spans.iter().any(|span| span.chain == chain));
    holds.map(|(id, _)| id.0.as_str()).collect()
}

#[tokio::test]
async fn plan_follows_executors_and_names() {
    let world = World::new().await;
    let planner = world.planner("rtr_1");
    let one = world.name_model("public/one", 1).await;
    world.catalog.refresh().await.unwrap();
    let view = world.catalog.view();
    let model = &view.models["public/one"];
    assert_eq!((model.created_s, model.root.as_deref(), model.parent.as_deref()), (5, None, None), "its parent is not there");
    let sized = &view.chains[&one].sized;
    assert_eq!((sized.blocks.len(), sized.blocks[0].bytes, sized.borders.as_slice()), (6, 4000, &[3][..]));

    let plan = world.plan_where(|plan| plan.unplaced.contains_key(&one)).await;
    assert_eq!(plan.unplaced[&one], "no executor is registered");
    world.join("exe_a", 50_000).await;
    let plan = world.plan_where(|plan| holder_names(plan, one) == ["exe_a"]).await;
    assert!(plan.unplaced.is_empty());

    world.join("exe_b", 50_000).await;
    let two = world.name_model("public/two", 2).await;
    let next = world.plan_where(|plan| !holder_names(plan, two).is_empty()).await;
    assert!(next.generation > plan.generation);
    assert_eq!(holder_names(&next, one), ["exe_a"]);

    world.registry.delete("executors/exe_a").await.unwrap();
    world.plan_where(|plan| holder_names(plan, one) == ["exe_b"] && holder_names(plan, two) == ["exe_b"]).await;
    planner.resign().await.unwrap();
}

#[tokio::test]
async fn plan_that_was_lost_is_made_again_from_what_executors_hold() {
    let world = World::new().await;
    let one = world.name_model("public/one", 1).await;
    world.join("exe_a", 50_000).await;
    let mut held = world.join("exe_b", 50_000).await;
    held.spans = vec![record::SpanAssignment { chain: one, from: 0, to: 6 }];
    held.plan_generation = 40;
    world.registry.put("executors/exe_b", &record::to_value(&held), None).await.unwrap();
    world.catalog.refresh().await.unwrap();
    let seen = |state: &ClusterState| state.executors.get(&held.id).is_some_and(|record| record.plan_generation == 40);
    world.cluster.subscribe().wait_for(|state| seen(state)).await.unwrap();
    let _planner = world.planner("rtr_1");
    let plan = world.plan_where(|plan| plan.generation > 0).await;
    assert_eq!(holder_names(&plan, one), ["exe_b"], "nothing moves");
    assert_eq!(plan.generation, 40, "as the executor saw it, or it would not obey");
}

#[tokio::test]
async fn next_router_takes_over_and_waits_for_executors_to_return() {
    let world = World::new().await;
    let one = world.name_model("public/one", 1).await;
    world.catalog.refresh().await.unwrap();
    let first = world.planner("rtr_1");
    let record = world.join("exe_a", 50_000).await;
    let plan = world.plan_where(|plan| !holder_names(plan, one).is_empty()).await;
    let _second = world.planner("rtr_2");
    world.join("exe_b", 50_000).await;
    world.registry.delete("executors/exe_a").await.unwrap();
    first.resign().await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    world.registry.put("executors/exe_a", &record::to_value(&record), None).await.unwrap();
    world.name_model("public/two", 2).await;
    let next = world.plan_where(|next| next.generation > plan.generation).await;
    assert_eq!(holder_names(&next, one), ["exe_a"]);
    assert_eq!(world.registry.get(key::LEADER).await.unwrap().unwrap().value, "rtr_2");
}

#[tokio::test]
async fn ancestors_are_named_while_they_are_there() {
    let world = World::new().await;
    for (name, tag) in [("public/one", 1), ("public/root", 2)] {
        world.name_model(name, tag).await;
    }
    let named = async || {
        world.catalog.refresh().await.unwrap();
        let view = world.catalog.view();
        (view.models["public/one"].root.clone(), view.models["public/one"].parent.clone())
    };
    let root = Some("public/root".to_owned());
    assert_eq!(named().await, (root.clone(), root));
    world.zoo.remove_model(&"public/root".parse().unwrap()).await.unwrap();
    assert_eq!(named().await, (None, None));
}

#[tokio::test]
async fn chains_are_cut_where_their_time_is_halved_if_all_blocks_were_profiled() {
    let world = World::new().await;
    // Three layers; the last block takes the longest.
    let named = async |name: &str, seed: u8| {
        let chain = stored_chain_of(&world.zoo, seed, "EAFAFAFH").await;
        (chain.blocks.clone(), world.name_chain(name, chain).await)
    };
    let ((blocks, known), (mut others, unknown)) = (named("public/known", 1).await, named("public/unknown", 11).await);
    // Of the other one a block is missing, and one is no profile.
    others.pop();
    for (block, micros) in std::iter::zip([blocks, others.clone()].concat(), [1, 1, 1, 9, 1, 1, 1, 20].into_iter().cycle()) {
        let profile = json!({
            "block": block, "device": "test-cpu", "kv_format": "f32", "version": "0.1.0", "created_ms": 1, "context_tokens": 256,
            "sequences_max": 32, "points": [{"rows": 1, "micros": micros, "runs": 7}, {"rows": 64, "micros": micros, "runs": 7}],
        });
        world.zoo.put_profile(&serde_json::from_value(profile).unwrap()).await.unwrap();
    }
    std::fs::write(world._directory.path().join(format!("profiles/{}/test-cpu.json", others[2])), "no profile").unwrap();
    world.catalog.refresh().await.unwrap();
    for executor in ["exe_a", "exe_b"] {
        world.join(executor, 100_000).await;
    }
    world.cluster.subscribe().wait_for(|state| state.executors.len() == 2).await.unwrap();
    let planner = world.planner_of("rtr_1", PlanPolicy { spans_per_chain: 2, replicas: 1 });
    let plan = world.plan_where(|plan| holder_names(plan, known).len() == 2 && holder_names(plan, unknown).len() == 2).await;
    let cut = |chain| plan.assignments.values().flatten().filter(|span| span.chain == chain).map(|span| span.from).max();
    assert_eq!((cut(known), cut(unknown)), (Some(5), Some(3)), "by time, and by bytes");
    planner.resign().await.unwrap();
}
