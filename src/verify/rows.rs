//! Rows of logits: rank and log-probability of each token, and the sampler's margin where its noise
//! is known.

use super::limits::MARGIN_CLIP;
use super::logprobs::Tops;
use super::prefill::PrefillRow;
use super::{Claim, Limits, Reason, Rejection, RowEvidence, Stop};
use crate::engine::draw::{Draw, Rules};
use crate::engine::request::{LogprobMode, Request};
use crate::engine::sampler::{Sampling, gumbel, sample, survivors};
use crate::models::Model;
use crate::ops::lanes::Isa;
use crate::ops::logits::{LogSumExp, rank};

/// How far a truncation's edge may lie from ours on another stack: in top-p, in logits beside the
/// last of top-k, in the share that min-p and top-a ask for. Logits of an honest bf16 stack are off
/// by a tenth or two.
const TOP_P_SLACK: f32 = 0.03;
const TOP_K_SLACK: f32 = 0.25;
const FLOOR_SLACK: f32 = 0.8;

/// Judges the rows of one output in order.
pub struct Judge<'a> {
    request: &'a Request,
    ids: &'a [u32],
    reported: &'a [Option<f64>],
    tops: Tops<'a>,
    sampling: Option<Sampling>, // with the noise, where it is known
    end_ids: Vec<u32>,
    draw: Draw,
    rows: Vec<RowEvidence>,
}

impl<'a> Judge<'a> {
    /// For a claim; `noise_key` is the key of its sampler, where it is known.
    pub fn new(claim: &Claim<'a>, model: &'a Model, noise_key: Option<u64>) -> Self {
        let request = claim.request;
        let sampling = match noise_key {
            Some(noise_key) => Some(Sampling { noise_key, ..request.sampling.clone() }),
            // At T = 0 there is no noise to know.
            None => request.sampling.is_greedy().then(|| request.sampling.clone()),
        };
        let end_ids = [request.end_ids(model), request.stop.ids.clone()].concat();
        Self {
            request,
            ids: &claim.answer.ids,
            reported: &claim.answer.logprobs,
            tops: Tops::new(claim, model),
            sampling,
            end_ids,
            draw: Draw::new(request, model),
            rows: Vec::new(),
        }
    }

    /// Takes the next row.
    ///
    /// # Errors
    /// A fault where logits are not finite, a rejection where the grammar forbids the token.
    pub fn push(&mut self, isa: Isa, row: PrefillRow<'_>) -> Result<(), Stop> {
        let token = self.ids[row.index];
        let forbidden = |e: crate::models::grammar::GrammarError| {
            Stop::Rejected(Rejection::new(Reason::Grammar, format!("token {}: {e}", row.index)))
        };
        if let Some(logits) = row.logits {
            // What the grammar says next is our own doing.
            let rules = self.draw.rules(self.request);
            let rules = rules.map_err(|e| Stop::Fault(e.to_string()))?;
            let evidence = self.judge(isa, row.index, row.position, logits, &rules)?;
            self.rows.push(evidence);
        }
        self.draw.push(&self.request.sampling, token).map_err(forbidden)?;
        Ok(())
    }

    /// What was found.
    pub fn finish(self) -> Vec<RowEvidence> {
        self.rows
    }

    fn judge(
        &self,
        isa: Isa,
        index: usize,
        position: u32,
        logits: &mut [f32],
        rules: &Rules,
    ) -> Result<RowEvidence, Stop> {
        let (token, sampling) = (self.ids[index], &self.request.sampling);
        let raw = LogSumExp::new(isa, logits, 1.0);
        if !raw.is_finite() {
            return Err(Stop::Fault(format!("our logits at position {position} are not finite")));
        }
        let mode = self.request.logprob_mode;
        let own = |row: &[f32]| (rank(row, token), row[token as usize]);
        let (mut place, mut logprob) = (own(logits).0, raw.logprob(own(logits).1));
        // Where no end may be drawn yet, none was skipped.
        let may_end = index + 1 >= self.request.min_tokens;
        let end_rank = self.end_ids.iter().map(|id| rank(logits, *id)).min().filter(|_| may_end);
        let mut top_error = match mode {
            LogprobMode::Raw => self.tops.error(isa, index, logits, &raw),
            LogprobMode::Scaled => None,
        };
        self.draw.process(logits, sampling, rules);
        if mode == LogprobMode::Scaled {
            let scaled = LogSumExp::new(isa, logits, sampling.logprob_temperature());
            (place, logprob) = (own(logits).0, scaled.logprob(own(logits).1));
            top_error = self.tops.error(isa, index, logits, &scaled);
        }
        let drawn = self.sampling.as_ref().map(|sampling| match rules.restrict(logits) {
            Some(row) => margin(isa, &row, sampling, position, token),
            None => margin(isa, logits, sampling, position, token),
        });
        let reported = self.reported.get(index).copied().flatten();
        let (margin, is_drawn) = drawn.unzip();
        Ok(RowEvidence {
            index,
            token,
            rank: place,
            logprob,
            reported,
            end_rank,
            margin,
            is_drawn,
            top_error,
        })
    }
}

/// How far `token` is from winning the draw at `position`, in logits, and whether it wins outright.
///
/// Rounding moves the edge of a truncation. So a token counts as kept that a looser truncation
/// keeps, and it need only beat what a tighter one keeps.
fn margin(isa: Isa, row: &[f32], sampling: &Sampling, position: u32, token: u32) -> (f64, bool) {
    let winner = sample(isa, row, sampling, position);
    if winner == token {
        return (0.0, true);
    }
    if sampling.is_greedy() {
        let distance = f64::from(row[winner as usize] - row[token as usize]);
        return (distance.min(MARGIN_CLIP), false);
    }
    let (loose, tight) = edges(isa, row, sampling);
    let kept = survivors(isa, row, &loose);
    if kept.is_some_and(|kept| kept.iter().all(|(id, _)| *id != token)) {
        return (MARGIN_CLIP, false);
    }
    let temperature = f64::from(sampling.temperature);
    let value = |id: u32| {
        f64::from(row[id as usize]) + temperature * gumbel(sampling.noise_key, position, id)
    };
    let Some(tight) = tight else { return (0.0, false) };
    let distance = value(sample(isa, row, &tight, position)) - value(token);
    (distance.clamp(0.0, MARGIN_CLIP), false)
}

