//! Measures prefill, decode and checks over batch and depth in this process, for `bench engine`.
//! Each figure stands beside the ceilings of the machine and what `bench plan` predicts from them.

use super::ceilings::Peaks;
use super::conditions::{Conditions, Mark, MarkKind, Moment, drift, governor};
use super::host;
use super::load::{proved, request_of};
use super::plan::devices::DeviceSpec;
use super::report::schema::{BenchReport, Ceilings, MemoryUse, Phase, ReportRow, TableCeilings};
use super::rows::{RowSize, row};
use super::runs::{self, Meter, Run, decode_tokens};
use super::site::Site;
use crate::clock::Clock;
use crate::engine::{Engine, Options};
use crate::models::pass::blocks_of;
use crate::models::{Identity, Model};
use crate::proof::Scheme;
use crate::proof::codec::Hash;
use crate::proof::commit::nonce_of;
use crate::verify::answer::Answer;
use crate::verify::{Challenge, Claim, Depth, Profile, Verdict, Verifier};
use anyhow::{Context, ensure};
use std::path::Path;
use std::sync::Arc;

/// Rows of a step.
const STEP_TOKENS: usize = 512;
/// KV blocks that are left over.
const SPARE_BLOCKS: usize = 64;

/// The phases, batches and depths that are measured.
#[derive(Clone, PartialEq, Debug)]
pub struct SweepSetup {
    /// Sequences side by side.
    pub batches: Vec<usize>,
    /// Tokens before what is measured.
    pub depths: Vec<usize>,
    /// Tokens that each sequence decodes, and that an answer which is checked has.
    pub tokens: usize,
    /// Runs of each row.
    pub runs: usize,
    /// Every run asks the same prompts: it measures the prefix cache too.
    pub repeats_prompts: bool,
    /// The machine's row of the device table.
    pub device: Option<DeviceSpec>,
}

/// Who follows a measurement.
pub struct SweepWatch<'a> {
    /// Whether it should go on; asked before every run.
    pub is_wanted: &'a dyn Fn() -> bool,
    /// Takes the report as it is, after every row.
    pub keep: &'a mut dyn FnMut(&BenchReport) -> anyhow::Result<()>,
}

/// Measures `model` on its device into `report`; what is there stays, whatever happens later.
///
/// # Errors
/// When a size does not fit, or the engine fails.
pub fn run(
    (model, identity): (Model, Identity),
    site: &Site,
    setup: &SweepSetup,
    report: &mut BenchReport,
    watch: &mut SweepWatch<'_>,
) -> anyhow::Result<()> {
    let (clock, root) = (Clock::system(), Path::new("/"));
    let options = options(&model, setup)?;
    site.check_room(&model, (options.sequences_max, options.blocks))?;
    let before = Moment::now(root, &clock);
    let ceilings = ceilings(site, setup.device.as_ref())?;
    report.ceilings = Some(ceilings.clone());
    // What the ceilings were measured with is not the engine's.
    host::trim();
    if let Err(why) = host::reset_peak() {
        tracing::info!("the peak of memory contains what ceilings are measured with: {why}");
    }
    report.marks.extend(governor(root));
    if !report.program.is_optimized {
        let what = "the program was compiled without optimisation";
        report.marks.push(Mark::new(MarkKind::Unoptimized, what));
    }
    let weights = model.weights.bytes() as u64;
    let kv = (options.blocks * model.spec.kv_dims().block_bytes()) as u64;
    let model = Arc::new(model);
    let engine = Engine::start(Arc::clone(&model), site.pool.clone(), options, Clock::system())?;
    let verifier =
        Verifier::new(model, Arc::new(identity), site.pool.separate(), options.context_max);
    let bench = Bench { engine, verifier, setup, site, ceilings: &ceilings };
    let outcome = bench.all(report, watch);
    let peak_resident = host::resident_bytes("VmHWM:").unwrap_or(0.0) as u64;
    report.memory = Some(MemoryUse { weights, kv, peak_resident });
    report.seconds = clock.elapsed().as_secs_f64();
    // Before the ceilings are measured again: the load is this measurement's.
    let conditions = Conditions { before, after: Moment::now(root, &clock) };
    report.marks.extend(conditions.marks());
    report.marks.extend(site.doubts_after());
    report.conditions = Some(conditions);
    if outcome.is_ok() && (watch.is_wanted)() {
        let peak = site.peak()?;
        report.marks.extend(drift("the peak of multiply-adds", ceilings.fma_peak, peak));
    }
    outcome
}

