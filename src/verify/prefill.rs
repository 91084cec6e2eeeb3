//! One pass over prompt and output: the hidden row that each token was drawn from, and logits for
//! the rows that a check needs, in blocks that stay small whatever the vocabulary. Outputs of the
//! same prompt share its keys and values ([`Prefix`]).

use super::Stop;
use crate::models::decoder::{Decoder, Scratch};
use crate::ops::attention::{BLOCK_TOKENS, KvCache, Segment};
use crate::ops::dtype::Rounded;
use crate::ops::pool::{Pool, Turn};
use std::collections::BTreeSet;

/// Rows of one step.
const STEP_ROWS: usize = 256;
/// Bytes of logits that exist at once.
const LOGITS_BYTES_MAX: usize = 8 << 20;

/// The row that one token of the output was drawn from.
pub struct PrefillRow<'a> {
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
    visit: impl FnMut(PrefillRow<'_>) -> Result<(), Stop>,
) -> Result<(), Stop> {
    Prefix::new(decoder, pool, prompt, output.len())?.run(output, wanted, visit)
}

/// A prompt with the outputs that follow it, one after the other. The first output is run together
/// with the prompt. Every later one finds the prompt's keys and values, and writes its own over
/// those of the output before it. Rows have the bits that a pass of their own would give them:
/// these depend neither on the chunking nor on what lies behind a position.
pub struct Prefix<'a> {
    decoder: &'a Decoder,
    pool: &'a Pool,
    prompt: &'a [u32],
    output_max: usize,
    cache: KvCache,
    scratch: Scratch,
    last: Option<Rounded>,   // the prompt's last row, once the prompt was run
    scored: BTreeSet<usize>, // rows of the prompt, before its last, whose logits are wanted
    kept: Vec<(Vec<usize>, Rounded)>, // those that were run
    is_wanted: &'a IsWanted<'a>,
}

/// Whether anybody still waits for the outcome; asked before every step.
pub type IsWanted<'a> = dyn Fn() -> bool + Sync + 'a;

impl<'a> Prefix<'a> {
    /// Makes room for `prompt` and outputs of at most `output_max` tokens; runs nothing yet.
    ///
    /// # Errors
    /// When there is no memory, or no prompt.
    pub fn new(
        decoder: &'a Decoder,
        pool: &'a Pool,
        prompt: &'a [u32],
        output_max: usize,
    ) -> Result<Self, Stop> {
        if prompt.is_empty() {
            return Err(Stop::Fault("a prompt must have at least one token, got none".into()));
        }
        let positions = prompt.len() + output_max.saturating_sub(1);
        let blocks = positions.div_ceil(BLOCK_TOKENS);
        let cache = KvCache::new(decoder.spec.kv_dims(), decoder.dtype, blocks)
            .map_err(|e| Stop::Fault(format!("no memory for the KV cache: {e}")))?;
        let scratch = Scratch::new(decoder);
        let is_wanted = &|| true;
        let (last, scored, kept) = (None, BTreeSet::new(), Vec::new());
        Ok(Self {
            decoder,
            pool,
            prompt,
            output_max,
            cache,
            scratch,
            last,
            scored,
            kept,
            is_wanted,
        })
    }

    /// The same, which keeps these rows of the prompt for [`score`](Self::score).
    pub fn keeping(self, scored: BTreeSet<usize>) -> Self {
        Self { scored, ..self }
    }

    /// Hands the position and the logits of every row of the prompt that was kept to `visit`, once
    /// an output was run.
    ///
    /// # Errors
    /// What `visit` says.
    pub fn score(
        &self,
        mut visit: impl FnMut(usize, &mut [f32]) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let mut logits = Vec::new();
        for (positions, rows) in &self.kept {
            logits.clear();
            self.decoder.logits(&self.pool.turn(), rows, &mut logits);
            let scores = logits.chunks_exact_mut(self.decoder.spec.vocab);
            for (position, scores) in positions.iter().zip(scores) {
                visit(*position, scores)?;
            }
        }
        Ok(())
    }

    /// The same, given up with a fault once `is_wanted` says no.
    pub fn while_wanted(self, is_wanted: &'a IsWanted<'a>) -> Self {
        Self { is_wanted, ..self }
    }

