//! Messages and texts to prompt ids.

use super::error::{RequestError, echo};
use super::translate::ids;
use crate::models::Model;
use crate::wire::openai::request::Message;
use crate::wire::openai::{ChatRequest, Content, Prompt};
use serde_json::{Map, Value};

/// Prompts of one completion request.
const PROMPTS_MAX: usize = 128;

/// The prompt of a chat: its messages through the model's template.
///
/// # Errors
/// 400 for messages that the template cannot render.
pub fn chat_prompt(model: &Model, request: &ChatRequest) -> Result<Vec<u32>, RequestError> {
    let template =
        model.chat.as_ref().ok_or_else(|| RequestError::new("this model has no chat template"))?;
    if request.messages.is_empty() {
        return Err(RequestError::field("messages", "must hold at least one message"));
    }
    let messages = request.messages.iter().enumerate().map(|(i, m)| flatten(i, m));
    let messages: Vec<Value> = messages.collect::<Result<_, _>>()?;
    let tools = request.tools.as_ref().filter(|tools| !tools.is_empty());
    let tools = tools.map_or(Ok(Value::Null), serde_json::to_value);
    let tools = tools.map_err(|e| RequestError::field("tools", e.to_string()))?;
    let mut variables = Map::new();
    variables.insert("messages".into(), messages.into());
    variables.insert("tools".into(), tools);
    variables.insert("documents".into(), Value::Null);
    let opening = request.add_generation_prompt.unwrap_or(true);
    variables.insert("add_generation_prompt".into(), opening.into());
    if let Some(effort) = &request.reasoning_effort {
        variables.insert("reasoning_effort".into(), effort.clone().into());
    }
    variables.extend(request.chat_template_kwargs.clone().unwrap_or_default());
    let text = template.render(variables)?;
    encode(model, "messages", &text, false)
}

/// A message as templates know it: text parts joined, arguments of calls as objects.
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
            texts.collect::<Result<Vec<_>, _>>()?.concat()
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

/// The prompts of a completion.
///
/// # Errors
/// 400 for none, too many, or an empty one.
pub fn completion_prompts(model: &Model, prompt: &Prompt) -> Result<Vec<Vec<u32>>, RequestError> {
    let prompts: Vec<Vec<u32>> = match prompt {
        Prompt::Texts(texts) => {
            texts.iter().map(|t| encode(model, "prompt", t, true)).collect::<Result<_, _>>()?
        }
        Prompt::Ids(lists) => {
            lists.iter().map(|list| ids("prompt", list)).collect::<Result<_, _>>()?
        }
    };
    if !(1..=PROMPTS_MAX).contains(&prompts.len()) {
        let what = format!("must hold 1 to {PROMPTS_MAX} prompts, got {}", prompts.len());
        return Err(RequestError::field("prompt", what));
    }
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
    model: &Model,
    field: &str,
    text: &str,
    special: bool,
) -> Result<Vec<u32>, RequestError> {
    let ids = model.tokenizer.encode(text, special);
    ids.map_err(|e| {
        RequestError::field(field, format!("cannot be tokenised: {}", echo(&e.to_string())))
    })
}
