//! Rules on the words of Rust code, by path: what a `state/` folder, a crate or a file must not name. Comments and
//! strings do not count, nor do items under `#[cfg(test)]` where a rule is about the product.

use std::collections::BTreeSet;

use crate::Violation;
use crate::lex::{Token, paths, product_tokens, tokens, words};
use crate::tree::Tree;

/// Nothing under a `state/` folder names tokio, sockets, files, threads, clocks or a process-wide random source.
pub fn state_is_pure(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in state_files(tree) {
        for (line, segments) in paths(&product_tokens(text)) {
            if let Some(reason) = impurity(&segments) {
                let named = segments.join("::");
                violations.push(Violation::new(path, line, format!("`{named}` under state/: {reason}")));
            }
        }
    }
    violations
}

/// A hash map under `state/` says on its line or the one above why order cannot matter (`// lookup only: ...`), and is
/// never iterated.
pub fn state_does_not_iterate_hash_maps(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in state_files(tree) {
        let code = product_tokens(text);
        let lines: Vec<&str> = text.lines().collect();
        let mut names = BTreeSet::new();
        for at in 0..code.len() {
            if !is_hash_map(&code[at].text) {
                continue;
            }
            let name = declared_name(&code, at);
            names.extend(name.clone());
            let is_type = code.get(at + 1).is_some_and(|next| next.text == "<");
            if (is_type || name.is_some()) && !is_explained(&lines, code[at].line) {
                let message = "a hash map under state/ needs `// lookup only: <why>` on its line or the line above; use BTreeMap where order can reach an output";
                violations.push(Violation::new(path, code[at].line, message));
            }
        }
        for at in 0..code.len() {
            if names.contains(&code[at].text) && is_iterated(&code, at) {
                let message = format!("`{}` is a hash map and is iterated: its order differs from run to run", code[at].text);
                violations.push(Violation::new(path, code[at].line, message));
            }
        }
    }
    violations.sort();
    violations.dedup();
    violations
}

/// `unsafe` stands in the CPU kernels, where NVIDIA's libraries and the emulated card are called, in the executor's device thread and in the zoo's one map of a file.
pub fn unsafe_stands_where_it_may(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in tree.texts(".rs") {
        if UNSAFE_ALLOWED.iter().any(|allowed| path == *allowed || (allowed.ends_with('/') && path.starts_with(allowed))) {
            continue;
        }
        for token in tokens(text).iter().filter(|token| token.text == "unsafe") {
            let message = format!("`unsafe` stands only in {}", UNSAFE_ALLOWED.join(", "));
            violations.push(Violation::new(path, token.line, message));
        }
    }
    violations
}

/// `kernels/` does not name tenants, models, sequences or the zoo; `router/` names no tensors; `zoo/` opens no listening socket.
pub fn crates_keep_to_their_nouns(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (folder, forbidden, reason) in NOUNS {
        for (path, text) in tree.texts(".rs").filter(|(path, _)| path.starts_with(folder)) {
            for token in product_tokens(text).iter().filter(|token| token.is_word()) {
                if words(&token.text).iter().any(|word| forbidden.contains(&word.as_str())) || forbidden.contains(&token.text.as_str()) {
                    violations.push(Violation::new(path, token.line, format!("`{}`: {reason}", token.text)));
                }
            }
        }
    }
    violations
}

/// No `todo!`, `unimplemented!` or `dbg!`, in tests neither.
pub fn nothing_unfinished(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in tree.texts(".rs") {
        for pair in tokens(text).windows(2) {
            if UNFINISHED.contains(&pair[0].text.as_str()) && pair[1].text == "!" {
                violations.push(Violation::new(path, pair[0].line, format!("`{}!`: unfinished work does not land", pair[0].text)));
            }
        }
    }
    violations
}

