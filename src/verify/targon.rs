//! Applies the rules of Targon's verifier 4.2 to 4.4 over ranks and log-probabilities, read from
//! one pass over ids. Where the original could be bypassed or crashed, the rule is corrected: the
//! mean agreement counts, all end tokens count, ids and text are tied together before, certainty
//! that the model does not have counts however it is written, and nothing divides by zero.

use super::report::RowEvidence;
use super::{Claim, Limits, Reason, Rejection, Stop};
use crate::ops::philox::philox;
use std::collections::BTreeSet;

/// Tokens of the shortest answer that is checked.
const TOKENS_MIN: usize = 3;
/// A rank that no honest sampler reaches.
const RANK_MAX: u32 = 75;
/// A rank that is rare, and how many of them an answer of [`RARE_PER`] tokens may hold.
const RANK_RARE: u32 = 25;
const RARE_MAX: usize = 5;
const RARE_PER: usize = 128;
/// An end token that outranks a token of a greater rank than this was skipped.
const SKIPPED_RANK: u32 = 10;
/// Places that are looked at more closely, besides the first and the last.
const RANDOM_PLACES: usize = 3;
/// Above this temperature any token may be drawn anywhere.
const RANDOM_TEMPERATURE_MAX: f32 = 0.75;
/// A report above this claims certainty, which the model must have to [`UNCERTAIN`].
const CERTAIN: f64 = -1e-6;
const UNCERTAIN: f64 = -0.05;
/// False certainties that an answer may hold, and one more for each so many tokens.
const CERTAIN_MAX: usize = 2;
const CERTAIN_PER: usize = 20;

/// One rule, and what it says of an answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ruling {
    /// The rule, by the reason that breaking it has.
    pub reason: Reason,
    /// What the rule demands, and what the answer has.
    pub what: String,
    /// Where it is broken: at a row, or behind the last one by all of them.
    pub broken_at: Option<usize>,
}

/// Applies the rules to the rows of a whole output. `chance` picks the random places.
///
/// # Errors
/// The first rule that is broken.
pub fn check(
    claim: &Claim<'_>,
    rows: &[RowEvidence],
    limits: &Limits,
    chance: u64,
) -> Result<(), Stop> {
    let broken = rulings(claim, rows, limits, chance).into_iter().filter(|r| r.broken_at.is_some());
    match broken.min_by_key(|ruling| ruling.broken_at) {
        Some(Ruling { reason, what, .. }) => Err(Rejection::new(reason, what).into()),
        None => Ok(()),
    }
}

/// What every rule says of the rows of a whole output, in the order in which they count. An answer
/// that is too short is checked by no other.
pub fn rulings(
    claim: &Claim<'_>,
    rows: &[RowEvidence],
    limits: &Limits,
    chance: u64,
) -> Vec<Ruling> {
    let count = rows.len();
    // Of rules that all rows break together, the first in order counts.
    let whole = |reason, is_broken: bool, what: String| {
        let broken_at = is_broken.then_some(count);
        Ruling { reason, what, broken_at }
    };
    let what = format!("an answer has at least {TOKENS_MIN} tokens, this has {count}");
    let length = whole(Reason::TooShort, count < TOKENS_MIN, what);
    if length.broken_at.is_some() {
        return vec![length];
    }
    let temperature = claim.request.sampling.temperature.max(0.0);
    let not_first = rows.iter().filter(|row| row.rank != 1).count();
    let first = format!("{not_first} of {count} tokens are not the most probable, below a half");
    let agreements = rows.iter().map(|row| agreement(row, temperature));
    let (total, perfect) = agreements.fold((0.0, 0), |(total, perfect), (score, is_perfect)| {
        (total + score, perfect + usize::from(is_perfect))
    });
    let mean = total / count as f64;
    let agree = format!("log-probabilities agree by {mean:.3}, at least {}", limits.agreement);
    let perfect_max = CERTAIN_MAX + count / CERTAIN_PER;
    let certain = format!("{perfect} tokens are reported as certain and are not");
    let certain = format!("{certain}, at most {perfect_max}");
    let rare = rows.iter().filter(|row| row.rank >= RANK_RARE).count();
    let rare_max = RARE_MAX * count.div_ceil(RARE_PER);
    let few = format!("{rare} tokens have a rank of {RANK_RARE} or more, below {rare_max}");
    vec![
        length,
        unlikely_end(claim, rows, known(temperature)),
        skipped_end(rows, known(temperature)),
        hardly_possible(rows),
        whole(Reason::UnlikelyTokens, 2 * not_first >= count, first),
        whole(Reason::LogprobMismatch, mean < limits.agreement, agree),
        whole(Reason::Overfit, perfect > perfect_max, certain),
        whole(Reason::UnlikelyToken, rare >= rare_max, few),
        random_places(rows, temperature, chance),
    ]
}

/// Whether an answer ends before its limit by an end token that is hardly possible there: it was
/// cut. One that was not sent is held to the same rank ([`check_implied_end`]).
fn unlikely_end(claim: &Claim<'_>, rows: &[RowEvidence], known: u32) -> Ruling {
    let is_early = rows.len() < claim.request.max_tokens;
    let end = rows.last().filter(|row| is_early && row.end_rank == Some(row.rank));
    let is_broken = end.is_some_and(|row| row.rank > known);
    let what = match end {
        Some(RowEvidence { rank, .. }) => format!("the end has rank {rank}, at most {known}"),
        None => format!("an early end has a rank of at most {known}"),
    };
    Ruling { reason: Reason::EarlyEnd, what, broken_at: is_broken.then(|| rows.len() - 1) }
}

