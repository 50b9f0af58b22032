//! Tokens and failures as routers and executors tell each other of them, and back.

use ashlar_wire::code::{Code, Retry};
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event as SequenceEvent;

use crate::state::batch::SampledToken;

/// The token at `index` of the answer, for whoever is upstream.
pub(super) fn token_event(index: u32, token: SampledToken) -> v1::TokenEvent {
    let top = token.top.iter().map(|(token, logprob)| v1::TokenLogprob { token: *token, logprob: *logprob }).collect();
    v1::TokenEvent { index, token: token.token, logprob: token.logprob, top }
}

/// The token that the end of a route has told of.
pub(super) fn sampled_token(event: v1::TokenEvent) -> SampledToken {
    let top = event.top.iter().map(|top| (top.token, top.logprob)).collect();
    SampledToken { token: event.token, logprob: event.logprob, top }
}

/// A failure, for another executor.
pub(super) fn failed(code: Code, message: &str, retry: Retry) -> v1::Failed {
    let retry = match retry {
        Retry::Never => v1::Retry::Never,
        Retry::Same => v1::Retry::Same,
        Retry::Elsewhere => v1::Retry::Elsewhere,
    };
    v1::Failed { code: code.as_str().to_owned(), message: message.to_owned(), retry: retry.into() }
}

/// A failure, for a router.
pub(super) fn failed_event(code: Code, message: &str, retry: Retry) -> SequenceEvent {
    SequenceEvent::Failed(failed(code, message, retry))
}

/// What an executor told of. A code that is not known here is an internal failure, and a retry that is not known is none.
pub(super) fn failure(failed: &v1::Failed) -> (Code, Retry) {
    let retry = match failed.retry() {
        v1::Retry::Elsewhere => Retry::Elsewhere,
        v1::Retry::Same => Retry::Same,
        v1::Retry::Never | v1::Retry::Unspecified => Retry::Never,
    };
    (Code::parse(&failed.code).unwrap_or(Code::Internal), retry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_comes_back() {
        for code in Code::ALL.iter().copied() {
            for retry in [Retry::Never, Retry::Same, Retry::Elsewhere] {
                assert_eq!(failure(&failed(code, "why", retry)), (code, retry));
            }
        }
        let strange = v1::Failed { code: "of_a_later_version".to_owned(), message: String::new(), retry: 77 };
        assert_eq!(failure(&strange), (Code::Internal, Retry::Never));
        let token = SampledToken { token: 7, logprob: -0.5, top: vec![(7, -0.5), (9, -1.5)] };
        assert_eq!(sampled_token(token_event(3, token.clone())), token);
    }
}
