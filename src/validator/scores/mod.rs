//! Computes weights from samples, by pure functions over plain records.
//!
//! The input is the members of the subnet, their samples, and what was found about them. The output
//! is the weights as the chain takes them, and every number behind them ([`Explanation`]). Nothing
//! here reads a clock, a file or the chain, and the same records give the same weights in any order
//! of uids.
//!
//! There are two profiles. [`ScoringProfile::Targon44`] is the arithmetic of Targon 4.4 (protocol
//! 5.5 and 5.6), for validators that must agree with it. [`ScoringProfile::Default`] corrects it.
//! Each rule is explained where it is applied: misses and windows in [`series`], shares in
//! `share_of_best`, pay and evidence in [`gate`], the chain's minimum in [`emission`].

pub mod emission;
pub mod explanation;
pub mod gate;
pub mod rules;
pub mod series;
#[cfg(test)]
mod tests;

use crate::store::record::Sample;
use emission::{ChainLimits, Spare};
use explanation::{Decision, Explanation};
use gate::HotkeyState;
use rules::{ScoringProfile, ScoringRules};
use series::{MissReason, MissReasons, Organic, Series};
use std::collections::{BTreeMap, BTreeSet};

/// A sum of scores below this decides nothing (protocol 5.5).
const SUM_MIN: f64 = 1e-9;

/// A place on the subnet, and what is known of who holds it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Seat {
    /// Who holds it, as SS58.
    pub hotkey: String,
    /// The models that it says it serves, as it wrote them: names may be repeated.
    pub models: Vec<String>,
    /// Its requests of real users, where any are known.
    pub organics: Option<Vec<Organic>>,
    /// What the checks of many answers say together.
    pub state: HotkeyState,
}

/// What weights are made of.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// Every place of the subnet by its uid.
    pub seats: &'a BTreeMap<u16, Seat>,
    /// The models that this validator asks for.
    pub models: &'a [String],
    /// All samples, those of one miner and model oldest first.
    pub samples: &'a [Sample],
    /// What rounds found, to explain samples with. A sample without one still counts.
    pub findings: &'a [MissReason],
    /// What the chain takes.
    pub limits: ChainLimits,
}

/// Why there are no weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoWeights {
    /// The subnet has no members.
    #[error("the subnet has no places")]
    Empty,
    /// Nobody has earned anything.
    #[error("all scores together are below {SUM_MIN}: no miner has a verified answer that counts")]
    AllZero,
    /// Nothing to tell miners apart by; only in Targon's arithmetic, where it divides by zero.
    #[error("all scores are equal, which the arithmetic of targon-4.4 cannot normalise")]
    AllEqual,
    /// A sum too large for its type; only in Targon's arithmetic.
    #[error("scores are too large to be added or compared")]
    NotFinite,
}

/// Decides weights, with an explanation for each uid whether or not there are any.
pub fn decide(rules: &ScoringRules, input: &Input<'_>) -> Decision {
    let mut ledger: BTreeMap<u16, BTreeMap<&str, Vec<&Sample>>> = BTreeMap::new();
    for sample in input.samples {
        let of_miner = ledger.entry(sample.uid).or_default();
        of_miner.entry(sample.model.as_str()).or_default().push(sample);
    }
    let findings = input.findings.iter().map(|f| ((f.round.as_str(), f.uid), f)).collect();
    let asked: BTreeSet<&str> = input.models.iter().map(String::as_str).collect();
    let nothing = BTreeMap::new();
    let mut miners: Vec<Explanation> = Vec::with_capacity(input.seats.len());
    for (uid, seat) in input.seats {
        let samples = ledger.get(uid).unwrap_or(&nothing);
        miners.push(explain(rules, *uid, seat, &asked, samples, &findings));
    }
    let scores: Vec<f64> = miners.iter().map(|m| m.score).collect();
    let normalised = match rules.profile {
        ScoringProfile::Default => share_of_best(&scores),
        ScoringProfile::Targon44 => min_max(&scores),
    };
    let outcome = normalised.map_err(|none| none.to_string()).and_then(|normalised| {
        let raw: Vec<(u16, f64)> = input.seats.keys().copied().zip(normalised).collect();
        for (miner, (_, value)) in miners.iter_mut().zip(&raw) {
            miner.normalised = *value;
        }
        let values = match rules.profile {
            ScoringProfile::Default => emission::ours(&raw, spare(&miners), input.limits),
            ScoringProfile::Targon44 => emission::targon(&raw, input.limits),
        };
        values.map_err(|none| none.to_string())
    });
    let values = outcome.as_deref().unwrap_or_default();
    let weights: BTreeMap<u16, u16> = values.iter().copied().collect();
    for miner in &mut miners {
        miner.weight = weights.get(&miner.uid).copied().unwrap_or(0);
    }
    let (values, none) = match outcome {
        Ok(values) => (values, None),
        Err(why) => (Vec::new(), Some(why)),
    };
    Decision { profile: rules.profile, window: rules.window, values, none, miners }
}

