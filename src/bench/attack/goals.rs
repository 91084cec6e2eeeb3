//! States the requirements on the verifier, and checks whether they were met.

use super::catalogue::{Attack, Goal};
use super::check::WITH_MARGIN;
use super::results::{CHUNKS, GoalOutcome, Line, Tokens};
use crate::bench::stats::{Rate, Stopping};
use crate::proof::Scheme;
use crate::verify::bounds::upper;

/// Honest requests that may be rejected.
const FALSE_POSITIVES_MAX: f64 = 1e-3;

/// The outcome of every goal that there are measurements for.
pub(super) fn outcomes(attacks: &[Attack], lines: &[Line], tokens: &[Tokens]) -> Vec<GoalOutcome> {
    let mut outcomes: Vec<GoalOutcome> = honest(lines).into_iter().collect();
    for attack in attacks {
        let line = |check: &str| lines.iter().find(|l| l.name == attack.name && l.check == check);
        let outcome = match attack.goal {
            Some(Goal::Chunks(count)) => {
                by_chunks(lines.iter().filter(|l| l.name == attack.name), count)
            }
            Some(Goal::Tokens(count)) => {
                tokens.iter().find(|t| t.name == attack.name).map(|t| by_tokens(t, count))
            }
            Some(Goal::Always) => line(WITH_MARGIN).map(always),
            Some(Goal::Never) => line(WITH_MARGIN)
                .zip(line(Scheme::Residue.name()))
                .map(|(margins, rows)| never(margins, rows)),
            None => None,
        };
        outcomes.extend(outcome);
    }
    outcomes
}

fn honest(lines: &[Line]) -> Option<GoalOutcome> {
    let is_it = |l: &&Line| l.name == "honest" && l.check == WITH_MARGIN;
    let rejected = lines.iter().find(is_it)?.rejected;
    let bound = upper(rejected.count, rejected.of);
    Some(GoalOutcome {
        goal: format!(
            "at most {FALSE_POSITIVES_MAX} of this engine's honest requests are rejected"
        ),
        measured: format!("{}; with 95 % confidence at most {bound:.6}", show(&rejected)),
        is_met: bound <= FALSE_POSITIVES_MAX,
    })
}

/// By whichever check of rows of `residue-v1` misses the fewest answers: the largest chunk, or a
/// statistic of all rows. An answer that a statistic was not computed for is one that it misses.
fn by_chunks<'a>(lines: impl Iterator<Item = &'a Line>, count: usize) -> Option<GoalOutcome> {
    let is_of_rows = |line: &&Line| {
        let rest = line.check.strip_prefix(Scheme::Residue.name());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(", "))
    };
    let missed =
        |line: &'a Line| Some((line, line.missed.as_ref()?.get(count.clamp(1, CHUNKS) - 1)?));
    let known: Vec<(&Line, &Rate)> = lines.filter(is_of_rows).filter_map(missed).collect();
    let all = known.iter().map(|(_, missed)| missed.of).max()?;
    let missed = known.into_iter().map(|(line, m)| (line, Rate::new(m.count + all - m.of, all)));
    let (line, missed) = missed.min_by_key(|(_, missed)| missed.count)?;
    let chunks = if count == 1 { "1 chunk".to_owned() } else { format!("{count} chunks") };
    Some(GoalOutcome {
        goal: format!("{}: seen in {chunks}", line.name),
        measured: format!("missed {} by {}", show(&missed), line.check),
        is_met: missed.of > 0 && missed.count == 0,
    })
}

fn by_tokens(tokens: &Tokens, count: usize) -> GoalOutcome {
    let number = |n: Option<usize>| n.map_or_else(|| "never".to_owned(), |n| n.to_string());
    let span = |stopping: &Stopping| {
        format!("{} (median) and {} (95 %)", number(stopping.median), number(stopping.p95))
    };
    let (either, exact) = (span(&tokens.either), span(&tokens.exact));
    GoalOutcome {
        goal: format!("{}: seen in {count} tokens, all rows checked", tokens.name),
        measured: format!("{either}; against a miner on this engine {exact}"),
        is_met: tokens.either.p95.is_some_and(|n| n <= count),
    }
}

fn always(line: &Line) -> GoalOutcome {
    GoalOutcome {
        goal: format!("{}: always rejected", line.name),
        measured: format!("rejected {}", show(&line.rejected)),
        is_met: line.rejected.of > 0 && line.rejected.count == line.rejected.of,
    }
}

