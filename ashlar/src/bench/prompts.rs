//! What is said to the server: words from a seeded list, or the lines of a file. A generated prompt is a pure function of seed,
//! index and length, so none has to be kept.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::bench::request::Endpoint;
use crate::bench::schedule::{HASH_CHARS, Planned};

/// Bytes of a file of prompts.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Where prompts come from.
#[derive(Debug)]
pub(crate) enum Prompts {
    /// From the word list.
    Generated {
        /// Of the run.
        seed: u64,
    },
    /// In turn from a file.
    File {
        /// At least one.
        prompts: Vec<Prompt>,
        /// Of the file's bytes.
        hash: String,
    },
}

/// One prompt, in the form that its route takes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    /// For `/v1/completions`.
    Text(String),
    /// For `/v1/chat/completions`: an array.
    Messages(Value),
}

/// A line of a file of prompts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
}

impl Prompts {
    /// Reads a file of JSON lines, each with `prompt` or with `messages`.
    pub(crate) fn read(path: &Path, endpoint: Endpoint) -> anyhow::Result<Self> {
        let mut bytes = Vec::new();
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).with_context(|| format!("read {}", path.display()))?;
        ensure!(bytes.len() as u64 <= FILE_BYTES_MAX, "{} is larger than {FILE_BYTES_MAX} bytes", path.display());
        Self::parse(&bytes, endpoint).with_context(|| format!("{} is no file of prompts", path.display()))
    }

    fn parse(bytes: &[u8], endpoint: Endpoint) -> anyhow::Result<Self> {
        let text = std::str::from_utf8(bytes).context("it is not UTF-8")?;
        let mut prompts = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let number = number + 1;
            let line: Line = serde_json::from_str(line).with_context(|| format!("line {number}"))?;
            prompts.push(match line {
                Line { prompt: Some(text), messages: None } => Prompt::of_text(text, endpoint),
                Line { prompt: None, messages: Some(messages) } if endpoint == Endpoint::Chat => Prompt::Messages(messages.into()),
                Line { prompt: None, messages: Some(_) } => bail!("line {number} has messages; they need --endpoint chat"),
                _ => bail!("line {number} needs either `prompt` or `messages`"),
            });
        }
        ensure!(!prompts.is_empty(), "it is empty");
        Ok(Self::File { prompts, hash: blake3::hash(bytes).to_hex()[..HASH_CHARS].to_owned() })
    }

    /// The prompt of a request.
    pub(crate) fn of(&self, planned: &Planned, endpoint: Endpoint) -> Cow<'_, Prompt> {
        match self {
            Self::Generated { seed } => Cow::Owned(Prompt::of_text(words(*seed, planned.index, planned.prompt_tokens), endpoint)),
            Self::File { prompts, .. } => Cow::Borrowed(&prompts[planned.index as usize % prompts.len()]),
        }
    }

    /// A name for what they hold: the file's hash, or that of the word list.
    pub(crate) fn hash(&self) -> String {
        match self {
            Self::Generated { .. } => blake3::hash(WORDS.as_bytes()).to_hex()[..HASH_CHARS].to_owned(),
            Self::File { hash, .. } => hash.clone(),
        }
    }
}

impl Prompt {
    fn of_text(text: String, endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Completions => Self::Text(text),
            Endpoint::Chat => Self::Messages(json!([{"role": "user", "content": text}])),
        }
    }
}

/// So many words of the list. Each is one token of most vocabularies; the report says what the server counted.
fn words(seed: u64, index: u32, count: u32) -> String {
    let list: Vec<&str> = WORDS.split_whitespace().collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Stream 0 is the schedule's.
    rng.set_stream(u64::from(index) + 1);
    let mut text = String::new();
    for _ in 0..count {
        if !text.is_empty() {
            text.push(' ');
        }
        text += list[(rng.next_u64() % list.len() as u64) as usize];
    }
    text
}

/// Common English words, 256 of them, none twice.
const WORDS: &str = "
    the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
    one you were all her she there would their we him been has when who will no more if out so up said what its
    about than into them can only other time new some could these two may first then do any like my now over such
    our man me even most made after also did many off before must well back through years where much your way down
    should because long each just state those people too good how make world still see own work men day get here old
    both life between being under three never know same last another while us might great go come right few use
    place small found part during without house again thought home left number course war until always away
    something fact though water less public put think almost hand enough far took head yet set better told nothing
    night end why called find going look asked later point knew next city give group young let room side social
    given present several order second form need high light line body week cut land name air green white red river
    stone wall door road tree book word music hour table glass bread fire wind rain snow field horse bird fish paper
    sound star moon sun sea ship child friend king law art voice face mind heart hope gold iron
";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn planned(index: u32) -> Planned {
        Planned { index, at: Duration::ZERO, model: 0, prompt_tokens: 12, output_tokens: 1 }
    }

    #[test]
    fn generated_prompts_depend_on_seed_and_index_alone() {
        let prompts = Prompts::Generated { seed: 1 };
        let one = prompts.of(&planned(3), Endpoint::Completions).into_owned();
        assert_eq!(one, Prompt::Text("three it men use still from art head what about day fire".into()));
        assert_ne!(one, prompts.of(&planned(4), Endpoint::Completions).into_owned());
        assert_ne!(one, Prompts::Generated { seed: 2 }.of(&planned(3), Endpoint::Completions).into_owned());
    }

    #[test]
    fn file_is_read_in_turn() {
        let prompts = Prompts::parse(b"{\"prompt\": \"one\"}\n\n{\"prompt\": \"two\"}\n", Endpoint::Completions).expect("two prompts");
        assert_eq!(*prompts.of(&planned(3), Endpoint::Completions), Prompt::Text("two".into()));
        let prompts = Prompts::parse(b"{\"prompt\": \"one\"}\n{\"messages\": []}", Endpoint::Chat).expect("two prompts");
        assert_eq!(*prompts.of(&planned(0), Endpoint::Chat), Prompt::Messages(json!([{"role": "user", "content": "one"}])));
        assert_eq!(*prompts.of(&planned(1), Endpoint::Chat), Prompt::Messages(json!([])));
    }

    #[test]
    fn wrong_files_are_refused_with_the_line() {
        for (text, says) in [
            ("", "empty"),
            ("{\"prompt\": 1}", "line 1"),
            ("\n{}", "line 2"),
            ("{\"messages\":[]}", "--endpoint chat"),
            ("{\"a\":1}", "line 1"),
        ] {
            let error = format!("{:#}", Prompts::parse(text.as_bytes(), Endpoint::Completions).expect_err(text));
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(Prompts::parse(b"\xff", Endpoint::Chat).is_err());
    }
}
