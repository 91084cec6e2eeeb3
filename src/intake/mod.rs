//! Reads requests as a server does: a body becomes what the engine is asked.
//!
//! A server generates by this reading, and a verifier repeats it. [`body`] parses, [`understand`]
//! is the whole reading, its slow parts on the threads of [`work`]: [`prompt`] makes ids of
//! messages and texts, [`translate`] makes engine requests of fields, [`constraint`] and [`tools`]
//! say what an output must look like and how calls are found in it, [`proof`] binds its proof.
//! There is no HTTP here.

pub mod body;
pub mod constraint;
pub mod error;
pub mod prompt;
pub mod proof;
pub mod tools;
pub mod translate;
pub mod understand;
pub mod work;

/// The endpoint that a request is sent to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

impl Endpoint {
    /// Path of the route.
    pub fn path(self) -> &'static str {
        match self {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completion => "/v1/completions",
        }
    }
}
