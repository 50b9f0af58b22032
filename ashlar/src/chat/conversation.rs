//! A conversation: its history, its commands, one answer at a time. It reads lines and interrupts from channels and writes to
//! anything; it does not know the terminal.

use std::io::Write;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::client::{Client, ClientError};

/// Messages kept; the server has a bound of its own.
const MESSAGES_MAX: usize = 4096;

const HELP: &str = "/reset begins anew, /quit leaves; Ctrl-C stops an answer, and leaves when there is none\n";

/// What every request of a conversation says.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// As the server knows it.
    pub(crate) model: String,
    /// Before the first message, and again after a reset.
    pub(crate) system: Option<String>,
    /// The server decides where absent.
    pub(crate) temperature: Option<f64>,
    /// The server decides where absent.
    pub(crate) max_tokens: Option<u32>,
    /// The server draws one where absent.
    pub(crate) seed: Option<i64>,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ended {
    /// As the model wanted, or at its length.
    Whole,
    /// By Ctrl-C; what was said stays in the history.
    Interrupted,
    /// The question and what was said of an answer are not in the history.
    Failed(ClientError),
}

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Nothing,
    Reset,
    Quit,
    Help,
    Unknown(&'a str),
    Say(&'a str),
}

/// A conversation with one model.
pub(crate) struct Conversation {
    client: Client,
    settings: Settings,
    messages: Vec<Value>,
}

impl Conversation {
    /// An empty one.
    pub(crate) fn new(client: Client, settings: Settings) -> Self {
        let mut conversation = Self { client, settings, messages: Vec::new() };
        conversation.reset();
        conversation
    }

    fn reset(&mut self) {
        self.messages.clear();
        self.messages.extend(self.settings.system.as_ref().map(|system| json!({"role": "system", "content": system})));
    }

    /// Answers each line until one says `/quit`, the lines end, or an interrupt comes while no answer is under way.
    pub(crate) async fn talk(
        &mut self,
        lines: &mut mpsc::Receiver<String>,
        interrupts: &mut mpsc::Receiver<()>,
        output: &mut impl Write,
    ) -> anyhow::Result<()> {
        writeln!(output, "{} at {}", self.settings.model, self.client.base())?;
        write!(output, "{HELP}")?;
        loop {
            write!(output, "\n> ")?;
            let line = tokio::select! {
                line = lines.recv() => line,
                _ = interrupts.recv() => None,
            };
            let Some(line) = line else {
                writeln!(output)?;
                return Ok(());
            };
            match parse(&line) {
                Line::Nothing => (),
                Line::Quit => return Ok(()),
                Line::Help => write!(output, "{HELP}")?,
                Line::Unknown(command) => write!(output, "there is no {command}: {HELP}")?,
                Line::Reset => {
                    self.reset();
                    writeln!(output, "the conversation begins anew")?;
                }
                Line::Say(text) => match self.answer(text.to_owned(), interrupts, output).await? {
                    Ended::Whole => writeln!(output)?,
                    Ended::Interrupted => writeln!(output, " [stopped]")?,
                    Ended::Failed(error) => writeln!(output, "{}", sentence(&error))?,
                },
            }
        }
    }

    /// Asks `text`, writes the answer as it comes, and keeps both in the history. Errors of `output` are returned; the server's are
    /// a way to end.
    pub(crate) async fn answer(
        &mut self,
        text: String,
        interrupts: &mut mpsc::Receiver<()>,
        output: &mut impl Write,
    ) -> anyhow::Result<Ended> {
        if self.messages.len() + 2 > MESSAGES_MAX {
            // The oldest question and its answer make room.
            let oldest = usize::from(self.settings.system.is_some());
            self.messages.drain(oldest..oldest + 2);
        }
        self.messages.push(json!({"role": "user", "content": text}));
        let mut said = String::new();
        let ended = tokio::select! {
            ended = stream(&self.client, self.body(), &mut said, output) => ended?,
            Some(()) = interrupts.recv() => Ended::Interrupted,
        };
        match ended {
            Ended::Failed(_) => drop(self.messages.pop()),
            Ended::Interrupted if said.is_empty() => drop(self.messages.pop()),
            Ended::Whole | Ended::Interrupted => self.messages.push(json!({"role": "assistant", "content": said})),
        }
        Ok(ended)
    }

    fn body(&self) -> Bytes {
        let Settings { model, temperature, max_tokens, seed, .. } = &self.settings;
        let mut body = json!({"model": model, "messages": self.messages, "stream": true});
        for (name, value) in [("temperature", json!(temperature)), ("max_tokens", json!(max_tokens)), ("seed", json!(seed))] {
            if !value.is_null() {
                body[name] = value;
            }
        }
        Bytes::from(body.to_string())
    }
}

/// Streams one answer. What was written is in `said` even if this future is dropped.
async fn stream(client: &Client, body: Bytes, said: &mut String, output: &mut impl Write) -> anyhow::Result<Ended> {
    let mut chunks = match client.stream("/v1/chat/completions", body).await {
        Ok(chunks) => chunks,
        Err(error) => return Ok(Ended::Failed(error)),
    };
    loop {
        match chunks.next().await {
            Ok(Some(chunk)) if chunk.text.is_empty() => (),
            Ok(Some(chunk)) => {
                said.push_str(&chunk.text);
                output.write_all(chunk.text.as_bytes())?;
            }
            Ok(None) => return Ok(Ended::Whole),
            Err(error) => {
                if !said.is_empty() {
                    writeln!(output)?;
                }
                return Ok(Ended::Failed(error));
            }
        }
    }
}

/// An error as a sentence, with the way out where there is one.
fn sentence(error: &ClientError) -> String {
    let too_long = matches!(error, ClientError::Refused(refusal) if refusal.code.as_deref() == Some("context_length_exceeded"));
    format!("{error}{}", if too_long { "; /reset begins anew" } else { "" })
}

fn parse(line: &str) -> Line<'_> {
    match line.trim() {
        "" => Line::Nothing,
        "/reset" => Line::Reset,
        "/quit" | "/exit" => Line::Quit,
        "/help" => Line::Help,
        // A path or a remark may begin with a slash too; a lone word is a mistyped command.
        word if word.starts_with('/') && word[1..].chars().all(|c| c.is_ascii_alphabetic()) => Line::Unknown(word),
        text => Line::Say(text),
    }
}
