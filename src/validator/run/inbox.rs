//! Defines the messages to the task that owns a validator's state, and the running rounds.

use super::emission::Settled;
use super::reading::SubnetError;
use super::residents::Hold;
use super::subnet::Subnet;
use crate::store::Removed;
use crate::validator::eligible::Member;
use crate::validator::round::{RoundEvent, RoundMachine};
use std::collections::BTreeMap;
use tokio::task::JoinSet;

/// What a panic in a port is called: it is a fault of this program, never of a miner.
pub(super) const BROKE: &str = "a part of the validator broke; the log says where";

/// A report to the owner of the state.
pub(super) enum DriverMessage {
    /// An event of a round.
    Round(u64, RoundEvent),
    /// The subnet was read; nothing where the epoch that is due has not begun.
    Subnet(Result<Option<Box<Subnet>>, SubnetError>),
    /// The weights of an epoch were settled.
    Weights(u64, anyhow::Result<Settled>),
    /// The block at which the newest weights were decided that were read back from the chain.
    Confirmed(u64),
    /// Models were loaded in turn.
    Rotated(anyhow::Result<()>),
    /// Requests of users were scored, so many.
    Pulled(anyhow::Result<usize>),
    /// Old records were deleted.
    Tidied(anyhow::Result<Removed>),
    /// The weights that would be set now, if they are known.
    ToCome(Option<Vec<(u16, u16)>>),
}

/// A running round.
pub(super) struct LiveRound {
    pub(super) machine: RoundMachine,
    pub(super) block: u64,
    pub(super) members: BTreeMap<u16, Member>,
    /// What runs for it; ended when dropped.
    pub(super) tasks: JoinSet<()>,
    /// Keeps its model in memory.
    _hold: Hold,
}

impl LiveRound {
    pub(super) fn new(machine: RoundMachine, block: u64, members: &[Member], hold: Hold) -> Self {
        let members = members.iter().map(|member| (member.uid, *member)).collect();
        Self { machine, block, members, tasks: JoinSet::new(), _hold: hold }
    }
}
