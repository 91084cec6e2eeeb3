//! Defines the errors of the chain, as sentences that say what to do.

use std::fmt;
use std::ops::RangeInclusive;

/// Why the chain did not do what was asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChainError {
    /// No endpoint answers.
    #[error("no endpoint of the chain answers: {0}")]
    Unreachable(String),
    /// The connection broke while something was asked.
    #[error("the connection to {endpoint} broke: {why}")]
    Broken {
        /// URL of the endpoint.
        endpoint: String,
        /// What the endpoint answered.
        why: String,
    },
    /// Another chain than the one that was named.
    #[error(
        "{endpoint} serves another chain: its genesis is {got}, expected {expected}; nothing is \
         signed for it"
    )]
    WrongChain {
        /// URL of the endpoint that has another genesis.
        endpoint: String,
        /// The genesis of the endpoint's chain.
        got: String,
        /// The genesis that it must have.
        expected: String,
    },
    /// The subnet does not exist.
    #[error("the chain has no subnet {0}")]
    NoSubnet(u16),
    /// The runtime's answer cannot be read.
    #[error("the chain's answer cannot be read (runtime {spec}): {why}")]
    Runtime {
        /// The version of the runtime.
        spec: u32,
        /// What is wrong.
        why: String,
    },
    /// An extrinsic was refused or failed.
    #[error(transparent)]
    Refused(#[from] ExtrinsicRefusal),
}

impl ChainError {
    /// Whether another endpoint, or the same one later, may do better.
    pub fn is_passing(&self) -> bool {
        matches!(self, ChainError::Unreachable(_) | ChainError::Broken { .. })
    }
}

/// Where an extrinsic ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtrinsicStage {
    /// The pool did not take it.
    Pool,
    /// The node was too busy to take it, or does not take this one for a while.
    Busy,
    /// It ran and failed.
    Dispatch,
    /// It was lost on the way.
    Lost,
}

/// An extrinsic that did not succeed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExtrinsicRefusal {
    /// The stage at which it failed.
    pub stage: ExtrinsicStage,
    /// The chain's own word for it.
    pub word: String,
}

impl std::error::Error for ExtrinsicRefusal {}

impl fmt::Display for ExtrinsicRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = match self.stage {
            ExtrinsicStage::Pool => "the chain refused the extrinsic",
            ExtrinsicStage::Busy => "the node did not take the extrinsic",
            ExtrinsicStage::Dispatch => "the extrinsic ran and failed",
            ExtrinsicStage::Lost => "the extrinsic was lost",
        };
        match self.advice() {
            Some(advice) => write!(f, "{by}: {advice} ({})", self.word),
            None => write!(f, "{by}: {}", self.word),
        }
    }
}

/// Codes of `1010 Invalid Transaction: Custom error: N`, in words.
const CUSTOM: [(u32, &str); 17] = [
    (1, "the hotkey has too little stake"),
    (2, "the account's balance is too low"),
    (3, "this subnet does not exist: check --netuid"),
    (4, "the chain does not know this hotkey: register it first"),
    (6, "too soon after the last one: wait some blocks"),
    (10, "the hotkey is not registered on this subnet: register it with btcli subnets register"),
    (11, "the address is not one that the chain accepts: give a public one by --axon.external_ip"),
    (12, "the axon was changed too recently: wait about 50 blocks"),
    (13, "the port is not one that the chain accepts: give another by --axon.external_port"),
    (15, "the reveal round is wrong: is this machine's clock right?"),
    (16, "there is no such commit to reveal"),
    (17, "this is not the time to reveal that commit"),
    (18, "uids and weights differ in number"),
    (19, "one of the uids does not exist"),
    (22, "the account is not one that may sign this"),
    (23, "the chain's rules for this call were not met"),
    (255, "the chain gives no reason"),
];

