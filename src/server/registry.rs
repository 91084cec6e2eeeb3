//! Lists the models of this process: each is loading, ready or failed, on its own.

use super::error::ApiError;
use crate::engine::Engine;
use crate::models::{Identity, Model};
use parking_lot::RwLock;
use std::sync::Arc;

/// One model that is served, or should be.
#[derive(Clone)]
pub struct ModelEntry {
    /// What requests call it.
    pub name: String,
    /// The commit or file it comes from, once known.
    pub revision: Option<String>,
    /// Whether it is loading, ready or failed.
    pub state: State,
}

/// Where a model stands.
#[derive(Clone)]
pub enum State {
    /// Files or weights are on their way.
    Loading,
    /// It answers.
    Ready(Box<Served>),
    /// It will not answer.
    Failed(String),
}

/// A model that answers.
#[derive(Clone)]
pub struct Served {
    /// What runs its requests.
    pub engine: Engine,
    /// The model itself, for those who run passes of their own.
    pub model: Arc<Model>,
    /// Version, weights and kernels in one word.
    pub fingerprint: String,
    /// What its proofs are bound to.
    pub identity: Arc<Identity>,
}

impl State {
    /// The word for `/v1/models`.
    pub fn word(&self) -> &'static str {
        match self {
            State::Loading => "loading",
            State::Ready(served) if served.engine.is_dead() => "failed",
            State::Ready(_) => "ready",
            State::Failed(_) => "failed",
        }
    }
}

/// All models, shared by the handlers and the loaders.
#[derive(Clone, Default)]
pub struct Registry(Arc<RwLock<Vec<ModelEntry>>>);

impl Registry {
    /// Announces models that are about to load.
    pub fn announce(&self, names: impl IntoIterator<Item = String>) {
        let entries = names.into_iter().map(|name| ModelEntry {
            name,
            revision: None,
            state: State::Loading,
        });
        self.0.write().extend(entries);
    }

    /// Forgets a model. Requests that run on it end as they would.
    pub fn remove(&self, name: &str) {
        self.0.write().retain(|e| e.name != name);
    }

    /// Replaces the state of a model.
    pub fn set(&self, name: &str, revision: Option<String>, state: State) {
        if let Some(entry) = self.0.write().iter_mut().find(|e| e.name == name) {
            entry.revision = revision.or(entry.revision.take());
            entry.state = state;
        }
    }

    /// All models as they are now.
    pub fn entries(&self) -> Vec<ModelEntry> {
        self.0.read().clone()
    }

    /// The model that a request means: by the body's `model`, which the `X-Targon-Model` header
    /// must not contradict; without either, the only one.
    ///
    /// # Errors
    /// 404 for an unknown model, 400 for a contradiction or no name, 503 while it does not answer.
    pub fn route(&self, body: Option<&str>, header: Option<&str>) -> Result<Routed, ApiError> {
        if let (Some(body), Some(header)) = (body, header)
            && body != header
        {
            let what = format!("must equal the header X-Targon-Model = {header}, got {body}");
            return Err(ApiError::field("model", super::error::echo(&what)));
        }
        let entries = self.0.read();
        let names = || entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(", ");
        let entry = match (body.or(header), entries.as_slice()) {
            (Some(name), _) => entries.iter().find(|e| e.name == name).ok_or_else(|| {
                let message = format!(
                    "the model `{}` does not exist; known: {}",
                    super::error::echo(name),
                    names()
                );
                ApiError { param: Some("model".into()), ..ApiError::not_found(message) }
            })?,
            (None, [only]) => only,
            (None, _) => {
                return Err(ApiError::field("model", format!("must name one of: {}", names())));
            }
        };
        match &entry.state {
            State::Ready(served) if !served.engine.is_dead() => {
                Ok(Routed { name: entry.name.clone(), served: (**served).clone() })
            }
            State::Ready(_) => {
                Err(ApiError::unavailable(format!("the engine of `{}` has stopped", entry.name)))
            }
            State::Loading => {
                Err(ApiError::unavailable(format!("`{}` is still loading", entry.name)))
            }
            State::Failed(why) => {
                Err(ApiError::unavailable(format!("`{}` could not be loaded: {why}", entry.name)))
            }
        }
    }
}

/// A request's model.
pub struct Routed {
    /// What requests call the model.
    pub name: String,
    /// The model with its engine.
    pub served: Served,
}
