//! Restricts which tokens may come next, by a JSON schema, a regular expression or a Lark grammar.
//! The grammars are llguidance's; this module applies them to our vocabulary.
//!
//! Their compiler has no limit on its stack and no way to be stopped. So what a constraint costs
//! is known before it is compiled ([`check`], [`schema`], [`lark`]), and it is compiled on a stack
//! that holds all that these limits let through ([`on_large_stack`]).

mod blanks;
pub mod check;
pub mod decimal;
mod error;
pub mod lark;
pub mod schema;

use super::tokenizer::TextTokenizer;
use blanks::bounded_blanks;
pub use error::GrammarError;
use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, regex_to_lark};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Stack on which constraints are compiled. The deepest that the limits let through take a quarter
/// of it; memory is used only as far as the stack is touched.
pub const STACK_BYTES: usize = 256 << 20;

/// Symbols of a compiled grammar.
const SYMBOLS_MAX: usize = 60_000;

/// Items of the parser for the tokens of one step: 20 of them take a microsecond.
const STEP_ITEMS_MAX: usize = 30_000;

/// Work of the lexer for the tokens of one step: 14 units take a microsecond.
const STEP_FUEL_MAX: u64 = 100_000;

/// States of one output's lexer, 1 to 2 kB each.
const LEXER_STATES_MAX: usize = 50_000;

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

    /// What the compiler takes, checked. In a regular expression `\\d`, `\\w` and `\\s` are the
    /// ASCII classes.
    fn grammar(&self) -> Result<TopLevelGrammar, GrammarError> {
        Ok(match self {
            Self::JsonSchema(text) => {
                let schema = check::parse(text)?;
                schema::check(&schema, &mut 0)?;
                TopLevelGrammar::from_json_schema(bounded_blanks(schema))
            }
            Self::Regex(text) => {
                check::regex(text)?;
                TopLevelGrammar::from_lark(format!("start: /{}/", regex_to_lark(text, "dws")))
            }
            Self::Lark(text) => TopLevelGrammar::from_lark(lark::check(text)?),
        })
    }
}

/// Runs `work` on a thread of its own with [`STACK_BYTES`] of stack.
///
/// # Errors
/// When the system has no thread to give.
pub fn on_large_stack<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    std::thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES).spawn(work)
}

/// Escapes what means something in a regular expression.
fn regex_escape(text: &str) -> String {
    let special = |c: char| r"\.+*?()|[]{}^$#&-~/".contains(c);
    let escape = |c: char| if special(c) { vec!['\\', c] } else { vec![c] };
    text.chars().flat_map(escape).collect()
}

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
        *factory.limits_mut() = ParserLimits {
            verbose_errors: false,
            max_grammar_size: SYMBOLS_MAX,
            max_lexer_states: LEXER_STATES_MAX,
            step_lexer_fuel: STEP_FUEL_MAX,
            step_max_items: STEP_ITEMS_MAX,
            ..ParserLimits::default()
        };
        Ok(Self(factory))
    }

    /// Compiles a constraint: milliseconds, up to two seconds for the largest that are let through.
    /// To be called on a large stack ([`on_large_stack`]).
    ///
    /// # Errors
    /// When it is malformed, too large, uses what is not supported, or allows no text.
    pub fn compile(&self, constraint: Constraint) -> Result<Grammar, GrammarError> {
        let parser = self.0.create_parser(constraint.grammar()?);
        let matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::from_compiler(&error));
        }
        let mut grammar = Grammar { constraint, matcher };
        // Where no first token can be found, no answer need be begun.
        grammar.allowed()?;
        Ok(grammar)
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
        let mask = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|e| GrammarError::from_compiler(&e.to_string()))?;
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
        self.matcher
            .consume_token(token)
            .map_err(|e| GrammarError::from_compiler(&e.to_string()))?;
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
