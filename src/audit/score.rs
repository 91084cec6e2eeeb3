//! Runs our model over an answer and reports what each row says of the token that was sent. It uses
//! the verifier's prefill, so an audit and a check compute the same rows.

use super::answer::{ServerAnswer, ServerToken};
use crate::engine::request::Request;
use crate::models::pass::{RowAsk, RowReport, Scores, Token};
use crate::ops::lanes::Isa;
use crate::ops::logits::{LogSumExp, Moments};
use crate::verify::prefill::{Prefix, RowSink};
use crate::verify::{Stop, Verifier};
use anyhow::bail;
use std::ops::Range;

/// Reports below this say only that a token is improbable.
const FLOOR: f64 = -15.0;
/// Below this share of its noise a log-probability says nothing of the logits: the token is sure.
const SHARE_MIN: f64 = 1e-3;

/// A token beside our row.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TokenScore {
    /// Its natural log-probability in our row.
    pub logprob: f64,
    /// 1 + how many tokens are more probable.
    pub rank: u32,
    /// The root mean square difference of logits that explains what was reported.
    pub noise: Option<f64>,
    /// What was reported, less what is ours.
    pub error: Option<f64>,
    /// The largest logit less the largest other one or the token's: above zero where the token is
    /// the largest, below where it is not.
    pub lead: f64,
    /// Nats that the token surprises by, above the row's entropy.
    pub surprise: f64,
    /// The variance of that under our row.
    pub variance: f64,
    /// Whether this engine draws it from the request's seed.
    pub is_drawn: bool,
}

/// Runs the model over prompt and answer.
///
/// # Errors
/// A fault of ours, or an answer that is longer than the context.
pub fn score(
    verifier: &Verifier,
    request: &Request,
    answer: &ServerAnswer,
) -> anyhow::Result<Vec<TokenScore>> {
    let length = request.prompt.len() + answer.ids.len();
    if length > verifier.context_max {
        let most = verifier.context_max;
        bail!("prompt and answer have {length} tokens, our context has {most}");
    }
    let mut scorer = RowScorer { isa: verifier.pool.isa(), request, answer, rows: Vec::new() };
    let pass = |blocks| verifier.model.pass(&verifier.pool, blocks);
    let run = Prefix::new(pass, &request.prompt, answer.ids.len())
        .and_then(|mut prefix| prefix.run(&answer.ids, &mut scorer));
    match run {
        Ok(()) => Ok(scorer.rows),
        Err(Stop::Fault(what)) => bail!("{what}"),
        Err(_) => bail!("our own run was refused"),
    }
}

struct RowScorer<'a> {
    isa: Isa,
    request: &'a Request,
    answer: &'a ServerAnswer,
    rows: Vec<TokenScore>,
}

impl RowSink for RowScorer<'_> {
    fn ask(&mut self, indices: Range<usize>, position: usize) -> Result<Vec<RowAsk<'_>>, Stop> {
        let (ids, sampling) = (&self.answer.ids, &self.request.sampling);
        let ask = |(index, position): (usize, usize)| {
            let scores = Scores::new(Token::Measured(ids[index]), sampling);
            RowAsk { logits: true, scores: Some(scores), ..RowAsk::new(0, position) }
        };
        Ok(indices.zip(position..).map(ask).collect())
    }

    fn take(&mut self, index: usize, report: RowReport) -> Result<(), Stop> {
        let (Some(logits), Some(scored)) = (report.logits, report.scores) else {
            return Err(Stop::Fault("our row lacks its logits".into()));
        };
        let reported = self.answer.reported.get(index);
        let mut row = row(self.isa, &logits, self.answer.ids[index], reported);
        row.rank = scored.token.rank;
        row.is_drawn = scored.margin.is_some_and(|m| m.is_drawn);
        self.rows.push(row);
        Ok(())
    }
}

/// What a row of logits says of `token`.
fn row(isa: Isa, logits: &[f32], token: u32, reported: Option<&ServerToken>) -> TokenScore {
    let sum = LogSumExp::new(isa, logits, 1.0);
    let logprob = |id: u32| sum.logprob(logits[id as usize]);
    let Moments { entropy, variance, squares } = sum.moments(logits);
    let own = logits[token as usize];
    let others = logits.iter().zip(0_u32..).filter(|(_, id)| *id != token);
    let other = others.map(|(x, _)| *x).fold(f32::NEG_INFINITY, f32::max);
    // Independent noise of variance 1 on all logits changes a log-probability with this variance.
    let share = |id: u32| 1.0 - 2.0 * logprob(id).exp() + squares;
    let is_said = |sent: f64| sent > FLOOR && sent.is_finite();
    let squared = |(id, sent): &(u32, f64)| {
        let share = share(*id);
        let is_usable = share >= SHARE_MIN && is_said(*sent);
        is_usable.then(|| (sent - logprob(*id)).powi(2) / share)
    };
    let sent = reported.and_then(|r| r.logprob);
    let all: Vec<f64> = sent
        .map(|sent| (token, sent))
        .iter()
        .chain(reported.iter().flat_map(|r| &r.top).filter(|(id, _)| *id != token))
        .filter_map(squared)
        .collect();
    let noise = (!all.is_empty()).then(|| (all.iter().sum::<f64>() / all.len() as f64).sqrt());
    TokenScore {
        logprob: logprob(token),
        rank: 0,
        noise,
        error: sent.filter(|sent| is_said(*sent)).map(|sent| sent - logprob(token)),
        lead: f64::from(own - other),
        surprise: -logprob(token) - entropy,
        variance,
        is_drawn: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [2.0, 1.0, 0.0, -1.0];

    #[test]
    fn a_row_says_what_was_sent_and_what_noise_explains_it() {
        let total: f64 = LOGITS.iter().map(|x| f64::from(*x).exp()).sum();
        let logprob = |i: usize| f64::from(LOGITS[i]) - total.ln();
        let exact = ServerToken { logprob: Some(logprob(1)), top: vec![(0, logprob(0))] };
        let same = row(Isa::best(), &LOGITS, 1, Some(&exact));
        assert!(same.noise.unwrap() < 1e-7 && same.error.unwrap().abs() < 1e-7, "{same:?}");
        assert_eq!(same.lead, -1.0);
        let p: Vec<f64> = (0..4).map(|i| logprob(i).exp()).collect();
        let entropy: f64 = (0..4).map(|i| -p[i] * logprob(i)).sum();
        assert!((same.surprise - (-logprob(1) - entropy)).abs() < 1e-7);
        let off = ServerToken { logprob: Some(logprob(1) + 0.3), top: Vec::new() };
        let squares: f64 = p.iter().map(|p| p * p).sum();
        let share = 1.0 - 2.0 * p[1] + squares;
        let noise = row(Isa::best(), &LOGITS, 1, Some(&off)).noise.unwrap();
        assert!((noise - 0.3 / share.sqrt()).abs() < 1e-7, "{noise}");
        assert_eq!(row(Isa::best(), &LOGITS, 0, None).noise, None);
        let nothing = ServerToken { logprob: Some(-9999.0), top: Vec::new() };
        let read = row(Isa::best(), &LOGITS, 1, Some(&nothing));
        assert_eq!((read.noise, read.error), (None, None), "a number that stands for none");
    }

    #[test]
    fn a_sure_token_says_nothing_about_logits() {
        let sent = ServerToken { logprob: Some(-0.01), top: Vec::new() };
        assert_eq!(row(Isa::best(), &[50.0, 0.0], 0, Some(&sent)).noise, None);
    }
}
