//! Computes causal attention over a paged KV cache.
//!
//! A block holds 32 positions aligned to absolute positions, a partition 16 blocks. Within a
//! partition a query walks the blocks in ascending order with an online softmax (Milakov and
//! Gimelshein, 2018): per block the scores, a product of the canon over the head dimension; the new
//! maximum; the weights, which are exponentials rounded to the cache's type; the running sum of
//! those, rescaled by a fused multiply-add; then the weighted values, one block of the canon over
//! positions, added to what was there in the same way. Queries are rounded like every other input
//! of a product. Partitions are appended in ascending order (`Partial::append`).
//!
//! Masked positions have weight exactly zero, so a query's result does not depend on which other
//! queries share its tile; partitions are the same wherever they are computed, so one long context
//! can be split over threads.

mod cache;
mod layer;
mod partial;
mod tile;

pub use cache::{BLOCK_TOKENS, BlockLayout, HEAD_DIM_MAX, KvCache, KvDims, Segment};
pub use layer::{Attention, PARTITION_TOKENS};

use super::lanes::dispatch;
use super::pool::{Disjoint, Turn};
use super::rounded::Rounded;
use partial::Partial;
use std::ops::Range;
use tile::{Join, TILE_QUERIES, Tile};

/// Tasks for each thread, so that none waits long for the last one.
const TASKS_PER_THREAD: usize = 3;

impl KvCache {
    /// Attends in `layer`: queries are the first `heads * head_dim` columns of `qkv`
    /// (rows, row_len); the result, rounded, goes to `out` (rows, heads * head_dim).
    pub fn attend(
        &self,
        turn: &Turn<'_>,
        layer: usize,
        attention: Attention,
        segments: &[Segment],
        (qkv, row_len): (&[f32], usize),
        out: &mut Rounded,
    ) {
        let (heads, head_dim) = (attention.heads, self.dims.head_dim);
        let plan = Plan::new(segments, attention, self.dims.kv_heads, turn.threads());
        out.set_rows(qkv.len() / row_len);
        let out = out.pieces(turn.isa());
        let finish = |row: usize, head: usize, result: &mut Partial| {
            // SAFETY: each (row, head) is finished by one task.
            unsafe { out.round(row, head * head_dim, result.mean(head_dim)) };
        };
        let len = Partial::stored_len(head_dim);
        let mut parts = vec![0.0; plan.parts * len];
        let shared = Disjoint::new(&mut parts);
        turn.run(plan.tasks.len(), |i| {
            let Task { segment: index, kv_head, ref queries, partition } = plan.tasks[i];
            let segment = &segments[index];
            let (qkv, cache) = ((qkv, row_len), self);
            for first in queries.clone().step_by(TILE_QUERIES) {
                let queries = first..(first + TILE_QUERIES).min(queries.end);
                let tile =
                    Tile { cache, layer, attention, segment, kv_head, queries, partition, qkv };
                let Some(partition) = partition else {
                    tile::run(turn.isa(), tile, finish);
                    continue;
                };
                let keep = |row: usize, head: usize, result: &mut Partial| {
                    let at = plan.part(segments, heads, (index, row, head), partition) * len;
                    // SAFETY: each (row, head, partition) is computed by one task.
                    result.store(unsafe { shared.piece(at..at + len) });
                };
                tile::run(turn.isa(), tile, keep);
            }
        });
        turn.run(plan.joins.len(), |i| {
            let (index, row, head) = plan.joins[i];
            let Some(partitions) = plan.splits[index].clone().map(|s| s.partitions) else { return };
            let at = plan.part(segments, heads, plan.joins[i], partitions.start) * len;
            let parts = &parts[at..at + partitions.len() * len];
            finish(row, head, &mut dispatch(turn.isa(), Join { parts, head_dim }));
        });
    }
}

/// Queries `row * group + head-in-group` of one segment and key/value head, over all positions or
/// one partition.
struct Task {
    segment: usize,
    kv_head: usize,
    queries: Range<usize>,
    partition: Option<usize>,
}

/// A segment whose partitions are computed one by one.
#[derive(Clone)]
struct Split {
    partitions: Range<usize>,
    first_part: usize,
}

/// How a step is cut into tasks. What is cut does not change a bit.
struct Plan {
    tasks: Vec<Task>,
    splits: Vec<Option<Split>>,        // per segment
    joins: Vec<(usize, usize, usize)>, // (segment, row, head) of what was split
    parts: usize,
}

impl Plan {
    /// Contexts are split only where rows and heads alone would leave threads without work.
    fn new(segments: &[Segment], attention: Attention, kv_heads: usize, threads: usize) -> Self {
        let (heads, wanted) = (attention.heads, threads * TASKS_PER_THREAD);
        let group = heads / kv_heads;
        let tiles = segments.iter().map(|s| (s.rows.len() * group).div_ceil(TILE_QUERIES));
        let is_few = threads > 1 && tiles.sum::<usize>() * kv_heads < wanted;
        let mut plan = Self { tasks: vec![], splits: vec![], joins: vec![], parts: 0 };
        let mut units = 0;
        for (index, segment) in segments.iter().enumerate() {
            let partitions = attention.partitions(segment);
            let is_split = is_few && partitions.len() > 1;
            units += segment.rows.len() * heads * if is_split { partitions.len() } else { 1 };
            plan.splits.push(is_split.then(|| {
                let first_part = plan.parts;
                plan.parts += segment.rows.len() * heads * partitions.len();
                let rows = segment.rows.clone();
                plan.joins.extend(rows.flat_map(|r| (0..heads).map(move |h| (index, r, h))));
                Split { partitions, first_part }
            }));
        }
        let size = match units / wanted {
            small @ 0..TILE_QUERIES => small.max(1),
            large => large.min(8 * TILE_QUERIES).next_multiple_of(TILE_QUERIES),
        };
        // Long contexts first within a segment: the late rows cost most and finish last otherwise.
        for (index, segment) in segments.iter().enumerate() {
            let queries = segment.rows.len() * group;
            let partitions: Vec<Option<usize>> = match &plan.splits[index] {
                Some(split) => split.partitions.clone().map(Some).collect(),
                None => vec![None],
            };
            for first in (0..queries).step_by(size).rev() {
                let queries = first..(first + size).min(queries);
                for partition in &partitions {
                    plan.tasks.extend((0..kv_heads).map(|kv_head| Task {
                        segment: index,
                        kv_head,
                        queries: queries.clone(),
                        partition: *partition,
                    }));
                }
            }
        }
        plan
    }

    /// Where the result of a row and head in one partition is kept; those of the next partitions
    /// follow it.
    fn part(
        &self,
        segments: &[Segment],
        heads: usize,
        (segment, row, head): (usize, usize, usize),
        partition: usize,
    ) -> usize {
        let Some(split) = &self.splits[segment] else { return 0 };
        let index = (row - segments[segment].rows.start) * heads + head;
        split.first_part + index * split.partitions.len() + partition - split.partitions.start
    }
}

#[cfg(test)]
mod tests;
