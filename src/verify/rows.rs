//! Scores the rows of an output: what is asked of each, and what is found of its token: rank,
//! log-probability, and the sampler's margin where its noise is known.

use super::logprobs::Tops;
use super::prefill::RowSink;
use super::proof::BoundProof;
use super::{Claim, Limits, Reason, Rejection, RowEvidence, Stop, targon};
use crate::engine::draw::Draw;
use crate::models::pass::{Ranked, RowAsk, RowReport, Scored, Scores, Token};
use crate::models::sampler::Sampling;
use crate::models::{Identity, Model};
use crate::proof::commit::{RowData, RowProver};
use std::collections::BTreeSet;
use std::ops::Range;

/// What was found of the rows of one output.
#[derive(Default)]
pub struct RowFindings {
    /// Of those that were scored.
    pub rows: Vec<RowEvidence>,
    /// What each row contributes to the proof.
    pub proofs: Vec<RowData>,
    /// The rows themselves, where they were kept.
    pub hidden: Vec<Vec<u16>>,
}

/// Checks the rows of one output in order.
pub struct RowChecker<'a> {
    claim: &'a Claim<'a>,
    wanted: &'a BTreeSet<usize>, // tokens whose rows are scored
    tops: Tops<'a>,
    sampling: Option<Sampling>, // with the noise, where it is known
    end_ids: Vec<u32>,
    prover: Option<RowProver>,
    draw: Draw,
    keeps_hidden: bool,
    found: RowFindings,
}

impl<'a> RowChecker<'a> {
    /// For a claim, with its proof if there is one; `wanted` are the tokens whose rows are scored.
    pub fn new(
        claim: &'a Claim<'a>,
        model: &'a Model,
        bound: Option<(&BoundProof, &Identity)>,
        wanted: &'a BTreeSet<usize>,
    ) -> Self {
        let request = claim.request;
        let sampling = match bound {
            Some((BoundProof { noise_key, .. }, _)) => {
                Some(Sampling { noise_key: *noise_key, ..request.sampling.clone() })
            }
            // At T = 0 there is no noise to know.
            None => request.sampling.is_greedy().then(|| request.sampling.clone()),
        };
        Self {
            claim,
            wanted,
            tops: Tops::new(claim, model),
            sampling,
            end_ids: [request.end_ids(&model.text), request.stop.ids.clone()].concat(),
            prover: bound.map(|(bound, identity)| bound.prover(identity)),
            draw: Draw::new(request, &model.text),
            keeps_hidden: false,
            found: RowFindings::default(),
        }
    }

    /// The same, which keeps the rows themselves where `keeps_hidden` says so.
    pub fn keeping_hidden(self, keeps_hidden: bool) -> Self {
        Self { keeps_hidden, ..self }
    }

    /// What was found so far.
    pub fn found(&self) -> &RowFindings {
        &self.found
    }

    /// What all rows gave.
    pub fn finish(self) -> RowFindings {
        self.found
    }

    fn evidence(&self, index: usize, scored: Scored) -> RowEvidence {
        let top_error = self.tops.error(index, &scored);
        let Scored { token: Ranked { token, logprob, rank }, end_rank, margin, .. } = scored;
        RowEvidence {
            index,
            token,
            rank,
            logprob,
            reported: self.claim.answer.logprobs.get(index).copied().flatten(),
            end_rank,
            margin: margin.map(|m| m.logits),
            is_drawn: margin.map(|m| m.is_drawn),
            top_error,
        }
    }
}

impl RowSink for RowChecker<'_> {
    /// # Errors
    /// A rejection where the grammar forbids a token, a fault where it is too complex.
    fn ask(&mut self, indices: Range<usize>, position: usize) -> Result<Vec<RowAsk<'_>>, Stop> {
        let Self { claim, wanted, tops, sampling, end_ids, prover, draw, keeps_hidden, .. } = self;
        let (request, ids) = (claim.request, &claim.answer.ids);
        let mut asks = Vec::with_capacity(indices.len());
        for (index, position) in indices.zip(position..) {
            let ask = RowAsk::new(0, position);
            let Some(token) = ids.get(index) else {
                // Only whether an end is likely counts after the last token.
                let scores = Scores::new(Token::Known(0), &request.sampling);
                asks.push(RowAsk { scores: Some(Scores { ends: end_ids, ..scores }), ..ask });
                continue;
            };
            let scores = match wanted.contains(&index) {
                // What the grammar says next is our own doing.
                true => Some(Scores {
                    rules: draw.rules(request, &[]).map_err(|e| Stop::Fault(e.to_string()))?,
                    mode: request.logprob_mode,
                    top: tops.count(index),
                    near: tops.near(index),
                    // Where no end may be drawn yet, none was skipped.
                    ends: if index + 1 >= request.min_tokens { end_ids } else { &[] },
                    ..match &*sampling {
                        Some(sampling) => Scores::new(Token::Measured(*token), sampling),
                        None => Scores::new(Token::Known(*token), &request.sampling),
                    }
                }),
                false => None,
            };
            asks.push(RowAsk { prover: prover.as_ref(), hidden: *keeps_hidden, scores, ..ask });
            draw.push(&request.sampling, *token)
                .map_err(|e| Rejection::new(Reason::Grammar, format!("token {index}: {e}")))?;
        }
        Ok(asks)
    }

    fn take(&mut self, index: usize, report: RowReport) -> Result<(), Stop> {
        if index == self.claim.answer.ids.len() {
            let rank = report.scores.and_then(|scored| scored.end_rank);
            return targon::check_implied_end(self.claim, rank);
        }
        self.found.proofs.extend(report.proof);
        self.found.hidden.extend(report.hidden);
        if let Some(scored) = report.scores {
            let evidence = self.evidence(index, scored);
            self.found.rows.push(evidence);
        }
        Ok(())
    }
}

/// Checks the margins.
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
    let (mean, limit) = (mean(&margins), limits.margin_mean_max(margins.len()));
    if mean.is_nan() || mean > limit {
        let what = format!("{} tokens are {mean:.4} logits from being drawn", margins.len());
        return reject(format!("{what} on average, at most {limit:.4}"));
    }
    Ok(())
}

/// The mean of some numbers, 0 for none.
pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
