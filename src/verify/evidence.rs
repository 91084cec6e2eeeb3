//! Sums evidence over many answers of one miner: mild cheats that no single answer shows.
//!
//! Each answer adds the logarithm of a likelihood ratio, "a cheat of the mildest kind that must be
//! seen" against "honest" ([`Calibrated`]): once for the sampler's margins, once for the energies
//! of hidden rows, once for both. Sums of such ratios are Wald's sequential test (1945); with a
//! floor at zero they are Page's test for the onset of a cheat (1954). An honest miner's ratio has
//! mean one before the logarithm, so a given answer starts a rise to [`ALARM`] with a probability
//! of at most one in a million, for each sum; for that of both only as far as margins and energies
//! err independently. What an answer adds is capped, which only lowers that: one answer never
//! decides. Old evidence fades, which lowers it too.
//!
//! Nothing here reads a clock or a file; [`EvidenceStore`] is what remembers.

use super::limits::Limits;
use super::places::{FAST_ROWS, random_rows};
use super::{Report, Verdict};
use crate::files::KeyError;
use crate::models::margin::MARGIN_CLIP;
use crate::proof::Scheme;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;

/// A sum that is an alarm: the cheat explains what was seen a million times better.
pub const ALARM: f64 = 6.0 * std::f64::consts::LN_10;
/// The most that one answer adds: an alarm takes more than four.
pub const ANSWER_MAX: f64 = ALARM / 4.0;
/// The largest sum: without a limit, a miner that has become honest would wait for its pay as long
/// as it cheated.
const SUM_MAX: f64 = 2.0 * ALARM;

/// What answers of one kind look like on average.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Side {
    /// Share of checked tokens with a margin above zero.
    pub mismatch: f64,
    /// Mean margin of a checked token, clipped at [`MARGIN_CLIP`].
    pub margin: f64,
    /// Mean energy of a chunk, in units of its limit.
    pub energy: f64,
}

impl Side {
    /// Mean margin of the tokens that have one.
    fn scale(&self) -> f64 {
        self.margin / self.mismatch
    }
}

/// What is weighed against what. The model: a token has a margin with probability `mismatch`, of
/// exponential size; the mean energy of an answer's chunks follows a gamma distribution. Real
/// margins and energies do not, so calibrate with bounds, not with means.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibrated {
    /// Honest miners.
    pub honest: Side,
    /// The mildest cheat that must be seen.
    pub cheat: Side,
    /// Shape of the gamma distribution: 1 over the squared relative spread of an answer's energy.
    /// Smaller is more careful.
    pub energy_shape: f64,
    /// What rows are weighed by where the twin measured them (`twin.rs`).
    pub twin: Weight,
    /// Answers until evidence counts half.
    pub half_life: f64,
}

/// One number for each answer, in units of its limit, of a gamma distribution.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weight {
    /// Its mean over honest answers.
    pub honest: f64,
    /// Its mean over answers of the mildest cheat that must be seen.
    pub cheat: f64,
    /// 1 over its squared relative spread.
    pub shape: f64,
}

impl Weight {
    /// Logarithm of the likelihood ratio.
    pub(super) fn gain(&self, value: f64) -> f64 {
        let Self { honest, cheat, shape } = *self;
        shape * ((honest / cheat).ln() + value * (1.0 / honest - 1.0 / cheat))
    }

    /// The same with a shape so small that what one answer stakes is, on average over `honest`
    /// answers, not more than it pays back: the mean of `exp(gain)` is at most one, which is all
    /// that an alarm's rarity rests on.
    pub(super) fn fair(self, honest: &[f64]) -> Self {
        let pays = |shape: f64| {
            let weight = Self { shape, ..self };
            let paid = honest.iter().map(|value| weight.gain(*value).min(ANSWER_MAX).exp());
            paid.sum::<f64>() <= honest.len() as f64
        };
        let mut shape = self.shape;
        while shape > SHAPE_MIN && !pays(shape) {
            shape *= SHAPE_STEP;
        }
        Self { shape: shape.max(SHAPE_MIN), ..self }
    }
}

