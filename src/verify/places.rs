//! Draws which rows are looked at: by chance, so that a peer cannot know them beforehand, and as
//! many as the pass over prompt and answer makes cheap.

use super::Depth;
use crate::models::parameter_counts::ParameterCounts;
use crate::models::spec::Spec;
use crate::ops::philox::philox;
use crate::proof::CHUNK_ROWS;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// Rows whose logits a fast check computes at least, besides the last.
pub const FAST_ROWS: usize = 32;
/// How much of the pass over prompt and answer the logits of a fast check may cost besides. With
/// what proofs cost a check stays below 1.15 times the bare pass.
const FAST_SHARE: f64 = 0.125;

/// Rows of a prompt whose logits a slow check computes at most, where it was reported on; a fast
/// one computes [`FAST_ROWS`].
const PROMPT_ROWS_MAX: usize = 256;

/// How many rows of an answer a fast check computes the logits of, besides the last.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum FastRows {
    /// So many.
    Count(usize),
    /// As many as this share of the pass over prompt and answer costs, at least [`FAST_ROWS`]:
    /// a row costs the multiply-adds of the head, a position those of all layers. Attention is left
    /// out, so long prompts cost more than is counted and the share is an upper one.
    Share(f64),
}

impl Default for FastRows {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Neither a number of rows nor a share.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("must be a number of rows from 1 on, or a share above 0 % and at most 100 %, got {0}")]
pub struct FastRowsError(String);

impl FromStr for FastRows {
    type Err = FastRowsError;

    fn from_str(text: &str) -> Result<Self, FastRowsError> {
        let wrong = || FastRowsError(text.to_owned());
        let Some(percent) = text.strip_suffix('%') else {
            let rows = text.parse().map_err(|_| wrong())?;
            return if rows > 0 { Ok(Self::Count(rows)) } else { Err(wrong()) };
        };
        let percent: f64 = percent.trim_end().parse().map_err(|_| wrong())?;
        match percent > 0.0 && percent <= 100.0 {
            true => Ok(Self::Share(percent / 100.0)),
            false => Err(wrong()),
        }
    }
}

impl fmt::Display for FastRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(rows) => write!(f, "{rows}"),
            Self::Share(share) => write!(f, "{}%", share * 100.0),
        }
    }
}

impl FastRows {
    /// By cost.
    pub const DEFAULT: Self = Self::Share(FAST_SHARE);

    /// How many, of an answer that ends after so many tokens, its prompt included. It may have
    /// fewer.
    pub fn of(self, spec: &Spec, positions: usize) -> usize {
        match self {
            Self::Count(rows) => rows,
            Self::Share(share) => {
                let counts = ParameterCounts::of(spec);
                let paid = share * counts.active() * positions as f64 / counts.head;
                // A number that is too large for the type becomes its largest.
                FAST_ROWS.max(paid as usize)
            }
        }
    }
}

/// The last of `count` rows and `rows` others, or all.
pub(super) fn random_rows(count: usize, rows: usize, chance: u64) -> BTreeSet<usize> {
    let Some(last) = count.checked_sub(1) else { return BTreeSet::new() };
    if last <= rows {
        return (0..count).collect();
    }
    // The first places of a shuffled deck: none twice.
    let mut deck: Vec<usize> = (0..last).collect();
    for place in 0..rows {
        let word = philox(chance, [place as u32, 0, 0, 0])[0];
        let left = (last - place) as u64;
        deck.swap(place, place + ((u64::from(word) * left) >> 32) as usize);
    }
    deck.truncate(rows);
    deck.into_iter().chain([last]).collect()
}

/// The rows after which an early check of an answer of so many stops: those of a random number of
/// chunks.
pub(super) fn random_stop(count: usize, chance: u64) -> usize {
    let chunks = count.div_ceil(CHUNK_ROWS);
    let word = u64::from(philox(chance, [0, 4, 0, 0])[0]);
    let kept = 1 + ((word * chunks as u64) >> 32) as usize;
    count.min(kept * CHUNK_ROWS)
}

