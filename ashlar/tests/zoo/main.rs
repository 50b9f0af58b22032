//! `ashlar zoo` as a process: its words, its exit codes, and that it may be killed.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

mod made;
#[path = "../../../zoo/tests/it/support/mod.rs"]
mod support;

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use support::peft::Peft;
use support::{Checkpoint, D};

fn zoo(root: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ashlar")).arg("zoo").args(args).env("ASHLAR_ZOO", root).output().unwrap()
}

fn ok(root: &Path, args: &[&str]) -> String {
    let output = zoo(root, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_commands_say_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let (root, a, b) = (dir.path().join("zoo"), dir.path().join("a"), dir.path().join("b"));
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&a);
    checkpoint.retrain("layers.1.mlp.up_proj", 2).write(&b);
    ok(&root, &["add", a.to_str().unwrap(), "--name", "demo/a"]);
    let orphan = zoo(&root, &["add", b.to_str().unwrap(), "--name", "demo/b", "--parent", "no/such"]);
    assert!(!orphan.status.success() && String::from_utf8_lossy(&orphan.stderr).contains("--parent no/such"));
    let added = ok(&root, &["add", b.to_str().unwrap(), "--name", "demo/b", "--parent", "demo/a"]);
    assert!(added.starts_with("5 of 6 blocks, 20 of 21 tensors already here; 25 kB new of 385 kB"), "{added}");
    let nearest = "\nnearest: demo/a (of 1 that are visible): 5 blocks identical, 0 low-rank, 0 small, 1 unrelated\ndemo/b is chain ";
    assert!(added.contains(nearest), "{added}");
    let list = ok(&root, &["list"]);
    assert_eq!(list.lines().count(), 3);
    assert!(list.contains("demo/b") && list.contains("25 kB"), "{list}");
    let json: serde_json::Value = serde_json::from_str(&ok(&root, &["list", "--json"])).unwrap();
    assert_eq!(json[1]["parent"], "demo/a");
    let shown = ok(&root, &["show", "demo/b"]);
    assert!(shown.contains("family             llama") && shown.contains("feed_forward"), "{shown}");
    let diff = ok(&root, &["diff", "demo/a", "demo/b"]);
    assert!(diff.contains("the first 4 in a row") && diff.contains("4  feed_forward  up.weight"), "{diff}");
    let json: serde_json::Value = serde_json::from_str(&ok(&root, &["diff", "demo/a", "demo/b", "--json"])).unwrap();
    assert_eq!(json["shared_blocks"], 5);
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"));
    ok(&root, &["rm", "demo/b"]);
    let gc = ok(&root, &["gc", "--grace", "0", "--dry-run"]);
    assert!(gc.starts_with("would free ") && gc.contains("1 chains, 1 blocks, 0 adapters, 1 tensors, 0 assets"), "{gc}");
    ok(&root, &["gc", "--grace", "0"]);
    assert!(!zoo(&root, &["show", "demo/b"]).status.success());
}

