//! What is made of stored models: quantised, stitched and cheaper forms, and profiles of blocks.

use std::path::Path;

use crate::support::Checkpoint;
use crate::{ok, zoo};

#[test]
fn a_model_is_quantised_measured_and_stored_under_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("zoo");
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/base");
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/zoo/measure.txt");
    let (base, text) = (base.to_str().unwrap(), text.to_str().unwrap());
    ok(&root, &["add", base, "--name", "demo/base"]);
    let measured = |more: &[&str]| -> serde_json::Value {
        let args = ["quantize", "demo/base", "--json", "--recipe", "int8-g32", "--recipe", "int4-g64"];
        serde_json::from_str(&ok(&root, &[&args, more].concat())).unwrap()
    };
    let (rounded, calibrated) = (measured(&["--recipe", "fp8", "--recipe", "fp8-g32"]), measured(&["--calibrate", text]));
    let kl = |of: &serde_json::Value, at: usize| of["recipes"][at]["kl"].as_f64().unwrap();
    assert!(kl(&rounded, 0) > 0.0 && kl(&rounded, 0) < 0.1 * kl(&rounded, 1), "{rounded}");
    assert!(kl(&calibrated, 1) < 0.8 * kl(&rounded, 1), "{calibrated} {rounded}");
    // A mantissa of three bits is between seven bits and a sign, and four bits in all.
    assert!((2..4).all(|at| kl(&rounded, at) > kl(&rounded, 0) && kl(&rounded, at) < kl(&rounded, 1)), "{rounded}");
    let bound = |of: &serde_json::Value| (of["recipes"][1]["chain_bound"].clone(), of["recipes"][1]["method"].clone());
    assert_eq!(bound(&rounded), (false.into(), "rounding".into()));
    assert_eq!(bound(&calibrated), (true.into(), "gptq".into()));
    assert_eq!(ok(&root, &["list"]).lines().count(), 2, "nothing was stored");

    let refused = |args: &[&str]| {
        let output = zoo(&root, &[&["quantize", "demo/base"], args].concat());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = refused(&["--recipe", "fp4"]);
    assert!(code == Some(2) && said.contains("`fp4` is none of int8, int4, int8m and int4m"), "{said}");
    let short = dir.path().join("short.txt");
    std::fs::write(&short, "a word").unwrap();
    for (args, sentence) in [
        (vec!["--calibrate", "nowhere.txt"], "failed to quantize demo/base: read the calibration text: read nowhere.txt"),
        (vec!["--calibrate", short.to_str().unwrap()], "tokens, less than 128"),
        (vec!["--text", short.to_str().unwrap()], "less than a window of 128"),
        (vec!["--name", "demo/base"], "failed to quantize demo/base: demo/base exists: give another name with --name"),
        (vec!["--name", "rival/q"], "demo/base is not rival's to see"),
        (
            vec!["--recipe", "fp8", "--calibrate", text],
            "failed to quantize demo/base: fp8 is rounded without data: leave the calibration text out",
        ),
    ] {
        let (code, said) = refused(&[&["--recipe", "int4-g32"], args.as_slice()].concat());
        assert!(code == Some(1) && said.contains(sentence), "{args:?}: {said}");
    }

    let stored = ok(&root, &["quantize", "demo/base", "--recipe", "int4-g32", "--name", "demo/q"]);
    assert!(stored.contains("the model's perplexity is ") && stored.contains("int4-g32 "), "{stored}");
    assert!(stored.contains("demo/q is chain ") && stored.contains("blocks that models share stay shared"), "{stored}");
    let stored = ok(&root, &["quantize", "demo/base", "--recipe", "int4-g32", "--name", "demo/g", "--calibrate", text]);
    assert!(stored.contains("gptq") && stored.contains("calibrated: its blocks are this model's alone"), "{stored}");
    let stored = ok(&root, &["quantize", "demo/base", "--recipe", "fp8", "--head", "fp8-g64", "--name", "demo/f"]);
    assert!(stored.contains("demo/f is chain ") && stored.contains("\nfp8, head fp8-g64 "), "{stored}");
    let shown = ok(&root, &["show", "demo/f"]);
    assert!(shown.contains("fp8g512") && shown.contains("fp8g64") && shown.contains("fp8, head fp8-g64, rounding of chain "), "{shown}");
    let shown = ok(&root, &["show", "demo/g"]);
    assert!(shown.contains("int4g32") && shown.contains("int8g32"), "{shown}");
    assert!(shown.contains("gptq over text ") && shown.contains("the same likeliest token"), "{shown}");
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"));
}