/// Least shape, and how it is made smaller step by step.
const SHAPE_MIN: f64 = 0.05;
const SHAPE_STEP: f64 = 0.9;

impl Default for Calibrated {
    /// Honest: another stack in bf16, measured on SmolLM2-135M. Cheat: tokens as from int8 weights
    /// per channel; rows with less energy than those of int8 weights in groups of 32.
    fn default() -> Self {
        Self {
            honest: Side { mismatch: 0.025, margin: 0.0013, energy: 0.4 },
            cheat: Side { mismatch: 0.052, margin: 0.0057, energy: 0.9 },
            energy_shape: 4.0,
            twin: Weight { honest: 0.65, cheat: 1.1, shape: 8.0 },
            half_life: 200.0,
        }
    }
}

impl Calibrated {
    /// Refuses numbers that the tests cannot work with.
    ///
    /// # Errors
    /// The key, and rule and fact.
    pub fn check(&self) -> Result<(), KeyError> {
        let Self { honest, cheat, energy_shape, twin, half_life } = self;
        for (key, value, low, high) in [
            ("rates.honest.mismatch", honest.mismatch, 0.0, 1.0),
            ("rates.cheat.mismatch", cheat.mismatch, honest.mismatch, 1.0),
            ("rates.honest.margin", honest.margin, 0.0, MARGIN_CLIP),
            ("rates.cheat.margin", cheat.margin, honest.margin, MARGIN_CLIP),
            ("rates.honest.energy", honest.energy, 0.0, f64::MAX),
            ("rates.cheat.energy", cheat.energy, honest.energy, f64::MAX),
            ("rates.energy_shape", *energy_shape, 0.0, 1e3),
            ("rates.twin.honest", twin.honest, 0.0, f64::MAX),
            ("rates.twin.cheat", twin.cheat, twin.honest, f64::MAX),
            ("rates.twin.shape", twin.shape, 0.0, 1e3),
            ("rates.half_life", *half_life, 1.0, 1e9),
        ] {
            if !(value > low && value < high) {
                let high = if high == f64::MAX { String::new() } else { format!(" and {high}") };
                let between = if high.is_empty() { "above" } else { "between" };
                let rule = format!("must lie {between} {low}{high}, got {value}");
                return Err(KeyError::new(key, rule));
            }
        }
        let (honest, cheat) = (honest.scale(), cheat.scale());
        if cheat < honest {
            let what = format!(
                "a margin must be at least {honest} for each mismatch, as the honest, got {cheat}"
            );
            return Err(KeyError::new("rates.cheat.margin", what));
        }
        Ok(())
    }

    /// Logarithm of the likelihood ratio of margins, one of a checked token each.
    fn margins(&self, margins: &[f64]) -> f64 {
        let (p0, p1) = (self.honest.mismatch, self.cheat.mismatch);
        let (a0, a1) = (self.honest.scale(), self.cheat.scale());
        let (hit, miss) = ((p1 / p0).ln(), ((1.0 - p1) / (1.0 - p0)).ln());
        let (density, slope) = ((a0 / a1).ln(), 1.0 / a0 - 1.0 / a1);
        let one = |margin: f64| match margin {
            none if none <= 0.0 => miss,
            // All that is known of a clipped margin is that it was larger.
            clipped if clipped >= MARGIN_CLIP => hit + MARGIN_CLIP * slope,
            size => hit + density + size * slope,
        };
        margins.iter().map(|m| one(*m)).sum()
    }

    /// The same of rows, by the twin where it was run. Rows of one answer err together, so they
    /// count as one. NaN changes nothing.
    fn rows(&self, answer: &Observed) -> f64 {
        let (weight, value) = match (answer.twin, answer.energies.as_slice()) {
            (Some(value), _) => (self.twin, value),
            (None, []) => return 0.0,
            (None, energies) => {
                (self.energy(), energies.iter().sum::<f64>() / energies.len() as f64)
            }
        };
        if value.is_nan() { 0.0 } else { weight.gain(value) }
    }

