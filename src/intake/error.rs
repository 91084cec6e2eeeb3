//! Why a request is not understood: the field at fault, and rule and fact in a sentence.

use crate::engine::request::InvalidRequest;
use crate::models::chat::TemplateError;

/// Characters of a client's own words that an error repeats.
const ECHO_MAX: usize = 200;

/// A request that cannot be understood: its sender's fault, unless the server is busy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// A sentence: rule, then fact.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// The server has no room for what the field asks for now.
    pub is_busy: bool,
}

impl RequestError {
    /// The request as a whole is wrong.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), param: None, is_busy: false }
    }

    /// A field is wrong.
    pub fn field(field: &str, what: impl Into<String>) -> Self {
        let message = format!("`{field}` {}", what.into());
        Self { message, param: Some(field.into()), is_busy: false }
    }

    /// It may be asked again later.
    pub fn busy(self) -> Self {
        Self { is_busy: true, ..self }
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
        let param = Some("messages".into());
        Self { message: echo(&e.to_string()), param, is_busy: false }
    }
}
