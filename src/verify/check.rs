//! Checks one answer: first what needs no model, then one prefill and the checks of its rows.

use super::places::{FAST_ROWS, prompt_rows, random_rows, random_stop};
use super::prefill::{IsWanted, Prefix};
use super::proof::BoundProof;
use super::scrutiny::{Scrutiny, TwinPolicy};
use super::statistic::Statistic;
use super::structure::End;
use super::twin::{Look, Recheck};
use super::{Challenge, ChunkEvidence, Claim, Depth, Limits, Profile, Report, Stop, Verdict};
use super::{logprobs, proof, rows, structure, targon};
use crate::models::arithmetic::Arithmetic;
use crate::models::{Identity, Model};
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use crate::proof::Scheme;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A statistic or margin of the first chunks below this share of its limit decides an early check.
const DECIDED: f64 = 0.7;

/// Verifies answers of one model.
#[derive(Clone)]
pub struct Verifier {
    /// The weights that answers must follow from.
    pub model: Arc<Model>,
    /// What its proofs are bound to.
    pub identity: Arc<Identity>,
    /// The threads that compute.
    pub pool: Pool,
    /// What separates honest answers from others.
    pub limits: Limits,
    /// How closely answers are looked at that are suspicious, or drawn.
    pub scrutiny: Scrutiny,
    /// Tokens of prompt and output together, at most.
    pub context_max: usize,
}

/// How answers are verified: made by [`Verifier::verify`], run by [`answer`](Self::answer),
/// [`answers`](Self::answers) or, for what a client received, [`capture`](Self::capture).
#[must_use]
#[derive(Clone, Copy)]
pub struct Verification<'a> {
    pub(super) verifier: &'a Verifier,
    profile: Option<Profile>,
    depth: Depth,
    chance: u64,
    is_wanted: &'a IsWanted<'a>,
}

/// What is left to do for an answer once everything holds that needs no model.
struct Work {
    bound: Option<BoundProof>,
    output: Vec<u32>,
    wanted: BTreeSet<usize>,
    /// Tokens after which the check may end: all of them where it may not.
    stop: usize,
}

impl Verifier {
    /// A verifier with the default limits and no scrutiny beyond them, for sequences of up to
    /// `context_max` tokens.
    pub fn new(model: Arc<Model>, identity: Arc<Identity>, pool: Pool, context_max: usize) -> Self {
        let (limits, scrutiny) = (Limits::default(), Scrutiny::NONE);
        Self { model, identity, pool, limits, scrutiny, context_max }
    }

    /// The same with other limits.
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// The same with other scrutiny.
    pub fn with_scrutiny(self, scrutiny: Scrutiny) -> Self {
        Self { scrutiny, ..self }
    }

    /// Verification by the rules of `profile`: fast, and to the end. Where there is none, an answer
    /// is verified by its proof if one was asked for, else by Targon's ranks. `chance` decides
    /// which rows a fast check looks at: the peer must not know it beforehand.
    pub fn verify(&self, profile: impl Into<Option<Profile>>, chance: u64) -> Verification<'_> {
        let (profile, depth) = (profile.into(), Depth::Fast);
        Verification { verifier: self, profile, depth, chance, is_wanted: &|| true }
    }
}

impl<'a> Verification<'a> {
    /// How much is computed.
    pub fn depth(self, depth: Depth) -> Self {
        Self { depth, ..self }
    }

    /// Gives up, unscored, once `is_wanted` says no.
    pub fn while_wanted(self, is_wanted: &'a IsWanted<'a>) -> Self {
        Self { is_wanted, ..self }
    }

    /// The rules for an answer of which this proof was asked.
    pub(super) fn profile_for(self, proof: Option<Challenge>) -> Profile {
        self.profile.unwrap_or(if proof.is_some() { Profile::Proof } else { Profile::Ranks })
    }

