//! Whole runs against a scripted stand-in.

use clap::Parser;

use super::*;
use crate::client::standin::{Asked, Script, StandIn, end, event, text};

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    stalls: StallsArgs,
}

/// Three streams, a long prompt of 50 words every 300 ms, three of them.
const SHORT: &str = "--model m --streams 3 --stream-prompt-tokens 4 --stream-output-tokens 100 --long-prompt-tokens 50 --long-output-tokens 2 \
    --every 300ms --duration 900ms --undisturbed 300ms --alone 2";

fn args(server: &StandIn, line: &str) -> StallsArgs {
    let words = ["stalls", "--url", &server.url].into_iter().chain(line.split_whitespace());
    Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}")).stalls
}

fn prompt_words(asked: &Asked) -> usize {
    asked.body["prompt"].as_str().map_or(0, |prompt| prompt.split(' ').count())
}

/// A token every 5 ms for streams; long prompts take 80 ms to their first.
fn fair(asked: &Asked) -> Script {
    if prompt_words(asked) == 50 {
        return Script::Stream(vec![(80, text("a")), (0, text("b")), (0, end(Some((51, 2))))]);
    }
    let tokens = asked.body["max_tokens"].as_u64().expect("a count");
    let pieces = (0..tokens).map(|_| (5, text("t"))).chain([(0, end(Some((5, tokens))))]);
    Script::Stream(pieces.collect())
}

#[tokio::test]
async fn a_run_has_all_phases_and_is_summed_up() {
    let server = StandIn::start(fair).await;
    let report = measure(&args(&server, SHORT)).await.expect("a run");
    let stalls = &report.stalls;
    assert_eq!((stalls.long_count, stalls.long_failed_count, report.failed_count), (3, 0, 0), "{report}");
    assert_eq!((stalls.long_input_tokens, stalls.tokens_per_chunk), (Some(51.0), Some(1.0)), "{report}");
    // Sleeps are never short, whatever else the machine does; how long they may be is not known.
    let alone = stalls.alone_ttft_ms.expect("times");
    assert!(alone.count == 2 && alone.p50.0 >= 79.0 && stalls.long_ttft_ms.expect("times").p50.0 >= 79.0, "{report}");
    assert!(stalls.alone_share >= 0.26, "80 of 300 ms: {report}");
    assert!(stalls.undisturbed_tokens_per_second > 0.0 && stalls.rate_kept.is_some(), "{report}");
    assert!(stalls.gaps_at_prefill_ms.expect("gaps").count > 0 && stalls.longest_gap_ms.0 >= 4.0, "{report}");
    let asked = server.asked();
    let long = asked.iter().filter(|asked| prompt_words(asked) == 50).count();
    assert_eq!(long, 1 + 2 + 3, "one to warm up, two alone, three among the streams");
    let prompts: std::collections::BTreeSet<&str> = asked.iter().filter_map(|asked| asked.body["prompt"].as_str()).collect();
    assert_eq!(prompts.len(), asked.len(), "no prompt is asked twice");
    let lengths: Vec<u64> =
        asked.iter().filter(|asked| prompt_words(asked) == 4).filter_map(|asked| asked.body["max_tokens"].as_u64()).collect();
    let mut first = lengths[..3].to_vec();
    first.sort_unstable();
    assert_eq!(first, [34, 67, 100], "streams end one after another");
    assert!(lengths.len() > 3 && lengths[3..].iter().all(|length| *length == 100), "and begin anew");
    let again = measure(&args(&server, SHORT)).await.expect("a run");
    assert_eq!((&report.output_hash, &report.prompts_hash), (&again.output_hash, &again.prompts_hash));
    let json = serde_json::to_value(&report).expect("a report");
    assert!(json["stalls"]["floor_is_kept"].is_boolean() && json["stalls"]["longest_gap_ms"].is_number(), "{json}");
}

#[tokio::test]
async fn prompts_that_the_server_had_cached_are_told_with_a_warning() {
    // Half of each long prompt, and nothing of the streams'.
    let again = StandIn::start(|asked: &Asked| match fair(asked) {
        Script::Stream(mut pieces) if prompt_words(asked) == 50 => {
            let usage = json!({"prompt_tokens": 60, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 30}});
            *pieces.last_mut().expect("an end") = (0, event(&json!({"choices": [], "usage": usage})) + &end(None));
            Script::Stream(pieces)
        }
        script => script,
    })
    .await;
    let mut report = measure(&args(&again, SHORT)).await.expect("a run");
    assert_eq!(report.stalls.cached_tokens, (2 + 3) * 30, "of two alone and three among the streams: {report}");
    // How many streams end depends on the machine.
    report.stalls.input_tokens = 300;
    let told = report.to_string();
    assert!(told.contains("  cached     150 of 300 tokens of all prompts (50 %)\n"), "{told}");
    assert!(told.contains("50 % of the prompts' tokens were cached by the server: take another --seed\n"), "{told}");

    let server = StandIn::start(fair).await;
    let told = measure(&args(&server, SHORT)).await.expect("a run").to_string();
    assert!(told.contains("  cached     0 of ") && !told.contains("--seed"), "{told}");
    let silent = format!("{SHORT} --no-usage");
    let uncounted = StandIn::start(|asked: &Asked| match fair(asked) {
        Script::Stream(mut pieces) => {
            *pieces.last_mut().expect("an end") = (0, end(None));
            Script::Stream(pieces)
        }
        script => script,
    })
    .await;
    let told = measure(&args(&uncounted, &silent)).await.expect("a run").to_string();
    assert!(!told.contains("cached"), "nothing is known: {told}");
}

