//! Runs `bench compare`: prints reports of several machines beside each other.

use super::output::write_page;
use crate::bench::compare::{Assumptions, Compared, RankedReport, caveats, compare};
use crate::bench::plan::prices::{self, Price};
use crate::bench::report::seal;
use crate::bench::report::sheet::Sheet;
use crate::cli::Failure;
use crate::cli::out::outln;
use crate::cli::printable::printable;
use crate::cli::tables::csv_field;
use crate::validator::scores::series::sigmoid;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Arguments of `bench compare`.
#[derive(Args)]
#[command(after_help = "Examples:
  targon-engine bench compare epyc.json h200.json --prices prices.toml

A price counts for a report whose file has the name of its `device` (h200.json),
or whose machine is that row of the device table.")]
pub(in crate::cli) struct CompareArgs {
    /// Reports of `bench engine` and `bench serve`: report.json of each.
    #[arg(required = true)]
    reports: Vec<PathBuf>,
    /// A TOML file with [[price]] entries: device, per_hour (dollars), date, source.
    #[arg(long)]
    prices: Option<PathBuf>,
    /// Tokens of a validator's prompt, for its score.
    #[arg(long, default_value_t = 512.0)]
    prompt_tokens: f64,
    /// Tokens of an answer to it.
    #[arg(long, default_value_t = 1216.0)]
    answer_tokens: f64,
    /// Share of all answers that are checked.
    #[arg(long, default_value_t = 1.0)]
    checked_share: f64,
    /// Refuse reports that are unsigned, partial or marked, or that measured different things.
    #[arg(long)]
    strict: bool,
    /// Print JSON.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Print one line of comma-separated values for each report.
    #[arg(long)]
    csv: bool,
    /// Write the ranking as a page of its own, too.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

pub(super) fn run(args: &CompareArgs) -> Result<(), Failure> {
    let prices = args.prices.as_deref().map(prices::read).transpose().map_err(Failure::user)?;
    let prices = prices.unwrap_or_default();
    let assumed = args.assumptions()?;
    let entries =
        args.reports.iter().map(|path| args.entry(path)).collect::<Result<Vec<_>, _>>()?;
    let caveats = caveats(&entries, &prices, assumed);
    if let Some(what) = caveats.first().filter(|_| args.strict) {
        return Err(Failure::user(printable(&format!("the ranking is to be doubted: {what}"))));
    }
    let compared = compare(&entries, &prices, assumed, sigmoid);
    // Each line by itself: names come from files of others, and must not make lines of their own.
    let sheet = sheet(&compared, assumed, &prices, &caveats).map(printable);
    if args.json {
        let all = json!({
            "assumptions": assumed, "compared": compared, "prices": prices, "caveats": caveats,
        });
        outln!("{all}");
    } else if args.csv {
        print_csv(&compared);
    } else {
        outln!("{}", sheet.markdown());
    }
    args.html.as_deref().map_or(Ok(()), |path| write_page(path, &sheet))
}

impl CompareArgs {
    fn assumptions(&self) -> Result<Assumptions, Failure> {
        let Self { prompt_tokens, answer_tokens, checked_share, .. } = *self;
        let is_size = |tokens: f64| tokens.is_finite() && tokens >= 1.0;
        if !is_size(prompt_tokens) || !is_size(answer_tokens) {
            let what = "--prompt-tokens and --answer-tokens must be numbers of at least 1";
            return Err(Failure::user(what));
        }
        if !(0.0..=1.0).contains(&checked_share) {
            let what = format!("--checked-share must lie between 0 and 1, got {checked_share}");
            return Err(Failure::user(what));
        }
        Ok(Assumptions { prompt_tokens, answer_tokens, checked_share })
    }