/// Names of dispatch errors, in words.
const DISPATCH: [(&str, &str); 25] = [
    ("HotKeyNotRegisteredInSubNet", "register the hotkey with btcli subnets register"),
    ("HotKeyNotRegisteredInNetwork", "register the hotkey with btcli subnets register"),
    ("ServingRateLimitExceeded", "the axon was changed too recently: wait about 50 blocks"),
    ("InvalidIpAddress", "the chain does not accept this address: see --axon.external_ip"),
    ("InvalidIpType", "the chain does not accept this kind of address: see --axon.external_ip"),
    ("InvalidPort", "the chain does not accept this port: see --axon.external_port"),
    ("SettingWeightsTooFast", "weights were set too recently: wait for the rate limit"),
    ("CommittingWeightsTooFast", "weights were committed too recently: wait for the rate limit"),
    ("NeuronNoValidatorPermit", "the hotkey has no validator permit: it needs more stake"),
    ("NotEnoughStakeToSetWeights", "the hotkey has too little stake"),
    ("IncorrectWeightVersionKey", "the subnet wants a newer version of the software"),
    ("IncorrectCommitRevealVersion", "the chain wants another version of commits"),
    ("CommitRevealEnabled", "this subnet wants weights committed and revealed"),
    ("CommitRevealDisabled", "this subnet wants weights set and not committed"),
    ("TooManyUnrevealedCommits", "too many commits of this hotkey wait for their revelation"),
    ("InvalidRevealRound", "the reveal round is past: is this machine's clock right?"),
    ("WeightVecLengthIsLow", "the subnet wants more weights in the vector"),
    ("WeightVecNotEqualSize", "uids and weights differ in number"),
    ("MaxWeightExceeded", "one weight is larger than the subnet allows"),
    ("DuplicateUids", "a uid comes twice"),
    ("UidVecContainInvalidOne", "one of the uids does not exist"),
    ("UidsLengthExceedUidsInSubNet", "there are more weights than members"),
    ("CanNotSetRootNetworkWeights", "weights cannot be set on subnet 0"),
    ("MechanismDoesNotExist", "the subnet has no such mechanism"),
    ("SubnetNotExists", "this subnet does not exist: check --netuid"),
];
/// What the pool says where a reason is gone within seconds, in words: another extrinsic before
/// this one, or a runtime upgrade since it was signed.
const MOMENTARY: [(&str, &str); 4] = [
    ("priority is too low", "another extrinsic of this hotkey is still in the pool: wait a minute"),
    ("outdated", "its number was used already: another program signs with this hotkey"),
    ("stale", "its number was used already: another program signs with this hotkey"),
    ("bad signature", "the runtime was upgraded after it was signed: it is signed again"),
];
/// Dispatch errors that pass: by waiting, or as the flag is read anew.
const PASSING: [&str; 6] = [
    "ServingRateLimitExceeded",
    "SettingWeightsTooFast",
    "CommittingWeightsTooFast",
    "TooManyUnrevealedCommits",
    "CommitRevealEnabled",
    "CommitRevealDisabled",
];

/// Codes of the pool's answers.
const POOL: RangeInclusive<i32> = 1_010..=1_019;
/// The pool has this very extrinsic already.
const ALREADY_IMPORTED: i32 = 1_013;
/// Codes of what passes: the extrinsic is banned for a while, the pool is full; and, of the server
/// before it, a limit that is reached, and a busy one.
const BUSY: [i32; 5] = [1_012, 1_016, -32_005, -32_009, 429];

impl ExtrinsicRefusal {
    /// From what the pool said, whose wording differs from node to node: only the number after
    /// "custom" counts.
    pub fn of_pool(text: &str) -> Self {
        Self { stage: ExtrinsicStage::Pool, word: text.chars().take(300).collect() }
    }

    /// From an error of the node's own, and whether it says for certain that nothing was taken.
    pub fn of_node(code: i32, text: &str) -> (Self, bool) {
        let refusal = Self::of_pool(text);
        let lower = text.to_lowercase();
        let says_busy =
            ["busy", "rate limit", "too many requests"].iter().any(|w| lower.contains(w));
        if BUSY.contains(&code) || says_busy {
            return (Self { stage: ExtrinsicStage::Busy, ..refusal }, true);
        }
        // Of what is no answer of the pool nobody knows where it happened.
        (refusal, POOL.contains(&code) && code != ALREADY_IMPORTED)
    }

