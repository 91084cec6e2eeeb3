//! Notices models that failed: which, why, and when none is left.

use crate::server::registry::{ModelEntry, ModelState, Registry};
use std::time::Duration;

/// How often engines are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Every model that cannot be served, a line each.
pub fn describe_failures(registry: &Registry) -> String {
    let failures = registry.entries().into_iter().filter_map(|e| match e.state {
        ModelState::Failed(why) => Some(format!("{} cannot be served: {why}", e.name)),
        ModelState::Loading | ModelState::Ready(_) => None,
    });
    failures.collect::<Vec<_>>().join("\n")
}

/// Marks models whose engines were given up as failed; completes once that leaves none.
pub async fn last_engine_death(registry: Registry) -> String {
    let why = "its engine failed again and again, or lost its device; a reload tries anew";
    let is_dead = |entry: &ModelEntry| match &entry.state {
        ModelState::Ready(served) => served.engine.is_dead(),
        ModelState::Loading | ModelState::Failed(_) => false,
    };
    let mut last = None;
    loop {
        for name in registry.fail_where(is_dead, why) {
            tracing::error!(model = name, "{why}");
            last = Some(name);
        }
        if let Some(name) = &last
            && registry.has_only_failed()
        {
            return name.clone();
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
