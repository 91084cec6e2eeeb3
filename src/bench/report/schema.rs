//! Defines the data of a report. Everything that is written is made of this, and `bench compare`
//! reads it.

use super::facts::{Machine, ModelFacts, Program};
use super::spread::{Quantiles, Spread};
use crate::bench::conditions::{Conditions, Mark};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What a file must call itself.
pub const SCHEMA: &str = "targon-engine-bench";
/// The version of the schema that is written and read here.
pub const VERSION: u32 = 1;

/// Whether an engine or a server was measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReportKind {
    /// The engine, in this process.
    Engine,
    /// A server, over HTTP.
    Serve,
}

/// A report of a benchmark, as it is written and signed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BenchReport {
    /// Always [`SCHEMA`]: other JSON is refused by it.
    pub schema: String,
    /// The [`VERSION`] by which it was written.
    pub version: u32,
    /// Whether an engine or a server was measured.
    pub kind: ReportKind,
    /// When it began: seconds since 1970.
    pub started: u64,
    /// How long it took.
    pub seconds: f64,
    /// The program that measured.
    pub program: Program,
    /// The machine that it ran on: of a served model, the client's.
    pub machine: Machine,
    /// The model that was measured.
    pub model: ModelFacts,
    /// The flags, by name.
    pub settings: Map<String, Value>,
    /// The kernel's counters around the measurement.
    pub conditions: Option<Conditions>,
    /// Why the result is to be doubted; empty where it is not.
    pub marks: Vec<Mark>,
    /// It ended before its end; what was measured until then is here.
    pub is_partial: bool,
    /// The ceilings of the machine; of a served model unknown.
    pub ceilings: Option<Ceilings>,
    /// Phases of the engine.
    pub rows: Vec<ReportRow>,
    /// Levels of load on a server.
    pub levels: Vec<LoadLevel>,
    /// Memory of the process.
    pub memory: Option<MemoryUse>,
    /// Who vouches for it.
    pub signature: Option<Signature>,
}

/// What the machine can do at most, measured in the same run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ceilings {
    /// Bytes a second that all threads read from memory.
    pub read_bandwidth: f64,
    /// Floating-point operations a second of fused multiply-adds.
    pub fma_peak: f64,
    /// The row of the device table that this machine is, where there is one.
    pub table: Option<TableCeilings>,
}

/// What a datasheet says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableCeilings {
    /// The device's name in the table.
    pub device: String,
    /// Memory bandwidth, in bytes a second.
    pub bandwidth: f64,
    /// Floating-point operations a second.
    pub peak: f64,
}

/// A phase of the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Prompts are computed; `depth` is their length.
    Prefill,
    /// Sequences go on; `depth` is what they have before.
    Decode,
    /// Proved answers are checked, a fast check each; `depth` is the prompt's length.
    Verify,
}

impl Phase {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Verify => "verify",
        }
    }
}

/// What a row is held back by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// Reading weights and cache.
    Memory,
    /// Operations take longer than reading memory.
    Compute,
    /// Neither: it reaches less than a quarter of both ceilings.
    Overhead,
}

impl Limit {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Compute => "compute",
            Self::Overhead => "overhead",
        }
    }
}

/// One phase at one size.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportRow {
    /// What the row measured: prefill, decode or checks.
    pub phase: Phase,
    /// Sequences side by side.
    pub batch: usize,
    /// Tokens of each before what is measured, or of each prompt.
    pub depth: usize,
    /// Tokens of each that are measured; of a check, those of the answer.
    pub tokens: usize,
    /// Tokens a second of each run, of all sequences together.
    pub runs: Vec<f64>,
    /// The same in short.
    pub speed: Spread,
    /// Bytes a second that this must have read at least.
    pub bytes_per_second: f64,
    /// Floating-point operations a second.
    pub operations_per_second: f64,
    /// Share of the measured bandwidth.
    pub of_bandwidth: f64,
    /// Share of the measured peak.
    pub of_peak: f64,
    /// What holds it back.
    pub limit: Limit,
    /// Tokens a second that `bench plan` predicts from the measured ceilings.
    pub predicted: f64,
    /// The prediction over the measurement, less 1.
    pub error: f64,
    /// Joules a token of processor and memory, where the kernel counts them.
    pub joules_per_token: Option<f64>,
    /// The row beside the datasheet of what computes, where the device table has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datasheet: Option<OfDatasheet>,
}

