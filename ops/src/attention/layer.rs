//! Describes attention in one layer, and cuts its positions into partitions.

use super::cache::{BLOCK_TOKENS, Segment};
use std::ops::Range;

pub(super) const PARTITION_BLOCKS: usize = 16;
/// Positions of a partition.
pub const PARTITION_TOKENS: usize = PARTITION_BLOCKS * BLOCK_TOKENS;

/// What attention needs to know of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` before the softmax.
    pub softcap: Option<f32>,
    /// A query sees this many positions, its own included.
    pub window: Option<usize>,
}

impl Attention {
    /// Positions that the query at `position` sees.
    #[inline(always)]
    pub(super) fn seen(&self, position: usize) -> Range<usize> {
        (position + 1).saturating_sub(self.window.unwrap_or(usize::MAX))..position + 1
    }

    /// Partitions that hold what the queries of `segment` see.
    pub(super) fn partitions(&self, segment: &Segment) -> Range<usize> {
        let last = segment.start + segment.rows.len().max(1) - 1;
        let (start, end) = (self.seen(segment.start).start, self.seen(last).end);
        start / PARTITION_TOKENS..end.div_ceil(PARTITION_TOKENS)
    }
}
