//! Defines tools: what a client offers, which of them it wants called, and the calls a model makes.

use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// Tools of one request.
pub const TOOLS_MAX: usize = 128;

/// A tool that the model may call.
#[derive(Clone, Deserialize, Serialize, Debug, ToSchema)]
pub struct Tool {
    /// `function`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What the model may call.
    pub function: Function,
}

/// A function that the model may call.
#[derive(Clone, Deserialize, Serialize, Debug, ToSchema)]
pub struct Function {
    /// What calls of it name.
    pub name: String,
    /// What the function does, for the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// JSON schema of its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Map<String, Value>>,
    /// Everything else the template may read.
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: Map<String, Value>,
}

/// Whether and which tools are called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToolChoice {
    /// The model must not call a tool.
    None,
    /// As the model likes.
    Auto,
    /// The model must call at least one tool.
    Required,
    /// The model must call this function.
    Named(String),
}

/// The forms of a tool choice, for the description of the API.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes what `ToolChoice` reads")]
pub(super) enum ToolChoiceForm {
    Word(ToolChoiceWord),
    Named(NamedTool),
}

#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "describes what `ToolChoice` reads")]
pub(super) enum ToolChoiceWord {
    None,
    Auto,
    Required,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what `ToolChoice` reads")]
pub(super) struct NamedTool {
    #[schema(pattern = "^function$")]
    r#type: String,
    function: NamedFunction,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what `ToolChoice` reads")]
struct NamedFunction {
    name: String,
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match (value.as_str(), value["type"].as_str(), value["function"]["name"].as_str()) {
            (Some("none"), ..) => Ok(Self::None),
            (Some("auto"), ..) => Ok(Self::Auto),
            (Some("required"), ..) => Ok(Self::Required),
            (_, Some("function"), Some(name)) => Ok(Self::Named(name.to_owned())),
            _ => Err(D::Error::custom(
                "expected none, auto, required, or an object that names a function",
            )),
        }
    }
}

/// A call, or a part of one in a stream.
#[derive(Clone, Serialize, PartialEq, Eq, Debug, ToSchema)]
pub struct ToolCall {
    /// Its number; only in streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// Its name in later messages; with the first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`; with the first part.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// The function with its arguments.
    pub function: CalledFunction,
}

/// Which function a call names, and with what arguments.
#[derive(Clone, Serialize, PartialEq, Eq, Default, Debug, ToSchema)]
pub struct CalledFunction {
    /// Its name; with the first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// JSON text of the arguments; parts of a stream add up.
    pub arguments: String,
}
