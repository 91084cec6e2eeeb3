//! Handles `multipleOf`: decimal numbers, and the least that is a multiple of two.

use super::error::GrammarError;
use serde_json::Value;

/// Significand of `multipleOf`: it is as many states of an automaton.
pub const MULTIPLE_MAX: u64 = 10_000;

/// Decimals of `multipleOf`.
pub const DECIMALS_MAX: u32 = 6;

/// Significand and decimals of a `multipleOf`.
pub(super) fn decimal(value: &Value) -> Result<(u64, u32), GrammarError> {
    let refuse = |rule: String| GrammarError::new(format!("a `multipleOf` {rule}, got {value}"));
    let mut significand = value.as_f64().unwrap_or(0.0).abs();
    if significand == 0.0 {
        return Err(refuse("must not be 0".into()));
    }
    let mut decimals = 0;
    while significand.fract() != 0.0 {
        (significand, decimals) = (significand * 10.0, decimals + 1);
        if decimals > DECIMALS_MAX {
            return Err(refuse(format!("must have at most {DECIMALS_MAX} decimals")));
        }
    }
    if significand > MULTIPLE_MAX as f64 {
        return Err(refuse(format!("without its point must be at most {MULTIPLE_MAX}")));
    }
    Ok((significand as u64, decimals))
}

/// The least common multiple of two decimals.
pub(super) fn common_multiple(
    one: (u64, u32),
    other: (u64, u32),
) -> Result<(u64, u32), GrammarError> {
    let mut decimals = one.1.max(other.1);
    let whole = |n: (u64, u32)| n.0 * 10_u64.pow(decimals - n.1);
    let (a, b) = (whole(one), whole(other));
    let (mut gcd, mut rest) = (a, b);
    while rest != 0 {
        (gcd, rest) = (rest, gcd % rest);
    }
    let mut multiple = u128::from(a / gcd) * u128::from(b);
    while decimals > 0 && multiple.is_multiple_of(10) {
        (multiple, decimals) = (multiple / 10, decimals - 1);
    }
    match u64::try_from(multiple) {
        Ok(multiple) if multiple <= MULTIPLE_MAX => Ok((multiple, decimals)),
        _ => Err(GrammarError::new(format!(
            "the common multiple of its `multipleOf` must be at most {MULTIPLE_MAX} without its \
            point, got {multiple}"
        ))),
    }
}
