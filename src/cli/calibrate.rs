//! `calibrate`: the whitening of a model's hidden rows, computed and stored; limits from captured
//! honest answers; how many of this engine's own answers are equal bit for bit.

use super::capture::{Captures, Judged, Rules, Verifiers, understand};
use super::load::{DownloadBars, Located, available_memory, locate, plan};
use super::out::outln;
use super::shared::{ComputeArgs, ModelsArg};
use super::{Failure, runtime};
use crate::bench::prompts;
use crate::clock::Clock;
use crate::config::models_toml::ModelConfig;
use crate::engine::Engine;
use crate::engine::request::Request;
use crate::intake::proof::Prover;
use crate::models::calibration::{compute, store};
use crate::models::margin::MARGIN_CLIP;
use crate::models::remembered::{Remembered, cache_dir};
use crate::models::root::weights_root;
use crate::models::{Identity, Model};
use crate::ops::pool::Pool;
use crate::proof::codec::{Hash, to_hex};
use crate::proof::commit::{calibration_hash, nonce_of};
use crate::proof::{CHUNK_ROWS, Scheme};
use crate::verify::answer::Answer;
use crate::verify::bounds;
use crate::verify::calibrate::{ENERGY_FACTOR, MARGIN_FACTOR, Sample, limits_file, split};
use crate::verify::limits::{self, LimitsFile, Share, Spread};
use crate::verify::proof::Asked;
use crate::verify::{Claim, Depth, Limits, Profile, Report, Verdict, Verifier};
use clap::Args;
use comfy_table::{Table, presets};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tokens of one of this engine's own answers: four chunks.
const OWN_TOKENS: usize = 4 * CHUNK_ROWS;
/// Own answers that run at once.
const OWN_BATCH: usize = 16;

/// Arguments of `calibrate`.
#[derive(Args)]
pub(super) struct CalibrateArgs {
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Only this one.
    #[arg(long)]
    model: Option<String>,
    /// Take limits from honest answers with proofs, captured as `verify` reads them; may be given
    /// several times.
    #[arg(long, value_name = "FILE", requires = "limits")]
    pairs: Vec<PathBuf>,
    /// Where the limits go.
    #[arg(long, value_name = "FILE", requires = "pairs")]
    limits: Option<PathBuf>,
    /// Which miners gave these answers: stack, version and hardware, in words.
    #[arg(long, value_name = "NAME", default_value = "unnamed")]
    class: String,
    /// Share of the prompts that only test the limits.
    #[arg(long, value_name = "SHARE", default_value_t = 0.5)]
    held_out: f64,
    /// Generate so many answers here and say how many are equal bit for bit when recomputed.
    #[arg(long, value_name = "N", conflicts_with = "pairs")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    answers: Option<u32>,
}

pub(super) fn run(args: &CalibrateArgs) -> Result<(), Failure> {
    if !(args.held_out > 0.0 && args.held_out < 1.0) {
        let message = format!("--held-out must lie between 0 and 1, got {}", args.held_out);
        return Err(Failure::user(message));
    }
    match (&args.limits, args.answers) {
        (Some(out), _) => take_limits(args, out),
        (None, Some(count)) => check_own(args, count),
        (None, None) => whiten(args),
    }
}

impl CalibrateArgs {
    fn is_wanted(&self, name: &str) -> bool {
        self.model.as_deref().is_none_or(|m| m == name)
    }

    /// The models of the file that are asked about.
    fn wanted(&self) -> Result<Vec<ModelConfig>, Failure> {
        let models = self.models.read(&[])?.models;
        let wanted: Vec<_> = models.into_iter().filter(|m| self.is_wanted(&m.name)).collect();
        match wanted.is_empty() {
            true => {
                Err(Failure::user(format!("{} lists no such model", self.models.path.display())))
            }
            false => Ok(wanted),
        }
    }
}

