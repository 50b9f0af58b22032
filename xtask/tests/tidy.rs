//! The repository keeps its rules (`repository_is_tidy`), and each rule catches a violation planted for it. The rules are
//! in `xtask/src/checks/`; ARCHITECTURE.md says why they stand.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use ashlar_xtask::Violation;
use ashlar_xtask::checks::{self, crates, docs, purity, size};
use ashlar_xtask::tree::{File, Tree, root};

type Rule = fn(&Tree) -> Vec<Violation>;

#[test]
fn repository_is_tidy() {
    let tree = Tree::load(&root()).expect("the repository can be read");
    assert!(tree.holds("ARCHITECTURE.md"), "the tree was not read from the root");
    let lines = checks::all(&tree);
    assert!(lines.is_empty(), "{} violations:\n{}", lines.len(), lines.join("\n"));
}

/// `rule` finds exactly one violation in the file, at the line, with a message that holds `says`.
#[track_caller]
fn caught(rule: Rule, path: &str, text: &str, line: usize, says: &str) {
    let violations = rule(&Tree::of(&[(path, text)]));
    assert_eq!(violations.len(), 1, "{violations:?}");
    assert_eq!((violations[0].path.as_str(), violations[0].line), (path, line), "{}", violations[0]);
    assert!(violations[0].message.contains(says), "{}", violations[0]);
}

/// `rule` has nothing against the file.
#[track_caller]
fn passes(rule: Rule, path: &str, text: &str) {
    let violations = rule(&Tree::of(&[(path, text)]));
    assert!(violations.is_empty(), "{violations:?}");
}

#[test]
fn impure_state_is_caught() {
    let rule = purity::state_is_pure;
    caught(rule, "executor/src/state/engine.rs", "use tokio::sync::mpsc;", 1, "tokio");
    caught(rule, "executor/src/state/engine.rs", "use std::{collections::BTreeMap, fs};", 1, "std::fs");
    caught(rule, "router/src/state.rs", "\nuse std::time::{Duration, Instant};", 2, "Instant");
    caught(rule, "router/src/state/a/b.rs", "fn f() { std::thread::sleep(d) }", 1, "std::thread");
    caught(rule, "router/src/state/a.rs", "fn f() -> u64 { rand::random() }", 1, "seed");
    caught(rule, "executor/src/state/a.rs", "async fn f() {}", 1, "does not wait");
    caught(rule, "executor/src/state/a.rs", "let s = std::collections::hash_map::RandomState::new();", 1, "RandomState");
}

#[test]
fn pure_state_passes() {
    let rule = purity::state_is_pure;
    passes(rule, "executor/src/state/engine.rs", "// tokio would be wrong here\nuse std::time::Duration; const S: &str = \"std::fs\";");
    passes(rule, "executor/src/state/engine.rs", "#[cfg(test)]\nmod tests { use std::fs; }\n");
    passes(rule, "executor/src/state/engine/tests.rs", "use std::fs;");
    passes(rule, "executor/src/io/device.rs", "use tokio::sync::mpsc;");
}

#[test]
fn hash_maps_in_state_are_caught() {
    let rule = purity::state_does_not_iterate_hash_maps;
    let path = "router/src/state/a.rs";
    caught(rule, path, "use std::collections::HashMap;\nstruct S { pages: HashMap<u64, u64> }", 2, "lookup only");
    caught(rule, path, "let mut seen = HashSet::new();", 1, "lookup only");
    let explained = "struct S {\n    // lookup only: keys come from the request\n    pages: HashMap<u64, u64>,\n}\n";
    passes(rule, path, explained);
    caught(rule, path, &format!("{explained}fn f(s: &S) {{ s.pages.values().sum() }}"), 5, "iterated");
    caught(rule, path, &format!("{explained}fn f(&self) {{ for p in &self.pages {{}} }}"), 5, "iterated");
    passes(rule, path, &format!("{explained}fn f(&self) {{ self.pages.get(&1) }}"));
    passes(rule, "router/src/io/a.rs", "struct S { pages: HashMap<u64, u64> }");
}

#[test]
fn stray_unsafe_is_caught() {
    let rule = purity::unsafe_stands_where_it_may;
    caught(rule, "executor/src/model/a.rs", "fn f() {\n    unsafe { g() }\n}", 2, "stands only in");
    passes(rule, "kernels/src/cpu/avx2.rs", "unsafe fn f() {}");
    passes(rule, "executor/src/model/a.rs", "// unsafe\nlet unsafe_count = \"unsafe\";");
}

#[test]
fn foreign_nouns_are_caught() {
    let rule = purity::crates_keep_to_their_nouns;
    caught(rule, "kernels/src/ops.rs", "fn f(model_width: usize) {}", 1, "model_width");
    caught(rule, "kernels/src/ops.rs", "struct TenantId;", 1, "TenantId");
    caught(rule, "router/src/io/a.rs", "use ashlar_zoo::store::MappedBlock;", 1, "does not read tensors");
    caught(rule, "zoo/src/hub.rs", "use std::net::TcpListener;", 1, "listening socket");
    passes(rule, "zoo/src/hub.rs", "#[cfg(test)]\nmod tests { use std::net::TcpListener; }");
    passes(rule, "kernels/src/ops.rs", "/// Rows of any model.\nfn f(rows: usize) {}");
}

