//! What the door counts and remembers for its operator: metrics, and who last asked for what.

use super::{Gate, Outcome};
use crate::chain::keys::Hotkey;
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Upper bounds of the time that the checks take, in seconds.
const AUTH_SECONDS: [f64; 8] = [0.0001, 0.0002, 0.0005, 0.001, 0.005, 0.02, 0.1, 1.0];
/// Bytes of a list of models.
const BODY_BYTES_MAX: usize = 256 << 10;
/// Models of one list that are remembered, and characters of a name.
const MODELS_MAX: usize = 256;
const NAME_CHARS_MAX: usize = 200;

/// What a validator last asked this miner to serve.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Asked {
    /// Names of models.
    pub models: Vec<String>,
    /// Whether it spoke of them as a map (protocol 5) and not as a list.
    pub is_map: bool,
    /// When, in Unix milliseconds.
    pub at_ms: u64,
}

impl Asked {
    /// From the body of `POST /models`.
    ///
    /// # Errors
    /// The rule, where it is neither a list of names nor a map from names.
    pub fn read(body: &[u8], at_ms: u64) -> Result<Self, String> {
        let rule = || {
            format!(
                "the body must be a JSON list of at most {MODELS_MAX} model names, or a map from \
                 them, of at most {NAME_CHARS_MAX} characters each"
            )
        };
        if body.len() > BODY_BYTES_MAX {
            return Err(rule());
        }
        let value: Value = serde_json::from_slice(body).map_err(|_| rule())?;
        let (names, is_map): (Vec<Option<String>>, bool) = match value {
            Value::Array(list) => {
                (list.into_iter().map(|v| v.as_str().map(str::to_owned)).collect(), false)
            }
            Value::Object(map) => (map.into_iter().map(|(name, _)| Some(name)).collect(), true),
            _ => return Err(rule()),
        };
        if names.len() > MODELS_MAX {
            return Err(rule());
        }
        let fit = |name: Option<String>| name.filter(|n| n.chars().count() <= NAME_CHARS_MAX);
        let models = names.into_iter().map(fit).collect::<Option<_>>().ok_or_else(rule)?;
        Ok(Self { models, is_map, at_ms })
    }
}

/// Counters of the door.
pub(super) struct Counts {
    outcomes: Mutex<BTreeMap<Outcome, u64>>,
    signers: Mutex<BTreeMap<Hotkey, u64>>,
    seconds: Histogram,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            outcomes: Mutex::default(),
            signers: Mutex::default(),
            seconds: Histogram::new(AUTH_SECONDS),
        }
    }
}

impl Counts {
    pub(super) fn count(&self, outcome: Outcome) {
        *self.outcomes.lock().entry(outcome).or_default() += 1;
    }

    /// Only members get this far, so there are few of them.
    pub(super) fn count_signer(&self, signer: Hotkey) {
        *self.signers.lock().entry(signer).or_default() += 1;
    }

    /// Forgets signers that are gone.
    pub(super) fn retain(&self, stays: impl Fn(&Hotkey) -> bool) {
        self.signers.lock().retain(|key, _| stays(key));
    }

    pub(super) fn observe(&self, took: Duration) {
        self.seconds.observe(took.as_secs_f64());
    }
}

impl Gate {
    /// Remembers what a validator wants served.
    pub fn note_models(&self, signer: Hotkey, asked: Asked) {
        self.0.asked.lock().insert(signer, asked);
    }

    /// What a validator last wanted served.
    pub fn asked(&self, signer: &Hotkey) -> Option<Asked> {
        self.0.asked.lock().get(signer).cloned()
    }

    /// Requests that were let in or turned away, by outcome.
    pub fn counted(&self, outcome: Outcome) -> u64 {
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
            ("targon_chain_block_age_seconds", "Since then", head.map(|(_, a)| a.as_secs_f64())),
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
        let (name, help) = ("targon_signed_requests", "Signed requests by how they fared");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_maps_of_models_are_understood_and_nothing_else() {
        let read = |text: &str| Asked::read(text.as_bytes(), 5);
        let list = read("[\"a\", \"b\"]").unwrap();
        assert_eq!(
            (list.models, list.is_map, list.at_ms),
            (vec!["a".into(), "b".into()], false, 5)
        );
        assert!(read("{\"a\": 3}").unwrap().is_map);
        assert_eq!(read("[]").unwrap().models, Vec::<String>::new());
        let many = serde_json::to_string(&vec!["a"; 257]).unwrap();
        let long = format!("[\"{}\"]", "x".repeat(201));
        for bad in ["", "3", "[3]", "[null]", "nope", many.as_str(), long.as_str()] {
            assert!(read(bad).unwrap_err().contains("JSON list of at most 256"), "{bad}");
        }
    }
}
