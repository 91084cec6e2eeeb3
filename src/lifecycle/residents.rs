//! Prepares the models that a validator verifies with: computes what memory each needs, and loads
//! one when the validator asks for it.

use super::load::{self, Progress};
use super::located::{BOUNDLESS, Located};
use crate::clock::Clock;
use crate::config::models_toml::ModelConfig;
use crate::engine::Engine;
use crate::engine::memory::memory;
use crate::engine::plan::{Bytes, KvMemory, MemoryWanted};
use crate::models::Identity;
use crate::ops::pool::Pool;
use crate::proof::codec::to_hex;
use crate::validator::run::resident::Resident;
use crate::validator::run::residents::{Residents, Sized};
use crate::verify::Verifier;
use crate::verify::evidence::Calibrated;
use crate::verify::file::FileError;
use crate::verify::limits_file::{self, LimitsFile};
use crate::verify::rounding_energy::default_limits;
use crate::verify::scrutiny::WantedScrutiny;
use anyhow::{Context, anyhow};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

/// A limits file for a model that was not loaded.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: `model` is {model}, which no model here has: {}", path.display(), known.join(", "))]
pub struct UnusedLimits {
    /// The limits file that applies to nothing.
    pub path: PathBuf,
    /// Hash of the model that it names, in hexadecimal.
    pub model: String,
    /// Hashes of the models that were loaded.
    pub known: Vec<String>,
}

/// Limits files, and the models that had one or might have.
pub struct LimitsFiles {
    files: Vec<(PathBuf, LimitsFile)>,
    loaded: Mutex<BTreeSet<String>>,
}

impl LimitsFiles {
    /// Reads all of them.
    ///
    /// # Errors
    /// The first file that is wrong, with key, rule and fact.
    pub fn read(paths: &[PathBuf]) -> Result<Self, FileError> {
        let read = |path: &PathBuf| limits_file::read(path).map(|file| (path.clone(), file));
        let files = paths.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        for (place, (path, file)) in files.iter().enumerate() {
            let is_same = |(_, other): &&(PathBuf, LimitsFile)| other.model == file.model;
            if let Some((first, _)) = files[..place].iter().find(is_same) {
                let what =
                    format!("is for the same model as {}: give one of them", first.display());
                return Err(FileError::new(path, what));
            }
        }
        Ok(Self { files, loaded: Mutex::default() })
    }

    /// The file of the model with this hash, which counts as loaded from now on.
    fn of(&self, hash: String) -> Option<&LimitsFile> {
        let own = self.files.iter().find(|(_, file)| file.model == hash).map(|(_, file)| file);
        self.loaded.lock().insert(hash);
        own
    }

    /// Checks that each file is for one of the models that were loaded, which must be all.
    ///
    /// # Errors
    /// The first file that is not.
    pub fn check_used(&self) -> Result<(), UnusedLimits> {
        let loaded = self.loaded.lock();
        let unused = self.files.iter().find(|(_, file)| !loaded.contains(&file.model));
        let Some((path, LimitsFile { model, .. })) = unused else { return Ok(()) };
        let (path, model) = (path.clone(), model.clone());
        Err(UnusedLimits { path, model, known: loaded.iter().cloned().collect() })
    }
}

/// More memory is wanted than there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: only {} are available", Bytes(*wanted), Bytes(*available))]
pub struct BudgetError {
    /// Bytes that are wanted.
    pub wanted: u64,
    /// Bytes that there are.
    pub available: u64,
}

/// Bytes that models may have of the memory that is available now.
///
/// # Errors
/// When more is wanted than there is.
pub fn budget(wanted: KvMemory) -> Result<u64, BudgetError> {
    part(wanted, memory().available)
}

fn part(wanted: KvMemory, available: u64) -> Result<u64, BudgetError> {
    match wanted {
        KvMemory::Auto => Ok(available),
        KvMemory::Share(share) => Ok((available as f64 * share) as u64),
        KvMemory::Bytes(wanted) if wanted > available => Err(BudgetError { wanted, available }),
        KvMemory::Bytes(bytes) => Ok(bytes),
    }
}

