//! The accounting on lists of events that were made up: what a known stall comes to, and what must hold for any run.

use proptest::prelude::*;

use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn usage(prompt_tokens: u64, completion_tokens: u64) -> Option<Usage> {
    Some(Usage { prompt_tokens, cached_tokens: 0, completion_tokens })
}

/// A stream whose texts come at these milliseconds, and that goes on.
fn stream(texts: impl IntoIterator<Item = u64>) -> Vec<StreamRequest> {
    vec![StreamRequest { sent: ms(0), texts: texts.into_iter().map(ms).collect(), ..StreamRequest::default() }]
}

fn long(sent: u64, first: u64) -> LongPrompt {
    LongPrompt { sent: ms(sent), texts: vec![ms(first)], ended: ms(first), usage: usage(1500, 1), failed: false }
}

/// One undisturbed second from 1 s on, then `long_every` prompts, one a second, from 2 s to 4 s.
fn record(streams: Vec<Vec<StreamRequest>>, long: Vec<LongPrompt>) -> Record {
    Record {
        streams,
        alone_ms: vec![400.0, 400.0],
        alone_usage: Vec::new(),
        long,
        undisturbed: Phase { from: ms(1000), to: ms(2000) },
        disturbed: Phase { from: ms(2000), to: ms(4000) },
        end: ms(4000),
        stream_prompt_tokens: 128,
        long_prompt_tokens: 1500,
    }
}

/// A text every 10 ms until 4 s, and none while a prompt is computed for itself: 400 ms from 2 s and from 3 s on.
fn stalling() -> Record {
    let stalled = |at: &u64| (2000..2400).contains(at) || (3000..3400).contains(at);
    let texts = || (0..400).map(|step| step * 10).filter(|at| !stalled(at));
    record(vec![stream(texts()), stream(texts())], vec![long(2000, 2400), long(3000, 3400)])
}

#[test]
fn whole_prompts_stall_for_as_long_as_they_take_and_keep_one_minus_u() {
    let stalls = Stalls::of(&stalling());
    assert_eq!(stalls.longest_gap_ms, Ms(410.0), "from the last token before to the first after");
    let at_prefill = stalls.gaps_at_prefill_ms.expect("gaps");
    assert_eq!((at_prefill.count, at_prefill.p50), (4, Ms(410.0)), "two streams, two prompts");
    let all = stalls.gaps_ms.expect("gaps");
    assert_eq!((all.count, all.p50, all.p95), (240, Ms(10.0), Ms(10.0)), "and 95 of 100 know nothing of it");
    assert_eq!(stalls.gaps_undisturbed_ms.expect("gaps").max, Ms(10.0));
    assert_eq!((stalls.undisturbed_tokens_per_second, stalls.disturbed_tokens_per_second), (200.0, 120.0));
    assert!(stalls.rate_kept.is_some_and(|kept| (kept - 0.6).abs() < 1e-9) && (stalls.alone_share - 0.4).abs() < 1e-9, "{stalls:?}");
    assert!(stalls.floor_is_kept && (stalls.rate_floor - 0.6).abs() < 1e-9);
    assert!((stalls.total_tokens_per_second - (3000.0 + 2.0 + 240.0) / 2.0).abs() < 1e-9, "{stalls:?}");
    assert_eq!(stalls.long_ttft_ms.expect("answers").max, Ms(400.0));
    assert_eq!((stalls.long_count, stalls.long_failed_count, stalls.long_input_tokens), (2, 0, Some(1500.0)));
    assert_eq!(stalls.tokens_per_chunk, None, "no stream has ended, so the server told nothing");
}

#[test]
fn a_gap_that_only_touches_a_prefill_does_not_overlap_it() {
    let stalls = Stalls::of(&record(vec![stream([1900, 2000, 2500, 2600, 3100])], vec![long(2000, 2500)]));
    assert_eq!(stalls.gaps_at_prefill_ms.map(|gaps| (gaps.count, gaps.max)), Some((1, Ms(500.0))));
    assert_eq!(stalls.gaps_ms.map(|gaps| gaps.count), Some(3), "what ended with the first prompt's sending was before it");
}

#[test]
fn a_stall_that_the_end_cuts_counts_as_longest() {
    let mut cut = record(vec![stream([1000, 1500, 2100])], vec![long(2000, 2050)]);
    assert_eq!(Stalls::of(&cut).longest_gap_ms, Ms(1900.0), "from 2.1 s to the end at 4 s");
    cut.streams[0][0].ended = true;
    assert_eq!(Stalls::of(&cut).longest_gap_ms, Ms(600.0), "one that has ended waits for nothing");
}

#[test]
fn time_between_two_answers_of_a_stream_is_no_gap() {
    let first = StreamRequest { texts: vec![ms(1900), ms(2100)], ended: true, usage: usage(128, 2), ..StreamRequest::default() };
    let second = StreamRequest { sent: ms(2100), texts: vec![ms(3000), ms(3100)], ..StreamRequest::default() };
    let mut record = record(vec![vec![first, second]], Vec::new());
    record.end = ms(3150);
    let stalls = Stalls::of(&record);
    assert_eq!((stalls.longest_gap_ms, stalls.gaps_ms.map(|gaps| gaps.count)), (Ms(200.0), Some(2)));
    assert_eq!(stalls.stream_ttft_ms.map(|ttft| ttft.max), Some(Ms(900.0)), "it is told apart");
}

