//! Runs `bench attack`: measures what each verification scheme catches, on a model of the user's
//! choice.

use super::output::cannot_write;
use crate::bench::attack::plot;
use crate::bench::attack::results::{GoalOutcome, Line, Results, Tokens};
use crate::bench::attack::{self, AttackSetup};
use crate::bench::stats::{Rate, Stopping};
use crate::cli::Failure;
use crate::cli::out::outln;
use crate::cli::shared::ComputeArgs;
use crate::cli::tables::bordered;
use crate::verify::evidence::Calibrated;
use crate::verify::scrutiny::{Scrutiny, TwinPolicy};
use crate::verify::{FastRows, limits_file};
use clap::Args;
use comfy_table::Table;
use std::path::{Path, PathBuf};

/// Arguments of `bench attack`.
#[derive(Args)]
pub(in crate::cli) struct AttackArgs {
    /// A checkpoint directory or GGUF file of a dense model.
    model: PathBuf,
    /// Prompts that every attack is run on.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u16).range(2..=1000))]
    prompts: u16,
    /// Honest answers that false positives are counted on, to other prompts.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(0..=4000))]
    honest: u16,
    /// Tokens of every answer. Default: 128 of honest and 256 of attacked ones.
    #[arg(long, value_parser = clap::value_parser!(u16).range(32..=512))]
    tokens: Option<u16>,
    /// Run only attacks whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Check by the limits of this file, as `calibrate --pairs` writes it.
    #[arg(long)]
    limits: Option<PathBuf>,
    /// Demand equal bits and equal draws: every miner runs this engine.
    #[arg(long)]
    exact: bool,
    /// When to compute rows a second time, as for `verify`: never, suspicion, a share or always.
    #[arg(long, default_value = "always")]
    twin: TwinPolicy,
    /// Try known cheats on answers that the twin finds too far.
    #[arg(long)]
    name_cheats: bool,
    /// Stop fast checks after a random number of chunks, as for `verify`.
    #[arg(long)]
    early_exit: bool,
    /// How many rows a fast check scores, as for `verify`: a number, or a share of the pass.
    #[arg(long, default_value_t)]
    rows: FastRows,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Write attack.json and attack.svg into this directory.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print JSON in place of the tables.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &AttackArgs) -> Result<(), Failure> {
    let pool = args.compute.pool()?;
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out).map_err(|e| cannot_write(out, &e))?;
    }
    let file = args.limits.as_deref().map(limits_file::read).transpose().map_err(Failure::user)?;
    let rates = file.as_ref().map_or_else(Calibrated::default, |file| file.rates);
    let setup = AttackSetup {
        tokens: args.tokens.map(usize::from),
        only: args.only.clone(),
        limits: file.as_ref().map(|file| file.limits),
        exact: args.exact,
        limits_file: args.limits.clone().zip(file),
        scrutiny: Scrutiny {
            twin: args.twin,
            stops_early: args.early_exit,
            names: args.name_cheats,
            rows: args.rows,
        },
        rates,
        ..AttackSetup::new(args.prompts.into(), args.honest.into())
    };
    let results = attack::run(&args.model, &pool, setup, |next| tracing::info!("{next}"));
    let results = results.map_err(Failure::user)?;
    if args.json {
        outln!("{}", serde_json::to_string(&results).map_err(Failure::ours)?);
    } else {
        print(&results);
    }
    match &args.out {
        Some(out) => write(out, &results),
        None => Ok(()),
    }
}

fn write(out: &Path, results: &Results) -> Result<(), Failure> {
    let json = serde_json::to_string_pretty(results).map_err(Failure::ours)?;
    let svg = plot::svg(results).map_err(Failure::ours)?;
    for (name, text) in [("attack.json", json + "\n"), ("attack.svg", svg)] {
        let path = out.join(name);
        std::fs::write(&path, text).map_err(|e| cannot_write(&path, &e))?;
    }
    Ok(())
}

fn print(results: &Results) {
    outln!("{}", lines(&results.lines));
    if !results.tokens.is_empty() {
        outln!("\nTokens until a cheat is seen: median / 95th percentile of random orders");
        outln!("{}", tokens(&results.tokens));
    }
    outln!("\nGoals");
    outln!("{}", goals(&results.goals));
    let ((attacked, attacked_tokens), (honest, honest_tokens)) = (results.attacked, results.honest);
    outln!(
        "\n{attacked} attacked prompts, answers of {attacked_tokens} tokens; {honest} honest \
         prompts, {honest_tokens} tokens; intervals of 95 %"
    );
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".into())
}

/// A share with its interval, in percent.
fn rate(rate: &Rate) -> String {
    let Rate { count, of, low, high } = rate;
    format!("{count}/{of} ({:.2}..{:.2} %)", 100.0 * low, 100.0 * high)
}

fn lines(lines: &[Line]) -> Table {
    let mut table = bordered([
        "answers that are",
        "verified by",
        "bytes/token",
        "rejected (95 %)",
        "missed after 1/2/4/8 chunks",
        "chunks needed",
        "energy or statistic (min..max)",
        "exact chunks",
        "mean margin",
    ]);
    for line in lines {
        let missed = |all: &Vec<Rate>| {
            let at = |n: usize| all.get(n - 1).map_or_else(String::new, |r| r.count.to_string());
            [1, 2, 4, 8].map(at).join("/")
        };
        let needed = |n: Option<usize>| or_dash(n.map(|n| n.to_string()));
        table.add_row([
            line.name.clone(),
            line.check.clone(),
            format!("{:.2}", line.bytes_per_token),
            rate(&line.rejected),
            or_dash(line.missed.as_ref().map(missed)),
            or_dash(line.chunks_needed.map(|both| both.map(needed).join(" / "))),
            or_dash(line.energy.map(|[mid, min, max]| format!("{mid:.2} ({min:.2}..{max:.2})"))),
            or_dash(line.exact.map(|r| format!("{}/{}", r.count, r.of))),
            or_dash(line.margin.map(|m| format!("{m:.4}"))),
        ]);
    }
    table
}

fn tokens(all: &[Tokens]) -> Table {
    let mut table = bordered([
        "cheat",
        "mismatch (95 %)",
        "mean margin",
        "one margin over the limit",
        "sequential test",
        "either",
        "on this engine",
    ]);
    for tokens in all {
        let number = |n: Option<usize>| or_dash(n.map(|n| n.to_string()));
        let span = |s: &Stopping| format!("{} / {}", number(s.median), number(s.p95));
        table.add_row([
            tokens.name.clone(),
            rate(&tokens.mismatch),
            format!("{:.4}", tokens.margin),
            span(&tokens.single),
            span(&tokens.sequential),
            span(&tokens.either),
            span(&tokens.exact),
        ]);
    }
    table
}

fn goals(all: &[GoalOutcome]) -> Table {
    let mut table = bordered(["goal", "measured", ""]);
    for outcome in all {
        let met = if outcome.is_met { "met" } else { "missed" };
        table.add_row([outcome.goal.as_str(), outcome.measured.as_str(), met]);
    }
    table
}
