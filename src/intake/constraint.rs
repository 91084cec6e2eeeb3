//! Derives one grammar for an output from `response_format`, `structured_outputs` and demanded
//! calls of tools.

use super::error::{RequestError, echo};
use super::tools::{CallStyle, ToolParser};
use crate::entropy::Entropy;
use crate::models::chat::ToolFormat;
use crate::models::grammar::{Constraint, Grammar, on_large_stack};
use crate::models::text::Text;
use crate::wire::openai::request::{ChatRequest, Common, ResponseFormat, StructuredOutputs};
use crate::wire::openai::tools::{TOOLS_MAX, Tool, ToolChoice};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};

/// Bytes of a function's name.
const NAME_BYTES_MAX: usize = 64;

/// Constraints that are compiled at once, over all models.
const COMPILES_MAX: usize = 2;

/// Constraints that are compiled or wait for it; one more is refused.
const COMPILES_WAITING_MAX: usize = 64;

/// How long a request waits until its constraint is compiled.
const COMPILE_WAIT_MAX: Duration = Duration::from_secs(10);

static COMPILES: Semaphore = Semaphore::const_new(COMPILES_MAX);
static COMPILES_WAITING: Semaphore = Semaphore::const_new(COMPILES_WAITING_MAX);

/// Without a place for tools in its template, a model would never learn of them.
const NO_TOOLS: &str = "cannot be offered to this model, whose chat template has no place for \
    them: `tool_choice` must be none, required or a named function";

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
            Some(ToolChoice::Auto) | None => match format {
                Some(format) => (Some(CallStyle::Auto(format)), None),
                None => return Err(RequestError::field("tools", NO_TOOLS)),
            },
        };
        Ok(Self { style, calls_max, constraint })
    }

    /// What finds the calls of one choice.
    pub fn parser(&self, entropy: &Entropy) -> Option<ToolParser> {
        self.style.clone().map(|style| ToolParser::new(style, self.calls_max, entropy.clone()))
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
        Some(schema) if !schema.is_empty() => object_schema(schema.clone()).into(),
        _ => json!({"type": "object", "properties": {}, "additionalProperties": false}),
    }
}

/// A schema for an object, which it need not say. What it refers to says it for itself.
fn object_schema(mut schema: Map<String, Value>) -> Map<String, Value> {
    if !schema.contains_key("$ref") {
        schema.entry("type").or_insert_with(|| "object".into());
    }
    schema
}

/// The schema of a list of calls. Each tool's schema becomes a definition, in which its references
/// stay within it.
fn any_call(tools: &[Tool], calls_max: usize) -> Value {
    let mut definitions = Map::new();
    let call = |(i, tool): (usize, &Tool)| {
        let (key, place) = (i.to_string(), format!("#/$defs/{i}"));
        let mut schema = parameters(tool);
        let address = schema["$id"].as_str().unwrap_or_default().trim_end_matches('#').to_owned();
        for key in ["$id", "id", "$schema"] {
            if schema[key].is_string() {
                schema.as_object_mut().and_then(|s| s.shift_remove(key));
            }
        }
        move_references(&mut schema, &address, &place);
        definitions.insert(key, schema);
        json!({
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "parameters": {"$ref": place}},
            "required": ["name", "parameters"],
            "additionalProperties": false,
        })
    };
    let calls: Vec<Value> = tools.iter().enumerate().map(call).collect();
    json!({
        "type": "array", "minItems": 1, "maxItems": calls_max, "items": {"anyOf": calls},
        "$defs": definitions,
    })
}

/// Makes the references of a schema, which stood at `address`, right for its new place.
fn move_references(schema: &mut Value, address: &str, place: &str) {
    let all = |values: &mut Value| match values {
        Value::Object(map) => map.values_mut().for_each(|s| move_references(s, address, place)),
        other => move_references(other, address, place),
    };
    match schema {
        Value::Array(list) => list.iter_mut().for_each(|s| move_references(s, address, place)),
        Value::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value) {
                    ("$ref", Value::String(reference)) => {
                        let own = reference.strip_prefix(address).unwrap_or(reference);
                        if let Some(within) = own.strip_prefix('#') {
                            *reference = format!("{place}{within}");
                        }
                    }
                    // Values, which may look like schemas.
                    ("const" | "enum" | "default" | "examples", _) => {}
                    // Schemas by name, which may look like keywords.
                    (
                        "properties" | "patternProperties" | "$defs" | "definitions"
                        | "dependentSchemas",
                        schemas,
                    ) => all(schemas),
                    (_, schema) => move_references(schema, address, place),
                }
            }
        }
        _ => {}
    }
}

/// The grammar of a request's output, compiled off the async threads.
///
/// # Errors
/// 400 for more than one of the fields, or a grammar that cannot be used.
pub async fn grammar(
    model: Arc<Text>,
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
    compile(model, field, constraint).await.map(Some)
}

/// Compiles on a thread of its own, which keeps its place until it ends, whoever waits.
async fn compile(
    model: Arc<Text>,
    field: &str,
    constraint: Constraint,
) -> Result<Grammar, RequestError> {
    let cannot = |why: &str| RequestError::field(field, format!("cannot be used: {why}"));
    let Ok(_waiting) = COMPILES_WAITING.try_acquire() else {
        let why = format!("{COMPILES_WAITING_MAX} grammars wait to be compiled already, the limit");
        return Err(cannot(&why).later());
    };
    let compiled = tokio::time::timeout(COMPILE_WAIT_MAX, async {
        let place = COMPILES.acquire().await.map_err(|e| cannot(&e.to_string()).later())?;
        let (sender, receiver) = oneshot::channel();
        let work = move || {
            let _place = place;
            let _ = sender.send(model.grammar(constraint));
        };
        on_large_stack(work).map_err(|e| cannot(&e.to_string()).later())?;
        receiver.await.map_err(|_| cannot("it breaks the grammar compiler"))
    });
    match compiled.await {
        Ok(Ok(compiled)) => compiled.map_err(|e| cannot(&e.0)),
        Ok(Err(e)) => Err(e),
        Err(_) => {
            let seconds = COMPILE_WAIT_MAX.as_secs();
            Err(cannot(&format!("it was not compiled within {seconds} seconds")).later())
        }
    }
}

fn response_format(common: &Common) -> Result<Option<Constraint>, RequestError> {
    Ok(match &common.response_format {
        None | Some(ResponseFormat::Text) => None,
        Some(ResponseFormat::JsonObject { schema: None }) => Some(Constraint::json_object()),
        Some(ResponseFormat::JsonObject { schema: Some(schema) }) => {
            Some(Constraint::JsonSchema(Value::from(object_schema(schema.clone())).to_string()))
        }
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            Some(Constraint::JsonSchema(Value::from(json_schema.schema.clone()).to_string()))
        }
    })
}

fn structured_outputs(common: &Common) -> Result<Option<Constraint>, RequestError> {
    let Some(outputs) = &common.structured_outputs else { return Ok(None) };
    let StructuredOutputs { json, json_object, regex, choice, grammar } = outputs.clone();
    if choice.as_ref().is_some_and(Vec::is_empty) {
        return Err(RequestError::field(
            "structured_outputs.choice",
            "must hold at least one text",
        ));
    }
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
