//! What a run of `bench stalls` comes to: a pure function from the times at which texts came to gaps, rates and shares. It knows no
//! server and no clock; all times count from the start of the run. Start at [`Stalls::of`].

use std::time::Duration;

use serde::Serialize;

use crate::bench::request::milliseconds;
use crate::bench::stats::{Ms, Quantiles};
use crate::client::Usage;

/// One request of a steady stream, as far as it came.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct StreamRequest {
    /// When it was sent.
    pub(super) sent: Duration,
    /// When each chunk with text came, in order.
    pub(super) texts: Vec<Duration>,
    /// The server's count, if the request ended and the server told.
    pub(super) usage: Option<Usage>,
    /// Nothing more comes.
    pub(super) ended: bool,
}

/// One long prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LongPrompt {
    /// When it was to be sent.
    pub(super) sent: Duration,
    /// When each chunk with text came, in order.
    pub(super) texts: Vec<Duration>,
    /// When its answer was whole, or it had failed.
    pub(super) ended: Duration,
    /// The server's count, if it told.
    pub(super) usage: Option<Usage>,
    /// It has no whole answer.
    pub(super) failed: bool,
}

/// From a time on, and before another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Phase {
    /// Belongs to it.
    pub(super) from: Duration,
    /// No longer belongs to it.
    pub(super) to: Duration,
}

/// All that was seen.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    /// For each stream its requests, one after another.
    pub(super) streams: Vec<Vec<StreamRequest>>,
    /// Time to the first token of each long prompt that had the server for itself.
    pub(super) alone_ms: Vec<f64>,
    /// The server's counts of these, as far as it told.
    pub(super) alone_usage: Vec<Usage>,
    /// The long prompts of the disturbed phase.
    pub(super) long: Vec<LongPrompt>,
    /// Streams alone.
    pub(super) undisturbed: Phase,
    /// Streams and long prompts: from the first prompt, for a whole number of arrivals.
    pub(super) disturbed: Phase,
    /// When nobody looked any more: the last long prompt was answered.
    pub(super) end: Duration,
    /// Tokens of a stream's prompt where the server does not tell.
    pub(super) stream_prompt_tokens: u32,
    /// Tokens of a long prompt where the server does not tell.
    pub(super) long_prompt_tokens: u32,
}

/// What long prompts do to steady streams.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Stalls {
    /// The longest time that a stream waited for its next token since the first long prompt; it counts also where the end cut it.
    pub(super) longest_gap_ms: Ms,
    /// Gaps that overlap the time from a long prompt's sending to its first token.
    pub(super) gaps_at_prefill_ms: Option<Quantiles>,
    /// All gaps since the first long prompt. One stall in 300 gaps does not show in their p99.
    pub(super) gaps_ms: Option<Quantiles>,
    /// Gaps of the undisturbed phase.
    pub(super) gaps_undisturbed_ms: Option<Quantiles>,
    /// Tokens a second of all streams together, without long prompts.
    pub(super) undisturbed_tokens_per_second: f64,
    /// The same with them.
    pub(super) disturbed_tokens_per_second: f64,
    /// The second over the first; none where the first is nothing.
    pub(super) rate_kept: Option<f64>,
    /// u: the share of the disturbed phase that its long prompts would take alone, to their first tokens.
    pub(super) alone_share: f64,
    /// 1 - u, and 0 where the prompts alone take longer than there is time: a server that shares fairly keeps this much.
    pub(super) rate_floor: f64,
    /// Whether the streams kept that.
    pub(super) floor_is_kept: bool,
    /// Of the disturbed phase, a second: tokens of prompts and of answers, of streams and of long prompts. A prompt whose first token
    /// came later counts by the share of its time that lies within.
    pub(super) total_tokens_per_second: f64,
    /// First token of a long prompt that is alone.
    pub(super) alone_ttft_ms: Option<Quantiles>,
    /// First token of a long prompt among the streams.
    pub(super) long_ttft_ms: Option<Quantiles>,
    /// Long prompts that were sent.
    pub(super) long_count: usize,
    /// Of these without a whole answer; their first token is infinitely late.
    pub(super) long_failed_count: usize,
    /// As the server counted them on the mean; none if it did not.
    pub(super) long_input_tokens: Option<f64>,
    /// A stream whose answer ends begins another: the first tokens of those since the first long prompt.
    pub(super) stream_ttft_ms: Option<Quantiles>,
    /// Tokens in a chunk of a stream, as the server counted; none if it did not, and then each chunk counts as one.
    pub(super) tokens_per_chunk: Option<f64>,
    /// Tokens of all prompts that the server counted: of long ones, alone and among the streams, and of streams' answers that ended.
    pub(super) input_tokens: u64,
    /// Of them, those that the server says it had cached; servers that do not tell count as 0. No prompt comes twice in a run, so
    /// there should be none.
    pub(super) cached_tokens: u64,
}