    /// Runs the model over the prompt, where that was not done yet, and `output`, and hands every
    /// output row to `visit`, in order.
    ///
    /// # Errors
    /// What `visit` says, or a fault of the engine. Other outputs can be run all the same.
    pub fn run(
        &mut self,
        output: &[u32],
        wanted: &BTreeSet<usize>,
        visit: impl FnMut(PrefillRow<'_>) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let (room, length) = (self.output_max, output.len());
        assert!(length <= room, "there is room for {room} tokens, got {length}");
        let (decoder, pool, prompt) = (self.decoder, self.pool, self.prompt);
        // The last token decides nothing: its row would predict what follows.
        let output = &output[..length.saturating_sub(1)];
        let first = prompt.len() - 1;
        let mut handing = Handing { decoder, first, wanted, logits: Vec::new(), visit };
        let (start, ids) = match &self.last {
            None => (0, [prompt, output].concat()),
            Some(row) => {
                handing.rows(&pool.turn(), 0, row)?;
                (prompt.len(), output.to_vec())
            }
        };
        for (number, ids) in ids.chunks(STEP_ROWS).enumerate() {
            self.step(start + number * STEP_ROWS, ids, &mut handing)?;
        }
        Ok(())
    }

    /// Runs `ids` at the positions from `start` on.
    fn step<V: FnMut(PrefillRow<'_>) -> Result<(), Stop>>(
        &mut self,
        start: usize,
        ids: &[u32],
        handing: &mut Handing<'_, V>,
    ) -> Result<(), Stop> {
        if !(self.is_wanted)() {
            return Err(Stop::Fault("nobody waits for the outcome any more".into()));
        }
        let (decoder, pool, first) = (self.decoder, self.pool, handing.first);
        let end = start + ids.len();
        let blocks = (0..end.div_ceil(BLOCK_TOKENS) as u32).collect();
        let segment = Segment { rows: 0..ids.len(), start, blocks };
        let turn = pool.turn();
        decoder
            .forward(&turn, &mut self.cache, ids, &[segment], &mut self.scratch)
            .map_err(|e| Stop::Fault(e.to_string()))?;
        if start == 0 {
            self.kept.clear();
        }
        let block_rows = (LOGITS_BYTES_MAX / (4 * decoder.spec.vocab)).max(1);
        let scored = self.scored.range(start..end.min(first).max(start));
        let scored: Vec<usize> = scored.copied().collect();
        for positions in scored.chunks(block_rows) {
            let rows: Vec<usize> = positions.iter().map(|p| p - start).collect();
            let hidden = decoder.final_rows(&turn, &rows, &self.scratch);
            self.kept.push((positions.to_vec(), hidden));
        }
        if (start..end).contains(&first) {
            self.last = Some(decoder.final_rows(&turn, &[first - start], &self.scratch));
        }
        let rows: Vec<usize> = (first.max(start)..end).map(|p| p - start).collect();
        for rows in rows.chunks(block_rows) {
            let hidden = decoder.final_rows(&turn, rows, &self.scratch);
            handing.rows(&turn, start + rows[0] - first, &hidden)?;
        }
        Ok(())
    }
}

/// Hands rows over, with logits where they are wanted.
struct Handing<'a, V> {
    decoder: &'a Decoder,
    first: usize, // position of the row that token 0 was drawn from
    wanted: &'a BTreeSet<usize>,
    logits: Vec<f32>, // (rows that are wanted, vocab)
    visit: V,
}

impl<V: FnMut(PrefillRow<'_>) -> Result<(), Stop>> Handing<'_, V> {
    /// All rows of `hidden`, of which the first belongs to token `index`.
    fn rows(&mut self, turn: &Turn<'_>, index: usize, hidden: &Rounded) -> Result<(), Stop> {
        let is_wanted = |row: &usize| self.wanted.contains(&(index + row));
        let wanted: Vec<usize> = (0..hidden.rows()).filter(is_wanted).collect();
        self.logits.clear();
        if !wanted.is_empty() {
            let mut some = Rounded::new(hidden.dtype(), hidden.cols());
            some.set_rows(wanted.len());
            wanted.iter().enumerate().for_each(|(to, from)| some.copy_row(to, hidden, *from));
            self.decoder.logits(turn, &some, &mut self.logits);
        }
        let mut scores = self.logits.chunks_exact_mut(self.decoder.spec.vocab);
        for row in 0..hidden.rows() {
            (self.visit)(PrefillRow {
                index: index + row,
                position: (self.first + index + row) as u32,
                bits: hidden.bits(row),
                values: hidden.values(row),
                logits: if wanted.contains(&row) { scores.next() } else { None },
            })?;
        }
        Ok(())
    }
}
