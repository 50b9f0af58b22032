//! Rules on size: source that one can read in a sitting, and a repository that one can clone in a moment.

use crate::Violation;
use crate::tree::Tree;

/// Source files have at most `LINES_MAX` lines, save those listed with a reason. A listed file that has become short
/// leaves the list.
pub fn files_stay_short(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for suffix in [".rs", ".py", ".sh", ".proto", ".cu"] {
        for (path, text) in tree.texts(suffix) {
            let line_count = text.lines().count();
            let allowed = LONG_FILES.iter().any(|(listed, _)| *listed == path);
            if line_count > LINES_MAX && !allowed {
                let message = format!(
                    "{line_count} lines, more than {LINES_MAX}: cut it by nouns, or list it with a reason in xtask/src/checks/size.rs"
                );
                violations.push(Violation::new(path, 0, message));
            }
            if line_count <= LINES_MAX && allowed {
                violations.push(Violation::new(path, 0, "no longer long: take it off the list in xtask/src/checks/size.rs"));
            }
        }
    }
    violations
}

/// No file above `BYTES_MAX` outside the folders that are there to hold data.
pub fn big_files_stay_out(tree: &Tree) -> Vec<Violation> {
    let is_data = |path: &str| DATA_FOLDERS.iter().any(|folder| path.starts_with(folder));
    let big = tree.files.iter().filter(|(path, file)| file.size_bytes > BYTES_MAX && !is_data(path));
    big.map(|(path, file)| {
        Violation::new(path, 0, format!("{} bytes, more than {BYTES_MAX}, outside {}", file.size_bytes, DATA_FOLDERS.join(" and ")))
    })
    .collect()
}

const LINES_MAX: usize = 600;
const BYTES_MAX: u64 = 1 << 20;
const DATA_FOLDERS: &[&str] = &["demo/", "executor/tests/data/"];

/// Long files, and why each is better whole.
const LONG_FILES: &[(&str, &str)] = &[("demo/train.py", "one script that makes the whole family, read from top to bottom")];