/// Rows of a prompt that are scored, chosen at random; its last row belongs to the output.
pub(super) fn prompt_rows(tokens: usize, depth: Depth, chance: u64) -> BTreeSet<usize> {
    let most = if depth == Depth::Slow { PROMPT_ROWS_MAX } else { FAST_ROWS };
    let count = tokens.saturating_sub(1);
    if count <= most {
        return (0..count).collect();
    }
    let draw = |i: u32| {
        let word = philox(chance, [i, 2, 0, 0])[0];
        ((u64::from(word) * count as u64) >> 32) as usize
    };
    (0..most as u32).map(draw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::config::samples::{LLAMA_8B, SMOLLM2_135M};

    #[test]
    fn a_fast_check_looks_at_as_many_rows_as_the_pass_pays_for() {
        // SmolLM2-135M: 106.2 million in its layers, 28.3 in its head.
        let small = SMOLLM2_135M.spec();
        // Llama 3.1 8B: 6.98 billion and 0.53.
        let large = LLAMA_8B.spec();
        let rows = FastRows::default();
        assert_eq!([1, 68, 296, 456].map(|n| rows.of(&small, n)), [32, 32, 138, 213]);
        assert_eq!([1, 68, 296].map(|n| rows.of(&large, n)), [32, 112, 491]);
        assert_eq!(FastRows::Share(1e300).of(&small, 296), usize::MAX);
        assert_eq!(FastRows::Count(7).of(&large, 100_000), 7, "what was asked for by number");
        // No model's head is so large that the share is exceeded where it buys more than the least.
        for (spec, positions) in [(&small, 456), (&large, 456), (&small, 100_000)] {
            let counts = ParameterCounts::of(spec);
            let cost = rows.of(spec, positions) as f64 * counts.head;
            assert!(cost <= FAST_SHARE * counts.active() * positions as f64);
        }
    }

    #[test]
    fn rows_are_asked_for_by_number_or_share() {
        for (text, want) in [
            ("32", FastRows::Count(32)),
            ("1", FastRows::Count(1)),
            ("15%", FastRows::Share(0.15)),
            ("100 %", FastRows::Share(1.0)),
            ("0.5%", FastRows::Share(0.005)),
        ] {
            assert_eq!(text.parse(), Ok(want), "{text}");
        }
        for wrong in ["", "0", "-1", "0%", "101%", "%", "NaN%", "inf%", "0.15", "all"] {
            let error = wrong.parse::<FastRows>().unwrap_err().to_string();
            assert!(error.ends_with(&format!("got {wrong}")), "{error}");
        }
        assert_eq!(FastRows::default().to_string(), "12.5%");
        assert_eq!(FastRows::Count(32).to_string(), "32");
    }

    #[test]
    fn rows_are_drawn_without_repetition_and_each_as_likely_as_any_other() {
        let mut seen = vec![0_u32; 96];
        for chance in 0..3000 {
            let rows = random_rows(96, 32, chance);
            assert!(rows.len() == 33 && rows.contains(&95), "{rows:?}");
            rows.into_iter().for_each(|row| seen[row] += 1);
        }
        // 32 of 95: 1010.5 expected, a spread of 26.
        assert!(seen[..95].iter().all(|n| (1010 - 130..1010 + 130).contains(n)), "{seen:?}");
        assert_ne!(random_rows(96, 32, 1), random_rows(96, 32, 2));
        assert_eq!(random_rows(96, 95, 7), (0..96).collect());
        assert_eq!(random_rows(33, 32, 7), (0..33).collect());
        assert_eq!(random_rows(34, 32, 7).len(), 33);
        assert_eq!(random_rows(1, 32, 7), BTreeSet::from([0]));
        assert_eq!(random_rows(0, 32, 7), BTreeSet::new());
        assert_eq!(random_rows(9, usize::MAX, 7).len(), 9);
    }
}
