//! The rules of Targon's verifier 4.2 to 4.4 over ranks and log-probabilities, read from one pass
//! over ids. Where the original could be bypassed or crashed, the rule is mended: the mean
//! agreement counts, all end tokens count, ids and text are tied together before, certainty that
//! the model does not have counts however it is written, and nothing divides by zero.

use super::report::RowEvidence;
use super::{Claim, Limits, Reason, Rejection, Stop};
use crate::proof::philox::philox;

/// Tokens of the shortest answer that is judged.
const TOKENS_MIN: usize = 3;
/// A rank that no honest sampler reaches.
const RANK_MAX: u32 = 75;
/// A rank that is rare, and how many of them an answer of [`RARE_PER`] tokens may hold.
const RANK_RARE: u32 = 25;
const RARE_MAX: usize = 5;
const RARE_PER: usize = 128;
/// An end token that outranks a token of at least this rank was skipped.
const SKIPPED_RANK: u32 = 10;
/// Places that are looked at more closely, besides the first and the last.
const RANDOM_PLACES: u32 = 3;
/// Above this temperature any token may be drawn anywhere.
const RANDOM_TEMPERATURE_MAX: f32 = 0.75;
/// A report above this claims certainty, which the model must have to [`UNCERTAIN`].
const CERTAIN: f64 = -1e-6;
const UNCERTAIN: f64 = -0.05;
/// False certainties that an answer may hold, and one more for each so many tokens.
const CERTAIN_MAX: usize = 2;
const CERTAIN_PER: usize = 20;

fn reject(reason: Reason, what: String) -> Result<(), Stop> {
    Err(Rejection::new(reason, what).into())
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
    let count = rows.len();
    if count < TOKENS_MIN {
        let what = format!("an answer has at least {TOKENS_MIN} tokens, this has {count}");
        return reject(Reason::TooShort, what);
    }
    let temperature = claim.request.sampling.temperature.max(0.0);
    let known = known(temperature);
    let (mut not_first, mut rare, mut perfect, mut total) = (0_usize, 0_usize, 0_usize, 0.0);
    for row in rows {
        let skipped = row.end_rank.is_some_and(|end| end <= known && end < row.rank);
        if skipped && row.rank > SKIPPED_RANK {
            let what = format!("an end token outranks token {} of rank {}", row.index, row.rank);
            return reject(Reason::SkippedEosEot, what);
        }
        if row.rank >= RANK_MAX {
            let what = format!("token {} has rank {}, below {RANK_MAX}", row.index, row.rank);
            return reject(Reason::UnlikelyToken, what);
        }
        rare += usize::from(row.rank >= RANK_RARE);
        not_first += usize::from(row.rank != 1);
        let (score, is_perfect) = agreement(row, temperature);
        total += score;
        perfect += usize::from(is_perfect);
    }
    if 2 * not_first >= count {
        let what = format!("{not_first} of {count} tokens are not the most probable, below a half");
        return reject(Reason::UnlikelyTokens, what);
    }
    let mean = total / count as f64;
    if mean < limits.agreement {
        let what = format!("log-probabilities agree by {mean:.3}, at least {}", limits.agreement);
        return reject(Reason::LogprobMismatch, what);
    }
    let perfect_max = CERTAIN_MAX + count / CERTAIN_PER;
    if perfect > perfect_max {
        let what = format!("{perfect} tokens are reported as certain and are not");
        return reject(Reason::Overfit, format!("{what}, at most {perfect_max}"));
    }
    let rare_max = RARE_MAX * count.div_ceil(RARE_PER);
    if rare >= rare_max {
        let what = format!("{rare} tokens have a rank of {RANK_RARE} or more, below {rare_max}");
        return reject(Reason::UnlikelyToken, what);
    }
    check_random(rows, temperature, chance)
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
            reject(Reason::EarlyEnd, what)
        }
        None => reject(Reason::EarlyEnd, "this model has no end token".into()),
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

/// The first, the last and some random tokens must be among the most probable ones.
fn check_random(rows: &[RowEvidence], temperature: f32, chance: u64) -> Result<(), Stop> {
    if temperature > RANDOM_TEMPERATURE_MAX {
        return Ok(());
    }
    let known = (10.0 * temperature) as u32 + 3;
    let random = (0..RANDOM_PLACES).map(|i| {
        let word = philox(chance, [i, 1, 0, 0])[0];
        ((u64::from(word) * rows.len() as u64) >> 32) as usize
    });
    let places = [0, rows.len() - 1].into_iter().chain(random);
    match places.map(|place| &rows[place]).find(|row| row.rank > known) {
        Some(row) => {
            let what = format!("token {} has rank {}, at most {known}", row.index, row.rank);
            reject(Reason::LogprobRandom, what)
        }
        None => Ok(()),
    }
}
