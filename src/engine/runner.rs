//! Executes a plan: one forward pass over its rows, then logits for the rows that count, in blocks
//! small enough that no (rows, vocabulary) buffer of any size ever exists.

use super::live::HiddenRow;
use super::scheduler::Plan;
use crate::models::decoder::{Decoder, Scratch};
use crate::models::error::LoadError;
use crate::ops::attention::{KvCache, Segment};
use crate::ops::pool::{Disjoint, Turn};
use parking_lot::Mutex;
use std::io;

/// Bytes of logits that exist at once.
const LOGITS_BYTES_MAX: usize = 16 << 20;

/// Rows of logits that are computed at once for a vocabulary.
pub(super) fn logit_rows_max(vocab: usize) -> usize {
    (LOGITS_BYTES_MAX / (4 * vocab)).max(1)
}

/// KV cache and buffers of one model.
pub(super) struct Runner {
    cache: KvCache,
    scratch: Scratch,
    logits: Vec<f32>,
}

/// A row of a plan, by the slice it belongs to.
#[derive(Clone, Copy)]
pub(super) struct RowAt {
    pub(super) slice: usize,
    pub(super) position: usize,
    row: usize, // in the batch
}

impl Runner {
    pub(super) fn new(decoder: &Decoder, blocks: usize) -> io::Result<Self> {
        let cache = KvCache::new(decoder.spec.kv_dims(), decoder.dtype, blocks)?;
        Ok(Self { cache, scratch: Scratch::new(decoder), logits: Vec::new() })
    }

    /// Runs `plan` and returns, for every row that `wants`, what `reduce` makes of its logits.
    /// `reduce` is called from several threads.
    pub(super) fn run<T: Send>(
        &mut self,
        decoder: &Decoder,
        turn: &Turn<'_>,
        plan: &Plan,
        wants: impl Fn(usize, usize) -> bool,
        reduce: impl Fn(RowAt, &mut [f32], HiddenRow<'_>) -> T + Sync,
    ) -> Result<Vec<(RowAt, T)>, LoadError> {
        let (mut ids, mut segments, mut chosen) = (Vec::new(), Vec::new(), Vec::new());
        for (index, slice) in plan.slices.iter().enumerate() {
            let rows = ids.len()..ids.len() + slice.tokens.len();
            for (row, position) in rows.clone().zip(slice.start..) {
                if wants(index, position) {
                    chosen.push(RowAt { slice: index, position, row });
                }
            }
            ids.extend_from_slice(&slice.tokens);
            let blocks = slice.blocks.iter().map(|b| b.0).collect();
            segments.push(Segment { rows, start: slice.start, blocks });
        }
        decoder.forward(turn, &mut self.cache, &ids, &segments, &mut self.scratch)?;
        let mut results = Vec::with_capacity(chosen.len());
        for block in chosen.chunks(logit_rows_max(decoder.spec.vocab)) {
            let rows: Vec<usize> = block.iter().map(|r| r.row).collect();
            let hidden = decoder.final_rows(turn, &rows, &self.scratch);
            decoder.logits(turn, &hidden, &mut self.logits);
            let reduced = reduce_rows(turn, decoder.spec.vocab, &mut self.logits, |i, row| {
                let hidden = HiddenRow { bits: hidden.bits(i), values: hidden.values(i) };
                reduce(block[i], row, hidden)
            });
            results.extend(block.iter().copied().zip(reduced));
        }
        Ok(results)
    }
}

/// `reduce(i, row)` for every row of `logits`, on all threads.
fn reduce_rows<T: Send>(
    turn: &Turn<'_>,
    vocab: usize,
    logits: &mut [f32],
    reduce: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> Vec<T> {
    let rows = logits.len() / vocab;
    let logits = Disjoint::new(logits);
    let results: Vec<Mutex<Option<T>>> = (0..rows).map(|_| Mutex::new(None)).collect();
    turn.run(rows, |i| {
        // SAFETY: each row belongs to one task.
        let row = unsafe { logits.piece(i * vocab..(i + 1) * vocab) };
        *results[i].lock() = Some(reduce(i, row));
    });
    results.into_iter().filter_map(Mutex::into_inner).collect()
}