impl Stalls {
    /// Sums up a run.
    pub(super) fn of(record: &Record) -> Self {
        let since_first = Phase { from: record.disturbed.from, to: record.end };
        let requests = || record.streams.iter().flatten();
        let gaps = || requests().flat_map(StreamRequest::gaps);
        let of_disturbed = || gaps().filter(|gap| gap.to > since_first.from && gap.from < since_first.to);
        let tokens_per_chunk = tokens_per_chunk(requests());
        let weight = |request: &StreamRequest| request.tokens_per_chunk().or(tokens_per_chunk).unwrap_or(1.0);
        let streamed = |phase: Phase| requests().map(|request| weight(request) * phase.count(&request.texts) as f64).sum::<f64>();
        let rate = |phase: Phase| streamed(phase) / phase.seconds();
        let (undisturbed, disturbed) = (rate(record.undisturbed), rate(record.disturbed));
        let rate_kept = (undisturbed > 0.0).then(|| disturbed / undisturbed);
        let alone_ms = record.alone_ms.iter().sum::<f64>() / record.alone_ms.len() as f64;
        let alone_share = alone_ms / 1e3 * record.long.len() as f64 / record.disturbed.seconds();
        let rate_floor = (1.0 - alone_share).max(0.0);
        let long_ttft_ms = record.long.iter().map(|prompt| match prompt.first() {
            Some(first) if !prompt.failed => milliseconds(first - prompt.sent),
            _ => f64::INFINITY,
        });
        let firsts = requests().filter(|request| request.sent >= since_first.from);
        let stream_ttft_ms = firsts.filter_map(|request| Some(milliseconds(*request.texts.first()? - request.sent)));
        Self {
            longest_gap_ms: Ms(of_disturbed().chain(record.cut_gaps()).map(|gap| gap.milliseconds()).fold(0.0, f64::max)),
            gaps_at_prefill_ms: quantiles(of_disturbed().filter(|gap| record.long.iter().any(|prompt| prompt.prefill().overlaps(gap)))),
            gaps_ms: quantiles(of_disturbed()),
            gaps_undisturbed_ms: quantiles(gaps().filter(|gap| record.undisturbed.holds(gap))),
            undisturbed_tokens_per_second: undisturbed,
            disturbed_tokens_per_second: disturbed,
            rate_kept,
            alone_share,
            rate_floor,
            floor_is_kept: rate_kept.is_some_and(|kept| kept >= rate_floor),
            total_tokens_per_second: (streamed(record.disturbed) + record.other_tokens()) / record.disturbed.seconds(),
            alone_ttft_ms: Quantiles::of(record.alone_ms.clone()),
            long_ttft_ms: Quantiles::of(long_ttft_ms.collect()),
            long_count: record.long.len(),
            long_failed_count: record.long.iter().filter(|prompt| prompt.failed).count(),
            long_input_tokens: mean(record.long.iter().filter_map(|prompt| prompt.usage).map(|usage| usage.prompt_tokens as f64)),
            stream_ttft_ms: Quantiles::of(stream_ttft_ms.collect()),
            tokens_per_chunk,
            input_tokens: record.usages().map(|usage| usage.prompt_tokens).sum(),
            cached_tokens: record.usages().map(|usage| usage.cached_tokens).sum(),
        }
    }
}

impl StreamRequest {
    /// From each chunk to the next.
    fn gaps(&self) -> impl Iterator<Item = Phase> {
        self.texts.windows(2).map(|pair| Phase { from: pair[0], to: pair[1] })
    }

