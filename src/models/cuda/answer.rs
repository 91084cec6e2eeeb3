//! Reads what is asked off the rows of a step, on the card where it has kernels for it.
//!
//! `models/rows.rs` is the definition; what is computed here has its bits. Rows whose logits are
//! changed or restricted (bias, penalties, grammars), margins, open searches and more alternatives
//! than the kernels sort come to the host as logits, and `rows::answer` reads them there; so does a
//! row whose draw needs more than the largest logits. The rest of a chunk of rows is one copy.

use super::asks::{AskChunk, Places, SketchGroup, UNKNOWN, near_tokens, why_hosted};
use super::error::CudaError;
use super::launch::args;
use super::memory::{Offset, Outputs};
use super::step::StepRun;
use super::weights::CudaWeights;
use crate::models::hosted::{HostedRows, Why};
use crate::models::pass::{
    LogprobMode, Ranked, RowAsk, RowFault, RowReport, RowResult, Scored, Token,
};
use crate::models::rows::{HiddenRow, answer, ranked_in_order};
use crate::ops::logits::LogSumExp;
use crate::ops::pool::Pool;
use crate::proof::commit::RowData;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Exponentials that are summed together.
const SUM_CHUNK: usize = 512;

/// Adds the kernels that read the rows of a chunk to its step.
pub(super) fn launch(
    chunk: &AskChunk<'_, '_>,
    step: &StepRun<'_>,
    outputs: &Outputs,
    places: &Places,
) {
    launch_proofs(chunk, step, outputs, places);
    if chunk.with_logits > chunk.hosted {
        launch_scores(chunk, step, outputs, places);
    }
}

fn launch_proofs(chunk: &AskChunk<'_, '_>, step: &StepRun<'_>, outputs: &Outputs, places: &Places) {
    let at = |place| outputs.pointer(place);
    for SketchGroup { whitening, bits, table } in &chunk.proofs {
        let channels = step.weights.spec.hidden as i32;
        let shift = bits.shift(whitening.source.shift) as i32;
        let args = args![
            at(places.finals),
            &whitening.exponents,
            &whitening.means,
            step.input(*table),
            at(places.sketches),
            at(places.hashes),
            channels,
            shift,
            bits.projections() as i32,
            step.is_f16(),
        ];
        step.launch("sketch_rows", [chunk.order.len(), 1, 1], 128, 0, args);
    }
}

fn launch_scores(chunk: &AskChunk<'_, '_>, step: &StepRun<'_>, outputs: &Outputs, places: &Places) {
    let at = |place| outputs.pointer(place);
    let (vocab, rows) = (step.weights.spec.vocab, [chunk.with_logits, 1, 1]);
    let (logits, v) = (at(places.logits), vocab as i32);
    let shared = 4 * vocab.div_ceil(SUM_CHUNK);
    for (i, temperatures) in [chunk.ones, chunk.inverses].into_iter().enumerate() {
        if i == 1 && !chunk.is_scaled {
            continue;
        }
        let (maxima, sums) = (at(places.maxima[i]), at(places.sums[i]));
        let args = args![logits, step.input(temperatures), maxima, sums, v];
        step.launch("sum_exp", rows, 256, shared, args);
    }
    let (ids, top) = (at(places.top_ids), at(places.top_logits));
    if chunk.top > 0 {
        let args = args![logits, ids, top, v, chunk.top as i32];
        step.launch("largest", rows, 256, 0, args);
    }
    let tokens = at(places.tokens);
    if chunk.draws {
        let sums = at(places.sums[usize::from(chunk.is_scaled)]);
        let rules = step.input(chunk.rules);
        let args = args![logits, rules, ids, top, sums, tokens, v, chunk.top as i32];
        step.launch("draw", rows, 256, 0, args);
    }
    let (queries, found, ranks) = (chunk.queries(), at(places.found), at(places.ranks));
    let args = args![logits, step.input(chunk.queries), tokens, found, ranks, v];
    step.launch("look_up", [queries, 1, 1], 256, 0, args);
}

/// A chunk whose rows were read.
pub(super) struct ChunkReading<'a, 'b, 'c> {
    pub(super) chunk: &'a AskChunk<'b, 'c>,
    pub(super) places: Places,
    pub(super) weights: &'a CudaWeights,
    pub(super) pool: &'a Pool,
}

