//! Loads and unloads over a real zoo and planner; the executor holds at once whatever the plan gives it.

use std::path::Path;

use ashlar_registry::embedded::Embedded;
use ashlar_registry::record::{self, ExecutorRecord, TenantRecord};
use ashlar_registry::{Registry, key};
use ashlar_wire::id::{ExecutorId, RouterId};
use ashlar_zoo::ingest::AddOptions;
use ashlar_zoo::store::Zoo;

use super::*;
use crate::io::backend::Backend;
use crate::io::catalog::Catalog;
use crate::io::cluster::{Cluster, ClusterOptions};
use crate::io::dispatch::DispatchOptions;
use crate::io::grpc::Clients;
use crate::io::planner::{Planner, PlannerOptions};
use crate::state::tenants::{PUBLIC, Without};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo");
const BASE: &str = "demo/base";

struct World {
    dir: tempfile::TempDir,
    registry: Arc<dyn Registry>,
    dispatch: Dispatch,
    adapters: Adapters,
    _planner: Planner,
}

/// The demo's base as `demo/base` and its adapter in the folders `one` and `again`.
async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    let options = AddOptions::new(BASE.parse().unwrap());
    ingest::add(&zoo, &Path::new(DEMO).join("base"), &options, &Silent).await.unwrap();
    let shelf = dir.path().join("shelf");
    for copy in ["one", "again", "broken"] {
        std::fs::create_dir_all(shelf.join(copy)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(Path::new(DEMO).join("names-lora").join(file), shelf.join(copy).join(file)).unwrap();
        }
    }
    std::fs::write(shelf.join("broken/adapter_model.safetensors"), "no tensors").unwrap();

    let registry: Arc<dyn Registry> = Arc::new(Embedded::in_memory());
    let executor = ExecutorRecord {
        id: ExecutorId("exe_a".to_owned()),
        address: "127.0.0.1:1".to_owned(),
        device: "obedient".to_owned(),
        profiled_on: String::new(),
        numeric_class: "cpu-v1".to_owned(),
        memory_bytes: 1 << 30,
        kv_bytes: 0,
        threads: 1,
        spans: vec![],
        plan_generation: 0,
        draining: false,
        incarnation: 1,
    };
    registry.put(&key::executor(&executor.id), &record::to_value(&executor), None).await.unwrap();
    let cluster = Cluster::start(registry.clone(), ClusterOptions { without: Without::Open, ..ClusterOptions::default() });
    cluster.loaded().await;
    let catalog = Catalog::start(zoo, Duration::from_secs(3600), &cluster).await;
    let router = RouterId("rtr_1".to_owned());
    let options = PlannerOptions { settle: Duration::from_millis(5), ..PlannerOptions::default() };
    let planner = Planner::start(registry.clone(), cluster.clone(), catalog.clone(), &router, options);
    tokio::spawn(obey(registry.clone(), cluster.clone(), executor));
    let clients = Clients::new([]);
    let dispatch = Dispatch::new(router, cluster, catalog, clients, DispatchOptions::default(), &prometheus::Registry::new()).unwrap();
    let adapters = Adapters::new(&dispatch, AdaptersDir::at(&shelf).unwrap());
    World { dir, registry, dispatch, adapters, _planner: planner }
}

async fn obey(registry: Arc<dyn Registry>, cluster: Arc<Cluster>, mut executor: ExecutorRecord) {
    let mut states = cluster.subscribe();
    while states.changed().await.is_ok() {
        let plan = states.borrow_and_update().plan.clone();
        let spans = plan.assignments.get(&executor.id).cloned().unwrap_or_default();
        if plan.generation > executor.plan_generation {
            (executor.spans, executor.plan_generation) = (spans, plan.generation);
            registry.put(&key::executor(&executor.id), &record::to_value(&executor), None).await.unwrap();
        }
    }
}

fn public() -> TenantName {
    TenantName(PUBLIC.to_owned())
}

fn adapter(name: &str, path: &str) -> NewAdapter {
    NewAdapter { name: name.to_owned(), path: path.to_owned(), base: Some(BASE.to_owned()), replaces: false }
}

impl World {
    async fn load(&self, adapter: NewAdapter) -> Result<Arc<ModelView>, ApiError> {
        self.adapters.load_adapter(&public(), adapter).await
    }

    /// Code and parameter of a load that fails.
    async fn refused(&self, adapter: NewAdapter) -> String {
        let error = self.load(adapter).await.unwrap_err();
        format!("{} {}", error.code, error.param.as_deref().unwrap_or("-"))
    }

    async fn unload(&self, name: &str) -> Result<String, ApiError> {
        self.adapters.unload_adapter(&public(), name).await
    }

    fn counted(&self, action: &str, code: &str) -> u64 {
        self.adapters.shared.adapter_changes.with_label_values(&[action, code]).get()
    }
}

