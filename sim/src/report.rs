//! What a run did, as a table; and what a run found wrong.

use std::collections::BTreeMap;
use std::fmt;

use crate::Micros;
use crate::node::Node;

/// Numbers of one run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What was run.
    pub seed: u64,
    /// Executors and models in the cluster.
    pub executors: usize,
    /// See `executors`.
    pub models: usize,
    /// Requests that came; those that ended well; those whose client hung up.
    pub requests: u64,
    /// See `requests`.
    pub finished: u64,
    /// See `requests`.
    pub cancelled: u64,
    /// Requests that ended with an error, by code.
    pub refused: BTreeMap<String, u64>,
    /// Tokens handed out.
    pub tokens: u64,
    /// Prompt tokens of sequences that started, and those whose compute was avoided.
    pub prompt_tokens: u64,
    /// See `prompt_tokens`.
    pub cached_tokens: u64,
    /// Of all engines: batches, rows, rows computed in vain, sequences that gave way, pages evicted, tokens found thanks to another model.
    pub batches: u64,
    /// See `batches`.
    pub rows: u64,
    /// See `batches`.
    pub discarded_rows: u64,
    /// See `batches`.
    pub preemptions: u64,
    /// See `batches`.
    pub evicted_pages: u64,
    /// See `batches`.
    pub cross_model_tokens: u64,
    /// Models in one batch, and executors on one route, at most.
    pub met_most: usize,
    /// See `strands_most`.
    pub strands_most: usize,
    /// See `met_most`.
    pub hops_most: usize,
    /// What broke, and how often a sequence went on after it.
    pub kills: u64,
    /// See `kills`.
    pub cuts: u64,
    /// See `kills`.
    pub drains: u64,
    /// See `kills`.
    pub resumes: u64,
    /// Plans made.
    pub plans: u64,
    /// Events that happened.
    pub events: u64,
    /// Virtual time at the end.
    pub virtual_us: Micros,
    /// Virtual times to first tokens, and between tokens; not kept of runs that are added.
    pub first_us: Vec<Micros>,
    /// See `first_us`.
    pub gaps_us: Vec<Micros>,
}

/// What a run found wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What was run.
    pub seed: u64,
    /// When.
    pub at_us: Micros,
    /// Which checker.
    pub checker: &'static str,
    /// What it says.
    pub message: String,
    /// What happened last, oldest first.
    pub last: Vec<String>,
    /// The command that does it again.
    pub replay: String,
}

impl Report {
    pub(crate) fn refuse(&mut self, code: &str) {
        *self.refused.entry(code.to_owned()).or_default() += 1;
    }

    /// A token was handed out: so long after the one before, or the first one so long after its request.
    pub(crate) fn token(&mut self, gap: Option<Micros>, since_arrival: Micros) {
        self.tokens += 1;
        match gap {
            Some(gap) => self.gaps_us.push(gap),
            None => self.first_us.push(since_arrival),
        }
    }

    /// An executor is gone, or the run is over.
    pub(crate) fn add_engine(&mut self, node: &Node) {
        let counters = node.engine.counters();
        self.batches += counters.batch_count;
        self.rows += counters.row_count;
        self.discarded_rows += counters.discarded_rows;
        self.preemptions += counters.preemption_count;
        self.evicted_pages += counters.evicted_pages;
        self.cross_model_tokens += counters.cross_model_hit_tokens;
        self.met_most = self.met_most.max(node.met_most);
        self.strands_most = self.strands_most.max(node.strands_most);
    }

    /// Adds the numbers of another run.
    pub fn add(&mut self, other: &Self) {
        let sums = [
            (&mut self.requests, other.requests),
            (&mut self.finished, other.finished),
            (&mut self.cancelled, other.cancelled),
            (&mut self.tokens, other.tokens),
            (&mut self.prompt_tokens, other.prompt_tokens),
            (&mut self.cached_tokens, other.cached_tokens),
            (&mut self.batches, other.batches),
            (&mut self.rows, other.rows),
            (&mut self.discarded_rows, other.discarded_rows),
            (&mut self.preemptions, other.preemptions),
            (&mut self.evicted_pages, other.evicted_pages),
            (&mut self.cross_model_tokens, other.cross_model_tokens),
            (&mut self.kills, other.kills),
            (&mut self.cuts, other.cuts),
            (&mut self.drains, other.drains),
            (&mut self.resumes, other.resumes),
            (&mut self.plans, other.plans),
            (&mut self.events, other.events),
            (&mut self.virtual_us, other.virtual_us),
        ];
        sums.into_iter().for_each(|(sum, more)| *sum += more);
        other.refused.iter().for_each(|(code, count)| *self.refused.entry(code.clone()).or_default() += count);
        self.executors = self.executors.max(other.executors);
        self.models = self.models.max(other.models);
        self.met_most = self.met_most.max(other.met_most);
        self.strands_most = self.strands_most.max(other.strands_most);
        self.hops_most = self.hops_most.max(other.hops_most);
    }
}

fn percentile(values: &[Micros], share: f64) -> String {
    let mut values = values.to_vec();
    values.sort_unstable();
    let place = ((values.len() as f64 * share).ceil() as usize).saturating_sub(1);
    values.get(place).map_or_else(|| "-".to_owned(), |value| format!("{:.1} ms", *value as f64 / 1e3))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, text: String| writeln!(f, "  {name:<22}{text}");
        row("cluster", format!("{} executors, {} models, up to {} hops on a route", self.executors, self.models, self.hops_most))?;
        row("virtual time", format!("{:.1} s, {} events", self.virtual_us as f64 / 1e6, self.events))?;
        let refused: u64 = self.refused.values().sum();
        let codes: Vec<String> = self.refused.iter().map(|(code, count)| format!("{count} {code}")).collect();
        let codes = if codes.is_empty() { String::new() } else { format!(" ({})", codes.join(", ")) };
        let (finished, hung_up) = (self.finished, self.cancelled);
        row("requests", format!("{}: {finished} finished, {hung_up} hung up, {refused} refused{codes}", self.requests))?;
        row("tokens", format!("{} handed out, each equal to that of its sequence alone", self.tokens))?;
        let hits =
            format!("{} of {} prompt tokens, {} thanks to another model", self.cached_tokens, self.prompt_tokens, self.cross_model_tokens);
        row("prefix hits", hits)?;
        row(
            "batches",
            format!(
                "{} with {} rows, {} in vain; up to {} models in one, and {} segments abreast",
                self.batches, self.rows, self.discarded_rows, self.met_most, self.strands_most
            ),
        )?;
        row("pages", format!("{} sequences gave way, {} pages evicted", self.preemptions, self.evicted_pages))?;
        let broke = format!("{} executors killed, {} links cut, {} drained; {} resumes", self.kills, self.cuts, self.drains, self.resumes);
        row("what broke", broke)?;
        row("plans", self.plans.to_string())?;
        if !self.first_us.is_empty() {
            let times = |values: &[Micros]| format!("p50 {}, p99 {}", percentile(values, 0.5), percentile(values, 0.99));
            row("time to first token", times(&self.first_us))?;
            row("time between tokens", times(&self.gaps_us))?;
        }
        Ok(())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {} fails at {:.6} s: {}", self.seed, self.at_us as f64 / 1e6, self.checker)?;
        writeln!(f, "  {}", self.message)?;
        writeln!(f, "what happened last:")?;
        self.last.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        write!(f, "again: {}", self.replay)
    }
}
