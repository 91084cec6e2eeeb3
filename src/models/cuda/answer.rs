//! What is read off the rows of a step, on the card where it has kernels for it.
//!
//! `models/rows.rs` is the definition; what is computed here has its bits. Rows whose logits are
//! changed or restricted (bias, penalties, grammars), margins, open searches and more alternatives
//! than the kernels sort come to the host as logits, and `rows::answer` reads them there; so does a
//! row whose draw needs more than the largest logits. The rest of a chunk of rows is one copy.

use super::error::CudaError;
use super::launch::{Entry, Memory, Query, Rule, args};
use super::memory::{At, Inputs, Outputs};
use super::pass::Step;
use super::weights::CudaWeights;
use crate::models::pass::{
    LogprobMode, Ranked, RowAsk, RowFault, RowReport, RowResult, Scored, Scores, Token,
};
use crate::models::rows::{HiddenRow, answer};
use crate::ops::logits::LogSumExp;
use crate::ops::pool::Pool;
use crate::proof::commit::RowData;
use crate::proof::residue::{Calibration, Profile};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Bytes of logits on the card at once.
const LOGITS_BYTES_MAX: usize = 64 << 20;
/// The largest logits that a truncated draw starts from, and the most alternatives.
const CANDIDATES: usize = 256;
/// A token that is drawn, and a draw that the host has to make.
const UNKNOWN: u32 = u32::MAX;
/// Exponentials that are summed together.
const SUM_CHUNK: usize = 512;
/// Calibrations that stay on the card: a model has one.
const CALIBRATIONS_MAX: usize = 4;

/// Rows of logits that are on the card at once.
pub(super) fn logit_rows_max(vocab: usize) -> usize {
    (LOGITS_BYTES_MAX / (4 * vocab)).max(1)
}

/// Bytes of logits and results for steps of `rows` rows.
pub(super) fn answer_bytes(spec: &crate::models::spec::Spec, rows: usize) -> usize {
    let rows = rows.min(logit_rows_max(spec.vocab));
    rows * (4 * spec.vocab + 2 * spec.hidden + 8 * CANDIDATES + 64)
}

/// What the answers of all steps share.
#[derive(Default)]
pub(super) struct Answers {
    calibrations: Vec<Arc<Whitening>>,
}

/// A calibration on the card.
struct Whitening {
    source: Arc<Calibration>,
    exponents: Memory,
    means: Memory,
}

/// Rows that are read at once. First those whose logits the host reads, then those that the card
/// reads, then those without logits.
pub(super) struct Chunk<'a, 'b> {
    asks: &'a [RowAsk<'b>],
    /// The ask of each place.
    pub(super) order: Vec<usize>,
    /// Places whose logits the host reads.
    hosted: usize,
    /// Places with logits.
    pub(super) needy: usize,
    /// The row of each place, in the inputs.
    pub(super) rows: At,
    /// Whether final rows go to the host.
    has_finals: bool,
    ones: At,
    inverses: At,
    /// Whether a row is reduced at another temperature than 1.
    is_scaled: bool,
    rules: At,
    draws: bool,
    top: usize,
    queries: At,
    /// Queries of each place that the card reads.
    query_ranges: Vec<std::ops::Range<usize>>,
    proofs: Vec<Proofs>,
}

/// Sketches of one calibration and profile.
struct Proofs {
    whitening: Arc<Whitening>,
    profile: Profile,
    table: At,
}

/// Where results are.
pub(super) struct Places {
    tokens: At,
    maxima: [At; 2],
    sums: [At; 2],
    top_ids: At,
    top_logits: At,
    found: At,
    ranks: At,
    sketches: At,
    hashes: At,
    pub(super) finals: At,
    pub(super) logits: At,
}

