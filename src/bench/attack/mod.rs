//! Measures what verification detects: honest answers and attacks on one model are verified in the
//! same way.
//!
//! `catalogue` lists the attacks, `answers` makes their answers (`trial`, `tamper`, `lockstep`,
//! `malformed`), `check` verifies them, [`results`] are plain data that [`plot`] draws and `goals`
//! measures. Nothing here prints. Only changed weights are written, and removed afterwards.
//!
//! Every attack uses the same prompts. The honest answers that false positives are counted on use
//! other prompts, and limits were measured elsewhere. Attacks on weights, caches and prompts prove
//! the rows that they really compute; attacks on sampling prove true rows over the tokens that they
//! chose. Proofs are verified by fast checks, margins also by checks of every row.

mod answers;
mod catalogue;
mod check;
mod goals;
mod lockstep;
mod malformed;
pub mod plot;
mod published;
pub mod results;
pub mod tamper;
mod trial;

use super::arguments::BenchArgs;
use super::{host, prompts};
use crate::files::ScratchDirectory;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use crate::proof::Scheme;
use crate::verify::evidence::Calibrated;
use crate::verify::limits_file::LimitsFile;
use crate::verify::rounding_energy::default_limits;
use crate::verify::scrutiny::Scrutiny;
use crate::verify::{Depth, Limits};
use answers::AnswerMaker;
use anyhow::bail;
use catalogue::{Attack, Cheat};
use check::AttackVerifier;
use results::{Detector, Line, Results, Tokens};
use std::path::{Path, PathBuf};
use trial::{AttackRequest, Subject};

/// Tokens of an honest answer, and of an attacked one: eight chunks.
const HONEST_TOKENS: usize = 128;
const ATTACKED_TOKENS: usize = 256;
/// Honest answers that are made and checked before progress is told.
const PART: usize = 160;
/// Answers of which every malformed variant is tried.
const MALFORMED: usize = 4;

/// What is run, and what it is checked by.
#[derive(Clone, PartialEq, Debug)]
pub struct AttackSetup {
    /// Prompts that are attacked; all of [`prompts::all`] from the first on.
    pub prompts: usize,
    /// Honest answers, to the prompts after those.
    pub honest: usize,
    /// Tokens of every answer. Default: 128 of honest ones and 256 of others.
    pub tokens: Option<usize>,
    /// Only attacks whose name holds this.
    pub only: Option<String>,
    /// Limits of one answer; the model's default ones where there are none.
    pub limits: Option<Limits>,
    /// Whether rows must be equal bit for bit, whatever the limits say.
    pub exact: bool,
    /// The file that they come from, which must be for the model.
    pub limits_file: Option<(PathBuf, LimitsFile)>,
    /// How closely answers are looked at.
    pub scrutiny: Scrutiny,
    /// What evidence over many answers is weighed by.
    pub rates: Calibrated,
}

impl AttackSetup {
    /// So many prompts and honest answers, by the default limits.
    pub fn new(prompts: usize, honest: usize) -> Self {
        Self {
            prompts,
            honest,
            tokens: None,
            only: None,
            limits: None,
            exact: false,
            limits_file: None,
            scrutiny: Scrutiny::default(),
            rates: Calibrated::default(),
        }
    }
}

/// What `cargo bench --bench attack` runs: a model, and how many prompts and honest answers.
///
/// # Errors
/// An argument that cannot be read, and as for [`run`].
pub fn run_by(mut args: BenchArgs, progress: impl Fn(&str)) -> anyhow::Result<Results> {
    let path = host::model_or_fetched(args.word())?;
    let setup = AttackSetup::new(args.number("PROMPTS", 4)?, args.number("HONEST", 32)?);
    run(&path, &host::pool()?, setup, progress)
}

/// Runs everything on the model at `path`; `progress` is told what comes next. Changed weights are
/// written into a directory of its own, which is removed afterwards.
///
/// # Errors
/// When the model cannot be loaded or is not that of the limits, has no chat template, there are
/// too few prompts, no attack is chosen, an engine fails or a file cannot be written.
pub fn run(
    path: &Path,
    pool: &Pool,
    setup: AttackSetup,
    progress: impl Fn(&str),
) -> anyhow::Result<Results> {
    let scratch = ScratchDirectory::new("targon-attack")?;
    AttackBench::new(path, scratch.path(), pool, setup)?.run(progress)
}

/// The attacks whose name holds `only`, or all.
fn chosen(layers: usize, only: Option<&str>) -> anyhow::Result<Vec<Attack>> {
    let mut attacks = catalogue::all(layers);
    let names: Vec<&str> = attacks.iter().map(|attack| attack.name).collect();
    let names = names.join("; ");
    attacks.retain(|attack| only.is_none_or(|only| attack.name.contains(only)));
    match (attacks.is_empty(), only) {
        (true, Some(only)) => {
            bail!("--only must be a part of the name of an attack, got {only:?}; they are: {names}")
        }
        _ => Ok(attacks),
    }
}

/// The model under attack.
struct AttackBench {
    subject: Subject,
    verifier: AttackVerifier,
    setup: AttackSetup,
    model: String,
    attacks: Vec<Attack>,
    attacked: Vec<AttackRequest>,
    honest: Vec<AttackRequest>,
}

