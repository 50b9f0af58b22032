//! Arguments that several benches have, checked while they are read: an error names the flag, what was given and what may be.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PathBufValueParser, TypedValueParser};

use crate::bench::schedule::DURATION_S_MAX;

/// Threads.
pub(crate) const THREADS_MAX: usize = 1024;

/// Reads a whole number from `min` to `max`.
pub(super) fn whole(min: usize, max: usize) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(format!("expected a whole number from {min} to {max}")),
    }
}

/// Reads a number of threads; 0 is all cores.
pub(crate) fn threads(text: &str) -> Result<usize, String> {
    whole(0, THREADS_MAX)(text).map_err(|_| format!("expected a whole number from 1 to {THREADS_MAX}, or 0 for all cores"))
}

/// Reads a time: `2`, `2s` or `500ms`, above 0 and at most a day.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    let (number, unit_s) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 1e-3),
        (None, Some(number)) => (number, 1.0),
        (None, None) => (text, 1.0),
    };
    match number.parse::<f64>().map(|number| number * unit_s) {
        Ok(seconds) if (1e-3..=DURATION_S_MAX).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("expected a time as 2s or 500ms, from 1ms to {DURATION_S_MAX}s")),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_unit_and_bounded() {
        for (text, ms) in [("2", 2000), ("2s", 2000), ("0.5s", 500), ("500ms", 500), ("86400s", 86_400_000)] {
            assert_eq!(time(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["", "s", "ms", "0", "-1s", "nan", "inf", "1e-9s", "86401", "2m"] {
            assert!(time(bad).is_err_and(|error| error.contains("500ms")), "{bad}");
        }
    }
}