impl Answers {
    /// Cuts `asks` into chunks and pushes what the card has to know of them.
    pub(super) fn plan<'a, 'b>(
        &mut self,
        weights: &CudaWeights,
        asks: &'a [RowAsk<'b>],
        inputs: &mut Inputs,
    ) -> Result<Vec<Chunk<'a, 'b>>, CudaError> {
        let at_once = logit_rows_max(weights.spec.vocab);
        asks.chunks(at_once).map(|asks| self.chunk(weights, asks, inputs)).collect()
    }

    fn chunk<'a, 'b>(
        &mut self,
        weights: &CudaWeights,
        asks: &'a [RowAsk<'b>],
        inputs: &mut Inputs,
    ) -> Result<Chunk<'a, 'b>, CudaError> {
        let mut order: Vec<usize> = (0..asks.len()).collect();
        order.sort_by_key(|i| match (asks[*i].needs_logits(), is_for_host(&asks[*i])) {
            (true, true) => 0,
            (true, false) => 1,
            (false, _) => 2,
        });
        let count = |test: &dyn Fn(&RowAsk<'_>) -> bool| asks.iter().filter(|a| test(a)).count();
        let needy = count(&|ask| ask.needs_logits());
        let hosted = count(&|ask| ask.needs_logits() && is_for_host(ask));
        let has_finals = asks.iter().any(|ask| {
            let is_bare = ask.prover.is_some_and(|prover| prover.residue().is_none());
            let is_hosted = ask.needs_logits() && is_for_host(ask) && ask.prover.is_some();
            ask.hidden || is_bare || is_hosted
        });
        let rows: Vec<u32> = order.iter().map(|i| asks[*i].row as u32).collect();
        let read: Vec<&RowAsk<'_>> = order[..needy].iter().map(|i| &asks[*i]).collect();
        let scores = |place: usize| read[place].scores.as_ref().filter(|_| place >= hosted);
        let temperature =
            |place: usize| scores(place).map_or(1.0, |s| s.sampling.logprob_temperature());
        let inverses: Vec<f32> = (0..needy).map(|place| 1.0 / temperature(place)).collect();
        let rules: Vec<Rule> =
            (0..needy).map(|place| rule(read[place].position, scores(place))).collect();
        let is_drawn = |s: &Scores<'_>| s.token == Token::Drawn;
        let mut top = (0..needy).filter_map(scores).map(|s| s.top).max().unwrap_or(0);
        if (0..needy).filter_map(scores).any(|s| is_drawn(s) && is_truncated(s, weights)) {
            top = CANDIDATES;
        }
        let (mut queries, mut query_ranges) = (Vec::new(), Vec::new());
        for place in 0..needy {
            let first = queries.len();
            let tokens = scores(place).map_or(Vec::new(), wanted_tokens);
            queries.extend(tokens.into_iter().map(|token| Query { row: place as u32, token }));
            query_ranges.push(first..queries.len());
        }
        Ok(Chunk {
            asks,
            hosted,
            needy,
            rows: inputs.push(&rows),
            has_finals,
            ones: inputs.push(&vec![1.0_f32; needy]),
            is_scaled: inverses.iter().any(|x| *x != 1.0),
            inverses: inputs.push(&inverses),
            rules: inputs.push(&rules),
            draws: (0..needy).filter_map(scores).any(is_drawn),
            top,
            queries: inputs.push(&queries),
            query_ranges,
            proofs: self.proofs(weights, asks, &order, hosted, inputs)?,
            order,
        })
    }

    /// Tables of the rows that the card proves, by calibration and profile.
    fn proofs(
        &mut self,
        weights: &CudaWeights,
        asks: &[RowAsk<'_>],
        order: &[usize],
        hosted: usize,
        inputs: &mut Inputs,
    ) -> Result<Vec<Proofs>, CudaError> {
        let mut groups: BTreeMap<(usize, usize), (Arc<Calibration>, Profile, Vec<Entry>)> =
            BTreeMap::new();
        let nobody = Entry { sketch_key: 0, exact_key: 0, position: 0, slot: -1 };
        for (place, ask) in order.iter().map(|i| &asks[*i]).enumerate().skip(hosted) {
            let Some((profile, keys, calibration)) = ask.prover.and_then(|p| p.residue()) else {
                continue;
            };
            let key = (Arc::as_ptr(calibration) as usize, profile.projections());
            let (_, _, table) = groups
                .entry(key)
                .or_insert_with(|| (Arc::clone(calibration), profile, vec![nobody; order.len()]));
            table[place] = Entry {
                sketch_key: keys.sketch,
                exact_key: keys.exact,
                position: ask.position,
                slot: place as i32,
            };
        }
        let of_group = |(calibration, profile, table): (Arc<Calibration>, Profile, Vec<Entry>)| {
            let whitening = self.whitening(weights, &calibration)?;
            Ok(Proofs { whitening, profile, table: inputs.push(&table) })
        };
        groups.into_values().map(of_group).collect()
    }

    fn whitening(
        &mut self,
        weights: &CudaWeights,
        calibration: &Arc<Calibration>,
    ) -> Result<Arc<Whitening>, CudaError> {
        if calibration.channels() != weights.spec.hidden {
            let channels = calibration.channels();
            return Err(CudaError::Shape(format!("a calibration of {channels} channels")));
        }
        let same = |w: &&Arc<Whitening>| Arc::ptr_eq(&w.source, calibration);
        if let Some(whitening) = self.calibrations.iter().find(same) {
            return Ok(Arc::clone(whitening));
        }
        let exponents = weights.card.allocate(calibration.exponents.len(), "a calibration")?;
        exponents.write(0, &calibration.exponents)?;
        let means = weights.card.allocate(2 * calibration.means.len(), "a calibration")?;
        means.write(0, &calibration.means)?;
        weights.card.settle()?;
        let source = Arc::clone(calibration);
        if self.calibrations.len() == CALIBRATIONS_MAX {
            self.calibrations.remove(0);
        }
        self.calibrations.push(Arc::new(Whitening { source, exponents, means }));
        Ok(Arc::clone(&self.calibrations[self.calibrations.len() - 1]))
    }
}

/// Whether the host reads an ask's logits.
fn is_for_host(ask: &RowAsk<'_>) -> bool {
    let Some(scores) = &ask.scores else { return ask.logits };
    let is_drawn_otherwise =
        scores.token == Token::Drawn && !scores.sampling.is_greedy() && scores.sampling.top_a > 0.0;
    ask.logits
        || !scores.is_plain()
        || matches!(scores.token, Token::Judged(_))
        || scores.top > CANDIDATES
        || is_drawn_otherwise
}

/// Whether a draw takes its tokens from the largest logits.
fn is_truncated(scores: &Scores<'_>, weights: &CudaWeights) -> bool {
    let s = scores.sampling;
    let has_limit = s.top_k > 0 && s.top_k < weights.spec.vocab;
    !s.is_greedy() && (has_limit || s.top_p < 1.0 || s.min_p > 0.0)
}

fn rule(position: u32, scores: Option<&Scores<'_>>) -> Rule {
    let greedy =
        Rule { key: 0, position, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, unused: 0 };
    match scores {
        Some(Scores { token: Token::Drawn, sampling: s, .. }) => Rule {
            key: s.noise_key,
            temperature: s.temperature,
            top_k: i32::try_from(s.top_k).unwrap_or(i32::MAX),
            top_p: s.top_p,
            min_p: s.min_p,
            ..greedy
        },
        _ => greedy,
    }
}

/// The tokens whose logits and ranks an answer needs: its own, `ids`, `near`, `ends`.
fn wanted_tokens(scores: &Scores<'_>) -> Vec<u32> {
    let own = match scores.token {
        Token::Drawn => UNKNOWN,
        Token::Known(token) | Token::Judged(token) => token,
    };
    let mut tokens = vec![own];
    tokens.extend(&scores.ids);
    tokens.extend(near_tokens(scores));
    tokens.extend(scores.ends);
    tokens
}

/// The tokens of `near`, ascending, each once.
fn near_tokens(scores: &Scores<'_>) -> Vec<u32> {
    let mut ids = scores.near.as_ref().map_or(Vec::new(), |near| near.ids.clone());
    ids.sort_unstable();
    ids.dedup();
    ids
}

impl Chunk<'_, '_> {
    /// Places for the results, what goes to the host in one copy first.
    pub(super) fn reserve(&self, weights: &CudaWeights, outputs: &mut Outputs) -> Places {
        let (rows, needy) = (self.order.len(), self.needy);
        let queries = self.query_ranges.last().map_or(0, |range| range.end);
        Places {
            tokens: outputs.reserve::<u32>(needy),
            maxima: [outputs.reserve::<f32>(needy), outputs.reserve::<f32>(needy)],
            sums: [outputs.reserve::<f64>(needy), outputs.reserve::<f64>(needy)],
            top_ids: outputs.reserve::<u32>(needy * self.top),
            top_logits: outputs.reserve::<f32>(needy * self.top),
            found: outputs.reserve::<f32>(queries),
            ranks: outputs.reserve::<u32>(queries),
            sketches: outputs.reserve::<u32>(rows),
            hashes: outputs.reserve::<u64>(rows),
            finals: outputs.reserve::<u16>(rows * weights.spec.hidden),
            logits: outputs.reserve::<f32>(needy * weights.spec.vocab),
        }
    }

    /// Puts the kernels that read the rows on the stream, and the copy of what they find.
    pub(super) fn launch(
        &self,
        step: &Step<'_>,
        outputs: &mut Outputs,
        places: &Places,
    ) -> Result<(), CudaError> {
        self.launch_proofs(step, outputs, places)?;
        if self.needy > self.hosted {
            self.launch_scores(step, outputs, places)?;
        }
        let end = match (self.hosted, self.has_finals) {
            (0, false) => places.finals,
            (0, true) => places.logits,
            (hosted, _) => places.logits.plus(4 * hosted * step.weights.spec.vocab),
        };
        outputs.fetch(At::default(), end.bytes())
    }

    fn launch_proofs(
        &self,
        step: &Step<'_>,
        outputs: &Outputs,
        places: &Places,
    ) -> Result<(), CudaError> {
        let at = |place| outputs.pointer(place);
        for Proofs { whitening, profile, table } in &self.proofs {
            let channels = step.weights.spec.hidden as i32;
            let shift = profile.shift(whitening.source.shift) as i32;
            let args = args![
                at(places.finals),
                &whitening.exponents,
                &whitening.means,
                step.input(*table),
                at(places.sketches),
                at(places.hashes),
                channels,
                shift,
                profile.projections() as i32,
                step.is_f16(),
            ];
            step.stream.launch("sketch_rows", [self.order.len(), 1, 1], 128, 0, args)?;
        }
        Ok(())
    }

    fn launch_scores(
        &self,
        step: &Step<'_>,
        outputs: &Outputs,
        places: &Places,
    ) -> Result<(), CudaError> {
        let at = |place| outputs.pointer(place);
        let (vocab, rows) = (step.weights.spec.vocab, [self.needy, 1, 1]);
        let (logits, v) = (at(places.logits), vocab as i32);
        let shared = 4 * vocab.div_ceil(SUM_CHUNK);
        for (i, temperatures) in [self.ones, self.inverses].into_iter().enumerate() {
            if i == 1 && !self.is_scaled {
                continue;
            }
            let (maxima, sums) = (at(places.maxima[i]), at(places.sums[i]));
            let args = args![logits, step.input(temperatures), maxima, sums, v];
            step.stream.launch("sum_exp", rows, 256, shared, args)?;
        }
        let (ids, top) = (at(places.top_ids), at(places.top_logits));
        if self.top > 0 {
            let args = args![logits, ids, top, v, self.top as i32];
            step.stream.launch("largest", rows, 256, 0, args)?;
        }
        let tokens = at(places.tokens);
        if self.draws {
            let sums = at(places.sums[usize::from(self.is_scaled)]);
            let rules = step.input(self.rules);
            let args = args![logits, rules, ids, top, sums, tokens, v, self.top as i32];
            step.stream.launch("draw", rows, 256, 0, args)?;
        }
        let queries = self.query_ranges.last().map_or(0, |range| range.end);
        let (found, ranks) = (at(places.found), at(places.ranks));
        let args = args![logits, step.input(self.queries), tokens, found, ranks, v];
        step.stream.launch("look_up", [queries, 1, 1], 256, 0, args)
    }

    /// Waits for the copy, and answers every ask of the chunk in its order.
    pub(super) fn collect(
        &self,
        weights: &CudaWeights,
        pool: &Pool,
        places: &Places,
        outputs: &mut Outputs,
    ) -> Result<Vec<RowResult>, CudaError> {
        let found = Found::read(self, places, outputs)?;
        let (hidden, vocab) = (weights.spec.hidden, weights.spec.vocab);
        let finals: Vec<u16> = match self.has_finals {
            true => outputs.read(places.finals, self.order.len() * hidden)?,
            false => Vec::new(),
        };
        // Draws that the card left to the host.
        let left: Vec<usize> =
            (self.hosted..self.needy).filter(|p| found.is_left(self, *p)).collect();
        for place in &left {
            outputs.fetch(places.logits.plus(4 * place * vocab), 4 * vocab)?;
        }
        let on_host: Vec<usize> = (0..self.hosted).chain(left).collect();
        let mut rows = Vec::with_capacity(on_host.len());
        for place in &on_host {
            rows.push(outputs.read::<f32>(places.logits.plus(4 * place * vocab), vocab)?);
        }
        let bits = |place: usize| match self.has_finals {
            true => &finals[place * hidden..(place + 1) * hidden],
            false => &[],
        };
        let read_on_host = |i: usize| {
            let (place, mut row) = (on_host[i], rows[i].clone());
            let ask = &self.asks[self.order[place]];
            let values: Vec<f32> = bits(place).iter().map(|b| weights.dtype.widen(*b)).collect();
            let hidden = HiddenRow { bits: bits(place), values: &values };
            // A row that the card proved keeps that proof.
            let ask = match place < self.hosted {
                true => ask.clone(),
                false => RowAsk { prover: None, hidden: false, ..ask.clone() },
            };
            let answered = || answer(pool.isa(), &ask, hidden, Some(&mut row));
            catch_unwind(AssertUnwindSafe(answered)).unwrap_or(Err(RowFault::Panicked))
        };
        let from_host: Vec<RowResult> = match on_host.len() {
            0 => Vec::new(),
            count => pool.turn().map(count, read_on_host),
        };
        let mut by_host: BTreeMap<usize, RowResult> =
            on_host.iter().copied().zip(from_host).collect();
        let mut results = vec![Ok(RowReport::default()); self.asks.len()];
        for (place, index) in self.order.iter().enumerate() {
            let ask = &self.asks[*index];
            results[*index] = match by_host.remove(&place) {
                Some(result) if place < self.hosted => result,
                scored => {
                    let report = self.report(weights, ask, place, bits(place), &found);
                    match scored {
                        Some(result) => {
                            result.map(|by_host| RowReport { scores: by_host.scores, ..report })
                        }
                        None => self
                            .scores(ask, place, &found)
                            .map(|scores| RowReport { scores, ..report }),
                    }
                }
            };
        }
        Ok(results)
    }

    /// The parts of a report that follow from the final row.
    fn report(
        &self,
        weights: &CudaWeights,
        ask: &RowAsk<'_>,
        place: usize,
        bits: &[u16],
        found: &Found,
    ) -> RowReport {
        let proof = ask.prover.map(|prover| match prover.residue() {
            Some(_) => RowData::Residue {
                sketch: found.sketches[place].to_le_bytes(),
                exact: found.hashes[place],
            },
            None => {
                let values: Vec<f32> = bits.iter().map(|b| weights.dtype.widen(*b)).collect();
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
                let i = usize::from(self.is_scaled);
                let temperature = scores.sampling.logprob_temperature();
                LogSumExp::of_sum(found.maxima[i][place], found.sums[i][place], temperature)
            }
        };
        let looked_up = self.query_ranges[place].clone();
        let mut known = looked_up.map(|i| (sum.logprob(found.found[i]), found.ranks[i]));
        let mut ranked = |token: u32| {
            let (logprob, rank) = known.next().unwrap_or_default();
            Ranked { token, logprob, rank }
        };
        let token = ranked(match scores.token {
            Token::Drawn => found.tokens[place],
            Token::Known(token) | Token::Judged(token) => token,
        });
        let ids = scores.ids.iter().map(|id| ranked(*id)).collect();
        let near = near_tokens(scores).into_iter().map(|id| (id, ranked(id).logprob)).collect();
        let end_rank = scores.ends.iter().map(|id| ranked(*id).rank).min();
        let top = found.top(self.top, place, scores.top, &sum);
        Ok(Some(Scored { token, top, ids, near, end_rank, margin: None }))
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
        chunk: &Chunk<'_, '_>,
        places: &Places,
        outputs: &mut Outputs,
    ) -> Result<Self, CudaError> {
        let (rows, needy) = (chunk.order.len(), chunk.needy);
        let queries = chunk.query_ranges.last().map_or(0, |range| range.end);
        Ok(Self {
            tokens: outputs.read(places.tokens, needy)?,
            maxima: [
                outputs.read(places.maxima[0], needy)?,
                outputs.read(places.maxima[1], needy)?,
            ],
            sums: [outputs.read(places.sums[0], needy)?, outputs.read(places.sums[1], needy)?],
            top_ids: outputs.read(places.top_ids, needy * chunk.top)?,
            top_logits: outputs.read(places.top_logits, needy * chunk.top)?,
            found: outputs.read(places.found, queries)?,
            ranks: outputs.read(places.ranks, queries)?,
            sketches: outputs.read(places.sketches, rows)?,
            hashes: outputs.read(places.hashes, rows)?,
        })
    }

    /// Whether the draw of a place needs more than the card looked at.
    fn is_left(&self, chunk: &Chunk<'_, '_>, place: usize) -> bool {
        let scores = chunk.asks[chunk.order[place]].scores.as_ref();
        scores.is_some_and(|s| s.token == Token::Drawn) && self.tokens[place] == UNKNOWN
    }

    /// The `count` largest of the `stride` that were sorted.
    fn top(&self, stride: usize, place: usize, count: usize, sum: &LogSumExp) -> Vec<Ranked> {
        let at = place * stride..place * stride + count;
        let ids = self.top_ids[at.clone()].iter().zip(&self.top_logits[at]);
        let top: Vec<_> = ids.take_while(|(id, _)| **id != UNKNOWN).collect();
        let above = |logit: f32| top.partition_point(|(_, other)| **other > logit) as u32;
        let ranked = top.iter().map(|(id, logit)| Ranked {
            token: **id,
            logprob: sum.logprob(**logit),
            rank: 1 + above(**logit),
        });
        ranked.collect()
    }
}
