//! Describes what became of weights: what was sent, why it was not, and what stands on the chain.

use super::Vector;
use super::standing::Unmet;
use crate::chain::error::ChainError;
use crate::chain::keys::Hotkey;

/// Weights that are to be set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order {
    /// The number of the subnet.
    pub netuid: u16,
    /// The mechanism of the subnet; 0 for the first, which most subnets have alone.
    pub mechanism: u8,
    /// The weight of each uid.
    pub vector: Vector,
    /// Version of the software that made them; `None` is the one that the subnet asks for.
    pub version_key: Option<u64>,
}

/// What is asked before a step that cannot be taken back.
pub struct Approval<'a> {
    /// Given the call in words; nothing is signed where it says no.
    pub show: &'a (dyn Fn(&str) -> bool + Sync),
    /// Given the signed extrinsic, to be remembered; nothing is sent where it says no.
    pub signed: &'a (dyn Fn(&SentWeights) -> bool + Sync),
}

/// The calls that set weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    /// `set_weights`.
    Set,
    /// `set_mechanism_weights`.
    SetMechanism,
    /// `commit_timelocked_weights`.
    Commit,
    /// `commit_timelocked_mechanism_weights`.
    CommitMechanism,
    /// `commit_crv3_weights`, of runtimes before August 2025.
    CommitCrv3,
}

impl Call {
    /// Its name on the chain.
    pub fn name(self) -> &'static str {
        match self {
            Self::Set => "set_weights",
            Self::SetMechanism => "set_mechanism_weights",
            Self::Commit => "commit_timelocked_weights",
            Self::CommitMechanism => "commit_timelocked_mechanism_weights",
            Self::CommitCrv3 => "commit_crv3_weights",
        }
    }
}

/// An extrinsic with weights that was signed, and what is needed to look for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SentWeights {
    /// The number of the subnet.
    pub netuid: u16,
    /// The mechanism of the subnet.
    pub mechanism: u8,
    /// The hotkey that sets the weights.
    pub hotkey: Hotkey,
    /// The weight of each uid.
    pub vector: Vector,
    /// The extrinsic's hash: 64 hexadecimal digits after `0x`.
    pub hash: String,
    /// The call of the extrinsic.
    pub call: Call,
    /// The final block at which it was signed: it is in none before.
    pub block: u64,
    /// The last block that may contain it.
    pub until: u64,
    /// The drand round that reveals it, where it is a commit.
    pub reveal_round: Option<u64>,
}

/// Why weights are not known to be set.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum SendError {
    /// A rule of the chain is not met; nothing was sent.
    #[error("weights are not sent: {0}")]
    Unmet(#[from] Unmet),
    /// The chain could not be asked, so nothing was sent; or it refused the extrinsic for certain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It was sent, and whether it is in a block is not known. Nothing may be sent again before its
    /// last block is past: then what stands on the chain tells.
    #[error(
        "the extrinsic {} was sent and may be in a block up to {}: {why}", sent.hash, sent.until
    )]
    Uncertain {
        /// The weights that were sent.
        sent: Box<SentWeights>,
        /// The reason, in words.
        why: String,
    },
}

impl SendError {
    /// Whether a new extrinsic may be sent later without anybody doing anything. Never where the
    /// last one may have arrived.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unmet(unmet) => unmet.is_passing(),
            Self::Chain(ChainError::Refused(refusal)) => refusal.is_passing(),
            Self::Chain(e) => e.is_passing(),
            Self::Uncertain { .. } => false,
        }
    }
}

/// What stands on the chain for what was sent.
#[derive(Clone, PartialEq, Debug)]
pub enum ReadBack {
    /// The chain holds the weights as they were sent, since then.
    Confirmed,
    /// The commit waits for its revelation.
    Waiting {
        /// The epoch in which it was committed.
        epoch: u64,
        /// Epochs after that in which it is revealed.
        period: u64,
    },
    /// The chain holds other weights.
    Differs {
        /// Those that stand there, by ascending uid.
        found: Vec<(u16, u16)>,
    },
    /// The chain has nothing of it.
    NotThere {
        /// One sentence.
        why: String,
        /// Whether its last block is still to come, so that it may yet arrive.
        may_come: bool,
    },
    /// The chain could not be asked, so nothing is concluded.
    Unreadable(ChainError),
}