#[test]
fn chunks_weigh_what_the_server_counted_in_them() {
    // Ten chunks of two tokens, all in the undisturbed second; the other stream has not ended and weighs as much.
    let told = StreamRequest { texts: (0..10).map(|step| ms(1000 + step)).collect(), ended: true, usage: usage(128, 20), sent: ms(0) };
    let stalls = Stalls::of(&record(vec![vec![told], stream([1000, 1500, 2500, 3500])], Vec::new()));
    assert_eq!(stalls.tokens_per_chunk, Some(2.0));
    assert_eq!((stalls.undisturbed_tokens_per_second, stalls.disturbed_tokens_per_second), (24.0, 2.0));
}

#[test]
fn prompts_without_answer_are_infinitely_late_and_stall_until_they_failed() {
    let failed = LongPrompt { sent: ms(2000), texts: Vec::new(), ended: ms(3000), usage: None, failed: true };
    let stalls = Stalls::of(&record(vec![stream([1900, 2100, 2900, 3100, 3200])], vec![failed]));
    assert_eq!((stalls.long_failed_count, stalls.long_ttft_ms.map(|ttft| ttft.p50)), (1, Some(Ms(f64::INFINITY))));
    assert_eq!(stalls.gaps_at_prefill_ms.map(|gaps| gaps.count), Some(3));
    assert_eq!(stalls.total_tokens_per_second, 4.0 / 2.0, "its tokens do not count, those of the stream do");
    assert_eq!(stalls.long_input_tokens, None);
}

#[test]
fn a_prompt_counts_by_the_share_of_its_time_that_lies_within_the_phase() {
    let mut late = record(vec![stream([1000, 1500])], vec![long(3000, 5000)]);
    late.end = ms(5000);
    assert!((Stalls::of(&late).total_tokens_per_second - 750.0 / 2.0).abs() < 1e-9, "half of 1,500 tokens, and none of its answer");
}

#[test]
fn a_floor_under_nothing_is_not_kept() {
    let stalls = Stalls::of(&record(vec![stream([500, 2500, 2510])], vec![long(2000, 2400)]));
    assert_eq!((stalls.undisturbed_tokens_per_second, stalls.rate_kept, stalls.floor_is_kept), (0.0, None, false));
}

#[test]
fn cached_tokens_are_those_of_all_prompts_that_the_server_counted() {
    let cached = |prompt_tokens, cached_tokens| Usage { prompt_tokens, cached_tokens, completion_tokens: 1 };
    let ended = StreamRequest { texts: vec![ms(1500)], ended: true, usage: Some(cached(128, 16)), ..StreamRequest::default() };
    let under_way = StreamRequest { sent: ms(1600), texts: vec![ms(1700)], ..StreamRequest::default() };
    let mut record = record(vec![vec![ended, under_way]], vec![LongPrompt { usage: Some(cached(1500, 800)), ..long(2000, 2400) }]);
    record.alone_usage = vec![cached(1500, 1024), cached(1500, 0)];
    let stalls = Stalls::of(&record);
    assert_eq!((stalls.input_tokens, stalls.cached_tokens), (128 + 3 * 1500, 16 + 800 + 1024));
}

#[test]
fn prompts_that_take_all_the_time_leave_a_floor_of_nothing() {
    let mut slow = stalling();
    slow.alone_ms = vec![2500.0];
    let stalls = Stalls::of(&slow);
    assert_eq!((stalls.alone_share, stalls.rate_floor, stalls.floor_is_kept), (2.5, 0.0, true));
}

/// Any streams with an answer or two, and any prompts, within 8 s.
fn any_record() -> impl Strategy<Value = Record> {
    let request = (proptest::collection::vec(0u64..300, 0..40), 0u64..200, any::<bool>());
    let streams = proptest::collection::vec(proptest::collection::vec(request, 1..3), 1..5);
    let prompts = proptest::collection::vec((0u64..2000, 1u64..3000, any::<bool>()), 0..6);
    (streams, prompts).prop_map(|(streams, prompts)| {
        let mut of_streams = Vec::new();
        for requests in streams {
            let (mut now, last) = (0, requests.len() - 1);
            let request = |(index, (steps, sent, ends)): (usize, (Vec<u64>, u64, bool))| {
                now += sent;
                let sent = ms(now);
                let texts = steps.iter().map(|step| {
                    now += step;
                    ms(now)
                });
                let texts: Vec<Duration> = texts.collect();
                let ended = ends || index < last;
                StreamRequest { sent, usage: usage(128, texts.len() as u64 * 2).filter(|_| ended), texts, ended }
            };
            of_streams.push(requests.into_iter().enumerate().map(request).collect());
        }
        let prompts = prompts.into_iter().map(|(sent, took, failed)| LongPrompt {
            texts: if failed { Vec::new() } else { vec![ms(2000 + sent + took)] },
            failed,
            ..long(2000 + sent, 2000 + sent + took)
        });
        let mut record = record(of_streams, prompts.collect());
        record.end = record.long.iter().map(|prompt| prompt.ended).max().unwrap_or(record.end).max(record.disturbed.to);
        record
    })
}

