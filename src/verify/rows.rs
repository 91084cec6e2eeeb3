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
/// How far a truncation's edge may lie from ours: top-p, and tokens of top-k.
const TOP_P_SLACK: f32 = 0.01;
const TOP_K_SLACK: usize = 2;
const FLOOR_SLACK: f32 = 0.98;

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
    /// when it wins. `None` where the noise is not known.
    pub margin: Option<f64>,
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
        let margin = self.sampling.as_ref().map(|sampling| match rules.restrict(logits) {
            Some(row) => margin(isa, &row, sampling, position, token),
            None => margin(isa, logits, sampling, position, token),
        });
        let reported = self.reported.get(index).copied().flatten();
        Ok(RowEvidence { index, token, rank: place, logprob, reported, end_rank, margin })
    }
}

/// How far `token` is from winning the draw at `position`, in logits; zero when it wins.
fn margin(isa: Isa, row: &[f32], sampling: &Sampling, position: u32, token: u32) -> f64 {
    let strict = distance(isa, row, sampling, position, token);
    if strict == 0.0 {
        return 0.0;
    }
    // Rounding moves the edge of a truncation: a token just outside is not evidence.
    let slack = Sampling {
        top_p: (sampling.top_p + TOP_P_SLACK).min(1.0),
        top_k: if sampling.top_k == 0 { 0 } else { sampling.top_k + TOP_K_SLACK },
        min_p: sampling.min_p * FLOOR_SLACK,
        top_a: sampling.top_a * FLOOR_SLACK,
        ..sampling.clone()
    };
    strict.min(distance(isa, row, &slack, position, token)).min(MARGIN_CLIP)
}

fn distance(isa: Isa, row: &[f32], sampling: &Sampling, position: u32, token: u32) -> f64 {
    let winner = sample(isa, row, sampling, position);
    if winner == token {
        return 0.0;
    }
    if sampling.is_greedy() {
        return f64::from(row[winner as usize] - row[token as usize]);
    }
    let is_kept =
        survivors(isa, row, sampling).is_none_or(|kept| kept.iter().any(|(id, _)| *id == token));
    if !is_kept {
        return f64::INFINITY;
    }
    let temperature = f64::from(sampling.temperature);
    let value = |id: u32| {
        f64::from(row[id as usize]) + temperature * gumbel(sampling.noise_key, position, id)
    };
    (value(winner) - value(token)).max(f64::MIN_POSITIVE)
}

/// Judges the margins.
///
/// # Errors
/// A single one, or their mean, above its limit.
pub fn check_margins(rows: &[RowEvidence], limits: &Limits) -> Result<(), Stop> {
    let margins: Vec<f64> = rows.iter().filter_map(|r| r.margin).collect();
    let reject = |what: String| Err(Rejection::new(Reason::SamplerMargin, what).into());
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
