//! The catalog over a real zoo: borders of layers, and which chain a model is served by.

use ashlar_zoo::equivalence::{Divergence, METHOD, Step, exchanged};
use ashlar_zoo::manifest::{Assets, Defaults, Tokens};
use serde_json::json;

use super::*;

#[test]
fn borders_lie_between_layers() {
    assert_eq!(borders(2), Vec::<u32>::new());
    assert_eq!(borders(4), Vec::<u32>::new());
    assert_eq!(borders(6), [3]);
    assert_eq!(borders(10), [3, 5, 7]);
}

async fn chain(zoo: &Zoo, seed: u8) -> Chain {
    let mut blocks = Vec::new();
    for index in 0..6u8 {
        let tensor = json!({"digest": Digest::of(&[seed, index]), "dtype": "f32", "shape": [250, 4]});
        let block = json!({"width": 4, "params": {"kind": "embed", "scale": 1.0}, "tensors": {"token.weight": tensor}});
        blocks.push(zoo.put_block(&serde_json::from_value(block).unwrap()).await.unwrap().0);
    }
    Chain {
        format: 1,
        architecture: "llama".to_owned(),
        width: 4,
        vocab: 250,
        context_tokens: 64,
        blocks,
        adapters: vec![],
        assets: Assets::default(),
        tokens: Tokens::default(),
        defaults: Defaults::default(),
        licence: None,
        source: "test".to_owned(),
    }
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
        let figures = Divergence { rows: 63, kl, kl_p99: kl, kl_max: kl, same_top_share: 0.99 };
        let (own, other) = (one.0.blocks[index], others.0.blocks[index]);
        steps.push(Step { block_index, own, other, cosine: 0.99, alone: figures, together: figures, chain });
    }
    let chains = [steps[0].chain, steps[1].chain];
    let (model, other, text) = ("acme/one".to_owned(), other.to_owned(), Digest::of(b"text"));
    let (method, chain, other_chain) = (METHOD.to_owned(), one.1, others.1);
    let record = Equivalence { format: 1, method, model, chain, other, other_chain, text, created_ms: 5, steps };
    (zoo.put_equivalence(&record).await.unwrap().0, chains)
}

async fn served(zoo: &Zoo, policy: Policy) -> Digest {
    let catalog = Catalog::start(zoo.clone(), Duration::from_secs(3600), policy).await;
    let view = catalog.view();
    let model = &view.models["acme/one"];
    assert!(view.chains.contains_key(&ChainDigest(model.chain_digest.0)), "placement knows the chain that is served");
    assert_eq!(view.chains[&ChainDigest(model.chain_digest.0)].sized.blocks.len(), 6);
    model.chain_digest
}

#[tokio::test]
async fn blocks_are_exchanged_as_far_as_the_policy_allows_and_no_longer_than_the_record_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(folder.path()).await.unwrap();
    let (one, two) = (chain(&zoo, 1).await, chain(&zoo, 2).await);
    let (exact, other) = (name(&zoo, "acme/one", &one).await, name(&zoo, "acme/two", &two).await);
    let (digest, [first, both]) = record(&zoo, (&one, exact), "acme/two", (&two, other)).await;

    assert_eq!(served(&zoo, Policy::Exact).await, exact, "a record alone changes nothing");
    for (kl_max, expected) in [(0.005, exact), (0.01, first), (0.02, first), (0.03, both), (1.0, both)] {
        assert_eq!(served(&zoo, Policy::Equivalent { kl_max }).await, expected, "bound {kl_max}");
    }
    let catalog = Catalog::start(zoo.clone(), Duration::from_secs(3600), Policy::Equivalent { kl_max: 1.0 }).await;
    assert_eq!(catalog.view().models["acme/two"].chain_digest, other, "the other model is served as it is");
    zoo.remove_equivalence(digest).await.unwrap();
    catalog.refresh().await.unwrap();
    assert_eq!(catalog.view().models["acme/one"].chain_digest, exact);
}

#[tokio::test]
async fn another_tenants_blocks_stand_in_only_while_it_is_public() {
    let folder = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(folder.path()).await.unwrap();
    let (one, two) = (chain(&zoo, 1).await, chain(&zoo, 2).await);
    let (exact, other) = (name(&zoo, "acme/one", &one).await, name(&zoo, "other/two", &two).await);
    let (_, [_, both]) = record(&zoo, (&one, exact), "other/two", (&two, other)).await;
    let policy = Policy::Equivalent { kl_max: 1.0 };
    assert_eq!(served(&zoo, policy).await, exact);
    zoo.update_domains(|domains| domains.public.extend(["other".to_owned()])).await.unwrap();
    assert_eq!(served(&zoo, policy).await, both);
    zoo.update_domains(|domains| domains.public.clear()).await.unwrap();
    assert_eq!(served(&zoo, policy).await, exact);
}
