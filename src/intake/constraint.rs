//! What an output must look like: `response_format`, `structured_outputs` and demanded calls of
//! tools, as one grammar.

use super::error::{RequestError, echo};
use super::tools::{CallStyle, ToolParser};
use crate::models::Model;
use crate::models::chat::ToolFormat;
use crate::models::grammar::{Constraint, Grammar};
use crate::wire::openai::request::{ChatRequest, Common, ResponseFormat, StructuredOutputs};
use crate::wire::openai::tools::{TOOLS_MAX, Tool, ToolChoice};
use serde_json::{Map, Value, json};

/// Bytes of a function's name.
const NAME_BYTES_MAX: usize = 64;

/// The tools of a chat request.
#[derive(Clone, Debug, Default)]
pub struct Tooling {
    /// Which form the answer takes; `None` where no call is looked for.
    pub style: Option<CallStyle>,
    /// Calls that are kept.
    pub calls_max: usize,
    /// What the answer must look like for its calls.
    constraint: Option<Constraint>,
}

impl Tooling {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`. `format` is how the model writes
    /// calls: where its template knows no tools, only demanded calls can be had.
    ///
    /// # Errors
    /// 400 for malformed tools or a choice among tools that are not there.
    pub fn new(request: &ChatRequest, format: Option<ToolFormat>) -> Result<Self, RequestError> {
        let tools = request.tools.as_deref().unwrap_or_default();
        check_tools(tools)?;
        let parallel = request.parallel_tool_calls.unwrap_or(true);
        let calls_max = if parallel { TOOLS_MAX } else { 1 };
        let (style, constraint) = match &request.tool_choice {
            Some(ToolChoice::Required | ToolChoice::Named(_)) if tools.is_empty() => {
                return Err(RequestError::field("tool_choice", "needs `tools`"));
            }
            Some(ToolChoice::Required) => {
                let constraint = Constraint::JsonSchema(any_call(tools, calls_max).to_string());
                (Some(CallStyle::Required), Some(constraint))
            }
            Some(ToolChoice::Named(name)) => {
                let named = tools.iter().find(|t| t.function.name == *name);
                let tool = named.ok_or_else(|| {
                    let what = format!("names `{}`, which is not among `tools`", echo(name));
                    RequestError::field("tool_choice", what)
                })?;
                let constraint = Constraint::JsonSchema(parameters(tool).to_string());
                (Some(CallStyle::Named(name.clone())), Some(constraint))
            }
            Some(ToolChoice::None) => (None, None),
            Some(ToolChoice::Auto) | None if tools.is_empty() => (None, None),
            Some(ToolChoice::Auto) | None => (format.map(CallStyle::Auto), None),
        };
        Ok(Self { style, calls_max, constraint })
    }

    /// What finds the calls of one choice.
    pub fn parser(&self) -> Option<ToolParser> {
        self.style.clone().map(|style| ToolParser::new(style, self.calls_max))
    }
}

fn check_tools(tools: &[Tool]) -> Result<(), RequestError> {
    if tools.len() > TOOLS_MAX {
        let what = format!("must hold at most {TOOLS_MAX}, got {}", tools.len());
        return Err(RequestError::field("tools", what));
    }
    for (i, tool) in tools.iter().enumerate() {
        if tool.kind != "function" {
            let what = format!("must be function, got {}", echo(&tool.kind));
            return Err(RequestError::field(&format!("tools.{i}.type"), what));
        }
        let name = &tool.function.name;
        let is_fine = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(is_fine) {
            let what = format!(
                "must have 1 to {NAME_BYTES_MAX} letters, digits, `_`, `-` or `.`, got {}",
                echo(name)
            );
            return Err(RequestError::field(&format!("tools.{i}.function.name"), what));
        }
    }
    Ok(())
}

fn parameters(tool: &Tool) -> Value {
    match &tool.function.parameters {
        Some(schema) if !schema.is_empty() => schema.clone().into(),
        _ => json!({"type": "object", "properties": {}, "additionalProperties": false}),
    }
}

/// The schema of a list of calls. Definitions of the tools' own schemas move up to the root, where
/// references look for them.
fn any_call(tools: &[Tool], calls_max: usize) -> Value {
    let mut definitions = Map::new();
    let call = |tool: &Tool| {
        let mut schema = parameters(tool);
        for key in ["$defs", "definitions"] {
            if let Some(Value::Object(own)) = schema.as_object_mut().and_then(|s| s.remove(key)) {
                let entry = definitions.entry(key).or_insert_with(|| json!({}));
                entry.as_object_mut().into_iter().for_each(|all| all.extend(own.clone()));
            }
        }
        json!({
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "parameters": schema},
            "required": ["name", "parameters"],
            "additionalProperties": false,
        })
    };
    let calls: Vec<Value> = tools.iter().map(call).collect();
    let mut schema = json!({
        "type": "array", "minItems": 1, "maxItems": calls_max, "items": {"anyOf": calls},
    });
    schema.as_object_mut().into_iter().for_each(|s| s.extend(definitions.clone()));
    schema
}

/// The grammar of a request's output, compiled off the async threads.
///
/// # Errors
/// 400 for more than one of the fields, or a grammar that cannot be used.
pub async fn grammar(
    model: std::sync::Arc<Model>,
    common: &Common,
    tooling: &Tooling,
) -> Result<Option<Grammar>, RequestError> {
    let asked = [
        ("response_format", response_format(common)?),
        ("structured_outputs", structured_outputs(common)?),
        ("tool_choice", tooling.constraint.clone()),
    ];
    let mut asked = asked.into_iter().filter_map(|(field, c)| c.map(|c| (field, c)));
    let Some((field, constraint)) = asked.next() else { return Ok(None) };
    if let Some((other, _)) = asked.next() {
        return Err(RequestError::field(other, format!("cannot be combined with `{field}`")));
    }
    let compiled = tokio::task::spawn_blocking(move || model.grammar(constraint)).await;
    match compiled {
        Ok(Ok(grammar)) => Ok(Some(grammar)),
        Ok(Err(e)) => Err(RequestError::field(field, format!("cannot be used: {}", e.0))),
        Err(_) => Err(RequestError::field(field, "cannot be used: it breaks the grammar compiler")),
    }
}

fn response_format(common: &Common) -> Result<Option<Constraint>, RequestError> {
    Ok(match &common.response_format {
        None | Some(ResponseFormat::Text) => None,
        Some(ResponseFormat::JsonObject) => Some(Constraint::json_object()),
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            Some(Constraint::JsonSchema(Value::from(json_schema.schema.clone()).to_string()))
        }
    })
}

fn structured_outputs(common: &Common) -> Result<Option<Constraint>, RequestError> {
    let Some(outputs) = &common.structured_outputs else { return Ok(None) };
    let StructuredOutputs { json, json_object, regex, choice, grammar } = outputs.clone();
    let given = [
        json.map(|schema| match schema {
            Value::String(text) => Constraint::JsonSchema(text),
            schema => Constraint::JsonSchema(schema.to_string()),
        }),
        json_object.filter(|on| *on).map(|_| Constraint::json_object()),
        regex.map(Constraint::Regex),
        choice.map(|texts| Constraint::choice(&texts)),
        grammar.map(Constraint::Lark),
    ];
    let mut given = given.into_iter().flatten();
    match (given.next(), given.next()) {
        (Some(constraint), None) => Ok(Some(constraint)),
        _ => Err(RequestError::field("structured_outputs", "must have exactly one of its keys")),
    }
}
