//! Reported log-probabilities beside ours: of the tokens themselves, and of their alternatives.
//!
//! Where hidden rows are equal bit for bit, so is what follows from them. Elsewhere a report may be
//! off as far as logits of another stack are: limits on margins, which are differences of logits,
//! say how far that is, and reports get several times as much.

use super::answer::{Reported, Top, id_of_name};
use super::report::ChunkEvidence;
use super::report::RowEvidence;
use super::{Claim, Limits, Reason, Rejection, Stop};
use crate::engine::request::{LogprobMode, Request};
use crate::models::Model;
use crate::models::tokenizer::TextTokenizer;
use crate::ops::lanes::Isa;
use crate::ops::logits::{LogSumExp, rank, top_k};
use crate::proof::{CHUNK_ROWS, Scheme};
use crate::wire::openai::json_logprob;

/// What decimal digits may lose of a number.
const EXACT: f64 = 1e-9;
/// A single report may be off by so many times the limit on a single margin.
const SINGLE_PER_MARGIN: f64 = 4.0;
/// Reports may be off by so many times that limit on average.
const MEAN_PER_MARGIN: f64 = 0.5;
/// Below this all log-probabilities are the same nothing to another stack.
const FLOOR: f64 = -30.0;
/// How far below the last of ours, in nats, the text of an alternative is looked for.
const SEARCH: f64 = 4.0;

/// The reported alternatives of one output.
pub(super) struct Tops<'a> {
    reported: &'a [Vec<Top>],
    tokens: &'a [u32],
    request: &'a Request,
    tokenizer: &'a TextTokenizer,
}

impl<'a> Tops<'a> {
    pub(super) fn new(claim: &Claim<'a>, model: &'a Model) -> Self {
        Self {
            reported: &claim.answer.tops,
            tokens: &claim.answer.ids,
            request: claim.request,
            tokenizer: &model.tokenizer,
        }
    }

    /// How far the worst alternative of token `index` is from the truth.
    pub(super) fn error(
        &self,
        isa: Isa,
        index: usize,
        row: &[f32],
        lse: &LogSumExp,
    ) -> Option<f64> {
        let top = self.reported.get(index).filter(|top| !top.is_empty())?;
        let temperature = match self.request.logprob_mode {
            LogprobMode::Raw => 1.0,
            LogprobMode::Scaled => self.request.sampling.logprob_temperature(),
        };
        let (own, count) = (self.tokens[index], self.request.top_logprobs);
        let scored = Scored { isa, row, lse, temperature, own, count };
        Some(scored.error(top, &self.request.logprob_ids, self.tokenizer))
    }
}

/// A row of ours, and the token that followed it.
struct Scored<'a> {
    isa: Isa,
    row: &'a [f32],
    lse: &'a LogSumExp,
    temperature: f32,
    own: u32,
    count: usize, // alternatives that were asked for
}

impl Scored<'_> {
    /// How far the worst alternative is from the truth: by its value, or by how much less probable
    /// it is than the last that should have been named. `asked` were asked for by their ids.
    fn error(&self, top: &[Top], asked: &[u32], tokenizer: &TextTokenizer) -> f64 {
        let best = top_k(self.isa, self.row, self.count);
        let last = best.last().map(|(_, logit)| *logit);
        let is_asked = |id: u32| id == self.own || asked.contains(&id);
        // Each stands for a token of its own.
        let mut near = self.near(top, last, &is_asked);
        let mut worst = 0.0_f64;
        for top in top {
            let error = |id: u32| {
                let logit = *self.row.get(id as usize)?;
                let value = (json_logprob(self.lse.logprob(logit)) - top.logprob).abs();
                let short = match last {
                    _ if is_asked(id) => 0.0,
                    Some(last) if last > logit => self.lse.logprob(last) - self.lse.logprob(logit),
                    Some(_) => 0.0,
                    None => return None,
                };
                Some(value.max(short))
            };
            let found = near.iter().enumerate().filter(|(_, id)| is_named(tokenizer, **id, top));
            let found = found.filter_map(|(place, id)| Some((place, error(*id)?)));
            let Some((place, error)) = found.min_by(|a, b| a.1.total_cmp(&b.1)) else {
                return f64::INFINITY;
            };
            near.swap_remove(place);
            worst = worst.max(error);
        }
        worst
    }

    /// The tokens that alternatives may stand for.
    fn near(&self, top: &[Top], last: Option<f32>, is_asked: &dyn Fn(u32) -> bool) -> Vec<u32> {
        let ids = top.iter().map(|top| id_of_name(&top.name));
        if let Some(mut ids) = ids.collect::<Option<Vec<u32>>>() {
            ids.sort_unstable();
            ids.dedup();
            return ids;
        }
        let edge = last.map(|last| last - SEARCH as f32 * self.temperature);
        let is_near = |id: u32| edge.is_some_and(|edge| self.row[id as usize] >= edge);
        (0..self.row.len() as u32).filter(|id| is_asked(*id) || is_near(*id)).collect()
    }
}

fn is_named(tokenizer: &TextTokenizer, id: u32, top: &Top) -> bool {
    if let Some(named) = id_of_name(&top.name) {
        return named == id;
    }
    let own = tokenizer.bytes_of(id);
    match &top.bytes {
        Some(bytes) => bytes == own,
        None => own == top.name.as_bytes() || String::from_utf8_lossy(own) == top.name,
    }
}