/// The engine's sizes.
fn options(model: &Model, setup: &SweepSetup) -> anyhow::Result<Options> {
    let spec = &model.spec;
    let deepest = setup.depths.iter().copied().max().context("no depth is asked for")?;
    let batch = setup.batches.iter().copied().max().context("no batch is asked for")?;
    let context_max = deepest + decode_tokens(setup.tokens, batch) + 1;
    ensure!(
        context_max <= spec.context,
        "--depth {deepest} with --tokens {} and --batch {batch} needs a context of {context_max} \
         tokens, but the model's has {}",
        setup.tokens,
        spec.context
    );
    let blocks = batch * blocks_of(context_max) + SPARE_BLOCKS;
    let (sequences_max, waiting_max) = (batch, batch);
    Ok(Options {
        context_max,
        blocks,
        sequences_max,
        waiting_max,
        step_tokens_max: STEP_TOKENS,
        drafts_max: 0,
    })
}

fn ceilings(site: &Site, device: Option<&DeviceSpec>) -> anyhow::Result<Ceilings> {
    let Peaks { read_bandwidth, fma_peak } = site.peaks()?;
    let table = device.map(|d| TableCeilings {
        device: d.name.into(),
        bandwidth: d.bandwidth,
        peak: d.peak,
    });
    Ok(Ceilings { read_bandwidth, fma_peak, table })
}

struct Bench<'a> {
    engine: Engine,
    verifier: Verifier,
    setup: &'a SweepSetup,
    site: &'a Site,
    ceilings: &'a Ceilings,
}

