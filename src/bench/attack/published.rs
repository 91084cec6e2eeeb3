//! Applies the subnet's rank rules as published (Targon 4.4.1, `verifier.py`), including their
//! known gaps, for comparison with the corrected rules of [`crate::verify::targon`].
//!
//! Some things are simpler here than in the original: ids are taken as they are, after the prompt
//! as it is, where the original tokenises the text again without the token that it begins with,
//! and all end tokens of the model count. The check of random places is left out, as the original
//! does above a temperature of 0.75.

use super::trial::AttackedAnswer;
use crate::verify::RowEvidence;
use crate::verify::{Report, Verdict};

/// Tokens of the shortest answer.
const TOKENS_MIN: usize = 3;
/// The last tokens are never looked at.
const UNSEEN: usize = 3;
/// Ranks that are impossible, rare, and worse than that of a skipped end token.
const RANK_MAX: u32 = 75;
const RANK_RARE: u32 = 25;
const SKIPPED_RANK: u32 = 10;
/// Rare ranks that an answer of any length may not hold.
const RARE_MAX: usize = 5;
/// What the mean score must reach; it only gates the rule about certainty.
const SCORE_MIN: f64 = 0.75;

/// The cause by which the original rejects an answer; `None` where it passes or gives up. `ends`
/// are the model's end tokens.
pub(super) fn rejects(
    trial: &AttackedAnswer,
    report: &Report,
    ends: &[u32],
) -> Option<&'static str> {
    if report.rows.is_empty() {
        // Rejected for its form or its end, which the corrected rules check first.
        return match &report.verdict {
            Verdict::Reject(rejection) => Some(rejection.reason.name()),
            _ => None,
        };
    }
    // Where the end was not sent, its likelihood has been looked at already.
    let request = &trial.ask.request;
    let tokens_max = if trial.end_is_implied { report.rows.len() } else { request.max_tokens };
    let is_ended = report.rows.last().is_some_and(|row| ends.contains(&row.token));
    rule(&report.rows, request.sampling.temperature, tokens_max, is_ended)
}

