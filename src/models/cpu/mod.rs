//! Implements the pass on the CPU: the decoder, its KV cache and its buffers.

pub mod decoder;
mod load;
mod moe;
pub mod weights;

use super::departure::Departure;
use super::pass::{Batch, Pass, PassFault, RowAsk, RowFault, RowResult, logit_rows_max};
use super::rows::{HiddenRow, answer};
use super::spec::Spec;
use crate::ops::attention::KvCache;
use crate::ops::pool::{Disjoint, Pool, Turn};
use crate::ops::rounded::Rounded;
use decoder::{Decoder, Scratch};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Bytes of logits that exist at once, whatever the batch and the vocabulary.
const CPU_LOGITS_BYTES_MAX: usize = 16 << 20;

/// Bytes of buffers and logits for steps of `rows` rows.
pub fn workspace_bytes(spec: &Spec, rows: usize) -> usize {
    Scratch::bytes(spec, rows) + logit_rows_max(spec.vocab, CPU_LOGITS_BYTES_MAX) * spec.vocab * 4
}

/// Runs a decoder on the compute pool. Each step takes a turn of it.
pub struct CpuPass {
    decoder: Arc<Decoder>,
    pool: Pool,
    cache: KvCache,
    scratch: Scratch,
    logits: Vec<f32>,
}

impl CpuPass {
    /// With an empty cache of `blocks` blocks; memory is backed as it is written.
    ///
    /// # Errors
    /// When the system refuses the address space.
    pub fn new(decoder: &Arc<Decoder>, pool: &Pool, blocks: usize) -> io::Result<Self> {
        let cache = KvCache::new(decoder.spec.kv_dims(), decoder.dtype, blocks)?;
        let (scratch, logits) = (Scratch::new(decoder), Vec::new());
        Ok(Self { decoder: Arc::clone(decoder), pool: pool.clone(), cache, scratch, logits })
    }

    /// The same by another arithmetic than the canon.
    pub fn departing(self, departure: Departure) -> Self {
        Self { scratch: self.scratch.departing(departure), ..self }
    }

    /// The keys and values that were stored so far.
    pub fn cache_mut(&mut self) -> &mut KvCache {
        &mut self.cache
    }
}

impl Pass for CpuPass {
    fn step(&mut self, batch: &Batch, asks: &[RowAsk<'_>]) -> Result<Vec<RowResult>, PassFault> {
        let Self { decoder, pool, cache, scratch, logits } = self;
        let turn = pool.turn();
        decoder.forward(&turn, cache, &batch.ids, &batch.segments, scratch)?;
        let mut results = Vec::with_capacity(asks.len());
        let at_once = logit_rows_max(decoder.spec.vocab, CPU_LOGITS_BYTES_MAX);
        for asks in asks.chunks(at_once) {
            let rows: Vec<usize> = asks.iter().map(|ask| ask.row).collect();
            let hidden = decoder.final_rows(&turn, &rows, scratch);
            results.extend(read(decoder, &turn, asks, &hidden, logits));
        }
        Ok(results)
    }
}

/// Answers `asks` from their rows, each on a thread of the pool. The head's product is made for
/// those that need it; `logits` is where it goes.
fn read(
    decoder: &Decoder,
    turn: &Turn<'_>,
    asks: &[RowAsk<'_>],
    hidden: &Rounded,
    logits: &mut Vec<f32>,
) -> Vec<RowResult> {
    let vocab = decoder.spec.vocab;
    let with_logits: Vec<usize> = (0..asks.len()).filter(|i| asks[*i].needs_logits()).collect();
    if !with_logits.is_empty() {
        let mut some = Rounded::new(hidden.dtype(), hidden.cols());
        some.set_rows(with_logits.len());
        with_logits.iter().enumerate().for_each(|(to, from)| some.copy_row(to, hidden, *from));
        decoder.logits(turn, &some, logits);
    }
    let logits = Disjoint::new(logits);
    turn.map(asks.len(), |i| {
        let row = with_logits.binary_search(&i).ok().map(|place| {
            // SAFETY: each row of logits belongs to one ask, which is one task.
            unsafe { logits.piece(place * vocab..(place + 1) * vocab) }
        });
        let values = hidden.widened(i);
        let hidden = HiddenRow { bits: hidden.bits(i), values: &values };
        // The panic's own words and place are in the log by the panic hook.
        catch_unwind(AssertUnwindSafe(|| answer(turn.isa(), &asks[i], hidden, row)))
            .unwrap_or(Err(RowFault::Panicked))
    })
}
