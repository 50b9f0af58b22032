//! Chat messages: roles and text in the shapes that OpenAI's API allows, made into what templates take.

use serde_json::value::RawValue;

use crate::io::backend::ApiError;
use crate::io::rest::config::RestLimits;
use crate::io::rest::fields::{Fields, Off, parse, unsupported_value, wrong};
use crate::text::template::Message;

const KNOWN: &[&str] = &["role", "content", "name"];
/// What clients echo when they send an assistant's message back.
const OFF: &[Off] = &[
    ("refusal", &[]),
    ("annotations", &["[]"]),
    ("audio", &[]),
    ("function_call", &[]),
    ("tool_calls", &["[]"]),
    ("tool_call_id", &[]),
    ("reasoning_content", &["\"\""]),
];
/// Parts of other types.
const OFF_PART: &[Off] = &[("image_url", &[]), ("input_audio", &[]), ("file", &[]), ("refusal", &[])];
const PARTS: &str = "a string or an array of text parts";

/// Takes `messages`: at least one.
pub(crate) fn take_messages(fields: &mut Fields<'_>, limits: &RestLimits) -> Result<Vec<Message>, ApiError> {
    let expected = format!("an array of 1 to {} messages", limits.messages_max);
    let raws: Vec<&RawValue> = fields.require("messages", &expected)?;
    if raws.is_empty() || raws.len() > limits.messages_max as usize {
        return Err(wrong("messages", &expected));
    }
    raws.iter().enumerate().map(|(index, raw)| read_message(raw, index)).collect()
}

fn read_message(raw: &RawValue, index: usize) -> Result<Message, ApiError> {
    let mut fields = Fields::of_value(raw, format!("messages[{index}]."), KNOWN, OFF)?;
    let role: String = fields.require("role", "a string")?;
    let role = match role.as_str() {
        // Newer clients say `developer` where templates know `system`.
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => return Err(unsupported_value(&fields.param("role"), "system, developer, user or assistant")),
        _ => return Err(wrong(&fields.param("role"), "system, developer, user or assistant")),
    };
    let name = fields.take("name", "a string")?;
    let content = fields.take_raw("content").ok_or_else(|| fields.missing("content"))?;
    let content = read_content(content, &fields.param("content"))?;
    fields.finish();
    Ok(Message { role: role.to_owned(), content, name })
}

/// A string as it is; text parts joined by line ends.
fn read_content(raw: &RawValue, param: &str) -> Result<String, ApiError> {
    if raw.get().starts_with('"') {
        return parse(raw, param, PARTS);
    }
    let parts: Vec<&RawValue> = parse(raw, param, PARTS)?;
    let mut content = String::new();
    for (index, part) in parts.iter().enumerate() {
        let mut fields = Fields::of_value(part, format!("{param}[{index}]."), &["type", "text"], OFF_PART)?;
        let kind: String = fields.require("type", "\"text\"")?;
        if kind != "text" {
            return Err(unsupported_value(&fields.param("type"), "text"));
        }
        let text: String = fields.require("text", "a string")?;
        fields.finish();
        if index > 0 {
            content.push('\n');
        }
        content.push_str(&text);
    }
    Ok(content)
}
