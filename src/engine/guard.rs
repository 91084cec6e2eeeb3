//! Limits the effect of a panic to the request in which it happened, or to the step. The process
//! always continues.

use super::output::Fault;
pub use super::stage::Stage;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

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
