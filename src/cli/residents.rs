//! Prepares the models of `validate`: computes what memory each needs, and loads one when the
//! validator asks for it.

use super::Failure;
use super::progress::Bars;
use super::validate_args::ValidateArgs;
use crate::clock::Clock;
use crate::config::models_toml::ModelConfig;
use crate::config::units;
use crate::engine::Engine;
use crate::engine::memory::memory;
use crate::engine::plan::{Bytes, KvMemory, MemoryWanted};
use crate::lifecycle::load::{self, Located};
use crate::models::Identity;
use crate::ops::pool::Pool;
use crate::proof::codec::to_hex;
use crate::validator::run::resident::Resident;
use crate::validator::run::residents::{Residents, Sized};
use crate::verify::evidence::Calibrated;
use crate::verify::limits_file::{self, LimitsFile};
use crate::verify::scrutiny::WantedScrutiny;
use crate::verify::{Limits, Verifier};
use anyhow::{Context, anyhow, bail};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::runtime::Runtime;

/// What a plan is made for before it is compared with the memory there is.
const BOUNDLESS: u64 = 1 << 60;

/// Limits files, and the models that had one or might have.
pub(super) struct LimitsFiles {
    files: Vec<(PathBuf, LimitsFile)>,
    loaded: Mutex<BTreeSet<String>>,
}

impl LimitsFiles {
    pub(super) fn read(paths: &[PathBuf]) -> Result<Self, Failure> {
        let read = |path: &PathBuf| limits_file::read(path).map(|file| (path.clone(), file));
        let files = paths.iter().map(read).collect::<Result<Vec<_>, _>>();
        Ok(Self { files: files.map_err(Failure::user)?, loaded: Mutex::default() })
    }

    fn of(&self, hash: String) -> Option<&LimitsFile> {
        let own = self.files.iter().find(|(_, file)| file.model == hash).map(|(_, file)| file);
        self.loaded.lock().insert(hash);
        own
    }

    /// Refuses a file for a model that is none of those that were loaded, which must be all.
    pub(super) fn check_used(&self) -> Result<(), Failure> {
        let loaded = self.loaded.lock();
        let unused = self.files.iter().find(|(_, file)| !loaded.contains(&file.model));
        let Some((path, LimitsFile { model, .. })) = unused else { return Ok(()) };
        let known = Vec::from_iter(loaded.iter().cloned()).join(", ");
        let what = format!("{}: `model` is {model}, which no model here has", path.display());
        Err(Failure::user(format!("--limits {what}: {known}")))
    }
}

/// Finds all models of the models file and plans them into `budget` bytes; loads none.
pub(super) fn residents(
    args: &ValidateArgs,
    runtime: &Runtime,
    (limits, budget): (&Arc<LimitsFiles>, u64),
) -> Result<Residents, Failure> {
    let slots = usize::from(args.verifying.checks) + 1;
    let asked = (slots, args.tokens_needed());
    let (mut all, mut found) = (Vec::new(), BTreeMap::new());
    let mut refused = Vec::new();
    for config in args.models.read(&[])?.models {
        let name = config.name.clone();
        match runtime.block_on(plan(config, asked, budget)) {
            Ok((located, bytes)) => {
                tracing::info!(model = name, needs = %Bytes(bytes), "planned");
                all.push(Sized { name: name.clone(), bytes });
                found.insert(name, located);
            }
            Err(why) => {
                tracing::error!(model = name, "cannot be verified: {why}");
                refused.push(format!("{name} cannot be verified: {why}"));
            }
        }
    }
    if all.is_empty() {
        return Err(Failure::user(refused.join("; ")));
    }
    let loader = Loader {
        found,
        pool: args.compute.pool()?,
        limits: Arc::clone(limits),
        exact: args.verifying.exact,
        asked: args.verifying.scrutiny.asked(),
        slots,
    };
    let residents = Residents::new(all, budget, Arc::new(move |name: &str| loader.load(name)));
    if !residents.is_roomy() {
        let budget = Bytes(budget);
        tracing::info!("{budget} do not hold all models: each has its turn, epoch by epoch");
    }
    Ok(residents)
}

