//! Draws which rows are looked at, so that a peer cannot know them beforehand.

use super::Depth;
use crate::proof::CHUNK_ROWS;
use crate::proof::philox::philox;
use std::collections::BTreeSet;

/// Rows whose logits a fast check computes, besides the last.
pub const FAST_ROWS: usize = 32;

/// Rows of a prompt whose logits a slow check computes at most, where it was reported on; a fast
/// one computes [`FAST_ROWS`].
const PROMPT_ROWS_MAX: usize = 256;

/// The last row and [`FAST_ROWS`] others.
pub(super) fn random_rows(count: usize, chance: u64) -> BTreeSet<usize> {
    let draws = (0..FAST_ROWS as u32).map(|i| {
        let word = philox(chance, [i, 0, 0, 0])[0];
        ((u64::from(word) * count as u64) >> 32) as usize
    });
    draws.chain(count.checked_sub(1)).collect()
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
