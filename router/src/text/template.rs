//! A model's chat template: messages to prompt text, as Hugging Face transformers renders it. Templates come with checkpoints,
//! so they are bounded: fuel for steps and for the data they make, no loader, no clock but the one passed in.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde::Serialize;

/// Steps that one rendering may take, or 64-byte pieces of data that it may make: at most 32 MB. It bounds how deep lists can hold
/// lists, too.
const FUEL: u64 = 500_000;
/// Longest template. It bounds how deep expressions can be.
const SOURCE_BYTES_MAX: usize = 64 << 10;
/// Parsing and the dropping of values recurse as deep as a template wants, so they get a stack for the worst that the two bounds
/// above allow. Pages that are not touched cost nothing.
const STACK_BYTES: usize = 512 << 20;
/// Most digits of a width or precision in `str.format`.
const FORMAT_DIGITS_MAX: usize = 4;

/// One message, as a template sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text; parts are already joined.
    pub content: String,
    /// Who speaks, where the client says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// All that a template sees.
#[derive(Debug, Clone, Copy)]
pub struct Conversation<'a> {
    /// Oldest first.
    pub messages: &'a [Message],
    /// Text of the beginning-of-sequence token, where the model has one.
    pub bos_token: Option<&'a str>,
    /// Text of the end-of-sequence token, where the model has one.
    pub eos_token: Option<&'a str>,
    /// Whether the prompt ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// Unix time for `strftime_now`, in seconds.
    pub now_s: u64,
}

/// Why a template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// It does not parse.
    #[error("parse the chat template: {0}")]
    Parse(String),
    /// It called `raise_exception`, or failed on these messages.
    #[error("{0}")]
    Refused(String),
}

/// Runs work on templates on a thread of its own with a deep stack. The receiver fails if the work panicked.
///
/// # Errors
/// When the system has no thread.
pub fn on_deep_stack<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<tokio::sync::oneshot::Receiver<T>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // A receiver that is gone does not want it any more.
    let run = move || drop(sender.send(work()));
    std::thread::Builder::new().name("template".to_owned()).stack_size(STACK_BYTES).spawn(run)?;
    Ok(receiver)
}

/// A compiled template. Immutable. Make and render it [`on_deep_stack`] where it comes from others.
pub struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// Compiles a template.
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(TemplateError::Parse(format!("{} bytes are over the limit of {SOURCE_BYTES_MAX}", source.len())));
        }
        let mut environment = Environment::new();
        let parse = |error: Error| TemplateError::Parse(error.to_string());
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(parse)?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python_method);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned("chat", source.to_owned()).map_err(parse)?;
        Ok(Self { environment })
    }

    /// Renders a conversation.
    pub fn render(&self, conversation: Conversation<'_>) -> Result<String, TemplateError> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::from([
            ("messages", Value::from(minijinja::value::Serde(conversation.messages))),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(conversation.add_generation_prompt)),
        ]);
        context.extend(conversation.bos_token.map(|text| ("bos_token", Value::from(text))));
        context.extend(conversation.eos_token.map(|text| ("eos_token", Value::from(text))));
        let now_s = conversation.now_s;
        context.insert("strftime_now", Value::from_function(move |format: String| strftime(&format, now_s)));

        let template = self.environment.get_template("chat").map_err(|e| TemplateError::Parse(e.to_string()))?;
        template.render(context).map_err(|error| TemplateError::Refused(sentence(&error)))
    }
}

/// The message of the innermost error: what `raise_exception` said, without places inside the template.
fn sentence(error: &Error) -> String {
    let mut innermost = error;
    let mut source = std::error::Error::source(error);
    while let Some(next) = source {
        if let Some(next) = next.downcast_ref::<Error>() {
            innermost = next;
        }
        source = next.source();
    }
    match innermost.kind() {
        ErrorKind::OutOfFuel => "the chat template takes too many steps, or makes too much text".to_owned(),
        _ => innermost.detail().map_or_else(|| innermost.kind().to_string(), str::to_owned),
    }
}

/// Python's methods. Fuel does not see what `format` pads, so its widths are bounded.
fn python_method(state: &mut minijinja::State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let is_wide = |format: &str| format.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > FORMAT_DIGITS_MAX);
    if method == "format" && value.as_str().is_some_and(is_wide) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("format: a number has over {FORMAT_DIGITS_MAX} digits")));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: no HTML escapes.
fn tojson(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let failed = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}"));
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: (Option<bool>, Option<Value>) = (kwargs.get("ensure_ascii")?, kwargs.get("separators")?);
    kwargs.assert_all_used()?;
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter)).map_err(failed)?,
    }
    let text = String::from_utf8(bytes).expect("serde_json writes UTF-8");
    Ok(Value::from_safe_string(text))
}

/// `", "` and `": "` between things, on one line.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The conversions of C's `strftime` that templates use, in UTC. Others stay as they are written.
fn strftime(format: &str, now_s: u64) -> String {
    const MONTHS: [&str; 12] =
        ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, seconds) = (now_s / 86_400, now_s % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let conversion = chars.next();
        let written = match conversion {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('e') => write!(out, "{day:2}"),
            Some('B') => write!(out, "{month_name}"),
            Some('b') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{day_name}"),
            Some('a') => write!(out, "{}", &day_name[..3]),
            Some('H') => write!(out, "{hour:02}"),
            Some('I') => write!(out, "{:02}", (hour + 11) % 12 + 1),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('%') => write!(out, "%"),
            Some(other) => write!(out, "%{other}"),
            None => write!(out, "%"),
        };
        written.expect("writing to a String cannot fail");
    }
    out
}

/// Year, month and day of a number of days since 1970-01-01 (the proleptic Gregorian calendar, in eras of 400 years).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468; // days since 0000-03-01
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153; // 0 is March
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests;
