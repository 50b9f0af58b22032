//! `ashlar zoo report`: a zoo as a map in the terminal, as JSON, or as one page of HTML. Chooses how it looks; what it says is ashlar-zoo's.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::report::map::{self, Look};
use ashlar_zoo::report::page;
use ashlar_zoo::store::Zoo;
use clap::Args;

use super::{progress, table};
use crate::output;

/// Columns where neither a terminal nor `COLUMNS` tells.
const COLUMNS_DEFAULT: usize = 100;

/// Arguments of `ashlar zoo report`.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Write one page of HTML, which needs nothing beside it and asks no network
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Also read the weights of two models, and tell how alike they are
    #[arg(long, num_args = 2, action = clap::ArgAction::Set, value_names = ["TENANT/MODEL", "TENANT/MODEL"])]
    compare: Vec<ModelId>,
    /// Rows of the map and of each table to print at most; `--html` and `--json` have all
    #[arg(long, default_value_t = 100, value_name = "COUNT")]
    rows: usize,
    /// As JSON
    #[arg(long, conflicts_with = "html")]
    json: bool,
}

/// Prints the report, or writes the page.
///
/// # Errors
/// When manifests cannot be listed, a model to compare cannot be read, or the page cannot be written.
pub(super) async fn run(zoo: &Zoo, args: ReportArgs) -> anyhow::Result<()> {
    let report = zoo.report().await.context("report on the zoo")?;
    let comparison = match &args.compare[..] {
        [a, b] => {
            let compared = zoo.compare_weights(a, b, &*progress::for_terminal()).await;
            Some(compared.with_context(|| format!("compare {a} with {b}"))?)
        }
        _ => None,
    };
    if args.json {
        let json = serde_json::json!({ "report": report, "comparison": comparison });
        return Ok(output::line(serde_json::to_string_pretty(&json)?)?);
    }
    if let Some(file) = &args.html {
        write_whole(file, &page::page(&report, comparison.as_ref())).with_context(|| format!("write {}", file.display()))?;
        return Ok(output::line(format_args!("the report is in {}", file.display()))?);
    }
    let look = Look { columns: columns(), colours: shows_colours(), rows_max: args.rows };
    output::text(map::map(&report, &look))?;
    output::text(table::report(&report, args.rows))?;
    if let Some(comparison) = &comparison {
        output::text(table::comparison(comparison))?;
    }
    Ok(())
}

/// Writes beside `file` and then takes its place, so that whoever has the page open never sees a part of one.
fn write_whole(file: &Path, text: &str) -> std::io::Result<()> {
    let mut name =
        file.file_name().ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidInput, "this is no file name"))?.to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = file.with_file_name(name);
    let written = std::fs::write(&part, text).and_then(|()| std::fs::rename(&part, file));
    if written.is_err() {
        let _ = std::fs::remove_file(&part); // the error that counts is the first
    }
    written
}

fn columns() -> usize {
    let told = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
    let set = || std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    told.or_else(set).filter(|columns| *columns > 0).unwrap_or(COLUMNS_DEFAULT)
}

/// Whether standard output is a terminal that has colours and block elements. `NO_COLOR` (no-color.org) asks for neither.
fn shows_colours() -> bool {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = set("LC_ALL").or_else(|| set("LC_CTYPE")).or_else(|| set("LANG")).unwrap_or_default().to_ascii_lowercase();
    let is_unicode = locale.contains("utf-8") || locale.contains("utf8");
    std::io::stdout().is_terminal() && set("NO_COLOR").is_none() && set("TERM").is_some_and(|term| term != "dumb") && is_unicode
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_cannot_be_written_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let taken = dir.path().join("taken");
        std::fs::create_dir(&taken).unwrap();
        std::fs::write(taken.join("inside"), "").unwrap();
        assert!(write_whole(&taken, "page").is_err());
        assert!(write_whole(Path::new("/"), "page").is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no part is left");
        let file = dir.path().join("report.html");
        std::fs::write(&file, "older").unwrap();
        write_whole(&file, "page").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "page");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