/// What models are prepared for.
pub struct Needs {
    /// Answers that are verified at once; each has a KV cache of its own.
    pub checks: usize,
    /// Tokens of the longest sequence that is verified, where that is known beforehand.
    pub tokens: Option<usize>,
    /// Bytes that all models may have together.
    pub budget: u64,
}

impl Needs {
    /// Contexts of a model: one writes prompts, the others are those of verifications.
    fn slots(&self) -> usize {
        self.checks + 1
    }
}

/// What a resident checks answers with.
pub struct ResidentRules {
    /// Limits of models that have a file; others have the default.
    pub limits: Arc<LimitsFiles>,
    /// Whether hidden rows must be equal bit for bit, whatever a file says.
    pub exact: bool,
    /// How closely suspicious answers are looked at.
    pub scrutiny: WantedScrutiny,
}

/// A model that does not fit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "needs {} with {slots} contexts of {context} tokens, but only {} may be taken: {} short; \
     lower `context_max`, --tokens-max or --checks",
    Bytes(*needed), Bytes(*budget), Bytes(needed - budget)
)]
pub struct TooLarge {
    /// Bytes that it needs.
    pub needed: u64,
    /// Bytes that it may have.
    pub budget: u64,
    /// Contexts that are planned at once.
    pub slots: usize,
    /// Tokens of each.
    pub context: usize,
}

/// No model of the file can be verified with: each with its reason.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct NoModel(pub Vec<String>);