    /// What rows are weighed by without the twin.
    pub(super) fn energy(&self) -> Weight {
        let (honest, cheat) = (self.honest.energy, self.cheat.energy);
        Weight { honest, cheat, shape: self.energy_shape }
    }
}

/// What one answer shows.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Observed {
    /// Margins of the checked tokens, clipped.
    pub margins: Vec<f64>,
    /// What its rows say together, in units of its limit: one number, or none.
    pub energies: Vec<f64>,
    /// The same of the twin, where it was run.
    pub twin: Option<f64>,
}

impl Observed {
    /// What a report says; nothing where it does not pass. A hard failure fails its answer at once,
    /// nothing is concluded from an answer that is unscored, and rates are calibrated over answers
    /// that pass.
    pub fn of(report: &Report, scheme: Option<Scheme>, limits: &Limits) -> Self {
        if report.verdict != Verdict::Pass {
            return Self::default();
        }
        let energy = scheme.and_then(|scheme| limits.share(scheme, report));
        Self {
            margins: report.rows.iter().filter_map(|r| r.margin).collect(),
            energies: energy.into_iter().collect(),
            twin: scheme.and_then(|s| limits.twin_statistic(s, report)).map(|s| s.share()),
        }
    }

    /// As much of it as the least fast check looks at, chosen by `chance` and not by what was
    /// seen: else one long honest answer would outweigh all that is known of a miner.
    pub fn thinned(self, chance: u64) -> Self {
        let chosen = random_rows(self.margins.len(), FAST_ROWS, chance);
        let margins = chosen.into_iter().filter_map(|place| self.margins.get(place).copied());
        Self { margins: margins.collect(), ..self }
    }

    /// Whether there is nothing to weigh.
    pub fn is_empty(&self) -> bool {
        self.margins.is_empty() && self.energies.is_empty() && self.twin.is_none()
    }
}

/// One number for each test.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sums {
    /// Of the margins of draws.
    pub margin: f64,
    /// Energies of hidden rows.
    pub energy: f64,
    /// Both, as if they were independent.
    pub joint: f64,
}

impl Sums {
    fn map2(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            margin: f(self.margin, other.margin),
            energy: f(self.energy, other.energy),
            joint: f(self.joint, other.joint),
        }
    }
}

/// Which test raised an alarm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Test {
    /// That of the margins.
    Margin,
    /// That of the energies.
    Energy,
    /// That of both.
    Joint,
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Test::Margin => "margin",
            Test::Energy => "energy",
            Test::Joint => "joint",
        })
    }
}

/// A sum that cannot have come about.
#[derive(Clone, Copy, PartialEq, Debug, thiserror::Error)]
#[error("must lie between 0 and {SUM_MAX:.3}, got {0}")]
pub struct SumError(pub f64);

/// What is known of one miner.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// Answers that were weighed.
    pub answers: u64,
    /// Of them, those that ended in an alarm.
    pub alarms: u64,
    /// The sums, between 0 and twice [`ALARM`].
    pub sums: Sums,
}

impl Evidence {
    /// Weighs one more answer and says what it added. An answer that shows nothing changes nothing.
    pub fn add(&mut self, rates: &Calibrated, answer: &Observed) -> Sums {
        if answer.is_empty() {
            return Sums::default();
        }
        let margin = rates.margins(&answer.margins).min(ANSWER_MAX);
        let energy = rates.rows(answer).min(ANSWER_MAX);
        let gain = Sums { margin, energy, joint: (margin + energy).min(ANSWER_MAX) };
        let keep = 0.5_f64.powf(1.0 / rates.half_life);
        self.sums = self.sums.map2(gain, |sum, gain| (sum * keep + gain).clamp(0.0, SUM_MAX));
        self.answers += 1;
        self.alarms += u64::from(self.alarm().is_some());
        gain
    }

    /// The test that says now that this miner cheats.
    pub fn alarm(&self) -> Option<Test> {
        let Sums { margin, energy, joint } = self.sums;
        let tests = [(Test::Margin, margin), (Test::Energy, energy), (Test::Joint, joint)];
        tests.into_iter().find(|(_, sum)| *sum >= ALARM).map(|(test, _)| test)
    }

