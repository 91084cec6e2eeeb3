//! Defines the records of a validator as plain data: the round machine makes them, the store keeps
//! them, and scores and `explain` read them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A model was asked for of a set of miners, with one request, and their answers were checked.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Round {
    /// Unique over all rounds: 32 hexadecimal digits.
    pub id: String,
    /// The number of the subnet.
    pub netuid: u16,
    /// The chain's block when the round began.
    pub block: u64,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// When its last verdict was known.
    pub ended_ms: u64,
    /// The model that was asked for.
    pub model: String,
    /// `/v1/chat/completions` or `/v1/completions`.
    pub endpoint: String,
    /// The request body that every miner got, without what differs between them (nonces).
    pub request: Value,
    /// The scoring profile in force: `default` or `targon-4.4`.
    pub profile: String,
    /// Of whom it asked, in the order of uids.
    pub responses: Vec<MinerResponse>,
}

/// What one miner did in a round.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MinerResponse {
    /// Its place on the subnet.
    pub uid: u16,
    /// Its hotkey, as SS58.
    pub hotkey: String,
    /// Its coldkey, as SS58.
    pub coldkey: String,
    /// When the answer's parts arrived.
    pub timing: Timing,
    /// The verdict over it.
    pub outcome: Outcome,
    /// The cause's name (protocol 4.2, or a reason of ours) where it is not [`Outcome::Verified`].
    pub cause: Option<String>,
    /// One sentence about the cause, which names the token, field or time.
    pub error: Option<String>,
    /// What the round adds to the miner's samples: see [`Sample`].
    pub sample: Sampled,
    /// Request and answer as `verify` reads them (a capture), where they are kept.
    pub capture: Option<Value>,
    /// The check's evidence, as `verify --json` prints it.
    pub report: Option<Value>,
    /// What the check measured; kept as long as the verdict.
    #[serde(default)]
    pub statistics: Statistics,
}

/// Why a response of a round is not verified, without the rest of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResponseCause {
    /// The id of the round.
    pub round: String,
    /// The miner's place on the subnet.
    pub uid: u16,
    /// Name of the rule that was broken, or of what failed.
    pub cause: Option<String>,
    /// One sentence about the cause.
    pub error: Option<String>,
}

/// What a verification measured of an answer, as far as it did.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Statistics {
    /// Rows whose logits were computed.
    pub rows: Option<u32>,
    /// Mean margin of their tokens, in logits.
    pub margin: Option<f64>,
    /// Trimmed mean of the energies of all rows.
    pub trimmed: Option<MeasuredValue>,
    /// The same in units of what rounding moves rows by.
    pub twin: Option<MeasuredValue>,
    /// The likeliest known cheat, where cheats were tried.
    pub likeliest: Option<LikelyCheat>,
}

impl Statistics {
    /// What was measured, in words; nothing where nothing was.
    pub fn facts(&self) -> Vec<String> {
        let Self { rows, margin, trimmed, twin, likeliest } = self;
        let of = |what: &str, measured: &Option<MeasuredValue>| {
            measured
                .map(|MeasuredValue { value, limit }| format!("{what} {value:.2} of {limit:.2}"))
        };
        let rows = rows.filter(|rows| *rows > 0).map(|rows| format!("{rows} rows"));
        let margin = margin.map(|margin| format!("margin {margin:.4}"));
        let likeliest = likeliest.as_ref().map(|c| format!("{}, beta {:.2}", c.name, c.beta));
        let all = [rows, margin, of("energy", trimmed), of("twin", twin), likeliest];
        all.into_iter().flatten().collect()
    }
}

/// A number with the most that an honest answer is expected to have.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct MeasuredValue {
    /// What was measured of the answer.
    pub value: f64,
    /// The limit of the value.
    pub limit: f64,
}

/// A known cheat that explains an answer's distances.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LikelyCheat {
    /// Its name among the recipes of known cheats.
    pub name: String,
    /// How much of what it changes is found: about 1 where the cheat was done, 0 elsewhere.
    pub beta: f64,
}

/// Times of one answer, since the request was sent, in seconds (protocol 5.4).
#[derive(Clone, Copy, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct Timing {
    /// Until the first token came: the protocol's `time_to_first_token`.
    pub first_token: f64,
    /// `time_for_all_tokens`: from the first token to the end.
    pub all_tokens: f64,
    /// Until the answer ended: the protocol's `total_time`.
    pub total: f64,
    /// Tokens a second: `min(tokens, max_tokens) / total`; of a verified answer at most as many as
    /// it has verified tokens.
    pub tps: f64,
    /// Chunks with a choice from the first text on, those without text among them.
    pub tokens: u32,
}

/// What verification found of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The answer came from the model that was asked for.
    Verified,
    /// The answer breaks a rule.
    Rejected,
    /// The miner gave no whole answer.
    Failed,
    /// The miner does not serve the model.
    NotServed,
    /// Trouble of the validator's own: nothing is concluded.
    Unscored,
}