fn never(margins: &Line, rows: &Line) -> GoalOutcome {
    let is_equal = |exact: &Rate| exact.of > 0 && exact.count == exact.of;
    GoalOutcome {
        goal: format!("{}: never rejected, all rows equal", margins.name),
        measured: format!("rejected {}", show(&margins.rejected)),
        is_met: margins.rejected.of > 0
            && margins.rejected.count + margins.unscored == 0
            && rows.exact.as_ref().is_some_and(is_equal),
    }
}

/// A rate with its interval, in words.
fn show(rate: &Rate) -> String {
    let Rate { count, of, low, high } = rate;
    format!("{count} of {of} ({:.3}..{:.3} %)", 100.0 * low, 100.0 * high)
}

#[cfg(test)]
mod tests {
    use super::super::catalogue;
    use super::super::results::Detector;
    use super::*;

    #[test]
    fn goals_are_met_only_by_what_was_measured() {
        let attacks = catalogue::all(30);
        let honest = |n| Line::bare("honest", Detector::Nothing, WITH_MARGIN, Rate::new(0, n));
        let missing = outcomes(&attacks, &[], &[]);
        assert!(missing.is_empty(), "{missing:?}");
        assert!(!outcomes(&attacks, &[honest(1000)], &[])[0].is_met);
        assert!(outcomes(&attacks, &[honest(3000)], &[])[0].is_met);
        let missed = |count| {
            let line = Line::bare("int8 g32", Detector::Energy, "residue-v1", Rate::new(9, 9));
            let mut missed = vec![Rate::new(5, 9); CHUNKS];
            missed[1] = Rate::new(count, 9);
            Line { missed: Some(missed), ..line }
        };
        assert!(outcomes(&attacks, &[missed(0)], &[])[0].is_met);
        assert!(!outcomes(&attacks, &[missed(1)], &[])[0].is_met);
        // The best of the checks of rows counts, but no check of another scheme.
        let by = |check: &str, count| Line { check: check.into(), ..missed(count) };
        let twin = outcomes(&attacks, &[missed(5), by("residue-v1, twin", 0)], &[]).remove(0);
        assert!(twin.is_met && twin.measured.ends_with("by residue-v1, twin"), "{twin:?}");
        assert!(!outcomes(&attacks, &[missed(5), by("residue-v1-u4, twin", 0)], &[])[0].is_met);
        // Three answers without a twin are missed by it, whatever it says of the others.
        let known =
            Line { missed: Some(vec![Rate::new(0, 6); CHUNKS]), ..by("residue-v1, twin", 0) };
        let twin = outcomes(&attacks, &[missed(5), known], &[]).remove(0);
        assert!(!twin.is_met && twin.measured.starts_with("missed 3 of 9"), "{twin:?}");
        let replay = |k| Line::bare("replay", Detector::Binding, WITH_MARGIN, Rate::new(k, 9));
        assert!(outcomes(&attacks, &[replay(9)], &[])[0].is_met);
        assert!(!outcomes(&attacks, &[replay(8)], &[])[0].is_met);
        let control = |rejected, equal| {
            let line = |check| {
                let name = "control: lockstep, nothing changed";
                let line = Line::bare(name, Detector::Nothing, check, Rate::new(rejected, 9));
                Line { exact: Some(Rate::new(equal, 72)), ..line }
            };
            let lines = [line(WITH_MARGIN), line("residue-v1")];
            outcomes(&attacks, &lines, &[]).pop().unwrap().is_met
        };
        assert!(control(0, 72) && !control(1, 72) && !control(0, 71));
        let tokens = |p95| Tokens {
            name: "another seed".into(),
            mismatch: Rate::new(4, 9),
            margin: 0.4,
            single: Stopping::default(),
            sequential: Stopping::default(),
            either: Stopping { median: Some(3), p95, curve: Vec::new() },
            exact: Stopping::default(),
        };
        assert!(outcomes(&attacks, &[], &[tokens(Some(16))])[0].is_met);
        assert!(!outcomes(&attacks, &[], &[tokens(Some(17))])[0].is_met);
        assert!(!outcomes(&attacks, &[], &[tokens(None)])[0].is_met);
    }
}
