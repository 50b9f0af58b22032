//! The client against a scripted stand-in.

use serde_json::json;

use super::standin::{Asked, Script, StandIn, delta, end, event, text};
use super::*;

/// All that a stream says: the text, the usage, the error that ended it.
async fn read(client: &Client) -> (String, Option<Usage>, Option<ClientError>) {
    let (mut all, mut usage) = (String::new(), None);
    let mut stream = match client.stream("/v1/completions", Bytes::from_static(b"{}")).await {
        Ok(stream) => stream,
        Err(error) => return (all, usage, Some(error)),
    };
    loop {
        match stream.next().await {
            Ok(Some(chunk)) => {
                all += &chunk.text;
                usage = chunk.usage.or(usage);
            }
            Ok(None) => return (all, usage, None),
            Err(error) => return (all, usage, Some(error)),
        }
    }
}

/// What the client makes of one scripted answer.
async fn answer(script: Script) -> (String, Option<Usage>, Option<ClientError>) {
    let server = StandIn::start(move |_: &Asked| script.clone()).await;
    read(&Client::new(&server.url, None).expect("a valid address")).await
}

#[tokio::test]
async fn stream_is_read_whatever_packets_it_comes_in() {
    let whole = format!(": keep-alive\n\n{}{}{}", delta("Ho"), text("ła 🧱"), end(Some((5, 2))));
    for cuts in [1, 3, 7, 64] {
        // Cut between bytes, but the script holds text: characters are cut by the parser's own tests.
        let pieces: Vec<String> = whole.chars().collect::<Vec<_>>().chunks(cuts).map(|piece| piece.iter().collect()).collect();
        let (text, usage, error) = answer(Script::Stream(pieces.into_iter().map(|piece| (0, piece)).collect())).await;
        assert_eq!((text.as_str(), error), ("Hoła 🧱", None));
        assert_eq!(usage, Some(Usage { prompt_tokens: 5, cached_tokens: 0, completion_tokens: 2 }));
    }
}

#[tokio::test]
async fn refusals_become_one_sentence() {
    async fn sentence(status: u16, body: &str) -> String {
        answer(Script::Whole { status, body: body.into() }).await.2.expect("a refusal").to_string()
    }
    let openai = r#"{"error":{"message":"No such\nmodel.","type":"invalid_request_error","param":null,"code":"model_not_found"}}"#;
    assert_eq!(sentence(404, openai).await, "the server answered 404 (model_not_found): No such model.");
    assert_eq!(sentence(400, r#"{"error":"bad"}"#).await, "the server answered 400: bad");
    assert_eq!(sentence(422, r#"{"detail":"worse"}"#).await, "the server answered 422: worse");
    assert_eq!(sentence(502, "<h1>Bad\u{1b}[2J</h1>").await, "the server answered 502: <h1>Bad [2J</h1>");
    assert_eq!(sentence(503, "").await, "the server answered 503: Service Unavailable");
}

#[tokio::test]
async fn error_inside_the_stream_is_a_refusal_after_its_text() {
    let failure = event(&json!({"error": {"message": "The executor was lost.", "code": "unavailable"}})) + "data: [DONE]\n\n";
    let (text, _, error) = answer(Script::Stream(vec![(0, text("Once")), (0, failure)])).await;
    assert_eq!(text, "Once");
    assert_eq!(error.expect("a refusal").to_string(), "the server gave up (unavailable): The executor was lost.");
}

#[tokio::test]
async fn cut_streams_and_other_bodies_are_errors() {
    let (text, _, error) = answer(Script::Stream(vec![(0, super::standin::text("Once"))])).await;
    assert_eq!(text, "Once");
    assert!(matches!(error, Some(ClientError::Cut(_))), "{error:?}");
    let (_, _, error) = answer(Script::Broken(super::standin::text("Once"))).await;
    assert!(matches!(error, Some(ClientError::Cut(_))), "{error:?}");
    let (_, _, error) = answer(Script::Whole { status: 200, body: "{}".into() }).await;
    assert!(matches!(error, Some(ClientError::Malformed(_))), "{error:?}");
    let (_, _, error) = answer(Script::Stream(vec![(0, "data: {\n\n".into())])).await;
    assert!(matches!(error, Some(ClientError::Malformed(_))), "{error:?}");
}

#[tokio::test]
async fn end_without_done_is_an_end_after_a_finish_reason() {
    let finish = event(&json!({"choices": [{"text": "", "finish_reason": "stop"}]}));
    let (text, _, error) = answer(Script::Stream(vec![(0, text("Once")), (0, finish)])).await;
    assert_eq!((text.as_str(), error), ("Once", None));
}

#[tokio::test]
async fn key_is_sent_and_models_are_listed() {
    let body = r#"{"object":"list","data":[{"id":"b/two"},{"id":"a/one"}]}"#;
    let server = StandIn::start(|_: &Asked| Script::Whole { status: 200, body: body.into() }).await;
    let client = Client::new(&format!("{}/v1/", server.url), Some("secret")).expect("a valid address");
    assert_eq!(client.models().await.expect("a list"), ["b/two", "a/one"]);
    let asked = &server.asked()[0];
    assert_eq!((asked.path.as_str(), asked.authorization.as_deref()), ("/v1/models", Some("Bearer secret")));
}

#[tokio::test]
async fn unusable_addresses_and_keys_are_told_before_anything_is_sent() {
    assert_eq!(Client::new("localhost:1/v1/", None).unwrap().base(), "http://localhost:1");
    for (url, says) in [("https://a", "https"), ("ftp://a", "http://"), ("http://a?b", "query"), ("", "no URL")] {
        let error = Client::new(url, None).err().expect("an unusable address").to_string();
        assert!(error.contains(says), "{url}: {error}");
    }
    assert_eq!(Client::new("http://a", Some("a\nb")).err(), Some(ClientError::Key));
}

#[tokio::test]
async fn closed_port_is_no_answer() {
    let client = Client::new("http://127.0.0.1:1", None).expect("a valid address");
    let error = client.models().await.expect_err("nothing listens on port 1").to_string();
    assert!(error.starts_with("no answer from http://127.0.0.1:1: "), "{error}");
}