impl ChunkReading<'_, '_, '_> {
    /// Copies what was found to the host, waits, and answers every ask of the chunk in its order.
    /// Rows whose logits came to the host are counted.
    pub(super) fn collect(
        &self,
        outputs: &mut Outputs,
        hosted: &mut HostedRows,
    ) -> Result<Vec<RowResult>, CudaError> {
        let Self { chunk, places, weights, .. } = self;
        let (hidden, vocab) = (weights.spec.hidden, weights.spec.vocab);
        let end = match (chunk.hosted, chunk.has_finals) {
            (0, false) => places.finals,
            (0, true) => places.logits,
            (hosted, _) => places.logits.plus(4 * hosted * vocab),
        };
        outputs.fetch(Offset::default(), end.bytes())?;
        let found = Found::read(chunk, places, outputs)?;
        let finals: Vec<u16> = match chunk.has_finals {
            true => outputs.read(places.finals, chunk.order.len() * hidden)?,
            false => Vec::new(),
        };
        let finals = Finals { bits: &finals, hidden };
        let mut by_host = self.by_host(&found, &finals, (outputs, hosted))?;
        let mut results = vec![Ok(RowReport::default()); chunk.asks.len()];
        for (place, index) in chunk.order.iter().enumerate() {
            let ask = &chunk.asks[*index];
            results[*index] = match by_host.remove(&place) {
                Some(result) if place < chunk.hosted => result,
                scored => {
                    let scores = match scored {
                        Some(result) => result.map(|report| report.scores),
                        None => self.scores(ask, place, &found),
                    };
                    let report = self.report(ask, place, finals.row(place), &found);
                    scores.map(|scores| RowReport { scores, ..report })
                }
            };
        }
        Ok(results)
    }

    /// What the host reads off logits, by place: of the rows that are its own, and of those whose
    /// draw the card left to it.
    fn by_host(
        &self,
        found: &Found,
        finals: &Finals<'_>,
        (outputs, hosted): (&mut Outputs, &mut HostedRows),
    ) -> Result<BTreeMap<usize, RowResult>, CudaError> {
        let Self { chunk, places, weights, pool } = self;
        let vocab = weights.spec.vocab;
        let at = |place: usize| places.logits.plus(4 * place * vocab);
        let left: Vec<usize> = (chunk.hosted..chunk.with_logits)
            .filter(|place| found.is_left(chunk, *place))
            .collect();
        for place in &left {
            outputs.fetch(at(*place), 4 * vocab)?;
        }
        let on_host: Vec<usize> = (0..chunk.hosted).chain(left).collect();
        let mut rows = Vec::with_capacity(on_host.len());
        for place in &on_host {
            rows.push(Mutex::new(outputs.read::<f32>(at(*place), vocab)?));
            hosted.count(why_hosted(&chunk.asks[chunk.order[*place]]).unwrap_or(Why::Draw));
        }
        let read = |i: usize| {
            let (place, mut row) = (on_host[i], rows[i].lock());
            let ask = &chunk.asks[chunk.order[place]];
            // A row that the card proved keeps that proof.
            let ask = match place < chunk.hosted {
                true => ask.clone(),
                false => RowAsk { prover: None, hidden: false, ..ask.clone() },
            };
            let bits = finals.row(place);
            let values: Vec<f32> = bits.iter().map(|b| weights.dtype.widen(*b)).collect();
            let hidden = HiddenRow { bits, values: &values };
            let answered = || answer(pool.isa(), &ask, hidden, Some(&mut row));
            // The panic's own words and place are in the log by the panic hook.
            catch_unwind(AssertUnwindSafe(answered)).unwrap_or(Err(RowFault::Panicked))
        };
        let results = match on_host.len() {
            0 => Vec::new(),
            count => pool.turn().map(count, read),
        };
        Ok(on_host.iter().copied().zip(results).collect())
    }

    /// The parts of a report that follow from the final row.
    fn report(&self, ask: &RowAsk<'_>, place: usize, bits: &[u16], found: &Found) -> RowReport {
        let proof = ask.prover.map(|prover| match prover.residue() {
            Some(_) => RowData::Residue {
                sketch: found.sketches[place].to_le_bytes(),
                exact: found.hashes[place],
            },
            None => {
                let values: Vec<f32> = bits.iter().map(|b| self.weights.dtype.widen(*b)).collect();
                prover.prove(ask.position, bits, &values)
            }
        });
        RowReport { proof, hidden: ask.hidden.then(|| bits.to_vec()), ..RowReport::default() }
    }

    /// What the card read off a row's logits.
    fn scores(
        &self,
        ask: &RowAsk<'_>,
        place: usize,
        found: &Found,
    ) -> Result<Option<Scored>, RowFault> {
        let Some(scores) = ask.scores.as_ref() else { return Ok(None) };
        let raw = LogSumExp::of_sum(found.maxima[0][place], found.sums[0][place], 1.0);
        if !raw.is_finite() {
            return Err(RowFault::NotFinite);
        }
        let sum = match scores.mode {
            LogprobMode::Raw => raw,
            LogprobMode::Scaled => {
                let i = usize::from(self.chunk.is_scaled);
                let temperature = scores.sampling.logprob_temperature();
                LogSumExp::of_sum(found.maxima[i][place], found.sums[i][place], temperature)
            }
        };
        let looked_up = self.chunk.query_ranges[place].clone();
        let mut known = looked_up.map(|i| (sum.logprob(found.found[i]), found.ranks[i]));
        // Queries were made of the same ask, so there is one for each token that is named below.
        let mut ranked = |token: u32| {
            let (logprob, rank) = known.next().ok_or(RowFault::Panicked)?;
            Ok::<_, RowFault>(Ranked { token, logprob, rank })
        };
        let token = ranked(match scores.token {
            Token::Drawn => found.tokens[place],
            Token::Known(token) | Token::Measured(token) => token,
        })?;
        let ids = scores.ids.iter().map(|id| ranked(*id)).collect::<Result<_, _>>()?;
        let near = near_tokens(scores).into_iter().map(|id| Ok((id, ranked(id)?.logprob)));
        let near = near.collect::<Result<_, RowFault>>()?;
        let ends = scores.ends.iter().map(|id| ranked(*id)).collect::<Result<Vec<_>, _>>()?;
        let end_rank = ends.iter().map(|end| end.rank).min();
        let top = found.top(self.chunk.top, place, scores.top, &sum);
        Ok(Some(Scored { token, top, ids, near, end_rank, margin: None }))
    }
}

