//! The report of a zoo: who has which block, what each model costs, how alike two are, and that what is drawn holds what a zoo may hold.

use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, VOCAB, add_dir};
use ashlar_zoo::ingest::{AddOptions, Recipe, Silent, add};
use ashlar_zoo::report::map::{Look, map};
use ashlar_zoo::report::page::page;
use ashlar_zoo::report::similarity::TensorSimilarity;
use ashlar_zoo::report::{Report, Row};
use ashlar_zoo::store::Zoo;

/// Bytes of the token table, and of the projection, of the small model.
const TABLE: u64 = (VOCAB * D * 4) as u64;
/// Bytes of one square matrix of it.
const SQUARE: u64 = (D * D * 4) as u64;

struct Fixture {
    dir: tempfile::TempDir,
    zoo: Zoo,
}

/// A zoo of three tenants: a base, the same under another name, one with a matrix trained, one with an adapter, and one that nobody is like.
async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    let fixture = Fixture { dir, zoo };
    fixture.add(&Checkpoint::llama(1), "one/base").await;
    fixture.add(&Checkpoint::llama(1), "two/copy").await;
    fixture.add(Checkpoint::llama(1).retrain("layers.1.self_attn.q_proj", 2), "one/tuned").await;
    fixture.add(&Checkpoint::llama(9), "three/stranger").await;
    let path = fixture.dir.path().join("lora");
    Peft::over("base").lora("model.layers.0.self_attn.q_proj", (D, D), 4, 1).write(&path);
    let options = AddOptions { parent: Some("one/base".parse().unwrap()), ..AddOptions::new("two/lora".parse().unwrap()) };
    crate::support::make_public(&fixture.zoo, &["one"]).await;
    add(&fixture.zoo, &path, &options, &Silent).await.unwrap();
    fixture
}

impl Fixture {
    async fn add(&self, checkpoint: &Checkpoint, name: &str) {
        let path = self.dir.path().join(name);
        checkpoint.write(&path);
        add_dir(&self.zoo, &path, name, Recipe::Keep).await.unwrap();
    }

    async fn report(&self) -> Report {
        self.zoo.report().await.unwrap()
    }
}

fn names(report: &Report, row: &Row) -> Vec<String> {
    row.models.iter().map(|model| report.models[*model].model.clone()).collect()
}

#[tokio::test]
async fn rows_of_kin_lie_so_that_equal_blocks_meet() {
    let report = fixture().await.report().await;
    let [kin, stranger] = &report.kin[..] else { panic!("{:?}", report.kin) };
    assert_eq!((kin.model_count, stranger.model_count), (4, 1));
    let rows: Vec<Vec<String>> = kin.rows.iter().map(|row| names(&report, row)).collect();
    assert_eq!(rows, [vec!["one/base", "two/copy"], vec!["two/lora"], vec!["one/tuned"]], "models of equal chains are one row");
    assert_eq!(kin.rows[0].ranks, [0; 6]);
    assert_eq!(kin.rows[2].ranks, [0, 0, 0, 1, 0, 0], "it parts at the attention of layer 1");
    assert_eq!(kin.rows[1].adapters.keys().copied().collect::<Vec<_>>(), [1]);
    let tuned = &report.blocks[kin.rows[2].blocks[3]];
    assert_eq!((tuned.kind, tuned.model_count), ("attention", 1));
    assert_eq!(tuned.bytes - tuned.common_bytes, SQUARE, "all but the matrix that was trained");
    let shared = &report.blocks[kin.rows[0].blocks[3]];
    assert_eq!((shared.model_count, shared.common_bytes), (3, shared.bytes));
}