/// A log line's arguments name no key, secret or authorization header.
pub fn keys_are_not_logged(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in tree.texts(".rs") {
        let code = product_tokens(text);
        for at in 0..code.len().saturating_sub(2) {
            if !LOGGING.contains(&code[at].text.as_str()) || code[at + 1].text != "!" {
                continue;
            }
            for token in arguments(&code[at + 2..]) {
                if SECRETS.contains(&token.text.as_str()) {
                    let message = format!("`{}` in `{}!`: keys are compared by hash and never logged", token.text, code[at].text);
                    violations.push(Violation::new(path, token.line, message));
                }
            }
        }
    }
    violations
}

fn state_files(tree: &Tree) -> impl Iterator<Item = (&str, &str)> {
    tree.texts(".rs").filter(|(path, _)| {
        let inside = path.split_once("/src/").map_or("", |(_, inside)| inside);
        (inside == "state.rs" || inside.starts_with("state/") || inside.contains("/state/"))
            && !inside.ends_with("/tests.rs")
            && !inside.contains("/tests/")
    })
}

fn impurity(segments: &[String]) -> Option<&'static str> {
    let starts = |prefix: &str| {
        prefix.split("::").zip(segments.iter().map(Some).chain(std::iter::repeat(None))).all(|(a, b)| b.is_some_and(|b| a == b))
    };
    let by_prefix = IMPURE_PREFIXES.iter().find(|(prefix, _)| starts(prefix)).map(|(_, reason)| *reason);
    by_prefix.or_else(|| IMPURE_WORDS.iter().find(|(word, _)| segments.iter().any(|segment| segment == word)).map(|(_, reason)| *reason))
}

fn is_hash_map(word: &str) -> bool {
    word.ends_with("HashMap") || word.ends_with("HashSet")
}

/// The name in `name: [path::]HashMap<`, `name: &mut HashMap<`, `let mut name = HashMap::new()`.
fn declared_name(code: &[Token], at: usize) -> Option<String> {
    let mut before = at;
    while before > 1 && (code[before - 1].text == "::" || code[before - 1].text == "&" || code[before - 1].text == "mut") {
        before -= if code[before - 1].text == "::" { 2 } else { 1 };
    }
    let separator = code.get(before.checked_sub(1)?)?.text.as_str();
    let is_type = code.get(at + 1).is_some_and(|next| next.text == "<");
    let name = code.get(before.checked_sub(2)?)?;
    let is_let = before >= 3 && matches!(code[before - 3].text.as_str(), "let" | "mut");
    ((separator == ":" && is_type || separator == "=" && is_let) && name.is_word()).then(|| name.text.clone())
}

fn is_explained(lines: &[&str], line: usize) -> bool {
    let explains = |text: &&str| text.split_once("// lookup only:").is_some_and(|(_, why)| why.trim().len() >= 8);
    let above = line.checked_sub(2).and_then(|index| lines.get(index));
    lines.get(line - 1).is_some_and(explains) || above.is_some_and(explains)
}

fn is_iterated(code: &[Token], at: usize) -> bool {
    let text = |index: usize| code.get(index).map_or("", |token| token.text.as_str());
    if text(at + 1) == "." && ITERATORS.contains(&text(at + 2)) {
        return true;
    }
    // `for x in [&][mut] [self.]name {`
    let mut before = at;
    while before > 0 && matches!(text(before - 1), "." | "self" | "&" | "mut") {
        before -= 1;
    }
    before > 0 && text(before - 1) == "in" && text(at + 1) == "{"
}

/// The tokens of a macro call's bracket.
fn arguments(tokens: &[Token]) -> &[Token] {
    let mut depth = 0usize;
    for (index, token) in tokens.iter().enumerate() {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return &tokens[..index];
        }
    }
    tokens
}

