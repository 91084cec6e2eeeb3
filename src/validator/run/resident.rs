//! Holds a model in memory that a validator verifies with, and the error rates of its honest
//! miners.

use crate::engine::Engine;
use crate::verify::Verifier;
use crate::verify::evidence::Calibrated;

/// A model that answers are checked with.
#[derive(Clone)]
pub struct Resident {
    /// The model, with the limits between honest and not.
    pub verifier: Verifier,
    /// What evidence over many answers is weighed by.
    pub rates: Calibrated,
    /// The engine that words queries anew, where prompts are rewritten.
    pub engine: Option<Engine>,
}