impl Bench<'_> {
    fn all(&self, report: &mut BenchReport, watch: &mut SweepWatch<'_>) -> anyhow::Result<()> {
        self.decode(1, 32.min(self.setup.depths[0].max(1)), 0)?; // warm-up
        for phase in [Phase::Prefill, Phase::Decode, Phase::Verify] {
            for depth in &self.setup.depths {
                for batch in &self.setup.batches {
                    let depth = (*depth).max(1);
                    if !self.measure(phase, (*batch, depth), report, watch)? {
                        let what =
                            format!("it was interrupted before {} was measured", phase.name());
                        report.marks.push(Mark::new(MarkKind::Interrupted, what));
                        return Ok(());
                    }
                    (watch.keep)(report)?;
                }
            }
        }
        report.is_partial = false;
        Ok(())
    }

    /// Adds one row; false where nobody wants it any more. Runs that were made count.
    fn measure(
        &self,
        phase: Phase,
        (batch, depth): (usize, usize),
        report: &mut BenchReport,
        watch: &SweepWatch<'_>,
    ) -> anyhow::Result<bool> {
        let (mut runs, mut joules) = (Vec::new(), Vec::new());
        let answers = match phase {
            Phase::Verify => self.answers(batch, depth)?,
            Phase::Prefill | Phase::Decode => Vec::new(),
        };
        let cached = self.engine.stats().snapshot().cached_tokens;
        for number in 0..self.setup.runs {
            if !(watch.is_wanted)() {
                break;
            }
            let salt = if self.setup.repeats_prompts { 1 } else { 1 + number };
            let run = match phase {
                Phase::Prefill => self.prefill(batch, depth, salt)?,
                Phase::Decode => self.decode(batch, depth, salt)?,
                Phase::Verify => self.check(&answers)?,
            };
            joules.extend(run.joules.map(|j| j / run.tokens as f64));
            runs.push(run.rate());
        }
        if phase == Phase::Prefill && !self.setup.repeats_prompts {
            let found = self.engine.stats().snapshot().cached_tokens - cached;
            if found > 0 {
                let what = format!("{found} tokens of prompts that should be new were cached");
                report.marks.push(Mark::new(MarkKind::WarmCache, what));
            }
        }
        let size = RowSize { phase, batch, depth, tokens: self.setup.tokens };
        let spec = &self.engine.info().spec;
        let is_whole = runs.len() == self.setup.runs;
        let mean = joules.iter().sum::<f64>() / joules.len().max(1) as f64;
        let ceilings = (self.ceilings, self.site.efficiency());
        let measured = row(spec, ceilings, size, runs);
        let joules_per_token = (!joules.is_empty()).then_some(mean);
        report.rows.extend(measured.map(|row| ReportRow { joules_per_token, ..row }));
        Ok(is_whole)
    }

    /// Prompts that no other run has.
    fn prompt(&self, phase: Phase, (batch, depth): (usize, usize), salt: usize, i: usize) -> u64 {
        let place = ((phase as u64) << 60) | ((salt as u64) << 44) | ((batch as u64) << 32);
        place | ((depth as u64) << 12) | i as u64
    }

    fn prefill(&self, batch: usize, depth: usize, salt: usize) -> anyhow::Result<Run> {
        let vocab = self.engine.info().spec.vocab;
        let seed = |i| self.prompt(Phase::Prefill, (batch, depth), salt, i);
        let requests = (0..batch).map(|i| request_of(vocab, depth, 1, seed(i))).collect();
        runs::prefill(&self.engine, Some(self.site), requests)
    }

    fn decode(&self, batch: usize, depth: usize, salt: usize) -> anyhow::Result<Run> {
        let vocab = self.engine.info().spec.vocab;
        let seed = |i| self.prompt(Phase::Decode, (batch, depth), salt, i);
        let request = |i: usize, tokens: usize| request_of(vocab, depth, tokens, seed(i));
        runs::decode(&self.engine, Some(self.site), (batch, self.setup.tokens), &request)
    }

    /// Honest answers with proofs.
    fn answers(&self, batch: usize, depth: usize) -> anyhow::Result<Vec<Proved>> {
        let vocab = self.engine.info().spec.vocab;
        let answer = |i| {
            let seed = self.prompt(Phase::Verify, (batch, depth), 0, i);
            let mut request = request_of(vocab, depth, self.setup.tokens, seed);
            request.sampling.temperature = 0.7;
            let nonce = nonce_of(&format!("bench engine {seed}"));
            let answer = proved(&self.engine, &self.verifier.identity, &request, nonce)?;
            anyhow::Ok(Proved { request, nonce, answer })
        };
        (0..batch).map(answer).collect()
    }

    /// Checks all answers, each on a thread of its own: tokens of prompts and answers.
    fn check(&self, answers: &[Proved]) -> anyhow::Result<Run> {
        let meter = Meter::start(Some(self.site));
        let verdicts: Vec<Verdict> = std::thread::scope(|scope| {
            let check = |proved| scope.spawn(move || self.verdict(proved));
            let running: Vec<_> = answers.iter().map(check).collect();
            let failed = |_| Verdict::Unscored("a check panicked".into());
            running.into_iter().map(|thread| thread.join().unwrap_or_else(failed)).collect()
        });
        let tokens = answers.iter().map(|a| a.request.prompt.len() + a.answer.ids.len());
        let run = meter.end(tokens.sum());
        let wrong = verdicts.iter().find(|v| **v != Verdict::Pass);
        ensure!(wrong.is_none(), "an honest answer does not pass: {wrong:?}");
        Ok(run)
    }

    fn verdict(&self, proved: &Proved) -> Verdict {
        let Proved { request, nonce, answer } = proved;
        let proof = Challenge { scheme: Scheme::Residue, nonce: Some(*nonce), hotkey: None };
        let claim = Claim { proof: Some(proof), ..Claim::new(request, answer) };
        let verification = self.verifier.verify(Profile::Proof, 7).depth(Depth::Fast);
        verification.answer(&claim).verdict
    }
}

/// An answer with its request and the nonce of its proof.
struct Proved {
    request: crate::engine::request::Request,
    nonce: Hash,
    answer: Answer,
}
