//! Arguments that several benches have, checked while they are read: an error names the flag, what was given and what may be.

use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};

/// Threads.
pub(super) const THREADS_MAX: usize = 1024;

/// Reads a whole number from `min` to `max`.
pub(super) fn whole(min: usize, max: usize) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(format!("expected a whole number from {min} to {max}")),
    }
}

/// Reads a number of threads; 0 is all cores.
pub(super) fn threads(text: &str) -> Result<usize, String> {
    whole(0, THREADS_MAX)(text).map_err(|_| format!("expected a whole number from 1 to {THREADS_MAX}, or 0 for all cores"))
}

/// Reads where to write a report: hours of measuring must not end at a folder that is not there.
pub(super) fn report_file() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path: PathBuf| {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => std::path::Path::new("."),
        };
        match (folder.is_dir(), path.is_dir()) {
            (true, false) => Ok(path),
            (true, true) => Err("expected a file to write, and that is a folder".to_owned()),
            (false, _) => Err(format!("there is no folder {}", folder.display())),
        }
    })
}
