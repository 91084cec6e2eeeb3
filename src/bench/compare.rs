//! Ranks the reports of several machines for `bench compare`, in tokens, joules and dollars.

use super::plan::prices::{Price, per_million};
use super::report::schema::{BenchReport, Phase, ReportKind, ReportRow};
use super::report::seal::Sealed;
use serde::Serialize;
use serde_json::Value;

/// Seconds of a day.
const DAY: f64 = 86_400.0;

/// What a comparison takes for granted.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Assumptions {
    /// Tokens of a validator's prompt.
    pub prompt_tokens: f64,
    /// Tokens of an answer to it.
    pub answer_tokens: f64,
    /// Share of all answers that are checked.
    pub checked_share: f64,
}

/// A report that takes part.
pub struct RankedReport {
    /// Its file, in short.
    pub name: String,
    /// What was measured on the machine.
    pub report: BenchReport,
    /// What is known of its signature.
    pub sealed: Sealed,
}

/// Tokens that a validator's answers have at most: the load of a score.
const ANSWER_TOKENS: u64 = 1920;

/// A machine in the comparison. What a report cannot say is absent.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Compared {
    /// Name of the report's file or directory.
    pub name: String,
    /// The machine; of a server unknown.
    pub machine: Option<String>,
    /// The model that was measured.
    pub model: String,
    /// The hotkey that signed the report.
    pub signed_by: Option<String>,
    /// Reasons to doubt it.
    pub marks: Vec<String>,
    /// Whether it ended before its end.
    pub is_partial: bool,
    /// Most tokens a second of many sequences together.
    pub tokens_per_second: Option<f64>,
    /// Joules a token of the most efficient decode row.
    pub joules_per_token: Option<f64>,
    /// Dollars an hour, with the day of that price.
    pub price: Option<(f64, String)>,
    /// Tokens a second for a dollar an hour.
    pub per_dollar_hour: Option<f64>,
    /// Dollars for a million tokens.
    pub dollars_per_million: Option<f64>,
    /// Tokens for a dollar that are generated, and checked as often as assumed on the same machine.
    pub verified_per_dollar: Option<f64>,
    /// The subnet's score of one model: tokens a second of a single request as a validator counts
    /// them, times what the share of answers makes of it. Of a server, from the level of such a
    /// load in which one request runs at a time.
    pub score: Option<f64>,
    /// The score that a dollar buys for a day.
    pub score_per_dollar_day: Option<f64>,
}

/// Compares, best first: by tokens a second for a dollar where there are prices, else by tokens a
/// second. `consistency` is what the subnet makes of the share of requests that were answered.
pub fn compare(
    entries: &[RankedReport],
    prices: &[Price],
    assumed: Assumptions,
    consistency: fn(f64) -> f64,
) -> Vec<Compared> {
    let mut all: Vec<Compared> =
        entries.iter().map(|entry| one(entry, prices, assumed, consistency)).collect();
    let rank = |c: &Compared| {
        let speed = c.tokens_per_second.unwrap_or(0.0);
        (c.per_dollar_hour.unwrap_or(0.0), speed)
    };
    all.sort_by(|a, b| {
        let ((dollars_a, speed_a), (dollars_b, speed_b)) = (rank(a), rank(b));
        dollars_b.total_cmp(&dollars_a).then(speed_b.total_cmp(&speed_a))
    });
    all
}

fn one(
    entry: &RankedReport,
    prices: &[Price],
    assumed: Assumptions,
    consistency: fn(f64) -> f64,
) -> Compared {
    let report = &entry.report;
    let price = price(entry, prices);
    let per_hour = price.map(|p| p.per_hour);
    let tokens_per_second = speed(report);
    let score = score(report, assumed, consistency);
    let of_both = |f: fn(f64, f64) -> f64| Some(f(tokens_per_second?, per_hour?));
    let is_engine = report.kind == ReportKind::Engine;
    let signed_by = match entry.sealed {
        Sealed::By(hotkey) => Some(hotkey.to_string()),
        Sealed::Unsigned => None,
    };
    Compared {
        name: entry.name.clone(),
        machine: is_engine.then(|| report.machine.computes().to_owned()),
        model: report.model.name.clone(),
        signed_by,
        marks: report.marks.iter().map(|m| m.kind.name().to_owned()).collect(),
        is_partial: report.is_partial,
        tokens_per_second,
        joules_per_token: joules(report),
        price: price.map(|p| (p.per_hour, p.date.clone())),
        per_dollar_hour: of_both(|speed, per_hour| speed / per_hour),
        dollars_per_million: of_both(|speed, per_hour| per_million(per_hour, speed)),
        verified_per_dollar: per_hour.and_then(|h| verified(report, h, assumed)),
        score,
        score_per_dollar_day: score.zip(per_hour).map(|(s, h)| s / (h * DAY / 3600.0)),
    }
}