const IMPURE_PREFIXES: &[(&str, &str)] = &[
    ("tokio", "a state machine has no runtime; take the event as an argument"),
    ("tokio_stream", "a state machine has no runtime"),
    ("tokio_util", "a state machine has no runtime"),
    ("futures", "a state machine has no runtime"),
    ("tonic", "messages are turned into events in io/"),
    ("hyper", "requests are turned into events in io/"),
    ("axum", "requests are turned into events in io/"),
    ("reqwest", "no IO; emit an output and let io/ do it"),
    ("object_store", "no IO; emit an output and let io/ do it"),
    ("memmap2", "no IO; emit an output and let io/ do it"),
    ("tempfile", "no IO; emit an output and let io/ do it"),
    ("std::fs", "no files; emit an output and let io/ do it"),
    ("std::io", "no IO; emit an output and let io/ do it"),
    ("std::net", "no sockets; emit an output and let io/ do it"),
    ("std::os", "no IO; emit an output and let io/ do it"),
    ("std::thread", "no threads; the caller decides where it runs"),
    ("std::process", "no processes; emit an output and let io/ do it"),
    ("std::env", "settings come in as arguments"),
    ("rayon", "no threads; the caller decides where it runs"),
    ("crossbeam", "no threads; the caller decides where it runs"),
    ("rand::rng", "chance comes in as an argument, from a seed"),
    ("rand::random", "chance comes in as an argument, from a seed"),
];

const IMPURE_WORDS: &[(&str, &str)] = &[
    ("Instant", "time comes in as an argument (a Duration since the start, or milliseconds)"),
    ("SystemTime", "time comes in as an argument"),
    ("thread_rng", "chance comes in as an argument, from a seed"),
    ("from_os_rng", "chance comes in as an argument, from a seed"),
    ("OsRng", "chance comes in as an argument, from a seed"),
    ("SysRng", "chance comes in as an argument, from a seed"),
    ("getrandom", "chance comes in as an argument, from a seed"),
    ("RandomState", "its seed differs from run to run"),
    ("thread_local", "state is what the struct holds"),
    ("async", "a state machine does not wait; it returns what must be done"),
    ("await", "a state machine does not wait; it returns what must be done"),
];

const UNSAFE_ALLOWED: &[&str] = &[
    "kernels/src/cpu.rs",
    "kernels/src/cpu/",
    "kernels/cuda/src/card.rs",
    "kernels/cuda/src/compile.rs",
    "kernels/cuda/src/graph.rs",
    "kernels/cuda/src/pinned.rs",
    "kernels/cuda/emulated/src/lib.rs",
    "executor/src/io/device.rs",
    "zoo/src/mapping.rs",
];

/// Folder, words or identifiers that its product code must not name, and why.
const NOUNS: &[(&str, &[&str], &str)] = &[
    (
        "kernels/src/",
        &["tenant", "tenants", "model", "models", "sequence", "sequences", "zoo"],
        "kernels know numbers, and not tenants, models, sequences or the zoo",
    ),
    (
        "kernels/cuda/src/",
        &["tenant", "tenants", "model", "models", "sequence", "sequences", "zoo"],
        "kernels know numbers, and not tenants, models, sequences or the zoo",
    ),
    ("router/src/", &["map_tensor", "map_block", "MappedTensor", "MappedBlock", "safetensors"], "the router does not read tensors"),
    ("zoo/src/", &["TcpListener", "UnixListener", "UdpSocket", "axum"], "the zoo opens no listening socket"),
];

const UNFINISHED: &[&str] = &["todo", "unimplemented", "dbg"];

const LOGGING: &[&str] = &[
    "trace",
    "debug",
    "info",
    "warn",
    "error",
    "event",
    "span",
    "trace_span",
    "debug_span",
    "info_span",
    "warn_span",
    "error_span",
    "println",
    "eprintln",
];

const SECRETS: &[&str] = &["api_key", "bearer", "authorization", "AUTHORIZATION", "secret", "presented_key"];

const ITERATORS: &[&str] =
    &["iter", "iter_mut", "into_iter", "keys", "into_keys", "values", "values_mut", "into_values", "drain", "retain", "extract_if"];
