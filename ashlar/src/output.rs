//! Standard output: all that the binary prints goes through here. A reader that has gone away (`| head`) ends a command without a word
//! and with the status that a shell knows; a disk that is full ends it with a sentence. `println!` panics at both, so lints refuse it.

use std::fmt::Display;
use std::io::{self, Write};

/// What shells report of a command that wrote to a pipe without a reader: 128 and the number of SIGPIPE.
pub const READER_GONE_STATUS: u8 = 141;

/// Standard output takes no more.
#[derive(Debug, thiserror::Error)]
#[error("write to standard output")]
pub struct OutputError(#[from] io::Error);

/// Prints `text` and ends the line.
///
/// # Errors
/// When it cannot be written.
pub fn line(text: impl Display) -> Result<(), OutputError> {
    bytes(format!("{text}\n").as_bytes())
}

/// Prints `text` as it is.
///
/// # Errors
/// When it cannot be written.
pub fn text(text: impl Display) -> Result<(), OutputError> {
    bytes(text.to_string().as_bytes())
}

/// Writes `bytes`, and keeps none of them back.
///
/// # Errors
/// When they cannot be written.
pub fn bytes(bytes: &[u8]) -> Result<(), OutputError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    Ok(stdout.flush()?)
}

impl From<OutputError> for io::Error {
    /// For those who write through [`Write`]; [`reader_is_gone`] finds it again.
    fn from(error: OutputError) -> Self {
        Self::new(error.0.kind(), error)
    }
}

/// Whether a command ended for no other reason than that nobody reads what it prints.
pub fn reader_is_gone(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let within = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref).and_then(|inner| inner.downcast_ref());
        cause.downcast_ref::<OutputError>().or(within).is_some_and(|OutputError(error)| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn only_standard_output_that_is_broken_is_a_reader_gone() {
        let output = |kind: io::ErrorKind| OutputError(kind.into());
        let broken = io::ErrorKind::BrokenPipe;
        assert!(reader_is_gone(&output(broken).into()));
        assert!(reader_is_gone(&Err::<(), _>(output(broken)).context("measure the kernels").unwrap_err()));
        let written = anyhow::Error::new(io::Error::from(output(broken))).context("chat");
        assert!(reader_is_gone(&written), "through a writer");
        assert_eq!(format!("{written:#}"), "chat: write to standard output: broken pipe");
        assert!(!reader_is_gone(&output(io::ErrorKind::StorageFull).into()));
        assert!(!reader_is_gone(&anyhow::Error::new(io::Error::from(broken)).context("fetch")), "some other pipe");
    }
}
