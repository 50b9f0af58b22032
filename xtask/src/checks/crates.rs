//! Rules on the crates' manifests: who may import whom, which lints hold, which dependencies are absent by intent.

use std::collections::BTreeSet;

use crate::Violation;
use crate::tree::Tree;

/// A crate depends on those of ours that ARCHITECTURE.md lists for it, and on no other; in tests and builds neither.
pub fn arrows(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in tree.texts("/Cargo.toml") {
        let manifest = match parse(path, text) {
            Ok(manifest) => manifest,
            Err(violation) => {
                violations.push(violation);
                continue;
            }
        };
        let folder = path.trim_end_matches("/Cargo.toml");
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == folder) else {
            let message = format!("`{folder}` has no line in ARCHITECTURE.md's arrows (and in xtask/src/checks/crates.rs)");
            violations.push(Violation::new(path, 0, message));
            continue;
        };
        for dependency in dependencies(&manifest) {
            let ours = dependency.strip_prefix("ashlar-");
            if let Some(ours) = ours.filter(|ours| !allowed.contains(ours)) {
                let message = format!("`{folder}` must not import `{ours}`; a new arrow is a change of ARCHITECTURE.md");
                violations.push(Violation::new(path, line_of(text, &dependency), message));
            }
        }
    }
    violations
}

/// Every crate has `[lints] workspace = true`.
pub fn lints_are_inherited(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in tree.texts("/Cargo.toml") {
        let inherits = parse(path, text).is_ok_and(|manifest| {
            let lints = manifest.get("lints").and_then(|lints| lints.get("workspace"));
            lints.and_then(toml::Value::as_bool) == Some(true)
        });
        if !inherits {
            violations.push(Violation::new(path, 0, "add `[lints]` with `workspace = true`"));
        }
    }
    violations
}

/// The image is built of all crates: cargo wants every member of the workspace, also those that the binary has nothing of.
pub fn image_has_all_crates(tree: &Tree) -> Vec<Violation> {
    let path = ".containerignore";
    let Some(text) = tree.files.get(path).and_then(|file| file.text.as_deref()) else { return Vec::new() };
    let folders: BTreeSet<&str> = tree.texts("/Cargo.toml").filter_map(|(path, _)| path.split('/').next()).collect();
    let left_out = folders.into_iter().filter(|folder| !text.lines().any(|line| line.strip_prefix('!') == Some(folder)));
    left_out.map(|folder| Violation::new(path, 0, format!("add `!{folder}`: without it no image can be built"))).collect()
}

/// No crate in the whole build reads pickles.
pub fn no_pickle(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in tree.texts("Cargo.lock").chain(tree.texts("Cargo.toml")) {
        for (index, line) in text.lines().enumerate() {
            if line.to_lowercase().contains("pickle") && !line.trim_start().starts_with('#') {
                violations.push(Violation::new(path, index + 1, "no pickle is read: it runs what it finds"));
            }
        }
    }
    violations
}

/// The router has no HTTP client, so it cannot fetch a URL that a client sent.
pub fn router_fetches_nothing(tree: &Tree) -> Vec<Violation> {
    let path = "router/Cargo.toml";
    let Some(text) = tree.files.get(path).and_then(|file| file.text.as_deref()) else {
        return Vec::new();
    };
    let Ok(manifest) = parse(path, text) else {
        return Vec::new();
    };
    let product = manifest.get("dependencies").map(keys).unwrap_or_default();
    let clients = product.into_iter().filter(|name| HTTP_CLIENTS.contains(&name.as_str()));
    clients
        .map(|name| {
            Violation::new(
                path,
                line_of(text, &name),
                format!("`{name}`: no URL that a client sent is fetched, so the router has no HTTP client"),
            )
        })
        .collect()
}

fn parse(path: &str, text: &str) -> Result<toml::Value, Violation> {
    text.parse::<toml::Table>().map(toml::Value::Table).map_err(|error| Violation::new(path, 0, format!("no TOML: {}", error.message())))
}

/// Names in every kind of dependency table, of every target; the package's own name where it is renamed.
fn dependencies(manifest: &toml::Value) -> Vec<String> {
    let mut names = Vec::new();
    let targets = manifest.get("target").and_then(toml::Value::as_table).into_iter().flat_map(|table| table.values());
    for section in std::iter::once(manifest).chain(targets) {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = section.get(kind).and_then(toml::Value::as_table) else {
                continue;
            };
            for (name, value) in table {
                let package = value.get("package").and_then(toml::Value::as_str).unwrap_or(name);
                names.push(package.to_owned());
            }
        }
    }
    names
}

fn keys(value: &toml::Value) -> Vec<String> {
    value.as_table().map(|table| table.keys().cloned().collect()).unwrap_or_default()
}

fn line_of(text: &str, word: &str) -> usize {
    text.lines().position(|line| line.contains(word)).map_or(0, |index| index + 1)
}

/// Who may import whom: ARCHITECTURE.md's arrows.
const ARROWS: &[(&str, &[&str])] = &[
    ("wire", &[]),
    ("kernels", &[]),
    // Its tests run on the emulated card, which speaks the device's language.
    ("kernels/cuda", &["kernels", "cuda-emulated"]),
    ("kernels/cuda/emulated", &["cuda"]),
    ("registry", &["wire"]),
    ("zoo", &["wire", "kernels"]),
    ("executor", &["wire", "registry", "zoo", "kernels"]),
    ("router", &["wire", "registry", "zoo"]),
    ("sim", &["wire", "registry", "zoo", "kernels", "executor", "router"]),
    // Its tests give the binary emulated libraries of NVIDIA's.
    ("ashlar", &["wire", "registry", "zoo", "kernels", "cuda", "cuda-emulated", "executor", "router", "sim"]),
    ("fuzz", &["wire", "registry", "zoo", "kernels", "executor", "router"]),
    ("xtask", &[]),
    // Tests alone.
    ("zoo/tests", &["zoo", "kernels"]),
    ("executor/tests", &["wire", "registry", "zoo", "kernels", "cuda", "cuda-emulated", "executor"]),
];

const HTTP_CLIENTS: &[&str] = &["reqwest", "ureq", "isahc", "curl", "attohttpc"];
