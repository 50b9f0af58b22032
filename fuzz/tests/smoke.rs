//! Each target against mutations of its corpus for `ASHLAR_FUZZ_SECONDS` (5). A failure prints the seed and the input.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use std::path::Path;
use std::time::{Duration, Instant};

use ashlar_fuzz::mutate::{Random, mutate};

fn run(name: &str, target: fn(&[u8])) {
    let seconds = std::env::var("ASHLAR_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let seed = std::env::var("ASHLAR_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut corpus: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    corpus.sort();
    let corpus: Vec<Vec<u8>> = corpus.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(!corpus.is_empty(), "{} is empty", folder.display());
    corpus.iter().for_each(|input| target(input));
    let mut random = Random::new(seed);
    #[expect(clippy::disallowed_methods, reason = "this test is bounded by time")]
    let start = Instant::now();
    let mut count = 0u64;
    while start.elapsed() < Duration::from_secs(seconds) {
        let input = mutate(&corpus[random.below(corpus.len())], &corpus[random.below(corpus.len())], &mut random);
        if std::panic::catch_unwind(|| target(&input)).is_err() {
            let path = std::env::temp_dir().join(format!("ashlar-fuzz-{name}-{seed}-{count}"));
            std::fs::write(&path, &input).unwrap();
            panic!("{name}: input {count} of seed {seed} panicked; it is in {}", path.display());
        }
        count += 1;
    }
    println!("{name}: {count} inputs");
}

#[test]
fn safetensors() {
    run("safetensors", ashlar_fuzz::safetensors::safetensors);
}

#[test]
fn gguf() {
    run("gguf", ashlar_fuzz::gguf::gguf);
}

#[test]
fn adapter() {
    run("adapter", ashlar_fuzz::adapter::adapter);
}

#[test]
fn manifest() {
    run("manifest", ashlar_fuzz::manifest::manifest);
}

#[test]
fn quantised() {
    run("quantised", ashlar_fuzz::quantised::quantised);
}

#[test]
fn encoding() {
    run("encoding", ashlar_fuzz::encoding::encoding);
}
