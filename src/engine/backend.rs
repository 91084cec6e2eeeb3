//! Defines who runs requests behind a handle: every backend takes the same commands and sends the
//! same events.

use super::output::Event;
use super::request::{InvalidRequest, Request};
use super::scheduler::Owner;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// The backends that can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum BackendKind {
    /// The engine of this crate.
    #[default]
    Native,
    /// mistral.rs, in builds with the feature `mistralrs`.
    Mistralrs,
}

impl BackendKind {
    /// Refuses what this backend does not do, before a request is queued.
    ///
    /// # Errors
    /// The field, and which backend does it.
    pub(super) fn check(self, request: &Request) -> Result<(), InvalidRequest> {
        if self == Self::Mistralrs && request.prompt_logprobs.is_some() {
            let what = "is not built for models that mistral.rs runs; the native engine has it";
            return Err(InvalidRequest { field: "prompt_logprobs", what: what.into() });
        }
        Ok(())
    }
}

/// A name that does not name a backend of this build.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BackendError {
    /// One that is known, but not built.
    #[error(
        "= {0} needs a build with the feature `{0}` (cargo build --features {0}); this build does \
         not have it"
    )]
    NotBuilt(&'static str),
    /// One that is not known.
    #[error("must be native or mistralrs, got {0}")]
    Unknown(String),
}

impl FromStr for BackendKind {
    type Err = BackendError;

    fn from_str(name: &str) -> Result<Self, BackendError> {
        match name {
            "native" => Ok(Self::Native),
            "mistralrs" if cfg!(feature = "mistralrs") => Ok(Self::Mistralrs),
            "mistralrs" => Err(BackendError::NotBuilt("mistralrs")),
            other => Err(BackendError::Unknown(other.to_owned())),
        }
    }
}

/// Runs the requests of one model on a thread of its own.
pub trait Backend: Send {
    /// Takes commands until every handle is gone; false when it gave up before. A request's events
    /// end with the last token, a finish or a fault, which is sent when it is counted and holds
    /// nothing of the engine; when its channel is closed it is dropped.
    fn run(self: Box<Self>, commands: Receiver<Command>) -> bool;
}

/// What handles send to a backend. All that it says was checked.
pub enum Command {
    /// Run a request.
    Submit(Box<Submission>),
}

/// A request that was taken.
pub struct Submission {
    /// The request, whose bounds were checked.
    pub request: Request,
    /// Where its events go: there is room for all that it can have.
    pub events: mpsc::Sender<Event>,
    /// Its place among those that run and wait; it is free again once this is dropped.
    pub place: EnginePermit,
    /// When, by the engine's clock.
    pub submitted: Duration,
}

/// One of the places of those that run and wait, until dropped.
pub struct EnginePermit {
    pub(super) owner: Owner,
    pub(super) owners: Arc<Mutex<HashMap<Owner, usize>>>,
    pub(super) _permit: OwnedSemaphorePermit,
}

impl Drop for EnginePermit {
    fn drop(&mut self) {
        let mut held = self.owners.lock();
        if let Some(count) = held.get_mut(&self.owner) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.owner);
            }
        }
    }
}
