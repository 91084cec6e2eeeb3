//! Takes models.toml to running engines: files, memory plan and weights, each step with progress.

use super::accounts::{Lease, MemoryAccounts};
use super::located::{BOUNDLESS, Located, shape_within};
use super::prefixes;
use crate::clock::Clock;
use crate::config::models_toml::{ModelConfig, ModelSource};
use crate::engine::Engine;
#[cfg(not(feature = "mistralrs"))]
use crate::engine::backend::BackendError;
use crate::engine::backend::BackendKind;
use crate::engine::plan::{MemoryPlan, Part};
use crate::models::Identity;
use crate::models::config::parse;
use crate::models::device::{Device, names};
use crate::models::error::read_json;
use crate::models::hub::{Hub, HubError, WantedFiles};
use crate::models::panics::contained;
use crate::models::spec::Spec;
use crate::ops::pool::Pool;
use crate::proof::codec::to_hex;
use crate::server::registry::{ModelState, Registry, Served};
use anyhow::anyhow;
use futures_util::future::join_all;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long a model waits for the memory of models that are no longer wanted.
const LEAVING_MAX: Duration = Duration::from_secs(600);
/// How often it looks whether they are gone.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A model with its memory plan.
struct Planned {
    located: Located,
    plan: MemoryPlan,
    lease: Lease,
}

