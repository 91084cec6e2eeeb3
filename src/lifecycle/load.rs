//! Takes models.toml to running engines: files, memory plan and weights, each step with progress.

use super::prefixes;
use crate::clock::Clock;
use crate::config::models_toml::{ModelConfig, ModelSource};
use crate::engine::Engine;
#[cfg(not(feature = "mistralrs"))]
use crate::engine::backend::BackendError;
use crate::engine::backend::BackendKind;
use crate::engine::memory::memory;
use crate::engine::plan::MemoryPlan;
use crate::models::checkpoint::Checkpoint;
use crate::models::device::{Device, DeviceError};
use crate::models::error::LoadError;
use crate::models::hub::{Hub, WantedFiles};
use crate::models::panics::contained;
use crate::models::{Identity, Model, config};
use crate::ops::pool::Pool;
use crate::proof::codec::to_hex;
use crate::server::registry::{Registry, Served, State};
use anyhow::anyhow;
use futures_util::future::join_all;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// A model whose files are on this machine.
pub struct Located {
    /// What the file says of it.
    pub config: ModelConfig,
    /// Its directory, or its GGUF file.
    pub path: PathBuf,
    /// Its commit on the Hub, or where it lies.
    pub revision: String,
}

impl Located {
    /// Loads the model onto its device, computing as the models file says. `progress` gets the
    /// layers that are loaded, and all.
    ///
    /// # Errors
    /// What is wrong with its files or its device, or that the device cannot compute so.
    pub fn load_model(
        &self,
        pool: &Pool,
        progress: impl Fn(usize, usize),
    ) -> Result<Model, LoadError> {
        let ModelConfig { device, dtype, arithmetic, .. } = self.config;
        Model::load_on(device, &self.path, dtype, pool, progress)?.computing(arithmetic)
    }
}

/// A model with its memory plan.
pub struct Planned {
    /// The model.
    pub located: Located,
    /// What it will need of memory.
    pub plan: MemoryPlan,
}

/// Each model's name and its plan, or why it has none.
pub type Plans = Vec<(String, anyhow::Result<MemoryPlan>)>;

/// Shows how far loading has come.
pub trait Progress: Send + Sync {
    /// Bytes of a file that is being downloaded.
    fn file(&self, file: &str, done: u64, total: u64);
    /// What models will need, before any is loaded, of the bytes that each device has free.
    fn planned(&self, plans: &Plans, free: &[(Device, u64)]);
    /// Layers of a model that are loaded.
    fn layers(&self, model: &str, done: usize, total: usize);
    /// Loading of a model has ended, well or not.
    fn ended(&self, model: &str);
}

