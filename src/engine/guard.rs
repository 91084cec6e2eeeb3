//! What a panic may cost: the request that it happened in, or the step, and never the process.

use super::output::Fault;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A part of the owner's work.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stage {
    /// A request is taken over.
    Take,
    /// Rows are chosen; a panic here costs all requests of the engine.
    Schedule,
    /// The rows are computed; a panic here costs the requests of the step.
    Forward,
    /// It is said what is asked of a row, and a token is read off it.
    Reduce,
    /// A token becomes text and is sent.
    Record,
    /// Blocks are entered in the prefix cache; a panic here costs all requests of the engine.
    Commit,
}

impl Stage {
    /// All of them.
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

/// Is told of every stage before it begins. Tests let it panic; a program has none.
#[derive(Clone, Default)]
pub struct Watch(Option<Arc<dyn Fn(Stage) + Send + Sync>>);

impl Watch {
    /// Calls `watch` before every stage.
    pub fn new(watch: impl Fn(Stage) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(watch)))
    }

    pub(super) fn enter(&self, stage: Stage) {
        if let Some(watch) = &self.0 {
            watch(stage);
        }
    }

    /// Runs a stage whose panic costs only what it works on.
    pub(super) fn guard<T>(
        &self,
        stage: Stage,
        work: impl FnOnce() -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let guarded = AssertUnwindSafe(|| {
            self.enter(stage);
            work()
        });
        // The panic's own words and place are in the log by the panic hook.
        catch_unwind(guarded).unwrap_or(Err(Fault::Panicked(stage)))
    }
}
