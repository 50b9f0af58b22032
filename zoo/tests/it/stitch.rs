//! A chain of two models of other widths and a map between: what it shares, who may make it where, and what does not fit.

use ashlar_zoo::diff::Diff;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::export::export;
use ashlar_zoo::ingest::{AddOptions, Recipe as Ingest, Silent, add};
use ashlar_zoo::manifest::{Chain, ModelName};
use ashlar_zoo::quantise::{Draft, Form, Recipe};
use ashlar_zoo::stitch::{LinearMap, Seam, StitchError};
use ashlar_zoo::store::Zoo;
use ashlar_zoo::verify::verify;

use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, VOCAB, add_dir, make_public, tokenizer};

const WIDE: usize = 96;

struct Fixture {
    dir: tempfile::TempDir,
    zoo: Zoo,
}

impl Fixture {
    /// A zoo with a narrow model of two layers and a wide one of three, of one tokenizer.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
        let fixture = Self { dir, zoo };
        fixture.add(&Checkpoint::llama(1), "demo/narrow").await;
        fixture.add(&Checkpoint::sized(2, [WIDE, 3, VOCAB]), "demo/wide").await;
        fixture
    }

    async fn add(&self, checkpoint: &Checkpoint, name: &str) -> Digest {
        let path = self.path(name);
        checkpoint.write(&path);
        add_dir(&self.zoo, &path, name, Ingest::Keep).await.unwrap().chain
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name.replace('/', "-"))
    }

    async fn seam(&self, a: &str, b: &str, from: usize, to: usize) -> Result<Seam, StitchError> {
        let (a, b) = (self.zoo.resolve(&a.parse().unwrap()).await?, self.zoo.resolve(&b.parse().unwrap()).await?);
        Seam::new(a, b, from, to)
    }

    async fn stored(&self, a: &str, b: &str, cuts: (usize, usize), name: &str) -> Result<Digest, StitchError> {
        let (seam, name) = (self.seam(a, b, cuts.0, cuts.1).await?, name.parse().unwrap());
        seam.check_name(&self.zoo, &name).await?;
        let [inputs, outputs] = seam.widths();
        let map =
            LinearMap { inputs, outputs, weight: vec![0.5; inputs * outputs], bias: vec![0.25; outputs], position: vec![0.125; outputs] };
        seam.joined(&map)?.store(&self.zoo, &name, 7, None).await
    }

    async fn read(&self, name: &str) -> (Chain, Vec<&'static str>) {
        let shown = self.zoo.show(&name.parse().unwrap()).await.unwrap();
        (shown.chain, shown.blocks.iter().map(|block| block.kind).collect())
    }
}

#[tokio::test]
async fn all_but_the_map_is_the_two_models_own() {
    let fixture = Fixture::new().await;
    fixture.stored("demo/narrow", "demo/wide", (1, 1), "demo/both").await.unwrap();
    let ((narrow, _), (wide, _), (both, kinds)) =
        (fixture.read("demo/narrow").await, fixture.read("demo/wide").await, fixture.read("demo/both").await);
    assert_eq!(kinds, ["embed", "attention", "feed_forward", "stitch", "attention", "feed_forward", "attention", "feed_forward", "head"]);
    assert_eq!((&both.blocks[..3], &both.blocks[4..]), (&narrow.blocks[..3], &wide.blocks[3..]));
    assert_eq!((both.width, both.vocab, both.architecture.as_str()), (D as u32, VOCAB as u32, "llama+llama"));
    assert_eq!(both.source, "layers 0..1 of demo/narrow, layers 1.. of demo/wide");
    assert_eq!((&both.assets.tokenizer, &both.tokens), (&wide.assets.tokenizer, &wide.tokens));
    let model = fixture.zoo.resolve(&"demo/both".parse().unwrap()).await.unwrap();
    assert_eq!(model.name.parent.as_deref(), Some("demo/wide"));
    let mapped = fixture.zoo.map_block(both.blocks[3]).await.unwrap();
    let shape = |role: &str| mapped.block.tensors[role].shape.clone();
    assert_eq!([shape("map.weight"), shape("map.bias"), shape("map.position")], [vec![96, 64], vec![96], vec![96]]);

    let listed = fixture.zoo.list_resolved().await.unwrap();
    let line = listed.iter().find(|line| line.model == "demo/both").unwrap();
    assert_eq!((line.layer_count, line.own_bytes), (3, 4 * (96 * 64 + 2 * 96)));
    let verified = verify(&fixture.zoo, &Silent).await.unwrap();
    assert!(verified.damage.is_empty() && verified.unreferenced_count == 0, "{verified:?}");

    // What one was made of may go; and one may be made of a stitched model.
    fixture.zoo.remove_model(&"demo/narrow".parse().unwrap()).await.unwrap();
    fixture.stored("demo/both", "demo/both", (2, 1), "demo/twice").await.unwrap();
    let (_, kinds) = fixture.read("demo/twice").await;
    assert_eq!(kinds.iter().filter(|kind| **kind == "stitch").count(), 2);
    let refused = fixture.stored("demo/both", "demo/both", (1, 3), "demo/x").await.unwrap_err();
    assert_eq!(refused.to_string(), "demo/both has 3 layers: --to 3 is not within 0 and 2");
}

