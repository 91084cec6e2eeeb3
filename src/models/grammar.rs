//! Structured output: which tokens may come next, from a JSON schema, a regular expression or a
//! Lark grammar. The grammars are llguidance's; here they meet our vocabulary.

use super::tokenizer::TextTokenizer;
use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use std::fmt;
use std::sync::Arc;

/// Bytes of a constraint's text.
pub const CONSTRAINT_BYTES_MAX: usize = 256 << 10;

/// What an output must look like.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Constraint {
    /// A JSON value that the schema (itself JSON) accepts.
    JsonSchema(String),
    /// Text that a regular expression matches from end to end.
    Regex(String),
    /// Text of a Lark grammar.
    Lark(String),
}

impl Constraint {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema(r#"{"type":"object"}"#.into())
    }

    /// One of several texts.
    pub fn choice(texts: &[String]) -> Self {
        let escaped: Vec<String> = texts.iter().map(|t| regex_escape(t)).collect();
        Self::Regex(escaped.join("|"))
    }

    /// The tag and the text by which proofs are bound to it.
    pub fn tagged(&self) -> (u8, &str) {
        match self {
            Self::JsonSchema(text) => (1, text),
            Self::Regex(text) => (2, text),
            Self::Lark(text) => (3, text),
        }
    }

    fn grammar(&self) -> Result<TopLevelGrammar, GrammarError> {
        Ok(match self {
            Self::JsonSchema(text) => {
                let schema = serde_json::from_str(text).map_err(|e| GrammarError(e.to_string()))?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        })
    }
}

/// Escapes what means something in a regular expression.
fn regex_escape(text: &str) -> String {
    let special = |c: char| r"\.+*?()|[]{}^$#&-~/".contains(c);
    let escape = |c: char| if special(c) { vec!['\\', c] } else { vec![c] };
    text.chars().flat_map(escape).collect()
}

/// Why a constraint cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the grammar cannot be used: {0}")]
pub struct GrammarError(pub String);

/// Compiles constraints for one vocabulary.
pub struct Grammars(ParserFactory);

impl Grammars {
    /// For `tokenizer`, whose outputs end with one of `stop_ids`; ids up to `vocab` have logits.
    ///
    /// # Errors
    /// When the model has no end token.
    pub fn new(
        tokenizer: &TextTokenizer,
        stop_ids: &[u32],
        vocab: usize,
    ) -> Result<Self, GrammarError> {
        let Some(end) = stop_ids.first() else {
            return Err(GrammarError("this model has no end token".into()));
        };
        let words: Vec<Vec<u8>> = (0..vocab as u32).map(|id| word(tokenizer, id)).collect();
        let info = TokRxInfo::new(vocab as u32, *end);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(stop_ids);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new_simple(&environment).map_err(|e| GrammarError(e.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
        Ok(Self(factory))
    }

    /// Compiles a constraint: milliseconds, more for large schemas.
    ///
    /// # Errors
    /// When it is malformed, too large, or uses what is not supported.
    pub fn compile(&self, constraint: Constraint) -> Result<Grammar, GrammarError> {
        let (_, text) = constraint.tagged();
        if text.len() > CONSTRAINT_BYTES_MAX {
            let what = format!("has {} bytes, at most {CONSTRAINT_BYTES_MAX}", text.len());
            return Err(GrammarError(what));
        }
        let parser = self.0.create_parser(constraint.grammar()?);
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => Err(GrammarError(error)),
            None => Ok(Grammar { constraint, matcher }),
        }
    }
}

/// The bytes of a token; special ones are marked, so that no text can spell them.
fn word(tokenizer: &TextTokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.bytes_of(id);
    match tokenizer.is_special(id) {
        true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
        false => bytes.to_vec(),
    }
}

/// A compiled constraint, and how far an output has come in it.
pub struct Grammar {
    constraint: Constraint,
    matcher: Matcher,
}

impl Grammar {
    /// What was compiled.
    pub fn constraint(&self) -> &Constraint {
        &self.constraint
    }

    /// The tokens that may come next: the end tokens among them where the output may end, and
    /// they alone where it must.
    ///
    /// # Errors
    /// When the grammar is too complex here.
    pub fn allowed(&mut self) -> Result<SimpleVob, GrammarError> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| GrammarError(e.to_string()))?;
        match mask.is_zero() {
            true => Err(GrammarError("no token of this model can follow".into())),
            false => Ok(mask),
        }
    }

    /// Moves on by a token that was allowed; true when it ended the output.
    ///
    /// # Errors
    /// When it was not allowed.
    pub fn push(&mut self, token: u32) -> Result<bool, GrammarError> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(true);
        }
        self.matcher.consume_token(token).map_err(|e| GrammarError(e.to_string()))?;
        Ok(self.matcher.stop_reason() == StopReason::EndOfSentence)
    }
}

impl Clone for Grammar {
    fn clone(&self) -> Self {
        Self { constraint: self.constraint.clone(), matcher: self.matcher.deep_clone() }
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        self.constraint == other.constraint
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.constraint.fmt(f)
    }
}
