//! Shows operators the signed requests: metrics, and the latest requests with their signers.

use super::models::WantedModels;
use super::{Gate, SignedOutcome};
use crate::chain::keys::Hotkey;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use serde_json::{Value, json};
use std::fmt;

impl Gate {
    /// Remembers what a validator wants served.
    pub fn note_models(&self, signer: Hotkey, asked: WantedModels) {
        self.0.asked.lock().insert(signer, asked);
    }

    /// What a validator last wanted served.
    pub fn asked(&self, signer: &Hotkey) -> Option<WantedModels> {
        self.0.asked.lock().get(signer).cloned()
    }

    /// Signed requests by outcome.
    pub fn counted(&self, outcome: SignedOutcome) -> u64 {
        self.0.counts.outcomes.lock().get(&outcome).copied().unwrap_or(0)
    }

    /// Everything that `targon-engine status` shows.
    pub fn status(&self) -> Value {
        let metagraph = self.metagraph();
        let own = metagraph.neuron(&self.own());
        let now = self.now_ms();
        let asked = self.0.asked.lock().clone();
        let served = self.0.counts.signers.lock().clone();
        let signers: std::collections::BTreeSet<_> = asked.keys().chain(served.keys()).collect();
        let validators = signers.into_iter().map(|signer| {
            let neuron = metagraph.neuron(signer);
            let (running, waiting) = self.0.door.load(signer);
            let wants = asked.get(signer);
            json!({
                "hotkey": signer.to_string(),
                "uid": neuron.map(|n| n.uid),
                "stake_tao": neuron.map(|n| n.stake.tao()),
                "requests": served.get(signer).copied().unwrap_or(0),
                "running": running,
                "waiting": waiting,
                "models": wants.map(|a| &a.models),
                "asked_seconds_ago": wants.map(|a| now.saturating_sub(a.at_ms) / 1000),
            })
        });
        let outcomes = self.0.counts.outcomes.lock();
        let outcomes: serde_json::Map<String, Value> =
            outcomes.iter().map(|(o, n)| (o.word().to_owned(), (*n).into())).collect();
        json!({
            "hotkey": self.own().to_string(),
            "netuid": metagraph.netuid,
            "uid": own.map(|n| n.uid),
            "stake_tao": own.map(|n| n.stake.tao()),
            "incentive": own.map(|n| n.incentive),
            "axon": own.and_then(|n| n.axon).map(|a| a.address.to_string()),
            "axon_refused": *self.0.refused_axon.read(),
            "may_ask": self.rule().to_string(),
            "metagraph_block": metagraph.block,
            "members": metagraph.neurons().len(),
            "block": self.head().map(|(head, _)| head.block),
            "block_age_seconds": self.head().map(|(_, age)| age.as_secs()),
            "signed_requests": outcomes,
            "validators": validators.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gate({})", self.own())
    }
}

impl Collector for Gate {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_counts(&mut encoder)?;
        let metagraph = self.metagraph();
        let own = metagraph.neuron(&self.own());
        let head = self.head();
        let gauges = [
            ("targon_chain_block", "Newest block", head.map(|(h, _)| h.block as f64)),
            (
                "targon_chain_block_age_seconds",
                "Time since the newest block",
                head.map(|(_, a)| a.as_secs_f64()),
            ),
            // Gone from the subnet is -1, so that an alert can tell it from no data.
            ("targon_uid", "Own uid, -1 without", Some(own.map_or(-1.0, |n| f64::from(n.uid)))),
            ("targon_stake_tao", "Own stake", own.map(|n| n.stake.tao())),
            ("targon_incentive", "Own share of the miners' rewards", own.map(|n| n.incentive)),
        ];
        for (name, help, value) in gauges {
            let Some(value) = value else { continue };
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let (name, help) = ("targon_auth_seconds", "Time of the checks of a signed request");
        let histogram = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        self.0.counts.seconds.encode(histogram)
    }
}

impl Gate {
    fn encode_counts(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (name, help) = ("targon_signed_requests", "Signed requests by outcome");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (outcome, count) in &*self.0.counts.outcomes.lock() {
            let label = [("outcome", outcome.word())];
            ConstCounter::new(*count).encode(family.encode_family(&label)?)?;
        }
        let (name, help) = ("targon_validator_requests", "Requests let in by signer");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (signer, count) in &*self.0.counts.signers.lock() {
            let label = [("hotkey", signer.to_string())];
            ConstCounter::new(*count).encode(family.encode_family(&label)?)?;
        }
        Ok(())
    }
}
