//! Scores one miner's samples of one model.

use super::rules::{ScoringProfile, ScoringRules};
use crate::store::record::{ResponseCause, Sample};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The fastest answer that counts, in tokens a second: no miner reaches it, and sums stay finite.
pub const TPS_MAX: f64 = 1e9;
/// What Targon adds for a request of a user that failed (protocol 5.13), in tokens a second.
const ORGANIC_FAILED: f64 = -500.0;
/// And for one whose answer had no tokens that could be read.
const ORGANIC_EMPTY: f64 = -100.0;

/// Characters of a sentence that are kept with weights: peers have a say in some of them.
const SENTENCE_CHARS_MAX: usize = 300;

/// What rounds found, by round and uid.
pub(super) type MissReasons<'a> = BTreeMap<(&'a str, u16), &'a MissReason>;

/// What a round found about one miner, as far as a sample needs it.
#[derive(Clone, PartialEq, Debug)]
pub struct MissReason {
    /// Id of the round.
    pub round: String,
    /// The uid of the miner.
    pub uid: u16,
    /// The cause's name, where the answer was not verified.
    pub cause: Option<String>,
    /// One sentence about the cause, which names the token, field or time.
    pub error: Option<String>,
}

impl MissReason {
    /// Of one response of a round.
    pub fn of(found: ResponseCause) -> Self {
        let ResponseCause { round, uid, cause, error } = found;
        let short = |text: String| text.chars().take(SENTENCE_CHARS_MAX).collect();
        Self { round, uid, cause: cause.map(short), error: error.map(short) }
    }
}

/// What came of one request of a user (protocol 5.13).
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Organic {
    /// Verified, with so many tokens a second.
    Tps(f64),
    /// The miner gave no answer, or not a whole one.
    Failed,
    /// An answer without tokens that can be read.
    Empty,
    /// An answer that breaks a rule.
    Rejected,
    /// Trouble of the validator's own: nothing is concluded.
    Unscored,
}

/// One sample, and why it is what it is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Point {
    /// Id of the round that it was taken in.
    pub round: String,
    /// The block of the round.
    pub block: u64,
    /// Tokens a second, or none for a miss.
    pub tps: Option<f64>,
    /// The cause's name, where the round is known and the sample is a miss.
    pub cause: Option<String>,
    /// One sentence about the cause, which names the token, field or time.
    pub error: Option<String>,
}

/// The samples of one model that count, and what follows from them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Series {
    /// The model; `organics` for requests of users.
    pub model: String,
    /// The samples in the window, oldest first.
    pub points: Vec<Point>,
    /// Samples that have left the window.
    pub older: usize,
    /// Samples of a hotkey that held the place before; they count for nobody.
    pub of_others: usize,
    /// Answers in the window.
    pub answers: usize,
    /// Misses in the window.
    pub misses: usize,
    /// Mean tokens a second.
    pub mean: f64,
    /// What the share of answers makes of it: see [`sigmoid`].
    pub consistency: f64,
    /// Why it does not count, if it does not.
    pub left_out: Option<String>,
    /// `mean * consistency`, or 0 where it does not count.
    pub score: f64,
}

/// The share of requests that were answered, bent so that half is a half and four fifths nearly
/// all: `1 / (1 + exp(-(x - 0.5) / 0.1))` (protocol 5.5).
pub fn sigmoid(share: f64) -> f64 {
    1.0 / (1.0 + (-(share - 0.5) / 0.1).exp())
}

/// A mean and what consistency makes of it.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Mean {
    /// Mean speed of the samples, in tokens a second.
    pub mean: f64,
    /// Between 0 and 1.
    pub consistency: f64,
}

impl Mean {
    /// The mean speed times the consistency.
    pub fn score(self) -> f64 {
        self.mean * self.consistency
    }
}

/// Targon's `safe_mean` (protocol 5.5): the mean of the answers times the sigmoid of their share.
pub fn safe_mean(samples: &[Option<f64>]) -> Mean {
    let answers: Vec<f64> = samples.iter().flatten().copied().collect();
    let mean = answers.iter().sum::<f64>() / answers.len() as f64;
    match mean.is_finite() {
        true => Mean { mean, consistency: share(answers.len(), samples.len()) },
        false => Mean::default(),
    }
}