#[tokio::test]
async fn fair_shares_sum_to_what_is_there() {
    let report = fixture().await.report().await;
    let totals = &report.totals;
    assert_eq!((totals.model_count, totals.tenant_count, totals.block_count, totals.placed_count), (5, 3, 13, 30));
    let whole = report.models[0].memory.alone_bytes;
    assert_eq!(totals.alone_bytes, 5 * whole + report.adapters[0].bytes);
    // The base, a whole attention block for one matrix, the adapter, the stranger.
    let attention = report.blocks.iter().find(|block| block.kind == "attention").unwrap().bytes;
    assert_eq!(totals.resident_bytes, 2 * whole + attention + report.adapters[0].bytes);
    // On disk the tuned model's matrix alone is new.
    assert_eq!(totals.tensor_bytes, 2 * whole + SQUARE + report.adapters[0].bytes);
    let near = |sum: u64, total: u64| assert!(sum.abs_diff(total) <= 5, "{sum} {total}: rounding of five models");
    near(report.models.iter().map(|model| model.memory.fair_bytes).sum(), totals.resident_bytes);
    near(report.tenants.iter().map(|tenant| tenant.memory.fair_bytes).sum(), totals.resident_bytes);
    near(report.models.iter().map(|model| model.disk.fair_bytes).sum(), totals.stored_bytes);
    let [base, tuned, stranger, copy, lora] = &report.models[..] else { panic!("{:?}", report.models) };
    assert_eq!((&base.model[..], base.memory.own_bytes, copy.memory.own_bytes), ("one/base", 0, 0));
    assert_eq!((tuned.memory.own_bytes, lora.memory.own_bytes), (attention, report.adapters[0].bytes));
    assert_eq!((stranger.memory.own_bytes, stranger.memory.fair_bytes), (whole, whole));
    let [one, three, two] = &report.tenants[..] else { panic!("{:?}", report.tenants) };
    assert_eq!((one.memory.own_bytes, two.memory.own_bytes), (attention, report.adapters[0].bytes));
    assert_eq!((&three.tenant[..], three.memory.own_bytes), ("three", whole));
}

#[tokio::test]
async fn a_tied_table_is_in_memory_once() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    let mut tied = Checkpoint::llama(1);
    tied.config["tie_word_embeddings"] = true.into();
    tied.tensors.remove("lm_head.weight");
    tied.write(&dir.path().join("tied"));
    add_dir(&zoo, &dir.path().join("tied"), "demo/tied", Recipe::Keep).await.unwrap();
    let report = zoo.report().await.unwrap();
    let blocks: u64 = report.blocks.iter().map(|block| block.bytes).sum();
    assert_eq!(report.totals.resident_bytes, blocks - TABLE);
}

#[tokio::test]
async fn files_that_no_model_has_are_told_apart_and_damage_hides_nothing() {
    let fixture = fixture().await;
    let before = fixture.report().await.totals;
    assert_eq!(before.other_stored_bytes, 0);
    fixture.zoo.remove_model(&"three/stranger".parse().unwrap()).await.unwrap();
    let after = fixture.report().await.totals;
    assert_eq!(after.stored_bytes + after.other_stored_bytes, before.stored_bytes);
    assert!(after.other_stored_bytes > 0);
    let chain = fixture.zoo.read_model(&"one/tuned".parse().unwrap()).await.unwrap().chain;
    std::fs::write(fixture.dir.path().join(format!("zoo/chains/{chain}.json")), "{}").unwrap();
    let report = fixture.report().await;
    assert_eq!((report.models.len(), report.totals.broken_count, &report.broken[0].model[..]), (3, 1, "one/tuned"));
    assert!(report.broken[0].error.contains("damaged"), "{}", report.broken[0].error);
}