fn whiten(args: &CalibrateArgs) -> Result<(), Failure> {
    let wanted = args.wanted()?;
    let pool = args.compute.pool()?;
    let (runtime, bars) = (runtime()?, DownloadBars::new());
    for config in wanted {
        let (name, dtype) = (config.name.clone(), config.dtype);
        let located = runtime.block_on(locate(config, &bars)).map_err(Failure::user)?;
        let model = Model::load(&located.path, dtype, &pool, |_, _| {}).map_err(Failure::user)?;
        let cache = cache_dir();
        let remembered = Remembered(&cache);
        let root = weights_root(&model.checkpoint, &pool, remembered).map_err(Failure::user)?;
        let (decoder, tokenizer) = (&model.decoder, &model.tokenizer);
        let (calibration, rows) = compute(decoder, tokenizer, &pool).map_err(Failure::user)?;
        let path = store(&model, &root, &calibration, rows, remembered).map_err(Failure::user)?;
        outln!("{name}");
        outln!("  weights root  {}", to_hex(&root));
        outln!("  calibration   {}", to_hex(&calibration_hash(&calibration)));
        let (channels, shift) = (calibration.channels(), calibration.shift);
        outln!("  {channels} channels from {rows} rows, shift {shift}, in {}", path.display());
    }
    Ok(())
}

/// Judges captured honest answers at every row, and writes limits between which they lie.
fn take_limits(args: &CalibrateArgs, out: &Path) -> Result<(), Failure> {
    // Before the work, not after it.
    limits::check_place(out).map_err(Failure::user)?;
    let mut verifiers = Verifiers::new(&args.models, args.compute.pool()?, Limits::NONE)?;
    let rules = Rules { profile: Some(Profile::Proof), depth: Depth::Slow, chance: Some(0) };
    let (mut samples, mut model, mut left_out) = (Vec::new(), None, 0);
    for path in &args.pairs {
        let mut captures = Captures::open(path)?;
        for line in captures.iter() {
            let (place, capture) = line?;
            let capture = capture.map_err(|e| Failure::user(format!("{place}: {e}")))?;
            if capture.request["model"].as_str().is_some_and(|name| !args.is_wanted(name)) {
                continue;
            }
            let verifier = verifiers.of(&capture)?;
            let hash = verifier.identity.model_hash;
            if *model.get_or_insert(hash) != hash {
                let what = format!("{place}: limits belong to one model, this is a second one");
                return Err(Failure::user(what).with_hint(Some("choose one with --model")));
            }
            for judged in verifiers.judge(&verifier, &place, &capture, rules)? {
                match sample(&place, judged) {
                    Some(sample) => samples.push(sample),
                    None => left_out += 1,
                }
            }
        }
    }
    let Some(model) = model else {
        return Err(Failure::user("the captures hold no answer of this model"));
    };
    let split = split(samples, args.held_out).map_err(Failure::user)?;
    let file = limits_file(&model, &args.class, &split);
    limits::write(out, &file).map_err(Failure::user)?;
    describe(&file, left_out);
    outln!("written to {}", out.display());
    Ok(())
}

/// What limits can be taken from; the log says why not.
fn sample(place: &str, judged: Judged) -> Option<Sample> {
    let Judged { choice, scheme, request, report, .. } = judged;
    let why = match (&report.verdict, scheme) {
        (Verdict::Pass, Some(Scheme::Residue | Scheme::ResidueU4)) => None,
        (Verdict::Pass, _) => Some("only residue schemes have energies".to_owned()),
        (verdict, _) => Some(verdict.to_string()),
    };
    match (why, scheme) {
        (None, Some(scheme)) => Some(Sample::new(&request.prompt, scheme, report)),
        (why, _) => {
            let why = why.unwrap_or_default();
            tracing::warn!(
                "{place} choice {choice} is no honest answer to take limits from: {why}"
            );
            None
        }
    }
}