/// Bytes that models may have.
///
/// # Errors
/// When more is asked for than there is, or it is no size.
pub(super) fn budget(asked: Option<&str>) -> Result<u64, Failure> {
    let available = memory().available;
    let wanted = asked.map_or(Ok(KvMemory::Auto), units::kv_memory);
    match wanted.map_err(|what| Failure::user(format!("--verify-memory {what}")))? {
        KvMemory::Auto => Ok(available),
        KvMemory::Share(share) => Ok((available as f64 * share) as u64),
        KvMemory::Bytes(bytes) if bytes > available => {
            let (bytes, available) = (Bytes(bytes), Bytes(available));
            Err(Failure::user(format!("--verify-memory {bytes}: only {available} are available")))
        }
        KvMemory::Bytes(bytes) => Ok(bytes),
    }
}

/// What a model needs for `slots` sequences at once, each as long as its context and the rounds
/// (`needed`, in tokens) may make one.
async fn plan(
    mut config: ModelConfig,
    (slots, needed): (usize, Option<usize>),
    budget: u64,
) -> anyhow::Result<(Located, u64)> {
    config.wanted = wanted(config.wanted, slots);
    let mut located = load::locate(config, &Bars::new()).await?;
    let mut plan = load::plan_within(&located, BOUNDLESS)?;
    if let Some(needed) = needed.filter(|needed| *needed < plan.options.context_max) {
        located.config.wanted.context_max = Some(needed);
        plan = load::plan_within(&located, BOUNDLESS)?;
    }
    let (bytes, context) = (plan.total(), plan.options.context_max);
    if bytes > budget {
        let short = Bytes(bytes - budget);
        bail!(
            "needs {} with {slots} contexts of {context} tokens, but only {} may be taken: {short} \
             short; lower `context_max`, --tokens-max or --checks",
            Bytes(bytes),
            Bytes(budget)
        );
    }
    Ok((located, bytes))
}

fn wanted(wanted: MemoryWanted, slots: usize) -> MemoryWanted {
    MemoryWanted { kv_memory: KvMemory::Auto, sequences_max: slots, drafts_max: 0, ..wanted }
}

struct Loader {
    found: BTreeMap<String, Located>,
    pool: Pool,
    limits: Arc<LimitsFiles>,
    exact: bool,
    asked: WantedScrutiny,
    slots: usize,
}

impl Loader {
    fn load(&self, name: &str) -> anyhow::Result<Resident> {
        let located = self.found.get(name).context("the models file does not have it")?;
        let whole = load::plan_within(located, BOUNDLESS)?.options;
        let model = Arc::new(located.load_model(&self.pool, |_, _| {})?);
        let scrutiny = self.asked.on(&model)?;
        let identity = Identity::of(&model, &self.pool)?;
        let own = self.limits.of(to_hex(&identity.portable_hash()));
        let mut limits = own.map_or_else(Limits::default, |file| file.limits);
        limits.exact |= self.exact;
        let rates = own.map_or_else(Calibrated::default, |file| file.rates);
        // One context writes prompts; the others are those of verifications.
        let mut options = whole;
        options.blocks = whole.blocks / self.slots;
        options.sequences_max = 1;
        let pool = self.pool.separate();
        let engine = Engine::start(Arc::clone(&model), pool.clone(), options, Clock::system());
        let engine = engine.map_err(|e| anyhow!("cannot start the engine: {e}"))?;
        let verifier = Verifier {
            model,
            identity: Arc::new(identity),
            pool,
            limits,
            scrutiny,
            context_max: whole.context_max,
        };
        Ok(Resident { verifier, rates, engine: Some(engine) })
    }
}