impl AttackBench {
    /// Loads the model at `path`; `scratch` is a directory for changed weights.
    fn new(path: &Path, scratch: &Path, pool: &Pool, setup: AttackSetup) -> anyhow::Result<Self> {
        let all = prompts::all();
        let wanted = setup.prompts + setup.honest;
        if wanted > all.len() {
            bail!("there are {} prompts, {wanted} were asked for", all.len());
        }
        let subject = Subject::load(path, scratch, pool)?;
        if subject.model.dtype != Dtype::Bf16 {
            let dtype = subject.model.dtype;
            bail!("changed weights are written in bf16, this model is {dtype}");
        }
        if let Some((path, file)) = &setup.limits_file {
            file.check_model(path, &subject.identity.portable_hash())?;
        }
        let attacks = chosen(subject.model.spec.layers, setup.only.as_deref())?;
        let default = || default_limits(&subject.model, &subject.identity, pool);
        let mut limits = setup.limits.map_or_else(default, Ok)?;
        limits.exact |= setup.exact;
        let verifier = AttackVerifier::new(&subject, limits, setup.scrutiny);
        let asks = |from: usize, count: usize, tokens: usize| {
            let tokens = setup.tokens.unwrap_or(tokens);
            let some = all.iter().enumerate().skip(from).take(count);
            some.map(|(index, text)| subject.ask(index, text, tokens)).collect()
        };
        let attacked: anyhow::Result<Vec<AttackRequest>> = asks(0, setup.prompts, ATTACKED_TOKENS);
        let honest: anyhow::Result<Vec<AttackRequest>> =
            asks(setup.prompts, setup.honest, HONEST_TOKENS);
        let (attacked, honest) = (attacked?, honest?);
        let model = path.display().to_string();
        Ok(Self { subject, verifier, setup, model, attacks, attacked, honest })
    }

    /// Runs everything; `progress` is told what comes next.
    fn run(&self, progress: impl Fn(&str)) -> anyhow::Result<Results> {
        let mut lines = self.honest(&progress)?;
        let mut tokens = Vec::new();
        progress("honest answers to the prompts that are attacked");
        let mut answers = AnswerMaker::new(&self.subject, &self.attacked)?;
        for attack in &self.attacks {
            progress(attack.name);
            self.attack(attack, &mut answers, &mut lines, &mut tokens)?;
        }
        let length = |asks: &[AttackRequest]| asks.first().map_or(0, |ask| ask.request.max_tokens);
        Ok(Results {
            model: self.model.clone(),
            limits: format!("{:?}", self.verifier.limits()),
            attacked: (self.attacked.len(), length(&self.attacked)),
            honest: (self.honest.len(), length(&self.honest)),
            goals: goals::outcomes(&self.attacks, &lines, &tokens),
            lines,
            tokens,
        })
    }

    /// Honest answers, proved by the engine that drew them: every rejection is a false positive.
    fn honest(&self, progress: &impl Fn(&str)) -> anyhow::Result<Vec<Line>> {
        let mut lines = Vec::new();
        if self.honest.is_empty() {
            return Ok(lines);
        }
        let what = ("honest", Detector::Nothing);
        for scheme in [Scheme::Residue, Scheme::Toploc] {
            let (mut trials, mut reports) = (Vec::new(), Vec::new());
            for part in self.honest.chunks(PART) {
                let (done, all) = (trials.len(), self.honest.len());
                progress(&format!("honest answers with {scheme}: {done} of {all}"));
                let some = self.subject.honest(scheme, part)?;
                reports.extend(self.verifier.proofs(&some, scheme, Depth::Fast));
                trials.extend(some);
            }
            lines.extend(self.verifier.lines(what, scheme, &trials, &reports));
            if scheme == Scheme::Residue {
                progress("the same answers under the subnet's rules");
                lines.extend(self.verifier.rank_lines(what.0, what.1, &trials));
            }
        }
        Ok(lines)
    }

    fn attack(
        &self,
        attack: &Attack,
        answers: &mut AnswerMaker<'_>,
        lines: &mut Vec<Line>,
        tokens: &mut Vec<Tokens>,
    ) -> anyhow::Result<()> {
        let what = (attack.name, attack.detector);
        let verifier = &self.verifier;
        let proved = answers.make(attack)?;
        for (scheme, trials) in &proved {
            if matches!(attack.cheat, Cheat::Malformed) {
                let some = &trials[..MALFORMED.min(trials.len())];
                lines.push(verifier.malformed(attack, *scheme, some));
                continue;
            }
            let reports = verifier.proofs(trials, *scheme, Depth::Fast);
            lines.extend(verifier.lines(what, *scheme, trials, &reports));
            if *scheme == Scheme::Residue && attack.detector == Detector::Margin {
                let slow = verifier.proofs(trials, *scheme, Depth::Slow);
                lines.push(verifier.slow_line(attack, trials, &slow));
                if attack.adds_up() {
                    let (limits, rates) = (verifier.limits(), &self.setup.rates);
                    tokens.push(Tokens::new(attack.name, &slow, *scheme, limits, rates));
                }
            }
        }
        if let Some((_, trials)) = proved.first().filter(|_| attack.changes_tokens()) {
            lines.extend(verifier.rank_lines(what.0, what.1, trials));
        }
        Ok(())
    }
}