/// The record with every time changed.
fn mapped(record: &Record, map: impl Fn(Duration) -> Duration) -> Record {
    let phase = |phase: Phase| Phase { from: map(phase.from), to: map(phase.to) };
    let all = |times: &[Duration]| times.iter().map(|time| map(*time)).collect();
    let request = |request: &StreamRequest| StreamRequest { sent: map(request.sent), texts: all(&request.texts), ..request.clone() };
    let prompt =
        |prompt: &LongPrompt| LongPrompt { sent: map(prompt.sent), texts: all(&prompt.texts), ended: map(prompt.ended), ..prompt.clone() };
    Record {
        streams: record.streams.iter().map(|requests| requests.iter().map(request).collect()).collect(),
        long: record.long.iter().map(prompt).collect(),
        undisturbed: phase(record.undisturbed),
        disturbed: phase(record.disturbed),
        end: map(record.end),
        ..record.clone()
    }
}

proptest! {
    /// What counts is how long things take, not when they are; and a machine half as fast has twice the gaps and half the rates.
    #[test]
    fn times_count_by_their_differences_and_scale(record in any_record(), shift in 0u64..100_000) {
        let stalls = Stalls::of(&record);
        let shifted = Stalls::of(&mapped(&record, |time| time + ms(shift)));
        prop_assert_eq!(&stalls, &shifted);
        let mut half = mapped(&record, |time| time * 2);
        half.alone_ms.iter_mut().for_each(|alone| *alone *= 2.0);
        let half = Stalls::of(&half);
        let twice = |slow: f64, fast: f64| (slow - fast * 2.0).abs() < 1e-6;
        let p99 = |gaps: Option<Quantiles>| gaps.map_or(0.0, |gaps| gaps.p99.0);
        prop_assert!(twice(half.longest_gap_ms.0, stalls.longest_gap_ms.0));
        prop_assert!(twice(p99(half.gaps_at_prefill_ms), p99(stalls.gaps_at_prefill_ms)));
        prop_assert!(twice(stalls.total_tokens_per_second, half.total_tokens_per_second));
        prop_assert!(twice(stalls.disturbed_tokens_per_second, half.disturbed_tokens_per_second));
        prop_assert_eq!(half.alone_share, stalls.alone_share);
    }

    /// Gaps at prefills are some of all gaps, none of which is longer than the longest; with a prompt under way all the time they are all.
    #[test]
    fn gaps_at_prefills_are_among_all_gaps(record in any_record()) {
        let stalls = Stalls::of(&record);
        let count = |gaps: Option<Quantiles>| gaps.map_or((0, 0.0), |gaps| (gaps.count, gaps.max.0));
        let ((at_prefill, longest), (all, longest_of_all)) = (count(stalls.gaps_at_prefill_ms), count(stalls.gaps_ms));
        prop_assert!(at_prefill <= all && longest <= longest_of_all && longest_of_all <= stalls.longest_gap_ms.0);
        let mut always = record.clone();
        always.long.push(LongPrompt { sent: record.disturbed.from, ..long(0, record.end.as_millis() as u64 + 10_000) });
        let always = Stalls::of(&always);
        // A gap without length touches, and overlaps nothing.
        let lengths = record.streams.iter().flatten().flat_map(StreamRequest::gaps).filter(|gap| gap.from < gap.to);
        let with_length = lengths.filter(|gap| gap.to > record.disturbed.from && gap.from < record.end).count();
        prop_assert!(with_length <= count(always.gaps_at_prefill_ms).0 && count(always.gaps_at_prefill_ms).0 <= all);
    }

    /// A stall put into any place while a stream decodes is found, whole.
    #[test]
    fn any_stall_is_found(record in any_record(), at in 2000u64..4000, stall in 1u64..5000) {
        let stalled = mapped(&record, |time| if time > ms(at) { time + ms(stall) } else { time });
        let decoding = record.streams.iter().flatten().flat_map(StreamRequest::gaps).any(|gap| gap.from <= ms(at) && ms(at) < gap.to && gap.to > record.disturbed.from);
        prop_assert!(!decoding || Stalls::of(&stalled).longest_gap_ms.0 > stall as f64);
    }

    /// No token is counted twice or lost where a phase is cut in two.
    #[test]
    fn phases_add_up(record in any_record(), cut in 2001u64..4000) {
        let tokens = |from: u64, to: u64| {
            let disturbed = Phase { from: ms(from), to: ms(to) };
            Stalls::of(&Record { disturbed, ..record.clone() }).total_tokens_per_second * disturbed.seconds()
        };
        prop_assert!((tokens(2000, cut) + tokens(cut, 4000) - tokens(2000, 4000)).abs() < 1e-6);
    }
}