/// Truncations whose edges lie on either side of this one's; a tight one may keep nothing for sure.
fn edges(isa: Isa, row: &[f32], sampling: &Sampling) -> (Sampling, Option<Sampling>) {
    let Sampling { top_p, top_k, min_p, top_a, .. } = *sampling;
    let of = |top_p: f32, top_k: usize, floor: f32| Sampling {
        top_p,
        top_k,
        min_p: (min_p * floor).min(1.0),
        top_a: (top_a * floor).min(1.0),
        ..sampling.clone()
    };
    // Ranks change places where logits are close, and only there.
    let by_rank = Sampling { top_p: 1.0, min_p: 0.0, top_a: 0.0, ..sampling.clone() };
    let last = survivors(isa, row, &by_rank).and_then(|kept| kept.last().map(|(_, x)| *x));
    let (more, fewer) = last.map_or((top_k, top_k), |edge| {
        let above = |edge: f32| row.iter().filter(|x| **x >= edge).count();
        (above(edge - TOP_K_SLACK), above(edge + TOP_K_SLACK).min(top_k))
    });
    // Close to 1 the slack must not open what is closed.
    let slack = TOP_P_SLACK.min((1.0 - top_p) / 2.0);
    let tight = of((top_p - slack).max(f32::MIN_POSITIVE), fewer, 1.0 / FLOOR_SLACK);
    // A top-k of 0 would keep all.
    let is_sure = last.is_none() || fewer > 0;
    (of(top_p + slack, more, FLOOR_SLACK), is_sure.then_some(tight))
}

/// Judges the margins.
///
/// # Errors
/// A single one, or their mean, above its limit.
pub fn check_margins(rows: &[RowEvidence], limits: &Limits) -> Result<(), Stop> {
    let margins: Vec<f64> = rows.iter().filter_map(|r| r.margin).collect();
    let reject = |what: String| Err(Rejection::new(Reason::SamplerMargin, what).into());
    if limits.exact
        && let Some(row) = rows.iter().find(|r| r.is_drawn == Some(false))
    {
        let what = format!("token {} is not the one that is drawn, as must be", row.index);
        return reject(what);
    }
    let limit = limits.margin_max();
    let is_over = |m: f64| m.is_nan() || m > limit;
    if let Some(row) = rows.iter().find(|r| r.margin.is_some_and(is_over)) {
        let margin = row.margin.unwrap_or_default();
        let what = format!("token {} is {margin:.3} logits from being drawn", row.index);
        return reject(format!("{what}, at most {limit}"));
    }
    let mean = margins.iter().sum::<f64>() / margins.len().max(1) as f64;
    if mean.is_nan() || mean > limits.margin_mean {
        let what = format!("{} tokens are {mean:.4} logits from being drawn", margins.len());
        return reject(format!("{what} on average, at most {}", limits.margin_mean));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(top_k: usize, top_p: f32, min_p: f32) -> Sampling {
        let base = Request::greedy(vec![1], 1).sampling;
        Sampling { temperature: 1.0, noise_key: 9, top_k, top_p, min_p, ..base }
    }

    /// Tokens of a row that have no margin at some position.
    fn accepted(row: &[f32], sampling: &Sampling) -> Vec<usize> {
        let is_drawn = |token: usize| {
            let margin = |position| margin(Isa::best(), row, sampling, position, token as u32);
            (0..400).any(|position| margin(position).0 == 0.0)
        };
        (0..row.len()).filter(|token| is_drawn(*token)).collect()
    }

    #[test]
    fn edges_give_way_by_rounding_and_no_further() {
        let row = [3.0, 2.9, 2.0, 1.9, 0.0];
        assert_eq!(accepted(&row, &sampling(0, 1.0, 0.0)), [0, 1, 2, 3, 4]);
        // The second token lies a tenth below the edge, the third a whole logit.
        assert_eq!(accepted(&row, &sampling(1, 1.0, 0.0)), [0, 1]);
        assert_eq!(accepted(&row, &sampling(2, 1.0, 0.0)), [0, 1]);
        assert_eq!(accepted(&row, &sampling(3, 1.0, 0.0)), [0, 1, 2, 3]);
        // Of the first token's weight, the third has 0.37 and the last 0.05.
        assert_eq!(accepted(&row, &sampling(0, 1.0, 0.5)), [0, 1]);
        assert_eq!(accepted(&row, &sampling(0, 1.0, 0.4)), [0, 1, 2, 3]);
        // All but the last have 0.98 together.
        assert!(!accepted(&row, &sampling(0, 0.9, 0.0)).contains(&4));
        assert!(!accepted(&row, &sampling(0, 0.95, 0.0)).contains(&4));
    }

    #[test]
    fn a_token_that_only_our_edge_keeps_costs_an_honest_miner_nothing() {
        let row = [3.0, 2.9, 2.0];
        let cut = sampling(1, 1.0, 0.0);
        for position in 0..200 {
            // A stack that has the two the other way round draws the second, always.
            let (margin, is_drawn) = margin(Isa::best(), &row, &cut, position, 1);
            assert_eq!(margin, 0.0, "{position}");
            assert!(!is_drawn);
        }
    }
}