/// What loading models needs.
#[derive(Clone)]
pub struct Loading {
    /// Has announced the models.
    pub registry: Registry,
    /// The threads that compute, shared by all models.
    pub pool: Pool,
    /// The clock that loading is timed by.
    pub clock: Clock,
    /// Where memory is accounted for.
    pub memory: MemoryAccounts,
    /// Shows how loading goes.
    pub shown: Arc<dyn Progress>,
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

/// The shape of a model, for which no weights are downloaded: from its files where they are here,
/// else from the `config.json` on the Hub.
///
/// # Errors
/// What is wrong with the files or the Hub, or that a GGUF file, whose header has the shape, is
/// not here yet.
pub async fn shape(config: &ModelConfig, shown: &dyn Progress) -> anyhow::Result<Spec> {
    let here = |path| Located { config: config.clone(), path, revision: String::new() }.spec();
    let (repo, revision, file) = match &config.source {
        ModelSource::Path(path) => return here(path.clone()),
        ModelSource::Hub { repo, revision, file } => (repo, revision, file),
    };
    let hub = Hub::from_env()?;
    let Some(file) = file else {
        let progress = |file: &str, done, total| shown.file(file, done, total);
        let snapshot = hub.fetch(repo, revision, WantedFiles::Configuration, &progress).await?;
        let path = snapshot.directory.join("config.json");
        return contained("planning it", || Ok(parse(&path, &read_json(&path)?)?))?;
    };
    match hub.kept(repo, revision, WantedFiles::File(file)) {
        Ok(snapshot) => here(snapshot.directory.join(file)),
        Err(_) => Err(anyhow!(
            "its shape is in the header of {file}, which is not here yet, and a plan downloads no \
             weights: targon-engine fetch {repo} --revision {revision} --file {file}"
        )),
    }
}

/// Locates, plans and loads the models that the registry announced; false when none is ready.
pub async fn start_models(models: Vec<ModelConfig>, loading: Loading) -> bool {
    let Loading { registry, shown, memory, .. } = &loading;
    let names: Vec<String> = models.iter().map(|m| m.name.clone()).collect();
    let located = join_all(models.into_iter().map(|m| locate(m, &**shown))).await;
    let (mut rows, mut planned) = (Vec::new(), Vec::new());
    for (name, located) in names.into_iter().zip(located) {
        let plan = match located {
            Ok(located) => loading.plan(located).await,
            Err(why) => Err(why),
        };
        rows.push(match plan {
            Ok(ready) => {
                registry.set(&name, Some(ready.located.revision.clone()), ModelState::Loading);
                let plan = ready.plan;
                planned.push(ready);
                (name, Ok(plan))
            }
            Err(why) => {
                tracing::error!(model = name, "cannot be served: {why}");
                match why.downcast_ref::<HubError>() {
                    Some(e) if e.may_pass() => registry.fail_for_now(&name, why.to_string()),
                    _ => drop(registry.set(&name, None, ModelState::Failed(why.to_string()))),
                }
                (name, Err(why))
            }
        });
    }
    shown.planned(&rows, &memory.free());
    let kept = |p: &Planned| {
        Some((p.located.config.name.clone(), p.located.config.prefix_cache_file.clone()?))
    };
    let kept: Vec<(String, PathBuf)> = planned.iter().filter_map(kept).collect();
    let all = loading.clone();
    let started = tokio::task::spawn_blocking(move || all.start_all(planned) > 0);
    let is_any_ready = started.await.unwrap_or(false);
    for (name, file) in kept {
        if let Some(ModelState::Ready(served)) = registry.entry(&name).map(|entry| entry.state) {
            tokio::spawn(prefixes::keep(file, *served));
        }
    }
    is_any_ready
}

impl Loading {
    /// Plans a model. Where memory that it wants belongs to models that are leaving, it waits for
    /// them, for a limited time; then it takes what there is.
    async fn plan(&self, located: Located) -> anyhow::Result<Planned> {
        let spec = located.spec()?;
        let wanted = shape_within(&located.config, &spec, |_| BOUNDLESS)?.0.total();
        let (name, devices) = (located.config.name.clone(), located.config.devices.clone());
        let (started, mut is_told) = (self.clock.elapsed(), false);
        loop {
            // Asked first: what leaves after this question is seen by the plan.
            let leaving = self.memory.leaving(&devices);
            let planned = self.memory.plan_shape(&located.config, &spec);
            let is_whole = planned.as_ref().is_ok_and(|(plan, _)| plan.total() >= wanted);
            if is_whole || leaving.is_empty() || self.clock.elapsed() - started > LEAVING_MAX {
                let (plan, lease) = planned?;
                return Ok(Planned { located, plan, lease });
            }
            if !std::mem::replace(&mut is_told, true) {
                let leaving = leaving.join(", ");
                tracing::info!(model = name, "waits for the memory of {leaving}");
            }
            drop(planned);
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Loads weights and starts the engine of each planned model, side by side, and records the
    /// outcome in the registry. Returns how many are ready.
    fn start_all(&self, planned: Vec<Planned>) -> usize {
        let outcomes = std::thread::scope(|scope| {
            let start = |planned: Planned| scope.spawn(move || self.start_one(planned));
            let threads: Vec<_> = planned.into_iter().map(start).collect();
            threads.into_iter().map(|t| t.join().unwrap_or(false)).collect::<Vec<_>>()
        });
        outcomes.into_iter().filter(|is_ready| *is_ready).count()
    }

    fn start_one(&self, planned: Planned) -> bool {
        let Self { registry, clock, shown, .. } = self;
        let Planned { located, plan, lease } = planned;
        let name = &located.config.name;
        let started = clock.elapsed();
        let loaded = contained("loading it", || self.load_one(&located, &plan, lease.parts()));
        let loaded = loaded.unwrap_or_else(|e| Err(e.into()));
        shown.ended(name);
        match loaded {
            Ok(served) => {
                let seconds = (clock.elapsed() - started).as_secs_f64();
                let dtype = served.identity.type_name();
                let weights = to_hex(&served.identity.weights_root);
                let (device, backend) = (names(lease.devices()), served.engine.info().backend);
                let canon = &served.identity.canon;
                let model = name;
                tracing::info!(
                    model, ?backend, %device, %canon, dtype, weights, seconds, "ready"
                );
                lease.hand_over(&served.model);
                let is_wanted = registry.set(name, None, ModelState::Ready(Box::new(served)));
                if !is_wanted {
                    let what = "dropped again: the models file wants it otherwise by now";
                    tracing::info!(model, "{what}");
                }
                is_wanted
            }
            Err(why) => {
                tracing::error!(model = name, "cannot be served: {why}");
                registry.set(name, None, ModelState::Failed(why.to_string()));
                false
            }
        }
    }

    #[cfg_attr(not(feature = "mistralrs"), allow(unused_variables, reason = "one device"))]
    fn load_one(
        &self,
        located: &Located,
        plan: &MemoryPlan,
        parts: &[Part],
    ) -> anyhow::Result<Served> {
        let (pool, clock) = (self.pool.clone(), self.clock.clone());
        match located.config.backend {
            BackendKind::Native => {
                let name = &located.config.name;
                let progress = |done: usize, layers: usize| self.shown.layers(name, done, layers);
                load_native(located, plan, (pool, clock), progress)
            }
            #[cfg(feature = "mistralrs")]
            BackendKind::Mistralrs => super::mistral::load(located, (plan, parts), &pool, clock),
            #[cfg(not(feature = "mistralrs"))]
            BackendKind::Mistralrs => Err(BackendError::NotBuilt("mistralrs").into()),
        }
    }
}

fn load_native(
    located: &Located,
    plan: &MemoryPlan,
    (pool, clock): (Pool, Clock),
    progress: impl Fn(usize, usize),
) -> anyhow::Result<Served> {
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