/// Who may be named though it has earned nothing.
fn spare(miners: &[Explanation]) -> Spare {
    let of = |pays| miners.iter().filter(|miner| miner.gate.pays == pays).map(|m| m.uid).collect();
    Spare { fine: of(true), shut: of(false) }
}

/// One miner's numbers, up to its score.
fn explain(
    rules: &ScoringRules,
    uid: u16,
    seat: &Seat,
    asked: &BTreeSet<&str>,
    samples: &BTreeMap<&str, Vec<&Sample>>,
    findings: &MissReasons<'_>,
) -> Explanation {
    // A set: a model that is named twice in a miner's list is still one model, and naming it again
    // must not pay.
    let served: BTreeSet<&str> = seat.models.iter().map(String::as_str).collect();
    let known: BTreeSet<&str> = samples.keys().copied().chain(served.clone()).collect();
    let mut models = Vec::new();
    for model in known {
        let all = samples.get(model).map_or(&[][..], Vec::as_slice);
        let left_out = match (asked.contains(model), served.contains(model)) {
            (true, true) => None,
            (false, _) => Some("this validator does not ask for it"),
            (true, false) => Some("the miner does not say that it serves it"),
        };
        let series = Series::of(rules, model, &seat.hotkey, all, findings);
        // Without samples and not asked for, it is only a name of the miner's.
        if left_out.is_none() || !series.points.is_empty() {
            models.push(series.left_out(left_out));
        }
    }
    let organics = seat.organics.as_deref().map(|o| Series::of_organics(rules.profile, o));
    let earned =
        models.iter().chain(&organics).map(|s| s.score).fold(0.0, |sum, score| sum + score);
    let sum = earned.clamp(f64::MIN, f64::MAX);
    let gate = seat.state.explained(rules.profile);
    let score = if gate.pays { sum } else { 0.0 };
    Explanation {
        uid,
        hotkey: seat.hotkey.clone(),
        models,
        organics,
        sum,
        gate,
        score,
        normalised: 0.0,
        weight: 0,
    }
}

/// What a vector of scores must be before anything is divided.
fn check(scores: &[f64]) -> Result<(), NoWeights> {
    if scores.is_empty() {
        return Err(NoWeights::Empty);
    }
    let sum = scores.iter().sum::<f64>();
    match (sum.is_finite(), sum < SUM_MIN) {
        (false, _) => Err(NoWeights::NotFinite),
        (_, true) => Err(NoWeights::AllZero),
        _ => Ok(()),
    }
}

/// Targon's normalisation (protocol 5.5): the worst gets 0, the best 1.
fn min_max(scores: &[f64]) -> Result<Vec<f64>, NoWeights> {
    check(scores)?;
    let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let worst = scores.iter().copied().fold(f64::INFINITY, f64::min);
    if best == worst {
        return Err(NoWeights::AllEqual);
    }
    let normalised: Vec<f64> = scores.iter().map(|s| (s - worst) / (best - worst)).collect();
    match normalised.iter().all(|value| value.is_finite()) {
        true => Ok(normalised),
        false => Err(NoWeights::NotFinite),
    }
}

/// Ours: the share of the best score, so that equal miners get equal weights and the worst of good
/// miners gets what it earned. Where somebody has earned nothing, as nearly always, it is the same
/// as [`min_max`].
fn share_of_best(scores: &[f64]) -> Result<Vec<f64>, NoWeights> {
    check(scores)?;
    let best = scores.iter().copied().fold(0.0, f64::max);
    Ok(scores.iter().map(|score| score / best).collect())
}
