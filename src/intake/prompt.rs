//! Turns messages and texts into prompt ids.

use super::error::{RequestError, echo};
use super::translate::ids;
use crate::models::text::Text;
use crate::wire::openai::request::Message;
use crate::wire::openai::{ChatRequest, Content, Prompt};
use serde_json::{Map, Value};

/// Prompts of one completion request.
const PROMPTS_MAX: usize = 128;
/// Bytes of a text that is tokenised though no context need hold it: to be cut, or for its ids.
/// Where the context holds more, more is read.
pub const FREE_TEXT_BYTES_MAX: usize = 1 << 20;
/// Marks the end of the message that is continued; transformers uses the same text.
const CONTINUE_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// How much text is tokenised. Tokenising takes about a second for a megabyte, so what cannot be
/// used is refused before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Room {
    /// A text that a context of so many tokens must hold.
    Context(usize),
    /// A text whose last tokens are kept, or whose ids are asked for, beside a context of so many.
    Free(usize),
}

impl Room {
    /// Refuses a text that is too long. A token stands for at most as many bytes as the longest
    /// one has, so a text of more bytes than the context's tokens can have does not fit.
    fn check(self, model: &Text, field: &str, text: &str) -> Result<(), RequestError> {
        let (Self::Context(context) | Self::Free(context)) = self;
        // No token is shorter than a byte.
        if text.len() <= context {
            return Ok(());
        }
        let tokenizer = &model.tokenizer;
        let lengths = (0..tokenizer.len() as u32).map(|id| tokenizer.bytes_of(id).len());
        let longest = lengths.max().unwrap_or(0).max(1);
        let fits = context.saturating_mul(longest);
        match self {
            Self::Context(_) if text.len() > fits => {
                let (bytes, least) = (text.len(), text.len().div_ceil(longest));
                let what = format!(
                    "the prompt has {bytes} bytes and so at least {least} tokens: the longest \
                     token has {longest} bytes"
                );
                Err(RequestError::context(field, context, what))
            }
            Self::Free(_) if text.len() > fits.max(FREE_TEXT_BYTES_MAX) => {
                let (most, got) = (fits.max(FREE_TEXT_BYTES_MAX), text.len());
                let what = format!("must be a text of at most {most} bytes, got {got}");
                Err(RequestError::field(field, what))
            }
            _ => Ok(()),
        }
    }
}

/// The prompt of a chat: its messages through the model's template, which may print the time.
///
/// # Errors
/// 400 for messages that the template cannot render, or that do not fit.
pub fn chat_prompt(
    model: &Text,
    request: &ChatRequest,
    room: Room,
    now_ms: u64,
) -> Result<Vec<u32>, RequestError> {
    let template =
        model.chat.as_ref().ok_or_else(|| RequestError::new("this model has no chat template"))?;
    if request.messages.is_empty() {
        return Err(RequestError::field("messages", "must hold at least one message"));
    }
    let messages = request.messages.iter().enumerate().map(|(i, m)| flatten(i, m));
    let mut messages: Vec<Value> = messages.collect::<Result<_, _>>()?;
    let continued = match request.continue_final_message {
        Some(true) => Some(mark_end(&mut messages, request.add_generation_prompt)?),
        _ => None,
    };
    let tools = request.tools.as_ref().filter(|tools| !tools.is_empty());
    let tools = tools.map_or(Ok(Value::Null), serde_json::to_value);
    let tools = tools.map_err(|e| RequestError::field("tools", e.to_string()))?;
    let mut variables = Map::new();
    variables.insert("messages".into(), messages.into());
    variables.insert("tools".into(), tools);
    variables.insert("documents".into(), Value::Null);
    let opening = request.add_generation_prompt.unwrap_or(continued.is_none());
    variables.insert("add_generation_prompt".into(), opening.into());
    if let Some(effort) = &request.reasoning_effort {
        variables.insert("reasoning_effort".into(), effort.clone().into());
    }
    variables.extend(request.chat_template_kwargs.clone().unwrap_or_default());
    let mut text = template.render(variables, now_ms)?;
    if let Some(content) = continued {
        cut_at_mark(&mut text, &content)?;
    }
    encode(model, "messages", &text, request.common.add_special_tokens.unwrap_or(false), room)
}

/// Marks where the last message's text ends, and returns that text.
fn mark_end(messages: &mut [Value], opening: Option<bool>) -> Result<String, RequestError> {
    let refuse = |what| Err(RequestError::field("continue_final_message", what));
    if opening == Some(true) {
        return refuse("cannot be combined with `add_generation_prompt`");
    }
    let last = messages.last_mut().map(|message| &mut message["content"]);
    match last {
        Some(Value::String(text)) if !text.is_empty() => {
            let content = text.clone();
            text.push_str(CONTINUE_MARK);
            Ok(content)
        }
        _ => refuse("needs text in the last message"),
    }
}

/// Ends a rendered conversation where the marked text ends in it, as transformers does: with the
/// text's own blanks at its end where the template keeps them.
fn cut_at_mark(text: &mut String, content: &str) -> Result<(), RequestError> {
    let mark = CONTINUE_MARK.trim_end();
    let Some(end) = text.rfind(mark).filter(|_| text.contains(content.trim())) else {
        let what = "cannot be had: the chat template leaves the last message out";
        return Err(RequestError::field("continue_final_message", what));
    };
    let keeps_blanks = text[end..].starts_with(CONTINUE_MARK);
    text.truncate(end);
    if !keeps_blanks {
        text.truncate(text.trim_end().len());
    }
    Ok(())
}

