//! Runs `verify`: checks captured answers, one a line.

use super::Failure;
use super::checked::{CheckedAnswer, Tally, number, reason};
use super::out::outln;
use super::printable::printable;
use super::progress::Bars;
use super::shared::{ComputeArgs, ModelsArg, ScrutinyArgs, check_writable, runtime};
use super::tables::bordered;
use super::verify_html;
use crate::entropy::Entropy;
use crate::lifecycle::verifiers::{VerifierRules, Verifiers};
use crate::verify::capture::{Capture, CheckedChoice};
use crate::verify::captures::{CapturedLine, Captures};
use crate::verify::evidence::{Calibrated, Observed, weigh};
use crate::verify::evidence_file::EvidenceFile;
use crate::verify::limits_file::{self, LimitsFile};
use crate::verify::statistic::Statistic;
use crate::verify::{Depth, Limits, Profile, Verdict, Verification, Verifier};
use clap::Args;
use comfy_table::Table;
use maud::Markup;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::runtime::Runtime;

/// Exit code where an answer was rejected.
const REJECTED: u8 = 3;
/// Exit code where nothing was rejected, but not everything could be scored.
const UNSCORED: u8 = 4;

/// Arguments of `verify`.
#[derive(Args)]
pub(super) struct VerifyArgs {
    /// Captured answers, one JSON object a line: `request` (the body), and `response` (a whole
    /// answer) or `chunks` (the events of a stream); `hotkey` says who must have signed, `miner`
    /// who answered.
    file: PathBuf,
    #[command(flatten)]
    models: ModelsArg,
    /// Which rules: targon-4.1 (powv), targon-4.4 (ranks) or proof (of the scheme that the request
    /// asked for). Where absent, the proof if there is one to expect, else targon-4.4.
    #[arg(long)]
    profile: Option<Profile>,
    /// Compute logits at every row, in place of random ones and early ends (`--rows`,
    /// `--early-exit`).
    #[arg(long)]
    slow: bool,
    /// Require that hidden rows are equal bit for bit, because the miner runs this engine.
    #[arg(long)]
    exact: bool,
    /// Limits that `calibrate --pairs` wrote for this model.
    #[arg(long, value_name = "FILE", env = "TARGON_LIMITS")]
    limits: Option<PathBuf>,
    /// Add every answer to the evidence about its miner in this file.
    #[arg(long, value_name = "FILE", env = "TARGON_EVIDENCE")]
    evidence: Option<PathBuf>,
    /// Print the result for every token; `!` marks values over a limit.
    #[arg(long)]
    explain: bool,
    /// Print one JSON object for each answer.
    #[arg(long)]
    json: bool,
    /// Write a page that shows every token, with plots.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// The number that decides which rows are checked; random by default.
    #[arg(long)]
    chance: Option<u64>,
    #[command(flatten)]
    scrutiny: ScrutinyArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

pub(super) fn run(args: &VerifyArgs) -> Result<ExitCode, Failure> {
    args.check()?;
    check_writable("html", args.html.as_deref())?;
    let file = args.limits.as_deref().map(limits_file::read).transpose().map_err(Failure::user)?;
    let evidence = args.evidence.as_deref().map(EvidenceFile::open).transpose();
    let evidence = evidence.map_err(Failure::user)?;
    let limits = file.as_ref().map(|f| f.limits);
    let rates = file.as_ref().map_or_else(Calibrated::default, |f| f.rates);
    let rules = VerifierRules { limits, exact: args.exact, scrutiny: args.scrutiny.asked() };
    let models = (args.models.path.as_path(), args.models.read(&[])?);
    let verifiers = Verifiers::new(models, args.compute.pool()?, rules, Arc::new(Bars::new()));
    let captures = Captures::open(&args.file).map_err(Failure::user)?;
    let (runtime, entropy) = (runtime()?, Entropy::system());
    let account = evidence.map(|store| Account { store, rates, entropy: entropy.clone() });
    let (worst, is_warned, sections) = (0, false, Vec::new());
    let mut checking =
        Checking { args, file, runtime, entropy, verifiers, account, worst, is_warned, sections };
    let mut is_empty = true;
    for line in captures {
        is_empty = false;
        checking.line(line.map_err(Failure::user)?)?;
    }
    if is_empty {
        let what = format!("{} holds no captured answer: it is empty", args.file.display());
        return Err(Failure::user(what));
    }
    let Checking { worst, sections, .. } = checking;
    if let Some(path) = &args.html {
        let page = verify_html::page(&args.file.display().to_string(), &sections);
        std::fs::write(path, page).map_err(|e| {
            Failure::user(format!("--html {} cannot be written: {e}", path.display()))
        })?;
    }
    Ok(ExitCode::from([0, UNSCORED, REJECTED][worst]))
}

/// What lines are checked with, and what came out so far.
struct Checking<'a> {
    args: &'a VerifyArgs,
    file: Option<LimitsFile>,
    runtime: Runtime,
    entropy: Entropy,
    verifiers: Verifiers,
    account: Option<Account>,
    /// Weight of the worst verdict.
    worst: usize,
    /// Whether it was said that `--exact` has no effect on an answer.
    is_warned: bool,
    /// The parts of the HTML page.
    sections: Vec<Markup>,
}

