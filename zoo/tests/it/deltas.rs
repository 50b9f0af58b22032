//! A fine-tune as base and compressed differences: proposed, stored, read back, shown, exported where that can be, and refused by name.

use crate::support::{Checkpoint, add_dir};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::export::export;
use ashlar_zoo::gc;
use ashlar_zoo::ingest::{Recipe, Silent};
use ashlar_zoo::measures::{Divergence, Measure};
use ashlar_zoo::relatives::{Compressed, Kept, Method, compress};
use ashlar_zoo::store::{MappedChange, Zoo};
use ashlar_zoo::verify::verify;

/// `demo/base`, and `demo/tuned` that differs from it everywhere a little.
async fn zoo(dir: &std::path::Path) -> Zoo {
    let zoo = Zoo::create_dir(&dir.join("zoo")).await.unwrap();
    Checkpoint::llama(1).write(&dir.join("base"));
    Checkpoint::llama(1).nudge(0.02, 9).write(&dir.join("tuned"));
    add_dir(&zoo, &dir.join("base"), "demo/base", Recipe::Keep).await.unwrap();
    add_dir(&zoo, &dir.join("tuned"), "demo/tuned", Recipe::Keep).await.unwrap();
    zoo
}

async fn compressed(zoo: &Zoo, method: &str, kept: Kept) -> Compressed {
    let viewer = zoo.viewer("demo").await.unwrap();
    let method = method.parse().unwrap();
    compress(zoo, ("demo", &viewer), &"demo/tuned".parse().unwrap(), None, (method, kept)).await.unwrap()
}

fn measure(against: Digest) -> Measure {
    let kl = Divergence { mean: 0.01, p99: 0.2, max: 0.5 };
    let text = Digest::of(b"text");
    let (perplexity, perplexity_of_source) = (20.4, 20.0);
    Measure {
        method: "bitdelta".to_owned(),
        against,
        text,
        rows: 63,
        kl,
        same_top_share: 0.97,
        perplexity,
        perplexity_of_source,
        created_ms: 1,
    }
}

#[tokio::test]
async fn a_fine_tune_becomes_its_base_and_one_bit_a_weight() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = zoo(dir.path()).await;
    let objects = verify(&zoo, &Silent).await.unwrap().object_count;
    let found = compressed(&zoo, "bitdelta", Kept::default()).await;
    assert_eq!(verify(&zoo, &Silent).await.unwrap().object_count, objects, "nothing is written yet");
    assert_eq!((found.method, found.matrices.len()), (Method::BitDelta, 14));
    assert!(found.matrices.iter().all(|matrix| (0.015..0.025).contains(&matrix.relative_rms)), "{:?}", found.matrices);
    // Uniform differences: a sign and the mean size leave a quarter of the square.
    assert!(found.matrices.iter().all(|matrix| (0.4..0.6).contains(&matrix.lost)), "{:?}", found.matrices);
    let given_up: Vec<_> = found.given_up.iter().map(|(index, role)| (*index, role.as_str())).collect();
    let norms = (1..5).map(|index| (index, "norm.weight"));
    let expected: Vec<_> = [(0, "token.weight")].into_iter().chain(norms).chain([(5, "norm.weight"), (5, "output.weight")]).collect();
    assert_eq!(given_up, expected);
    assert!(found.own.is_empty());
    // f32 before; a bit a weight and a scale of two bytes for each row after, as no row is longer than a group.
    let tensors = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3) + 5 * 64 + 2 * 270 * 64;
    let weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3);
    let rows = 2 * (64 * 2 + 32 * 2 + 96 * 2 + 64);
    assert_eq!((found.adapted.bytes_before, found.adapted.bytes_after), (4 * tensors, weights / 8 + 2 * rows));

    let (name, source) = ("demo/bits".parse().unwrap(), zoo.read_model(&"demo/tuned".parse().unwrap()).await.unwrap().chain);
    let chain = found.adapted.store(&zoo, &name, 1, Some(&measure(source))).await.unwrap();
    let stored = zoo.resolve(&name).await.unwrap();
    let base = zoo.resolve(&"demo/base".parse().unwrap()).await.unwrap();
    assert_eq!(stored.chain.blocks, base.chain.blocks, "every block is the base's own");
    assert_eq!((stored.name.parent.as_deref(), stored.adapters.len()), (Some("demo/base"), 4));
    for adapter in &stored.chain.adapters {
        let mapped = zoo.map_adapter(adapter.digest).await.unwrap();
        assert!(mapped.changes.values().all(|change| matches!(change, MappedChange::OneBit { .. })));
    }
    let sketch = zoo.read_sketch(chain).await.unwrap().unwrap();
    assert_eq!(zoo.make_sketch(chain).await.unwrap(), sketch);
    let shown = zoo.show(&name).await.unwrap();
    assert_eq!(shown.measures, [measure(source)]);
    let adapter = shown.blocks[1].adapter.as_ref().unwrap();
    assert_eq!((adapter.one_bit.len(), adapter.ranks.len()), (4, 0));
    assert_eq!(shown.adapter_bytes, found.adapted.bytes_after);
    let report = verify(&zoo, &Silent).await.unwrap();
    assert_eq!((report.damage.len(), report.unreferenced_count), (0, 0));
    assert_eq!(gc::collect(&zoo, std::time::Duration::ZERO, false).await.unwrap(), gc::GcReport::default());

    let error = export(&zoo, &name, &dir.path().join("out")).await.unwrap_err().to_string();
    assert!(error.contains("is its base's and a one-bit delta, which no Hugging Face directory can say"), "{error}");
    assert!(!dir.path().join("out").exists());

    // Damage names the adapter and the place.
    let signs = &stored.adapters[&1].changes["q.weight"];
    let digest = signs.tensors().next().unwrap().1.digest.to_string();
    std::fs::remove_file(dir.path().join("zoo/tensors").join(&digest[..2]).join(&digest)).unwrap();
    let error = zoo.map_adapter(stored.chain.adapters[0].digest).await.unwrap_err().to_string();
    assert!(error.contains("(`q.weight.signs` of adapter ") && error.ends_with("is not in the zoo"), "{error}");
}

