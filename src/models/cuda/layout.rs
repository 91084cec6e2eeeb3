//! Lays out what the host tells the card of a step: rows, positions, places in the cache, tiles of
//! queries.

use super::choose::AttentionKernel;
use super::error::CudaError;
use super::launch::QueryTile;
use super::memory::{Inputs, Offset};
use super::weights::CudaWeights;
use crate::models::arithmetic::Arithmetic;
use crate::models::pass::{Batch, Segment};
use crate::ops::attention::{BLOCK_TOKENS, PARTITION_TOKENS};
use crate::ops::pool::Pool;

/// Block tables take a multiple of so many entries.
const TABLE_GRAIN: usize = 1024;

/// A step's rows, as they lie in its inputs.
pub(super) struct Layout {
    pub(super) rows: usize,
    pub(super) ids: Offset,
    pub(super) positions: Offset,
    pub(super) slots: Offset,
    pub(super) cos: Offset,
    pub(super) sin: Offset,
    pub(super) table: Offset,
    pub(super) tiles: Offset,
    pub(super) tile_count: usize,
    /// Queries that a thread block of attention takes.
    pub(super) tile_queries: usize,
    /// Whether every sequence has one row.
    pub(super) is_decode: bool,
    /// Partitions of the longest context.
    pub(super) partitions: usize,
}

impl Layout {
    /// Pushes what a batch says.
    ///
    /// # Errors
    /// When an id or a block does not exist: on a card that would read someone else's memory.
    pub(super) fn new(
        (weights, arithmetic): (&CudaWeights, Arithmetic),
        pool: &Pool,
        batch: &Batch,
        blocks: usize,
        inputs: &mut Inputs,
    ) -> Result<Self, CudaError> {
        check(batch, weights.spec.vocab, blocks)?;
        let rows = batch.ids.len();
        let (mut positions, mut slots) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        let (mut table, mut begins) = (Vec::new(), Vec::new());
        for segment in &batch.segments {
            begins.push(table.len());
            for position in segment.start..segment.start + segment.rows.len() {
                let block = segment.blocks[position / BLOCK_TOKENS];
                positions.push(position as u32);
                slots.push(block * BLOCK_TOKENS as u32 + (position % BLOCK_TOKENS) as u32);
            }
            table.extend_from_slice(&segment.blocks);
        }
        // Places behind the tables stay where they are while contexts grow.
        table.resize(table.len().next_multiple_of(TABLE_GRAIN), 0);
        let a = &weights.spec.attention;
        let group = a.heads / a.kv_heads;
        let widest = batch.segments.iter().map(|s| s.rows.len()).max().unwrap_or(1) * group;
        let tile_queries = AttentionKernel::queries(arithmetic, widest, a.head_dim);
        let tiles = tiles(batch, &begins, tile_queries, group);
        let last = positions.iter().max().copied().unwrap_or(0) as usize;
        let rope = weights.rope.table(&pool.turn(), &positions);
        Ok(Self {
            rows,
            ids: inputs.push(&batch.ids),
            positions: inputs.push(&positions),
            slots: inputs.push(&slots),
            cos: inputs.push(rope.parts().0),
            sin: inputs.push(rope.parts().1),
            table: inputs.push(&table),
            tiles: inputs.push(&tiles),
            tile_count: tiles.len(),
            tile_queries,
            is_decode: batch.segments.iter().all(|s| s.rows.len() == 1),
            partitions: last / PARTITION_TOKENS + 1,
        })
    }
}

fn check(batch: &Batch, vocab: usize, blocks: usize) -> Result<(), CudaError> {
    let wrong = |what: String| Err(CudaError::Shape(what));
    if let Some(id) = batch.ids.iter().find(|id| **id as usize >= vocab) {
        return wrong(format!("token {id} of a vocabulary of {vocab}"));
    }
    let mut next = 0;
    for segment in &batch.segments {
        if segment.rows.start != next || segment.rows.is_empty() {
            return wrong(format!("rows {:?} after {next}", segment.rows));
        }
        next = segment.rows.end;
        let needed = (segment.start + segment.rows.len()).div_ceil(BLOCK_TOKENS);
        if segment.blocks.len() < needed || segment.blocks.iter().any(|b| *b as usize >= blocks) {
            return wrong(format!("a block table {:?} of {blocks} blocks", segment.blocks));
        }
    }
    if next == batch.ids.len() { Ok(()) } else { wrong("segments must cover the rows".into()) }
}

fn tiles(batch: &Batch, begins: &[usize], size: usize, group: usize) -> Vec<QueryTile> {
    let of_segment = |(segment, begin): (&Segment, &usize)| {
        let queries = segment.rows.len() * group;
        let (row_zero, start) = (segment.rows.start as i32, segment.start as i32);
        let table = *begin as i32;
        (0..queries).step_by(size).map(move |first| QueryTile {
            row_zero,
            start,
            first_query: first as i32,
            queries: (queries - first).min(size) as i32,
            table,
            unused: 0,
        })
    };
    batch.segments.iter().zip(begins).flat_map(of_segment).collect()
}
