//! One run: the scenario of a seed, event by event, until nothing is left to come or a checker finds something.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::canary_name;
use crate::check::{Violation, holds};
use crate::cluster::Cluster;
use crate::events::Event;
use crate::load::Load;
use crate::report::{Failure, Report};
use crate::{Canary, scenario};

/// Events that a failure shows.
const LAST_EVENTS: usize = 24;
/// `progress`: a run has fewer events for each token that may be made.
const EVENTS_MAX: u64 = 50_000_000;

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Draws everything.
    pub seed: u64,
    /// A recorded load instead of a drawn one, and where it came from.
    pub trace: Option<(String, Load)>,
    /// Requests of it that were taken, for the command that replays.
    pub requests: u64,
    /// A defect to plant in the engines.
    pub canary: Canary,
}

/// Runs a seed. Every call with the same options does the same.
///
/// # Errors
/// When a checker finds something wrong, or an assertion fails.
pub fn run(options: &Options) -> Result<Report, Box<Failure>> {
    match attempt(options, &mut |_| {}) {
        Ok(report) => Ok(report),
        Err((at_us, violation)) => {
            // The same again, this time with a log.
            let mut last = VecDeque::new();
            let _ = attempt(options, &mut |line| {
                if last.len() == LAST_EVENTS {
                    last.pop_front();
                }
                last.push_back(line());
            });
            let Violation { checker, message } = violation;
            Err(Box::new(Failure { seed: options.seed, at_us, checker, message, last: last.into(), replay: replay(options) }))
        }
    }
}

/// As `run`, and hands each event to `log` as a line.
///
/// # Errors
/// As `run`.
pub fn run_logged(options: &Options, log: &mut dyn FnMut(String)) -> Result<Report, Box<Failure>> {
    attempt(options, &mut |line| log(line())).map_err(|(at_us, Violation { checker, message })| {
        Box::new(Failure { seed: options.seed, at_us, checker, message, last: Vec::new(), replay: replay(options) })
    })
}

fn replay(options: &Options) -> String {
    let trace = options.trace.as_ref().map_or_else(String::new, |(name, _)| format!(" --trace {name} --requests {}", options.requests));
    let canary = canary_name(options.canary).map_or_else(String::new, |name| format!(" --canary {name}"));
    format!("ashlar sim --seed {}{trace}{canary}", options.seed)
}

type Log<'a> = dyn FnMut(&dyn Fn() -> String) + 'a;

fn attempt(options: &Options, log: &mut Log<'_>) -> Result<Report, (crate::Micros, Violation)> {
    let scenario = scenario::draw(options.seed, options.trace.as_ref().map(|(_, load)| load));
    let mut cluster = Cluster::new(options.seed, scenario, options.canary);
    let outcome = catch_unwind(AssertUnwindSafe(|| drive(&mut cluster, log)));
    let violation = match outcome {
        Ok(Ok(())) => return Ok(cluster.report),
        Ok(Err(violation)) => violation,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Violation { checker: "assertion", message: text.unwrap_or_else(|| "an assertion failed".to_owned()) }
        }
    };
    Err((cluster.post.now, violation))
}

fn drive(cluster: &mut Cluster, log: &mut Log<'_>) -> Result<(), Violation> {
    while let Some((at, event)) = cluster.post.queue.next() {
        cluster.post.now = at;
        cluster.report.events += 1;
        if !matches!(event, Event::Look) {
            log(&|| format!("{:>12.6} {}", at as f64 / 1e6, event.line()));
        }
        holds("progress", cluster.report.events < EVENTS_MAX, || format!("{EVENTS_MAX} events and no end"))?;
        cluster.handle(event)?;
    }
    cluster.check_end()
}
