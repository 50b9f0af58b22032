//! Whole loads against a scripted stand-in.

use clap::Parser;
use serde_json::{Value, json};

use super::load::{self, LoadArgs};
use super::report::Report;
use crate::client::standin::{Asked, Script, StandIn, delta, end, event, text};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    load: LoadArgs,
}

fn args(server: &StandIn, line: &str) -> LoadArgs {
    let words = ["bench", "--url", &server.url].into_iter().chain(line.split_whitespace());
    Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}")).load
}

async fn measure(server: &StandIn, line: &str) -> Report {
    load::measure(&args(server, line)).await.unwrap_or_else(|error| panic!("{line}: {error:#}"))
}

async fn refused(server: &StandIn, line: &str) -> String {
    format!("{:#}", load::measure(&args(server, line)).await.expect_err(line))
}

/// Three tokens: one after 30 ms, two more after 20 ms each.
fn three_tokens(_: &Asked) -> Script {
    Script::Stream(vec![(30, text("a")), (20, text("b")), (20, text("c")), (0, end(Some((7, 3))))])
}

#[tokio::test]
async fn times_and_tokens_of_a_closed_loop_are_those_of_the_script() {
    let server = StandIn::start(three_tokens).await;
    let report = measure(&server, "--model m --requests 6 --concurrency 2 --output-tokens 3 --ignore-eos").await;
    let all = &report.all;
    assert_eq!((all.request_count, all.failed_count, all.short_count, all.counted_by_chunks), (6, 0, 0, 0));
    assert_eq!((all.input_tokens, all.output_tokens), (Some(42), 18));
    let (ttft, itl, tpot) = (all.ttft_ms.expect("times"), all.itl_ms.expect("times"), all.tpot_ms.expect("times"));
    assert_eq!((ttft.count, itl.count, tpot.count), (6, 12, 6));
    // Sleeps are never short, whatever else the machine does.
    assert!(ttft.p50.0 >= 29.0 && itl.p50.0 >= 18.0 && tpot.p50.0 >= 18.0, "{all}");
    assert!(all.e2e_ms.expect("times").p50.0 >= 68.0, "{all}");
    let asked = server.asked();
    assert_eq!(asked.len(), 7, "one to warm up and six that count");
    let mut body = asked[1].body.clone();
    body["prompt"] = Value::Null;
    let expected = json!({"model": "m", "max_tokens": 3, "temperature": 0.0, "stream": true, "prompt": null, "ignore_eos": true, "stream_options": {"include_usage": true}});
    assert_eq!(body, expected);
}

#[tokio::test]
async fn cached_tokens_of_prompts_are_told_with_their_share() {
    let server = StandIn::start(|_: &Asked| {
        let usage = json!({"prompt_tokens": 8, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 6}});
        Script::Stream(vec![(0, text("a")), (0, event(&json!({"choices": [], "usage": usage})) + &end(None))])
    })
    .await;
    let report = measure(&server, "--model m --requests 4 --output-tokens 1").await;
    assert!(report.to_string().contains("/s (24 cached, 75 %); out 4, "), "{report}");
    let report = measure(&StandIn::start(three_tokens).await, "--model m --requests 4 --output-tokens 3").await;
    assert!(report.to_string().contains("/s (0 cached, 0 %); out 12, "), "{report}");
}

#[tokio::test]
async fn latency_counts_from_the_intended_time_in_an_open_loop() {
    // The connection is free at once, but the server answers one request at a time: later ones wait for those before.
    let busy = std::sync::Arc::new(std::sync::Mutex::new(0u64));
    let server = StandIn::start(move |_: &Asked| {
        let mut waiting = busy.lock().expect("not poisoned");
        *waiting += 20;
        Script::Stream(vec![(*waiting, text("a")), (0, end(None))])
    })
    .await;
    let report = measure(&server, "--model m --rate 10000 --requests 10 --warmup 0").await;
    let ttft = report.all.ttft_ms.expect("times");
    assert!(ttft.max.0 >= 199.0 && ttft.p50.0 >= 99.0, "{}", report.all);
    assert!(report.elapsed_s < 5.0, "they were sent together");
}

