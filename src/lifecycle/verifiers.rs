//! Loads models to verify with, each once, when it is first needed.

use super::accounts::MemoryAccounts;
use super::load::{self, Progress};
use crate::clock::Clock;
use crate::config::models_toml::{Config, ModelConfig};
use crate::models::Identity;
use crate::ops::pool::Pool;
use crate::verify::capture::Capture;
use crate::verify::question::{Question, QuestionError};
use crate::verify::rounding_energy::default_limits;
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
        /// The models file that was searched.
        file: PathBuf,
        /// The name that the request has.
        model: String,
    },
    /// A request without a name could mean any of several models.
    #[error("`request` must name its `model`: {} has several", file.display())]
    Unnamed {
        /// The models file that has several entries.
        file: PathBuf,
    },
    /// The model of that entry does not load.
    #[error("{model} cannot be loaded: {why}")]
    Load {
        /// Name of the model's entry in the models file.
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
            Self::Unnamed { .. } | Self::Load { .. } => None,
        }
    }

    /// Whether it says something of the one request alone: others may have a verifier.
    pub fn is_of_request(&self) -> bool {
        match self {
            Self::NotListed { .. } | Self::Unnamed { .. } => true,
            Self::Load { .. } => false,
        }
    }
}

/// What verifiers check answers with.
#[derive(Clone, Copy, Debug)]
pub struct VerifierRules {
    /// The limits between honest and not; by default each model's own.
    pub limits: Option<Limits>,
    /// Whether rows must be equal bit for bit, whatever the limits say.
    pub exact: bool,
    /// How closely suspicious answers are looked at.
    pub scrutiny: WantedScrutiny,
}

impl VerifierRules {
    /// The default limits, and one prefill for each answer.
    pub fn plain() -> Self {
        Self { limits: None, exact: false, scrutiny: WantedScrutiny::NOTHING }
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
        let file = || self.file.clone();
        match (asked, self.models.as_slice()) {
            (Some(name), models) => models
                .iter()
                .find(|m| m.name == name)
                .ok_or_else(|| VerifierError::NotListed { file: file(), model: name.to_owned() }),
            (None, [only]) => Ok(only),
            (None, _) => Err(VerifierError::Unnamed { file: file() }),
        }
    }

    /// What a capture asked; where it names no model, only the first one here can be meant.
    ///
    /// # Errors
    /// The request cannot be read. The peer did not cause that.
    pub async fn question(
        &self,
        verifier: &Verifier,
        capture: &Capture,
    ) -> Result<Question, QuestionError> {
        let now_ms = Clock::system().unix_ms();
        let only = self.models.first().map_or("", |model| model.name.as_str());
        capture.question(verifier, only, now_ms).await
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
    VerifierRules { limits, exact, scrutiny }: VerifierRules,
    shown: &dyn Progress,
) -> anyhow::Result<Verifier> {
    let located = load::locate(config, shown).await?;
    let plan = MemoryAccounts::default().plan(&located)?.0;
    let model = located.load_model(pool, |_, _| {})?;
    let scrutiny = scrutiny.on(&model)?;
    let identity = Identity::of(&model, pool)?;
    let mut limits = limits.map_or_else(|| default_limits(&model, &identity, pool), Ok)?;
    limits.exact |= exact;
    Ok(Verifier::new(
        Arc::new(model),
        Arc::new(identity),
        pool.separate(),
        plan.options.context_max,
    )
    .with_limits(limits)
    .with_scrutiny(scrutiny))
}

#[cfg(test)]
mod tests {
    use super::super::load::Plans;
    use super::*;
    use crate::config::models_toml;
    use crate::models::device::Device;
    use crate::ops::lanes::Isa;
    use serde_json::json;

    struct Quiet;

    impl Progress for Quiet {
        fn file(&self, _: &str, _: u64, _: u64) {}
        fn planned(&self, _: &Plans, _: &[(Device, u64)]) {}
        fn layers(&self, _: &str, _: usize, _: usize) {}
        fn ended(&self, _: &str) {}
    }

    async fn refused(names: &[&str], request: serde_json::Value) -> VerifierError {
        let entry = |name: &&str| format!("[[model]]\nname = \"{name}\"\npath = \"nowhere\"\n");
        let (file, text) = (Path::new("m.toml"), names.iter().map(entry).collect::<String>());
        let config = models_toml::parse(file, &text, &[]).unwrap();
        let pool = Pool::new(1, Isa::best()).unwrap();
        let rules = VerifierRules::plain();
        let mut verifiers = Verifiers::new((file, config), pool, rules, Arc::new(Quiet));
        let capture = Capture::of_response(request, json!({}));
        verifiers.of(&capture).await.err().unwrap()
    }

    #[tokio::test]
    async fn a_model_that_is_not_listed_or_does_not_load_is_named() {
        let add = Some("add a [[model]] entry of that name");
        let other = refused(&["a"], json!({"model": "b"})).await;
        assert_eq!(other.to_string(), "m.toml has no model `b`");
        assert!(other.hint() == add && other.is_of_request());
        // Without a name only a single model can be meant.
        let several = refused(&["a", "b"], json!({})).await;
        assert_eq!(several.to_string(), "`request` must name its `model`: m.toml has several");
        assert!(several.is_of_request());
        for request in [json!({"model": "a"}), json!({})] {
            let fault = refused(&["a"], request).await;
            let error = fault.to_string();
            assert!(error.starts_with("a cannot be loaded: "), "{error}");
            assert!(error.contains("nowhere") && fault.hint().is_none(), "{error}");
            assert!(!fault.is_of_request());
        }
    }
}