#[tokio::test]
async fn the_map_is_letters_or_colours_and_as_wide_as_it_may_be() {
    let report = fixture().await.report().await;
    let look = Look { columns: 80, colours: false, rows_max: 100 };
    let drawn = map(&report, &look);
    let expected = [
        "4 models that share weights",
        "              0",
        "one/base + 1  AAAAAA",
        "two/lora      AaAAAA",
        "one/tuned     AAA=AA",
        "",
        "a model that shares nothing",
        "                0",
        "three/stranger  ######",
    ];
    assert_eq!(drawn.lines().take(expected.len()).collect::<Vec<_>>(), expected);
    let few = map(&report, &Look { rows_max: 2, ..look });
    assert!(few.contains("two/lora") && !few.contains("one/tuned") && few.contains("2 more rows are left out: --rows 4"), "{few}");
    let colours = map(&report, &Look { colours: true, ..look });
    assert!(
        colours.contains("\x1b[38;5;67m█\x1b[0m") && colours.contains("\x1b[38;5;173m█") && colours.contains("\x1b[38;5;231m+"),
        "{colours}"
    );
}

#[tokio::test]
async fn a_chain_wider_than_the_terminal_is_folded() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    let mut deep = Checkpoint::llama(1);
    deep.config["num_hidden_layers"] = 12.into();
    let layer: Vec<_> = deep.tensors.iter().filter(|(name, _)| name.contains("layers.1.")).map(|(n, t)| (n.clone(), t.clone())).collect();
    for index in 2..12 {
        deep.tensors.extend(layer.iter().map(|(name, tensor)| (name.replace("layers.1.", &format!("layers.{index}.")), tensor.clone())));
    }
    deep.write(&dir.path().join("deep"));
    add_dir(&zoo, &dir.path().join("deep"), "demo/deep", Recipe::Keep).await.unwrap();
    let report = zoo.report().await.unwrap();
    let drawn = map(&report, &Look { columns: 30, colours: false, rows_max: 100 });
    let expected = [
        "a model that shares nothing",
        "           0         10",
        "demo/deep  ###################",
        "            20",
        "demo/deep  #######",
    ];
    assert_eq!(drawn.lines().take(expected.len()).collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn likeness_is_measured_where_tensors_differ() {
    let fixture = fixture().await;
    let compare = async |a: &str, b: &str| fixture.zoo.compare_weights(&a.parse().unwrap(), &b.parse().unwrap(), &Silent).await.unwrap();
    let found = compare("one/base", "one/tuned").await;
    for (index, place) in found.places.iter().enumerate() {
        for (role, similarity) in &place.tensors {
            match similarity {
                TensorSimilarity::Same { .. } => assert_ne!((index, &role[..]), (3, "q.weight")),
                TensorSimilarity::Compared(measures) => {
                    assert_eq!((index, &role[..], measures.count), (3, "q.weight", (D * D) as u64));
                    // Independent values of one size: the difference is as large as the square root of 2 times either.
                    assert!(measures.relative_rms.is_some_and(|rms| (rms - 2f64.sqrt()).abs() < 0.1), "{measures:?}");
                    assert!(measures.cosine.is_some_and(|cosine| cosine.abs() < 0.1) && measures.equal_share < 0.01, "{measures:?}");
                }
                TensorSimilarity::Apart => panic!("{index} {role} has one shape in both"),
            }
        }
    }
    let found = compare("one/base", "two/lora").await;
    assert_eq!(found.places.iter().map(|place| place.adapted[1]).collect::<Vec<_>>(), [false, true, false, false, false, false]);
    assert!(found.places.iter().all(|place| place.tensors.values().all(|s| matches!(s, TensorSimilarity::Same { .. }))));
}

#[tokio::test]
async fn what_a_source_says_cannot_become_markup() {
    let fixture = fixture().await;
    let hostile = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>";
    let options = AddOptions { source: Some(hostile.to_owned()), ..AddOptions::new("one/hostile".parse().unwrap()) };
    add(&fixture.zoo, &fixture.dir.path().join("one/base"), &options, &Silent).await.unwrap();
    let report = fixture.report().await;
    assert!(report.models.iter().any(|model| model.source == hostile));
    let page = page(&report, None);
    assert!(!page.contains("<script>alert") && !page.contains("<img") && page.contains("\\u003cimg src=x"));
    assert_eq!(page.matches("</script>").count(), 2, "of the facts and of the script");
}
