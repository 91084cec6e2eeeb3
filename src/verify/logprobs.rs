//! Compares reported log-probabilities with ours: of the tokens themselves, and of their
//! alternatives.
//!
//! Where hidden rows are equal bit for bit, so is what follows from them. Elsewhere a report may be
//! off as far as logits of another stack are: limits on margins, which are differences of logits,
//! say how far that is, and reports get several times as much. Reports that were scaled by the
//! temperature are as many times further off as it is below one.

use super::answer::{Reported, Top, id_of_name};
use super::report::ChunkEvidence;
use super::report::RowEvidence;
use super::{Claim, Limits, Reason, Rejection, Stop};
use crate::engine::request::Request;
use crate::models::Model;
use crate::models::pass::{LogprobMode, Near, RowAsk, Scored, Scores, Token};
use crate::models::tokenizer::TextTokenizer;
use crate::proof::{CHUNK_ROWS, Scheme};
use crate::wire::openai::json_logprob;
use std::collections::{BTreeMap, BTreeSet};

/// What decimal digits may lose of a number.
const EXACT: f64 = 1e-9;
/// A single report may be off by so many times the limit on a single margin.
const SINGLE_PER_MARGIN: f64 = 4.0;
/// Reports may be off by so many times that limit on average.
const MEAN_PER_MARGIN: f64 = 0.5;
/// And the worst alternatives of rows by so many times: each is the largest of several errors.
const TOPS_MEAN_PER_MARGIN: f64 = 1.0;
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
    vocab: usize,
}

impl<'a> Tops<'a> {
    pub(super) fn new(claim: &Claim<'a>, model: &'a Model) -> Self {
        Self {
            reported: &claim.answer.tops,
            tokens: &claim.answer.ids,
            request: claim.request,
            tokenizer: &model.text.tokenizer,
            vocab: model.text.vocab,
        }
    }

    /// How many of our most probable tokens the alternatives of token `index` are held against.
    pub(super) fn count(&self, index: usize) -> usize {
        self.of(index).map_or(0, |_| self.request.top_logprobs)
    }

    /// The tokens that the alternatives of token `index` may stand for.
    pub(super) fn near(&self, index: usize) -> Option<Near> {
        Some(self.meant(index).near(self.of(index)?, self.vocab))
    }

    /// How far the worst alternative of token `index` is from the truth.
    pub(super) fn error(&self, index: usize, scored: &Scored) -> Option<f64> {
        let count = self.request.top_logprobs;
        Some(self.meant(index).error(self.of(index)?, (count, scored), self.tokenizer))
    }

    fn meant(&self, index: usize) -> Meant<'a> {
        let search = SEARCH * nats_per_logit(self.request);
        Meant { own: self.tokens[index], asked: &self.request.logprob_ids, search }
    }

    fn of(&self, index: usize) -> Option<&'a [Top]> {
        self.reported.get(index).map(Vec::as_slice).filter(|top| !top.is_empty())
    }
}

/// What alternatives may stand for, besides our most probable tokens.
struct Meant<'a> {
    /// The token that followed.
    own: u32,
    /// Tokens that were asked for by their ids.
    asked: &'a [u32],
    /// How far below the last of ours, in nats, their texts are looked for.
    search: f64,
}

impl Meant<'_> {
    fn is_asked(&self, id: u32) -> bool {
        id == self.own || self.asked.contains(&id)
    }

    /// The tokens that `top` may stand for, of which a row is asked.
    fn near(&self, top: &[Top], vocab: usize) -> Near {
        match ids_of(top) {
            Some(mut ids) => {
                ids.retain(|id| (*id as usize) < vocab);
                Near { ids, reach: None }
            }
            None => {
                let ids = std::iter::once(self.own).chain(self.asked.iter().copied()).collect();
                Near { ids, reach: Some(self.search as f32) }
            }
        }
    }

    /// How far the worst of `top` is from the truth: by its value, or by how much less probable
    /// it is than the last that should have been named, which is number `count` of `scored`.
    fn error(
        &self,
        top: &[Top],
        (count, scored): (usize, &Scored),
        tokenizer: &TextTokenizer,
    ) -> f64 {
        let last = scored.top[..count.min(scored.top.len())].last().map(|last| last.logprob);
        // Each stands for a token of its own.
        let mut near = self.candidates(top, last, scored);
        let mut worst = 0.0_f64;
        for top in top {
            let error = |(id, logprob): (u32, f64)| {
                let value = (json_logprob(logprob) - top.logprob).abs();
                let short = match last {
                    _ if self.is_asked(id) => 0.0,
                    Some(last) => (last - logprob).max(0.0),
                    None => return None,
                };
                Some(value.max(short))
            };
            let found = near.iter().enumerate().filter(|(_, c)| is_named(tokenizer, c.0, top));
            let found = found.filter_map(|(place, c)| Some((place, error(*c)?)));
            let Some((place, error)) = found.min_by(|a, b| a.1.total_cmp(&b.1)) else {
                return f64::INFINITY;
            };
            near.swap_remove(place);
            worst = worst.max(error);
        }
        worst
    }

    /// Those of a row's near tokens that `top` may stand for; others may have been asked for too.
    fn candidates(&self, top: &[Top], last: Option<f64>, scored: &Scored) -> Vec<(u32, f64)> {
        let ids = ids_of(top);
        let is_meant = |(id, logprob): &(u32, f64)| match &ids {
            Some(ids) => ids.contains(id),
            None => self.is_asked(*id) || last.is_some_and(|last| *logprob >= last - self.search),
        };
        scored.near.iter().filter(|c| is_meant(c)).copied().collect()
    }
}

