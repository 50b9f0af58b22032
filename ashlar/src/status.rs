//! Exit statuses: what scripts may rely on. `--help` and docs/configuration.md tell the same.

use crate::output;

/// It could not be done; standard error says why.
const FAILED: u8 = 1;
/// It was done, and what it looks for was found. Status 2 is a command line that was not understood: clap's.
const FOUND: u8 = 3;

/// A command did what was asked, and found what must not be: damage, a fault, a seed that does not pass.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Found(pub String);

/// The status of a command that ended with an error.
pub fn of(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Found>() {
        Some(_) => FOUND,
        None if output::reader_is_gone(error) => output::READER_GONE_STATUS,
        None => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn finds_keep_their_status_under_any_context() {
        let found = Err::<(), _>(anyhow::Error::new(Found("2 damaged".to_owned()))).context("verify the zoo").unwrap_err();
        assert_eq!((of(&found), format!("{found:#}")), (3, "verify the zoo: 2 damaged".to_owned()));
        assert_eq!(of(&anyhow!("no zoo")), 1);
        let gone = anyhow::Error::new(output::OutputError::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        assert_eq!(of(&gone), 141);
    }
}
