//! What must be true of a zoo after any fault.

use std::sync::Arc;

use ashlar_zoo::ingest::Silent;
use ashlar_zoo::store::Zoo;
use ashlar_zoo::verify::verify;
use object_store::memory::InMemory;

/// Everything is sound, and every name resolves with its weights.
pub(crate) async fn assert_sound(inner: &Arc<InMemory>, when: &str) {
    let zoo = Zoo::open(inner.clone(), "memory").await.unwrap();
    let report = verify(&zoo, &Silent).await.unwrap();
    assert!(report.damage.is_empty(), "{when}: {:?}", report.damage);
    for (id, _) in zoo.list_models().await.unwrap() {
        let model = zoo.resolve(&id).await.unwrap_or_else(|e| panic!("{when}: {e}"));
        for block in &model.chain.blocks {
            zoo.map_block(*block).await.unwrap_or_else(|e| panic!("{when}: {e}"));
        }
        for adapter in &model.chain.adapters {
            zoo.map_adapter(adapter.digest).await.unwrap_or_else(|e| panic!("{when}: {e}"));
        }
    }
}
