//! Loads models to verify with, each once, when it is first needed.

use super::load::{self, Progress};
use super::rooms::Rooms;
use crate::config::models_toml::{Config, ModelConfig};
use crate::models::Identity;
use crate::ops::pool::Pool;
use crate::verify::capture::{Capture, CheckOptions, CheckedChoice, check_capture};
use crate::verify::question::QuestionError;
use crate::verify::scrutiny::WantedScrutiny;
use crate::verify::{Limits, Verifier};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why there is no verifier.
#[derive(Debug, thiserror::Error)]
pub enum VerifierError {
    /// The models file has no entry for what was asked.
    #[error("{} has no model `{model}`", file.display())]
    NotListed {
        /// The models file.
        file: PathBuf,
        /// The name, empty where the request has none and the file has several models.
        model: String,
    },
    /// The model of that entry does not load.
    #[error("{model} cannot be loaded: {why}")]
    Load {
        /// Its name.
        model: String,
        /// What is wrong with its files, its memory plan or its device.
        why: anyhow::Error,
    },
}

impl VerifierError {
    /// What mends it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotListed { .. } => Some("add a [[model]] entry of that name"),
            Self::Load { .. } => None,
        }
    }
}

/// By what verifiers judge.
#[derive(Clone, Copy, Debug)]
pub struct VerifierRules {
    /// The limits between honest and not.
    pub limits: Limits,
    /// How closely suspicious answers are looked at.
    pub scrutiny: WantedScrutiny,
}

impl VerifierRules {
    /// The default limits, and one prefill for each answer.
    pub fn plain() -> Self {
        Self { limits: Limits::default(), scrutiny: WantedScrutiny::NOTHING }
    }
}

/// The verifiers of a models file.
pub struct Verifiers {
    file: PathBuf,
    models: Vec<ModelConfig>,
    pool: Pool,
    rules: VerifierRules,
    shown: Arc<dyn Progress>,
    loaded: HashMap<String, Verifier>,
}

impl Verifiers {
    /// Of the models in `config`, which was read from `file`; loads none yet.
    pub fn new(
        (file, config): (&Path, Config),
        pool: Pool,
        rules: VerifierRules,
        shown: Arc<dyn Progress>,
    ) -> Self {
        let (file, models) = (file.to_owned(), config.models);
        Self { file, models, pool, rules, shown, loaded: HashMap::new() }
    }

    /// The verifier of the model that was asked. A request that names none means the only one.
    /// Loading blocks the thread.
    ///
    /// # Errors
    /// When the file does not have the model, or it does not load.
    pub async fn of(&mut self, capture: &Capture) -> Result<Verifier, VerifierError> {
        let config = self.entry(capture.model())?.clone();
        let name = config.name.clone();
        if let Some(verifier) = self.loaded.get(&name) {
            return Ok(verifier.clone());
        }
        let verifier = load_verifier(config, &self.pool, self.rules, &*self.shown).await?;
        self.loaded.insert(name, verifier.clone());
        Ok(verifier)
    }

    fn entry(&self, asked: Option<&str>) -> Result<&ModelConfig, VerifierError> {
        let entry = match (asked, self.models.as_slice()) {
            (Some(name), models) => models.iter().find(|m| m.name == name),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        entry.ok_or_else(|| VerifierError::NotListed {
            file: self.file.clone(),
            model: asked.unwrap_or_default().to_owned(),
        })
    }

    /// Checks every choice of a capture, which blocks the thread.
    ///
    /// # Errors
    /// The request cannot be read, which is no fault of the peer.
    pub async fn check(
        &self,
        verifier: &Verifier,
        capture: &Capture,
        options: CheckOptions,
    ) -> Result<Vec<CheckedChoice>, QuestionError> {
        let only = self.models.first().map_or("", |model| model.name.as_str());
        check_capture(verifier, capture.model().unwrap_or(only), capture, options).await
    }
}

/// Loads a model to verify with, into the memory that is free now. Loading blocks the thread.
///
/// # Errors
/// Which model, and what is wrong with its files, its memory plan or its device.
pub async fn load_verifier(
    config: ModelConfig,
    pool: &Pool,
    rules: VerifierRules,
    shown: &dyn Progress,
) -> Result<Verifier, VerifierError> {
    let model = config.name.clone();
    let loaded = load_one(config, pool, rules, shown).await;
    loaded.map_err(|why| VerifierError::Load { model, why })
}

async fn load_one(
    config: ModelConfig,
    pool: &Pool,
    VerifierRules { limits, scrutiny }: VerifierRules,
    shown: &dyn Progress,
) -> anyhow::Result<Verifier> {
    let located = load::locate(config, shown).await?;
    let plan = Rooms::default().plan(&located)?.0;
    let model = located.load_model(pool, |_, _| {})?;
    let scrutiny = scrutiny.on(&model)?;
    let identity = Identity::of(&model, pool)?;
    Ok(Verifier {
        model: Arc::new(model),
        identity: Arc::new(identity),
        pool: pool.separate(),
        limits,
        scrutiny,
        context_max: plan.options.context_max,
    })
}
