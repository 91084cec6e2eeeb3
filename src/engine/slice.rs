//! Defines the rows of a step, by sequence: what the scheduler plans, as plain data.

use super::blocks::BlockId;

/// The number of a sequence, larger than those of all before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SequenceId(pub u64);

/// The rows of one sequence in a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slice {
    /// The sequence whose rows these are.
    pub id: SequenceId,
    /// Position of the first row.
    pub start: usize,
    /// Tokens at `start..start + tokens.len()`.
    pub tokens: Vec<u32>,
    /// Whether these reach the sequence's last known token.
    pub is_last: bool,
    /// How many of them, the last ones, are drafts: guesses of what follows the known tokens.
    pub drafts: usize,
    /// The blocks of its KV cache, in the order of positions.
    pub blocks: Vec<BlockId>,
}

impl Slice {
    /// The drafts up to and including the one at `position`; none where a known token stands there.
    pub fn drafts_to(&self, position: usize) -> &[u32] {
        let known = self.tokens.len() - self.drafts;
        &self.tokens[known..(position + 1 - self.start).max(known)]
    }
}

/// What one step computes.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Rows by sequence, decoding ones first.
    pub slices: Vec<Slice>,
    /// Sequences that lost their blocks.
    pub preempted: Vec<SequenceId>,
}

impl Plan {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.slices.iter().map(|s| s.tokens.len()).sum()
    }
}
