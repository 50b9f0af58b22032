//! From checkpoint to zoo and back: what is stored, what is shared, what is refused.

use crate::support::{Checkpoint, add_dir, tiny};
use ashlar_kernels::format::{Dtype, dequantise};
use ashlar_zoo::ingest::{Recipe, Shared};
use ashlar_zoo::manifest::BlockKind;
use ashlar_zoo::store::Zoo;

async fn zoo() -> (tempfile::TempDir, Zoo) {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    (dir, zoo)
}

#[tokio::test]
async fn a_checkpoint_reads_back_as_it_was() {
    let (dir, zoo) = zoo().await;
    let checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    let report = add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    assert_eq!(report.blocks, Shared { total: 6, present: 0 });
    assert_eq!(report.tensors, Shared { total: 21, present: 0 });
    let name = zoo.read_model(&"demo/a".parse().unwrap()).await.unwrap();
    let chain = zoo.read_chain(name.chain).await.unwrap();
    assert_eq!((chain.architecture.as_str(), chain.width, chain.vocab, chain.context_tokens), ("llama", 64, 270, 128));
    assert_eq!((chain.tokens.bos, chain.tokens.eos.clone()), (Some(0), vec![1]));
    assert_eq!(chain.tokens.eos_text.as_deref(), Some("</s>"));
    let template = zoo.read_asset(chain.assets.chat_template.unwrap()).await.unwrap();
    assert_eq!(template, "{{ messages }}");
    let attention = zoo.map_block(chain.blocks[3]).await.unwrap();
    assert!(matches!(attention.block.params, BlockKind::Attention { heads: 4, kv_heads: 2, head_dim: 16, .. }));
    let q = &attention.tensors["q.weight"];
    assert_eq!(dequantise(&q.view()), checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"].1);
    assert_eq!(q.as_ref().as_ptr() as usize % 64, 0);
}

#[tokio::test]
async fn a_fine_tune_stores_and_reports_only_what_is_new() {
    let (dir, zoo) = zoo().await;
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1.mlp.up_proj", 2).write(&dir.path().join("b"));
    let first = add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    let second = add_dir(&zoo, &dir.path().join("b"), "demo/b", Recipe::Keep).await.unwrap();
    assert_eq!(second.to_string(), "5 of 6 blocks, 20 of 21 tensors already here; 25 kB new of 385 kB, stored as 20 kB");
    assert_eq!(second.bytes_total, first.bytes_total);
    let again = add_dir(&zoo, &dir.path().join("b"), "demo/b", Recipe::Keep).await.unwrap();
    assert_eq!((again.bytes_new, again.replaced, again.blocks.present), (0, None, 6));
    // Under another name nothing is stored but the name.
    let other = add_dir(&zoo, &dir.path().join("b"), "demo/c", Recipe::Keep).await.unwrap();
    assert_eq!((other.chain, other.bytes_new), (second.chain, 0));
}

#[tokio::test]
async fn quantising_keeps_shared_what_was_shared() {
    let (dir, zoo) = zoo().await;
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1.mlp.up_proj", 2).write(&dir.path().join("b"));
    for (recipe, linear, table) in [
        (Recipe::Int8, Dtype::Int8 { group: 32 }, Dtype::Int8 { group: 32 }),
        (Recipe::Int4, Dtype::Int4 { group: 32 }, Dtype::Int8 { group: 32 }),
        (Recipe::Bf16, Dtype::Bf16, Dtype::Bf16),
        (Recipe::F32, Dtype::F32, Dtype::F32),
    ] {
        let (a, b) = (format!("a/a-{recipe:?}"), format!("a/b-{recipe:?}"));
        add_dir(&zoo, &dir.path().join("a"), &a, recipe).await.unwrap();
        let second = add_dir(&zoo, &dir.path().join("b"), &b, recipe).await.unwrap();
        assert_eq!((second.tensors.present, second.blocks.present), (20, 5), "{recipe:?}");
        let chain = zoo.read_chain(second.chain).await.unwrap();
        let block = zoo.read_block(chain.blocks[2]).await.unwrap();
        assert_eq!(block.tensors["down.weight"].dtype, linear);
        assert_eq!(block.tensors["norm.weight"].dtype, Dtype::F32);
        assert_eq!(zoo.read_block(chain.blocks[0]).await.unwrap().tensors["token.weight"].dtype, table);
    }
}

#[tokio::test]
async fn a_tied_head_is_the_embeddings_own_tensor_in_every_recipe() {
    let (dir, zoo) = zoo().await;
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.config["tie_word_embeddings"] = true.into();
    checkpoint.tensors.remove("lm_head.weight");
    checkpoint.write(&dir.path().join("a"));
    for recipe in [Recipe::Keep, Recipe::Int8, Recipe::Int4] {
        let report = add_dir(&zoo, &dir.path().join("a"), "demo/a", recipe).await.unwrap();
        assert_eq!(report.tensors.total, 20);
        let chain = zoo.read_chain(report.chain).await.unwrap();
        let embed = zoo.read_block(chain.blocks[0]).await.unwrap();
        let head = zoo.read_block(*chain.blocks.last().unwrap()).await.unwrap();
        assert_eq!(embed.tensors["token.weight"], head.tensors["output.weight"]);
    }
    // The name has a history of the chains it pointed to.
    assert_eq!(zoo.read_model(&"demo/a".parse().unwrap()).await.unwrap().history.len(), 2);
}

#[tokio::test]
async fn every_tiny_model_is_taken() {
    let (_dir, zoo) = zoo().await;
    let mut taken = 0;
    for entry in std::fs::read_dir(tiny()).expect("the tiny models are in the repository") {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let gguf = path.join("model.gguf");
        if !path.is_dir() {
            continue; // Data that belongs to no one model.
        }
        let source = if gguf.exists() { gguf } else { path };
        for recipe in [Recipe::Keep, Recipe::F32, Recipe::Int8, Recipe::Int4] {
            let model = format!("{name}/{recipe:?}");
            let report = add_dir(&zoo, &source, &model, recipe).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
            let chain = zoo.read_chain(report.chain).await.unwrap();
            for block in &chain.blocks {
                zoo.map_block(*block).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
            }
        }
        taken += 1;
    }
    assert!(taken >= 15, "only {taken}");
}
