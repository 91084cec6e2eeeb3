//! Writes `/metrics` in the OpenMetrics text format, and the same in words in the log.

use super::counters::ready;
use crate::engine::stats::EngineSnapshot;
use crate::server::state::ServerState;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use std::time::Duration;

/// Seconds between two lines of the log.
const SUMMARY_EVERY: Duration = Duration::from_secs(10);

/// `GET /metrics`.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((
        status = 200, description = "OpenMetrics", body = String,
        content_type = "application/openmetrics-text",
    ))
)]
pub async fn metrics(State(state): State<ServerState>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], state.metrics().encode()).into_response()
}

/// Logs one line for each model that did something, every ten seconds, for ever.
pub async fn summarize(state: ServerState) {
    let mut before: Vec<(String, EngineSnapshot)> = Vec::new();
    loop {
        tokio::time::sleep(SUMMARY_EVERY).await;
        let now: Vec<(String, EngineSnapshot)> = ready(state.registry())
            .into_iter()
            .map(|(name, engine)| (name, engine.stats().snapshot()))
            .collect();
        for (name, s) in &now {
            let old = before.iter().find(|(n, _)| n == name).map(|(_, s)| *s).unwrap_or_default();
            if s.steps != old.steps || s.load.running + s.load.waiting > 0 {
                summary_line(name, s, &old);
            }
        }
        before = now;
    }
}

fn summary_line(model: &str, s: &EngineSnapshot, old: &EngineSnapshot) {
    let rate = |new: u64, old: u64| {
        (new.saturating_sub(old) as f64 / SUMMARY_EVERY.as_secs_f64() * 10.0).round() / 10.0
    };
    let percent = |part: u64, whole: u64| (100.0 * part as f64 / whole.max(1) as f64).round();
    tracing::info!(
        model,
        prompt_tokens_per_second = rate(s.prefill_tokens, old.prefill_tokens),
        output_tokens_per_second = rate(s.decode_tokens, old.decode_tokens),
        running = s.load.running,
        waiting = s.load.waiting,
        kv_percent = percent(s.load.blocks_used as u64, s.load.blocks_total as u64),
        prefix_hit_percent = percent(
            s.cached_tokens.saturating_sub(old.cached_tokens),
            s.prompt_tokens.saturating_sub(old.prompt_tokens)
        ),
        "load"
    );
}
