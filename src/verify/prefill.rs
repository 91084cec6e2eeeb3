//! One pass over prompt and output: the hidden row that each token was drawn from, and logits for
//! the rows that a check needs, in blocks that stay small whatever the vocabulary.

use super::Stop;
use crate::models::decoder::{Decoder, Scratch};

use crate::ops::attention::{BLOCK_TOKENS, KvCache, Segment};
use crate::ops::pool::Pool;
use std::collections::BTreeSet;

/// Rows of one step.
const STEP_ROWS: usize = 256;
/// Bytes of logits that exist at once.
const LOGITS_BYTES_MAX: usize = 8 << 20;

/// The row that one token of the output was drawn from.
pub struct Row<'a> {
    /// Number of the token in the output.
    pub index: usize,
    /// Absolute position of the row.
    pub position: u32,
    /// The final-norm row as stored.
    pub bits: &'a [u16],
    /// The same as numbers.
    pub values: &'a [f32],
    /// Raw logits, where they were wanted.
    pub logits: Option<&'a mut [f32]>,
}

/// Runs the model over `prompt` and `output` and hands every output row to `visit`, in order.
///
/// # Errors
/// What `visit` says, or a fault of the engine.
pub fn run(
    decoder: &Decoder,
    pool: &Pool,
    prompt: &[u32],
    output: &[u32],
    wanted: &BTreeSet<usize>,
    mut visit: impl FnMut(Row<'_>) -> Result<(), Stop>,
) -> Result<(), Stop> {
    // The last token decides nothing: its row would predict what follows.
    let ids = [prompt, &output[..output.len().saturating_sub(1)]].concat();
    let first = prompt.len() - 1;
    let blocks = ids.len().div_ceil(BLOCK_TOKENS);
    let mut cache = KvCache::new(decoder.spec.kv_dims(), decoder.dtype, blocks)
        .map_err(|e| Stop::Fault(format!("no memory for the KV cache: {e}")))?;
    let mut scratch = Scratch::new(decoder);
    let mut logits = Vec::new();
    let vocab = decoder.spec.vocab;
    let block_rows = (LOGITS_BYTES_MAX / (4 * vocab)).max(1);
    let blocks: Vec<u32> = (0..blocks as u32).collect();
    for start in (0..ids.len()).step_by(STEP_ROWS) {
        let step = &ids[start..ids.len().min(start + STEP_ROWS)];
        let segment = Segment {
            rows: 0..step.len(),
            start,
            blocks: blocks[..(start + step.len()).div_ceil(BLOCK_TOKENS)].to_vec(),
        };
        let turn = pool.turn();
        decoder
            .forward(&turn, &mut cache, step, &[segment], &mut scratch)
            .map_err(|e| Stop::Fault(e.to_string()))?;
        let rows: Vec<usize> = (first.max(start)..start + step.len()).map(|p| p - start).collect();
        for rows in rows.chunks(block_rows) {
            let hidden = decoder.final_rows(&turn, rows, &scratch);
            let index = |row: usize| start + row - first;
            let scored: Vec<usize> =
                rows.iter().copied().filter(|r| wanted.contains(&index(*r))).collect();
            logits.clear();
            if scored.len() == rows.len() {
                decoder.logits(&turn, &hidden, &mut logits);
            } else if !scored.is_empty() {
                let some = decoder.final_rows(&turn, &scored, &scratch);
                decoder.logits(&turn, &some, &mut logits);
            }
            let mut scores = logits.chunks_exact_mut(vocab);
            for (i, row) in rows.iter().enumerate() {
                visit(Row {
                    index: index(*row),
                    position: (start + row) as u32,
                    bits: hidden.bits(i),
                    values: hidden.values(i),
                    logits: if scored.contains(row) { scores.next() } else { None },
                })?;
            }
        }
    }
    Ok(())
}