    /// The number after "custom".
    pub fn custom_code(&self) -> Option<u32> {
        let lower = self.word.to_lowercase();
        let digits = lower[lower.find("custom")?..].trim_start_matches(|c: char| !c.is_numeric());
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        digits[..end].parse().ok()
    }

    fn advice(&self) -> Option<&'static str> {
        if let Some(advice) = self.momentary() {
            return Some(advice);
        }
        match self.stage {
            ExtrinsicStage::Pool if self.word.to_lowercase().contains("inability to pay") => {
                Some("the account cannot pay the fee")
            }
            ExtrinsicStage::Pool => {
                let code = self.custom_code()?;
                CUSTOM.iter().find(|(known, _)| *known == code).map(|(_, advice)| *advice)
            }
            ExtrinsicStage::Dispatch => {
                let known = DISPATCH.iter().find(|(name, _)| self.word.ends_with(name));
                known.map(|(_, advice)| *advice)
            }
            ExtrinsicStage::Busy | ExtrinsicStage::Lost => Some("it will be tried again"),
        }
    }

    /// What to do, where the pool's reason is gone within seconds.
    fn momentary(&self) -> Option<&'static str> {
        let lower = self.word.to_lowercase();
        let known = MOMENTARY.iter().find(|(word, _)| lower.contains(word));
        known.filter(|_| self.stage == ExtrinsicStage::Pool).map(|(_, advice)| *advice)
    }

    /// Whether the reason is gone within seconds: another extrinsic before this one, a runtime
    /// upgrade since it was signed, or a busy node.
    pub fn is_momentary(&self) -> bool {
        self.stage == ExtrinsicStage::Busy || self.momentary().is_some()
    }

    /// Whether the same extrinsic may succeed later without anybody doing anything.
    pub fn is_passing(&self) -> bool {
        match self.stage {
            ExtrinsicStage::Pool => {
                self.is_momentary() || matches!(self.custom_code(), Some(6 | 12))
            }
            ExtrinsicStage::Dispatch => PASSING.iter().any(|name| self.word.ends_with(name)),
            ExtrinsicStage::Busy | ExtrinsicStage::Lost => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do_however_the_node_words_them() {
        for (text, want, is_passing) in [
            ("Invalid Transaction (1010): Custom error: 10", "btcli subnets register", false),
            ("{\"invalid\":{\"custom\":11}} (1010)", "--axon.external_ip", false),
            ("Custom error: 12", "wait about 50 blocks", true),
            ("Priority is too low: (1 vs 2)", "still in the pool", true),
            ("Transaction is outdated", "used already", true),
            ("Transaction has a bad signature", "signed again", true),
            ("Custom error: 77", "Custom error: 77", false),
            ("something else", "something else", false),
        ] {
            let refusal = ExtrinsicRefusal::of_pool(text);
            assert!(refusal.to_string().contains(want), "{refusal}");
            assert_eq!(refusal.is_passing(), is_passing, "{text}");
        }
        for (code, text, is_busy, is_certain) in [
            (1_010, "Invalid Transaction: Custom error: 10", false, true),
            (1_012, "Transaction is temporarily banned", true, true),
            (1_013, "Transaction Already Imported", false, false),
            (1_016, "Immediately Dropped", true, true),
            (-32_009, "Server is busy, try again later", true, true),
            (-32_000, "Too Many Requests", true, true),
            // It may have been taken before this happened.
            (-32_603, "Internal error", false, false),
        ] {
            let (refusal, certain) = ExtrinsicRefusal::of_node(code, text);
            assert_eq!((refusal.is_passing(), certain), (is_busy, is_certain), "{code}");
            assert_eq!(refusal.is_momentary(), is_busy, "{code}");
        }
        let word = "SubtensorModule::ServingRateLimitExceeded".to_owned();
        let failed = ExtrinsicRefusal { stage: ExtrinsicStage::Dispatch, word };
        assert!(failed.to_string().contains("wait about 50 blocks"));
        assert!(failed.is_passing());
        assert_eq!(ExtrinsicRefusal::of_pool("custom").custom_code(), None);
        assert_eq!(ExtrinsicRefusal::of_pool("custom 99999999999").custom_code(), None);
    }
}