#[tokio::test]
async fn late_client_charges_the_request_and_tells() {
    let server = StandIn::start(three_tokens).await;
    let planned = super::schedule::Planned { index: 0, at: std::time::Duration::ZERO, model: 0, prompt_tokens: 1, output_tokens: 3 };
    let job = load::job(&args(&server, "--model m --requests 1")).await.expect("valid arguments").0;
    let intended = tokio::time::Instant::now() - std::time::Duration::from_millis(500);
    let outcome = job.send(planned, intended).await;
    assert!(outcome.lag_ms >= 500.0);
    let answer = outcome.result.expect("an answer");
    assert!(answer.ttft_ms >= 529.0 && answer.e2e_ms >= 569.0, "{answer:?}");
    assert!(answer.tpot_ms().is_some_and(|tpot| (18.0..400.0).contains(&tpot)), "{answer:?}");
}

#[tokio::test]
async fn clients_in_turn_stay_with_their_model_at_its_own_endpoint() {
    let servers = [StandIn::start(three_tokens).await, StandIn::start(three_tokens).await];
    let line = format!("--model a --model b --target b={} --in-turn --concurrency 2 --requests 6 --warmup 0", servers[1].url);
    let report = measure(&servers[0], &line).await;
    assert_eq!((report.models["a"].request_count, report.models["b"].request_count, report.all.failed_count), (3, 3, 0));
    assert_eq!(report.targets["b"], servers[1].url);
    for (server, model) in servers.iter().zip(["a", "b"]) {
        assert_eq!(server.asked().iter().map(|asked| asked.body["model"].clone()).collect::<Vec<_>>(), vec![json!(model); 3]);
    }
}