/// Finds or downloads a model's files.
///
/// # Errors
/// What is wrong with the files or the Hub, in words.
pub async fn locate(config: ModelConfig, shown: &dyn Progress) -> anyhow::Result<Located> {
    let (path, revision) = match &config.source {
        ModelSource::Path(path) => (path.clone(), path.display().to_string()),
        ModelSource::Hub { repo, revision, file } => {
            let hub = Hub::from_env()?;
            let wanted = file.as_deref().map_or(WantedFiles::Checkpoint, WantedFiles::File);
            let progress = |file: &str, done, total| shown.file(file, done, total);
            let snapshot = hub.fetch(repo, revision, wanted, &progress).await?;
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

/// What each device has left for models.
#[derive(Default)]
pub struct Left(HashMap<Device, Room>);

/// Bytes of a device: what it had free when it was first asked, and what is left of that.
#[derive(Clone, Copy)]
struct Room {
    free: u64,
    left: u64,
}

impl Left {
    /// Bytes of a device: what it has free, less what was [taken](Self::take) since.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn of(&mut self, device: Device) -> Result<u64, DeviceError> {
        let device = device.resolved();
        if let Some(room) = self.0.get(&device) {
            return Ok(room.left);
        }
        let free = device.free_memory()?.unwrap_or_else(|| memory().available);
        self.0.insert(device, Room { free, left: free });
        Ok(free)
    }

    /// The processor and every card that a model asked for, with the bytes that each had free
    /// before any model took some.
    pub fn free(&self) -> Vec<(Device, u64)> {
        let mut free: Vec<(Device, u64)> =
            self.0.iter().map(|(device, room)| (*device, room.free)).collect();
        if !self.0.contains_key(&Device::Cpu) {
            free.push((Device::Cpu, memory().available));
        }
        free.sort();
        free
    }

    /// Gives some of it to a model.
    pub fn take(&mut self, device: Device, bytes: u64) {
        if let Some(room) = self.0.get_mut(&device.resolved()) {
            room.left = room.left.saturating_sub(bytes);
        }
    }
}

/// Plans one model into what its device has left, and takes that; from its headers alone.
///
/// # Errors
/// Why it does not fit or cannot be planned, in words.
pub fn plan(located: &Located, left: &mut Left) -> anyhow::Result<MemoryPlan> {
    let device = located.config.device;
    let plan = plan_within(located, left.of(device)?)?;
    left.take(device, plan.total());
    Ok(plan)
}

/// Plans one model into `available` bytes of its device.
///
/// # Errors
/// As for [`plan`].
pub fn plan_within(located: &Located, available: u64) -> anyhow::Result<MemoryPlan> {
    contained("planning it", || {
        let checkpoint = Checkpoint::open(&located.path)?;
        let spec = config::parse(&checkpoint.config_path, &checkpoint.config)?;
        let ModelConfig { device, wanted, backend, .. } = located.config;
        Ok(MemoryPlan::with(backend, device, &spec, wanted, available)?)
    })?
}

/// Locates, plans and loads the models that `registry` announced; false when none is ready.
pub async fn start_models(
    models: Vec<ModelConfig>,
    registry: Registry,
    pool: Pool,
    clock: Clock,
    shown: Arc<dyn Progress>,
) -> bool {
    let names: Vec<String> = models.iter().map(|m| m.name.clone()).collect();
    let located = join_all(models.into_iter().map(|m| locate(m, &*shown))).await;
    let (mut left, mut rows, mut planned) = (Left::default(), Vec::new(), Vec::new());
    for (name, located) in names.into_iter().zip(located) {
        let plan = located.and_then(|located| {
            let plan = plan(&located, &mut left)?;
            registry.set(&name, Some(located.revision.clone()), State::Loading);
            planned.push(Planned { located, plan });
            Ok(plan)
        });
        if let Err(why) = &plan {
            tracing::error!(model = name, "cannot be served: {why}");
            registry.set(&name, None, State::Failed(why.to_string()));
        }
        rows.push((name, plan));
    }
    shown.planned(&rows, &left.free());
    let kept = |p: &Planned| {
        Some((p.located.config.name.clone(), p.located.config.prefix_cache_file.clone()?))
    };
    let kept: Vec<(String, PathBuf)> = planned.iter().filter_map(kept).collect();
    let models = registry.clone();
    let started = tokio::task::spawn_blocking(move || {
        start_all(planned, &models, &pool, &clock, &*shown) > 0
    });
    let is_any_ready = started.await.unwrap_or(false);
    for (name, file) in kept {
        if let Some(State::Ready(served)) = registry.entry(&name).map(|entry| entry.state) {
            tokio::spawn(prefixes::keep(file, *served));
        }
    }
    is_any_ready
}

/// Loads weights and starts the engine of each planned model, side by side, and records the outcome
/// in the registry. Returns how many are ready.
fn start_all(
    planned: Vec<Planned>,
    registry: &Registry,
    pool: &Pool,
    clock: &Clock,
    shown: &dyn Progress,
) -> usize {
    let outcomes = std::thread::scope(|scope| {
        let threads: Vec<_> = planned
            .iter()
            .map(|p| scope.spawn(|| start_one(p, registry, pool.clone(), clock.clone(), shown)))
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
    shown: &dyn Progress,
) -> bool {
    let name = &planned.located.config.name;
    let started = clock.elapsed();
    let progress = |done: usize, layers: usize| shown.layers(name, done, layers);
    let loaded = contained("loading it", || load_one(planned, pool, clock.clone(), progress));
    let loaded = loaded.unwrap_or_else(|e| Err(e.into()));
    shown.ended(name);
    match loaded {
        Ok(served) => {
            let seconds = (clock.elapsed() - started).as_secs_f64();
            let dtype = served.identity.type_name();
            let weights = to_hex(&served.identity.weights_root);
            let (device, backend) = (served.model.weights.device(), served.engine.info().backend);
            let canon = &served.identity.canon;
            let model = name;
            tracing::info!(model, ?backend, %device, %canon, dtype, weights, seconds, "ready");
            let is_wanted = registry.set(name, None, State::Ready(Box::new(served)));
            if !is_wanted {
                tracing::info!(model, "dropped again: the models file wants it otherwise by now");
            }
            is_wanted
        }
        Err(why) => {
            tracing::error!(model = name, "cannot be served: {why}");
            registry.set(name, None, State::Failed(why.to_string()));
            false
        }
    }
}

fn load_one(
    planned: &Planned,
    pool: Pool,
    clock: Clock,
    progress: impl Fn(usize, usize),
) -> anyhow::Result<Served> {
    match planned.located.config.backend {
        BackendKind::Native => load_native(planned, pool, clock, progress),
        #[cfg(feature = "mistralrs")]
        BackendKind::Mistralrs => {
            let Planned { located, plan } = planned;
            super::mistral::load(&located.config, &located.path, plan.options, &pool, clock)
        }
        #[cfg(not(feature = "mistralrs"))]
        BackendKind::Mistralrs => Err(BackendError::NotBuilt("mistralrs").into()),
    }
}

fn load_native(
    planned: &Planned,
    pool: Pool,
    clock: Clock,
    progress: impl Fn(usize, usize),
) -> anyhow::Result<Served> {
    let Planned { located, plan } = planned;
    let model = Arc::new(located.load_model(&pool, progress)?);
    let identity = Identity::of(&model, &pool)?;
    let kernels = match model.weights.device() {
        Device::Cuda(_) => "cuda".to_owned(),
        _ => pool.isa().to_string(),
    };
    let fingerprint = identity.fingerprint(&kernels);
    let engine = Engine::start(Arc::clone(&model), pool, plan.options, clock)
        .map_err(|e| anyhow!("cannot start the engine: {e}"))?;
    Ok(Served { engine, model, fingerprint, identity: Arc::new(identity) })
}