fn describe(file: &LimitsFile, left_out: usize) {
    let LimitsFile { class, calibration, held_out, limits, .. } = file;
    outln!("limits for miners of class `{class}`");
    outln!(
        "taken from {} answers to {} prompts ({} tokens), tested on {} answers to {} others; {} \
         captures could not be used",
        calibration.answers,
        calibration.prompts,
        calibration.tokens,
        held_out.answers,
        held_out.prompts,
        left_out
    );
    outln!("{}", table(file));
    outln!(
        "limits: largest honest energy times {ENERGY_FACTOR}, largest honest margin times \
         {MARGIN_FACTOR}"
    );
    let energies = [calibration.energy_u8, calibration.energy_u4];
    if energies.iter().flatten().all(|spread| spread.max == 0.0) && calibration.margin_max == 0.0 {
        outln!("all rows are equal bit for bit: `verify --exact` demands that");
    }
    if limits.margin >= MARGIN_CLIP {
        outln!("honest margins reach {MARGIN_CLIP}: a single one rejects nobody");
    }
}

fn table(file: &LimitsFile) -> Table {
    let LimitsFile { calibration, held_out, limits, .. } = file;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "what",
        "honest mean",
        "99.9 %",
        "largest",
        "limit",
        "held out: rejected",
        "false-positive rate, 95 %",
    ]);
    let four = |spread: Option<Spread>, limit: f64| match spread {
        Some(s) => [s.mean, s.p999, s.max, limit].map(|x| format!("{x:.3}")),
        None => ["-".into(), "-".into(), "-".into(), format!("{limit} (not measured)")],
    };
    let margins = |middle: String, largest: String, limit: f64| {
        [middle, "-".into(), largest, format!("{limit:.4}")]
    };
    let (mean, largest) = (calibration.margin_mean, calibration.margin_max);
    let (mean, largest) = (format!("{mean:.5}"), format!("{largest:.4}"));
    let dash = || "-".to_owned();
    for (what, values, share) in [
        ("energy, residue-v1", four(calibration.energy_u8, limits.energy_u8), held_out.energy_u8),
        (
            "energy, residue-v1-u4",
            four(calibration.energy_u4, limits.energy_u4),
            held_out.energy_u4,
        ),
        ("margin of a token", margins(mean.clone(), largest, limits.margin), held_out.margin),
        ("mean margin", margins(mean, dash(), limits.margin_mean), held_out.margin_mean),
        ("any of these", [dash(), dash(), dash(), dash()], held_out.rejected),
    ] {
        let [a, b, c, d] = values;
        let (rejected, interval) = rate(&share);
        table.add_row([what.to_owned(), a, b, c, d, rejected, interval]);
    }
    table
}

fn rate(share: &Share) -> (String, String) {
    if share.of == 0 {
        return ("-".into(), "-".into());
    }
    let (low, high) = bounds::interval(share.over, share.of);
    let interval = format!("{:.2} % to {:.2} %", 100.0 * low, 100.0 * high);
    (format!("{} of {}", share.over, share.of), interval)
}

/// How many of this engine's own answers are equal when they are recomputed: all, or it is broken.
fn check_own(args: &CalibrateArgs, count: u32) -> Result<(), Failure> {
    let wanted = args.wanted()?;
    let pool = args.compute.pool()?;
    let (runtime, bars) = (runtime()?, DownloadBars::new());
    for config in wanted {
        let name = config.name.clone();
        let located = runtime.block_on(locate(config, &bars)).map_err(Failure::user)?;
        let own = Own::start(&located, &pool)?;
        let ask = |index: u32| {
            let asked = runtime.block_on(own.request(index));
            asked.map_err(|why| Failure::user(format!("{name}: {why}")))
        };
        let (mut equal, mut chunks, mut tokens) = (0_usize, 0, 0);
        let batch = own.engine.options().sequences_max.clamp(1, OWN_BATCH);
        for indices in (0..count).collect::<Vec<_>>().chunks(batch) {
            let asked = indices.iter().map(|i| ask(*i)).collect::<Result<Vec<_>, _>>()?;
            for report in own.reports(indices, asked)? {
                equal += usize::from(report.verdict == Verdict::Pass);
                chunks += report.chunks.len();
                tokens += report.rows.len();
                if report.verdict != Verdict::Pass {
                    tracing::error!("{name}: {}", report.verdict);
                }
            }
            tracing::info!("{name}: {equal} answers are equal");
        }
        let lower = 100.0 * bounds::interval(equal, count as usize).0;
        outln!("{name}: {equal} of {count} answers are equal bit for bit and drawn as replayed");
        outln!("  {chunks} chunks, {tokens} tokens; the true rate is above {lower:.2} % (95 %)");
        if equal < count as usize {
            return Err(Failure::ours("an answer of this engine is not what it recomputes"));
        }
    }
    Ok(())
}

