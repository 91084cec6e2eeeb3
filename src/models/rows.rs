//! Defines what is computed from a row of logits: log-probabilities, ranks, draws and margins.
//!
//! [`answer`] is the definition for every device, in the arithmetic of the CPU. One thread reduces
//! one row, and computes each sum over the vocabulary once.

use super::margin::margin;
use super::pass::{
    LogprobMode, Ranked, RowAsk, RowFault, RowReport, RowResult, Scored, Scores, Token,
};
use super::sampler::{Distribution, Sampling};
use crate::ops::lanes::Isa;
use crate::ops::logits::{LogSumExp, rank, top_k};

/// A final-norm row: its 16-bit patterns and their exact values.
#[derive(Clone, Copy)]
pub struct HiddenRow<'a> {
    /// The 16-bit patterns, one for each channel.
    pub bits: &'a [u16],
    /// The row's values, one for each channel.
    pub values: &'a [f32],
}

/// Answers `ask` from its row; `logits` are there where they are needed, and may be changed.
///
/// # Errors
/// When the logits are not finite.
pub fn answer(
    isa: Isa,
    ask: &RowAsk<'_>,
    hidden: HiddenRow<'_>,
    logits: Option<&mut [f32]>,
) -> RowResult {
    let HiddenRow { bits, values } = hidden;
    let mut report = RowReport {
        proof: ask.prover.map(|prover| prover.prove(ask.position, bits, values)),
        hidden: ask.hidden.then(|| bits.to_vec()),
        ..RowReport::default()
    };
    let Some(row) = logits else { return Ok(report) };
    report.logits = ask.logits.then(|| row.to_vec());
    report.scores = match &ask.scores {
        Some(scores) => Some(score(isa, row, ask.position, scores)?),
        None => None,
    };
    Ok(report)
}

/// Reads what is asked off a row of logits; may change it.
fn score(isa: Isa, row: &mut [f32], position: u32, ask: &Scores<'_>) -> Result<Scored, RowFault> {
    let sum = LogSumExp::new(isa, row, 1.0);
    if !sum.is_finite() {
        return Err(RowFault::NotFinite);
    }
    let end_rank = ask.ends.iter().map(|id| rank(row, *id)).min();
    let scored = match ask.mode {
        LogprobMode::Raw => {
            let choice = match ask.token {
                Token::Known(token) => Choice { token, margin: None },
                _ if ask.rules.keep_logits(ask.sampling) => {
                    let sum = (ask.sampling.logprob_temperature() == 1.0).then_some(sum);
                    choose(isa, row, sum, position, ask)
                }
                _ => {
                    let mut processed = row.to_vec();
                    ask.rules.process(&mut processed, ask.sampling);
                    choose(isa, &processed, None, position, ask)
                }
            };
            Reading { isa, row, sum, temperature: 1.0 }.report(ask, choice)
        }
        LogprobMode::Scaled => {
            ask.rules.process(row, ask.sampling);
            let temperature = ask.sampling.logprob_temperature();
            let sum = LogSumExp::new(isa, row, temperature);
            let choice = choose(isa, row, Some(sum), position, ask);
            Reading { isa, row, sum, temperature }.report(ask, choice)
        }
    };
    Ok(Scored { end_rank, ..scored })
}

/// The token of a row, and its margin where it is checked.
struct Choice {
    token: u32,
    margin: Option<super::margin::Margin>,
}

/// The token of a processed row; `sum` is the row's at the temperature of the draw, where known.
fn choose(
    isa: Isa,
    row: &[f32],
    sum: Option<LogSumExp>,
    position: u32,
    ask: &Scores<'_>,
) -> Choice {
    let sampling: &Sampling = ask.sampling;
    let choose = |drawn: Distribution<'_>| match ask.token {
        Token::Drawn => Choice { token: drawn.draw(sampling, position), margin: None },
        Token::Known(token) => Choice { token, margin: None },
        Token::Measured(token) => {
            Choice { token, margin: Some(margin(&drawn, sampling, position, token)) }
        }
    };
    match (ask.rules.restrict(row), sum) {
        (Some(restricted), _) => choose(Distribution::new(isa, &restricted, sampling)),
        (None, Some(sum)) => choose(Distribution::new(isa, row, sampling).with_sum(sum)),
        (None, None) => choose(Distribution::new(isa, row, sampling)),
    }
}

/// Tokens with their logits, largest first, ranked by the row's sum.
pub(super) fn ranked_in_order(top: &[(u32, f32)], sum: &LogSumExp) -> Vec<Ranked> {
    let above = |logit: f32| top.partition_point(|(_, other)| *other > logit) as u32;
    let ranked = |(token, logit): &(u32, f32)| Ranked {
        token: *token,
        logprob: sum.logprob(*logit),
        rank: 1 + above(*logit),
    };
    top.iter().map(ranked).collect()
}

/// A row with the sum that its log-probabilities follow from.
struct Reading<'a> {
    isa: Isa,
    row: &'a [f32],
    sum: LogSumExp,
    temperature: f32,
}