#[tokio::test]
async fn a_difference_is_told_around_the_map() {
    let fixture = Fixture::new().await;
    fixture.stored("demo/narrow", "demo/wide", (1, 2), "demo/both").await.unwrap();
    let diff = async |a: &str, b: &str| fixture.zoo.diff(&a.parse().unwrap(), &b.parse().unwrap()).await.unwrap();
    let places = |diff: &Diff| diff.differences.iter().map(|difference| difference.places).collect::<Vec<_>>();
    // narrow: embed a f a f head; wide: embed a f a f a f head; both: embed a f (of narrow) map a f head (of wide).
    let after = diff("demo/wide", "demo/both").await;
    assert_eq!((after.common_prefix, after.shared_blocks), (0, 3));
    let before_the_map = [Some(0), Some(1), Some(2)].map(|place| [place, place]);
    assert_eq!(places(&after)[..3], before_the_map, "{after:?}");
    assert_eq!(after.differences.len(), 6, "layer 1 of wide is left out, and the map is in: {after:?}");
    assert!(after.differences.iter().any(|difference| difference.places[0].is_none() && difference.kinds == [None, Some("stitch")]));
    let before = diff("demo/narrow", "demo/both").await;
    assert_eq!((before.common_prefix, before.shared_blocks), (3, 3));
    assert_eq!(places(&before), [[None, Some(3)], [Some(3), Some(4)], [Some(4), Some(5)], [Some(5), Some(6)]]);
    assert!(diff("demo/both", "demo/both").await.differences.is_empty());
}

#[tokio::test]
async fn quantising_leaves_the_map_and_neither_export_nor_adapters_take_it() {
    let fixture = Fixture::new().await;
    fixture.stored("demo/narrow", "demo/wide", (1, 1), "demo/both").await.unwrap();
    let name = "demo/small".parse().unwrap();
    let source = fixture.zoo.resolve(&"demo/both".parse().unwrap()).await.unwrap();
    let recipe = Recipe { linear: "int8-g32".parse().unwrap(), table: Form::TABLE };
    let mut draft = Draft::new(&fixture.zoo, source, recipe, Some(&name)).await.unwrap();
    for index in 0..draft.blocks().len() {
        draft.round(index).await.unwrap();
    }
    draft.store(&name, 8, None).await.unwrap();
    let (both, small) = (fixture.read("demo/both").await.0, fixture.read("demo/small").await.0);
    let same: Vec<usize> = (0..both.blocks.len()).filter(|index| both.blocks[*index] == small.blocks[*index]).collect();
    assert_eq!(same, [3]);

    let refused = export(&fixture.zoo, &"demo/both".parse().unwrap(), &fixture.dir.path().join("out")).await.unwrap_err();
    let sentence = "block 3 is a stitch between two models, which no Hugging Face directory can say; export the models that it was made of";
    assert_eq!(refused.to_string(), sentence);
    assert!(!fixture.dir.path().join("out").exists());
    let lora = fixture.dir.path().join("lora");
    Peft::over("demo/both").lora("model.layers.0.self_attn.q_proj", (D, D), 4, 1).write(&lora);
    let options = AddOptions { parent: Some("demo/both".parse().unwrap()), ..AddOptions::new("demo/lora".parse().unwrap()) };
    let refused = format!("{:?}", add(&fixture.zoo, &lora, &options, &Silent).await.unwrap_err());
    assert!(refused.contains("llama+llama"), "{refused}");
    // Nor is it taken for what an adapter asks for by half a name, though its source ends in that.
    Peft::over("org/wide").lora("model.layers.0.self_attn.q_proj", (WIDE, WIDE), 4, 1).write(&lora);
    let added = add(&fixture.zoo, &lora, &AddOptions::new("demo/lora".parse().unwrap()), &Silent).await.unwrap();
    assert_eq!(added.base, Some("demo/wide".parse().unwrap()));
}