#[tokio::test]
async fn the_share_that_is_kept_is_told_beside_what_it_should_be() {
    let server = StandIn::start(fair).await;
    let mut stalls = measure(&args(&server, SHORT)).await.expect("a run").stalls;
    for (kept, is_kept, says) in [
        (
            Some(0.678),
            false,
            "kept 0.678 of the streams' rate; beside prompts that alone take u = 0.046 of the time their share would be 1 - u = 0.954: missed",
        ),
        (Some(0.96), true, "their share would be 1 - u = 0.954: met"),
        (None, false, "the streams had no rate to keep; "),
    ] {
        (stalls.rate_kept, stalls.alone_share, stalls.rate_floor, stalls.floor_is_kept) = (kept, 0.046, 0.954, is_kept);
        assert!(stalls.to_string().contains(says), "{stalls}");
    }
}

#[tokio::test]
async fn a_server_that_stops_for_prompts_is_told_from_one_that_does_not() {
    // One of its streams pauses 0.9 s after it began, when long prompts come since 0.1 s at most.
    let server = StandIn::start(|asked: &Asked| match fair(asked) {
        Script::Stream(mut pieces) if asked.body["max_tokens"] == 100 => {
            pieces.iter_mut().for_each(|(pause_ms, _)| *pause_ms = 30);
            pieces[30].0 = 1000;
            Script::Stream(pieces)
        }
        script => script,
    })
    .await;
    let stalls = measure(&args(&server, SHORT)).await.expect("a run").stalls;
    assert!(stalls.longest_gap_ms.0 >= 600.0, "{stalls}");
}

#[tokio::test]
async fn requests_that_fail_are_told_and_fail_the_command() {
    let server = StandIn::start(|asked: &Asked| match prompt_words(asked) {
        // One of the streams is refused.
        4 if asked.body["max_tokens"] == 34 => Script::Whole { status: 429, body: r#"{"error":{"message":"Busy."}}"#.into() },
        _ => fair(asked),
    })
    .await;
    let report = measure(&args(&server, SHORT)).await.expect("the stream gets through with its second try");
    assert_eq!(report.failures, ["stream: the server answered 429: Busy."]);
    let error = run(args(&server, SHORT)).await.expect_err("it failed").to_string();
    assert_eq!(error, "1 requests got no whole answer: these figures mean little");

    let refusing = StandIn::start(|_: &Asked| Script::Whole { status: 500, body: String::new() }).await;
    let error = format!("{:#}", measure(&args(&refusing, SHORT)).await.expect_err("no long prompt is answered"));
    assert!(error.contains("500"), "{error}");
    let silent = StandIn::start(|asked: &Asked| if prompt_words(asked) == 50 { fair(asked) } else { Script::Silence }).await;
    let line = format!("{SHORT} --timeout 300ms");
    let error = format!("{:#}", measure(&args(&silent, &line)).await.expect_err("no stream begins"));
    assert!(error.contains("no whole answer within 300ms"), "{error}");
}

#[tokio::test]
async fn senseless_runs_are_refused() {
    let server = StandIn::start(fair).await;
    for (line, says) in [
        ("--every 2s --duration 3s", "--duration 3s must be a multiple of --every 2s"),
        ("--every 1ms --duration 20s", "send more than 10000 long prompts"),
        ("--model m --extra []", "--extra must be a JSON object"),
        ("--model m --note a", "--note takes KEY=VALUE"),
    ] {
        let error = format!("{:#}", measure(&args(&server, line)).await.expect_err(line));
        assert!(error.contains(says), "{line}: {error}");
    }
    for (line, says) in [("--streams 0", "from 1 to 1024"), ("--every 2x", "as 2s or 500ms"), ("--duration 0", "as 2s or 500ms")] {
        let error = Cli::try_parse_from(["stalls"].into_iter().chain(line.split(' '))).expect_err(line).to_string();
        assert!(error.contains(says), "{line}: {error}");
    }
    assert!(server.asked().is_empty(), "nothing was sent");
}