/// Finds all models and plans each into the budget; loads none. The log names those that cannot be
/// verified with.
///
/// # Errors
/// When that leaves none.
pub async fn residents(
    models: Vec<ModelConfig>,
    needs: Needs,
    (pool, rules): (Pool, ResidentRules),
    shown: &dyn Progress,
) -> Result<Residents, NoModel> {
    let (mut all, mut found, mut refused) = (Vec::new(), BTreeMap::new(), Vec::new());
    for config in models {
        let name = config.name.clone();
        match plan(config, &needs, shown).await {
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
        return Err(NoModel(refused));
    }
    let loader = Loader { found, pool, rules, slots: needs.slots() };
    let residents =
        Residents::new(all, needs.budget, Arc::new(move |name: &str| loader.load(name)));
    if !residents.is_roomy() {
        let budget = Bytes(needs.budget);
        tracing::info!("{budget} do not hold all models: each has its turn, epoch by epoch");
    }
    Ok(residents)
}

/// Where a model lies and the bytes that it needs for all contexts at once, each as long as the
/// model's and the rounds may make one.
async fn plan(
    mut config: ModelConfig,
    needs: &Needs,
    shown: &dyn Progress,
) -> anyhow::Result<(Located, u64)> {
    let (slots, budget) = (needs.slots(), needs.budget);
    config.wanted = wanted(config.wanted, slots);
    let mut located = load::locate(config, shown).await?;
    let mut plan = located.plan_within(BOUNDLESS)?;
    if let Some(tokens) = needs.tokens.filter(|tokens| *tokens < plan.options.context_max) {
        located.config.wanted.context_max = Some(tokens);
        plan = located.plan_within(BOUNDLESS)?;
    }
    let (needed, context) = (plan.total(), plan.options.context_max);
    if needed > budget {
        return Err(TooLarge { needed, budget, slots, context }.into());
    }
    Ok((located, needed))
}

fn wanted(wanted: MemoryWanted, slots: usize) -> MemoryWanted {
    MemoryWanted { kv_memory: KvMemory::Auto, sequences_max: slots, drafts_max: 0, ..wanted }
}

/// Loads models that were planned.
struct Loader {
    found: BTreeMap<String, Located>,
    pool: Pool,
    rules: ResidentRules,
    slots: usize,
}

impl Loader {
    fn load(&self, name: &str) -> anyhow::Result<Resident> {
        let located = self.found.get(name).context("the models file does not have it")?;
        let whole = located.plan_within(BOUNDLESS)?.options;
        let model = Arc::new(located.load_model(&self.pool, |_, _| {})?);
        let ResidentRules { limits, exact, scrutiny } = &self.rules;
        let scrutiny = scrutiny.on(&model)?;
        let identity = Identity::of(&model, &self.pool)?;
        let own = limits.of(to_hex(&identity.portable_hash()));
        let default = || default_limits(&model, &identity, &self.pool);
        let mut limits = own.map_or_else(default, |file| Ok(file.limits))?;
        limits.exact |= exact;
        let rates = own.map_or_else(Calibrated::default, |file| file.rates);
        // One context writes prompts; the others are those of verifications.
        let mut options = whole;
        options.blocks = whole.blocks / self.slots;
        options.sequences_max = 1;
        let pool = self.pool.separate();
        let engine = Engine::start(Arc::clone(&model), pool.clone(), options, Clock::system());
        let engine = engine.map_err(|e| anyhow!("cannot start the engine: {e}"))?;
        let verifier = Verifier::new(model, Arc::new(identity), pool, whole.context_max)
            .with_limits(limits)
            .with_scrutiny(scrutiny);
        Ok(Resident { verifier, rates, engine: Some(engine) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proof::Scheme;
    use crate::verify::calibrate::{HonestSample, limits_file, split};
    use crate::verify::{Report, Verdict};

    fn write_limits(path: &std::path::Path, model: u8) {
        let report = || Report::bare(Verdict::Pass);
        let samples = (0..4).map(|id| HonestSample::new(&[id], Scheme::Residue, report()));
        let halves = split(samples.collect(), 0.5).unwrap();
        crate::verify::limits_file::write(path, &limits_file(&[model; 32], "test", &halves))
            .unwrap();
    }

    #[test]
    fn two_limits_files_for_one_model_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["one.json", "two.json"].map(|name| dir.path().join(name));
        paths.iter().for_each(|path| write_limits(path, 1));
        let error = LimitsFiles::read(&paths).err().unwrap();
        assert_eq!(error.path, paths[1]);
        assert!(
            error.what.contains("is for the same model as ") && error.what.contains("one.json")
        );
        write_limits(&paths[1], 2);
        assert!(LimitsFiles::read(&paths).is_ok());
    }

    #[test]
    fn a_limits_file_that_no_loaded_model_needs_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["one.json", "two.json"].map(|name| dir.path().join(name));
        write_limits(&paths[0], 1);
        write_limits(&paths[1], 2);
        let files = LimitsFiles::read(&paths).unwrap();
        assert!(files.of(to_hex(&[1; 32])).is_some_and(|file| file.model == to_hex(&[1; 32])));
        assert!(files.of(to_hex(&[3; 32])).is_none());
        let error = files.check_used().unwrap_err().to_string();
        let (two, one, three) = (to_hex(&[2; 32]), to_hex(&[1; 32]), to_hex(&[3; 32]));
        let place = paths[1].display();
        let what = format!("{place}: `model` is {two}, which no model here has: {one}, {three}");
        assert_eq!(error, what);
        files.of(two);
        assert_eq!(files.check_used(), Ok(()));
        let absent = LimitsFiles::read(&[dir.path().join("absent")]).err().unwrap().to_string();
        assert!(absent.contains("absent: cannot be read"), "{absent}");
    }

    #[test]
    fn a_budget_is_all_a_share_or_so_many_bytes_of_what_there_is() {
        const GIB: u64 = 1 << 30;
        assert_eq!(part(KvMemory::Auto, 8 * GIB), Ok(8 * GIB));
        assert_eq!(part(KvMemory::Share(0.25), 8 * GIB), Ok(2 * GIB));
        assert_eq!(part(KvMemory::Bytes(8 * GIB), 8 * GIB), Ok(8 * GIB));
        let error = part(KvMemory::Bytes(9 * GIB), 8 * GIB).unwrap_err();
        assert_eq!(error.to_string(), "9.00 GiB: only 8.00 GiB are available");
    }
}