impl Checking<'_> {
    /// Checks the answer of a line and prints what was found.
    fn line(&mut self, CapturedLine { place, capture }: CapturedLine) -> Result<(), Failure> {
        let place = place.to_string();
        let capture = match capture {
            Ok(capture) => capture,
            Err(rejection) => {
                self.unread(&place, &Verdict::Reject(rejection));
                return Ok(());
            }
        };
        let verifier = match self.runtime.block_on(self.verifiers.of(&capture)) {
            Ok(verifier) => verifier,
            Err(e) if e.is_of_request() => {
                self.unread(&place, &Verdict::Unscored(e.to_string()));
                return Ok(());
            }
            Err(e) => return Err(Failure::user(&e).with_hint(e.hint())),
        };
        check_model(self.args, self.file.as_ref(), &verifier)?;
        let question = self.runtime.block_on(self.verifiers.question(&verifier, &capture));
        match question {
            Ok(question) => {
                let verification = self.args.verification(&verifier, &self.entropy);
                let checked = verification.capture(question, &capture);
                self.choices(&place, &capture, &checked, &verifier)
            }
            Err(why) => {
                self.unread(&place, &Verdict::Unscored(why.to_string()));
                Ok(())
            }
        }
    }

    fn choices(
        &mut self,
        place: &str,
        capture: &Capture,
        checked: &[CheckedChoice],
        verifier: &Verifier,
    ) -> Result<(), Failure> {
        let (model, limits) = (&verifier.model.text, &verifier.limits);
        for checked in checked {
            self.worst = self.worst.max(weight(&checked.report.verdict));
            if self.args.exact && checked.profile != Profile::Proof && !self.is_warned {
                tracing::warn!("{place}: --exact says nothing of an answer without a proof");
                self.is_warned = true;
            }
            let tally = self.account.as_mut().map(|a| a.add(place, capture, checked, limits));
            let tally = tally.transpose()?;
            let finding = CheckedAnswer { place, checked, tally: tally.as_ref(), model, limits };
            print(&finding, self.args);
            if self.args.html.is_some() {
                self.sections.push(verify_html::section(&finding).map_err(Failure::ours)?);
            }
        }
        Ok(())
    }

    /// Says of a line that no choice of it could be checked; those after it are.
    fn unread(&mut self, place: &str, verdict: &Verdict) {
        if self.args.json {
            let (reason, what) = reason(verdict).unzip();
            let line = json!({
                "place": place, "choice": null, "passed": false, "reason": reason, "what": what,
            });
            outln!("{line}");
        } else {
            outln!("{place}: {}", printable(&verdict.to_string()));
        }
        if self.args.html.is_some() {
            self.sections.push(verify_html::unread(place, verdict));
        }
        self.worst = self.worst.max(weight(verdict));
    }
}

impl VerifyArgs {
    /// Refuses what only proofs are checked by, where the rules are others.
    fn check(&self) -> Result<(), Failure> {
        let Some(profile) = self.profile.filter(|profile| *profile != Profile::Proof) else {
            return Ok(());
        };
        let wanted = self.scrutiny.asked();
        let unused = [
            ("--exact", self.exact),
            ("--twin", wanted.twin.is_some()),
            ("--name-cheats", wanted.names),
            ("--early-exit", wanted.stops_early),
        ];
        match unused.iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => {
                let what = format!("{flag} goes only with proofs, --profile is {}", profile.name());
                Err(Failure::user(what))
            }
            None => Ok(()),
        }
    }

    fn verification<'a>(&self, verifier: &'a Verifier, entropy: &Entropy) -> Verification<'a> {
        let depth = if self.slow { Depth::Slow } else { Depth::Fast };
        let chance = self.chance.unwrap_or_else(|| entropy.word());
        verifier.verify(self.profile, chance).depth(depth)
    }
}

/// Limits of one model say nothing about another.
fn check_model(
    args: &VerifyArgs,
    file: Option<&LimitsFile>,
    verifier: &Verifier,
) -> Result<(), Failure> {
    match (&args.limits, file) {
        (Some(path), Some(file)) => {
            file.check_model(path, &verifier.identity.portable_hash()).map_err(Failure::user)
        }
        _ => Ok(()),
    }
}

