//! Verification of answers: does this output follow from these weights, this prompt and these
//! rules?
//!
//! One prefill over prompt and output gives everything ([`prefill`]): hidden rows for proofs,
//! logits for ranks, log-probabilities and the sampler's margins. [`Verifier::verify`] first checks
//! what needs no model ([`structure`]), then the proof's binding ([`proof`]), then rows ([`rows`]),
//! and ends in a [`Verdict`]. What the peer sent can at worst be rejected; trouble of ours is
//! [`Verdict::Unscored`].
//!
//! What a client received is a whole response: [`capture`] reads the request ([`question`]), lets
//! the server's own writer write the answer again ([`mirror`]) and compares every field
//! (`compare`).
//!
//! Where the [`limits`] come from is in [`calibrate`]; what many answers of one miner say together
//! is in [`evidence`].

pub mod answer;
pub mod bounds;
pub mod calibrate;
pub mod capture;
mod compare;
pub mod evidence;
pub mod evidence_file;
pub mod file;
pub mod limits;
pub mod mirror;
pub mod prefill;
pub mod proof;
pub mod question;
mod reports;
pub mod rows;
pub mod structure;
pub mod targon;

use crate::engine::request::Request;
use crate::models::{Identity, Model};
use crate::ops::pool::Pool;
use crate::proof::Scheme;
use crate::proof::philox::philox;
use answer::Answer;
pub use limits::Limits;
use prefill::Prefix;
use proof::ChunkEvidence;
use rows::RowEvidence;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use structure::End;

/// Rows whose logits a fast check computes, besides the last.
pub const FAST_ROWS: usize = 32;

/// Rows of a prompt whose logits a slow check computes at most, where it was reported on; a fast
/// one computes [`FAST_ROWS`].
const PROMPT_ROWS_MAX: usize = 256;

/// Why an answer is rejected.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reason {
    /// It is not an answer at all.
    BadStream,
    /// Fewer tokens than an answer can have.
    TooShort,
    /// More tokens than were asked for.
    TooLong,
    /// Ids outside the vocabulary, or none.
    BadIds,
    /// The text is not what the ids spell.
    TextMismatch,
    /// It goes on after its end.
    SkippedEosEot,
    /// It ends without a reason.
    EarlyEnd,
    /// A token that the request's grammar does not allow.
    Grammar,
    /// A weight value is wrong or missing.
    BadPowv,
    /// No proof, or one that cannot be read.
    BadProof,
    /// The proof is bound to something else.
    WrongRoot,
    /// The chain of digests is broken.
    ChainBreak,
    /// The signature is not the hotkey's.
    BadSignature,
    /// Hidden rows differ by more than honest ones do.
    SketchEnergy,
    /// A token that the sampler would not have drawn.
    SamplerMargin,
    /// Reported log-probabilities are not the model's.
    LogprobMismatch,
    /// Too many tokens that are not the most probable one.
    UnlikelyTokens,
    /// A token that is hardly possible.
    UnlikelyToken,
    /// Log-probabilities too good to be true.
    Overfit,
    /// At a place chosen at random, a token that is not among the most probable ones.
    LogprobRandom,
}

impl Reason {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Reason::BadStream => "BAD_STREAM",
            Reason::TooShort => "TOO_SHORT",
            Reason::TooLong => "TOO_LONG",
            Reason::BadIds => "BAD_IDS",
            Reason::TextMismatch => "TEXT_MISMATCH",
            Reason::SkippedEosEot => "SKIPPED_EOS_EOT",
            Reason::EarlyEnd => "EARLY_END",
            Reason::Grammar => "GRAMMAR",
            Reason::BadPowv => "BAD_POWV",
            Reason::BadProof => "BAD_PROOF",
            Reason::WrongRoot => "WRONG_ROOT",
            Reason::ChainBreak => "CHAIN_BREAK",
            Reason::BadSignature => "BAD_SIGNATURE",
            Reason::SketchEnergy => "SKETCH_ENERGY",
            Reason::SamplerMargin => "SAMPLER_MARGIN",
            Reason::LogprobMismatch => "LOGPROB_MISMATCH",
            Reason::UnlikelyTokens => "UNLIKELY_TOKENS",
            Reason::UnlikelyToken => "UNLIKELY_TOKEN",
            Reason::Overfit => "OVERFIT",
            Reason::LogprobRandom => "LOGPROB_RANDOM",
        }
    }
}