#[tokio::test]
async fn singular_values_are_an_adapter_that_peft_can_have() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = zoo(dir.path()).await;
    let lost = async |rank: usize| {
        let found = compressed(&zoo, &format!("svd:{rank}"), Kept::default()).await;
        let mean = found.matrices.iter().map(|matrix| matrix.lost).sum::<f64>() / found.matrices.len() as f64;
        (found.adapted.bytes_after, mean)
    };
    let (few, more, all) = (lost(4).await, lost(16).await, lost(64).await);
    assert!(few.0 < more.0 && more.0 < all.0, "{few:?} {more:?} {all:?}");
    assert!(few.1 > more.1 && more.1 > 0.3 && all.1 < 0.01, "{few:?} {more:?} {all:?}");

    let name = "demo/low".parse().unwrap();
    compressed(&zoo, "svd:4", Kept::default()).await.adapted.store(&zoo, &name, 1, None).await.unwrap();
    let directory = dir.path().join("peft");
    export(&zoo, &name, &directory).await.unwrap();
    assert!(directory.join("adapter_model.safetensors").exists());
}

#[tokio::test]
async fn blocks_that_are_kept_are_the_models_own_and_a_longer_table_always_is() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = zoo(dir.path()).await;
    let tuned = zoo.resolve(&"demo/tuned".parse().unwrap()).await.unwrap();
    let base = zoo.resolve(&"demo/base".parse().unwrap()).await.unwrap();
    let kept = compressed(&zoo, "bitdelta", Kept { embed: false, head: true }).await;
    assert_eq!(kept.adapted.chain.blocks[5], tuned.chain.blocks[5]);
    assert_eq!(kept.adapted.chain.blocks[..5], base.chain.blocks[..5]);
    let own: Vec<_> = kept.own.iter().map(|(index, role)| (*index, role.as_str())).collect();
    assert_eq!(own, [(5, "norm.weight"), (5, "output.weight")]);
    assert_eq!(kept.kept.to_string(), "head");

    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.nudge(0.02, 9);
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let (shape, values) = checkpoint.tensors.get_mut(name).unwrap();
        shape[0] += 2;
        values.extend(vec![0.5; 2 * crate::support::D]);
    }
    checkpoint.config["vocab_size"] = (crate::support::VOCAB + 2).into();
    checkpoint.write(&dir.path().join("grown"));
    add_dir(&zoo, &dir.path().join("grown"), "demo/grown", Recipe::Keep).await.unwrap();
    let viewer = zoo.viewer("demo").await.unwrap();
    let (model, base) = ("demo/grown".parse().unwrap(), "demo/base".parse().unwrap());
    let grown = compress(&zoo, ("demo", &viewer), &model, Some(&base), (Method::BitDelta, Kept::default())).await.unwrap();
    let own: Vec<_> = grown.own.iter().map(|(index, role)| (*index, role.as_str())).collect();
    assert_eq!(own, [(0, "token.weight"), (5, "output.weight")]);
    let chain = grown.adapted.store(&zoo, &"demo/grown-bits".parse().unwrap(), 1, None).await.unwrap();
    assert_eq!(zoo.read_chain(chain).await.unwrap().vocab as usize, crate::support::VOCAB + 2);
    assert!(verify(&zoo, &Silent).await.unwrap().damage.is_empty());
}

#[tokio::test]
async fn what_cannot_be_compressed_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = zoo(dir.path()).await;
    let refused = async |tenant: &str, model: &str, base: Option<&str>| {
        let viewer = zoo.viewer(tenant).await.unwrap();
        let base = base.map(|base| base.parse().unwrap());
        let how = (Method::BitDelta, Kept::default());
        compress(&zoo, (tenant, &viewer), &model.parse().unwrap(), base.as_ref(), how).await.unwrap_err().to_string()
    };
    assert!(refused("rival", "demo/tuned", None).await.starts_with("demo/tuned is not rival's to see: "));
    let same = refused("demo", "demo/base", Some("demo/base")).await;
    assert_eq!(same, "no matrix of demo/base differs from one of demo/base that has its shape");
    let found = compressed(&zoo, "bitdelta", Kept::default()).await;
    let name = "demo/bits".parse().unwrap();
    found.adapted.store(&zoo, &name, 1, None).await.unwrap();
    let again = found.adapted.store(&zoo, &name, 1, None).await.unwrap_err().to_string();
    assert_eq!(again, "demo/bits exists: give another name with --name");
    assert_eq!(refused("demo", "demo/bits", None).await, "demo/bits has adapters: it is base and adapter already");
    let over = refused("demo", "demo/tuned", Some("demo/bits")).await;
    assert_eq!(over, "demo/bits has adapters, so nothing can lie over it");
}
