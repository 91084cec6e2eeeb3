//! Starts a model on mistral.rs: this program describes it, derives its checkpoint once, and loads
//! that.

use super::located::Located;
use crate::clock::Clock;
use crate::config::models_toml::ModelConfig;
use crate::engine::mistral::{self, LoadedMistral, MistralSettings, VERSION};
use crate::engine::plan::{MemoryPlan, Part};
use crate::models::remembered::cache_dir;
use crate::models::{Identity, Model, tapped};
use crate::ops::pool::Pool;
use crate::server::registry::Served;
use anyhow::anyhow;
use std::sync::Arc;

/// Loads a model, and starts its engine of the sizes that were planned; each device has its part.
///
/// # Errors
/// What is wrong with its files, or what mistral.rs says.
pub(super) fn load(
    located: &Located,
    (plan, parts): (&MemoryPlan, &[Part]),
    pool: &Pool,
    clock: Clock,
) -> anyhow::Result<Served> {
    let ModelConfig { dtype, isq, .. } = &located.config;
    let options = plan.options;
    let model = Model::describe(&located.path, *dtype)?;
    // Before the identity: that hashes all weights, and may compute a calibration.
    tapped::refuse(&model.checkpoint, &model.spec)?;
    let mut identity = Identity::of_described(&model, pool)?;
    let shape = (&*model.spec, model.dtype);
    let tapped = tapped::derive(&cache_dir()?, &model.checkpoint, shape, &identity.weights_root)?;
    let engine = format!("mistralrs-{VERSION}");
    identity = identity.in_canon(engine.replace('.', "-"));
    if let Some(isq) = isq {
        identity = identity.quantised(&format!("isq-{isq}"));
    }
    let settings = MistralSettings { isq: isq.clone(), parts: parts.to_vec() };
    let loaded = LoadedMistral::load(tapped, &settings, model.dtype, options.sequences_max)?;
    let fingerprint = identity.fingerprint(&engine);
    let model = Arc::new(model);
    let engine = mistral::start(loaded, Arc::clone(&model), options, clock)
        .map_err(|e| anyhow!("cannot start the engine: {e}"))?;
    Ok(Served { engine, model, fingerprint, identity: Arc::new(identity) })
}