/// Judges what was reported of a prompt. Its log-probabilities are always the model's own.
pub(super) struct PromptJudge<'a> {
    reported: &'a [Reported],
    request: &'a Request,
    tokenizer: &'a TextTokenizer,
    is_exact: bool,
    limit: f64,
}

impl<'a> PromptJudge<'a> {
    /// Beside the `proof` of the output, if there is one: where its first rows are ours, so are
    /// those before.
    pub(super) fn new(
        claim: &Claim<'a>,
        model: &'a Model,
        proof: Option<(Scheme, &[ChunkEvidence])>,
        limits: &Limits,
    ) -> Self {
        let is_exact = limits.exact || proof.is_some_and(|proof| is_exact(proof, 0));
        Self {
            reported: &claim.answer.prompt,
            request: claim.request,
            tokenizer: &model.tokenizer,
            is_exact,
            limit: single(is_exact, limits),
        }
    }

    /// Sets everything that was reported at `place` beside our row.
    ///
    /// # Errors
    /// What is too far off.
    pub(super) fn check(&self, isa: Isa, place: usize, row: &[f32]) -> Result<(), Stop> {
        let lse = LogSumExp::new(isa, row, 1.0);
        if !lse.is_finite() {
            return Err(Stop::Fault(format!("our logits at position {place} are not finite")));
        }
        let own = self.request.prompt[place + 1];
        for reported in self.reported.iter().filter(|r| r.place == place) {
            // Only the first choice of a prompt was asked for its rows; all repeat them.
            let count = reported.top.len();
            let scored = Scored { isa, row, lse: &lse, temperature: 1.0, own, count };
            let value = lse.logprob(row[own as usize]);
            let value = reported.logprob.map_or(0.0, |r| distance(r, value, self.is_exact));
            let top = scored.error(&reported.top, &self.request.logprob_ids, self.tokenizer);
            let error = value.max(top);
            let is_ranked = !self.is_exact || are_ranks(row, reported);
            if error.is_nan() || error > self.limit || !is_ranked {
                let what = format!("what is reported of the prompt's token {}", place + 1);
                let what = match is_ranked {
                    true => format!("{what} is off by {error:.4} nats, at most {}", self.limit),
                    false => format!("{what} has wrong ranks"),
                };
                return Err(Rejection::new(Reason::LogprobMismatch, what).into());
            }
        }
        Ok(())
    }
}

fn are_ranks(row: &[f32], reported: &Reported) -> bool {
    reported.top.iter().zip(&reported.ranks).all(|(top, sent)| {
        let id = id_of_name(&top.name).filter(|id| (*id as usize) < row.len());
        id.is_some_and(|id| u64::from(rank(row, id)) == *sent)
    })
}

/// How far a single report may be off.
fn single(is_exact: bool, limits: &Limits) -> f64 {
    if is_exact { EXACT } else { SINGLE_PER_MARGIN * limits.margin }
}

/// Judges what was reported for the rows that were scored, beside the `proof` of their hidden rows,
/// if there is one. Without one, Targon's own rule judges the tokens.
///
/// # Errors
/// The first report that is too far off, or their mean.
pub(super) fn check(
    rows: &[RowEvidence],
    proof: Option<(Scheme, &[ChunkEvidence])>,
    limits: &Limits,
) -> Result<(), Stop> {
    let (mut sum, mut count) = (0.0, 0_usize);
    for row in rows {
        let is_exact = limits.exact || proof.is_some_and(|proof| is_exact(proof, row.index));
        let limit = single(is_exact, limits);
        let own = row.reported.filter(|_| is_exact || proof.is_some());
        let own = own.map(|reported| distance(reported, row.logprob, is_exact));
        for (what, error) in [("log-probability", own), ("alternatives", row.top_error)] {
            if error.is_some_and(|e| e.is_nan() || e > limit) {
                let error = error.unwrap_or_default();
                let what = format!("the {what} of token {} are off by {error:.4}", row.index);
                let what = format!("{what} nats, at most {limit}");
                return Err(Rejection::new(Reason::LogprobMismatch, what).into());
            }
        }
        if let Some(error) = own.filter(|_| !is_exact) {
            (sum, count) = (sum + error, count + 1);
        }
    }
    let (mean, limit) = (sum / count.max(1) as f64, MEAN_PER_MARGIN * limits.margin);
    if mean > limit {
        let what = format!("{count} log-probabilities are off by {mean:.4} nats on average");
        let what = format!("{what}, at most {limit}");
        return Err(Rejection::new(Reason::LogprobMismatch, what).into());
    }
    Ok(())
}

/// Whether the rows that a token's chunk proves are ours: the whole rows, not only their largest
/// values.
fn is_exact((scheme, chunks): (Scheme, &[ChunkEvidence]), index: usize) -> bool {
    scheme != Scheme::Toploc && chunks.get(index / CHUNK_ROWS).is_some_and(|c| c.is_exact)
}

fn distance(reported: f64, own: f64, is_exact: bool) -> f64 {
    let own = json_logprob(own);
    match is_exact {
        true => (reported - own).abs(),
        false => (reported.max(FLOOR) - own.max(FLOOR)).abs(),
    }
}
