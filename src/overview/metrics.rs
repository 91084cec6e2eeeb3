//! Writes a validator's state in the text format of Prometheus.

use crate::clock::Clock;
use crate::store::record::WeightsState;
use crate::validator::run::progress::{RunProgress, RunSnapshot};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use std::fmt;
use std::sync::Arc;

/// Reads the state when somebody asks.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) progress: Arc<RunProgress>,
    pub(super) clock: Clock,
}

/// Name, help, value; absent where there is none.
type Gauge = (&'static str, &'static str, fn(&RunSnapshot) -> Option<f64>);

const GAUGES: [Gauge; 9] = [
    (
        "targon_validator_heartbeat_seconds",
        "Unix time at which the validator last went round its loop",
        |s| Some(s.beat_ms as f64 / 1e3),
    ),
    ("targon_validator_block", "Newest block", |s| Some(s.block as f64)),
    ("targon_validator_block_seconds", "Unix time at which the newest block came", |s| {
        Some(s.block_ms as f64 / 1e3)
    }),
    ("targon_validator_members", "Miners that can be asked", |s| Some(s.members as f64)),
    ("targon_validator_rounds_running", "Rounds that run", |s| Some(s.rounds_running as f64)),
    ("targon_validator_rounds_unsaved", "Rounds that are over and not remembered yet", |s| {
        Some(s.rounds_unsaved as f64)
    }),
    ("targon_validator_weights_epoch", "Epoch of the last weights", |s| {
        s.weights.as_ref().map(|w| w.epoch as f64)
    }),
    (
        "targon_validator_weights_confirmed",
        "Whether the last weights were read back from the chain",
        |s| {
            let is_confirmed = |w: &WeightsState| *w == WeightsState::Confirmed;
            s.weights.as_ref().map(|w| f64::from(u8::from(is_confirmed(&w.state))))
        },
    ),
    (
        "targon_validator_weights_age_blocks",
        "Blocks since the newest weights were decided that were read back from the chain; a commit \
         counts once it is revealed",
        |s| s.weights_age().map(|age| age as f64),
    ),
];

impl Collector for Counted {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let now = self.progress.snapshot();
        for (name, help, value) in GAUGES {
            if let Some(value) = value(&now) {
                let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
                ConstGauge::new(value).encode(gauge)?;
            }
        }
        let (name, help) = ("targon_validator_uptime_seconds", "Time since the program started");
        let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(self.clock.elapsed().as_secs_f64()).encode(gauge)?;
        let (name, help) = ("targon_validator_rounds", "Rounds that ended");
        let counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(now.rounds).encode(counter)?;
        let outcomes = now.answers.iter().map(|(outcome, count)| (*outcome, *count));
        let name = ("targon_validator_answers", "Answers by outcome", "outcome");
        counts(&mut encoder, name, outcomes)?;
        let causes = now.causes.iter().map(|(cause, count)| (cause.as_str(), *count));
        let name = ("targon_validator_causes", "Answers not verified, by cause", "cause");
        counts(&mut encoder, name, causes)
    }
}

/// One counter for each value of a label.
fn counts<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, label): (&str, &str, &str),
    counts: impl Iterator<Item = (&'a str, u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (value, count) in counts {
        ConstCounter::new(count).encode(family.encode_family(&[(label, value)])?)?;
    }
    Ok(())
}