#[test]
fn an_adapter_is_added_over_its_base_and_shown_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let (root, base, lora) = (dir.path().join("zoo"), dir.path().join("base"), dir.path().join("lora"));
    let (base, path) = (base.to_str().unwrap(), lora.to_str().unwrap());
    Checkpoint::llama(1).write(Path::new(base));
    Peft::over("org/unknown").lora("model.layers.1.self_attn.q_proj", (D, D), 4, 1).write(&lora);
    ok(&root, &["add", base, "--name", "demo/base"]);
    let failed = |args: &[&str]| String::from_utf8(zoo(&root, args).stderr).unwrap();
    let lost = failed(&["add", path, "--name", "demo/lora"]);
    assert!(lost.contains("asks for the base `org/unknown`") && lost.contains("give it with --base TENANT/MODEL"), "{lost}");
    let wrong = failed(&["add", base, "--name", "demo/b", "--base", "demo/base"]);
    assert!(wrong.contains(&format!("failed to add {base}: --base is for PEFT adapters, and it is none; ")), "{wrong}");
    let absent = failed(&["add", "nowhere", "--name", "demo/b", "--base", "demo/base"]);
    assert!(absent.contains("failed to add nowhere: it does not exist"), "{absent}");
    let added = ok(&root, &["add", path, "--name", "demo/lora", "--base", "demo/base", "--dtype", "int8"]);
    assert!(added.starts_with("6 of 6 blocks, 0 of 1 adapters, 21 of 23 tensors already here; 2.0 kB new of 387 kB\n"), "{added}");
    let note = "\nnote: the adapter asks for org/unknown, and demo/base has neither that name nor that source\n";
    assert!(added.contains(note) && added.contains("demo/lora is chain ") && added.ends_with("(llama over demo/base)\n"), "{added}");
    let list = ok(&root, &["list"]);
    assert!(list.lines().any(|line| line.starts_with("demo/lora") && line.contains("demo/base") && line.contains("2.0 kB")), "{list}");
    let shown = ok(&root, &["show", "demo/lora"]);
    assert!(shown.contains("on 1 of 6 blocks, 2.0 kB") && shown.contains(" + adapter") && shown.contains("q:4"), "{shown}");
    let diff = ok(&root, &["diff", "demo/base", "demo/lora"]);
    assert!(diff.contains("the first 3 in a row") && diff.contains("3  attention  q.weight (adapter)"), "{diff}");
    let json: serde_json::Value = serde_json::from_str(&ok(&root, &["list", "--json"])).unwrap();
    assert_eq!((&json[1]["adapter_count"], &json[1]["own_bytes"]), (&1.into(), &2048.into()));
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"));
    let removed = ok(&root, &["rm", "demo/base"]);
    assert!(
        removed.starts_with("adapters over it keep its blocks and are served as before: demo/lora\nremoved the name demo/base; "),
        "{removed}"
    );
    let gc = ok(&root, &["gc", "--grace", "0", "--dry-run"]);
    assert!(gc.contains("1 chains, 0 blocks, 0 adapters, 0 tensors"), "the adapter's chain keeps all: {gc}");
    assert!(!ok(&root, &["rm", "demo/lora"]).contains("adapters over it"));
}