fn rule(
    rows: &[RowEvidence],
    temperature: f32,
    tokens_max: usize,
    is_ended: bool,
) -> Option<&'static str> {
    let known = (10.0 * temperature) as u32 + 6;
    let knows_end = |row: &RowEvidence| row.end_rank.is_some_and(|end| end <= known);
    if rows.len() < TOKENS_MIN {
        return Some("TOO_SHORT");
    }
    // An end token has no text, so the original does not find it in what it tokenises again.
    let unseen = UNSEEN + usize::from(is_ended);
    let seen = &rows[..rows.len().saturating_sub(unseen)];
    let (mut not_first, mut rare, mut certain, mut total) = (0, 0, 0, 0.0);
    for row in seen {
        let skipped = knows_end(row) && row.end_rank.is_some_and(|end| end < row.rank);
        match row.rank {
            rank if skipped && rank > SKIPPED_RANK => return Some("SKIPPED_EOS_EOT"),
            RANK_MAX.. => return Some("UNLIKELY_TOKEN"),
            RANK_RARE.. => rare += 1,
            rank if rank > known => continue,
            _ => {}
        }
        not_first += usize::from(row.rank != 1);
        let reported = row.reported.unwrap_or(-100.0);
        certain += usize::from(reported == 0.0);
        let score = 1.0 - (row.logprob.exp() - reported.exp()).abs().min(1.0);
        let is_good = score >= 0.9 || (row.rank == 1 && temperature >= 0.9 && reported != 0.0);
        total += if is_good { 1.0 } else { score };
    }
    if 2 * not_first >= rows.len() {
        return Some("UNLIKELY_TOKENS");
    }
    if rows.len() < tokens_max && !rows.last().is_some_and(knows_end) {
        return Some("EARLY_END");
    }
    if seen.is_empty() {
        // With as many tokens as are not seen the original divides by zero, and the answer goes
        // unscored; with fewer it passes.
        return None;
    }
    let share = certain as f64 / seen.len() as f64;
    let certain_max = 1.0 - (0.5 * f64::from(temperature)).min(0.6);
    if total / seen.len() as f64 >= SCORE_MIN && share >= certain_max {
        return Some("OVERFIT");
    }
    (rare >= RARE_MAX).then_some("UNLIKELY_TOKEN")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::Request;
    use crate::verify::answer::Answer;
    use crate::verify::{Claim, Limits, Stop, targon};

    fn row(rank: u32) -> RowEvidence {
        RowEvidence {
            index: 0,
            token: 0,
            rank,
            logprob: -0.5,
            reported: Some(-0.5),
            end_rank: Some(30),
            margin: None,
            is_drawn: None,
            top_error: None,
        }
    }

    #[test]
    fn the_published_rules_and_their_holes() {
        let rows = |ranks: &[u32]| ranks.iter().map(|r| row(*r)).collect::<Vec<_>>();
        let rule = |rows: &[RowEvidence], temperature, tokens_max| {
            super::rule(rows, temperature, tokens_max, false)
        };
        let mut firsts = vec![1; 20];
        assert_eq!(rule(&rows(&firsts), 0.8, 20), None);
        assert_eq!(rule(&rows(&firsts), 0.8, 40), Some("EARLY_END"));
        assert_eq!(rule(&rows(&[1, 1]), 0.8, 20), Some("TOO_SHORT"));
        assert_eq!(rule(&rows(&[1, 99, 99]), 0.8, 3), None, "three tokens are never looked at");
        firsts[16] = 75;
        assert_eq!(rule(&rows(&firsts), 0.8, 20), Some("UNLIKELY_TOKEN"));
        firsts[16] = 74;
        assert_eq!(rule(&rows(&firsts), 0.8, 20), None);
        firsts[..5].fill(25);
        assert_eq!(rule(&rows(&firsts), 0.8, 20), Some("UNLIKELY_TOKEN"));
        assert_eq!(rule(&rows(&[20; 20]), 0.8, 20), None, "ranks that are not known do not count");
        assert_eq!(rule(&rows(&[2; 20]), 0.8, 20), Some("UNLIKELY_TOKENS"));
        let change = |f: fn(&mut RowEvidence)| {
            let mut rows = rows(&[1; 20]);
            rows.iter_mut().for_each(f);
            rule(&rows, 0.8, 20)
        };
        let lies = change(|r| r.reported = Some(-100.0));
        assert_eq!(lies, None, "the mean score is not enforced");
        let certain = change(|r| (r.reported, r.logprob) = (Some(0.0), -0.05));
        assert_eq!(certain, Some("OVERFIT"));
        let skipped = change(|r| (r.rank, r.end_rank) = (12, Some(2)));
        assert_eq!(skipped, Some("SKIPPED_EOS_EOT"));
    }

    fn sampled(tokens: usize, temperature: f32) -> Request {
        let mut request = Request::greedy(vec![1], tokens);
        request.sampling.temperature = temperature;
        request
    }

    fn claimed<'a>(request: &'a Request, answer: &'a Answer) -> Claim<'a> {
        Claim::new(request, answer)
    }

    /// What the rules of this program say; `end` is the best rank of an end token where the answer
    /// came without one.
    fn ours(rows: &[RowEvidence], temperature: f32, end: Option<u32>) -> Option<&'static str> {
        let (request, answer) = (sampled(rows.len(), temperature), Answer::default());
        let claim = Claim { end_is_implied: end.is_some(), ..claimed(&request, &answer) };
        let ended = end.map_or(Ok(()), |end| targon::check_implied_end(&claim, Some(end)));
        let limits = Limits::default();
        match ended.and_then(|()| targon::check(&claim, rows, &limits, 1)) {
            Ok(()) => None,
            Err(Stop::Rejected(rejection)) => Some(rejection.reason.name()),
            Err(Stop::Fault(why)) => panic!("{why}"),
        }
    }

    /// The published verifier takes a token of any rank at a random place where its own draw there
    /// is the same; here it must be among the most probable ones, whoever draws it.
    #[test]
    fn a_random_place_takes_no_token_for_being_drawn() {
        let (request, answer) = (sampled(40, 0.5), Answer::default());
        let claim = claimed(&request, &answer);
        let checked = |rank: u32, is_drawn: bool, chance: u64| {
            let mut rows: Vec<RowEvidence> = (0..40).map(|_| row(1)).collect();
            (rows[20].rank, rows[20].is_drawn) = (rank, Some(is_drawn));
            match targon::check(&claim, &rows, &Limits::default(), chance) {
                Ok(()) => None,
                Err(Stop::Rejected(rejection)) => Some(rejection.reason.name()),
                Err(Stop::Fault(why)) => panic!("{why}"),
            }
        };
        let rejected = (0..1000).filter(|chance| checked(9, true, *chance).is_some()).count();
        // Three of the 38 places between the first and the last token.
        assert!((50..110).contains(&rejected), "{rejected} of 1000");
        for chance in 0..1000 {
            let found = checked(9, true, chance);
            assert_eq!(found, checked(9, false, chance), "whether it was drawn changes nothing");
            assert!(found.is_none_or(|name| name == "LOGPROB_RANDOM"), "{found:?}");
            assert_eq!(checked(8, false, chance), None, "the control: among 10 T + 3");
        }
    }

    /// An answer that was cut, and the end token of rank `rank` sent: a miner saves what it does
    /// not compute.
    #[test]
    fn an_early_end_that_was_sent_must_be_likely() {
        let checked = |rank: u32, count: usize, tokens_max: usize| {
            let mut rows: Vec<RowEvidence> = (0..count).map(|_| row(1)).collect();
            let last = &mut rows[count - 1];
            (last.rank, last.end_rank) = (rank, Some(rank));
            let (request, answer) = (sampled(tokens_max, 0.8), Answer::default());
            let own = targon::check(&claimed(&request, &answer), &rows, &Limits::default(), 1);
            let own = own.err().map(|stop| match stop {
                Stop::Rejected(rejection) => rejection.reason.name(),
                Stop::Fault(why) => panic!("{why}"),
            });
            (own, rule(&rows, 0.8, tokens_max, true))
        };
        assert_eq!(checked(15, 30, 80), (Some("EARLY_END"), Some("EARLY_END")));
        assert_eq!(checked(14, 30, 80), (None, None), "among 10 T + 6");
        assert_eq!(checked(15, 30, 30), (None, None), "the limit ended it");
    }

    /// One answer on which the rules differ: rows, temperature, the original, this program.
    type Difference = (Vec<RowEvidence>, f32, Option<&'static str>, Option<&'static str>);

    /// Each difference that is meant, with an answer that shows it (docs/verification.md).
    #[test]
    fn the_rules_over_rows_differ_as_meant() {
        let ranks = |ranks: &[u32]| ranks.iter().map(|r| row(*r)).collect::<Vec<_>>();
        let with = |place: usize, rank: u32, count: usize| {
            let mut all = vec![1; count];
            all[place] = rank;
            ranks(&all)
        };
        let reporting = |logprob: f64, reported: Option<f64>| {
            let change = |r| RowEvidence { logprob, reported, ..r };
            ranks(&[1; 40]).into_iter().map(change).collect::<Vec<_>>()
        };
        let spread = |rank: u32, every: usize, count: usize| {
            let all: Vec<u32> = (0..count).map(|i| if i % every == 1 { rank } else { 1 }).collect();
            ranks(&all)
        };
        let (low, rejected) = ("UNLIKELY_TOKEN", Some("UNLIKELY_TOKEN"));
        let differences: [(&str, Difference); 8] = [
            ("the last three tokens count", (with(38, 75, 40), 0.73, None, rejected)),
            ("three tokens are checked", (with(0, 75, 3), 0.8, None, rejected)),
            ("rare ranks are counted by length", (spread(25, 30, 160), 0.8, Some(low), None)),
            ("ranks that are not known are not the first", {
                (ranks(&[20; 40]), 0.8, None, Some("UNLIKELY_TOKENS"))
            }),
            ("the mean agreement counts", {
                (reporting(-0.5, Some(-100.0)), 0.8, None, Some("LOGPROB_MISMATCH"))
            }),
            ("a missing report agrees with nothing", {
                (reporting(-0.5, None), 0.8, None, Some("LOGPROB_MISMATCH"))
            }),
            ("certainty that the model has is honest", {
                (reporting(-1e-8, Some(0.0)), 0.2, Some("OVERFIT"), None)
            }),
            ("false certainty counts however it is written", {
                (reporting(-0.06, Some(-1e-9)), 0.8, None, Some("OVERFIT"))
            }),
        ];
        for (name, (rows, temperature, original, own)) in differences {
            let count = rows.len();
            assert_eq!(rule(&rows, temperature, count, false), original, "{name}");
            assert_eq!(ours(&rows, temperature, None), own, "{name}");
        }
        // Before an end token a fourth token is not looked at; the control has none.
        let fourth = with(36, 75, 40);
        assert_eq!(rule(&fourth, 0.73, 40, true), None);
        assert_eq!(rule(&fourth, 0.73, 40, false), rejected);
        assert_eq!(ours(&fourth, 0.73, None), rejected);
        // So four tokens with their end divide by zero, unless the end itself is not likely.
        let four = with(0, 75, 4);
        assert_eq!(rule(&four, 0.73, 4, true), None);
        assert_eq!(rule(&four, 0.73, 80, true), Some("EARLY_END"));
        assert_eq!(ours(&four, 0.73, None), rejected);
        // Both reject, each by the rule that it meets first: the end is looked at first here.
        let two = with(4, 75, 40);
        assert_eq!(rule(&two, 0.8, 80, false), rejected);
        assert_eq!(ours(&two, 0.8, Some(30)), Some("EARLY_END"));
        // What is the same, so that the table is complete: both pass, and both reject.
        assert_eq!(
            (rule(&ranks(&[1; 40]), 0.8, 40, false), ours(&ranks(&[1; 40]), 0.8, None)),
            (None, None)
        );
        for (rows, cause) in [
            (with(4, 75, 40), "UNLIKELY_TOKEN"),
            (spread(25, 8, 40), "UNLIKELY_TOKEN"),
            (ranks(&[2; 40]), "UNLIKELY_TOKENS"),
            (ranks(&[1, 1]), "TOO_SHORT"),
        ] {
            assert_eq!(rule(&rows, 0.8, rows.len(), false), Some(cause));
            assert_eq!(ours(&rows, 0.8, None), Some(cause));
        }
    }
}