/// A rejection: the rule that was broken and the fact that breaks it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {what}", reason.name())]
pub struct Rejection {
    /// Which rule.
    pub reason: Reason,
    /// Rule and fact.
    pub what: String,
}

impl Rejection {
    /// For `reason`, in words.
    pub fn new(reason: Reason, what: impl Into<String>) -> Self {
        Self { reason, what: what.into() }
    }
}

/// What verification ends in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nothing speaks against the answer.
    Pass,
    /// Something does.
    Reject(Rejection),
    /// Nothing can be said, through no fault of the peer.
    Unscored(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Pass => f.write_str("pass"),
            Verdict::Reject(rejection) => write!(f, "reject: {rejection}"),
            Verdict::Unscored(why) => write!(f, "unscored: {why}"),
        }
    }
}

/// Which rules apply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    /// The weight value of every token (Targon 4.0 and 4.1).
    Powv,
    /// Ranks and log-probabilities (Targon 4.2 to 4.4, with its holes mended).
    Ranks,
    /// Hidden-state proofs and the sampler's margins: `residue-v1`, `residue-v1-u4` or `toploc`, as
    /// the request asked.
    Proof,
}

impl std::str::FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "targon-4.1" => Ok(Self::Powv),
            "targon-4.4" => Ok(Self::Ranks),
            "proof" => Ok(Self::Proof),
            other => Err(format!("must be targon-4.1, targon-4.4 or proof, got {other}")),
        }
    }
}

/// How much is computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Depth {
    /// Proofs of all rows; logits of [`FAST_ROWS`] random rows and the last.
    Fast,
    /// Everything at every row.
    Slow,
}

/// An answer with the request that it claims to answer.
#[derive(Clone, Debug)]
pub struct Claim<'a> {
    /// What was asked, as the engine reads it; its noise key is set by the verifier.
    pub request: &'a Request,
    /// The API's seed and the number of the choice, which the proof is bound to.
    pub seed: Option<i64>,
    /// Number of the choice within its request.
    pub choice: u32,
    /// The proof that was asked for.
    pub proof: Option<proof::Asked>,
    /// What came back.
    pub answer: &'a Answer,
    /// Whether a final end token may be missing from the answer: some stacks do not send it.
    pub end_is_implied: bool,
}

/// What was found.
#[derive(Clone, PartialEq, Debug)]
pub struct Report {
    /// The outcome.
    pub verdict: Verdict,
    /// Rows whose logits were computed, ascending.
    pub rows: Vec<RowEvidence>,
    /// Chunks of the proof.
    pub chunks: Vec<ChunkEvidence>,
}

impl Report {
    /// A verdict that needed no rows.
    pub fn bare(verdict: Verdict) -> Self {
        Self { verdict, rows: Vec::new(), chunks: Vec::new() }
    }
}

/// Verifies answers of one model.
#[derive(Clone)]
pub struct Verifier {
    /// The model.
    pub model: Arc<Model>,
    /// What its proofs are bound to.
    pub identity: Arc<Identity>,
    /// Compute threads.
    pub pool: Pool,
    /// Limits.
    pub limits: Limits,
    /// Longest sequence.
    pub context_max: usize,
}

/// How answers are verified.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// Which rules.
    pub profile: Profile,
    /// How much is computed.
    pub depth: Depth,
    /// Decides which rows a fast check looks at: the peer must not know it beforehand.
    pub chance: u64,
    /// Verification is given up, unscored, once this says no.
    pub is_wanted: &'a prefill::IsWanted<'a>,
}

