//! What the binary prints: help, and what happens when nobody reads it or it cannot be written.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use std::fs::OpenOptions;
use std::process::{Command, Output, Stdio};

use ashlar_zoo::store::Zoo;

fn run(args: &[&str], stdout: impl Into<Stdio>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ashlar"));
    // Settings of whoever runs the tests are not the tests'; `serve` refuses those that it does not know.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ASHLAR_")) {
        command.env_remove(name);
    }
    command.args(args).stdout(stdout).stderr(Stdio::piped()).output().unwrap()
}

#[test]
fn reader_that_went_away_ends_a_command_quietly() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_str().unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(Zoo::create_dir(dir.path())).unwrap();
    let one_cell = ["bench", "kernels", "--dtypes", "int8g32", "--shapes", "64x64", "--rows", "1", "--rotate-mib", "1"];
    for args in [&["devices"][..], &["serve", "--print-config"], &["zoo", "gc", "--zoo", root], &one_cell] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = run(args, writer);
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(141), ""), "{args:?}");
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error_with_its_reason() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = run(&["devices"], full);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.starts_with("error: failed to write to standard output: No space left on device"), "{error}");
}

#[test]
fn help_of_bench_says_where_to_begin() {
    let output = run(&["bench", "--help"], Stdio::piped());
    let help = String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(output.status.success() && help.contains("Begin with `ashlar bench load`"), "{help}");
    for command in [
        "load A server under load",
        "stalls What long prompts do",
        "kernels This machine",
        "step A model of the zoo",
        "quality Stored forms",
    ] {
        assert!(help.contains(command), "{command}: {help}");
    }
}

#[test]
fn commands_that_listen_nowhere_do_not_offer_to() {
    for command in ["serve", "tenant", "deploy", "check"] {
        let output = run(&[command, "--help"], Stdio::piped());
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(help.contains("--registry") && help.contains("--set"), "{help}");
        assert_eq!(help.contains("--listen") && help.contains("--print-config"), command == "serve", "{help}");
    }
}

#[test]
fn what_would_change_nothing_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere");
    let (root, nowhere) = (dir.path().to_str().unwrap(), nowhere.to_str().unwrap());
    let set = ["deploy", "set", "a/b", "--gap-ms", "50"];
    for (args, expected) in [
        ([&set[..3], &["--zoo", root]].concat(), "required"),
        ([&set[..], &["--registry", "memory:"]].concat(), "one in memory ends with this command"),
        ([&set[..], &["--zoo", nowhere]].concat(), "there is no such zoo"),
        (vec!["tenant", "key", "a", "--registry", "memory:"], "change the registry: one in memory ends with this command"),
        (vec!["deploy", "list", "--zoo", nowhere], "failed to read the registry beside zoo"),
        (vec!["deploy", "set", "a/b", "--gap-ms", "1.5"], "expected whole milliseconds"),
        (vec!["deploy", "set", "a/b", "--ttft-ms", "-1"], "expected whole milliseconds"),
        (vec!["sim", "--seed", "18446744073709551615", "--seeds", "2"], "use --seed 18446744073709551615 and --seeds 2 together"),
        (vec!["check", "--executor", "http://127.0.0.1:80"], "use HOST:PORT"),
        (vec!["check", "--executor", "127.0.0.1:80", "--zoo", root], "cannot be used with"),
    ] {
        let output = run(&args, Stdio::piped());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && output.stdout.is_empty() && error.contains(expected), "{args:?}: {error}");
    }
}

#[test]
fn check_that_finds_nobody_says_where_it_looked() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = dir.path().join("zoo");
    let zoo = zoo.to_str().unwrap();
    for (args, expected) in [
        (["check", "--zoo", zoo], format!("no `ashlar serve` runs on registry {zoo}.registry.json")),
        (["check", "--registry", "memory:"], "known to its own server alone".to_owned()),
    ] {
        let output = run(&args, Stdio::piped());
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(output.stdout.is_empty() && error.contains(&expected), "{args:?}: {error}");
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = run(&["check", "--executor", &port.to_string()], Stdio::piped());
    let line = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert!(line.starts_with(&format!("?  {port}  cannot be reached: ")), "{line}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 of 1 has a fault or cannot be reached"));
}

#[test]
fn settings_may_be_set_before_their_model_is_there_and_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("zoo");
    tokio::runtime::Runtime::new().unwrap().block_on(Zoo::create_dir(&root)).unwrap();
    let root = root.to_str().unwrap();
    let output = run(&["deploy", "set", "acme/later", "--gap-ms", "50", "--zoo", root], Stdio::piped());
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stdout), "acme/later  first token: as executors are set  gap: 50 ms  blocks: exact\n");
    let expected = format!("no such model yet: acme/later is not in zoo {root}; its settings wait for it\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), expected);
    let output = run(&["tenant", "add", "blue", "--model", "acme/later", "--zoo", root], Stdio::piped());
    assert!(output.status.success());
    let expected = format!("no such model yet: acme/later is not in zoo {root}; the right to use it waits for it\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), expected);
    let output = run(&["deploy", "list", "--zoo", root], Stdio::piped());
    assert_eq!(String::from_utf8_lossy(&output.stdout), "acme/later  first token: as executors are set  gap: 50 ms  blocks: exact\n");
}

#[test]
fn help_tells_the_statuses() {
    for (args, expected) in [
        (&["--help"][..], "Status 0: done. 1: failed"),
        (&["zoo", "verify", "--help"], "3: something is damaged or missing"),
        (&["check", "--help"], "3: one has a fault"),
        (&["sim", "--help"], "3: a checker found something"),
    ] {
        let output = run(args, Stdio::piped());
        let help = String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(output.status.success() && help.contains(expected), "{args:?}: {help}");
    }
    for args in [&["no-such-command"][..], &["zoo", "show", "no model id"], &["sim", "--seeds", "0"]] {
        assert_eq!(run(args, Stdio::piped()).status.code(), Some(2), "{args:?}");
    }
    let planted = run(&["sim", "--seeds", "30", "--canary", "leaks-pages"], Stdio::piped());
    assert_eq!(planted.status.code(), Some(3), "{}", String::from_utf8_lossy(&planted.stdout));
}

#[test]
fn shells_complete_the_report() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell], Stdio::piped());
        assert!(script.status.success() && String::from_utf8_lossy(&script.stdout).contains("compare"), "{shell}");
    }
}