#[test]
fn models_are_stitched_measured_in_plain_words_and_stored_under_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("zoo");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo");
    let (text, prose) = (dir.path().join("prose.txt"), std::fs::read_to_string(demo.join("README.md")).unwrap());
    std::fs::write(&text, prose).unwrap();
    let text = text.to_str().unwrap();
    for name in ["base", "japanese-full"] {
        ok(&root, &["add", demo.join(name).to_str().unwrap(), "--name", &format!("demo/{name}")]);
    }
    let mut random = Checkpoint::sized(3, [96, 2, 2048]);
    random.files.insert("tokenizer.json".to_owned(), std::fs::read(demo.join("base/tokenizer.json")).unwrap());
    random.write(&dir.path().join("random"));
    ok(&root, &["add", dir.path().join("random").to_str().unwrap(), "--name", "demo/random"]);
    let stitch = |a: &str, b: &str, more: &[&str]| {
        let args = ["stitch", a, b, "--calibrate", text];
        zoo(&root, &[&args, more].concat())
    };
    let json = |a: &str, b: &str, more: &[&str]| -> serde_json::Value {
        let output = stitch(a, b, &[more, &["--json"]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };

    // With itself at one cut the best map is none at all.
    let itself = json("demo/base", "demo/base", &["--from", "4", "--to", "4", "--lambda", "1e-9"]);
    assert!(itself["held_out_error"].as_f64().unwrap() < 1e-4 && itself["against_b"]["kl"].as_f64().unwrap() < 1e-3, "{itself}");
    assert!(itself["against_b"]["same_top_share"].as_f64().unwrap() > 0.98, "{itself}");
    let words = itself["notes"].as_array().unwrap().last().unwrap().as_str().unwrap();
    assert!(words.starts_with("on this text it is close to demo/base"), "{words}");
    // A model that was never trained has nothing to give, and is told so.
    let random = stitch("demo/random", "demo/base", &["--from", "2", "--to", "6"]);
    let said = String::from_utf8(random.stdout).unwrap();
    assert!(said.starts_with("layers 0..2 of demo/random, a map of 96 to 128 (50 kB), layers 6.. of demo/base\n"), "{said}");
    assert!(said.contains("it is not fit to be served as demo/base\n") && said.contains("stitched against demo/random"), "{said}");
    assert_eq!(ok(&root, &["list"]).lines().count(), 4, "nothing was stored");

    let (from, short) = (["--from", "4", "--to", "4"], dir.path().join("short.txt"));
    std::fs::write(&short, "a word").unwrap();
    for (args, sentence) in [
        (
            vec!["--from", "9", "--to", "4"],
            "failed to stitch demo/base to demo/japanese-full: demo/base has 8 layers: --from 9 is not within 1 and 8",
        ),
        (vec!["--from", "4", "--to", "8"], "--to 8 is not within 0 and 7"),
        ([from.as_slice(), &["--text", short.to_str().unwrap()]].concat(), "less than a window of 128"),
        ([from.as_slice(), &["--name", "demo/base"]].concat(), "demo/base exists: give another name with --name"),
        ([from.as_slice(), &["--name", "rival/x"]].concat(), "demo/base is not rival's to see"),
    ] {
        let output = stitch("demo/base", "demo/japanese-full", &args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.contains(sentence), "{args:?}: {said}");
    }
    for lambda in ["--lambda=-1", "--lambda=nan"] {
        let output = stitch("demo/base", "demo/japanese-full", &[from.as_slice(), &[lambda]].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains("it must be a number from 0 to 1e6"), "{lambda}: {said}");
    }
    let few = zoo(&root, &["stitch", "demo/base", "demo/base", "--from", "4", "--to", "4", "--calibrate", short.to_str().unwrap()]);
    let said = String::from_utf8(few.stderr).unwrap();
    assert!(few.status.code() == Some(1) && said.contains("tokens, less than 640"), "{said}");

    let stored = stitch("demo/base", "demo/japanese-full", &["--from", "4", "--to", "4", "--name", "demo/both"]);
    let said = String::from_utf8(stored.stdout).unwrap();
    assert!(
        said.contains("demo/both is chain ") && said.contains("all of it but the map, 67 kB, is demo/base's and demo/japanese-full's"),
        "{said}"
    );
    let shown = ok(&root, &["show", "demo/both"]);
    assert!(shown.contains("stitch:4>4 of chain ") && shown.contains(" 9  stitch "), "{shown}");
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"));
    let report = ok(&root, &["report"]);
    assert!(report.contains("demo/both"), "{report}");
}

#[test]
fn a_surrogate_is_measured_against_its_model_and_shares_the_blocks_that_were_not_cut() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("zoo");
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/base");
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/zoo/measure.txt");
    let (base, text) = (base.to_str().unwrap(), text.to_str().unwrap());
    ok(&root, &["add", base, "--name", "demo/base"]);
    let measured = |more: &[&str]| -> serde_json::Value {
        let args = ["surrogate", "demo/base", "--ffn-keep", "0.5", "--json"];
        serde_json::from_str(&ok(&root, &[&args, more].concat())).unwrap()
    };
    let (guessed, told) = (measured(&[]), measured(&["--calibrate", text, "--heads-keep", "0.5", "--blocks", "5..7"]));
    let way = |of: &serde_json::Value, at: usize| (of["ways"][at]["method"].clone(), of["ways"][at]["chain_bound"].clone());
    assert_eq!((way(&guessed, 0), way(&guessed, 1).0), (("by weights".into(), false.into()), serde_json::Value::Null));
    assert_eq!((way(&told, 0), way(&told, 1)), (("calibrated".into(), true.into()), ("refitted".into(), true.into())));
    let number = |of: &serde_json::Value, at: usize, key: &str| of["ways"][at][key].as_f64().unwrap();
    assert!(number(&told, 1, "kl") < 0.9 * number(&told, 0, "kl") && number(&told, 0, "kl") > 0.0, "{told}");
    // All eight feed-forward blocks lose half of 3 x 384 x 128 weights of two bytes, and of their biases.
    let (saved, of_weights) = (number(&guessed, 0, "bytes_of_source") - number(&guessed, 0, "bytes"), f64::from(8 * 3 * 192 * 128 * 2));
    assert!((of_weights..1.01 * of_weights).contains(&saved), "{saved} {of_weights}");
    assert_eq!(told["kept"], serde_json::json!([{ "index": 5, "count": 1 }, { "index": 6, "count": 192 }]));
    assert!((0.5..0.9).contains(&number(&guessed, 0, "work_share")), "{guessed}");
    assert_eq!(ok(&root, &["list"]).lines().count(), 2, "nothing was stored");

    let refused = |args: &[&str]| {
        let output = zoo(&root, &[&["surrogate"], args].concat());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let short = dir.path().join("short.txt");
    std::fs::write(&short, "a word").unwrap();
    let short = short.to_str().unwrap();
    for (args, sentence) in [
        (vec!["demo/none", "--ffn-keep", "0.5"], "failed to make a surrogate of demo/none: "),
        (vec!["demo/base", "--ffn-keep", "1"], "ffn=1 cuts no block of this model"),
        (vec!["demo/base", "--heads-keep", "0.5", "--blocks", "2..3"], "heads=0.5,blocks=2..3 cuts no block of this model"),
        (vec!["demo/base", "--ffn-keep", "0.5", "--blocks", "2..50"], "blocks 2..50 are asked for, and the model has 18, from 0 on"),
        (vec!["demo/base", "--ffn-keep", "0.5", "--calibrate", "nowhere.txt"], "read the calibration text: read nowhere.txt"),
        (vec!["demo/base", "--ffn-keep", "0.5", "--calibrate", short], "tokens, less than 128"),
        (vec!["demo/base", "--ffn-keep", "0.5", "--text", short], "less than a window of 128"),
        (vec!["demo/base", "--ffn-keep", "0.5", "--name", "demo/base"], "demo/base exists: give another name with --name"),
        (vec!["demo/base", "--ffn-keep", "0.5", "--name", "rival/s"], "demo/base is not rival's to see"),
    ] {
        let (code, said) = refused(&args);
        assert!(code == Some(1) && said.contains(sentence), "{args:?}: {said}");
    }
    for args in [
        &["demo/base"][..],
        &["demo/base", "--ffn-keep", "0"],
        &["demo/base", "--ffn-keep", "1.5"],
        &["demo/base", "--heads-keep", "nan"],
        &["demo/base", "--ffn-keep", "0.5", "--blocks", "5..5"],
        &["demo/base", "--ffn-keep", "0.5", "--no-refit"],
    ] {
        assert_eq!(refused(args).0, Some(2), "{args:?}");
    }
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"), "nothing was written");

    let stored =
        ok(&root, &["surrogate", "demo/base", "--ffn-keep", "0.5", "--blocks", "9..17", "--calibrate", text, "--name", "demo/thin"]);
    assert!(
        stored.contains("\nffn=0.5,blocks=9..17                  calibrated ")
            && stored.contains("\nffn=0.5,blocks=9..17                  refitted "),
        "{stored}"
    );
    assert!(
        stored.contains("demo/thin is chain ") && stored.contains("; 4 of its 18 blocks were cut, the others are demo/base's: "),
        "{stored}"
    );
    let shown = ok(&root, &["show", "demo/thin"]);
    assert!(shown.contains("surrogate:ffn=0.5,blocks=9..17, refitted over text ") && shown.contains("the same likeliest token"), "{shown}");
    let diff: serde_json::Value = serde_json::from_str(&ok(&root, &["diff", "demo/base", "demo/thin", "--json"])).unwrap();
    assert_eq!((&diff["shared_blocks"], &diff["common_prefix"]), (&14.into(), &10.into()), "{diff}");
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"));
    // What was made can be made smaller still.
    let twice = ok(&root, &["quantize", "demo/thin", "--recipe", "int8-g32", "--name", "demo/thin-int8"]);
    assert!(twice.contains("demo/thin-int8 is chain "), "{twice}");
}

#[test]
fn blocks_are_profiled_once_for_all_models_and_again_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("zoo");
    let folder = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo").join(name).to_str().unwrap().to_owned();
    ok(&root, &["add", &folder("base"), "--name", "demo/base"]);
    ok(&root, &["add", &folder("shakespeare-top"), "--name", "demo/verse"]);
    // Where the records are, whatever this machine is called.
    let records = || {
        let blocks = std::fs::read_dir(root.join("profiles")).into_iter().flatten().map(|block| block.unwrap().path());
        let records = blocks.flat_map(|block| std::fs::read_dir(block).unwrap().map(|record| record.unwrap().path()));
        records.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect::<std::collections::BTreeMap<_, _>>()
    };
    let profile = |args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&ok(&root, &[&["profile", "--threads", "1", "--json"], args].concat())).unwrap()
    };
    let first = profile(&["demo/base", "--rows", "1,8"]);
    assert_eq!((&first["measured"], &first["known"]), (&18.into(), &0.into()), "{first}");
    assert!(first["read_bytes_per_second"].as_f64().unwrap() > 0.0 && first["device"].as_str().unwrap().ends_with("-1-thread"), "{first}");
    for block in first["blocks"].as_array().unwrap() {
        let points = block["profile"]["points"].as_array().unwrap();
        assert!(points.len() == 2 && points.iter().all(|point| point["micros"].as_f64().unwrap() > 0.0 && point["runs"] == 7), "{block}");
        assert_eq!(block["share_of_bandwidth"].is_null(), block["kind"] == "embed", "{block}");
    }
    let kept = records();
    assert_eq!(kept.len(), 18);

    // Nothing is measured again; of a relative, its own blocks alone.
    let second = profile(&["demo/base", "--rows", "8"]);
    assert_eq!((&second["measured"], &second["known"], records() == kept), (&0.into(), &18.into(), true), "{second}");
    assert_eq!(second["blocks"][3]["profile"], first["blocks"][3]["profile"]);
    let both = profile(&["--all", "--rows", "1,8"]);
    let own = both["measured"].as_u64().unwrap();
    assert!(both["known"] == 18 && (1..18).contains(&own) && records().len() as u64 == 18 + own, "{both}");
    // Other rows, and the rest of the record stays; --force, in its place; another device, beside it.
    let more = profile(&["demo/base", "--rows", "2"]);
    assert_eq!(more["blocks"][0]["profile"]["points"].as_array().unwrap().len(), 3, "{more}");
    let before = records();
    let forced = profile(&["demo/base", "--rows", "1,8", "--force"]);
    assert_eq!((&forced["measured"], &forced["known"], records().len()), (&18.into(), &0.into(), before.len()), "{forced}");
    assert_eq!(before.iter().filter(|(path, bytes)| records()[*path] != **bytes).count(), 18);
    profile(&["demo/base", "--rows", "1", "--isa", "scalar"]);
    assert_eq!(records().len(), before.len() + 18);

    let shown = ok(&root, &["profile", "demo/verse", "demo/base", "--threads", "1", "--rows", "1"]);
    assert!(shown.contains("\nBLOCK ") && shown.contains("  OF BANDWIDTH  ") && shown.contains("  feed_forward  "), "{shown}");
    assert!(
        shown.ends_with(&format!("0 blocks measured, {} had a record of this device (--force measures them again)\n", 18 + own)),
        "{shown}"
    );
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"));
    // A damaged one is told of, and measured anew.
    let (damaged, _) = records().into_iter().find(|(path, _)| path.to_str().unwrap().contains("scalar")).unwrap();
    std::fs::write(&damaged, "{}").unwrap();
    assert_eq!(zoo(&root, &["verify"]).status.code(), Some(3));
    let again = zoo(&root, &["profile", "demo/base", "--threads", "1", "--isa", "scalar", "--rows", "1"]);
    let said = String::from_utf8(again.stderr).unwrap();
    assert!(
        again.status.success() && said.contains("is damaged: this build cannot read it") && said.contains("measuring it anew"),
        "{said}"
    );
    assert!(ok(&root, &["verify"]).contains("all sound; 0 unreferenced"));

    let refused = |args: &[&str]| {
        let output = zoo(&root, &[&["profile"], args].concat());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = refused(&["demo/none"]);
    assert!(code == Some(1) && said.contains("failed to profile demo/none: model demo/none is not in the zoo"), "{said}");
    for args in
        [&[][..], &["demo/base", "--all"], &["demo/base", "--rows", "33"], &["demo/base", "--rows", "0"], &["demo/base", "--rows", "8192"]]
    {
        assert_eq!(refused(args).0, Some(2), "{args:?}");
    }
    assert!(refused(&["demo/base", "--rows", "33"]).1.contains("expected a whole number from 1 to 32, or a multiple of 32 up to 4096"));

    ok(&root, &["rm", "demo/base"]);
    ok(&root, &["rm", "demo/verse"]);
    let freed = ok(&root, &["gc", "--grace", "0"]);
    assert!(freed.contains(&format!(", {} profiles", 36 + own)) && records().is_empty(), "{freed}");
}