/// What was read for [`ReadBack::of`], at one block.
#[derive(Clone, PartialEq, Debug)]
pub struct ChainFacts {
    /// The block at which it was read.
    pub block: u64,
    /// The hotkey's place, where it is registered.
    pub uid: Option<u16>,
    /// Block of its last weights or commit.
    pub last_update: u64,
    /// What stands in `Weights`.
    pub weights: Vec<(u16, u16)>,
    /// The epoch of the commit with the same reveal round, where one still waits.
    pub commit_epoch: Option<u64>,
    /// Epochs after which commits are revealed.
    pub period: u64,
}

impl ReadBack {
    /// What was found, for what was sent.
    pub fn of(sent: &SentWeights, found: ChainFacts) -> Self {
        let may_come = found.block <= sent.until;
        let not_there = |why: String| Self::NotThere { why, may_come };
        let ChainFacts { block, last_update, mut weights, period, .. } = found;
        if found.uid.is_none() {
            let (hotkey, netuid) = (sent.hotkey, sent.netuid);
            let why = format!("the hotkey {hotkey} is not registered on subnet {netuid}");
            return Self::NotThere { why, may_come: false };
        }
        if let Some(epoch) = found.commit_epoch.filter(|_| sent.reveal_round.is_some()) {
            return Self::Waiting { epoch, period };
        }
        if last_update <= sent.block {
            return not_there(format!(
                "at block {block} the hotkey's last weights are of block {last_update}, and these \
                 were signed at {}",
                sent.block
            ));
        }
        weights.sort_unstable();
        if weights == sent.vector.values() {
            return Self::Confirmed;
        }
        match sent.reveal_round {
            // What was there before the commit, or nothing: the chain revealed nothing.
            Some(round) => {
                let why = format!(
                    "the commit for drand round {round} is gone at block {block}, and the chain \
                     holds other weights: it was not revealed"
                );
                Self::NotThere { why, may_come: false }
            }
            None if weights.is_empty() => not_there(format!("no weights stand at block {block}")),
            None => Self::Differs { found: weights },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(reveal_round: Option<u64>) -> SentWeights {
        SentWeights {
            netuid: 4,
            mechanism: 0,
            hotkey: Hotkey([7; 32]),
            vector: Vector::new(vec![(1, 9), (2, 65_535)]).unwrap(),
            hash: "0x00".into(),
            call: Call::Set,
            block: 100,
            until: 132,
            reveal_round,
        }
    }

    fn found() -> ChainFacts {
        let weights = vec![(2, 65_535), (1, 9)];
        ChainFacts {
            block: 110,
            uid: Some(3),
            last_update: 102,
            weights,
            commit_epoch: None,
            period: 1,
        }
    }

    #[test]
    fn what_stands_is_compared_with_what_was_sent() {
        let why = |read: ReadBack| match read {
            ReadBack::NotThere { why, .. } => why,
            other => panic!("{other:?}"),
        };
        let read_back = |found: ChainFacts| ReadBack::of(&sent(None), found);
        assert_eq!(read_back(found()), ReadBack::Confirmed);
        // The same numbers from before it was signed are not these.
        assert!(why(read_back(ChainFacts { last_update: 100, ..found() })).contains("block 100"));
        let late = ReadBack::of(&sent(None), ChainFacts { last_update: 9, block: 133, ..found() });
        assert!(matches!(late, ReadBack::NotThere { may_come: false, .. }), "{late:?}");
        assert!(why(read_back(ChainFacts { uid: None, ..found() })).contains("not registered"));
        assert!(why(read_back(ChainFacts { weights: vec![], ..found() })).contains("no weights"));
        let other = vec![(2, 65_535)];
        let differs = ReadBack::Differs { found: other.clone() };
        assert_eq!(read_back(ChainFacts { weights: other.clone(), ..found() }), differs);
        let waiting = ChainFacts { commit_epoch: Some(8), weights: other.clone(), ..found() };
        let committed = ReadBack::of(&sent(Some(1000)), waiting.clone());
        assert_eq!(committed, ReadBack::Waiting { epoch: 8, period: 1 });
        let gone = ChainFacts { commit_epoch: None, ..waiting };
        assert!(why(ReadBack::of(&sent(Some(1000)), gone)).contains("was not revealed"));
        assert_eq!(ReadBack::of(&sent(Some(1000)), found()), ReadBack::Confirmed);
    }
}
