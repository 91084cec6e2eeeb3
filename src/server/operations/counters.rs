//! Collects the metrics of the server. They have vLLM's names where vLLM has such a metric, so that
//! existing dashboards work, and otherwise the prefix `targon_`.

use crate::engine::Engine;
use crate::engine::stats::{EngineSnapshot, Timings};
use crate::server::door::Gate;
use crate::server::registry::{ModelEntry, ModelState, Registry as Models};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::fmt;

/// Upper bounds of times of HTTP requests, in seconds.
const HTTP_SECONDS: [f64; 12] =
    [0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Labels of an HTTP request; `path` is a route's pattern.
#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
pub struct HttpLabels {
    /// GET, POST, ...
    pub method: String,
    /// Path of the route.
    pub path: String,
    /// The HTTP status of the answer.
    pub status: u16,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct FieldLabel {
    field: String,
}

/// Everything that is counted outside the engines, and the way to all of it.
pub struct Metrics {
    registry: Registry,
    requests: Family<HttpLabels, Counter>,
    seconds: Histogram,
    unknown_fields: Family<FieldLabel, Counter>,
}

impl Metrics {
    /// Over the models of a server, and the signed requests of a miner.
    pub fn new(models: Models, gate: Option<Gate>) -> Self {
        let requests = Family::<HttpLabels, Counter>::default();
        let seconds = Histogram::new(HTTP_SECONDS);
        let unknown_fields = Family::<FieldLabel, Counter>::default();
        let mut registry = Registry::default();
        let (r, s, u) = (requests.clone(), seconds.clone(), unknown_fields.clone());
        registry.register("http_requests", "HTTP requests by route and status", r);
        registry.register("http_request_duration_seconds", "Time to the head of the answer", s);
        registry.register("targon_unknown_fields", "Request fields that nobody reads", u);
        registry.register_collector(Box::new(Engines(models)));
        if let Some(gate) = gate {
            registry.register_collector(Box::new(gate));
        }
        Self { registry, requests, seconds, unknown_fields }
    }

    /// Reports what is counted elsewhere, too.
    pub fn collect(&mut self, collector: Box<dyn Collector>) {
        self.registry.register_collector(collector);
    }

    /// All of it in the OpenMetrics text format; families without a sample are left out.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string fails only where an encoder does, and ours do not.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        filled(&text)
    }

    /// Counts a request.
    pub fn observe(&self, labels: HttpLabels, seconds: f64) {
        self.requests.get_or_create(&labels).inc();
        self.seconds.observe(seconds);
    }

    /// Counts a request field that nobody reads.
    pub fn count_unknown_field(&self, field: &str) {
        self.unknown_fields.get_or_create(&FieldLabel { field: field.into() }).inc();
    }
}

/// A scrape without the families that have no sample: their names would promise what this program
/// does not count.
fn filled(text: &str) -> String {
    let (mut kept, mut head) = (String::with_capacity(text.len()), String::new());
    for line in text.lines() {
        match line.strip_prefix("# ") {
            Some("EOF") => kept += "# EOF\n",
            Some(words) => {
                if words.starts_with("HELP ") {
                    head.clear();
                }
                head = head + line + "\n";
            }
            None => {
                kept = kept + &std::mem::take(&mut head) + line + "\n";
            }
        }
    }
    kept
}

/// The engines' counters, read when somebody asks.
struct Engines(Models);

impl fmt::Debug for Engines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Engines")
    }
}

/// Name, help, value.
type Gauge = (&'static str, &'static str, fn(&EngineSnapshot) -> f64);
/// Name, help, value.
type Count = (&'static str, &'static str, fn(&EngineSnapshot) -> u64);
/// Name, help, distribution.
type Distribution = (&'static str, &'static str, fn(&Timings) -> &Histogram);

const GAUGES: [Gauge; 3] = [
    ("vllm:num_requests_running", "Requests in steps", |s| s.load.running as f64),
    ("vllm:num_requests_waiting", "Requests in the queue", |s| s.load.waiting as f64),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 1 is all", |s| {
        s.load.blocks_used as f64 / s.load.blocks_total.max(1) as f64
    }),
];