/// How far the depth of a row may be from the assumed prompt before it is said.
const NEAR: f64 = 0.25;

/// Why reports rank what is not alike, and prices that count for none of them.
pub fn caveats(entries: &[RankedReport], prices: &[Price], assumed: Assumptions) -> Vec<String> {
    let mut caveats = Vec::new();
    if let [first, rest @ ..] = entries {
        for other in rest {
            let pair = format!("{} and {}", first.name, other.name);
            caveats
                .extend(differ(&first.report, &other.report).map(|what| format!("{pair}: {what}")));
        }
    }
    for entry in entries {
        let near = |row: &ReportRow| {
            (row.depth as f64 - assumed.prompt_tokens).abs() <= NEAR * assumed.prompt_tokens
        };
        if let Some(row) = alone(&entry.report, Phase::Decode, assumed).filter(|row| !near(row)) {
            let (name, depth, prompt) = (&entry.name, row.depth, assumed.prompt_tokens);
            caveats.push(format!("{name}: its score is of depth {depth}, not of {prompt} tokens"));
        }
    }
    let is_used = |known: &Price| {
        entries.iter().any(|e| price(e, prices).is_some_and(|p| p.device == known.device))
    };
    let unused = prices.iter().filter(|price| !is_used(price));
    caveats.extend(unused.map(|p| format!("the price of {} counts for no report", p.device)));
    caveats
}

/// The settings that decide what figures say; what computes is what a comparison is about.
const SETTINGS: [&str; 13] = [
    "batch",
    "depth",
    "tokens",
    "repeat_prompts",
    "load",
    "rate",
    "concurrency",
    "requests",
    "completion",
    "input",
    "output_tokens",
    "ignore_eos",
    "read_timeout",
];

/// What two reports measured differently.
fn differ(a: &BenchReport, b: &BenchReport) -> Option<String> {
    if a.kind != b.kind {
        return Some("one measured an engine, the other a server".into());
    }
    let model = |r: &BenchReport| {
        let root = r.model.weights_root.clone();
        (root.unwrap_or_else(|| r.model.name.clone()), r.model.dtype.clone())
    };
    if model(a) != model(b) {
        let name = |r: &BenchReport| {
            let dtype = r.model.dtype.as_ref().map_or(String::new(), |d| format!(" in {d}"));
            format!("{}{dtype}", r.model.name)
        };
        return Some(format!("other models, {} and {}", name(a), name(b)));
    }
    let other = SETTINGS.into_iter().find(|key| a.settings.get(*key) != b.settings.get(*key))?;
    let value = |r: &BenchReport| r.settings.get(other).cloned().unwrap_or(Value::Null);
    Some(format!("other settings, {other} {} and {}", value(a), value(b)))
}

/// The price of the report's file, or of its row of the device table.
fn price<'a>(entry: &RankedReport, prices: &'a [Price]) -> Option<&'a Price> {
    let table = entry.report.ceilings.as_ref().and_then(|c| c.table.as_ref());
    let of = |name: &str| prices.iter().find(|p| p.device == name);
    of(&entry.name).or_else(|| of(&table?.device))
}

fn speed(report: &BenchReport) -> Option<f64> {
    match report.kind {
        ReportKind::Engine => Some(report.best(Phase::Decode)?.speed.mean),
        ReportKind::Serve => Some(report.best_level()?.steady_tokens_per_second),
    }
    .filter(|speed| *speed > 0.0)
}

fn joules(report: &BenchReport) -> Option<f64> {
    let rows = report.rows.iter().filter(|row| row.phase == Phase::Decode);
    rows.filter_map(|row| row.joules_per_token).reduce(f64::min)
}

