//! Decides what a card has to know to answer the asks of a step, and which of them are for the
//! host.

use super::error::CudaError;
use super::launch::{Entry, Memory, Query, Rule, Stream};
use super::memory::{Inputs, Offset, Outputs, grained};
use super::weights::CudaWeights;
use crate::models::hosted::Why;
use crate::models::pass::{RowAsk, Scores, Token, logit_rows_max};
use crate::proof::residue::{Calibration, ResidueBits};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of logits on the card at once.
const CUDA_LOGITS_BYTES_MAX: usize = 64 << 20;
/// The largest logits that a truncated draw starts from, and the most alternatives.
const CANDIDATES: usize = 256;
/// A token that is drawn, and a draw that the host has to make.
pub(super) const UNKNOWN: u32 = u32::MAX;
/// Calibrations that stay on the card: a model has one.
const CALIBRATIONS_MAX: usize = 4;

/// Bytes of logits and results for steps of `rows` rows.
pub(super) fn answer_bytes(spec: &crate::models::spec::Spec, rows: usize) -> usize {
    let rows = rows.min(logit_rows_max(spec.vocab, CUDA_LOGITS_BYTES_MAX));
    grained(rows * (4 * spec.vocab + 2 * spec.hidden + 8 * CANDIDATES + 64))
}

/// What the answers of all steps share.
pub(super) struct Answers {
    /// The pass's own, by which calibrations go to the card.
    stream: Stream,
    calibrations: Vec<Arc<Whitening>>,
}

/// A calibration on the card.
pub(super) struct Whitening {
    pub(super) source: Arc<Calibration>,
    pub(super) exponents: Memory,
    pub(super) means: Memory,
}

/// Rows that are read at once. First those whose logits the host reads, then those that the card
/// reads, then those without logits.
pub(super) struct AskChunk<'a, 'b> {
    pub(super) asks: &'a [RowAsk<'b>],
    /// The ask of each place.
    pub(super) order: Vec<usize>,
    /// Places whose logits the host reads.
    pub(super) hosted: usize,
    /// Places with logits.
    pub(super) with_logits: usize,
    /// The row of each place, in the inputs.
    pub(super) rows: Offset,
    /// Whether final rows go to the host.
    pub(super) has_finals: bool,
    pub(super) ones: Offset,
    pub(super) inverses: Offset,
    /// Whether a row is reduced at another temperature than 1.
    pub(super) is_scaled: bool,
    pub(super) rules: Offset,
    pub(super) draws: bool,
    pub(super) top: usize,
    pub(super) queries: Offset,
    /// Queries of each place that the card reads.
    pub(super) query_ranges: Vec<Range<usize>>,
    pub(super) proofs: Vec<SketchGroup>,
}

/// Sketches of one calibration and number of bits.
pub(super) struct SketchGroup {
    pub(super) whitening: Arc<Whitening>,
    pub(super) bits: ResidueBits,
    pub(super) table: Offset,
}

/// Rows with one calibration and number of bits: an entry for each place of their chunk.
struct Group {
    calibration: Arc<Calibration>,
    bits: ResidueBits,
    table: Vec<Entry>,
}

/// Where results are.
pub(super) struct Places {
    pub(super) tokens: Offset,
    pub(super) maxima: [Offset; 2],
    pub(super) sums: [Offset; 2],
    pub(super) top_ids: Offset,
    pub(super) top_logits: Offset,
    pub(super) found: Offset,
    pub(super) ranks: Offset,
    pub(super) sketches: Offset,
    pub(super) hashes: Offset,
    pub(super) finals: Offset,
    pub(super) logits: Offset,
}

impl Answers {
    pub(super) fn new(stream: &Stream) -> Self {
        Self { stream: stream.clone(), calibrations: Vec::new() }
    }