impl Outcome {
    const ALL: [Self; 5] =
        [Self::Verified, Self::Rejected, Self::Failed, Self::NotServed, Self::Unscored];

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Verified => "verified",
            Self::Rejected => "rejected",
            Self::Failed => "failed",
            Self::NotServed => "not_served",
            Self::Unscored => "unscored",
        }
    }

    /// The outcome of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.name() == name)
    }
}

/// What a round adds to the samples of one miner and model.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampled {
    /// A verified answer's tokens a second.
    Tps(f64),
    /// A miss: counts against consistency.
    Miss,
    /// Nothing is added.
    Nothing,
}

/// A round without its request and its responses.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RoundHead {
    /// The id of the round: 32 hexadecimal digits.
    pub id: String,
    /// The number of the subnet.
    pub netuid: u16,
    /// The chain's block when the round began.
    pub block: u64,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// When its last verdict was known.
    pub ended_ms: u64,
    /// The model that was asked for.
    pub model: String,
    /// `/v1/chat/completions` or `/v1/completions`.
    pub endpoint: String,
    /// The scoring profile in force.
    pub profile: String,
    /// How many miners it asked.
    pub asked: u64,
    /// How many of them gave a verified answer.
    pub verified: u64,
}

/// What was found of one answer, without the answer.
#[derive(Clone, PartialEq, Debug)]
pub struct ResponseVerdict {
    /// The id of the round.
    pub round: String,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// The uid of the miner.
    pub uid: u16,
    /// Its hotkey then, as SS58.
    pub hotkey: String,
    /// When the answer's parts arrived.
    pub timing: Timing,
    /// What verification found of the answer.
    pub outcome: Outcome,
    /// The rule that was broken, or what failed.
    pub cause: Option<String>,
    /// Whether request and answer are kept in full.
    pub is_kept: bool,
}

/// What one miner did in a round, with that round.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RoundResponse {
    /// When and of what the round was.
    pub round: RoundHead,
    /// What the miner did.
    pub response: MinerResponse,
}

/// One entry of a miner's history for one model, oldest first.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// The round that it comes from.
    pub round: String,
    /// The uid of the miner.
    pub uid: u16,
    /// Its hotkey then, as SS58: another key at the same place has none of these samples.
    pub hotkey: String,
    /// The model that was asked for.
    pub model: String,
    /// The block of the round.
    pub block: u64,
    /// Tokens a second, or none for a miss.
    pub tps: Option<f64>,
}

/// Weights that were decided for one epoch: written before they are sent.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct EpochWeights {
    /// The number of the subnet.
    pub netuid: u16,
    /// The epoch: the number of the subnet's epoch where the chain counts them, else the block at
    /// which the epoch began. At most one entry an epoch is ever sent.
    pub epoch: u64,
    /// The block at which they were decided.
    pub block: u64,
    /// Who gets what, by ascending uid, scaled so that the largest is 65,535.
    pub values: Vec<(u16, u16)>,
    /// How each number came about, for `explain`: one object for each uid.
    pub explanation: Value,
    /// How far they are.
    pub state: WeightsState,
}

/// The blocks that may contain an extrinsic.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SentBlocks {
    /// The final block at which it was signed: it is in none up to this.
    pub after: u64,
    /// The last block that may contain it.
    pub until: u64,
}

impl WeightsState {
    /// The blocks that may contain what was sent, where they are known.
    pub fn sent_blocks(&self) -> Option<SentBlocks> {
        match self {
            Self::Sent { blocks, .. } | Self::Committed { blocks, .. } => *blocks,
            Self::Planned | Self::Confirmed | Self::Failed { .. } => None,
        }
    }
}

/// How far weights are.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum WeightsState {
    /// Decided, not sent yet.
    Planned,
    /// Signed to be sent under this hash; the chain has not been seen to hold them.
    Sent {
        /// Hash of the signed extrinsic, in hexadecimal.
        hash: String,
        /// The blocks that may contain it; unknown in records of before version 3.
        #[serde(default)]
        blocks: Option<SentBlocks>,
        /// The drand round that reveals it, where it is a commit.
        #[serde(default)]
        reveal_round: Option<u64>,
    },
    /// Committed, to be revealed at this drand round.
    Committed {
        /// Hash of the signed extrinsic, in hexadecimal.
        hash: String,
        /// As of what was sent.
        #[serde(default)]
        blocks: Option<SentBlocks>,
        /// The drand round whose signature opens the commit.
        reveal_round: u64,
    },
    /// Read back from the chain as sent.
    Confirmed,
    /// Not on the chain, for this reason.
    Failed {
        /// Why they are not there, in one sentence.
        why: String,
    },
}

impl WeightsState {
    /// The state in one word, for a message.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Sent { .. } => "sent",
            Self::Committed { .. } => "committed",
            Self::Confirmed => "confirmed",
            Self::Failed { .. } => "failed",
        }
    }
}