/// Seconds to generate a token, and to check its part of an answer: a check runs over the prompt
/// too.
fn verified(report: &BenchReport, per_hour: f64, assumed: Assumptions) -> Option<f64> {
    let Assumptions { prompt_tokens, answer_tokens, checked_share } = assumed;
    let generate = 1.0 / report.best(Phase::Decode)?.speed.mean;
    let prefill = prompt_tokens / answer_tokens / report.best(Phase::Prefill)?.speed.mean;
    let checked = (prompt_tokens + answer_tokens) / answer_tokens;
    let check = checked_share * checked / report.best(Phase::Verify)?.speed.mean;
    Some(3600.0 / per_hour / (generate + prefill + check))
}

fn score(report: &BenchReport, assumed: Assumptions, consistency: fn(f64) -> f64) -> Option<f64> {
    if let ReportKind::Serve = report.kind {
        // Other prompts and lengths say nothing of a validator's.
        if report.settings.get("load").and_then(Value::as_str) != Some("targon") {
            return None;
        }
        if report.settings.get("output_tokens").and_then(Value::as_u64) != Some(ANSWER_TOKENS) {
            return None;
        }
        let level = report.levels.iter().find(|level| level.concurrency == Some(1))?;
        let share = level.completed as f64 / level.sent.max(1) as f64;
        return Some(level.validator_tps.as_ref()?.mean * consistency(share));
    }
    let Assumptions { prompt_tokens, answer_tokens, .. } = assumed;
    let first = prompt_tokens / alone(report, Phase::Prefill, assumed)?.speed.mean;
    let rest = answer_tokens / alone(report, Phase::Decode, assumed)?.speed.mean;
    Some(answer_tokens / (first + rest) * consistency(1.0))
}

