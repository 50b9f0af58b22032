//! What the repository promises about itself, checked as an ordinary test. `tree` reads the files, `lex` tells code from
//! comments and strings, `checks/` holds one rule a function. Start at `checks::all`; the tests are in `tests/tidy.rs`.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

pub mod checks;
pub mod lex;
pub mod tree;

use std::fmt;

/// One broken rule: where, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    /// Path from the repository root.
    pub path: String,
    /// Line, from 1; 0 where the whole file is meant.
    pub line: usize,
    /// What is wrong, as a sentence for whoever broke it.
    pub message: String,
}

impl Violation {
    /// A violation at a line (0: the whole file).
    pub fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Violation { path: path.to_owned(), line, message: message.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.message)
    }
}