#[test]
fn a_merged_lora_is_proposed_as_base_and_adapter_and_stored_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let (root, demo) = (dir.path().join("zoo"), Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo"));
    let folder = |name: &str| demo.join(name).to_str().unwrap().to_owned();
    ok(&root, &["add", &folder("base"), "--name", "hub/base"]);
    let hidden = ok(&root, &["add", &folder("math-lora"), "--name", "acme/math"]);
    assert!(hidden.starts_with("0 of 18 blocks, 0 of 130 tensors already here; ") && !hidden.contains("nearest"), "{hidden}");
    let failed = |args: &[&str]| {
        let output = zoo(&root, args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(failed(&["unmerge", "acme/math"]).contains("none of the 1 models that acme may see is a relative of acme/math"));
    assert!(failed(&["unmerge", "acme/math", "--base", "hub/base"]).contains("hub/base is not acme's to see: `ashlar zoo public hub`"));
    assert_eq!(ok(&root, &["public"]), "no tenant is public: each sees its own models only\n");
    let parent = failed(&["add", &folder("math-lora"), "--name", "acme/child", "--parent", "hub/base"]);
    assert!(parent.contains("use --parent hub/base: it is not acme's to see"), "{parent}");
    let text = folder("README.md");
    let near = failed(&["stitch", "acme/math", "hub/base", "--from", "1", "--to", "1", "--calibrate", &text]);
    assert!(near.contains("hub/base is not acme's to see"), "{near}");
    assert!(failed(&["public", "a/b"]).contains("declare `a/b` public: a tenant has"));
    assert_eq!(ok(&root, &["public", "hub", "shop"]), "public: hub, shop\n");
    assert_eq!(ok(&root, &["public", "shop", "--remove"]), "public: hub\n");

    let proposed = ok(&root, &["unmerge", "acme/math"]);
    for expected in [
        " 9  attention  q:8,v:8",
        "15  attention  q:8,v:8",
        "acme/math is hub/base and adapters on 8 matrices",
        "beyond the base it takes 197 kB now, 57 kB unmerged",
    ] {
        assert!(proposed.contains(expected), "{expected}: {proposed}");
    }
    assert!(proposed.contains("\nunmerged    mean KL ") && proposed.contains("\nbase alone  mean KL "), "{proposed}");
    assert_eq!(ok(&root, &["list"]).lines().count(), 3, "nothing was stored");
    let json: serde_json::Value = serde_json::from_str(&ok(&root, &["unmerge", "acme/math", "--json"])).unwrap();
    let kl = |which: &str| json[which]["kl"].as_f64().unwrap();
    assert!(kl("unmerged") < 1e-5 && kl("base_alone") > 100.0 * kl("unmerged"), "{json}");
    assert!(json["unmerged"]["same_top_share"].as_f64().unwrap() > 0.97 && json["matrices"] == 8, "{json}");

    let short = dir.path().join("short.txt");
    std::fs::write(&short, "a word").unwrap();
    let unmeasured = ok(&root, &["unmerge", "acme/math", "--text", short.to_str().unwrap()]);
    assert!(unmeasured.contains("the change of its output was not measured: the text has "), "{unmeasured}");
    assert_eq!(zoo(&root, &["unmerge", "acme/math", "--apply"]).status.code(), Some(2), "--apply wants a name");
    assert!(failed(&["unmerge", "acme/math", "--apply", "--name", "acme/math"]).contains("acme/math exists: give another name"));
    let stored = ok(&root, &["unmerge", "acme/math", "--apply", "--name", "acme/thin"]);
    assert!(
        stored.contains("acme/thin is chain ") && stored.contains(" over hub/base; `zoo rm acme/math` and `zoo gc` free at most 139 kB"),
        "{stored}"
    );
    let shown = ok(&root, &["show", "acme/thin"]);
    assert!(shown.contains("on 4 of 18 blocks, 57 kB") && shown.contains("q:8,v:8"), "{shown}");
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"));
    let report: serde_json::Value =
        serde_json::from_str(&ok(&root, &["add", &folder("math-lora"), "--name", "acme/again", "--json"])).unwrap();
    assert_eq!((&report["bytes_new"], &report["nearest"]["identical_count"]), (&0.into(), &18.into()), "{report}");
}

#[test]
fn a_fine_tune_becomes_its_base_and_a_compressed_difference_with_what_that_costs() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("zoo");
    let folder = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo").join(name).to_str().unwrap().to_owned();
    ok(&root, &["add", &folder("base"), "--name", "acme/base"]);
    ok(&root, &["add", &folder("shakespeare-top"), "--name", "acme/verse"]);
    let failed = |args: &[&str], code| {
        let output = zoo(&root, args);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let command = |method: &'static str, rest: &[&'static str]| [&["compress-delta", "acme/verse", "--method", method], rest].concat();
    assert!(failed(&command("svd:0", &[]), 2).contains("`svd:0` is neither svd:R, R being a rank of 1 to 1024, nor bitdelta"));
    assert!(failed(&command("bitdelta", &["--apply"]), 2).contains("--name"), "--apply wants a name");

    let proposed = ok(&root, &command("bitdelta", &[]));
    let nearly = "acme/verse is nearly acme/base and bitdelta of the differences of ";
    assert!(proposed.contains(nearly) && proposed.contains("\nbeyond the base it takes "), "{proposed}");
    assert!(proposed.contains("\nleft as the base has them: ") && proposed.contains("norm.weight of "), "{proposed}");
    assert!(proposed.contains("\ncompressed  mean KL ") && proposed.contains("\nbase alone  mean KL "), "{proposed}");
    assert_eq!(ok(&root, &["list"]).lines().count(), 3, "nothing was stored");
    let json = |method| serde_json::from_str::<serde_json::Value>(&ok(&root, &command(method, &["--json"]))).unwrap();
    let (bits, few, more) = (json("bitdelta"), json("svd:4"), json("svd:32"));
    let number = |json: &serde_json::Value, at: &str| json.pointer(at).and_then(serde_json::Value::as_f64).unwrap();
    let kl = |json| number(json, "/compressed/kl");
    assert!(
        kl(&more) < kl(&few) && kl(&few) < number(&few, "/base_alone/kl") && kl(&bits) < number(&bits, "/base_alone/kl"),
        "{bits} {few} {more}"
    );
    // bf16 before, a bit and a little after.
    assert!(number(&bits, "/bytes_after") * 14.0 < number(&bits, "/bytes_before"), "{bits}");

    // Nothing is stored that was not measured.
    let short = dir.path().join("short.txt");
    std::fs::write(&short, "a word").unwrap();
    let apply = ["compress-delta", "acme/verse", "--method", "bitdelta", "--apply", "--name", "acme/bits"];
    let unmeasured = failed(&[&apply[..], &["--text", short.to_str().unwrap()]].concat(), 1);
    assert!(unmeasured.contains("measure what acme/bits would say, and so to store it: the text has "), "{unmeasured}");
    assert_eq!(ok(&root, &["list"]).lines().count(), 3);
    let stored = ok(&root, &apply);
    assert!(
        stored.contains("acme/bits is chain ") && stored.contains(" over acme/base; `zoo rm acme/verse` and `zoo gc` free at most "),
        "{stored}"
    );
    assert!(failed(&apply, 1).contains("acme/bits exists: give another name"));
    let shown = ok(&root, &["show", "acme/bits"]);
    assert!(shown.contains("measured ") && shown.contains("bitdelta of chain ") && shown.contains("q:one bit"), "{shown}");
    let shown: serde_json::Value = serde_json::from_str(&ok(&root, &["show", "acme/bits", "--json"])).unwrap();
    assert_eq!(number(&shown, "/measures/0/kl/mean"), kl(&bits));
    assert_eq!(shown["measures"][0]["method"], "bitdelta");
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"));
    let kept = ["compress-delta", "acme/verse", "--method", "svd:4", "--keep-blocks", "head,embed", "--apply", "--name", "acme/low"];
    ok(&root, &kept);
    assert!(ok(&root, &["show", "acme/low"]).contains("svd:4 keeping embed,head of chain "));
    let exported = failed(&["export", "acme/bits", dir.path().join("out").to_str().unwrap()], 1);
    assert!(exported.contains("one-bit delta, which no Hugging Face directory can say"), "{exported}");
}

#[test]
fn errors_are_one_sentence_and_fail() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("zoo");
    let output = zoo(&root, &["list"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no zoo at"));
    let output = zoo(&root, &["add", "nowhere", "--name", "demo/a"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("failed to add nowhere: it does not exist"));
    for args in [["add", "x", "--name", "../a"], ["add", "x", "--name", "demo"], ["rm", "demo/..", "", ""]] {
        let args: Vec<&str> = args.into_iter().filter(|arg| !arg.is_empty()).collect();
        assert_eq!(zoo(&root, &args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn what_a_command_line_cannot_ask_has_status_2_and_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let (root, a) = (dir.path().join("zoo"), dir.path().join("a"));
    Checkpoint::llama(1).write(&a);
    ok(&root, &["add", a.to_str().unwrap(), "--name", "demo/a"]);
    let two = ["zoo", "quantize", "demo/a", "--recipe", "int8-g32", "--recipe", "int4-g32", "--name", "demo/b"];
    let stitch = |rest: [&'static str; 4]| [&["zoo", "stitch", "demo/a", "demo/a", "--calibrate", "x"][..], &rest].concat();
    for (args, expected) in [
        (two.to_vec(), "quantize demo/a: --name takes one --recipe"),
        (stitch(["--from", "0", "--to", "1"]), "--from <LAYERS>"),
        ([&stitch(["--from", "1", "--to", "1"])[..], &["--lambda", "1e308"]].concat(), "it must be a number from 0 to 1e6"),
        (vec!["serve", "--listen", "127.0.0.1"], "use router.listen = `127.0.0.1`: expected IP:PORT"),
        (
            vec!["serve", "--set", "executor.threads=two"],
            "use --set executor.threads=two: invalid type: string \"two\", expected usize in `executor.threads`",
        ),
        (vec!["serve", "--set", "executor.thread=2"], "use --set executor.thread=2: unknown field `thread`"),
        (vec!["tenant", "list", "--set", "here"], "use --set here: expected SECTION.KEY=VALUE"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_ashlar")).args(&args).env("ASHLAR_ZOO", &root).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), error.contains(expected)), (Some(2), true), "{args:?}: {error}");
        // What clap tells has a hint below it.
        assert!(error.contains("try '--help'") || error.lines().count() == 1, "{args:?}: {error}");
    }
}

#[cfg(unix)]
#[test]
fn what_cannot_be_read_is_not_told_as_absent_and_what_does_not_end_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let (root, a, around) = (dir.path().join("zoo"), dir.path().join("a"), dir.path().join("around"));
    let failed = |args: &[&str]| {
        let output = zoo(&root, args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    // Root may read everything; nobody can follow a link to itself.
    std::os::unix::fs::symlink(&around, &around).unwrap();
    let unreadable = failed(&["add", around.to_str().unwrap(), "--name", "demo/a"]);
    assert!(unreadable.contains("os error") && !unreadable.contains("does not exist"), "{unreadable}");
    Checkpoint::llama(1).write(&a);
    for file in ["config.json", "tokenizer.json", "generation_config.json"] {
        let _ = std::fs::remove_file(a.join(file));
        std::os::unix::fs::symlink(file, a.join(file)).unwrap();
        let unreadable = failed(&["add", a.to_str().unwrap(), "--name", "demo/a"]);
        assert!(unreadable.contains(file) && unreadable.contains("os error"), "{unreadable}");
        Checkpoint::llama(1).write(&around.with_file_name("whole"));
        std::fs::remove_dir_all(&a).unwrap();
        std::fs::rename(around.with_file_name("whole"), &a).unwrap();
    }
    ok(&root, &["add", a.to_str().unwrap(), "--name", "demo/a"]);
    let endless = failed(&["quantize", "demo/a", "--recipe", "int8-g32", "--text", "/dev/zero"]);
    assert!(endless.contains("read /dev/zero: more than 1048576 bytes"), "{endless}");
    let endless = failed(&["quantize", "demo/a", "--recipe", "int8-g32", "--calibrate", "/dev/zero"]);
    assert!(endless.contains("/dev/zero: more than 1048576 bytes"), "{endless}");
}

#[test]
fn verify_fails_on_damage_and_names_block_and_models() {
    let dir = tempfile::tempdir().unwrap();
    let (root, a) = (dir.path().join("zoo"), dir.path().join("a"));
    Checkpoint::llama(1).write(&a);
    ok(&root, &["add", a.to_str().unwrap(), "--name", "demo/a", "--dtype", "int8"]);
    let shelf = std::fs::read_dir(root.join("tensors")).unwrap().next().unwrap().unwrap().path();
    let tensor = std::fs::read_dir(shelf).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&tensor).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&tensor, bytes).unwrap();
    let output = zoo(&root, &["verify"]);
    assert_eq!(output.status.code(), Some(3));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains(tensor.file_name().unwrap().to_str().unwrap()) && text.contains("  block ") && text.contains("models demo/a"),
        "{text}"
    );
}

#[test]
fn a_report_is_a_map_a_page_or_json() {
    let dir = tempfile::tempdir().unwrap();
    let (root, a, b) = (dir.path().join("zoo"), dir.path().join("a"), dir.path().join("b"));
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&a);
    checkpoint.retrain("layers.1.mlp.up_proj", 2).write(&b);
    ok(&root, &["add", a.to_str().unwrap(), "--name", "one/a"]);
    ok(&root, &["add", b.to_str().unwrap(), "--name", "two/b"]);
    let report = ok(&root, &["report"]);
    assert!(
        report.starts_with("2 models that share weights\n") && report.contains("one/a  AAAA=A\n") && report.contains("two/b  AAAA=A\n"),
        "{report}"
    );
    assert!(report.contains("\nTENANT   ALONE") && report.contains("2 models, 2 tenants: 12 blocks, 7 of them distinct"), "{report}");
    let first = ok(&root, &["report", "--rows", "1"]);
    assert!(first.contains("1 more rows are left out: --rows 2") && first.contains("... and 1 more: --rows 2 shows all"), "{first}");
    let compared = ok(&root, &["report", "--compare", "one/a", "two/b"]);
    assert!(compared.contains("two/b against one/a: 20 tensors are the same, 1 differ\n#  KIND"), "{compared}");
    let page = dir.path().join("report.html");
    let said = ok(&root, &["report", "--compare", "one/a", "two/b", "--html", page.to_str().unwrap()]);
    assert_eq!(said, format!("the report is in {}\n", page.display()));
    assert!(std::fs::read_to_string(&page).unwrap().contains(r#""models":["one/a","two/b"]"#));
    let json: serde_json::Value = serde_json::from_str(&ok(&root, &["report", "--json", "--compare", "one/a", "two/b"])).unwrap();
    assert_eq!((&json["report"]["totals"]["block_count"], &json["report"]["kin"][0]["rows"][1]["ranks"][4]), (&7.into(), &1.into()));
    assert_eq!(json["comparison"]["places"][4]["tensors"]["up.weight"]["state"], "compared");
    let absent = zoo(&root, &["report", "--compare", "one/a", "two/c"]);
    assert_eq!((absent.status.code(), absent.stdout.len()), (Some(1), 0));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("failed to compare one/a with two/c"));
    let nowhere = zoo(&root, &["report", "--html", dir.path().join("no/such/file.html").to_str().unwrap()]);
    assert_eq!(nowhere.status.code(), Some(1));
    for args in [&["report", "--compare", "one/a"][..], &["report", "--html", "x", "--json"], &["report", "--rows", "-1"]] {
        assert_eq!(zoo(&root, args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn an_add_that_is_killed_leaves_a_zoo_that_verifies() {
    let dir = tempfile::tempdir().unwrap();
    let (root, a, b) = (dir.path().join("zoo"), dir.path().join("a"), dir.path().join("b"));
    Checkpoint::llama(1).write(&a);
    Checkpoint::llama(2).write(&b);
    ok(&root, &["add", a.to_str().unwrap(), "--name", "demo/a"]);
    let add = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ashlar"));
        command.args(["zoo", "add", b.to_str().unwrap(), "--name", "demo/a"]).env("ASHLAR_ZOO", &root);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap()
    };
    // How long a whole one takes here, to spread the kills over it.
    #[expect(clippy::disallowed_methods, reason = "the kills are spread over a measured time")]
    let before = Instant::now();
    assert!(add().wait().unwrap().success());
    let whole = before.elapsed();
    for step in 1..12u32 {
        std::fs::remove_dir_all(&root).unwrap();
        ok(&root, &["add", a.to_str().unwrap(), "--name", "demo/a"]);
        let mut child = add();
        std::thread::sleep(whole.min(Duration::from_secs(5)) * step / 12);
        child.kill().unwrap();
        child.wait().unwrap();
        let verified = ok(&root, &["verify"]);
        assert!(verified.contains("all sound"), "{verified}");
        ok(&root, &["show", "demo/a"]);
    }
    ok(&root, &["gc", "--grace", "0"]);
    assert!(ok(&root, &["verify"]).contains("; 0 unreferenced"));
}
