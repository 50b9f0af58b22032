//! Exit statuses: what scripts may rely on. `--help` and docs/configuration.md tell the same.

use crate::output;

/// It could not be done; standard error says why.
const FAILED: u8 = 1;
/// The command line asks for what cannot be: clap's status, and ours for what clap does not see.
const MISUSED: u8 = 2;
/// It was done, and what it looks for was found.
const FOUND: u8 = 3;

/// A command did what was asked, and found what must not be: damage, a fault, a seed that does not pass.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Found(pub String);

/// The command line, a variable or a configuration file asks for what cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct Misused(pub anyhow::Error);

/// The status of a command that ended with an error.
pub fn of(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Found>() {
        Some(_) => FOUND,
        None if error.is::<Misused>() => MISUSED,
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
        let misused = anyhow::Error::new(Misused(anyhow!("no number").context("use --set a=b")));
        assert_eq!((of(&misused), format!("{misused:#}")), (2, "use --set a=b: no number".to_owned()));
        let gone = anyhow::Error::new(output::OutputError::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        assert_eq!(of(&gone), 141);
    }
}
