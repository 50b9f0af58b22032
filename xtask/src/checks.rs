//! One rule a function: from the tree to the violations found. A new rule is a function in one of these modules, a line
//! in `all`, and a planted violation in `tests/tidy.rs`.

pub mod crates;
pub mod docs;
pub mod purity;
pub mod size;

use crate::Violation;
use crate::tree::Tree;

/// A rule: its name and the function that finds what breaks it.
pub type Check = (&'static str, fn(&Tree) -> Vec<Violation>);

/// All rules.
pub const ALL: &[Check] = &[
    ("state folders are free of IO, clocks and chance", purity::state_is_pure),
    ("state folders do not iterate hash maps", purity::state_does_not_iterate_hash_maps),
    ("unsafe stands where it may", purity::unsafe_stands_where_it_may),
    ("each crate keeps to its own nouns", purity::crates_keep_to_their_nouns),
    ("nothing unfinished lands", purity::nothing_unfinished),
    ("keys are not logged", purity::keys_are_not_logged),
    ("crates import only along the arrows", crates::arrows),
    ("crates inherit the workspace's lints", crates::lints_are_inherited),
    ("the image is built of all crates", crates::image_has_all_crates),
    ("no pickle is read", crates::no_pickle),
    ("no client's URL is fetched", crates::router_fetches_nothing),
    ("files stay readable in one sitting", size::files_stay_short),
    ("big files stay out", size::big_files_stay_out),
    ("links in the documents resolve", docs::links_resolve),
];

/// Runs every rule; a line for each violation, in order.
pub fn all(tree: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, check) in ALL {
        let mut violations = check(tree);
        violations.sort();
        lines.extend(violations.iter().map(|violation| format!("{violation} [{name}]")));
    }
    lines
}