    fn tokens_per_chunk(&self) -> Option<f64> {
        self.usage.filter(|_| !self.texts.is_empty()).map(|usage| usage.completion_tokens as f64 / self.texts.len() as f64)
    }
}

impl LongPrompt {
    fn first(&self) -> Option<Duration> {
        self.texts.first().copied()
    }

    /// From its sending to its first token, or to its end where it has none.
    fn prefill(&self) -> Phase {
        Phase { from: self.sent, to: self.first().unwrap_or(self.ended) }
    }
}

impl Record {
    /// All counts that the server told.
    fn usages(&self) -> impl Iterator<Item = Usage> {
        let long = self.long.iter().filter_map(|prompt| prompt.usage);
        let streams = self.streams.iter().flatten().filter_map(|request| request.usage);
        self.alone_usage.iter().copied().chain(long).chain(streams)
    }

    /// What streams still waited for when nobody looked any more.
    fn cut_gaps(&self) -> impl Iterator<Item = Phase> {
        let under_way = self.streams.iter().filter_map(|requests| requests.last()).filter(|request| !request.ended);
        under_way.filter_map(|request| Some(Phase { from: *request.texts.last()?, to: self.end })).filter(|gap| gap.from < gap.to)
    }

    /// Tokens of the disturbed phase beside those that streams got: of prompts, and of the long prompts' answers.
    fn other_tokens(&self) -> f64 {
        let phase = self.disturbed;
        let long = |prompt: &LongPrompt| {
            let input = prompt.usage.map_or(f64::from(self.long_prompt_tokens), |usage| usage.prompt_tokens as f64);
            let output = prompt.usage.map_or(1.0, |usage| usage.completion_tokens as f64 / prompt.texts.len().max(1) as f64);
            prompt.first().map_or(0.0, |_| input * phase.share_of(prompt.prefill())) + output * phase.count(&prompt.texts) as f64
        };
        let stream = |request: &StreamRequest| match request.texts.first() {
            Some(first) => {
                let input = request.usage.map_or(f64::from(self.stream_prompt_tokens), |usage| usage.prompt_tokens as f64);
                input * phase.share_of(Phase { from: request.sent, to: *first })
            }
            None => 0.0,
        };
        self.long.iter().map(long).sum::<f64>() + self.streams.iter().flatten().map(stream).sum::<f64>()
    }
}

impl Phase {
    fn seconds(self) -> f64 {
        (self.to - self.from).as_secs_f64()
    }

    fn milliseconds(self) -> f64 {
        milliseconds(self.to - self.from)
    }

    /// Times that belong to it.
    fn count(self, times: &[Duration]) -> usize {
        times.iter().filter(|time| self.from <= **time && **time < self.to).count()
    }

    fn overlaps(self, other: &Self) -> bool {
        self.from < other.to && other.from < self.to
    }

    fn holds(self, other: &Self) -> bool {
        self.from <= other.from && other.to < self.to
    }

    /// How much of `other` lies within, from 0 to 1; an instant lies within or does not.
    fn share_of(self, other: Self) -> f64 {
        if other.from >= other.to {
            return f64::from(u8::from(self.from <= other.to && other.to < self.to));
        }
        let within = Self { from: other.from.max(self.from), to: other.to.min(self.to) };
        if within.from >= within.to { 0.0 } else { within.seconds() / other.seconds() }
    }
}

/// The server's counts over the chunks that they came in.
fn tokens_per_chunk<'a>(requests: impl Iterator<Item = &'a StreamRequest>) -> Option<f64> {
    let told = requests.filter(|request| !request.texts.is_empty()).filter_map(|request| Some((request.usage?, request.texts.len())));
    let (tokens, chunks) = told.fold((0, 0), |(tokens, chunks), (usage, count)| (tokens + usage.completion_tokens, chunks + count));
    (chunks > 0).then(|| tokens as f64 / chunks as f64)
}

fn quantiles(gaps: impl Iterator<Item = Phase>) -> Option<Quantiles> {
    Quantiles::of(gaps.map(Phase::milliseconds).collect())
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / count as f64)
}

#[cfg(test)]
mod tests;