impl Rules<'_> {
    /// To the end, whoever waits.
    pub fn new(profile: Profile, depth: Depth, chance: u64) -> Self {
        Self { profile, depth, chance, is_wanted: &|| true }
    }
}

/// What is left to do for an answer once everything holds that needs no model.
struct Work {
    bound: Option<proof::Bound>,
    output: Vec<u32>,
    wanted: BTreeSet<usize>,
}

impl Verifier {
    /// Verifies one answer. `chance` decides which rows a fast check looks at: the peer must not
    /// know it beforehand.
    pub fn verify(&self, claim: &Claim<'_>, profile: Profile, depth: Depth, chance: u64) -> Report {
        self.verify_all(std::slice::from_ref(claim), profile, depth, chance).remove(0)
    }

    /// Verifies answers, each as [`verify`](Self::verify) would, and returns their reports in
    /// order. A prompt that several of them answer is run once.
    pub fn verify_all(
        &self,
        claims: &[Claim<'_>],
        profile: Profile,
        depth: Depth,
        chance: u64,
    ) -> Vec<Report> {
        self.verify_by(claims, Rules::new(profile, depth, chance))
    }

    /// Verifies answers by these rules; see [`verify_all`](Self::verify_all).
    pub fn verify_by(&self, claims: &[Claim<'_>], rules: Rules<'_>) -> Vec<Report> {
        let mut reports = Vec::new();
        let mut open: Vec<(usize, Work)> = Vec::new();
        for (place, claim) in claims.iter().enumerate() {
            let (verdict, work) = match self.prepare(claim, rules) {
                Ok(work) => (Verdict::Pass, work),
                Err(stop) => (stop.into(), None),
            };
            reports.push(Report::bare(verdict));
            open.extend(work.map(|work| (place, work)));
        }
        while let Some((first, _)) = open.first() {
            let prompt = &claims[*first].request.prompt;
            let is_same = |(place, _): &(usize, Work)| claims[*place].request.prompt == *prompt;
            let (same, others): (Vec<_>, Vec<_>) = open.into_iter().partition(is_same);
            open = others;
            let longest = same.iter().map(|(_, work)| work.output.len()).max().unwrap_or(0);
            let of_prompt = same.iter().map(|(place, _)| &claims[*place]);
            let asked =
                reports::prompt_asks(of_prompt, &self.model, |tokens| prompt_rows(tokens, rules));
            match Prefix::new(|blocks| self.model.pass(&self.pool, blocks), prompt, longest) {
                Ok(prefix) => {
                    let mut prefix = prefix.while_wanted(rules.is_wanted).asking(asked);
                    for (place, work) in same {
                        reports[place] = self.judge(&claims[place], rules, work, &mut prefix);
                    }
                }
                Err(stop) => {
                    for (place, _) in same {
                        reports[place].verdict = stop.clone().into();
                    }
                }
            }
        }
        reports
    }

    /// Checks what needs no rows; what they are needed for is left, if anything.
    fn prepare(&self, claim: &Claim<'_>, rules: Rules<'_>) -> Result<Option<Work>, Stop> {
        let end = structure::check(claim, &self.model, self.context_max)?.end;
        structure::check_powv(claim, &self.model, rules.profile == Profile::Powv)?;
        let bound = match rules.profile {
            Profile::Proof => Some(proof::bind(claim, &end, &self.identity)?),
            Profile::Powv | Profile::Ranks => None,
        };
        let mut output = claim.answer.ids.clone();
        let count = output.len();
        let mut wanted: BTreeSet<usize> = match (rules.profile, rules.depth) {
            (Profile::Powv, _) => return Ok(None),
            (Profile::Ranks, _) | (_, Depth::Slow) => (0..count).collect(),
            (Profile::Proof, Depth::Fast) => random_rows(count, rules.chance),
        };
        if end == End::Implied {
            // Any token stands for the end that was not sent: only its row counts.
            output.push(0);
            wanted.insert(count);
        }
        Ok(Some(Work { bound, output, wanted }))
    }

    fn judge(
        &self,
        claim: &Claim<'_>,
        rules: Rules<'_>,
        work: Work,
        prefix: &mut Prefix<'_>,
    ) -> Report {
        let mut report = Report::bare(Verdict::Pass);
        if let Err(stop) = self.check_rows(claim, rules, work, prefix, &mut report) {
            report.verdict = stop.into();
        }
        report
    }

    fn check_rows(
        &self,
        claim: &Claim<'_>,
        rules: Rules<'_>,
        work: Work,
        prefix: &mut Prefix<'_>,
        report: &mut Report,
    ) -> Result<(), Stop> {
        let Work { bound, output, wanted } = work;
        let proved = bound.as_ref().map(|bound| (bound, &*self.identity));
        let mut judge = rows::Judge::new(claim, &self.model, proved, &wanted);
        prefix.run(&output, &mut judge)?;
        let (rows, proofs) = judge.finish();
        report.rows = rows;
        if let Some(bound) = &bound {
            report.chunks = bound.compare(&proofs);
            proof::judge(&report.chunks, bound.scheme, &self.limits)?;
            rows::check_margins(&report.rows, &self.limits)?;
            let proof = Some((bound.scheme, report.chunks.as_slice()));
            reports::check(&report.rows, proof, &self.limits)?;
            self.check_prompt(claim, proof, prefix)?;
            proof::check_nonce(claim)?;
        } else {
            targon::check(claim, &report.rows, &self.limits, rules.chance)?;
            reports::check(&report.rows, None, &self.limits)?;
            self.check_prompt(claim, None, prefix)?;
        }
        Ok(())
    }
}

impl Verifier {
    /// What was reported of the prompt, on the rows that were kept.
    fn check_prompt(
        &self,
        claim: &Claim<'_>,
        proof: Option<(Scheme, &[ChunkEvidence])>,
        prefix: &Prefix<'_>,
    ) -> Result<(), Stop> {
        if claim.answer.prompt.is_empty() {
            return Ok(());
        }
        let judge = reports::PromptJudge::new(claim, &self.model, proof, &self.limits);
        prefix.scored().iter().try_for_each(|(place, scored)| judge.check(*place, scored))
    }
}

/// Why checking ends early.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The peer's fault.
    Rejected(Rejection),
    /// Ours.
    Fault(String),
}

impl From<Stop> for Verdict {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Rejected(rejection) => Verdict::Reject(rejection),
            Stop::Fault(why) => Verdict::Unscored(why),
        }
    }
}

impl From<Rejection> for Stop {
    fn from(rejection: Rejection) -> Self {
        Stop::Rejected(rejection)
    }
}

/// The last row and [`FAST_ROWS`] others.
fn random_rows(count: usize, chance: u64) -> BTreeSet<usize> {
    let draws = (0..FAST_ROWS as u32).map(|i| {
        let word = philox(chance, [i, 0, 0, 0])[0];
        ((u64::from(word) * count as u64) >> 32) as usize
    });
    draws.chain(count.checked_sub(1)).collect()
}

/// Rows of a prompt that are scored, chosen at random; its last row belongs to the output.
fn prompt_rows(tokens: usize, rules: Rules<'_>) -> BTreeSet<usize> {
    let most = if rules.depth == Depth::Slow { PROMPT_ROWS_MAX } else { FAST_ROWS };
    let count = tokens.saturating_sub(1);
    if count <= most {
        return (0..count).collect();
    }
    let draw = |i: u32| {
        let word = philox(rules.chance, [i, 2, 0, 0])[0];
        ((u64::from(word) * count as u64) >> 32) as usize
    };
    (0..most as u32).map(draw).collect()
}
