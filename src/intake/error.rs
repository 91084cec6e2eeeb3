//! Defines why a request is not understood: the field at fault, and rule and fact in a sentence.

use crate::engine::request::InvalidRequest;
use crate::models::chat::TemplateError;

/// Characters of a client's own words that an error repeats.
const ECHO_MAX: usize = 200;

/// The code of a request that the context cannot hold: clients cut their prompt when they see it.
pub const CONTEXT_LENGTH: &str = "context_length_exceeded";

/// A request that cannot be understood.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// A sentence: rule, then fact.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// Whose fault it is.
    pub kind: FaultKind,
}

/// Whose fault it is that a request is not understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// The sender's fault.
    Wrong,
    /// Its sender's: the context cannot hold it.
    ContextLength,
    /// Nobody's: too much is being read at once.
    Busy,
    /// A fault of this program.
    Ours,
}

impl RequestError {
    /// The request as a whole is wrong.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), param: None, kind: FaultKind::Wrong }
    }

    /// A field is wrong.
    pub fn field(field: &str, what: impl Into<String>) -> Self {
        Self { param: Some(field.into()), ..Self::new(format!("`{field}` {}", what.into())) }
    }

    /// The context cannot hold it. The words are those by which clients know this case; some look
    /// for its code in the message alone.
    pub fn context(field: &str, context: usize, however: impl Into<String>) -> Self {
        let however = however.into();
        let message = format!(
            "This model's maximum context length is {context} tokens. However, {however} \
             ({CONTEXT_LENGTH})"
        );
        Self { param: Some(field.into()), kind: FaultKind::ContextLength, ..Self::new(message) }
    }

    /// It may be asked again later.
    pub fn later(self) -> Self {
        Self { kind: FaultKind::Busy, ..self }
    }

    /// A refusal that may pass: the server is busy.
    pub fn busy(message: impl Into<String>) -> Self {
        Self { kind: FaultKind::Busy, ..Self::new(message) }
    }

    /// A fault of this program.
    pub fn ours(message: impl Into<String>) -> Self {
        Self { kind: FaultKind::Ours, ..Self::new(message) }
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
        Self { param: Some("messages".into()), ..Self::new(echo(&e.to_string())) }
    }
}