    fn entry(&self, path: &Path) -> Result<RankedReport, Failure> {
        let place = path.display();
        let refuse = |what: &str| Failure::user(printable(&format!("{place}: {what}")));
        let report = seal::read(path).map_err(|e| Failure::user(printable(&e.to_string())))?;
        let sealed = seal::check(&report).map_err(|e| refuse(&e.to_string()))?;
        if self.strict {
            if sealed == seal::Sealed::Unsigned {
                return Err(refuse("it is unsigned"));
            }
            if report.is_partial {
                return Err(refuse("it is partial"));
            }
            if let Some(mark) = report.marks.first() {
                return Err(refuse(&format!("it is to be doubted: {}", mark.what)));
            }
        }
        Ok(RankedReport { name: name(path), report, sealed })
    }
}

/// The file's stem, or the directory's name where that says nothing.
fn name(path: &Path) -> String {
    let text = |part: Option<&std::ffi::OsStr>| {
        part.map(|p| p.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let stem = text(path.file_stem());
    let parent = text(path.parent().and_then(Path::file_name));
    if stem == "report" && !parent.is_empty() { parent } else { stem }
}

const COLUMNS: [&str; 12] = [
    "rank",
    "report",
    "tok/s",
    "$/h",
    "tok/s per $/h",
    "$/Mtok",
    "J/tok",
    "verified tok/$",
    "score",
    "score per $ a day",
    "signed",
    "doubts",
];

/// The ranking with what it takes for granted.
fn sheet(all: &[Compared], assumed: Assumptions, prices: &[Price], caveats: &[String]) -> Sheet {
    let mut after = Vec::new();
    for c in all {
        let machine = c.machine.as_deref().unwrap_or("a server whose machine is unknown");
        after.push(format!("  {}: {} on {machine}", c.name, c.model));
    }
    for Price { device, per_hour, date, source } in prices {
        let source = source.as_deref().map_or(String::new(), |s| format!(", {s}"));
        after.push(format!("  {device}: ${per_hour} an hour on {date}{source}"));
    }
    let Assumptions { prompt_tokens, answer_tokens, checked_share } = assumed;
    let share = 100.0 * checked_share;
    after.extend([
        format!("Assumed: prompts of {prompt_tokens} and answers of {answer_tokens} tokens;"),
        format!("  {share:.0} % of all answers are checked, on the same machine;"),
        "  the score is a validator's tokens a second of one request at a time, in Targon's own"
            .into(),
        "  profile: what it is worth depends on all other miners. An engine is taken to answer"
            .into(),
        "  all; a server has a score where it was measured with --load targon --concurrency 1."
            .into(),
    ]);
    after.extend(caveats.iter().map(|what| format!("Not alike: {what}")));
    Sheet {
        title: "Measurements compared".into(),
        before: Vec::new(),
        columns: COLUMNS.map(String::from).to_vec(),
        rows: all.iter().enumerate().map(|(rank, c)| row(rank + 1, c)).collect(),
        after,
    }
}

fn print_csv(all: &[Compared]) {
    outln!(
        "rank,report,model,machine,tokens_per_second,per_hour,per_dollar_hour,\
         dollars_per_million_tokens,joules_per_token,verified_per_dollar,score,\
         score_per_dollar_day,signed_by,is_partial,marks"
    );
    let number = |value: Option<f64>| value.map_or_else(String::new, |v| v.to_string());
    for (rank, c) in all.iter().enumerate() {
        let machine = c.machine.as_deref().unwrap_or_default();
        let mut cells = vec![(rank + 1).to_string()];
        cells.extend([&*c.name, &*c.model, machine].map(csv_field));
        cells.extend(numbers(c).map(number));
        cells.push(c.signed_by.clone().unwrap_or_default());
        cells.extend([c.is_partial.to_string(), c.marks.join(" ")]);
        outln!("{}", printable(&cells.join(",")));
    }
}

fn row(rank: usize, c: &Compared) -> Vec<String> {
    let number = |value: Option<f64>| match value {
        None => "-".into(),
        Some(v) if v.abs() >= 100.0 => format!("{v:.0}"),
        Some(v) => format!("{v:.3}"),
    };
    let mut doubts = c.marks.clone();
    doubts.extend(c.is_partial.then(|| "partial".to_owned()));
    let signed = c.signed_by.as_ref().map_or("no".into(), |s| s.chars().take(8).collect());
    let mut row = vec![rank.to_string(), c.name.clone()];
    row.extend(numbers(c).map(number));
    row.extend([signed, if doubts.is_empty() { "none".into() } else { doubts.join(", ") }]);
    row
}

/// The figures of a row, in the order of the columns.
fn numbers(c: &Compared) -> [Option<f64>; 8] {
    [
        c.tokens_per_second,
        c.price.as_ref().map(|p| p.0),
        c.per_dollar_hour,
        c.dollars_per_million,
        c.joules_per_token,
        c.verified_per_dollar,
        c.score,
        c.score_per_dollar_day,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_called_after_its_file_or_directory() {
        assert_eq!(name(Path::new("a/h200.json")), "h200");
        assert_eq!(name(Path::new("epyc/report.json")), "epyc");
        assert_eq!(name(Path::new("report.json")), "report");
    }
}
