//! Why a request is not understood: the field at fault, and rule and fact in a sentence.

use crate::engine::request::InvalidRequest;
use crate::models::chat::TemplateError;

/// Characters of a client's own words that an error repeats.
const ECHO_MAX: usize = 200;

/// A request that cannot be understood; always its sender's fault.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// A sentence: rule, then fact.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
}

impl RequestError {
    /// The request as a whole is wrong.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), param: None }
    }

    /// A field is wrong.
    pub fn field(field: &str, what: impl Into<String>) -> Self {
        Self { message: format!("`{field}` {}", what.into()), param: Some(field.into()) }
    }
}

/// A client's words, shortened for an error message.
pub fn echo(text: &str) -> String {
    match text.char_indices().nth(ECHO_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

impl From<InvalidRequest> for RequestError {
    fn from(e: InvalidRequest) -> Self {
        Self::field(e.field, e.what)
    }
}

impl From<TemplateError> for RequestError {
    fn from(e: TemplateError) -> Self {
        Self { message: echo(&e.to_string()), param: Some("messages".into()) }
    }
}
