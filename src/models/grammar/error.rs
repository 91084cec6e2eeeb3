//! Defines why a constraint cannot be used.

/// Characters of a compiler's message that are repeated.
const MESSAGE_CHARACTERS_MAX: usize = 300;

/// Why a constraint cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the grammar cannot be used: {0}")]
pub struct GrammarError(pub String);

impl GrammarError {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }

    /// There is more of something than may be.
    pub(super) fn limit(what: &str, limit: usize, fact: usize) -> Self {
        Self(format!("it must have at most {limit} {what}, got {fact}"))
    }

    /// The compiler's words: their first line, without its names for how an output ends.
    pub(super) fn from_compiler(message: &str) -> Self {
        let line = message.lines().next().unwrap_or_default();
        if line.starts_with("panic: ") {
            return Self("it breaks the grammar compiler".into());
        }
        match line.strip_prefix("NoExtension") {
            Some(_) => Self("no text can satisfy it".into()),
            None => Self(line.chars().take(MESSAGE_CHARACTERS_MAX).collect()),
        }
    }
}