    /// Verifies one answer.
    pub fn answer(self, claim: &Claim<'_>) -> Report {
        let report = self.answers(std::slice::from_ref(claim)).pop();
        report.unwrap_or_else(|| Report::bare(Verdict::Unscored("there is no report".into())))
    }

    /// Verifies answers, each as [`answer`](Self::answer) would, and returns their reports in
    /// order. A prompt that several of them answer is run once.
    pub fn answers(self, claims: &[Claim<'_>]) -> Vec<Report> {
        let mut reports = Vec::new();
        let mut open: Vec<(usize, Work)> = Vec::new();
        for (place, claim) in claims.iter().enumerate() {
            let (verdict, work) = match self.prepare(claim) {
                Ok(work) => (Verdict::Pass, work),
                Err(stop) => (stop.into(), None),
            };
            reports.push(Report::bare(verdict));
            open.extend(work.map(|work| (place, work)));
        }
        let mut rechecks: Vec<(usize, Recheck)> = Vec::new();
        while let Some((first, _)) = open.first() {
            let prompt = &claims[*first].request.prompt;
            let arithmetic = self.arithmetic(&open[0].1);
            let is_same = |(place, work): &(usize, Work)| {
                claims[*place].request.prompt == *prompt && self.arithmetic(work) == arithmetic
            };
            let (same, others): (Vec<_>, Vec<_>) = open.into_iter().partition(is_same);
            open = others;
            let longest = same.iter().map(|(_, work)| work.output.len()).max().unwrap_or(0);
            let of_prompt = same.iter().map(|(place, _)| &claims[*place]);
            let Verifier { model, pool, .. } = self.verifier;
            let asked = logprobs::prompt_asks(of_prompt, model, |tokens| {
                prompt_rows(tokens, self.depth, self.chance)
            });
            let pass = |blocks| model.pass_by(arithmetic, pool, blocks);
            match Prefix::new(pass, prompt, longest) {
                Ok(prefix) => {
                    let mut prefix = prefix.while_wanted(self.is_wanted).asking(asked);
                    for (place, work) in same {
                        let (report, recheck) = self.check_one(&claims[place], work, &mut prefix);
                        reports[place] = report;
                        rechecks.extend(recheck.map(|recheck| (place, recheck)));
                    }
                }
                Err(stop) => {
                    for (place, _) in same {
                        reports[place].verdict = stop.clone().into();
                    }
                }
            }
        }
        if !rechecks.is_empty() {
            let Verifier { model, pool, limits, scrutiny, .. } = self.verifier;
            let (names, is_wanted) = (scrutiny.names, self.is_wanted);
            Look { model, pool, limits, names, is_wanted }.at(&rechecks, &mut reports);
        }
        reports
    }

    /// How the rows of an answer are computed: in the canon of its proof where that can be.
    fn arithmetic(self, work: &Work) -> Arithmetic {
        let own = self.verifier.model.arithmetic;
        work.bound.as_ref().and_then(|bound| bound.arithmetic).unwrap_or(own)
    }

    /// Checks what needs no rows; what they are needed for is left, if anything.
    fn prepare(self, claim: &Claim<'_>) -> Result<Option<Work>, Stop> {
        let Verifier { model, identity, scrutiny, context_max, .. } = self.verifier;
        let end = structure::check(claim, &model.text, *context_max)?.end;
        let profile = self.profile_for(claim.proof);
        structure::check_powv(claim, model, profile == Profile::Powv)?;
        let bound = match profile {
            Profile::Proof => Some(proof::bind(claim, &end, (&**model, &**identity))?),
            Profile::Powv | Profile::Ranks => None,
        };
        let mut output = claim.answer.ids.clone();
        let count = output.len();
        let stops_early = scrutiny.stops_early && self.depth == Depth::Fast && bound.is_some();
        let stop = if stops_early { random_stop(count, self.chance) } else { count };
        let mut wanted: BTreeSet<usize> = match (profile, self.depth) {
            (Profile::Powv, _) => return Ok(None),
            (Profile::Ranks, _) | (_, Depth::Slow) => (0..count).collect(),
            (Profile::Proof, Depth::Fast) => {
                let positions = claim.request.prompt.len() + count;
                let rows = scrutiny.rows.of(&model.spec, positions);
                let mut wanted = random_rows(count, rows, self.chance);
                if stop < count {
                    // Draws are looked at wherever the check ends.
                    wanted.extend(random_rows(stop, rows.min(FAST_ROWS), self.chance));
                }
                wanted
            }
        };
        if end == End::Implied {
            // Any token stands for the end that was not sent: only its row counts.
            output.push(0);
            wanted.insert(count);
        }
        let stop = if stop < count { stop } else { output.len() };
        Ok(Some(Work { bound, output, wanted, stop }))
    }

    /// Checks an answer, and says whether it is to be looked at again: where it is suspicious, or
    /// where nothing is wrong but energies that rounding may explain.
    fn check_one(
        self,
        claim: &Claim<'_>,
        work: Work,
        prefix: &mut Prefix<'_>,
    ) -> (Report, Option<Recheck>) {
        let Verifier { identity, limits, scrutiny, .. } = self.verifier;
        let mut report = Report::bare(Verdict::Pass);
        let mut hidden = Vec::new();
        let rows = self.compare_rows(&work, claim, prefix, (&mut report, &mut hidden));
        let is_open = |bound: &BoundProof| self.is_open(bound.scheme, &report.chunks);
        let is_far = matches!(rows, Err(Stop::Rejected(_)));
        let is_open = is_far && work.bound.as_ref().is_some_and(is_open);
        let rest = match rows.is_ok() || is_open {
            true => self.check_tokens(&work, claim, prefix, &report),
            false => Ok(()),
        };
        // What else is wrong counts before energies of which only the twin can tell.
        let (first, then) = if is_open { (rest, rows) } else { (rows, rest) };
        let is_open = is_open && first.is_ok();
        if let Err(stop) = first.and(then) {
            report.verdict = stop.into();
        }
        let recheck = work.bound.as_ref().and_then(|bound| {
            let is_wanted = scrutiny.wants(&report, bound.scheme, limits, self.chance);
            let rows = hidden.len();
            (is_open || is_wanted).then(|| Recheck {
                is_open,
                scheme: bound.scheme,
                prover: bound.prover(identity),
                sketches: bound.sketches(&report.chunks, hidden.len()),
                rows: hidden,
                prompt: claim.request.prompt.clone(),
                // As far as the check went.
                output: work.output[..rows].to_vec(),
            })
        });
        (report, recheck)
    }

    /// Computes the rows, and checks those that were proved.
    fn compare_rows(
        self,
        Work { bound, output, wanted, stop }: &Work,
        claim: &Claim<'_>,
        prefix: &mut Prefix<'_>,
        (report, hidden): (&mut Report, &mut Vec<Vec<u16>>),
    ) -> Result<(), Stop> {
        let Verifier { model, identity, limits, .. } = self.verifier;
        let proved = bound.as_ref().map(|bound| (bound, &**identity));
        let checker = rows::RowChecker::new(claim, model, proved, wanted);
        let mut checker = checker.keeping_hidden(bound.is_some());
        prefix.run(&output[..*stop], &mut checker)?;
        let is_open = |bound| self.is_undecided(bound, checker.found());
        if *stop < output.len() && bound.as_ref().is_some_and(is_open) {
            prefix.extend(output, *stop, &mut checker)?;
        }
        let found = checker.finish();
        check_finite(model.dtype, &found.hidden)?;
        (report.rows, *hidden) = (found.rows, found.hidden);
        if let Some(bound) = bound {
            (report.chunks, report.energies) = bound.compare(&found.proofs);
            if bound.arithmetic.is_none() {
                report.other_canon = claim.answer.canon().map(str::to_owned);
            }
            proof::check_canon(report.other_canon.as_deref(), limits)?;
            proof::check(&report.chunks, bound.scheme, limits)?;
        }
        Ok(())
    }

    /// Checks tokens and what was reported of them.
    fn check_tokens(
        self,
        Work { bound, .. }: &Work,
        claim: &Claim<'_>,
        prefix: &Prefix<'_>,
        report: &Report,
    ) -> Result<(), Stop> {
        let limits = &self.verifier.limits;
        let proof = bound.as_ref().map(|bound| (bound.scheme, report.chunks.as_slice()));
        match proof {
            Some(_) => rows::check_margins(&report.rows, limits)?,
            None => targon::check(claim, &report.rows, limits, self.chance)?,
        }
        logprobs::check(claim.request, &report.rows, proof, limits)?;
        self.check_prompt(claim, proof, prefix)?;
        if proof.is_some() {
            proof::check_nonce(claim)?;
        }
        Ok(())
    }

    /// Whether chunks that are too far may still be explained by rounding, once the twin was run.
    fn is_open(self, scheme: Scheme, chunks: &[ChunkEvidence]) -> bool {
        let Verifier { limits, scrutiny, .. } = self.verifier;
        scrutiny.twin != TwinPolicy::Never && limits.is_open(scheme, chunks)
    }

    /// Whether the first chunks of an answer leave open what it is: near a limit, on either side.
    fn is_undecided(self, bound: &BoundProof, found: &rows::RowFindings) -> bool {
        let limits = &self.verifier.limits;
        let (chunks, energies) = bound.compare(&found.proofs);
        if proof::check(&chunks, bound.scheme, limits).is_err() {
            return self.is_open(bound.scheme, &chunks);
        }
        let by_rows = limits.trimmed(bound.scheme);
        let statistic = by_rows.and_then(|by_rows| Statistic::of(&energies, &by_rows));
        let is_near = statistic.is_some_and(|s| s.share().is_nan() || s.share() > DECIDED);
        let margins: Vec<f64> = found.rows.iter().filter_map(|row| row.margin).collect();
        let near = limits.margin_max() * DECIDED;
        let near_on_average = limits.margin_mean_max(margins.len()) * DECIDED;
        is_near
            || margins.iter().any(|margin| margin.is_nan() || *margin > near)
            || rows::mean(&margins) > near_on_average
    }

    /// What was reported of the prompt, on the rows that were kept.
    fn check_prompt(
        self,
        claim: &Claim<'_>,
        proof: Option<(Scheme, &[ChunkEvidence])>,
        prefix: &Prefix<'_>,
    ) -> Result<(), Stop> {
        if claim.answer.prompt.is_empty() {
            return Ok(());
        }
        let Verifier { model, limits, .. } = self.verifier;
        let checker = logprobs::PromptChecker::new(claim, model, proof, limits);
        checker.check(prefix.scored())
    }
}

/// A row of ours with NaN is a fault of ours, whatever was proved of it.
fn check_finite(dtype: Dtype, rows: &[Vec<u16>]) -> Result<(), Stop> {
    let is_broken = |row: &Vec<u16>| row.iter().any(|bits| !dtype.widen(*bits).is_finite());
    match rows.iter().position(is_broken) {
        Some(index) => Err(Stop::Fault(format!("our row of token {index} is not finite"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_row_of_ours_leaves_an_answer_unscored() {
        for (dtype, broken) in
            [(Dtype::Bf16, [0x7f80, 0xff80, 0x7fc0]), (Dtype::F16, [0x7c00, 0xfc00, 0x7e00])]
        {
            let rows = vec![vec![0x3c00, 0x0001], vec![0xbc00, 0x0000]];
            assert_eq!(check_finite(dtype, &rows), Ok(()));
            for bits in broken {
                let mut rows = rows.clone();
                rows[1][1] = bits;
                let Err(Stop::Fault(why)) = check_finite(dtype, &rows) else { panic!("{bits:x}") };
                assert!(why.contains("token 1 is not finite"), "{why}");
            }
        }
        assert_eq!(check_finite(Dtype::Bf16, &[]), Ok(()));
    }
}