/// A message as templates know it: text parts joined by newlines, as vLLM and llama.cpp join them,
/// arguments of calls as objects.
fn flatten(index: usize, message: &Message) -> Result<Value, RequestError> {
    let mut map = Map::new();
    map.insert("role".into(), message.role.clone().into());
    let text = match &message.content {
        None => String::new(),
        Some(Content::Text(text)) => text.clone(),
        Some(Content::Parts(parts)) => {
            let texts = parts.iter().map(|part| {
                let text = part["text"].as_str().filter(|_| part["type"] == "text");
                text.ok_or_else(|| {
                    let field = format!("messages.{index}.content");
                    RequestError::field(&field, "supports only parts of type text")
                })
            });
            texts.collect::<Result<Vec<_>, _>>()?.join("\n")
        }
    };
    map.insert("content".into(), text.into());
    map.extend(message.rest.clone());
    if let Some(calls) = map.remove("tool_calls")
        && let Some(calls) = parse_calls(&format!("messages.{index}.tool_calls"), calls)?
    {
        map.insert("tool_calls".into(), calls);
    }
    Ok(map.into())
}

/// Earlier calls of tools, their arguments as the objects that templates print; none where the
/// list is empty.
fn parse_calls(field: &str, calls: Value) -> Result<Option<Value>, RequestError> {
    let mut calls = match calls {
        Value::Null => return Ok(None),
        Value::Array(calls) if calls.is_empty() => return Ok(None),
        Value::Array(calls) => calls,
        _ => return Err(RequestError::field(field, "must be a list of calls")),
    };
    for (i, call) in calls.iter_mut().enumerate() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            let what = "must have `name` and `arguments`";
            return Err(RequestError::field(&format!("{field}.{i}.function"), what));
        };
        if let Value::String(text) = arguments {
            let text = if text.trim().is_empty() { "{}" } else { text.as_str() };
            *arguments = serde_json::from_str(text).map_err(|e| {
                let what = format!("must be JSON: {}", echo(&e.to_string()));
                RequestError::field(&format!("{field}.{i}.function.arguments"), what)
            })?;
        }
    }
    Ok(Some(calls.into()))
}

/// How many prompts a completion has.
///
/// # Errors
/// 400 for none or too many.
pub fn count_prompts(prompt: &Prompt) -> Result<usize, RequestError> {
    let count = match prompt {
        Prompt::Texts(texts) => texts.len(),
        Prompt::Ids(lists) => lists.len(),
    };
    if (1..=PROMPTS_MAX).contains(&count) {
        return Ok(count);
    }
    let what = format!("must hold 1 to {PROMPTS_MAX} prompts, got {count}");
    Err(RequestError::field("prompt", what))
}

/// The prompts of a completion; `special` adds the tokenizer's beginning token to texts.
///
/// # Errors
/// 400 for none, too many, an empty one, or one that does not fit.
pub fn completion_prompts(
    model: &Text,
    prompt: &Prompt,
    special: bool,
    room: Room,
) -> Result<Vec<Vec<u32>>, RequestError> {
    count_prompts(prompt)?;
    let encode = |text: &String| encode(model, "prompt", text, special, room);
    let prompts: Vec<Vec<u32>> = match prompt {
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Ids(lists) => {
            lists.iter().map(|list| ids("prompt", list)).collect::<Result<_, _>>()?
        }
    };
    if prompts.iter().any(Vec::is_empty) {
        return Err(RequestError::field("prompt", "must have at least one token"));
    }
    Ok(prompts)
}

/// The ids of a text.
///
/// # Errors
/// 400 that names `field`.
pub fn encode(
    model: &Text,
    field: &str,
    text: &str,
    special: bool,
    room: Room,
) -> Result<Vec<u32>, RequestError> {
    room.check(model, field, text)?;
    let ids = model.tokenizer.encode(text, special);
    ids.map_err(|e| {
        RequestError::field(field, format!("cannot be tokenised: {}", echo(&e.to_string())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_continued_text_ends_where_its_message_does() {
        for (rendered, content, want) in [
            ("<a>so TAG</a>", "so ", "<a>so "),
            ("<a>so TAG </a>", "so ", "<a>so "),
            ("<a>CONTINUE_FINAL_MESSAGE_TAG x TAG </a>", "x ", "<a>CONTINUE_FINAL_MESSAGE_TAG x "),
        ] {
            // A template that trims takes the mark's blank, and with it the text's own.
            let trims = !rendered.contains("TAG </a>");
            let mut text = rendered.replace(" TAG", " CONTINUE_FINAL_MESSAGE_TAG");
            cut_at_mark(&mut text, content).unwrap();
            let want = if trims { want.trim_end() } else { want };
            assert_eq!(text, want, "{rendered}");
        }
        let e = cut_at_mark(&mut "<a></a>".to_owned(), "gone").unwrap_err();
        assert_eq!(e.param.as_deref(), Some("continue_final_message"));
    }
}
