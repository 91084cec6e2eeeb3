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
    let mut last = None;
    loop {
        let entries = registry.entries();
        let is_dead = |e: &&ModelEntry| match &e.state {
            ModelState::Ready(served) => served.engine.is_dead(),
            ModelState::Loading | ModelState::Failed(_) => false,
        };
        for ModelEntry { name, .. } in entries.iter().filter(is_dead) {
            let why = "its engine failed again and again, or lost its device; a reload tries anew"
                .to_owned();
            tracing::error!(model = name, "{why}");
            registry.set(name, None, ModelState::Failed(why));
            last = Some(name.clone());
        }
        let is_over = |e: ModelEntry| matches!(e.state, ModelState::Failed(_));
        if let Some(name) = &last
            && registry.entries().into_iter().all(is_over)
        {
            return name.clone();
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
