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

    /// The compiler's words: their first line, without its names for how an output ends. Where that
    /// only announces a regular expression with a mark below it, what is wrong with it follows.
    pub(super) fn from_compiler(message: &str) -> Self {
        let mut lines = message.lines();
        let line = lines.next().unwrap_or_default();
        if line.starts_with("panic: ") {
            return Self("it breaks the grammar compiler".into());
        }
        if line.starts_with("NoExtension") {
            return Self("no text can satisfy it".into());
        }
        let fault = lines.find_map(|line| line.trim_start().strip_prefix("error: "));
        let fault = fault.filter(|_| line.ends_with(':'));
        let fault = fault.map_or_else(String::new, |fault| format!(" {fault}"));
        Self(line.chars().chain(fault.chars()).take(MESSAGE_CHARACTERS_MAX).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compilers_words_are_one_line_that_says_what_is_wrong() {
        let of = |message: &str| GrammarError::from_compiler(message).0;
        assert_eq!(of("too large\nbacktrace"), "too large");
        assert_eq!(of("NoExtension(\"x\")"), "no text can satisfy it");
        assert_eq!(of("panic: x"), "it breaks the grammar compiler");
        let regex = "regex parse error:\n    (a\n    ^\nerror: unclosed group";
        assert_eq!(of(regex), "regex parse error: unclosed group");
        assert_eq!(of("regex parse error:\n    (a"), "regex parse error:");
        let long = format!("x:\nerror: {}", "y".repeat(1000));
        assert_eq!(of(&long).len(), MESSAGE_CHARACTERS_MAX);
    }
}
