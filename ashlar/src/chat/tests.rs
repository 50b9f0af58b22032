//! Conversations with a scripted stand-in.

use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::conversation::{Conversation, Ended, Settings};
use super::harmless;
use crate::client::standin::{Asked, Script, StandIn, delta, end};
use crate::client::{Client, ClientError};

fn settings() -> Settings {
    Settings { model: "t/m".into(), system: Some("Be brief.".into()), temperature: Some(0.0), max_tokens: Some(9), seed: None }
}

fn conversation(server: &StandIn) -> Conversation {
    Conversation::new(Client::new(&server.url, Some("key")).expect("a valid address"), settings())
}

/// Answers with the number of messages it was sent.
fn count_messages(asked: &Asked) -> Script {
    let count = asked.body["messages"].as_array().map_or(0, Vec::len);
    Script::Stream(vec![(0, delta("")), (0, delta("I see ")), (1, delta(&count.to_string())), (0, end(None))])
}

/// The whole output of a conversation whose lines these are.
async fn talk(server: &StandIn, typed: &[&str]) -> String {
    let (sender, mut lines) = mpsc::channel(typed.len());
    for line in typed {
        sender.send((*line).to_owned()).await.expect("the receiver stands");
    }
    drop(sender);
    let (_keep, mut interrupts) = mpsc::channel(1);
    let mut output = Vec::new();
    conversation(server).talk(&mut lines, &mut interrupts, &mut output).await.expect("a conversation");
    String::from_utf8(output).expect("text")
}

fn roles(asked: &Asked) -> Vec<&str> {
    asked.body["messages"].as_array().expect("messages").iter().filter_map(|message| message["role"].as_str()).collect()
}

#[tokio::test]
async fn history_grows_and_reset_empties_it() {
    let server = StandIn::start(count_messages).await;
    let output = talk(&server, &["Hello", "", "Again", "/reset", "Anew", "/nonsense", "/etc/hosts?", "/quit", "never"]).await;
    let answers: Vec<&str> = output.matches("I see 2").chain(output.matches("I see 4")).collect();
    assert_eq!(answers, ["I see 2", "I see 2", "I see 4", "I see 4"], "{output}");
    assert!(output.contains("there is no /nonsense"), "{output}");
    let asked = server.asked();
    assert_eq!(asked.len(), 4);
    assert_eq!(roles(&asked[1]), ["system", "user", "assistant", "user"]);
    assert_eq!(asked[1].body["messages"][2]["content"], "I see 2");
    assert_eq!(roles(&asked[2]), ["system", "user"]);
    assert_eq!(asked[0].authorization.as_deref(), Some("Bearer key"));
    let mut body = asked[0].body.clone();
    body["messages"] = Value::Null;
    assert_eq!(body, json!({"model": "t/m", "messages": null, "stream": true, "temperature": 0.0, "max_tokens": 9}));
}

#[tokio::test]
async fn refused_question_is_one_sentence_and_leaves_no_trace() {
    let refusal = r#"{"error":{"message":"Too long.","code":"context_length_exceeded"}}"#;
    let server = StandIn::start(|asked: &Asked| match asked.body["messages"][1]["content"].as_str() {
        Some("long") => Script::Whole { status: 400, body: refusal.into() },
        _ => count_messages(asked),
    })
    .await;
    let output = talk(&server, &["long", "short"]).await;
    assert!(
        output.contains("\nthe server answered 400 (context_length_exceeded): Too long.; /reset begins anew\n")
            || output.contains("> the server answered 400 (context_length_exceeded): Too long.; /reset begins anew\n"),
        "{output}"
    );
    assert_eq!(roles(&server.asked()[1]), ["system", "user"]);
}

#[tokio::test]
async fn interrupt_stops_the_answer_and_the_next_one_leaves() {
    let server = StandIn::start(|asked: &Asked| match roles(asked).len() {
        2 => Script::Stream(vec![(0, delta("Once upon")), (60_000, delta(" a time")), (0, end(None))]),
        _ => count_messages(asked),
    })
    .await;
    let (line, mut lines) = mpsc::channel(4);
    let (interrupt, mut interrupts) = mpsc::channel(4);
    let (sink, mut written) = mpsc::unbounded_channel();
    let mut conversation = conversation(&server);
    let mut output = Sink(sink);
    let talking = conversation.talk(&mut lines, &mut interrupts, &mut output);
    let driving = async {
        let mut until = async |text: &str| {
            let mut seen = String::new();
            while !seen.ends_with(text) {
                seen += &written.recv().await.expect("the conversation goes on");
            }
        };
        until("> ").await;
        line.send("Tell".into()).await.expect("it listens");
        until("Once upon").await;
        interrupt.send(()).await.expect("it listens");
        until("[stopped]\n").await;
        until("> ").await;
        line.send("Count".into()).await.expect("it listens");
        until("I see 4\n").await;
        until("> ").await;
        interrupt.send(()).await.expect("it listens");
    };
    let (talked, ()) = tokio::join!(talking, driving);
    talked.expect("a conversation");
    assert_eq!(server.asked()[1].body["messages"][2], json!({"role": "assistant", "content": "Once upon"}));
}

#[tokio::test]
async fn one_prompt_gives_its_answer_and_nothing_else() {
    let server = StandIn::start(count_messages).await;
    let (_keep, mut interrupts) = mpsc::channel(1);
    let mut output = Vec::new();
    let ended = conversation(&server).answer("Hello".into(), &mut interrupts, &mut output).await.expect("memory can be written");
    assert_eq!((ended, output.as_slice()), (Ended::Whole, b"I see 2".as_slice()));
}

#[tokio::test]
async fn model_may_be_left_out_only_where_there_is_one() {
    async fn only(ids: &'static [&'static str]) -> Result<String, ClientError> {
        let data: Vec<Value> = ids.iter().map(|id| json!({"id": id})).collect();
        let server = StandIn::start(move |_: &Asked| Script::Whole { status: 200, body: json!({"data": data}).to_string() }).await;
        Client::new(&server.url, None).expect("a valid address").only_model("name one").await
    }
    assert_eq!(only(&["t/m"]).await, Ok("t/m".into()));
    assert_eq!(only(&["t/a", "t/b"]).await.expect_err("two").to_string(), "the server has 2 models (t/a, t/b): name one");
    assert_eq!(only(&[]).await.expect_err("none").to_string(), "the server has no models yet");
}

#[test]
fn terminal_is_not_driven_by_the_model() {
    assert_eq!(harmless("a\u{1b}[2J\tb\n\r\u{9b}é"), "a\u{fffd}[2J\tb\n\u{fffd}\u{fffd}é");
}

struct Sink(mpsc::UnboundedSender<String>);

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.send(String::from_utf8_lossy(bytes).into_owned()).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