    /// Cuts `asks` into chunks and pushes what the card has to know of them.
    pub(super) fn plan<'a, 'b>(
        &mut self,
        weights: &CudaWeights,
        asks: &'a [RowAsk<'b>],
        inputs: &mut Inputs,
    ) -> Result<Vec<AskChunk<'a, 'b>>, CudaError> {
        let at_once = logit_rows_max(weights.spec.vocab, CUDA_LOGITS_BYTES_MAX);
        asks.chunks(at_once).map(|asks| self.chunk(weights, asks, inputs)).collect()
    }

    fn chunk<'a, 'b>(
        &mut self,
        weights: &CudaWeights,
        asks: &'a [RowAsk<'b>],
        inputs: &mut Inputs,
    ) -> Result<AskChunk<'a, 'b>, CudaError> {
        let mut order: Vec<usize> = (0..asks.len()).collect();
        order.sort_by_key(|i| match (asks[*i].needs_logits(), is_for_host(&asks[*i])) {
            (true, true) => 0,
            (true, false) => 1,
            (false, _) => 2,
        });
        let count = |test: &dyn Fn(&RowAsk<'_>) -> bool| asks.iter().filter(|a| test(a)).count();
        let with_logits = count(&|ask| ask.needs_logits());
        let hosted = count(&|ask| ask.needs_logits() && is_for_host(ask));
        let has_finals = asks.iter().any(|ask| {
            let is_bare = ask.prover.is_some_and(|prover| prover.residue().is_none());
            let is_hosted = ask.needs_logits() && is_for_host(ask) && ask.prover.is_some();
            ask.hidden || is_bare || is_hosted
        });
        let rows: Vec<u32> = order.iter().map(|i| asks[*i].row as u32).collect();
        let read: Vec<&RowAsk<'_>> = order[..with_logits].iter().map(|i| &asks[*i]).collect();
        let scores = |place: usize| read[place].scores.as_ref().filter(|_| place >= hosted);
        let temperature =
            |place: usize| scores(place).map_or(1.0, |s| s.sampling.logprob_temperature());
        let inverses: Vec<f32> = (0..with_logits).map(|place| 1.0 / temperature(place)).collect();
        let rules: Vec<Rule> =
            (0..with_logits).map(|place| rule(read[place].position, scores(place))).collect();
        let is_drawn = |s: &Scores<'_>| s.token == Token::Drawn;
        let mut top = (0..with_logits).filter_map(scores).map(|s| s.top).max().unwrap_or(0);
        if (0..with_logits).filter_map(scores).any(|s| is_drawn(s) && is_truncated(s, weights)) {
            top = CANDIDATES;
        }
        let (mut queries, mut query_ranges) = (Vec::new(), Vec::new());
        for place in 0..with_logits {
            let first = queries.len();
            let tokens = scores(place).map_or(Vec::new(), wanted_tokens);
            queries.extend(tokens.into_iter().map(|token| Query { row: place as u32, token }));
            query_ranges.push(first..queries.len());
        }
        Ok(AskChunk {
            asks,
            hosted,
            with_logits,
            rows: inputs.push(&rows),
            has_finals,
            ones: inputs.push(&vec![1.0_f32; with_logits]),
            is_scaled: inverses.iter().any(|x| *x != 1.0),
            inverses: inputs.push(&inverses),
            rules: inputs.push(&rules),
            draws: (0..with_logits).filter_map(scores).any(is_drawn),
            top,
            queries: inputs.push(&queries),
            query_ranges,
            proofs: self.proofs(weights, asks, &order, hosted, inputs)?,
            order,
        })
    }

    /// Tables of the rows that the card proves, by calibration and number of bits.
    fn proofs(
        &mut self,
        weights: &CudaWeights,
        asks: &[RowAsk<'_>],
        order: &[usize],
        hosted: usize,
        inputs: &mut Inputs,
    ) -> Result<Vec<SketchGroup>, CudaError> {
        let mut groups: BTreeMap<(usize, usize), Group> = BTreeMap::new();
        let nobody = Entry { sketch_key: 0, exact_key: 0, position: 0, slot: -1 };
        for (place, ask) in order.iter().map(|i| &asks[*i]).enumerate().skip(hosted) {
            let Some((bits, keys, calibration)) = ask.prover.and_then(|p| p.residue()) else {
                continue;
            };
            let key = (Arc::as_ptr(calibration) as usize, bits.projections());
            let group = groups.entry(key).or_insert_with(|| Group {
                calibration: Arc::clone(calibration),
                bits,
                table: vec![nobody; order.len()],
            });
            group.table[place] = Entry {
                sketch_key: keys.sketch,
                exact_key: keys.exact,
                position: ask.position,
                slot: place as i32,
            };
        }
        let of_group = |Group { calibration, bits, table }| {
            let whitening = self.whitening(weights, &calibration)?;
            Ok(SketchGroup { whitening, bits, table: inputs.push(&table) })
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
        let exponents = Memory::new(&weights.card, calibration.exponents.len(), "a calibration")?;
        exponents.write(&self.stream, 0, &calibration.exponents)?;
        let means = Memory::new(&weights.card, 2 * calibration.means.len(), "a calibration")?;
        means.write(&self.stream, 0, &calibration.means)?;
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
    why_hosted(ask).is_some()
}

/// Why the host reads an ask's logits, where it does from the start.
pub(super) fn why_hosted(ask: &RowAsk<'_>) -> Option<Why> {
    if ask.logits {
        return Some(Why::Asked);
    }
    let scores = ask.scores.as_ref()?;
    let is_drawn = scores.token == Token::Drawn && !scores.sampling.is_greedy();
    if matches!(scores.token, Token::Measured(_)) {
        Some(Why::Margin)
    } else if scores.near.as_ref().is_some_and(|near| near.reach.is_some()) {
        Some(Why::Search)
    } else if !scores.is_plain() {
        Some(Why::Rules)
    } else if scores.top > CANDIDATES {
        Some(Why::Alternatives)
    } else if is_drawn && scores.sampling.top_a > 0.0 {
        Some(Why::TopA)
    } else {
        None
    }
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
        Token::Known(token) | Token::Measured(token) => token,
    };
    let mut tokens = vec![own];
    tokens.extend(&scores.ids);
    tokens.extend(near_tokens(scores));
    tokens.extend(scores.ends);
    tokens
}

/// The tokens of `near`, ascending, each once.
pub(super) fn near_tokens(scores: &Scores<'_>) -> Vec<u32> {
    let mut ids = scores.near.as_ref().map_or(Vec::new(), |near| near.ids.clone());
    ids.sort_unstable();
    ids.dedup();
    ids
}

impl AskChunk<'_, '_> {
    /// Tokens that are looked up.
    pub(super) fn queries(&self) -> usize {
        self.query_ranges.last().map_or(0, |range| range.end)
    }

    /// Places for the results, what goes to the host in one copy first.
    pub(super) fn reserve(&self, weights: &CudaWeights, outputs: &mut Outputs) -> Places {
        let (rows, with_logits) = (self.order.len(), self.with_logits);
        let queries = self.queries();
        Places {
            tokens: outputs.reserve::<u32>(with_logits),
            maxima: [outputs.reserve::<f32>(with_logits), outputs.reserve::<f32>(with_logits)],
            sums: [outputs.reserve::<f64>(with_logits), outputs.reserve::<f64>(with_logits)],
            top_ids: outputs.reserve::<u32>(with_logits * self.top),
            top_logits: outputs.reserve::<f32>(with_logits * self.top),
            found: outputs.reserve::<f32>(queries),
            ranks: outputs.reserve::<u32>(queries),
            sketches: outputs.reserve::<u32>(rows),
            hashes: outputs.reserve::<u64>(rows),
            finals: outputs.reserve::<u16>(rows * weights.spec.hidden),
            logits: outputs.reserve::<f32>(with_logits * weights.spec.vocab),
        }
    }
}