    /// Whether such sums can have come about.
    pub(super) fn check(&self) -> Result<(), SumError> {
        let Sums { margin, energy, joint } = self.sums;
        match [margin, energy, joint].into_iter().find(|sum| !(0.0..=SUM_MAX).contains(sum)) {
            Some(sum) => Err(SumError(sum)),
            None => Ok(()),
        }
    }
}

/// Remembers the evidence about each miner.
pub trait EvidenceStore {
    /// Why something could not be remembered.
    type Error: fmt::Display;

    /// What is known of `miner`, if anything.
    ///
    /// # Errors
    /// When it cannot be read.
    fn load(&self, miner: &str) -> Result<Option<Evidence>, Self::Error>;

    /// Replaces what is known of `miner`.
    ///
    /// # Errors
    /// When it cannot be kept; the caller must not act on it then.
    fn save(&mut self, miner: &str, evidence: &Evidence) -> Result<(), Self::Error>;
}

/// Weighs an answer of `miner` and remembers the outcome before it is returned.
///
/// # Errors
/// Those of the store.
pub fn weigh<S: EvidenceStore>(
    store: &mut S,
    miner: &str,
    rates: &Calibrated,
    answer: &Observed,
) -> Result<(Evidence, Sums), S::Error> {
    let mut evidence = store.load(miner)?.unwrap_or_default();
    let gain = evidence.add(rates, answer);
    if !answer.is_empty() {
        store.save(miner, &evidence)?;
    }
    Ok((evidence, gain))
}

/// A store that forgets with the process.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore(BTreeMap<String, Evidence>);

impl EvidenceStore for MemoryStore {
    type Error = Infallible;

    fn load(&self, miner: &str) -> Result<Option<Evidence>, Infallible> {
        Ok(self.0.get(miner).copied())
    }

    fn save(&mut self, miner: &str, evidence: &Evidence) -> Result<(), Infallible> {
        self.0.insert(miner.to_owned(), *evidence);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Reason, Rejection};
    use super::*;

    #[test]
    fn an_answer_that_does_not_pass_is_not_weighed() {
        let report = |verdict| Report { energies: vec![90.0; 40], ..Report::bare(verdict) };
        let of =
            |verdict| Observed::of(&report(verdict), Some(Scheme::Residue), &Limits::default());
        assert!(!of(Verdict::Pass).is_empty(), "the control");
        let rejection = Rejection::new(Reason::SamplerMargin, "token 3");
        assert!(of(Verdict::Reject(rejection)).is_empty());
        assert!(of(Verdict::Unscored("no nonce".into())).is_empty());
    }

    #[test]
    fn a_fair_weight_pays_honest_answers_no_more_than_they_stake() {
        let mean = |weight: Weight, values: &[f64]| {
            let paid = values.iter().map(|value| weight.gain(*value).min(ANSWER_MAX).exp());
            paid.sum::<f64>() / values.len() as f64
        };
        // One honest answer of ten lies far out, as they do.
        let mut honest = [0.5; 10];
        honest[0] = 1.2;
        let bold = Weight { honest: 0.5, cheat: 1.0, shape: 16.0 };
        let fair = bold.fair(&honest);
        assert!(mean(bold, &honest) > 1.0, "the control");
        assert!(mean(fair, &honest) <= 1.0 && fair.shape > 1.0, "{fair:?}");
        assert!(fair.gain(1.6) > 0.5 * ANSWER_MAX, "a cheat still shows: {}", fair.gain(1.6));
        let calm = bold.fair(&[0.5; 10]);
        assert_eq!(calm, bold, "what is fair already stays");
        // Where honest answers look like cheats nothing is fair, and next to nothing is staked.
        let lost = bold.fair(&[1.5; 10]);
        assert!(lost.shape <= SHAPE_MIN && lost.gain(1.5) < 0.05, "{lost:?}");
    }
}