/// The ids of alternatives that are all named by their ids.
fn ids_of(top: &[Top]) -> Option<Vec<u32>> {
    top.iter().map(|top| id_of_name(&top.name)).collect()
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

/// Checks what was reported of a prompt. Its log-probabilities are always the model's own.
pub(super) struct PromptChecker<'a> {
    reported: &'a [Reported],
    request: &'a Request,
    tokenizer: &'a TextTokenizer,
    is_exact: bool,
    limit: f64,
    mean_limit: f64,
}

impl<'a> PromptChecker<'a> {
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
            tokenizer: &model.text.tokenizer,
            is_exact,
            limit: single(is_exact, limits),
            mean_limit: MEAN_PER_MARGIN * limits.margin,
        }
    }

    /// Sets everything that was reported of these rows beside what ours say.
    ///
    /// # Errors
    /// What is too far off, or all of it on average.
    pub(super) fn check(&self, rows: &BTreeMap<usize, Scored>) -> Result<(), Stop> {
        let mut values = MeanError::default();
        rows.iter().try_for_each(|(place, scored)| self.check_row(*place, scored, &mut values))?;
        values.check("log-probabilities of the prompt", self.mean_limit)
    }

    fn check_row(&self, place: usize, scored: &Scored, values: &mut MeanError) -> Result<(), Stop> {
        let (own, asked) = (self.request.prompt[place + 1], &self.request.logprob_ids);
        for reported in self.reported.iter().filter(|r| r.place == place) {
            let value = scored.token.logprob;
            let value = reported.logprob.map(|r| distance(r, value, self.is_exact));
            values.add(value);
            let value = value.unwrap_or(0.0);
            // Only the first choice of a prompt was asked for its rows; all repeat them.
            let held = (reported.top.len(), scored);
            let top =
                Meant { own, asked, search: SEARCH }.error(&reported.top, held, self.tokenizer);
            let error = value.max(top);
            let is_ranked = !self.is_exact || are_ranks(scored, reported);
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

fn are_ranks(scored: &Scored, reported: &Reported) -> bool {
    reported.top.iter().zip(&reported.ranks).all(|(top, sent)| {
        let id = id_of_name(&top.name);
        let own = scored.ids.iter().find(|own| id == Some(own.token));
        own.is_some_and(|own| u64::from(own.rank) == *sent)
    })
}

/// What is asked of rows of the prompt that these claims answer, by their position: what any of
/// them reports on those that `chosen` picks of so many tokens.
pub(super) fn prompt_asks<'a>(
    claims: impl Iterator<Item = &'a Claim<'a>>,
    model: &Model,
    chosen: impl Fn(usize) -> BTreeSet<usize>,
) -> BTreeMap<usize, RowAsk<'a>> {
    let vocab = model.text.vocab;
    let mut asks = BTreeMap::new();
    for claim in claims.filter(|claim| !claim.answer.prompt.is_empty()) {
        let request: &'a Request = claim.request;
        let places = chosen(request.prompt.len());
        for reported in claim.answer.prompt.iter().filter(|r| places.contains(&r.place)) {
            let own = request.prompt[reported.place + 1];
            let ask = asks.entry(reported.place).or_insert_with(|| {
                let scores = Scores::new(Token::Known(own), &request.sampling);
                RowAsk { scores: Some(scores), ..RowAsk::new(0, reported.place) }
            });
            let Some(scores) = &mut ask.scores else { continue };
            scores.top = scores.top.max(reported.top.len());
            let meant = Meant { own, asked: &request.logprob_ids, search: SEARCH };
            let more = meant.near(&reported.top, vocab);
            if !reported.ranks.is_empty() {
                let named = reported.top.iter().filter_map(|top| id_of_name(&top.name));
                scores.ids.extend(named.filter(|id| (*id as usize) < vocab));
            }
            let near = scores.near.get_or_insert_default();
            near.ids.extend(more.ids);
            near.reach = near.reach.or(more.reach);
        }
    }
    for scores in asks.values_mut().filter_map(|ask| ask.scores.as_mut()) {
        scores.ids.sort_unstable();
        scores.ids.dedup();
    }
    asks
}

/// How far a single report may be off.
fn single(is_exact: bool, limits: &Limits) -> f64 {
    if is_exact { EXACT } else { SINGLE_PER_MARGIN * limits.margin }
}

