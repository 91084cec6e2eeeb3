//! Holds the subnet as a running validator knows it.

use crate::chain::metagraph::Metagraph;
use crate::validator::eligible::Member;
use crate::validator::round::Candidate;
use std::collections::{BTreeMap, BTreeSet};

/// Who is there, and who serves what.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Subnet {
    /// As the chain has it.
    pub metagraph: Metagraph,
    /// The uid of this validator.
    pub own: u16,
    /// Those that can be asked.
    pub members: Vec<Member>,
    /// What they say that they serve, by uid.
    pub models: BTreeMap<u16, BTreeSet<String>>,
}

impl Subnet {
    /// Whether nobody serves anything, so that no round can be held.
    pub fn is_idle(&self) -> bool {
        self.models.values().all(BTreeSet::is_empty)
    }

    /// The miners of a round.
    pub fn miners(&self) -> Vec<Candidate> {
        let miner = |member: &Member| Candidate {
            uid: member.uid,
            hotkey: member.hotkey.to_string(),
            coldkey: member.coldkey.to_string(),
            models: self.models.get(&member.uid).cloned().unwrap_or_default(),
        };
        self.members.iter().map(miner).collect()
    }
}