#[test]
fn unfinished_work_is_caught() {
    caught(purity::nothing_unfinished, "wire/src/a.rs", "fn f() { todo!() }", 1, "does not land");
    caught(purity::nothing_unfinished, "wire/src/a.rs", "fn f() {\n dbg!(1); }", 2, "dbg");
    passes(purity::nothing_unfinished, "wire/src/a.rs", "fn todo() {} // todo!()");
}

#[test]
fn logged_keys_are_caught() {
    caught(purity::keys_are_not_logged, "router/src/io/a.rs", "warn!(tenant = %t, key = %api_key, \"no\");", 1, "never logged");
    passes(purity::keys_are_not_logged, "router/src/io/a.rs", "warn!(tenant = %t, \"bad\"); check(api_key);");
}

#[test]
fn wrong_arrows_are_caught() {
    caught(crates::arrows, "kernels/Cargo.toml", "[dependencies]\nashlar-zoo.workspace = true\n", 2, "must not import `zoo`");
    caught(
        crates::arrows,
        "router/Cargo.toml",
        "[dev-dependencies]\nx = { package = \"ashlar-executor\", path = \"../executor\" }\n",
        2,
        "executor",
    );
    caught(crates::arrows, "zoo/Cargo.toml", "[target.'cfg(unix)'.dependencies]\nashlar-router = \"1\"\n", 2, "router");
    caught(crates::arrows, "cache/Cargo.toml", "[dependencies]\n", 0, "no line");
    caught(crates::arrows, "zoo/Cargo.toml", "[dependencies", 0, "no TOML");
    passes(crates::arrows, "zoo/Cargo.toml", "[dependencies]\nashlar-wire.workspace = true\nserde = \"1\"\n");
}

#[test]
fn a_crate_that_the_image_lacks_is_caught() {
    let tree = Tree::of(&[(".containerignore", "*\n!zoo\n"), ("zoo/Cargo.toml", ""), ("zoo/tests/Cargo.toml", ""), ("sim/Cargo.toml", "")]);
    let violations = crates::image_has_all_crates(&tree);
    assert_eq!(
        violations.iter().map(|violation| violation.message.as_str()).collect::<Vec<_>>(),
        ["add `!sim`: without it no image can be built"]
    );
}

#[test]
fn lints_not_inherited_are_caught() {
    caught(crates::lints_are_inherited, "zoo/Cargo.toml", "[package]\nname = \"a\"\n", 0, "workspace = true");
    passes(crates::lints_are_inherited, "zoo/Cargo.toml", "[lints]\nworkspace = true\n");
}

#[test]
fn forbidden_dependencies_are_caught() {
    caught(crates::no_pickle, "zoo/Cargo.toml", "[dependencies]\nserde-pickle = \"1\"\n", 2, "runs what it finds");
    caught(crates::no_pickle, "Cargo.lock", "name = \"serde-pickle\"\n", 1, "pickle");
    caught(crates::router_fetches_nothing, "router/Cargo.toml", "[dependencies]\nreqwest.workspace = true\n", 2, "no HTTP client");
    passes(crates::router_fetches_nothing, "router/Cargo.toml", "[dev-dependencies]\nreqwest.workspace = true\n");
}

#[test]
fn long_files_are_caught() {
    caught(size::files_stay_short, "zoo/src/a.rs", &"x\n".repeat(601), 0, "601 lines");
    passes(size::files_stay_short, "zoo/src/a.rs", &"x\n".repeat(600));
    passes(size::files_stay_short, "docs/a.md", &"x\n".repeat(601));
}

#[test]
fn big_files_are_caught() {
    let big = File { size_bytes: (1 << 20) + 1, text: None };
    let mut tree = Tree::default();
    tree.files.insert("demo/base/model.safetensors".into(), big.clone());
    tree.files.insert("executor/tests/data/tiny.bin".into(), big.clone());
    assert_eq!(size::big_files_stay_out(&tree), []);
    tree.files.insert("docs/film.gif".into(), big);
    assert_eq!(size::big_files_stay_out(&tree).len(), 1);
}

#[test]
fn dead_links_are_caught() {
    let rule = docs::links_resolve;
    caught(rule, "docs/a.md", "See [b](b.md).", 1, "there is no `docs/b.md`");
    caught(rule, "docs/a.md", "# One\n\n[x](#two)", 3, "no heading");
    caught(rule, "a.md", "[x](../b.md)", 1, "leaves the repository");
    passes(
        rule,
        "docs/a.md",
        "# One thing\n[x](#one-thing) `[y](z.md)`\n```\n[z](z.md)\n```\n[w](https://example.org) [self](../docs/a.md)",
    );
}