const COUNTS: [Count; 9] = [
    ("vllm:num_preemptions", "Sequences set back to the queue", |s| s.load.preemptions),
    ("vllm:prompt_tokens", "Prompt tokens computed", |s| s.prefill_tokens),
    ("vllm:generation_tokens", "Tokens generated", |s| s.decode_tokens),
    ("vllm:prefix_cache_queries", "Prompt tokens of ended requests", |s| s.prompt_tokens),
    ("vllm:prefix_cache_hits", "Of those, found in the prefix cache", |s| s.cached_tokens),
    ("vllm:spec_decode_num_draft_tokens", "Tokens guessed for a step", |s| s.load.drafted),
    ("vllm:spec_decode_num_accepted_tokens", "Of those, drawn", |s| s.load.accepted),
    ("vllm:corrupted_requests", "Requests that failed inside the engine", |s| s.faults),
    ("targon_engine_steps", "Steps finished: a heartbeat", |s| s.steps),
];

const DISTRIBUTIONS: [Distribution; 9] = [
    ("vllm:time_to_first_token_seconds", "Submission to first token", |t| &t.first_token),
    ("vllm:inter_token_latency_seconds", "Between two tokens of a request", |t| &t.inter_token),
    ("vllm:e2e_request_latency_seconds", "Submission to end", |t| &t.request),
    ("vllm:request_queue_time_seconds", "Submission to first step", |t| &t.queue),
    ("vllm:request_prefill_time_seconds", "First step to first token", |t| &t.prefill),
    ("vllm:request_decode_time_seconds", "First token to end", |t| &t.decode),
    ("vllm:request_prompt_tokens", "Tokens of a prompt", |t| &t.prompt_tokens),
    ("vllm:request_generation_tokens", "Tokens of an output", |t| &t.output_tokens),
    ("vllm:iteration_tokens_total", "Rows of a step", |t| &t.step_tokens),
];

impl Collector for Engines {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let engines = ready(&self.0);
        let label = |name: &str| [("model_name", name.to_owned())];
        for (name, help, value) in GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (model, engine) in &engines {
                let gauge = ConstGauge::new(value(&engine.stats().snapshot()));
                gauge.encode(family.encode_family(&label(model))?)?;
            }
        }
        for (name, help, value) in COUNTS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (model, engine) in &engines {
                let counter = ConstCounter::new(value(&engine.stats().snapshot()));
                counter.encode(family.encode_family(&label(model))?)?;
            }
        }
        for (name, help, of) in DISTRIBUTIONS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for (model, engine) in &engines {
                of(engine.stats().timings()).encode(family.encode_family(&label(model))?)?;
            }
        }
        outcomes(&mut encoder, &engines)?;
        hosted_rows(&mut encoder, &engines)
    }
}

fn hosted_rows(encoder: &mut DescriptorEncoder<'_>, engines: &[(String, Engine)]) -> fmt::Result {
    let help = "Rows whose logits a card sent to the host, by why";
    let name = "targon_engine_hosted_rows";
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (model, engine) in engines {
        for (why, count) in engine.stats().snapshot().hosted.iter().filter(|(_, count)| *count > 0)
        {
            let labels = [("model_name", model.as_str()), ("why", why)];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn outcomes(encoder: &mut DescriptorEncoder<'_>, engines: &[(String, Engine)]) -> fmt::Result {
    let (name, help) = ("vllm:request_success", "Requests by how they ended");
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (model, engine) in engines {
        let s = engine.stats().snapshot();
        for (reason, count) in [
            ("stop", s.finished - s.finished_by_length),
            ("length", s.finished_by_length),
            ("abort", s.aborted),
            ("error", s.faults),
        ] {
            let labels = [("model_name", model.as_str()), ("finished_reason", reason)];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

/// The engines of the models that answer, by name.
pub(super) fn ready(models: &Models) -> Vec<(String, Engine)> {
    let entries = models.entries().into_iter();
    let engine = |e: ModelEntry| match e.state {
        ModelState::Ready(served) => Some((e.name, served.engine)),
        ModelState::Loading | ModelState::Failed(_) => None,
    };
    entries.filter_map(engine).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_without_a_sample_are_left_out() {
        let text = "# HELP a One.\n# TYPE a counter\n# HELP b Two.\n# TYPE b gauge\nb{x=\"# \"} 0\n\
                    b 1\n# HELP c Three.\n# TYPE c histogram\n# UNIT c seconds\n# EOF\n";
        let kept = "# HELP b Two.\n# TYPE b gauge\nb{x=\"# \"} 0\nb 1\n# EOF\n";
        assert_eq!((filled(text), filled("# EOF\n")), (kept.to_owned(), "# EOF\n".to_owned()));
        let metrics = Metrics::new(Models::default(), None);
        let named = |text: &str| text.contains("vllm:") || text.contains("unknown_fields");
        assert!(!named(&metrics.encode()), "{}", metrics.encode());
        metrics.count_unknown_field("made_up");
        assert!(metrics.encode().contains("targon_unknown_fields_total{field=\"made_up\"} 1"));
    }
}