#[tokio::test]
async fn what_is_loaded_is_found_at_once_and_what_is_unloaded_is_not() {
    let world = world().await;
    assert!(world.dispatch.model(&public(), "one").is_none());
    let view = world.load(adapter("one", "one")).await.unwrap();
    assert_eq!((view.id.as_str(), view.parent.as_deref()), ("public/one", Some(BASE)));
    assert!(world.dispatch.shared.assemble(&world.dispatch.shared.path(&view), None, &BTreeSet::new()).is_ok(), "it is served");
    let again = world.load(adapter("acme/again", "again")).await.unwrap();
    assert_eq!(again.chain.adapters, view.chain.adapters, "two copies are one");
    assert_eq!(world.unload("one").await.unwrap(), "public/one");
    assert!(world.dispatch.model(&public(), "public/one").is_none());
    assert!(world.dispatch.shared.catalog.view().models.contains_key("acme/again"));
    let error = world.unload("one").await.unwrap_err();
    assert_eq!((error.code, error.param.as_deref()), (Code::ModelNotFound, Some("lora_name")));
    assert_eq!((world.counted("load", "ok"), world.counted("unload", "ok"), world.counted("unload", "model_not_found")), (2, 1, 1));
}

#[tokio::test]
async fn each_refusal_names_its_code_and_parameter() {
    let world = world().await;
    world.load(adapter("one", "one")).await.unwrap();
    let of = |base: Option<&str>| NewAdapter { base: base.map(str::to_owned), ..adapter("x", "one") };
    for (asked, expected) in [
        (adapter("one", "again"), "model_exists lora_name"),
        (adapter(BASE, "one"), "model_exists lora_name"),
        (NewAdapter { replaces: true, ..adapter(BASE, "one") }, "model_exists lora_name"),
        (adapter("a b", "one"), "invalid_value lora_name"),
        (adapter("x", "../zoo"), "invalid_value lora_path"),
        (adapter("x", "none"), "invalid_value lora_path"),
        (adapter("x", "broken"), "adapter_refused lora_path"),
        (of(Some("demo/none")), "model_not_found base_model_name"),
        (of(Some("a b")), "invalid_value base_model_name"),
        (of(Some("public/one")), "adapter_refused base_model_name"),
    ] {
        assert_eq!(world.refused(asked.clone()).await, expected, "{asked:?}");
    }
    let config = world.dir.path().join("shelf/one/adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    for asked in ["null", "\"org/unknown\""] {
        std::fs::write(&config, text.replace("\"ashlar-demo/base\"", asked)).unwrap();
        assert_eq!(world.refused(of(None)).await, "adapter_refused base_model_name", "{asked}");
    }
    let error = world.unload(BASE).await.unwrap_err();
    assert_eq!((error.code, error.param.as_deref()), (Code::NotLoaded, Some("lora_name")));
    assert!(world.dispatch.shared.catalog.view().models.contains_key(BASE));
    assert_eq!(world.counted("load", "model_exists"), 3);
}

#[tokio::test]
async fn the_same_again_is_no_error_and_of_two_at_once_one_is_told() {
    let world = world().await;
    let first = world.load(adapter("one", "one")).await.unwrap();
    assert_eq!(world.load(adapter("one", "one")).await.unwrap().chain_digest, first.chain_digest);
    let (a, b) = tokio::join!(world.load(adapter("two", "one")), world.load(adapter("two", "again")));
    assert!(a.is_ok(), "they take turns: {a:?}");
    assert_eq!(b.unwrap_err().code, Code::ModelExists);
    let in_place = world.load(NewAdapter { replaces: true, ..adapter("two", "again") }).await.unwrap();
    assert_ne!(in_place.chain_digest, first.chain_digest);
    assert_eq!(world.dispatch.model(&public(), "two").unwrap().chain_digest, in_place.chain_digest);
}

#[tokio::test]
async fn administrators_alone_are_admitted_once_there_are_tenants() {
    let world = world().await;
    assert!(world.adapters.admit(&public()).is_ok(), "a server without tenants is everyone's");
    for (name, admin) in [("ops", true), ("blue", false)] {
        let record = TenantRecord { admin, ..TenantRecord::default() };
        world.registry.put(&format!("tenants/{name}"), &record::to_value(&record), None).await.unwrap();
    }
    let two = |state: &Arc<crate::io::cluster::ClusterState>| {
        ["ops", "blue"].into_iter().filter(|name| state.tenants.may_administer(&TenantName((*name).to_owned()))).count() == 1
    };
    world.dispatch.shared.cluster.subscribe().wait_for(two).await.unwrap();
    assert!(world.adapters.admit(&TenantName("ops".to_owned())).is_ok());
    for name in ["blue", PUBLIC] {
        assert_eq!(world.adapters.admit(&TenantName(name.to_owned())).unwrap_err().code, Code::Forbidden);
    }
}
