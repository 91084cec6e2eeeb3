//! Lists the models of this process: each is loading, ready or failed, on its own.

use super::error::ApiError;
use crate::engine::Engine;
use crate::models::{Identity, Model};
use parking_lot::RwLock;
use std::sync::Arc;
use std::time::Duration;

/// One model that is served, or should be.
#[derive(Clone)]
pub struct ModelEntry {
    /// What requests call it.
    pub name: String,
    /// The commit or file it comes from, once known.
    pub revision: Option<String>,
    /// Whether it is loading, ready or failed.
    pub state: ModelState,
    /// Whether it failed by what may pass by itself, as an outage of the Hub.
    pub may_pass: bool,
}

/// Where a model stands.
#[derive(Clone)]
pub enum ModelState {
    /// Files or weights are on their way.
    Loading,
    /// It is loaded, and answers requests.
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

impl Served {
    /// Whether its engine makes no progress: it has stopped, or its step takes longer than `limit`.
    pub fn hangs(&self, limit: Duration) -> bool {
        self.engine.is_dead() || self.engine.stalled_for().is_some_and(|stalled| stalled > limit)
    }
}

impl ModelState {
    /// The word for `/v1/models`.
    pub fn word(&self) -> &'static str {
        match self {
            ModelState::Loading => "loading",
            ModelState::Ready(served) if served.engine.is_dead() => "failed",
            ModelState::Ready(_) => "ready",
            ModelState::Failed(_) => "failed",
        }
    }
}

/// All models, shared by the handlers and the loaders.
#[derive(Clone, Default)]
pub struct Registry {
    shared: Arc<RwLock<Entries>>,
    /// Which announcement's models it may set; `None` allows all.
    announcement: Option<u64>,
}

#[derive(Default)]
struct Entries {
    announcements: u64,
    models: Vec<Announced>,
}

struct Announced {
    announcement: u64,
    entry: ModelEntry,
}

impl Registry {
    /// Announces models that are about to load, in place of those of the same names: at no moment
    /// is there neither the old nor the new one. What is set through the handle that it gives is
    /// for these entries only: a load that ends late changes no later entry of the same name.
    pub fn announce(&self, names: impl IntoIterator<Item = String>) -> Self {
        let mut shared = self.shared.write();
        shared.announcements += 1;
        let announcement = shared.announcements;
        let names: Vec<String> = names.into_iter().collect();
        shared.models.retain(|model| !names.contains(&model.entry.name));
        let entry =
            |name| ModelEntry { name, revision: None, state: ModelState::Loading, may_pass: false };
        let models = names.into_iter().map(|name| Announced { announcement, entry: entry(name) });
        shared.models.extend(models);
        Self { shared: Arc::clone(&self.shared), announcement: Some(announcement) }
    }

    fn is_meant(&self, model: &Announced, name: &str) -> bool {
        model.entry.name == name && self.announcement.is_none_or(|own| own == model.announcement)
    }

    /// Forgets a model. Requests that run on it end as they would.
    pub fn remove(&self, name: &str) {
        self.shared.write().models.retain(|model| model.entry.name != name);
    }

    /// Replaces the state of a model; false where it was removed or announced anew meanwhile.
    pub fn set(&self, name: &str, revision: Option<String>, state: ModelState) -> bool {
        let mut shared = self.shared.write();
        let model = shared.models.iter_mut().find(|model| self.is_meant(model, name));
        let Some(Announced { entry, .. }) = model else { return false };
        entry.revision = revision.or(entry.revision.take());
        (entry.state, entry.may_pass) = (state, false);
        true
    }

    /// Marks a model as failed by what may pass by itself.
    pub fn fail_for_now(&self, name: &str, why: String) {
        let mut shared = self.shared.write();
        let model = shared.models.iter_mut().find(|model| self.is_meant(model, name));
        if let Some(Announced { entry, .. }) = model {
            (entry.state, entry.may_pass) = (ModelState::Failed(why), true);
        }
    }

    /// Marks the models of which `is_bad` says so as failed, and returns their names. Nobody can
    /// announce another of the same name in between.
    pub fn fail_where(&self, is_bad: impl Fn(&ModelEntry) -> bool, why: &str) -> Vec<String> {
        let mut shared = self.shared.write();
        let bad = shared.models.iter_mut().map(|model| &mut model.entry).filter(|e| is_bad(e));
        let fail = |entry: &mut ModelEntry| {
            entry.state = ModelState::Failed(why.to_owned());
            entry.name.clone()
        };
        bad.map(fail).collect()
    }

