//! Rows of logits: rank and log-probability of each token, and the sampler's margin where its noise
//! is known.

use super::prefill::Row;
use super::{Claim, Limits, Reason, Rejection, Stop};
use crate::engine::draw::{Draw, Rules};
use crate::engine::request::{LogprobMode, Request};
use crate::engine::sampler::{Sampling, gumbel, sample, survivors};
use crate::models::Model;
use crate::ops::lanes::Isa;
use crate::ops::logits::{LogSumExp, rank};

/// Margins count at most this much, so that one outlier is one token's worth of evidence.
pub const MARGIN_CLIP: f64 = 1.0;
/// How far a truncation's edge may lie from ours on another stack: in top-p, in tokens of top-k
/// (and one of eight), in the share that min-p and top-a ask for. Logits of an honest bf16 stack
/// are off by a tenth or two.
const TOP_P_SLACK: f32 = 0.03;
const TOP_K_SLACK: usize = 2;
const FLOOR_SLACK: f32 = 0.8;

/// What the model says about one token of the output.
#[derive(Clone, PartialEq, Debug)]
pub struct RowEvidence {
    /// Number of the token.
    pub index: usize,
    /// The token.
    pub token: u32,
    /// 1 + how many tokens are more probable.
    pub rank: u32,
    /// Its log-probability in the request's mode.
    pub logprob: f64,
    /// What was reported.
    pub reported: Option<f64>,
    /// The best rank of a token that would end the output.
    pub end_rank: Option<u32>,
    /// How far the token is from winning the draw, in logits, clipped at [`MARGIN_CLIP`]; zero
    /// when it wins, also where it does only with another stack's edge of a truncation. `None`
    /// where the noise is not known.
    pub margin: Option<f64>,
    /// Whether the token is the one that this engine would have drawn, where the noise is known.
    pub is_drawn: Option<bool>,
}

/// Judges the rows of one output in order.
pub struct Judge<'a> {
    request: &'a Request,
    ids: &'a [u32],
    reported: &'a [Option<f64>],
    sampling: Option<Sampling>, // with the noise, where it is known
    end_ids: Vec<u32>,
    draw: Draw,
    rows: Vec<RowEvidence>,
}

impl<'a> Judge<'a> {
    /// For a claim; `noise_key` is the key of its sampler, where it is known.
    pub fn new(claim: &Claim<'a>, model: &Model, noise_key: Option<u64>) -> Self {
        let request = claim.request;
        let sampling = match noise_key {
            Some(noise_key) => Some(Sampling { noise_key, ..request.sampling.clone() }),
            // At T = 0 there is no noise to know.
            None => request.sampling.is_greedy().then(|| request.sampling.clone()),
        };
        let end_ids = [model.stop_ids.as_slice(), &request.stop.ids].concat();
        Self {
            request,
            ids: &claim.answer.ids,
            reported: &claim.answer.logprobs,
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
    pub fn push(&mut self, isa: Isa, row: Row<'_>) -> Result<(), Stop> {
        let token = self.ids[row.index];
        let forbidden = |e: crate::models::grammar::GrammarError| {
            Stop::Rejected(Rejection::new(Reason::Grammar, format!("token {}: {e}", row.index)))
        };
        if let Some(logits) = row.logits {
            let rules = self.draw.rules(self.request).map_err(forbidden)?;
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
        let end_rank = self.end_ids.iter().map(|id| rank(logits, *id)).min();
        self.draw.process(logits, sampling, rules);
        if mode == LogprobMode::Scaled {
            let scaled = LogSumExp::new(isa, logits, sampling.logprob_temperature());
            (place, logprob) = (own(logits).0, scaled.logprob(own(logits).1));
        }
        let drawn = self.sampling.as_ref().map(|sampling| match rules.restrict(logits) {
            Some(row) => margin(isa, &row, sampling, position, token),
            None => margin(isa, logits, sampling, position, token),
        });
        let reported = self.reported.get(index).copied().flatten();
        let (margin, is_drawn) = drawn.unzip();
        Ok(RowEvidence { index, token, rank: place, logprob, reported, end_rank, margin, is_drawn })
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
    let (loose, tight) = edges(sampling);
    let kept = survivors(isa, row, &loose);
    if kept.is_some_and(|kept| kept.iter().all(|(id, _)| *id != token)) {
        return (MARGIN_CLIP, false);
    }
    let temperature = f64::from(sampling.temperature);
    let value = |id: u32| {
        f64::from(row[id as usize]) + temperature * gumbel(sampling.noise_key, position, id)
    };
    let distance = value(sample(isa, row, &tight, position)) - value(token);
    (distance.clamp(0.0, MARGIN_CLIP), false)
}

/// Truncations whose edges lie on either side of this one's.
fn edges(sampling: &Sampling) -> (Sampling, Sampling) {
    let Sampling { top_p, top_k, min_p, top_a, .. } = *sampling;
    let ranks = TOP_K_SLACK + top_k / 8;
    let of = |top_p: f32, top_k: usize, floor: f32| Sampling {
        top_p,
        top_k,
        min_p: (min_p * floor).min(1.0),
        top_a: (top_a * floor).min(1.0),
        ..sampling.clone()
    };
    let is_cut = top_k > 0;
    let loose =
        of((top_p + TOP_P_SLACK).min(1.0), if is_cut { top_k + ranks } else { 0 }, FLOOR_SLACK);
    let fewer = if is_cut { top_k.saturating_sub(ranks).max(1) } else { 0 };
    let less = if top_p < 1.0 { (top_p - TOP_P_SLACK).max(f32::MIN_POSITIVE) } else { 1.0 };
    (loose, of(less, fewer, 1.0 / FLOOR_SLACK))
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
    if let Some(row) = rows.iter().find(|r| r.margin.is_some_and(|m| m > limit)) {
        let margin = row.margin.unwrap_or_default();
        let what = format!("token {} is {margin:.3} logits from being drawn", row.index);
        return reject(format!("{what}, at most {limit}"));
    }
    let mean = margins.iter().sum::<f64>() / margins.len().max(1) as f64;
    if mean > limits.margin_mean {
        let what = format!("{} tokens are {mean:.4} logits from being drawn", margins.len());
        return reject(format!("{what} on average, at most {}", limits.margin_mean));
    }
    Ok(())
}
