//! Names the parts of the owner's work, so that a failure says where it happened.

use std::fmt;

/// A part of the owner's work.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stage {
    /// A request is taken over.
    Take,
    /// Rows are chosen; a panic here costs all requests of the engine.
    Schedule,
    /// The rows are computed; a panic here costs the requests of the step.
    Forward,
    /// The sampling settings of a row are applied, and a token is drawn from it.
    Reduce,
    /// A token becomes text and is sent.
    Record,
    /// Blocks are entered in the prefix cache; a panic here costs all requests of the engine.
    Commit,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Stage; 6] =
        [Stage::Take, Stage::Schedule, Stage::Forward, Stage::Reduce, Stage::Record, Stage::Commit];
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Take => "taking the request over",
            Stage::Schedule => "scheduling",
            Stage::Forward => "computing its rows",
            Stage::Reduce => "drawing a token",
            Stage::Record => "writing a token",
            Stage::Commit => "keeping its blocks",
        })
    }
}
