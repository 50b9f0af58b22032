//! Seeds that every run of the tests takes, planted defects that must be found, and that a seed is the same twice. `ASHLAR_SIM_SEEDS` takes
//! more of them, `ASHLAR_SIM_FROM` others.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use ashlar_sim::{CANARIES, Options, Report, run};

const SEEDS: u64 = 200;
/// Within so many seeds each planted defect is found.
const CANARY_SEEDS: u64 = 30;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn random_seeds() {
    let (from, count) = (number("ASHLAR_SIM_FROM", 0), number("ASHLAR_SIM_SEEDS", SEEDS));
    let mut all = Report::default();
    for seed in from..from + count {
        match run(&Options { seed, ..Options::default() }) {
            Ok(report) => all.add(&report),
            Err(failure) => panic!("{failure}"),
        }
    }
    println!("{count} seeds from {from}:\n{all}");
    if count >= SEEDS {
        // They are worth something only if all of this happens in them.
        let seen =
            [all.preemptions, all.resumes, all.discarded_rows, all.cross_model_tokens, all.evicted_pages, all.kills, all.cuts, all.drains];
        assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
        assert!(all.met_most > 2 && all.hops_most > 2 && all.finished > all.requests / 2);
    }
}

#[test]
fn planted_defects_are_found() {
    for (name, canary) in CANARIES {
        let found = (0..CANARY_SEEDS).find_map(|seed| run(&Options { seed, canary, ..Options::default() }).err());
        let failure = found.unwrap_or_else(|| panic!("{name} was not found within {CANARY_SEEDS} seeds"));
        let checkers: &[&str] = match name {
            "publishes-early" | "frees-in-window" => &["tokens"],
            "frees-in-flight" => &["pages-in-flight", "tokens"],
            _ => &["integrity", "idle"],
        };
        assert!(checkers.contains(&failure.checker), "{name} was found by {}", failure.checker);
        let text = failure.to_string();
        assert!(text.contains(&format!("ashlar sim --seed {} --canary {name}", failure.seed)), "{text}");
        assert!(!failure.last.is_empty());
    }
}

/// Lines that `...` leaves out may be any.
#[test]
fn documented_failure_is_the_one_that_is_printed() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/simulation.md")).expect("the page");
    let (_, sample) = page.split_once("$ ashlar sim --seeds 30 --canary leaks-pages\n0 seeds passed before it\n").expect("a sample");
    let (sample, _) = sample.split_once("\n```").expect("its end");
    let (above, below) = sample.split_once("\n  ...\n").expect("lines that are left out");
    let (_, canary) = CANARIES.into_iter().find(|(name, _)| *name == "leaks-pages").expect("it can be planted");
    let printed = run(&Options { seed: 0, canary, ..Options::default() }).expect_err("it is found").to_string();
    assert!(printed.starts_with(above) && printed.ends_with(below), "docs/simulation.md has\n{sample}\nand the command prints\n{printed}");
}

#[test]
fn one_seed_is_the_same_twice() {
    let both: Vec<Report> = (0..2).map(|_| run(&Options { seed: 7, ..Options::default() }).expect("it passes")).collect();
    assert_eq!(both[0], both[1]);
    assert!(both[0].tokens > 0);
}

/// Cut chains that waited for each other (50, 3969), a chunk that no longer fitted (4315), hidden rows held by one that lacked pages (5741),
/// three segments that became one while several spans had sequences in them (5628), pages
/// that were known from an earlier cut when they were joined (8256).
#[test]
fn seeds_that_once_failed() {
    for seed in [50, 3969, 4315, 5628, 5741, 8256] {
        if let Err(failure) = run(&Options { seed, ..Options::default() }) {
            panic!("{failure}");
        }
    }
}