/// By how many nats reports on a request's tokens differ where logits differ by one: they are of
/// logits over the temperature where that was asked for. Above a temperature of one it is less,
/// which no limit makes use of.
fn nats_per_logit(request: &Request) -> f64 {
    match request.logprob_mode {
        LogprobMode::Raw => 1.0,
        LogprobMode::Scaled => 1.0 / f64::from(request.sampling.logprob_temperature().min(1.0)),
    }
}

/// What reports are off by, on average.
#[derive(Default)]
struct MeanError {
    sum: f64,
    count: usize,
}

impl MeanError {
    fn add(&mut self, error: Option<f64>) {
        if let Some(error) = error {
            (self.sum, self.count) = (self.sum + error, self.count + 1);
        }
    }

    /// # Errors
    /// When it is above `limit`; `what` was reported.
    fn check(&self, what: &str, limit: f64) -> Result<(), Stop> {
        let (count, mean) = (self.count, self.sum / self.count.max(1) as f64);
        if mean > limit {
            let what = format!("{count} {what} are off by {mean:.4} nats on average");
            let what = format!("{what}, at most {limit}");
            return Err(Rejection::new(Reason::LogprobMismatch, what).into());
        }
        Ok(())
    }
}

/// Checks what was reported for the rows of a request that were scored, beside the `proof` of their
/// hidden rows, if there is one. Without one, Targon's own rule checks the tokens.
///
/// # Errors
/// The first report that is too far off, or their mean.
pub(super) fn check(
    request: &Request,
    rows: &[RowEvidence],
    proof: Option<(Scheme, &[ChunkEvidence])>,
    limits: &Limits,
) -> Result<(), Stop> {
    let scale = nats_per_logit(request);
    let (mut values, mut tops) = (MeanError::default(), MeanError::default());
    for row in rows {
        let is_exact = limits.exact || proof.is_some_and(|proof| is_exact(proof, row.index));
        let limit = single(is_exact, limits) * if is_exact { 1.0 } else { scale };
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
        if !is_exact {
            values.add(own);
            tops.add(row.top_error);
        }
    }
    let limit = scale * limits.margin;
    values.check("log-probabilities", MEAN_PER_MARGIN * limit)?;
    tops.check("alternatives", TOPS_MEAN_PER_MARGIN * limit)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn row(index: usize, off: f64) -> RowEvidence {
        RowEvidence {
            index,
            token: 7,
            rank: 1,
            logprob: -3.0,
            reported: Some(-3.0 - off),
            end_rank: None,
            margin: Some(0.0),
            is_drawn: Some(true),
            top_error: None,
        }
    }

    /// What is said of reports that are off by so many nats, at a temperature.
    fn said(mode: LogprobMode, temperature: f32, off: &[f64]) -> Option<String> {
        let mut request = Request::greedy(vec![1], 9);
        (request.logprob_mode, request.sampling.temperature) = (mode, temperature);
        let rows: Vec<_> = off.iter().enumerate().map(|(index, off)| row(index, *off)).collect();
        let chunks = [ChunkEvidence { rows: off.len(), ..ChunkEvidence::default() }];
        let proof = Some((Scheme::Residue, chunks.as_slice()));
        match check(&request, &rows, proof, &Limits::default()) {
            Err(Stop::Rejected(rejection)) => Some(rejection.what),
            Err(other) => panic!("{other:?}"),
            Ok(()) => None,
        }
    }

    #[test]
    fn reports_at_a_temperature_may_be_off_by_as_many_logits_as_others() {
        use LogprobMode::{Raw, Scaled};
        // A single one by 2 logits, all of them by a quarter of one on average.
        let many = |off: f64| vec![off; 20];
        for (mode, temperature, scale) in
            [(Raw, 0.1, 1.0), (Scaled, 0.1, 10.0), (Scaled, 0.5, 2.0), (Scaled, 1.5, 1.0)]
        {
            let off = |share: f64| [many(0.0), vec![2.0 * scale * share]].concat();
            assert_eq!(said(mode, temperature, &off(0.99)), None, "{mode:?} {temperature}");
            let what = said(mode, temperature, &off(1.01)).unwrap();
            assert!(what.contains("the log-probability of token 20 are off by"), "{what}");
            assert_eq!(said(mode, temperature, &many(0.24 * scale)), None);
            let what = said(mode, temperature, &many(0.26 * scale)).unwrap();
            assert!(what.contains("on average"), "{what}");
        }
    }

    #[test]
    fn alternatives_are_held_to_a_mean_too() {
        let rows = |error: f64| {
            (0..20).map(|i| RowEvidence { top_error: Some(error), ..row(i, 0.0) }).collect()
        };
        let said = |rows: Vec<RowEvidence>| {
            check(&Request::greedy(vec![1], 9), &rows, None, &Limits::default())
        };
        assert_eq!(said(rows(0.49)), Ok(()));
        assert!(said(rows(0.51)).is_err());
    }
}