/// The row of one sequence whose depth is nearest to the assumed prompt.
fn alone(report: &BenchReport, phase: Phase, assumed: Assumptions) -> Option<&ReportRow> {
    let rows = report.rows.iter().filter(|row| row.phase == phase && row.batch == 1);
    let distance = |row: &ReportRow| (row.depth as f64 - assumed.prompt_tokens).abs();
    rows.min_by(|a, b| distance(a).total_cmp(&distance(b)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::schema::{Ceilings, TableCeilings};
    use crate::bench::report::seal::tests::sample;

    const ASSUMED: Assumptions =
        Assumptions { prompt_tokens: 100.0, answer_tokens: 100.0, checked_share: 1.0 };

    fn entry(name: &str, speed: f64) -> RankedReport {
        RankedReport { name: name.into(), report: sample(speed), sealed: Sealed::Unsigned }
    }

    fn price(device: &str, per_hour: f64) -> Price {
        let date = "2026-11-01".into();
        Price { device: device.into(), per_hour, date, source: None }
    }

    #[test]
    fn the_cheaper_machine_wins_though_it_is_slower() {
        let mut fast = entry("fast", 1000.0);
        let table = TableCeilings { device: "h200".into(), bandwidth: 1.0, peak: 1.0 };
        let ceilings = fast.report.ceilings.take().unwrap();
        fast.report.ceilings = Some(Ceilings { table: Some(table), ..ceilings });
        let prices = [price("h200", 4.0), price("slow", 1.0)];
        let all = [fast, entry("slow", 500.0), entry("unpriced", 9000.0)];
        let compared = compare(&all, &prices, ASSUMED, |share| share);
        let names: Vec<&str> = compared.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["slow", "fast", "unpriced"]);
        let slow = &compared[0];
        // The sample's runs are 1 and 1.1 times the speed.
        assert!((slow.tokens_per_second.unwrap() - 525.0).abs() < 1e-9);
        assert!((slow.per_dollar_hour.unwrap() - 525.0).abs() < 1e-9);
        assert!((slow.dollars_per_million.unwrap() - 1e6 / 3600.0 / 525.0).abs() < 1e-9);
        // A token costs 1/525 s, its prompt's 1/4200, its check two tokens of 1/2625.
        let seconds = 1.0 / 525.0 + 1.0 / 4200.0 + 2.0 / 2625.0;
        assert!((slow.verified_per_dollar.unwrap() - 3600.0 / seconds).abs() < 1e-6);
        // 100 tokens in 100/4200 + 100/525 s.
        let score = 100.0 / (100.0 / 4200.0 + 100.0 / 525.0);
        assert!((slow.score.unwrap() - score).abs() < 1e-9);
        assert!((slow.score_per_dollar_day.unwrap() - score / 24.0).abs() < 1e-9);
        assert_eq!((compared[2].per_dollar_hour, compared[2].verified_per_dollar), (None, None));
    }

    #[test]
    fn what_is_not_alike_is_said() {
        let said =
            |a: RankedReport, b: RankedReport, prices: &[Price]| caveats(&[a, b], prices, ASSUMED);
        // The sample's rows have a depth of 128, near enough to 100.
        let near = Assumptions { prompt_tokens: 120.0, ..ASSUMED };
        assert_eq!(caveats(&[entry("a", 1.0), entry("b", 2.0)], &[], near), [""; 0]);
        let mut other = entry("b", 2.0);
        other.report.model.weights_root = Some("cd".into());
        let models = said(entry("a", 1.0), other, &[]).join("; ");
        assert!(models.contains("a and b: other models"), "{models}");
        let mut sizes = entry("b", 2.0);
        sizes.report.settings.insert("batch".into(), serde_json::json!([1]));
        let sizes = said(entry("a", 1.0), sizes, &[]).join("; ");
        assert!(sizes.contains("other settings, batch null and [1]"), "{sizes}");
        let rates = [1, 8].map(|rate| {
            let mut entry = entry("a", 1.0);
            entry.report.settings.insert("rate".into(), serde_json::json!([rate]));
            entry
        });
        let [one, eight] = rates;
        let rates = said(one, eight, &[]).join("; ");
        assert!(rates.contains("other settings, rate [1] and [8]"), "{rates}");
        let unused = said(entry("a", 1.0), entry("b", 2.0), &[price("h2000", 1.0)]).join("; ");
        assert!(unused.contains("the price of h2000 counts for no report"), "{unused}");
        assert!(unused.contains("its score is of depth 128, not of 100 tokens"), "{unused}");
    }

    #[test]
    fn a_server_has_a_score_for_a_validators_load_only() {
        use crate::bench::traffic::drive::{Driven, Load, TimedAnswer};
        use crate::bench::traffic::heard::Heard;
        use crate::bench::traffic::tally::{self, Promise};
        let answer = |failure| {
            let heard =
                Heard { chunks: Vec::new(), usage: None, ended: 1.0, validator_tps: 40.0, failure };
            TimedAnswer { at: 0.0, heard }
        };
        let driven = Driven {
            sent: vec![answer(None), answer(Some("timeout".into()))],
            unfinished: 0,
            seconds: 1.0,
            client: crate::bench::report::schema::Client {
                busy: 0.0,
                timer_late: 0.0,
                send_late: 0.0,
            },
            stop: None,
        };
        let promise = Promise { first_token: 1.0, per_token: 1.0 };
        let mut report = sample(1.0);
        report.kind = ReportKind::Serve;
        let level = |load| tally::level(&driven, load, promise, "m");
        report.levels = vec![level(Load::Rate(1.0)), level(Load::Concurrency(1))];
        for (load, tokens, expected) in
            [("targon", 1920, Some(20.0)), ("fixed", 1920, None), ("targon", 64, None)]
        {
            report.settings.insert("load".into(), load.into());
            report.settings.insert("output_tokens".into(), tokens.into());
            // Half of the requests were answered, at 40 tokens a second.
            assert_eq!(score(&report, ASSUMED, |share| share), expected, "{load}");
        }
        report.settings.insert("output_tokens".into(), 1920.into());
        report.levels.pop();
        assert_eq!(score(&report, ASSUMED, |share| share), None, "no request ran alone");
    }

    #[test]
    fn what_a_report_lacks_is_absent() {
        let mut entry = entry("empty", 1.0);
        entry.report.rows.clear();
        entry.report.is_partial = true;
        let compared = compare(&[entry], &[price("empty", 1.0)], ASSUMED, |share| share);
        let only = &compared[0];
        assert_eq!((only.tokens_per_second, only.score, only.joules_per_token), (None, None, None));
        assert!(only.is_partial && only.price.is_some());
    }
}
