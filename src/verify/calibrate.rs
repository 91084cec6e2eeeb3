//! Derives limits from honest answers: what miners of one class measured on one half of the prompts
//! becomes limits, and the other half says how often these reject an honest answer.
//!
//! Answers to the same prompt stay on one side: their errors are alike. A limit is the largest
//! honest value times a factor for what the sample did not show; so the rate that the other half
//! shows is small, and its upper bound says how small it can be claimed to be.

use super::capture::CheckedChoice;
use super::evidence::{Calibrated, Side, Weight};
use super::limits::Limits;
use super::limits_file::{HeldOut, LimitsFile, Measured, Share, ValueSpread};
use super::places::{FAST_ROWS, random_rows};
use super::rows::check_margins;
use super::statistic::{ByRows, Statistic};
use super::twin::SQUARE_MIN;
use super::{ChunkEvidence, Report, RowEvidence, Verdict, bounds};
use crate::models::margin::MARGIN_CLIP;
use crate::proof::codec::{Encoder, Hash, first_u64};
use crate::proof::{CHUNK_ROWS, Scheme};
use std::borrow::Cow;
use std::collections::BTreeSet;

/// On the largest honest energy. Energy grows with the square of the error, so this is 22 % of
/// error; the mildest cheat that was measured, int8 weights in groups of 32, has 3.6 times the
/// energy of an honest stack at the median, int8 per channel has 7 times (SmolLM2-135M).
pub const ENERGY_FACTOR: f64 = 1.5;
/// On the largest statistic of an honest answer: 12 % of error.
pub const STATISTIC_FACTOR: f64 = 1.25;
/// On the largest honest margin, and on the largest mean of them.
pub const MARGIN_FACTOR: f64 = 1.5;
/// Least limits: where all honest rows are equal bit for bit, `exact` is the better limit.
const ENERGY_U8_MIN: f64 = 1.0;
const ENERGY_U4_MIN: f64 = 0.1;
const TWIN_MIN: f64 = 0.1;
const MARGIN_MIN: f64 = 0.01;
const MARGIN_MEAN_MIN: f64 = 0.001;
/// Fast checks of each answer whose mean margins are taken: means over few tokens vary more than
/// those over all of them.
const FAST_CHECKS: u64 = 32;
/// The mildest cheat that evidence over many answers is to find: at least this share of tokens...
const CHEAT_MISMATCH_MIN: f64 = 0.02;
/// ...and so many times the honest share, margin of a mismatch, and energy.
const CHEAT_FACTOR: f64 = 2.0;
/// Margin of an honest mismatch where none was seen, and its bounds, in logits.
const MISMATCH_MARGIN: (f64, f64, f64) = (0.052, 0.001, 0.45);
/// Least honest energy, in units of its limit.
const ENERGY_MEAN_MIN: f64 = 0.05;
/// Answers from which the spread of energies is taken, and bounds of the shape.
const SHAPE_ANSWERS_MIN: usize = 20;
const SHAPE: (f64, f64) = (1.0, 16.0);
/// Answers until evidence counts half.
const HALF_LIFE: f64 = 200.0;

/// An honest answer, checked at every row under [`Limits::NONE`].
#[derive(Clone, PartialEq, Debug)]
pub struct HonestSample {
    /// Hash of the prompt, by which answers are told apart.
    pub prompt: Hash,
    /// How it was proved.
    pub scheme: Scheme,
    /// What verification found of the answer.
    pub report: Report,
}

/// Why no limits are taken from an answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoSample {
    /// Its proof has no energies, or it has no proof.
    #[error("only residue schemes have energies")]
    Scheme,
    /// It did not pass.
    #[error("{0}")]
    NotPassed(Verdict),
}

impl HonestSample {
    /// Of an answer that passed under [`Limits::NONE`].
    ///
    /// # Errors
    /// Why it says nothing about honest answers.
    pub fn of_checked(checked: CheckedChoice) -> Result<Self, NoSample> {
        let CheckedChoice { scheme, request, report, .. } = checked;
        match (&report.verdict, scheme) {
            (Verdict::Pass, Some(scheme @ (Scheme::Residue | Scheme::ResidueU4))) => {
                Ok(Self::new(&request.prompt, scheme, report))
            }
            (Verdict::Pass, _) => Err(NoSample::Scheme),
            (verdict, _) => Err(NoSample::NotPassed(verdict.clone())),
        }
    }

    /// Of an answer to the prompt with these ids.
    pub fn new(prompt: &[u32], scheme: Scheme, report: Report) -> Self {
        let prompt = Encoder::new("targon-engine/prompt/1").ids(prompt).finish();
        Self { prompt, scheme, report }
    }