/// Whether an end token was more probable than an improbable one that was taken in its place.
fn skipped_end(rows: &[RowEvidence], known: u32) -> Ruling {
    let is_skipped = |row: &&RowEvidence| {
        let outranked = row.end_rank.is_some_and(|end| end <= known && end < row.rank);
        outranked && row.rank > SKIPPED_RANK
    };
    let (what, broken_at) = match rows.iter().position(|row| is_skipped(&row)) {
        Some(at) => {
            let RowEvidence { index, rank, .. } = rows[at];
            (format!("an end token outranks token {index} of rank {rank}"), Some(at))
        }
        None => (format!("no end token outranks one of a rank above {SKIPPED_RANK}"), None),
    };
    Ruling { reason: Reason::SkippedEosEot, what, broken_at }
}

/// Whether a token has a rank that no sampler reaches.
fn hardly_possible(rows: &[RowEvidence]) -> Ruling {
    let broken_at = rows.iter().position(|row| row.rank >= RANK_MAX);
    let worst = rows.iter().enumerate().max_by_key(|(_, row)| row.rank).map(|(at, _)| at);
    let what = match broken_at.or(worst) {
        Some(at) => {
            let RowEvidence { index, rank, .. } = rows[at];
            format!("token {index} has rank {rank}, below {RANK_MAX}")
        }
        None => format!("ranks lie below {RANK_MAX}"),
    };
    Ruling { reason: Reason::UnlikelyToken, what, broken_at }
}

/// Where an answer came without its end token: `rank` is the best one of an end after its last
/// token, and must be likely.
///
/// # Errors
/// When it is not, or the model has no end token.
pub fn check_implied_end(claim: &Claim<'_>, rank: Option<u32>) -> Result<(), Stop> {
    let known = known(claim.request.sampling.temperature);
    match rank {
        Some(rank) if rank <= known => Ok(()),
        Some(rank) => {
            let what = format!("after the last token an end has rank {rank}, at most {known}");
            Err(Rejection::new(Reason::EarlyEnd, what).into())
        }
        None => {
            let what = "this model has no end token";
            Err(Rejection::new(Reason::EarlyEnd, what).into())
        }
    }
}

/// The ranks that the original asks its engine for.
pub fn known(temperature: f32) -> u32 {
    (10.0 * temperature.max(0.0)) as u32 + 6
}

/// How well the reported log-probability of a row agrees with ours, and whether it claims a
/// certainty that is not there. No report scores zero.
fn agreement(row: &RowEvidence, temperature: f32) -> (f64, bool) {
    let Some(reported) = row.reported else { return (0.0, false) };
    let score = 1.0 - (row.logprob.exp() - reported.exp()).abs().min(1.0);
    let is_perfect = reported > CERTAIN && row.logprob < UNCERTAIN;
    let is_good = score >= 0.9 || (row.rank == 1 && temperature >= 0.9 && reported != 0.0);
    (if is_good { 1.0 } else { score }, is_perfect)
}

/// Whether the first, the last and some random tokens are among the most probable ones.
fn random_places(rows: &[RowEvidence], temperature: f32, chance: u64) -> Ruling {
    let (reason, count) = (Reason::LogprobRandom, rows.len());
    if temperature > RANDOM_TEMPERATURE_MAX {
        let what = format!("no place is looked at above temperature {RANDOM_TEMPERATURE_MAX}");
        return Ruling { reason, what, broken_at: None };
    }
    let known = (10.0 * temperature) as u32 + 3;
    let mut places = places(count, chance).into_iter();
    match places.find(|place| rows[*place].rank > known) {
        Some(place) => {
            let RowEvidence { index, rank, .. } = rows[place];
            let what = format!("token {index} has rank {rank}, at most {known}");
            Ruling { reason, what, broken_at: Some(count) }
        }
        None => {
            let what = format!("first, last and random tokens have ranks of at most {known}");
            Ruling { reason, what, broken_at: None }
        }
    }
}

/// The first place, the last, and up to three others, each once and each as likely as any other
/// (protocol 4.5). At least two tokens are there.
fn places(count: usize, chance: u64) -> BTreeSet<usize> {
    let others = count - 2;
    let mut places = BTreeSet::from([0, count - 1]);
    // Floyd's way to draw without repetition: the place that is there already stands for `last`.
    for last in others - RANDOM_PLACES.min(others)..others {
        let word = philox(chance, [last as u32, 1, 0, 0])[0];
        let drawn = ((u64::from(word) * (last as u64 + 1)) >> 32) as usize;
        if !places.insert(1 + drawn) {
            places.insert(1 + last);
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_places_are_distinct_and_equally_likely() {
        for count in [2, 3, 4, 5, 6, 40] {
            let mut drawn = vec![0_u32; count];
            for chance in 0..4_000 {
                let places = places(count, chance);
                assert_eq!(places.len(), count.min(5));
                assert!(places.contains(&0) && places.contains(&(count - 1)));
                places.into_iter().for_each(|place| drawn[place] += 1);
            }
            let expected = 4_000.0 * 3.0 / (count.max(5) - 2) as f64;
            let is_fair = |n: &u32| (f64::from(*n) - expected).abs() < 6.0 * expected.sqrt();
            assert!(drawn[1..count - 1].iter().all(is_fair), "{count}: {drawn:?}");
        }
    }
}