/// A rejection outweighs an answer that could not be scored, in whatever order they come.
fn weight(verdict: &Verdict) -> usize {
    match verdict {
        Verdict::Pass => 0,
        Verdict::Unscored(_) => 1,
        Verdict::Reject(_) => 2,
    }
}

/// Where evidence is kept, and what it is weighed by.
struct Account {
    store: EvidenceFile,
    rates: Calibrated,
    entropy: Entropy,
}

impl Account {
    fn add(
        &mut self,
        place: &str,
        capture: &Capture,
        checked: &CheckedChoice,
        limits: &Limits,
    ) -> Result<Tally, Failure> {
        let miner = capture.miner().ok_or_else(|| {
            let what = format!("{place}: evidence needs a `hotkey` or a `miner`, got neither");
            Failure::user(what)
        })?;
        let chance = self.entropy.word();
        let observed = Observed::of(&checked.report, checked.scheme, limits).thinned(chance);
        let weighed = weigh(&mut self.store, miner, &self.rates, &observed);
        let (evidence, gain) = weighed.map_err(Failure::user)?;
        Ok(Tally { miner: miner.to_owned(), evidence, gain })
    }
}

fn print(finding: &CheckedAnswer<'_>, args: &VerifyArgs) {
    if args.json {
        outln!("{}", line(finding, args.explain));
        return;
    }
    let CheckedAnswer { place, checked, tally, .. } = finding;
    let CheckedChoice { choice, report, seconds, .. } = checked;
    outln!("{place} choice {choice}: {}", printable(&report.verdict.to_string()));
    let (tokens, rules) = (finding.tokens(), finding.rules());
    outln!("  {tokens} tokens, {} rows scored, {rules}, {seconds:.3} s", report.rows.len());
    finding.closeness().iter().for_each(|line| outln!("  {line}"));
    if let Some(tally) = tally {
        outln!("  {}", printable(&tally.describe()));
    }
    if args.explain {
        outln!("{}", table(finding));
    }
}

/// An answer as one JSON object.
fn line(finding: &CheckedAnswer<'_>, with_rows: bool) -> Value {
    let CheckedChoice { choice, report, seconds, .. } = finding.checked;
    let (reason, what) = reason(&report.verdict).unzip();
    let rows = report.rows.iter().filter(|_| with_rows).map(|r| {
        json!({
            "index": r.index, "token": r.token, "rank": r.rank, "logprob": r.logprob,
            "reported": r.reported, "margin": r.margin,
        })
    });
    json!({
        "place": finding.place, "choice": choice, "passed": report.verdict == Verdict::Pass,
        "reason": reason, "what": what,
        "tokens": finding.tokens(), "seconds": seconds, "chunks": report.chunks.len(),
        "canon": finding.checked.answer.as_ref().and_then(|a| Some(&a.end.as_ref()?.canon)),
        "exact_chunks": report.chunks.iter().filter(|c| c.is_exact).count(),
        "energies": report.chunks.iter().map(|c| c.energy).collect::<Vec<_>>(),
        "rounding": report.chunks.iter().map(|c| c.rounding).collect::<Vec<_>>(),
        "row_energies": report.energies, "row_twin": report.twin,
        "named": report.named.iter().map(|n| json!({"name": n.name, "beta": n.beta}))
            .collect::<Vec<_>>(),
        "statistic": finding.statistic().map(statistic_json),
        "twin": finding.twin().map(statistic_json),
        "rows": rows.collect::<Vec<_>>(),
        "evidence": finding.tally.map(Tally::json),
    })
}

fn statistic_json(statistic: Statistic) -> Value {
    let Statistic { value, rows, limit } = statistic;
    json!({"value": value, "rows": rows, "limit": limit, "over": statistic.is_over()})
}

/// What was found for every row that was scored.
fn table(finding: &CheckedAnswer<'_>) -> Table {
    let mut table =
        bordered(["token", "id", "text", "log-prob", "reported", "rank", "margin", "energy"]);
    let marked = |text: String, is_over: bool| if is_over { format!("{text} !") } else { text };
    for row in &finding.checked.report.rows {
        let is_far = finding.chunk(row.index).is_some_and(|c| finding.is_far(c));
        table.add_row([
            row.index.to_string(),
            row.token.to_string(),
            format!("{:?}", finding.model.tokenizer.text_of(row.token)),
            format!("{:.4}", row.logprob),
            number(row.reported),
            row.rank.to_string(),
            marked(number(row.margin), finding.is_unlikely(row.margin)),
            marked(finding.energy(row.index), is_far),
        ]);
    }
    table
}