    fn margins(&self) -> impl Iterator<Item = f64> {
        self.report.rows.iter().filter_map(|r| r.margin)
    }

    /// Energies of its chunks as those of whole ones; those that are equal bit for bit have none.
    fn energies(&self) -> impl Iterator<Item = f64> {
        let energy = |c: &ChunkEvidence| match c.is_exact {
            true => Some(0.0),
            false => c.energy.map(|energy| energy / c.limit(1.0)),
        };
        self.report.chunks.iter().filter_map(energy)
    }

    /// Those of whole chunks in units of what rounding alone gives them, where that is known.
    fn energies_in_roundings(&self) -> impl Iterator<Item = f64> {
        let energy = |c: &ChunkEvidence| match c.is_exact {
            true => Some(0.0),
            false => Some(c.energy? / c.rounding?.max(SQUARE_MIN)),
        };
        let whole = self.report.chunks.iter().filter(|chunk| chunk.rows == CHUNK_ROWS);
        whole.filter_map(energy)
    }

    /// What `measure` says of its rows; zeros where all are equal bit for bit.
    fn values(&self, measure: Measure) -> Cow<'_, [f64]> {
        let Report { chunks, energies, twin, .. } = &self.report;
        match measure {
            _ if !chunks.is_empty() && chunks.iter().all(|c| c.is_exact) => {
                Cow::Owned(vec![0.0; self.report.rows.len()])
            }
            Measure::Energy => Cow::Borrowed(energies),
            Measure::Twin => Cow::Borrowed(twin),
        }
    }

    /// What its rows say together, under `limits`.
    fn statistic(&self, measure: Measure, limits: &Limits) -> Option<Statistic> {
        let by_rows = match measure {
            Measure::Energy => limits.trimmed(self.scheme)?,
            Measure::Twin => limits.twin(self.scheme)?,
        };
        Statistic::of(&self.values(measure), &by_rows)
    }

    /// The fewest rows that a fast check of this answer would have looked at.
    fn fast(&self, chance: u64) -> Vec<RowEvidence> {
        let wanted = random_rows(self.report.rows.len(), FAST_ROWS, chance);
        self.report.rows.iter().filter(|r| wanted.contains(&r.index)).cloned().collect()
    }
}

/// What is measured of a row.
#[derive(Clone, Copy)]
enum Measure {
    /// The energy of its residues.
    Energy,
    /// The same in units of what rounding moves it by.
    Twin,
}

/// Calibration samples and those that are held out.
pub type Split = (Vec<HonestSample>, Vec<HonestSample>);

/// Too few prompts, or a share of them that leaves one side empty.
#[derive(Clone, Copy, PartialEq, Debug, thiserror::Error)]
#[error("needs prompts on both sides, but {share} of {count} distinct prompts holds {held} out")]
pub struct SplitError {
    /// The share that is held out.
    pub share: f64,
    /// Distinct prompts.
    pub count: usize,
    /// Those that are held out.
    pub held: usize,
}

/// Splits samples by prompt; `share` of the prompts is held out. The same samples are always split
/// in the same way.
///
/// # Errors
/// When a side would be empty.
pub fn split(samples: Vec<HonestSample>, share: f64) -> Result<Split, SplitError> {
    // In the order of their hashes, which nobody chose.
    let prompts: BTreeSet<Hash> = samples.iter().map(|s| s.prompt).collect();
    let (count, held) = (prompts.len(), (share * prompts.len() as f64).round() as usize);
    if held == 0 || held >= count {
        return Err(SplitError { share, count, held });
    }
    let held: BTreeSet<Hash> = prompts.into_iter().take(held).collect();
    Ok(samples.into_iter().partition(|s| !held.contains(&s.prompt)))
}

/// Limits for the model of hash `model` and miners of `class`, with what they rest on.
pub fn limits_file(model: &Hash, class: &str, (calibration, held_out): &Split) -> LimitsFile {
    let limits = limits(calibration);
    let rates = rates(calibration, &limits);
    let held_out = hold_out(held_out, &limits);
    LimitsFile::new(model, class, (limits, rates), measured(calibration), held_out)
}

fn spread(samples: &[HonestSample], scheme: Scheme) -> Option<ValueSpread> {
    let of_scheme = samples.iter().filter(|s| s.scheme == scheme);
    ValueSpread::of(of_scheme.flat_map(HonestSample::energies).collect())
}

fn in_roundings(samples: &[HonestSample]) -> Option<ValueSpread> {
    ValueSpread::of(samples.iter().flat_map(HonestSample::energies_in_roundings).collect())
}