/// Ours: a miss is an answer of no tokens a second. Targon's mean leaves misses out, so that one
/// which pushes a slow answer out of the window raises a score; here it never does.
pub fn mean_with_misses(samples: &[Option<f64>]) -> Mean {
    if samples.is_empty() {
        return Mean::default();
    }
    let mut answers: Vec<f64> = samples.iter().flatten().copied().collect();
    // Sums of floating-point numbers depend on their order; a score must not.
    answers.sort_by(f64::total_cmp);
    // From +0: the sum of nothing is -0 in Rust, and would be printed so.
    let mean = answers.iter().fold(0.0, |sum, tps| sum + tps) / samples.len() as f64;
    Mean { mean, consistency: share(answers.len(), samples.len()) }
}

fn share(answers: usize, all: usize) -> f64 {
    sigmoid(answers as f64 / all as f64)
}

impl Series {
    /// Of one miner and model.
    pub(super) fn of(
        rules: &ScoringRules,
        model: &str,
        hotkey: &str,
        samples: &[&Sample],
        findings: &MissReasons<'_>,
    ) -> Self {
        let counts = |sample: &&&Sample| match rules.profile {
            // Samples belong to who earned them: a hotkey that takes over a uid starts with none,
            // and its predecessor's samples neither raise nor lower its score.
            ScoringProfile::Default => sample.hotkey == hotkey,
            ScoringProfile::Targon44 => true,
        };
        // NaN is a fault of ours, and faults of ours are not samples. Rounds already
        // leave out what could not be checked.
        let is_number = |s: &&&Sample| s.tps.is_none_or(|t| t.is_finite() && t >= 0.0);
        let own: Vec<&&Sample> = samples.iter().filter(counts).collect();
        let of_others = samples.len() - own.len();
        let own: Vec<&&Sample> = own.into_iter().filter(|s| is_number(s)).collect();
        let older = own.len().saturating_sub(rules.window);
        let points = own[older..].iter().map(|s| Point::of(s, findings)).collect();
        let mut series = Self { older, of_others, ..Self::empty(model) };
        series.weigh(rules.profile, points);
        series
    }

    /// Of one miner's requests of users. A failure is a miss like any other in our profile: in
    /// Targon's it takes away 500 tokens a second, and one of them makes up for ten good answers.
    pub(super) fn of_organics(profile: ScoringProfile, organics: &[Organic]) -> Self {
        let of = |organic: &Organic| match (profile, organic) {
            (_, Organic::Tps(tps)) => (tps.is_finite() && *tps >= 0.0).then_some(Some(*tps)),
            (_, Organic::Unscored) => None,
            (ScoringProfile::Targon44, Organic::Failed) => Some(Some(ORGANIC_FAILED)),
            (ScoringProfile::Targon44, Organic::Empty) => Some(Some(ORGANIC_EMPTY)),
            (ScoringProfile::Targon44, Organic::Rejected) => None,
            (ScoringProfile::Default, _) => Some(None),
        };
        let point = |tps: Option<f64>| Point {
            round: String::new(),
            block: 0,
            tps: tps.map(|tps| tps.min(TPS_MAX)),
            cause: None,
            error: None,
        };
        let mut series = Self::empty("organics");
        series.weigh(profile, organics.iter().filter_map(of).map(point).collect());
        series
    }

    fn empty(model: &str) -> Self {
        Self {
            model: model.to_owned(),
            points: Vec::new(),
            older: 0,
            of_others: 0,
            answers: 0,
            misses: 0,
            mean: 0.0,
            consistency: 0.0,
            left_out: None,
            score: 0.0,
        }
    }

    fn weigh(&mut self, profile: ScoringProfile, points: Vec<Point>) {
        let samples: Vec<Option<f64>> = points.iter().map(|p| p.tps).collect();
        let mean = match profile {
            ScoringProfile::Default => mean_with_misses(&samples),
            ScoringProfile::Targon44 => safe_mean(&samples),
        };
        self.answers = samples.iter().flatten().count();
        self.misses = samples.len() - self.answers;
        (self.mean, self.consistency, self.score) = (mean.mean, mean.consistency, mean.score());
        self.points = points;
    }

    /// The same, without a score where there is a reason for that.
    pub(super) fn left_out(self, why: Option<&str>) -> Self {
        let score = if why.is_some() { 0.0 } else { self.score };
        Self { left_out: why.map(str::to_owned), score, ..self }
    }
}

impl Point {
    fn of(sample: &Sample, findings: &MissReasons<'_>) -> Self {
        let finding = findings.get(&(sample.round.as_str(), sample.uid));
        let said = |of: fn(&MissReason) -> &Option<String>| finding.and_then(|f| of(f).clone());
        Self {
            round: sample.round.clone(),
            block: sample.block,
            tps: sample.tps.map(|tps| tps.min(TPS_MAX)),
            cause: said(|f| &f.cause),
            error: said(|f| &f.error),
        }
    }
}
