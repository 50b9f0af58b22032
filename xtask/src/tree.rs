//! The repository as a map from path to content: what git tracks or would track. Tests build small trees by hand, so
//! that each check can be shown a violation. Knows nothing of the rules.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One file of the repository.
#[derive(Debug, Clone)]
pub struct File {
    /// Size in bytes, also where the content is not text.
    pub size_bytes: u64,
    /// The content, if it is UTF-8 and at most `TEXT_BYTES_MAX` long.
    pub text: Option<String>,
}

/// All files, by path from the root with `/` between folders.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    /// Path to file, in order of path.
    pub files: BTreeMap<String, File>,
}

impl Tree {
    /// Reads what git tracks, and what it would track if it were added (so that a new file is checked before its commit).
    pub fn load(root: &Path) -> Result<Tree, String> {
        let listed = Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
            .current_dir(root)
            .output()
            .map_err(|error| format!("failed to run git ls-files: {error}"))?;
        if !listed.status.success() {
            return Err(format!("git ls-files failed: {}", String::from_utf8_lossy(&listed.stderr)));
        }
        let mut tree = Tree::default();
        for path in String::from_utf8_lossy(&listed.stdout).split('\0').filter(|path| !path.is_empty()) {
            let full = root.join(path);
            // Listed but gone: deleted in the work tree and not yet in the index.
            let Ok(metadata) = std::fs::symlink_metadata(&full) else {
                continue;
            };
            if !metadata.is_file() {
                continue;
            }
            let size_bytes = metadata.len();
            let text = if size_bytes <= TEXT_BYTES_MAX {
                let bytes = std::fs::read(&full).map_err(|error| format!("failed to read {path}: {error}"))?;
                String::from_utf8(bytes).ok()
            } else {
                None
            };
            tree.files.insert(path.to_owned(), File { size_bytes, text });
        }
        Ok(tree)
    }

    /// A tree of literals, for tests of the checks.
    pub fn of(files: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::default();
        for (path, text) in files {
            let file = File { size_bytes: text.len() as u64, text: Some((*text).to_owned()) };
            tree.files.insert((*path).to_owned(), file);
        }
        tree
    }

    /// The text files whose path ends so.
    pub fn texts<'a>(&'a self, suffix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.files
            .iter()
            .filter(move |(path, _)| path.ends_with(suffix))
            .filter_map(|(path, file)| Some((path.as_str(), file.text.as_deref()?)))
    }

    /// Whether a file or folder of this path exists.
    pub fn holds(&self, path: &str) -> bool {
        let folder = format!("{path}/");
        path.is_empty()
            || self.files.contains_key(path)
            || self.files.range(folder.clone()..).next().is_some_and(|(found, _)| found.starts_with(&folder))
    }
}

/// The repository's root, whatever folder the test runs in.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository's root").to_owned()
}

/// Longer files are data and are not read.
const TEXT_BYTES_MAX: u64 = 4 << 20;
