//! The journal of one sequence: the tokens handed out, the attempt that runs now, and what follows when that attempt is lost. Every
//! attempt starts from the journal under the next epoch, so the caller sees each token once. Calls and waits are made in `io/dispatch`.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::time::Duration;

use ashlar_wire::code::Code;
use ashlar_wire::id::ExecutorId;
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event;

use super::assembly::{ModelNotReady, Route};
use super::loss::{Loss, Next, Refusal};

/// How long the second attempt in a row waits; each further one waits twice as long as the one before.
const WAIT_FIRST: Duration = Duration::from_millis(50);
/// How long an attempt waits at most.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// When a sequence has ended.
#[derive(Debug, Clone)]
pub struct Ends {
    /// After so many generated tokens.
    pub generated_tokens_max: u32,
    /// After any of these.
    pub stop_tokens: Vec<u32>,
    /// After so many lost attempts in a row without a new token.
    pub attempts_max: u32,
}

/// What an event of an attempt means.
#[derive(Debug)]
pub enum Step {
    /// For the caller.
    HandOut(Event),
    /// The caller knows it already.
    Skip,
    /// The attempt is over: `handle_loss` says what follows.
    Lost(Loss),
}

/// What follows a lost attempt.
#[derive(Debug)]
pub struct Recovery {
    /// All sequences should avoid these for a while.
    pub suspects: BTreeSet<ExecutorId>,
    /// What this one does.
    pub then: Then,
}

/// What a sequence does after a lost attempt.
#[derive(Debug)]
pub enum Then {
    /// Nothing: its journal is complete, and only the word of its end was lost.
    Finished(v1::Finished),
    /// It ends with an error.
    GiveUp(Refusal),
    /// It tries again after a wait.
    Again {
        /// How long.
        wait: Duration,
        /// Whether a change of the cluster ends the wait.
        until_change: bool,
    },
}

/// The journal.
#[derive(Debug)]
pub struct Journal {
    ends: Ends,
    /// Of the next attempt.
    epoch: u32,
    /// Where the attempt runs that was begun last.
    route: Option<Route>,
    /// Tokens handed out; once there are any, all routes are of the last one's class.
    generated: Vec<u32>,
    /// Attempts lost since the last token.
    lost_count: u32,
    /// Executors that did not take this sequence.
    avoided: BTreeSet<ExecutorId>,
    /// What the last of them said, where that may be the answer.
    refusal: Option<Refusal>,
    started: bool,
}

impl Journal {
    /// Of a sequence that has not begun.
    pub fn new(ends: Ends) -> Self {
        let (generated, avoided) = (Vec::new(), BTreeSet::new());
        Self { ends, epoch: 0, route: None, generated, lost_count: 0, avoided, refusal: None, started: false }
    }

    /// Of the next attempt.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Tokens handed out so far.
    pub fn generated(&self) -> &[u32] {
        &self.generated
    }

    /// Executors that this sequence tries last.
    pub fn avoided(&self) -> &BTreeSet<ExecutorId> {
        &self.avoided
    }

    /// The class that the next route must be of. Before the first token any will do.
    pub fn pinned_class(&self) -> Option<&str> {
        self.route.as_ref().map(|route| route.numeric_class.as_str()).filter(|_| !self.generated.is_empty())
    }

    /// Begins the next attempt, on a route that assembly found for it. Returns its epoch. `returns`: the chain had a route for others
    /// and will have one again. `is_gone` says whether no name and no plan has the chain any more.
    ///
    /// # Errors
    /// When there is no route, or only one that has refused: `handle_loss` says what follows.
    pub fn begin(&mut self, route: Result<Route, ModelNotReady>, returns: bool, is_gone: impl FnOnce() -> bool) -> Result<u32, Loss> {
        let begun = self.epoch > 0;
        let route = match route {
            Ok(route) => route,
            Err(_) if begun && is_gone() => return Err(Loss::gone()),
            Err(error) => return Err(Loss::not_ready(error, begun || returns)),
        };
        if self.generated.is_empty()
            && let Some(error) = &self.refusal
            && route.executors().any(|id| self.avoided.contains(&id))
        {
            return Err(Loss { error: error.clone(), next: Next::GiveUp, blamed: BTreeSet::new() });
        }
        self.route = Some(route);
        self.epoch += 1;
        Ok(self.epoch - 1)
    }

    /// The route of the attempt that was begun last.
    pub fn route(&self) -> &Route {
        self.route.as_ref().expect("an attempt was begun")
    }

    /// Takes one event of the attempt.
    pub fn handle_event(&mut self, event: Event) -> Step {
        match event {
            Event::Token(token) => match (token.index as usize).cmp(&self.generated.len()) {
                Ordering::Less => Step::Skip,
                Ordering::Greater => Step::Lost(Loss::of_gap(self.route())),
                Ordering::Equal => {
                    self.generated.push(token.token);
                    self.lost_count = 0;
                    self.refusal = None;
                    self.avoided.clear();
                    Step::HandOut(Event::Token(token))
                }
            },
            Event::Failed(failed) => Step::Lost(Loss::of_failed(&failed, self.route())),
            Event::Started(_) if self.started => Step::Skip,
            Event::Started(started) => {
                self.started = true;
                Step::HandOut(Event::Started(started))
            }
            Event::Finished(finished) => Step::HandOut(Event::Finished(finished)),
        }
    }

    /// Says what follows a loss. `is_late`: the sequence has no time for another attempt.
    pub fn handle_loss(&mut self, loss: Loss, is_late: bool) -> Recovery {
        let Loss { error, next, blamed } = loss;
        let mut suspects = BTreeSet::new();
        if next == Next::GiveUp {
            return Recovery { suspects, then: Then::GiveUp(error) };
        }
        if let Some(finished) = self.finished() {
            return Recovery { suspects, then: Then::Finished(finished) };
        }
        self.lost_count += 1;
        match next {
            Next::AvoidForAll => suspects = blamed,
            Next::AvoidHere => self.avoided.extend(blamed),
            Next::RefusedHere => {
                self.avoided.extend(blamed);
                self.refusal = Some(error.clone());
            }
            Next::GiveUp | Next::Again | Next::AwaitRoute => {}
        }
        let then = if is_late {
            Then::GiveUp(Refusal::new(Code::Unavailable, "the request's time is up"))
        } else if self.lost_count > self.ends.attempts_max {
            Then::GiveUp(Refusal { message: format!("{} ({} attempts)", error.message, self.lost_count), ..error })
        } else {
            self.wait(next)
        };
        Recovery { suspects, then }
    }

    /// The first new attempt comes at once: usually a replica can take it. A change of the cluster ends the wait for a route.
    fn wait(&self, next: Next) -> Then {
        let wait = match self.lost_count {
            0 | 1 => Duration::ZERO,
            count => WAIT_MAX.min(WAIT_FIRST * 2u32.saturating_pow(count - 2)),
        };
        let until_change = next == Next::AwaitRoute;
        Then::Again { wait: if until_change { wait.max(WAIT_FIRST) } else { wait }, until_change }
    }

    /// Whether the journal is complete and only the word of it was lost.
    fn finished(&self) -> Option<v1::Finished> {
        let stopped = self.generated.last().is_some_and(|token| self.ends.stop_tokens.contains(token));
        let full = self.generated.len() >= self.ends.generated_tokens_max as usize;
        let reason = match (stopped, full) {
            (true, _) => v1::FinishReason::Stop,
            (false, true) => v1::FinishReason::Length,
            (false, false) => return None,
        };
        Some(v1::Finished { reason: reason.into() })
    }
}
