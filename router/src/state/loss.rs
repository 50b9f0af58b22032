//! Why an attempt ended before its sequence did, and what that means for the next one.

use std::collections::BTreeSet;

use ashlar_wire::code::Code;
use ashlar_wire::id::ExecutorId;
use ashlar_wire::v1;

use super::assembly::{ModelNotReady, Route};

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
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

/// What the caller is told if nobody can go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Stable code.
    pub code: Code,
    /// A sentence.
    pub message: String,
}

impl Refusal {
    /// A code and a sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// An attempt that ended early.
#[derive(Debug, Clone)]
pub struct Loss {
    /// For the caller, if this was the last attempt.
    pub error: Refusal,
    /// What to do.
    pub next: Next,
    /// Who is to blame, as far as one can tell.
    pub blamed: BTreeSet<ExecutorId>,
}

impl Loss {
    /// No route leads to the chain's end; `had_route`: one did before, so an executor starts again or spans move, and one may soon do again.
    pub fn not_ready(error: ModelNotReady, had_route: bool) -> Self {
        let (code, next) = if had_route { (Code::Unavailable, Next::AwaitRoute) } else { (Code::ModelNotReady, Next::GiveUp) };
        Self { error: Refusal::new(code, error.reason), next, blamed: BTreeSet::new() }
    }

    /// The model's name was given to another chain, or removed, and what served it could not go on.
    pub fn gone() -> Self {
        let message = "the model was replaced or removed while this request ran, and an executor was lost";
        Self { error: Refusal::new(Code::Unavailable, message), next: Next::GiveUp, blamed: BTreeSet::new() }
    }

    /// The first executor of the route did not understand the call: others would say the same.
    pub fn not_understood(route: &Route) -> Self {
        let error = Refusal::new(Code::Internal, "an executor did not understand the router");
        Self { error, next: Next::GiveUp, blamed: route.executors().take(1).collect() }
    }

    /// The first executor could not be called, or its stream broke or ended without saying why.
    pub fn broken(route: &Route) -> Self {
        let error = Refusal::new(Code::Unavailable, "an executor was lost and no other could take over");
        Self { error, next: Next::AvoidForAll, blamed: route.executors().take(1).collect() }
    }

    /// The stream cannot be right: a token is missing.
    pub fn of_gap(route: &Route) -> Self {
        let error = Refusal::new(Code::Internal, "an executor skipped a token");
        Self { error, next: Next::AvoidForAll, blamed: route.executors().collect() }
    }

    /// An executor gave the sequence up or did not take it.
    pub fn of_failed(failed: &v1::Failed, route: &Route) -> Self {
        let code = Code::parse(&failed.code).unwrap_or(Code::Internal);
        let error = Refusal::new(code, failed.message.clone());
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
            Code::UnknownSpan | Code::StalePlan | Code::NumericClass => Refusal::new(Code::Unavailable, error.message),
            _ => error,
        };
        Self { error, next, blamed }
    }
}