impl Reading<'_> {
    fn report(&self, ask: &Scores<'_>, Choice { token, margin }: Choice) -> Scored {
        let top = top_k(self.isa, self.row, ask.top);
        let near = self.near(ask, top.last().map(|(_, logit)| *logit));
        Scored {
            token: self.token(token),
            top: ranked_in_order(&top, &self.sum),
            ids: ask.ids.iter().map(|id| self.token(*id)).collect(),
            near,
            end_rank: None,
            margin,
        }
    }

    fn token(&self, token: u32) -> Ranked {
        let logprob = self.sum.logprob(self.row[token as usize]);
        Ranked { token, logprob, rank: rank(self.row, token) }
    }

    /// `last` is the logit of the last of the most probable tokens.
    fn near(&self, ask: &Scores<'_>, last: Option<f32>) -> Vec<(u32, f64)> {
        let Some(near) = &ask.near else { return Vec::new() };
        let mut ids = near.ids.clone();
        if let (Some(reach), Some(last)) = (near.reach, last) {
            let edge = last - reach * self.temperature;
            ids.extend((0..).zip(self.row).filter(|(_, x)| **x >= edge).map(|(id, _)| id));
        }
        ids.sort_unstable();
        ids.dedup();
        let logprob = |id: u32| (id, self.sum.logprob(self.row[id as usize]));
        ids.into_iter().map(logprob).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::pass::Near;
    use crate::models::rules::{RowRules, Seen};
    use std::sync::Arc;

    const ROW: [f32; 6] = [1.0, 4.0, 3.5, 3.5, -2.0, 0.5];

    fn read(ask: &Scores<'_>) -> Scored {
        let mut row = ROW;
        score(Isa::best(), &mut row, 3, ask).unwrap()
    }

    /// Natural log of the softmax of `ROW / temperature` at `token`.
    fn logprob(row: &[f32], temperature: f64, token: usize) -> f64 {
        let scaled = |x: f32| f64::from(x) / temperature;
        let total: f64 = row.iter().map(|x| scaled(*x).exp()).sum();
        scaled(row[token]) - total.ln()
    }

    #[test]
    fn ranks_and_log_probabilities_are_of_the_mode_that_is_asked_for() {
        let sampling =
            Sampling { temperature: 0.5, logit_bias: vec![(4, 9.0)], ..Sampling::greedy() };
        let mut biased = ROW;
        biased[4] += 9.0;
        let modes = [
            (LogprobMode::Raw, &ROW, 1.0, [2, 6], vec![1, 2, 3]),
            (LogprobMode::Scaled, &biased, 0.5, [3, 1], vec![4, 1, 2]),
        ];
        for (mode, row, temperature, ranks, top) in modes {
            let ends = [4, 5];
            let near = Some(Near { ids: vec![5, 0, 5], reach: Some(0.1) });
            let plain = Scores::new(Token::Known(3), &sampling);
            let scored = read(&Scores { mode, top: 3, ids: vec![4], near, ends: &ends, ..plain });
            let close = |got: f64, token: usize| {
                assert!((got - logprob(row, temperature, token)).abs() < 1e-6, "{mode:?} {token}");
            };
            assert_eq!([scored.token.rank, scored.ids[0].rank], ranks, "{mode:?}");
            close(scored.token.logprob, 3);
            close(scored.ids[0].logprob, 4);
            assert_eq!(scored.top.iter().map(|t| t.token).collect::<Vec<_>>(), top);
            scored.top.iter().for_each(|t| close(t.logprob, t.token as usize));
            // Those that were named, and those about as probable as the last of the top.
            let mut want = [vec![0, 5], top.clone(), vec![3]].concat();
            want.sort_unstable();
            want.dedup();
            assert_eq!(scored.near.iter().map(|(id, _)| *id).collect::<Vec<_>>(), want);
            scored.near.iter().for_each(|(id, logprob)| close(*logprob, *id as usize));
            assert_eq!(scored.end_rank, Some(5), "ends are ranked by the raw row");
            assert_eq!(scored.margin, None);
        }
    }

    #[test]
    fn a_token_is_drawn_from_what_may_be_drawn_and_reported_as_the_mode_says() {
        let greedy = Sampling { presence_penalty: 2.0, ..Sampling::greedy() };
        let mut seen = Seen::new(&greedy, &[]);
        seen.push(&greedy, 1);
        let rules = RowRules { seen: Arc::new(seen), banned: vec![2], allowed: None };
        for (mode, rank) in [(LogprobMode::Raw, 2), (LogprobMode::Scaled, 1)] {
            let plain = Scores::new(Token::Drawn, &greedy);
            let ask = Scores { mode, rules: rules.clone(), ..plain };
            assert!(!ask.is_plain());
            let scored = read(&ask);
            assert_eq!((scored.token.token, scored.token.rank), (3, rank), "{mode:?}");
            let given = |token| read(&Scores { token: Token::Measured(token), ..ask.clone() });
            assert!(given(3).margin.unwrap().is_drawn);
            assert_eq!(given(0).margin.unwrap().logits, 1.0, "clipped");
        }
    }

    #[test]
    fn a_row_that_is_not_finite_has_no_answer() {
        let sampling = Sampling::greedy();
        let ask = Scores::new(Token::Known(0), &sampling);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut row = ROW;
            row[5] = bad;
            assert_eq!(score(Isa::best(), &mut row, 0, &ask), Err(RowFault::NotFinite));
        }
    }
}
