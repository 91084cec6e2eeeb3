//! Starts a model on mistral.rs: this program describes it, derives its checkpoint once, and loads
//! that.

use crate::clock::Clock;
use crate::config::models_toml::ModelConfig;
use crate::engine::Options;
use crate::engine::mistral::{self, LoadedMistral, MistralSettings, VERSION};
use crate::models::remembered::cache_dir;
use crate::models::{Identity, Model, tapped};
use crate::ops::pool::Pool;
use crate::server::registry::Served;
use anyhow::anyhow;
use std::path::Path;
use std::sync::Arc;

/// Loads the model that lies at `path`, and starts its engine of these sizes.
///
/// # Errors
/// What is wrong with its files, or what mistral.rs says.
pub(super) fn load(
    config: &ModelConfig,
    path: &Path,
    options: Options,
    pool: &Pool,
    clock: Clock,
) -> anyhow::Result<Served> {
    let ModelConfig { dtype, isq, .. } = config;
    let model = Model::describe(path, *dtype)?;
    // Before the identity: that hashes all weights, and may compute a calibration.
    tapped::refuse(&model.checkpoint, &model.spec)?;
    let mut identity = Identity::of_described(&model, pool)?;
    let shape = (&*model.spec, model.dtype);
    let tapped = tapped::derive(&cache_dir(), &model.checkpoint, shape, &identity.weights_root)?;
    let engine = format!("mistralrs-{VERSION}");
    identity = identity.in_canon(engine.replace('.', "-"));
    if let Some(isq) = isq {
        identity = identity.quantised(&format!("isq-{isq}"));
    }
    let settings = MistralSettings { isq: isq.clone() };
    let loaded = LoadedMistral::load(tapped, &settings, options.sequences_max)?;
    let fingerprint = identity.fingerprint(&engine);
    let model = Arc::new(model);
    let engine = mistral::start(loaded, Arc::clone(&model), options, clock)
        .map_err(|e| anyhow!("cannot start the engine: {e}"))?;
    Ok(Served { engine, model, fingerprint, identity: Arc::new(identity) })
}