/// Final rows that were copied to the host; none where nobody needs them there.
struct Finals<'a> {
    bits: &'a [u16],
    hidden: usize,
}

impl<'a> Finals<'a> {
    fn row(&self, place: usize) -> &'a [u16] {
        self.bits.get(place * self.hidden..(place + 1) * self.hidden).unwrap_or_default()
    }
}

/// What the card found, on the host.
struct Found {
    tokens: Vec<u32>,
    maxima: [Vec<f32>; 2],
    sums: [Vec<f64>; 2],
    top_ids: Vec<u32>,
    top_logits: Vec<f32>,
    found: Vec<f32>,
    ranks: Vec<u32>,
    sketches: Vec<u32>,
    hashes: Vec<u64>,
}

impl Found {
    fn read(
        chunk: &AskChunk<'_, '_>,
        places: &Places,
        outputs: &mut Outputs,
    ) -> Result<Self, CudaError> {
        let (rows, with_logits) = (chunk.order.len(), chunk.with_logits);
        let queries = chunk.queries();
        Ok(Self {
            tokens: outputs.read(places.tokens, with_logits)?,
            maxima: [
                outputs.read(places.maxima[0], with_logits)?,
                outputs.read(places.maxima[1], with_logits)?,
            ],
            sums: [
                outputs.read(places.sums[0], with_logits)?,
                outputs.read(places.sums[1], with_logits)?,
            ],
            top_ids: outputs.read(places.top_ids, with_logits * chunk.top)?,
            top_logits: outputs.read(places.top_logits, with_logits * chunk.top)?,
            found: outputs.read(places.found, queries)?,
            ranks: outputs.read(places.ranks, queries)?,
            sketches: outputs.read(places.sketches, rows)?,
            hashes: outputs.read(places.hashes, rows)?,
        })
    }

    /// Whether the draw of a place needs more than the card looked at.
    fn is_left(&self, chunk: &AskChunk<'_, '_>, place: usize) -> bool {
        let scores = chunk.asks[chunk.order[place]].scores.as_ref();
        scores.is_some_and(|s| s.token == Token::Drawn) && self.tokens[place] == UNKNOWN
    }

    /// The `count` largest of the `stride` that were sorted.
    fn top(&self, stride: usize, place: usize, count: usize, sum: &LogSumExp) -> Vec<Ranked> {
        let at = place * stride..place * stride + count;
        let pairs = self.top_ids[at.clone()].iter().zip(&self.top_logits[at]);
        let known = pairs.map(|(id, logit)| (*id, *logit)).take_while(|(id, _)| *id != UNKNOWN);
        ranked_in_order(&known.collect::<Vec<_>>(), sum)
    }
}
