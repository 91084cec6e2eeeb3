//! Chooses the prefixes that are worth keeping: those that many requests begin with. The block pool
//! counts how often each is found, and what is kept across restarts is chosen here. Pure functions.

use serde::{Deserialize, Serialize};

/// Prefixes that are kept.
pub const PREFIXES_MAX: usize = 16;
/// Tokens of all prefixes that are kept together.
pub const TOKENS_MAX: usize = 65_536;
/// How many sequences must have found a prefix before it is kept. A conversation that goes on finds
/// its own beginning once a turn, each time a longer one: it is not kept.
pub const REUSES_MIN: u32 = 3;

/// A prefix of whole blocks, and how many sequences found it and nothing longer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HotPrefix {
    /// Sequences that found it.
    pub reuses: u32,
    /// The token ids of its blocks.
    pub tokens: Vec<u32>,
}

impl HotPrefix {
    /// Rows that were not computed because of it.
    fn saved(&self) -> u64 {
        u64::from(self.reuses) * self.tokens.len() as u64
    }
}

/// What is kept of these prefixes, those that saved most first. Equal ones count together.
pub fn hottest(mut all: Vec<HotPrefix>) -> Vec<HotPrefix> {
    all.sort_by(|a, b| a.tokens.cmp(&b.tokens));
    all.dedup_by(|next, first| {
        let is_same = next.tokens == first.tokens;
        if is_same {
            first.reuses = first.reuses.saturating_add(next.reuses);
        }
        is_same
    });
    all.retain(|prefix| prefix.reuses > 0 && !prefix.tokens.is_empty());
    all.sort_by_key(|prefix| std::cmp::Reverse(prefix.saved()));
    let mut left = TOKENS_MAX;
    all.retain(|prefix| match left.checked_sub(prefix.tokens.len()) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    });
    all.truncate(PREFIXES_MAX);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(reuses: u32, first: u32, len: usize) -> HotPrefix {
        HotPrefix { reuses, tokens: (first..).take(len).collect() }
    }

    #[test]
    fn those_that_saved_most_are_kept_within_the_bounds() {
        let chosen = hottest(vec![
            prefix(5, 1, 32),
            prefix(2, 9, 320),
            prefix(1, 1, 32),
            prefix(0, 3, 64),
            prefix(7, 0, 0),
        ]);
        assert_eq!(chosen, [prefix(2, 9, 320), prefix(6, 1, 32)]);
        let many = (0..40).map(|i| prefix(40 - i, i * 100, 32)).collect();
        let chosen = hottest(many);
        assert_eq!((chosen.len(), chosen[15].reuses), (PREFIXES_MAX, 25));
        // One that is too long does not keep shorter ones out.
        let chosen = hottest(vec![prefix(9, 0, TOKENS_MAX + 32), prefix(1, 7, 32)]);
        assert_eq!(chosen, [prefix(1, 7, 32)]);
    }
}