/// An engine beside a verifier of the same model that demands equal bits.
struct Own {
    engine: Engine,
    verifier: Verifier,
    prompts: Vec<String>,
}

impl Own {
    fn start(located: &Located, pool: &Pool) -> Result<Self, Failure> {
        let options = plan(located, available_memory()).map_err(Failure::user)?.options;
        let model = Model::load(&located.path, located.config.dtype, pool, |_, _| {});
        let model = model.map_err(Failure::user)?;
        let identity = Identity::of(&model, pool).map_err(Failure::user)?;
        let engine = Engine::start(model, pool.clone(), options, Clock::system());
        let engine = engine.map_err(Failure::ours)?;
        let verifier = Verifier {
            model: Arc::clone(engine.model()),
            identity: Arc::new(identity),
            pool: pool.separate(),
            limits: Limits { exact: true, ..Limits::default() },
            context_max: options.context_max,
        };
        Ok(Self { engine, verifier, prompts: prompts::all() })
    }

    /// Answer `index` as a client would ask for it.
    async fn request(&self, index: u32) -> Result<Request, String> {
        let prompt = &self.prompts[index as usize % self.prompts.len()];
        let mut body = json!({"temperature": 0.8, "max_tokens": OWN_TOKENS});
        match self.verifier.model.chat {
            Some(_) => body["messages"] = json!([{"role": "user", "content": prompt}]),
            None => body["prompt"] = json!(prompt),
        }
        let requests = understand(&self.verifier, &body).await?;
        requests.into_iter().next().ok_or_else(|| "the request has no choice".into())
    }

    /// Generates answers side by side, then recomputes each.
    fn reports(&self, indices: &[u32], asked: Vec<Request>) -> Result<Vec<Report>, Failure> {
        let mut running = Vec::new();
        for (index, mut request) in indices.iter().zip(asked) {
            let prover = Prover { scheme: Scheme::Residue, nonce: nonce(*index), signer: None };
            let head = prover.bind(&mut request, &self.verifier.identity, None, 0);
            let generation = self.engine.submit(request.clone()).map_err(Failure::user)?;
            running.push((*index, head, request, generation));
        }
        let mut reports = Vec::new();
        for (index, head, request, generation) in running {
            let (steps, finish) = generation.collect_blocking().map_err(Failure::ours)?;
            let end = finish.map(|f| head.end(f.digest, f.completion_tokens, &f.reason));
            let answer = Answer::of_steps(&steps, end);
            let (scheme, nonce) = (Scheme::Residue, Some(nonce(index)));
            let claim = Claim {
                request: &request,
                seed: None,
                choice: 0,
                proof: Some(Asked { scheme, nonce, hotkey: None }),
                answer: &answer,
                end_is_implied: false,
            };
            reports.push(self.verifier.verify(&claim, Profile::Proof, Depth::Slow, 0));
        }
        Ok(reports)
    }
}

fn nonce(index: u32) -> Hash {
    nonce_of(&format!("calibrate {index}"))
}
