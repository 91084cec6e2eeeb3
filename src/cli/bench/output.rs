//! Defines what `bench engine` and `bench serve` share: where a report goes, who signs it, and when
//! it is refused.

use crate::bench::conditions::{Conditions, Mark, governor};
use crate::bench::report::schema::BenchReport;
use crate::bench::report::sheet::Sheet;
use crate::bench::report::{csv, html, markdown, seal};
use crate::chain::keys::Keypair;
use crate::cli::Failure;
use crate::cli::out::{note, outln};
use crate::cli::printable::printable_lines;
use crate::cli::subnet_args::WalletArgs;
use crate::clock::Clock;
use crate::files;
use anyhow::anyhow;
use clap::Args;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Flags of a measurement's report.
#[derive(Args)]
pub(super) struct OutputArgs {
    /// Write report.json, report.md, report.csv and report.html into this directory; the first is
    /// there from the first result on. `bench serve` adds vllm-1.json and so on, one a level.
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Print JSON in place of tables.
    #[arg(long)]
    pub(super) json: bool,
    /// Refuse to measure on a machine that is busy, and fail when the result is to be doubted.
    #[arg(long)]
    pub(super) strict: bool,
    #[command(flatten)]
    wallet: WalletArgs,
}

/// Where a report goes.
pub(super) struct ReportOutput<'a> {
    args: &'a OutputArgs,
    keypair: Option<Keypair>,
    /// What was seen of the machine before the measurement.
    marks: Vec<Mark>,
}

impl OutputArgs {
    /// Asks for the wallet's password, makes the directory and looks at the machine: all that may
    /// be refused before a measurement. `watched` is what is to be doubted of a card.
    pub(super) fn start(&self, watched: Vec<Mark>) -> Result<ReportOutput<'_>, Failure> {
        let keypair = match self.wallet.is_named() {
            true => Some(self.wallet.keypair()?),
            false => None,
        };
        if let Some(out) = &self.out {
            std::fs::create_dir_all(out).map_err(|e| cannot_write(out, &e))?;
        }
        let mut marks = Conditions::watch(Path::new("/"), &Clock::system()).marks();
        marks.extend(governor(Path::new("/")));
        marks.extend(watched);
        match marks.first() {
            Some(Mark { what, .. }) if self.strict => {
                let what = format!("this machine is not fit to be measured: {what}");
                Err(Failure::user(what).with_hint(Some("without --strict it is only noted")))
            }
            Some(Mark { what, .. }) => {
                note!("this machine is not fit to be measured, and the report says so: {what}");
                Ok(ReportOutput { args: self, keypair, marks })
            }
            None => Ok(ReportOutput { args: self, keypair, marks }),
        }
    }
}

impl ReportOutput<'_> {
    /// Keeps what is there so far.
    pub(super) fn keep(&self, report: &BenchReport) -> anyhow::Result<()> {
        let Some(out) = &self.args.out else { return Ok(()) };
        let path = out.join("report.json");
        let json = serde_json::to_vec_pretty(report)?;
        files::replace(&path, &json)
            .map_err(|e| anyhow!("{} cannot be written: {e}", path.display()))
    }

    /// Keeps a level of load in the form of vLLM's result files.
    pub(super) fn keep_vllm(&self, number: usize, file: &Map<String, Value>) -> anyhow::Result<()> {
        let Some(out) = &self.args.out else { return Ok(()) };
        let path = out.join(format!("vllm-{number}.json"));
        files::replace(&path, &serde_json::to_vec(file)?)
            .map_err(|e| anyhow!("{} cannot be written: {e}", path.display()))
    }

    /// Signs, prints and writes a report. What the measurement itself failed by (`outcome`) is
    /// said before anything else; then what could not be written, and with `--strict` what the
    /// report is to be doubted for.
    pub(super) fn finish(
        &self,
        mut report: BenchReport,
        outcome: Result<(), Failure>,
    ) -> Result<(), Failure> {
        note_before(&mut report, &self.marks);
        if let Some(keypair) = &self.keypair {
            seal::sign(&mut report, keypair).map_err(Failure::ours)?;
        }
        match self.args.json {
            true => outln!("{}", serde_json::to_string(&report).map_err(Failure::ours)?),
            false => outln!("{}", printable_lines(markdown::write(&report).trim_end())),
        }
        let written = self.write(&report);
        outcome.and(written)?;
        match report.marks.first() {
            Some(mark) if self.args.strict => {
                Err(Failure::user(format!("the result is to be doubted: {}", mark.what)))
            }
            _ => Ok(()),
        }
    }
}

impl ReportOutput<'_> {
    fn write(&self, report: &BenchReport) -> Result<(), Failure> {
        let Some(out) = &self.args.out else { return Ok(()) };
        self.keep(report).map_err(Failure::user)?;
        let page = html::write(report).map_err(Failure::ours)?;
        let (table, lines) = (markdown::write(report), csv::write(report));
        for (name, text) in [("report.md", table), ("report.csv", lines), ("report.html", page)] {
            let path = out.join(name);
            files::replace(&path, text.as_bytes()).map_err(|e| cannot_write(&path, &e))?;
        }
        Ok(())
    }
}

/// Adds what was seen before a measurement, where the measurement itself does not say the same.
fn note_before(report: &mut BenchReport, seen: &[Mark]) {
    for Mark { kind, what } in seen {
        if report.marks.iter().all(|mark| mark.kind != *kind) {
            report.marks.push(Mark::new(*kind, format!("before the measurement: {what}")));
        }
    }
}

pub(super) fn cannot_write(path: &Path, e: &std::io::Error) -> Failure {
    Failure::user(format!("{} cannot be written: {e}", path.display()))
}

/// Writes a table as a page.
pub(super) fn write_page(path: &Path, sheet: &Sheet) -> Result<(), Failure> {
    files::replace(path, sheet.html().as_bytes()).map_err(|e| cannot_write(path, &e))
}

/// A flag that is lowered by the first interrupt (Ctrl-C); the second ends the program.
pub(super) fn until_interrupted(runtime: &tokio::runtime::Runtime) -> Arc<AtomicBool> {
    let is_wanted = Arc::new(AtomicBool::new(true));
    let lowered = Arc::clone(&is_wanted);
    runtime.spawn(async move {
        if tokio::signal::ctrl_c().await.is_err() {
            return;
        }
        lowered.store(false, Ordering::SeqCst);
        note!("ending after this run; once more to end at once");
        if tokio::signal::ctrl_c().await.is_ok() {
            // What a shell reports of a program that SIGINT ended.
            std::process::exit(130);
        }
    });
    is_wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::conditions::MarkKind;
    use crate::bench::report::facts::{Machine, ModelFacts};
    use crate::bench::report::schema::ReportKind;

    #[test]
    fn a_machine_that_was_busy_before_is_marked_once() {
        let model =
            ModelFacts { name: "m".into(), weights_root: None, dtype: None, weights_bytes: None };
        let machine = Machine::this(Path::new("/nowhere"));
        let mut report = BenchReport::new(ReportKind::Serve, 0, machine, model);
        let seen =
            [Mark::new(MarkKind::Busy, "others ran"), Mark::new(MarkKind::Throttled, "slow")];
        report.marks.push(Mark::new(MarkKind::Throttled, "hot"));
        note_before(&mut report, &seen);
        let whats: Vec<&str> = report.marks.iter().map(|mark| mark.what.as_str()).collect();
        assert_eq!(whats, ["hot", "before the measurement: others ran"]);
    }
}
