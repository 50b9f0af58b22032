//! Names that are listed again and again in a store whose requests cost: one that did not change is read once.

use std::sync::{Arc, Mutex};

use crate::scripted::{ScriptedStore, Verdict};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::ModelName;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::{KnownNames, StoreError, Zoo};
use bytes::Bytes;
use futures::FutureExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, PutOptions};

fn id(name: &str) -> ModelId {
    name.parse().unwrap()
}

fn name(chain: u8) -> ModelName {
    ModelName { chain: Digest([chain; 32]), created_ms: 1, parent: None, history: Vec::new(), loaded: false }
}

#[tokio::test]
async fn a_name_is_read_again_when_it_changed() {
    let (inner, asked) = (Arc::new(InMemory::new()), Arc::new(Mutex::new(Vec::new())));
    let log = asked.clone();
    let script = move |key| {
        log.lock().unwrap().push(key);
        async { Verdict::Done }.boxed()
    };
    Zoo::create(inner.clone(), "memory").await.unwrap();
    let zoo = Zoo::open(Arc::new(ScriptedStore::new(inner.clone(), script)), "memory").await.unwrap();
    for (model, chain) in [("demo/a", 1), ("demo/b", 2)] {
        zoo.set_model(&id(model), None, &name(chain)).await.unwrap();
    }
    inner.put_opts(&Path::from("models/demo/broken.json"), Bytes::from_static(b"{").into(), PutOptions::default()).await.unwrap();
    let mut known = KnownNames::default();
    let mut list = async || {
        asked.lock().unwrap().clear();
        let listed = zoo.list_changed(&mut known).await.unwrap();
        assert_eq!(format!("{listed:?}"), format!("{:?}", Zoo::open(inner.clone(), "memory").await.unwrap().list_models().await.unwrap()));
        let chains: Vec<_> =
            listed.iter().map(|(id, name)| (id.name().to_owned(), name.as_ref().ok().map(|name| name.chain.0[0]))).collect();
        (chains, asked.lock().unwrap().clone())
    };
    let all = ["models", "models/demo/a.json", "models/demo/b.json", "models/demo/broken.json"];
    let of = |names: &[(&str, Option<u8>)]| names.iter().map(|(name, chain)| ((*name).to_owned(), *chain)).collect::<Vec<_>>();
    assert_eq!(list().await, (of(&[("a", Some(1)), ("b", Some(2)), ("broken", None)]), all.map(str::to_owned).to_vec()));
    assert_eq!(list().await.1, [all[0], all[3]], "one that cannot be read is tried again");
    zoo.set_model(&id("demo/b"), Some(&name(2)), &name(3)).await.unwrap();
    assert_eq!(
        list().await,
        (of(&[("a", Some(1)), ("b", Some(3)), ("broken", None)]), vec![all[0].to_owned(), all[2].to_owned(), all[3].to_owned()])
    );
    zoo.remove_model(&id("demo/a")).await.unwrap();
    assert_eq!(list().await.0, of(&[("b", Some(3)), ("broken", None)]));
    assert!(matches!(zoo.read_model(&id("demo/a")).await, Err(StoreError::Missing { .. })));
}
