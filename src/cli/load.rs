//! From models.toml to running engines: files, memory plan, weights, each step with progress.

use crate::clock::Clock;
use crate::config::models_toml::{ModelConfig, Source};
use crate::engine::Engine;
use crate::engine::memory::memory;
use crate::engine::plan::{Bytes, MemoryPlan};
use crate::models::checkpoint::Checkpoint;
use crate::models::hub::{Hub, Wanted};
use crate::models::{Identity, Model, config};
use crate::ops::CANON;
use crate::ops::pool::Pool;
use crate::proof::codec::to_hex;
use crate::server::registry::{Registry, Served, State};
use comfy_table::{Table, presets};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;

/// A model whose files are on this machine.
pub(super) struct Located {
    pub(super) config: ModelConfig,
    pub(super) path: PathBuf,
    pub(super) revision: String,
}

/// A model with its memory plan.
pub(super) struct Planned {
    pub(super) located: Located,
    pub(super) plan: MemoryPlan,
}

/// Finds or downloads a model's files.
pub(super) async fn locate(config: ModelConfig, bars: &DownloadBars) -> Result<Located, String> {
    let (path, revision) = match &config.source {
        Source::Path(path) => (path.clone(), path.display().to_string()),
        Source::Hub { repo, revision, file } => {
            let hub = Hub::from_env().map_err(|e| e.to_string())?;
            let wanted = file.as_deref().map_or(Wanted::Checkpoint, Wanted::File);
            let progress = |file: &str, done, total| bars.update(file, done, total);
            let snapshot =
                hub.fetch(repo, revision, wanted, &progress).await.map_err(|e| e.to_string())?;
            tracing::info!(repo, revision, commit = snapshot.commit, "resolved");
            let path = match file {
                Some(file) => snapshot.directory.join(file),
                None => snapshot.directory,
            };
            (path, snapshot.commit)
        }
    };
    Ok(Located { config, path, revision })
}

/// Plans one model into `available` bytes, from its headers alone.
pub(super) fn plan(located: &Located, available: u64) -> Result<MemoryPlan, String> {
    contained("planning", || {
        let checkpoint = Checkpoint::open(&located.path).map_err(|e| e.to_string())?;
        let spec = config::parse(&checkpoint.config_path, &checkpoint.config);
        let spec = spec.map_err(|e| e.to_string())?;
        MemoryPlan::new(&spec, located.config.wanted, available).map_err(|e| e.to_string())
    })
}

/// What a library panics at in a stranger's files is a failure of that model and of nothing else.
fn contained<T>(doing: &str, work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(format!("{doing} it panicked; the log says where")))
}

/// The plans as a table for people.
pub(super) fn table(rows: &[(String, Result<MemoryPlan, String>)], available: u64) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["model", "weights", "KV cache", "workspace", "total", "sequences x context"]);
    for (name, plan) in rows {
        match plan {
            Ok(p) => table.add_row([
                name.clone(),
                Bytes(p.weights).to_string(),
                Bytes(p.kv).to_string(),
                Bytes(p.workspace).to_string(),
                Bytes(p.total()).to_string(),
                format!("{} x {}", p.options.sequences_max, p.options.context_max),
            ]),
            Err(why) => table.add_row([name.clone(), format!("cannot be served: {why}")]),
        };
    }
    format!("{table}\navailable memory: {}", Bytes(available))
}

/// Memory that this process may still take.
pub(super) fn available_memory() -> u64 {
    memory().available
}

/// Loads weights and starts the engine of each planned model, side by side, and records the outcome
/// in the registry. Returns how many are ready.
pub(super) fn start_all(
    planned: Vec<Planned>,
    registry: &Registry,
    pool: &Pool,
    clock: &Clock,
) -> usize {
    let bars = MultiProgress::with_draw_target(draw_target());
    let outcomes = std::thread::scope(|scope| {
        let threads: Vec<_> = planned
            .iter()
            .map(|p| scope.spawn(|| start_one(p, registry, pool.clone(), clock.clone(), &bars)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap_or(false)).collect::<Vec<_>>()
    });
    outcomes.into_iter().filter(|is_ready| *is_ready).count()
}

fn start_one(
    planned: &Planned,
    registry: &Registry,
    pool: Pool,
    clock: Clock,
    bars: &MultiProgress,
) -> bool {
    let name = &planned.located.config.name;
    let started = clock.elapsed();
    let bar = bars.add(ProgressBar::new(0).with_message(name.clone()));
    bar.set_style(style("{msg} {wide_bar} layer {pos}/{len}"));
    let progress = |done: usize, layers: usize| {
        bar.set_length(layers as u64);
        bar.set_position(done as u64);
    };
    let loaded = contained("loading", || load_one(planned, pool, clock.clone(), progress));
    bar.finish_and_clear();
    match loaded {
        Ok(served) => {
            let seconds = (clock.elapsed() - started).as_secs_f64();
            let dtype = served.engine.model().decoder.dtype.to_string();
            let weights = to_hex(&served.identity.weights_root);
            tracing::info!(model = name, dtype, weights, seconds, "ready");
            registry.set(name, None, State::Ready(Box::new(served)));
            true
        }
        Err(why) => {
            tracing::error!(model = name, "cannot be served: {why}");
            registry.set(name, None, State::Failed(why));
            false
        }
    }
}

fn load_one(
    planned: &Planned,
    pool: Pool,
    clock: Clock,
    progress: impl Fn(usize, usize),
) -> Result<Served, String> {
    let Planned { located, plan } = planned;
    let model = Model::load(&located.path, located.config.dtype, &pool, progress)
        .map_err(|e| e.to_string())?;
    let identity = Identity::of(&model, &pool).map_err(|e| e.to_string())?;
    let fingerprint = fingerprint(&model, &identity, &pool);
    let engine = Engine::start(model, pool, plan.options, clock)
        .map_err(|e| format!("cannot start the engine: {e}"))?;
    Ok(Served { engine, fingerprint, identity: Arc::new(identity) })
}

/// Version, canon, weights root, dtype and kernel set in one word.
fn fingerprint(model: &Model, identity: &Identity, pool: &Pool) -> String {
    let root = to_hex(&identity.weights_root[..8]);
    let (version, dtype) = (env!("CARGO_PKG_VERSION"), model.decoder.dtype);
    format!("targon-engine-{version}-{CANON}-{root}-{dtype}-{}", pool.isa())
}

fn draw_target() -> ProgressDrawTarget {
    match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|e| unreachable!("template {template}: {e}"))
}

/// One bar for each file that is being downloaded; without a terminal, one log line a file.
pub(super) struct DownloadBars {
    all: MultiProgress,
    bars: Mutex<HashMap<String, ProgressBar>>,
}

impl DownloadBars {
    pub(super) fn new() -> Self {
        Self {
            all: MultiProgress::with_draw_target(draw_target()),
            bars: Mutex::new(HashMap::new()),
        }
    }

    pub(super) fn update(&self, file: &str, done: u64, total: u64) {
        let mut bars = self.bars.lock();
        let bar = bars.entry(file.to_owned()).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new(total).with_message(file.to_owned()));
            bar.set_style(style("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}"));
            bar
        });
        bar.set_position(done);
        if done == total && !bar.is_finished() {
            bar.finish_and_clear();
            tracing::info!(file, bytes = total, "fetched");
        }
    }
}