#[tokio::test]
async fn what_cannot_be_joined_is_refused_by_name() {
    let fixture = Fixture::new().await;
    let mut other = Checkpoint::llama(3);
    other.files.insert("tokenizer.json".to_owned(), tokenizer(VOCAB - 3));
    fixture.add(&other, "demo/other").await;
    fixture.add(&Checkpoint::sized(4, [D, 2, VOCAB + 8]), "demo/talker").await;
    let lora = fixture.path("lora");
    Peft::over("demo/narrow").lora("model.layers.0.self_attn.q_proj", (D, D), 4, 1).write(&lora);
    add_dir(&fixture.zoo, &lora, "demo/lora", Ingest::Keep).await.unwrap();
    let tokenizers =
        "demo/narrow and demo/other do not have the same tokenizer, so a row of one stands for no token of the other".to_owned();
    for (a, b, from, to, sentence) in [
        ("demo/narrow", "demo/other", 1, 1, tokenizers),
        ("demo/lora", "demo/wide", 1, 1, "demo/lora is base and adapters: stitch its base".to_owned()),
        ("demo/narrow", "demo/wide", 0, 1, "demo/narrow has 2 layers: --from 0 is not within 1 and 2".to_owned()),
        ("demo/narrow", "demo/wide", 3, 1, "demo/narrow has 2 layers: --from 3 is not within 1 and 2".to_owned()),
        ("demo/narrow", "demo/wide", 2, 3, "demo/wide has 3 layers: --to 3 is not within 0 and 2".to_owned()),
        (
            "demo/narrow",
            "demo/talker",
            1,
            1,
            format!("the head of demo/talker says {} tokens, and the token table of demo/narrow has {VOCAB} only", VOCAB + 8),
        ),
    ] {
        assert_eq!(fixture.seam(a, b, from, to).await.unwrap_err().to_string(), sentence);
    }
    // A head that says less than the table knows is no danger.
    fixture.stored("demo/talker", "demo/narrow", (2, 0), "demo/quiet").await.unwrap();
    let taken = fixture.stored("demo/narrow", "demo/wide", (1, 1), "demo/other").await.unwrap_err();
    assert_eq!(taken.to_string(), "demo/other exists: give another name with --name");
    let hidden = fixture.stored("demo/narrow", "demo/wide", (1, 1), "rival/both").await.unwrap_err();
    assert!(hidden.to_string().starts_with("demo/narrow is not rival's to see: `ashlar zoo public demo`"), "{hidden}");
    make_public(&fixture.zoo, &["demo"]).await;
    fixture.stored("demo/narrow", "demo/wide", (1, 1), "rival/both").await.unwrap();
}

#[tokio::test]
async fn a_chain_whose_widths_do_not_follow_is_damage_by_the_block_that_does_not_fit() {
    let fixture = Fixture::new().await;
    let ((mut chain, _), (wide, _)) = (fixture.read("demo/narrow").await, fixture.read("demo/wide").await);
    chain.blocks[3] = wide.blocks[3];
    let digest = fixture.zoo.put_chain(&chain).await.unwrap().0;
    let name = ModelName { chain: digest, created_ms: 7, parent: None, history: vec![], loaded: false };
    fixture.zoo.set_model(&"demo/wrong".parse().unwrap(), None, &name).await.unwrap();
    let sentence = "block 3 (attention) takes rows of width 96, and block 2 gives rows of width 64";
    let refused = fixture.zoo.resolve(&"demo/wrong".parse().unwrap()).await.unwrap_err();
    assert!(refused.to_string().contains(sentence) && refused.to_string().contains(&digest.to_string()), "{refused}");
    let report = verify(&fixture.zoo, &Silent).await.unwrap();
    let damage: Vec<_> = report.damage.iter().map(|damage| (damage.reason.as_str(), damage.models.clone())).collect();
    assert_eq!(damage, [(sentence, vec!["demo/wrong".to_owned()])]);
}
