//! `ashlar chat`: a conversation in the terminal over the OpenAI API, streaming. Lines, interrupts and output come in as values
//! (`chat/conversation.rs`), so that all of it can be tested without a terminal; here is the terminal.

mod conversation;
#[cfg(test)]
mod tests;

use std::io::{BufRead, IsTerminal, Read, Write};

use anyhow::{Context, ensure};
use tokio::sync::mpsc;

use crate::chat::conversation::{Conversation, Ended, Settings};
use crate::client::Client;
use crate::output;

/// Bytes of a prompt that is piped in, and of a line that is typed.
const PROMPT_BYTES_MAX: u64 = 4 << 20;

/// Talks with a model.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ChatArgs {
    /// The model; may be left out where the server has only one
    model: Option<String>,
    /// The server, with or without /v1; plain http
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Key sent as a bearer token
    #[arg(long, env = "ASHLAR_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// What the model is told before the conversation
    #[arg(long)]
    system: Option<String>,
    /// 0 is greedy [default: the model's]
    #[arg(long)]
    temperature: Option<f64>,
    /// Length of an answer at most [default: what fits]
    #[arg(long)]
    max_tokens: Option<u32>,
    /// Seed of sampling: the same conversation then has the same answers
    #[arg(long)]
    seed: Option<i64>,
}

/// Chats until the input ends. Without a terminal on the input, all of it is one prompt and its answer is the output.
pub(crate) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    chat(args).await.context("chat")
}

async fn chat(args: ChatArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.url, args.api_key.as_deref())?;
    let model = match args.model {
        Some(model) => model,
        None => client.only_model("name one, as in ashlar chat MODEL").await?,
    };
    let settings = Settings { model, system: args.system, temperature: args.temperature, max_tokens: args.max_tokens, seed: args.seed };
    let mut conversation = Conversation::new(client, settings);
    let mut interrupts = interrupts();
    let mut output = Output { to_terminal: std::io::stdout().is_terminal() };
    if std::io::stdin().is_terminal() {
        let mut lines = lines();
        return conversation.talk(&mut lines, &mut interrupts, &mut output).await;
    }
    let prompt = tokio::task::spawn_blocking(read_prompt).await??;
    match conversation.answer(prompt, &mut interrupts, &mut output).await? {
        Ended::Whole | Ended::Interrupted => Ok(output.write_all(b"\n")?),
        Ended::Failed(error) => Err(error.into()),
    }
}

fn read_prompt() -> anyhow::Result<String> {
    let mut prompt = String::new();
    std::io::stdin().take(PROMPT_BYTES_MAX + 1).read_to_string(&mut prompt).context("read the prompt")?;
    ensure!(prompt.len() as u64 <= PROMPT_BYTES_MAX, "the prompt is longer than {PROMPT_BYTES_MAX} bytes");
    ensure!(!prompt.trim().is_empty(), "the prompt is empty");
    Ok(prompt.trim_end_matches(['\r', '\n']).to_owned())
}

/// Lines as they are typed. A plain thread reads them: the runtime would wait at its end for a read that only a key can finish.
fn lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            match (&mut stdin).take(PROMPT_BYTES_MAX).read_until(b'\n', &mut bytes) {
                Ok(0) | Err(_) => break,
                Ok(_) => (),
            }
            let line = String::from_utf8_lossy(&bytes).trim_end_matches(['\r', '\n']).to_owned();
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// One value for each Ctrl-C. From here on the signal does not end the process by itself.
fn interrupts() -> mpsc::Receiver<()> {
    let (sender, receiver) = mpsc::channel(8);
    tokio::spawn(async move { while tokio::signal::ctrl_c().await.is_ok() && sender.send(()).await.is_ok() {} });
    receiver
}

/// Standard output, flushed at each piece. On a terminal, control characters of the model are made visible instead of obeyed.
struct Output {
    to_terminal: bool,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.to_terminal {
            output::text(harmless(&String::from_utf8_lossy(bytes)))?;
        } else {
            output::bytes(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(()) // nothing is kept back
    }
}

/// The text with control characters other than line ends and tabs replaced.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}