#[tokio::test]
async fn failures_are_infinite_and_counted_by_their_reason() {
    let server = StandIn::start(|asked: &Asked| match asked.body["model"].as_str() {
        Some("bad") => Script::Whole { status: 429, body: r#"{"error":{"message":"Busy.","code":"too_many_requests"}}"#.into() },
        Some("cut") => Script::Stream(vec![(0, text("a"))]),
        Some("mute") => Script::Stream(vec![(0, end(Some((7, 0))))]),
        Some("slow") => Script::Silence,
        _ => three_tokens(asked),
    })
    .await;
    let report = measure(
        &server,
        "--model good:4 --model bad --model cut --model mute --model slow --requests 40 --concurrency 8 --warmup 0 --timeout 1.5",
    )
    .await;
    let all = &report.all;
    let count = |model: &str| report.models[model].request_count;
    assert_eq!(all.failed_count, 40 - count("good"));
    assert_eq!(all.failures["the server answered 429 (too_many_requests): Busy."], count("bad"));
    assert_eq!(all.failures["the answer broke off: the stream ended early"], count("cut"));
    assert_eq!(all.failures["the answer has no text"], count("mute"));
    assert_eq!(all.failures["no whole answer within 1.5s"], count("slow"));
    for quantiles in [all.ttft_ms, all.itl_ms, all.tpot_ms, all.e2e_ms] {
        assert!(quantiles.expect("values").max.0.is_infinite(), "{all}");
    }
    assert_eq!(all.ttft_ms.expect("values").count, 40);
    assert_eq!(all.output_tokens as usize, 3 * count("good"), "failures have no tokens");
    assert_eq!(report.models["bad"].ttft_ms.expect("values").p50.0, f64::INFINITY);
    let text = report.to_string();
    assert!(text.contains("never") && text.contains("x the answer has no text"), "{text}");
    let json = serde_json::to_value(&report).expect("JSON holds it");
    assert_eq!(json["models"]["bad"]["e2e_ms"]["p50"], "inf");
}

#[tokio::test]
async fn goodput_counts_what_meets_every_limit() {
    let server = StandIn::start(|asked: &Asked| match asked.body["model"].as_str() {
        Some("halting") => Script::Stream(vec![(0, text("a")), (1600, text("b")), (0, end(None))]),
        Some("late") => Script::Stream(vec![(1600, text("a")), (0, text("b")), (0, end(None))]),
        _ => Script::Stream(vec![(0, text("a")), (5, text("b")), (0, end(None))]),
    })
    .await;
    let line = "--model halting --model late --model good --requests 12 --concurrency 12 --ttft-ms 1300 --itl-ms 1300 --warmup 0";
    let report = measure(&server, line).await;
    let good = |model: &str| (report.models[model].goodput_requests_per_second * report.elapsed_s).round() as usize;
    assert_eq!((good("halting"), good("late"), good("good")), (0, 0, report.models["good"].request_count));
    assert!(report.models["good"].request_count > 0);
}

#[tokio::test]
async fn load_and_texts_are_named_by_equal_hashes() {
    let server = StandIn::start(|asked: &Asked| {
        let words = asked.body["messages"][0]["content"].as_str().map_or(0, |text| text.split(' ').count());
        Script::Stream(vec![(0, delta(&words.to_string())), (0, end(None))])
    })
    .await;
    let line = "--model m --endpoint chat --requests 8 --concurrency 4 --prompt-tokens 3..30 --seed 5";
    let (one, two) = (measure(&server, line).await, measure(&server, line).await);
    assert_eq!((&one.schedule_hash, &one.prompts_hash, &one.output_hash), (&two.schedule_hash, &two.prompts_hash, &two.output_hash));
    let other = measure(&server, &line.replace("seed 5", "seed 6")).await;
    assert!(other.schedule_hash != one.schedule_hash && other.output_hash != one.output_hash);
    assert_eq!(one.all.counted_by_chunks, 8, "this server tells no usage");
    let expected = format!("{line} --expect-outputs {}", one.output_hash);
    load::run(args(&server, &expected)).await.expect("the same texts");
    let error = load::run(args(&server, &format!("{line} --expect-outputs 00"))).await.expect_err("other texts").to_string();
    assert!(error.contains("expected 00"), "{error}");
}

#[tokio::test]
async fn duration_ends_a_closed_loop_and_own_process_is_charged() {
    let server = StandIn::start(three_tokens).await;
    let line = format!("--model m --duration 0.3 --concurrency 2 --server-pid {}", std::process::id());
    let report = measure(&server, &line).await;
    assert!((2..200).contains(&report.all.request_count), "{}", report.all);
    let used = report.server.expect("a process was named");
    assert!(used.peak_rss_bytes > 0 && used.cpu_seconds >= 0.0 && used.cpu_seconds_per_million_tokens.is_some());
}

#[tokio::test]
async fn senseless_loads_are_refused_before_they_start() {
    let server = StandIn::start(|_: &Asked| Script::Whole { status: 500, body: String::new() }).await;
    for (line, says) in [
        ("--model m --rate 0", "--rate"),
        ("--model m --rate inf", "--rate"),
        ("--model m --concurrency 0", "--concurrency"),
        ("--model m --requests 0", "--requests"),
        ("--model m --requests 999999999", "--requests"),
        ("--model m --duration nan", "--duration"),
        ("--model m --timeout 0", "--timeout"),
        ("--model m --requests 200000 --output-tokens 1000", "asks for 200000000 tokens"),
        ("--model m --extra []", "--extra"),
        ("--model m --target n=http://127.0.0.1:1", "--target n"),
        ("--model m --target m=https://a", "https"),
        ("--model m:2 --in-turn", "--in-turn"),
        ("--model m --note a", "--note"),
        ("--model m --prompts /nonexistent", "open /nonexistent"),
        ("--model m --server-pid 4294967295", "read stat"),
        ("--model m", "warm up m: the server answered 500"),
        ("", "the server answered 500"),
    ] {
        let error = refused(&server, line).await;
        assert!(error.contains(says), "{line}: {error}");
    }
    let both = Cli::try_parse_from(["bench", "--rate", "1", "--concurrency", "2"]);
    assert!(both.is_err(), "two loops at once");
}
