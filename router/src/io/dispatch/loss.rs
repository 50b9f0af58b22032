//! Why an attempt ended before its sequence did, and what that means for the next one.

use std::collections::BTreeSet;

use ashlar_wire::code::Code;
use ashlar_wire::id::ExecutorId;
use ashlar_wire::v1;
use tonic::Status;

use super::super::backend::ApiError;
use crate::state::assembly::{ModelNotReady, Route};

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Tell the caller.
    GiveUp,
    /// Try again; any route will do.
    Again,
    /// No route now: wait until the cluster changes.
    AwaitRoute,
    /// Try elsewhere, and tell all sequences to avoid these for a while.
    AvoidForAll,
    /// Try elsewhere: these refused, for a reason that concerns this sequence only.
    AvoidHere,
    /// As `AvoidHere`, but where nothing else can take the sequence the refusal is the answer.
    RefusedHere,
}

/// An attempt that ended early.
#[derive(Debug)]
pub(super) struct Loss {
    /// For the caller, if this was the last attempt.
    pub(super) error: ApiError,
    pub(super) next: Next,
    /// Who is to blame, as far as one can tell.
    pub(super) blamed: BTreeSet<ExecutorId>,
}

impl Loss {
    pub(super) fn not_ready(error: ModelNotReady, begun: bool) -> Self {
        let (code, next) = if begun { (Code::Unavailable, Next::AwaitRoute) } else { (Code::ModelNotReady, Next::GiveUp) };
        Self { error: ApiError::new(code, error.reason), next, blamed: BTreeSet::new() }
    }

    /// The model's name was given to another chain, or removed, and what served it could not go on.
    pub(super) fn gone() -> Self {
        let message = "the model was replaced or removed while this request ran, and an executor was lost";
        Self { error: ApiError::new(Code::Unavailable, message), next: Next::GiveUp, blamed: BTreeSet::new() }
    }

    /// The first executor could not be called, or its stream broke.
    pub(super) fn of_status(status: &Status, route: &Route) -> Self {
        let next = match status.code() {
            // The message itself is wrong; others would say the same.
            tonic::Code::InvalidArgument | tonic::Code::OutOfRange | tonic::Code::Unimplemented => Next::GiveUp,
            _ => Next::AvoidForAll,
        };
        let (code, message) = match next {
            Next::GiveUp => (Code::Internal, "an executor did not understand the router"),
            _ => (Code::Unavailable, "an executor was lost and no other could take over"),
        };
        Self { error: ApiError::new(code, message), next, blamed: route.executors().take(1).collect() }
    }

    /// The stream ended without saying why.
    pub(super) fn of_end(route: &Route) -> Self {
        Self::of_status(&Status::unavailable("the stream ended early"), route)
    }

    /// The stream cannot be right: a token is missing.
    pub(super) fn of_gap(route: &Route) -> Self {
        let error = ApiError::new(Code::Internal, "an executor skipped a token");
        Self { error, next: Next::AvoidForAll, blamed: route.executors().collect() }
    }

    /// An executor gave the sequence up or did not take it.
    pub(super) fn of_failed(failed: &v1::Failed, route: &Route) -> Self {
        let code = Code::parse(&failed.code).unwrap_or(Code::Internal);
        let error = ApiError::new(code, failed.message.clone());
        let first = || route.executors().take(1).collect();
        let (next, blamed) = match (failed.retry(), code) {
            (v1::Retry::Same, _) => (Next::Again, BTreeSet::new()),
            (v1::Retry::Elsewhere, Code::NeverFits | Code::TooManyRequests) => (Next::RefusedHere, route.executors().collect()),
            // It may hold the span a moment later; the registry will say so. Which hop refused is not said: where there are more, the
            // first has usually passed on the word of one behind it.
            (v1::Retry::Elsewhere, Code::UnknownSpan | Code::StalePlan | Code::NumericClass | Code::Draining) => {
                (Next::AvoidHere, if route.hops.len() > 1 { route.executors().skip(1).collect() } else { first() })
            }
            // The one that speaks lives: it lost one behind it, if there is one.
            (v1::Retry::Elsewhere, _) if route.hops.len() > 1 => (Next::AvoidForAll, route.executors().skip(1).collect()),
            (v1::Retry::Elsewhere, _) => (Next::AvoidForAll, first()),
            (v1::Retry::Never | v1::Retry::Unspecified, _) => (Next::GiveUp, BTreeSet::new()),
        };
        // What only the cluster can mend is not the caller's fault.
        let error = match code {
            Code::UnknownSpan | Code::StalePlan | Code::NumericClass => ApiError::new(Code::Unavailable, error.message),
            _ => error,
        };
        Self { error, next, blamed }
    }
}