/// How the statistics of whole answers lie.
fn together(samples: &[HonestSample], scheme: Scheme, measure: Measure) -> Option<ValueSpread> {
    let of_scheme = samples.iter().filter(|s| s.scheme == scheme);
    let value = |s: &HonestSample| Some(s.statistic(measure, &Limits::NONE)?.value);
    ValueSpread::of(of_scheme.filter_map(value).collect())
}

fn prompts(samples: &[HonestSample]) -> usize {
    samples.iter().map(|s| s.prompt).collect::<BTreeSet<_>>().len()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (count, sum) = values.fold((0_usize, 0.0), |(n, sum), x| (n + 1, sum + x));
    sum / count.max(1) as f64
}

fn mean_margin(rows: &[RowEvidence]) -> f64 {
    mean(rows.iter().filter_map(|r| r.margin))
}

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, f64::max)
}

/// Tokens with a margin above zero, and all.
fn mismatches(samples: &[HonestSample]) -> (usize, usize) {
    let margins = || samples.iter().flat_map(HonestSample::margins);
    (margins().filter(|m| *m > 0.0).count(), margins().count())
}

fn measured(samples: &[HonestSample]) -> Measured {
    let margins = || samples.iter().flat_map(HonestSample::margins);
    let (mismatched, tokens) = mismatches(samples);
    Measured {
        prompts: prompts(samples),
        answers: samples.len(),
        tokens: samples.iter().map(|s| s.report.rows.len()).sum(),
        energy_u8: spread(samples, Scheme::Residue),
        energy_u4: spread(samples, Scheme::ResidueU4),
        energy_rounding: in_roundings(samples),
        trimmed_u8: together(samples, Scheme::Residue, Measure::Energy),
        trimmed_u4: together(samples, Scheme::ResidueU4, Measure::Energy),
        twin_u8: together(samples, Scheme::Residue, Measure::Twin),
        twin_u4: together(samples, Scheme::ResidueU4, Measure::Twin),
        twin_share: mean(samples.iter().filter_map(|s| s.report.twin_share)),
        mismatch_rate: mismatched as f64 / tokens.max(1) as f64,
        margin_mean: mean(margins()),
        margin_max: largest(margins()),
    }
}

fn limits(samples: &[HonestSample]) -> Limits {
    let default = Limits::default();
    // The largest honest value is never below the 99.9th percentile.
    let energy = |scheme, least: f64, otherwise| match spread(samples, scheme) {
        Some(spread) => (spread.max * ENERGY_FACTOR).max(least),
        None => otherwise,
    };
    let of =
        |scheme, measure, least, otherwise| by_rows(samples, (scheme, measure), least, otherwise);
    let margin = largest(samples.iter().flat_map(HonestSample::margins));
    let fast_means =
        samples.iter().flat_map(|s| (0..FAST_CHECKS).map(move |c| mean_margin(&s.fast(c))));
    let means = largest(samples.iter().map(|s| mean(s.margins())).chain(fast_means));
    Limits {
        energy_u8: energy(Scheme::Residue, ENERGY_U8_MIN, default.energy_u8),
        energy_u4: energy(Scheme::ResidueU4, ENERGY_U4_MIN, default.energy_u4),
        energy_rounding: in_roundings(samples).map_or(0.0, |spread| spread.max * ENERGY_FACTOR),
        trimmed_u8: of(Scheme::Residue, Measure::Energy, ENERGY_U8_MIN, default.trimmed_u8),
        trimmed_u4: of(Scheme::ResidueU4, Measure::Energy, ENERGY_U4_MIN, default.trimmed_u4),
        twin_u8: of(Scheme::Residue, Measure::Twin, TWIN_MIN, default.twin_u8),
        twin_u4: of(Scheme::ResidueU4, Measure::Twin, TWIN_MIN, default.twin_u4),
        margin: (margin * MARGIN_FACTOR).clamp(MARGIN_MIN, MARGIN_CLIP),
        margin_mean: (means * MARGIN_FACTOR).clamp(MARGIN_MEAN_MIN, MARGIN_CLIP),
        ..default
    }
}

fn by_rows(
    samples: &[HonestSample],
    (scheme, measure): (Scheme, Measure),
    least: f64,
    otherwise: ByRows,
) -> ByRows {
    let of_scheme = samples.iter().filter(|s| s.scheme == scheme);
    let values: Vec<Cow<'_, [f64]>> = of_scheme.map(|s| s.values(measure)).collect();
    ByRows::measured(values.iter().map(|v| &**v), (STATISTIC_FACTOR, least), otherwise)
}

