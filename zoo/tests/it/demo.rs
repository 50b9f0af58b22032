//! The demo family: what `add` reports as shared is what the way of training implies, counted by `demo/train.py` from bytes.
//! One of it is a PEFT adapter.

use std::path::Path;

use ashlar_zoo::ingest::{AddOptions, Shared, Silent, add};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::Zoo;

#[tokio::test]
async fn each_descendant_shares_what_its_training_left_alone() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo");
    let counted: serde_json::Value = serde_json::from_slice(&std::fs::read(demo.join("sharing.json")).unwrap()).unwrap();
    let mut seen = Vec::new();
    for (name, expected) in counted["descendants"].as_object().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let zoo = Zoo::create_dir(folder.path()).await.unwrap();
        let options = |name: &str| AddOptions::new(ModelId::new("demo", name).unwrap());
        let base = add(&zoo, &demo.join("base"), &options("base"), &Silent).await.unwrap();
        assert_eq!((base.blocks, base.tensors), (Shared { total: 18, present: 0 }, Shared { total: 130, present: 0 }));
        let report = add(&zoo, &demo.join(name), &options(name), &Silent).await.unwrap();
        let count = |key: &str| usize::try_from(expected[key].as_u64().unwrap()).unwrap();
        assert_eq!(
            (report.blocks.present as usize - count("blocks_adapted"), report.tensors.present as usize),
            (count("blocks_shared"), count("tensors_shared")),
            "{name}"
        );
        let own_bytes = std::fs::metadata(demo.join(name).join("adapter_model.safetensors")).map_or(0, |_| report.bytes_new);
        assert_eq!((report.adapters.total as usize, report.adapters.present), (count("blocks_adapted"), 0), "{name}");
        assert!(own_bytes < expected["own_weight_bytes"].as_u64().unwrap(), "{name}: its file has a header, too");
        seen.push((name.clone(), report.blocks.present, report.tensors.present));
    }
    seen.sort();
    let pinned = [
        ("assistant-top", 12, 82),
        ("banking-bias", 2, 74),
        ("japanese-full", 0, 0),
        ("math-lora", 14, 122),
        ("names-lora", 18, 130),
        ("phonemes-attention", 10, 98),
        ("shakespeare-top", 14, 98),
    ];
    assert_eq!(seen, pinned.map(|(name, blocks, tensors)| (name.to_owned(), blocks, tensors)));
}
