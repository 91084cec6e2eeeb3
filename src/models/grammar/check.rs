//! Bounds what a constraint may cost before it is compiled.
//!
//! The compiler recurses as deep as a constraint nests, and what it builds can grow with the
//! square or a power of the text. None of that can be stopped once it runs. So every constraint is
//! measured first, by rules that depend on its text alone: a server and a verifier refuse the same
//! ones.

use super::error::GrammarError;
use serde_json::Value;

/// Bytes of a JSON schema's text.
pub const SCHEMA_BYTES_MAX: usize = 256 << 10;

/// Levels of arrays and objects in a schema's text.
pub const NESTING_MAX: usize = 100;

/// Bytes of a regular expression's text.
pub const REGEX_BYTES_MAX: usize = 64 << 10;

/// Bytes of a Lark grammar's text.
pub const LARK_BYTES_MAX: usize = 64 << 10;

/// Groups, repetitions and classes of a regular expression (`(`, `?`, `*`, `{`, `[`, `\w`).
/// A group or a repetition may be left out of a match, so the work for one character grows with the
/// square of their number: 1,000 take 40 ms. A class of Unicode's may take 40 kB.
pub const REPEATS_MAX: usize = 1000;

/// Refuses a number above its limit.
pub(super) fn at_most(what: &str, fact: usize, limit: usize) -> Result<(), GrammarError> {
    match fact > limit {
        true => Err(GrammarError::limit(what, limit, fact)),
        false => Ok(()),
    }
}

/// Groups, repetitions and classes that a regular expression spells.
pub(super) fn repeats(regex: &str) -> usize {
    let mut is_escaped = false;
    let mut count = 0;
    for c in regex.chars() {
        let counts = match is_escaped {
            true => "dDpPsSwW".contains(c),
            false => "([{?*".contains(c),
        };
        count += usize::from(counts);
        is_escaped = c == '\\' && !is_escaped;
    }
    count
}

/// Checks a regular expression for the whole output.
pub(super) fn regex(text: &str) -> Result<(), GrammarError> {
    at_most("bytes of a regular expression", text.len(), REGEX_BYTES_MAX)?;
    at_most("groups, repetitions and classes of a regular expression", repeats(text), REPEATS_MAX)
}

/// Levels that JSON text nests, counted before anything recurses into it.
pub(super) fn nesting(json: &str) -> usize {
    let (mut depth, mut deepest, mut is_string, mut is_escaped) = (0_usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_string => is_escaped = true,
            b'"' => is_string = !is_string,
            _ if is_string => {}
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Reads a schema's text.
pub(super) fn parse(text: &str) -> Result<Value, GrammarError> {
    at_most("bytes of a schema", text.len(), SCHEMA_BYTES_MAX)?;
    at_most("levels of nesting in a schema", nesting(text), NESTING_MAX)?;
    serde_json::from_str(text).map_err(|e| GrammarError::new(format!("it is not JSON: {e}")))
}