/// What evidence over many answers is weighed by: honest rates at their upper bounds.
fn rates(samples: &[HonestSample], limits: &Limits) -> Calibrated {
    let (mismatched, tokens) = mismatches(samples);
    let (usual, least, most) = MISMATCH_MARGIN;
    let sum: f64 = samples.iter().flat_map(HonestSample::margins).sum();
    let scale = match mismatched {
        0 => usual,
        count => (sum / count as f64).clamp(least, most),
    };
    let honest_mismatch = bounds::upper(mismatched, tokens).min(0.5);
    // Never so much that an honest rate above a half has no cheat above it.
    let cheat_mismatch =
        (CHEAT_FACTOR * honest_mismatch).max(CHEAT_MISMATCH_MIN).min((1.0 + honest_mismatch) / 2.0);
    let shares = |measure| -> Vec<f64> {
        samples.iter().filter_map(|s| Some(s.statistic(measure, limits)?.share())).collect()
    };
    let default = Calibrated::default();
    let energy = weight(&shares(Measure::Energy), default.energy());
    let twin = weight(&shares(Measure::Twin), default.twin);
    let honest =
        Side { mismatch: honest_mismatch, margin: honest_mismatch * scale, energy: energy.honest };
    let cheat = Side {
        mismatch: cheat_mismatch,
        margin: cheat_mismatch * CHEAT_FACTOR * scale,
        energy: energy.cheat,
    };
    Calibrated { honest, cheat, energy_shape: energy.shape, twin, half_life: HALF_LIFE }
}

/// What statistics are weighed by, given honest ones; the more careful the fewer there are.
fn weight(shares: &[f64], otherwise: Weight) -> Weight {
    if shares.is_empty() {
        return otherwise;
    }
    let mean = mean(shares.iter().copied());
    let honest = mean.max(ENERGY_MEAN_MIN);
    let weight = Weight { honest, cheat: CHEAT_FACTOR * honest, shape: shape(shares, mean) };
    weight.fair(shares)
}

/// 1 over the squared relative spread; the most careful value where few answers say it.
fn shape(energies: &[f64], mean: f64) -> f64 {
    let (low, high) = SHAPE;
    let variance = self::mean(energies.iter().map(|e| (e - mean).powi(2)));
    if energies.len() < SHAPE_ANSWERS_MIN || variance <= 0.0 {
        return low;
    }
    (mean * mean / variance).clamp(low, high)
}

/// Checks honest answers by the limits: single margins at every row, means over all rows and over
/// the few of the least fast check, where they spread wider.
fn hold_out(samples: &[HonestSample], limits: &Limits) -> HeldOut {
    let is_far = |sample: &HonestSample| {
        sample.report.chunks.iter().any(|c| limits.is_over(sample.scheme, c))
    };
    let energy = |scheme: Scheme| {
        let of_scheme = samples.iter().filter(|s| s.scheme == scheme);
        let (far, count) =
            of_scheme.fold((0, 0), |(far, n), s| (far + usize::from(is_far(s)), n + 1));
        Share::new(far, count)
    };
    let over = |measure| {
        let statistics = samples.iter().filter_map(|s| s.statistic(measure, limits));
        let over: Vec<bool> = statistics.map(|statistic| statistic.is_over()).collect();
        Share::new(over.iter().filter(|is_over| **is_over).count(), over.len())
    };
    let fast: Vec<Vec<RowEvidence>> =
        (0_u64..).zip(samples).map(|(i, s)| s.fast(first_u64(&s.prompt) ^ i)).collect();
    let of_rows = |is_over: &dyn Fn(&[RowEvidence]) -> bool| {
        let all = samples.iter().map(|s| s.report.rows.as_slice());
        let either = all.zip(&fast).filter(|(all, fast)| is_over(all) || is_over(fast));
        Share::new(either.count(), fast.len())
    };
    let limit = limits.margin_max();
    let single = |rows: &[RowEvidence]| rows.iter().any(|r| r.margin.is_some_and(|m| m > limit));
    let on_average = |rows: &[RowEvidence]| {
        let margins = rows.iter().filter(|row| row.margin.is_some()).count();
        mean_margin(rows) > limits.margin_mean_max(margins)
    };
    let breaks = |rows: &[RowEvidence]| check_margins(rows, limits).is_err();
    let rejected = samples.iter().zip(&fast);
    let rejected = rejected.filter(|(s, rows)| is_far(s) || breaks(&s.report.rows) || breaks(rows));
    HeldOut {
        prompts: prompts(samples),
        answers: samples.len(),
        energy_u8: energy(Scheme::Residue),
        energy_u4: energy(Scheme::ResidueU4),
        trimmed: over(Measure::Energy),
        twin: over(Measure::Twin),
        margin: of_rows(&single),
        margin_mean: of_rows(&on_average),
        rejected: Share::new(rejected.count(), samples.len()),
    }
}
