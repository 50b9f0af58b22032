//! The report as one HTML file: style, script and facts within it, nothing fetched. Facts are JSON in a data block, and the script puts them
//! on the page as text, so that no name or source can become markup; a policy in the page allows this one script and style and no request.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::Report;
use super::similarity::Comparison;

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
/// In this order; each is a function of the page's parts, and the last one draws them.
const SCRIPTS: [&str; 5] = [
    include_str!("page/elements.js"),
    include_str!("page/map.js"),
    include_str!("page/costs.js"),
    include_str!("page/compare.js"),
    include_str!("page/main.js"),
];
/// Cells of the map that a page holds, so that a browser can hold the page; rows beyond them are left out, and the page says so.
pub const CELLS_MAX: usize = 200_000;

/// What the script reads.
#[derive(Serialize)]
struct Facts<'a> {
    #[serde(flatten)]
    report: &'a Report,
    rows_left_out: usize,
    comparison: Option<&'a Comparison>,
}

/// The page.
pub fn page(report: &Report, comparison: Option<&Comparison>) -> String {
    let (report, rows_left_out) = bounded(report, CELLS_MAX);
    let facts = Facts { report: &report, rows_left_out, comparison };
    let facts = in_data_block(&serde_json::to_string(&facts).expect("maps of strings, numbers and lists"));
    let script = SCRIPTS.concat();
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'",
        sha256(STYLE),
        sha256(&script)
    );
    // One pass over the template: what a part holds is never searched for the mark of another one.
    let mut page = String::with_capacity(PAGE.len() + STYLE.len() + script.len() + facts.len() + policy.len());
    let mut rest = PAGE;
    for (mark, part) in [("{{policy}}", &policy[..]), ("{{style}}", STYLE), ("{{facts}}", &facts), ("{{script}}", &script)] {
        let (before, after) = rest.split_once(mark).expect("the template has every mark, in this order");
        page.push_str(before);
        page.push_str(part);
        rest = after;
    }
    page + rest
}

/// JSON that ends no `<script>` and begins no comment: `<` is written as an escape, which only strings of JSON can hold.
fn in_data_block(json: &str) -> String {
    json.replace('<', "\\u003c")
}

fn sha256(text: &str) -> String {
    STANDARD.encode(Sha256::digest(text))
}

/// The report with the first rows, of at most `cells_max` cells together, and how many rows that leaves out. Costs are kept whole.
fn bounded(report: &Report, cells_max: usize) -> (Report, usize) {
    let (mut report, mut cell_count, mut left_out) = (report.clone(), 0, 0);
    for kin in &mut report.kin {
        let row_count = kin.rows.len();
        kin.rows.retain(|row| {
            cell_count += row.blocks.len();
            cell_count <= cells_max
        });
        left_out += row_count - kin.rows.len();
    }
    report.kin.retain(|kin| !kin.rows.is_empty());
    (report, left_out)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::report::{Kin, Row};

    #[test]
    fn nothing_in_the_facts_ends_their_block() {
        let json = serde_json::to_string("</script><!--<script>alert(1)</script>").unwrap();
        let block = in_data_block(&json);
        assert!(!block.contains('<'), "{block}");
        assert_eq!(serde_json::from_str::<String>(&block).unwrap(), "</script><!--<script>alert(1)</script>");
    }

    #[test]
    fn rows_beyond_the_bound_are_left_out_and_counted() {
        let row = |places: usize| Row { models: vec![0], blocks: vec![0; places], ranks: vec![0; places], adapters: BTreeMap::new() };
        let mut report = Report::new(String::new(), &[], Vec::new(), &BTreeMap::new());
        report.kin = vec![Kin { model_count: 2, rows: vec![row(6), row(6)] }, Kin { model_count: 1, rows: vec![row(4)] }];
        let bounds = [16, 15, 11, 5].map(|cells_max| bounded(&report, cells_max));
        let rows = bounds.map(|(report, left_out)| (report.kin.iter().map(|kin| kin.rows.len()).collect::<Vec<_>>(), left_out));
        assert_eq!(rows, [(vec![2, 1], 0), (vec![2], 1), (vec![1], 2), (vec![], 3)]);
    }

    #[test]
    fn script_and_style_cannot_end_their_elements() {
        for part in SCRIPTS.iter().chain([&STYLE]) {
            assert!(!part.contains("</script") && !part.contains("</style") && !part.contains("<!--") && !part.contains("{{"));
        }
    }
}