    /// Whether there are models, and none loads or answers.
    pub fn has_only_failed(&self) -> bool {
        let models = &self.shared.read().models;
        let has_failed = |model: &Announced| matches!(model.entry.state, ModelState::Failed(_));
        !models.is_empty() && models.iter().all(has_failed)
    }

    /// A model as it is now.
    pub fn entry(&self, name: &str) -> Option<ModelEntry> {
        let shared = self.shared.read();
        let model = shared.models.iter().find(|model| self.is_meant(model, name));
        model.map(|model| model.entry.clone())
    }

    /// All models as they are now.
    pub fn entries(&self) -> Vec<ModelEntry> {
        self.shared.read().models.iter().map(|model| model.entry.clone()).collect()
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
        let shared = self.shared.read();
        let entries = || shared.models.iter().map(|model| &model.entry);
        let names = || entries().map(|e| e.name.as_str()).collect::<Vec<_>>().join(", ");
        let entry = match (body.or(header), shared.models.as_slice()) {
            (Some(name), _) => entries().find(|e| e.name == name).ok_or_else(|| {
                let message = format!(
                    "the model `{}` does not exist; known: {}",
                    super::error::echo(name),
                    names()
                );
                ApiError { param: Some("model".into()), ..ApiError::not_found(message) }
            })?,
            (None, [only]) => &only.entry,
            (None, _) => {
                return Err(ApiError::field("model", format!("must name one of: {}", names())));
            }
        };
        match &entry.state {
            ModelState::Ready(served) if !served.engine.is_dead() => {
                Ok(Routed { name: entry.name.clone(), served: (**served).clone() })
            }
            ModelState::Ready(_) => {
                Err(ApiError::unavailable(format!("the engine of `{}` has stopped", entry.name)))
            }
            ModelState::Loading => {
                Err(ApiError::unavailable(format!("`{}` is still loading", entry.name)))
            }
            ModelState::Failed(why) => {
                Err(ApiError::unavailable(format!("`{}` could not be loaded: {why}", entry.name)))
            }
        }
    }
}

/// The model that a request is for, and what answers it.
pub struct Routed {
    /// What requests call the model.
    pub name: String,
    /// The model with its engine.
    pub served: Served,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_that_ends_late_changes_no_newer_entry() {
        let registry = Registry::default();
        let older = registry.announce(["a", "b"].map(String::from));
        registry.remove("a");
        let newer = registry.announce(["a".to_owned()]);
        let failed = |why: &str| ModelState::Failed(why.to_owned());
        assert!(!older.set("a", Some("old".into()), failed("old weights")));
        let entry = registry.entry("a").unwrap();
        assert_eq!((entry.state.word(), entry.revision), ("loading", None));
        assert!(older.entry("a").is_none() && newer.entry("b").is_none());
        assert!(older.set("b", None, failed("b")) && newer.set("a", None, failed("new weights")));
        let why = registry.route(Some("a"), None).err().unwrap().message;
        assert!(why.contains("new weights"), "{why}");
        let standing = |registry: &Registry| registry.entries().len();
        assert_eq!(standing(&registry), 2);
        registry.announce(["a".to_owned()]);
        assert_eq!(
            (standing(&registry), registry.entry("a").unwrap().state.word()),
            (2, "loading")
        );
        assert!(!newer.set("a", None, failed("not meant")));
        // A reader or writer that gives the name alone means the entry that stands there.
        assert!(
            registry.set("a", None, ModelState::Loading) && !registry.set("c", None, failed("c"))
        );
    }

    #[test]
    fn models_fail_by_what_they_are_now_and_no_model_is_no_failure() {
        let registry = Registry::default();
        assert!(!registry.has_only_failed(), "a reload may have taken the last one away");
        registry.announce(["a", "b"].map(String::from));
        let is_a = |entry: &ModelEntry| entry.name == "a" && entry.state.word() == "loading";
        assert_eq!(registry.fail_where(is_a, "gone"), ["a"]);
        assert!(registry.fail_where(is_a, "gone").is_empty(), "it has failed already");
        let why = registry.route(Some("a"), None).err().unwrap().message;
        assert!(why.contains("gone") && !registry.has_only_failed(), "{why}");
        registry.fail_where(|_| true, "all");
        assert!(registry.has_only_failed());
        // One of them is tried anew, however the other one is.
        registry.announce(["a".to_owned()]);
        assert!(!registry.has_only_failed() && registry.entry("b").is_some());
    }
}