/// A row beside a datasheet's numbers.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfDatasheet {
    /// Share of its bandwidth.
    pub of_bandwidth: f64,
    /// Share of its peak.
    pub of_peak: f64,
    /// Tokens a second that `bench plan` predicts from it.
    pub predicted: f64,
    /// That prediction over the measurement, less 1.
    pub error: f64,
}

/// Memory that a run took, in bytes.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryUse {
    /// Bytes of packed weights.
    pub weights: u64,
    /// Room for keys and values.
    pub kv: u64,
    /// Most that the process had resident.
    pub peak_resident: u64,
}

/// A server under one load.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadLevel {
    /// Requests a second that arrive, as a Poisson process; `None` where a fixed number runs.
    pub rate: Option<f64>,
    /// Requests that run at once at most.
    pub concurrency: Option<usize>,
    /// Seconds from the first request to the last end.
    pub seconds: f64,
    /// Requests that were sent.
    pub sent: usize,
    /// Those that ended well.
    pub completed: usize,
    /// The others, by what happened.
    pub failed: BTreeMap<String, usize>,
    /// Tokens of the prompts of completed requests, as the server counts them.
    pub input_tokens: u64,
    /// Tokens of their answers, as the server counts them; else chunks.
    pub output_tokens: u64,
    /// Of the prompts' tokens, those that the server says it found in a cache.
    pub cached_tokens: u64,
    /// The window in which the load is steady, in seconds since the first request: without the
    /// ramp at either end. Where there is none, the whole time.
    pub steady: [f64; 2],
    /// Tokens a second within the window.
    pub steady_tokens_per_second: f64,
    /// Requests a second that kept both limits, over the whole time.
    pub goodput: f64,
    /// Seconds to the first token.
    pub first_token: Option<Quantiles>,
    /// Mean seconds a token after the first, a value each request.
    pub per_token: Option<Quantiles>,
    /// Seconds between two chunks.
    pub gap: Option<Quantiles>,
    /// Seconds of whole requests.
    pub total: Option<Quantiles>,
    /// The longest gap of any request, its wait for the first chunk included.
    pub worst_gap: f64,
    /// Tokens a second as a validator of the subnet counts them, a value each request.
    pub validator_tps: Option<Quantiles>,
    /// How the client fared.
    pub client: Client,
    /// The same under the names of vLLM's result files.
    pub vllm: Map<String, Value>,
}

/// How a load generator fared.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// CPU seconds that it took, of each second and thread that it has.
    pub busy: f64,
    /// How much later than asked a timer fires, in seconds: the 99 % quantile.
    pub timer_late: f64,
    /// How much later than drawn a request was sent, in seconds: the 99 % quantile.
    pub send_late: f64,
}

/// A hotkey's signature.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// The address of the hotkey, as SS58.
    pub hotkey: String,
    /// Its sr25519 signature, in hexadecimal.
    pub signature: String,
}

impl LoadLevel {
    /// The load in words.
    pub fn load(&self) -> String {
        match (self.rate, self.concurrency) {
            (Some(rate), _) => format!("{rate}/s"),
            (None, Some(many)) => format!("{many} at once"),
            (None, None) => "-".into(),
        }
    }
}

impl BenchReport {
    /// A report without measurements yet.
    pub fn new(kind: ReportKind, started: u64, machine: Machine, model: ModelFacts) -> Self {
        Self {
            schema: SCHEMA.into(),
            version: VERSION,
            kind,
            started,
            seconds: 0.0,
            program: Program::this(),
            machine,
            model,
            settings: Map::new(),
            conditions: None,
            marks: Vec::new(),
            is_partial: true,
            ceilings: None,
            rows: Vec::new(),
            levels: Vec::new(),
            memory: None,
            signature: None,
        }
    }

    /// The best speed of a phase, with its row.
    pub fn best(&self, phase: Phase) -> Option<&ReportRow> {
        let rows = self.rows.iter().filter(|row| row.phase == phase);
        rows.max_by(|a, b| a.speed.mean.total_cmp(&b.speed.mean))
    }

    /// The level with the most tokens a second.
    pub fn best_level(&self) -> Option<&LoadLevel> {
        let levels = self.levels.iter();
        levels.max_by(|a, b| a.steady_tokens_per_second.total_cmp(&b.steady_tokens_per_second))
    }
}
