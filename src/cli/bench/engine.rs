//! Runs `bench engine`: measures a model in this process.

use super::output::{OutputArgs, until_interrupted};
use crate::bench::plan::devices::{DeviceSpec, named};
use crate::bench::report::facts::ModelFacts;
use crate::bench::report::schema::{BenchReport, ReportKind};
use crate::bench::site::Site;
use crate::bench::sweep::{self, SweepSetup, SweepWatch};
use crate::cli::Failure;
use crate::cli::out::note;
use crate::cli::shared::{ComputeArgs, runtime};
use crate::clock::Clock;
use crate::models::arithmetic::Arithmetic;
use crate::models::device::Device;
use crate::models::{Identity, Model};
use crate::ops::dtype::Dtype;
use crate::proof::codec::to_hex;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Arguments of `bench engine`.
#[derive(Args)]
#[command(after_help = "Examples:
  targon-engine bench engine model.gguf --out report
  targon-engine bench engine ./Llama-3.1-8B --batch 1,16 --depth 512 --json
  targon-engine bench engine ./Llama-3.1-8B --on cuda:0 --batch 1,64 --out card
  targon-engine bench engine model.gguf --strict --wallet.name miner --out r")]
pub(in crate::cli) struct EngineArgs {
    /// A checkpoint directory or a GGUF file.
    model: PathBuf,
    /// Batch sizes, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: Vec<u16>,
    /// Tokens in the context before the measurement, and of each prompt, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "128,1024",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    depth: Vec<u32>,
    /// Tokens that each sequence decodes, and that each checked answer has.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(32..=4096))]
    tokens: u16,
    /// Runs of each row; their mean gets an interval of 95 %.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u8).range(1..=100))]
    runs: u8,
    /// Use the same prompts in every run, so that prefill finds them in the prefix cache.
    #[arg(long)]
    repeat_prompts: bool,
    /// What computes: auto (the first card that works, else the processor), cpu or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value_t)]
    on: Device,
    /// How a card computes: tensor (tensor cores, the default) or portable (the processor's bits).
    #[arg(long)]
    arithmetic: Option<Arithmetic>,
    /// Which row of the device table describes the device; by default it is found by its name.
    #[arg(long)]
    device: Option<String>,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(args: &EngineArgs) -> Result<(), Failure> {
    let device = args.device()?;
    if !args.model.exists() {
        return Err(Failure::user(format!("{} does not exist", args.model.display())));
    }
    let output = args.output.start(Site::watch(args.on))?;
    let (runtime, pool) = (runtime()?, args.compute.pool()?);
    let is_wanted = until_interrupted(&runtime);
    let dtype: Option<Dtype> = None;
    let model = Model::load_on(args.on, &args.model, dtype, &pool, |_, _| {})
        .and_then(|model| model.computing(args.arithmetic))
        .map_err(Failure::user)?;
    let identity = Identity::of(&model, &pool).map_err(Failure::user)?;
    let site = Site::of(&model, &pool).map_err(Failure::user)?;
    let machine = site.machine();
    let device = device.or_else(|| Site::table(&machine));
    let facts = facts(&args.model, &model, &identity);
    let started = Clock::system().unix_ms() / 1000;
    let mut report = BenchReport::new(ReportKind::Engine, started, machine, facts);
    report.program.canon = identity.canon.clone().into_owned();
    args.note_settings(&mut report);
    let setup = args.setup(device);
    let mut keep = |report: &BenchReport| {
        if let Some(row) = report.rows.last() {
            let (phase, speed) = (row.phase.name(), row.speed.mean);
            note!("{phase} batch {} depth {}: {speed:.1} tokens/s", row.batch, row.depth);
        }
        output.keep(report)
    };
    let wanted = || is_wanted.load(Ordering::SeqCst);
    let mut watch = SweepWatch { is_wanted: &wanted, keep: &mut keep };
    let outcome = sweep::run((model, identity), &site, &setup, &mut report, &mut watch);
    match outcome {
        Err(e) if report.rows.is_empty() => Err(Failure::user(e)),
        // What was measured until then counts.
        outcome => output.finish(report, outcome.map_err(Failure::user)),
    }
}

fn facts(path: &Path, model: &Model, identity: &Identity) -> ModelFacts {
    let name = path.file_name().unwrap_or(path.as_os_str());
    ModelFacts {
        name: name.to_string_lossy().into_owned(),
        weights_root: Some(to_hex(&identity.weights_root)),
        dtype: Some(identity.dtype.to_string()),
        weights_bytes: Some(model.weights.bytes() as u64),
    }
}

impl EngineArgs {
    fn device(&self) -> Result<Option<DeviceSpec>, Failure> {
        let Some(name) = &self.device else { return Ok(None) };
        let found = named(std::slice::from_ref(name));
        let found = found.map_err(|e| Failure::user(format!("--device: {e}")))?;
        Ok(found.into_iter().next())
    }

    fn setup(&self, device: Option<DeviceSpec>) -> SweepSetup {
        SweepSetup {
            batches: self.batch.iter().map(|b| usize::from(*b)).collect(),
            depths: self.depth.iter().map(|d| *d as usize).collect(),
            tokens: self.tokens.into(),
            runs: self.runs.into(),
            repeats_prompts: self.repeat_prompts,
            device,
        }
    }

    fn note_settings(&self, report: &mut BenchReport) {
        for (name, value) in [
            ("batch", json!(self.batch)),
            ("depth", json!(self.depth)),
            ("tokens", json!(self.tokens)),
            ("runs", json!(self.runs)),
            ("repeat_prompts", json!(self.repeat_prompts)),
            ("on", json!(self.on.to_string())),
            ("arithmetic", json!(self.arithmetic.map(|a| a.to_string()))),
        ] {
            report.settings.insert(name.into(), value);
        }
    }
}
