//! Defines the state that a live view of a running validator shows, as plain data: the driver
//! publishes it, a terminal draws it.

use super::inbox::LiveRound;
use super::subnet::Subnet;
use crate::store::record::{EpochWeights, Outcome, Round, Timing, WeightsState};
use crate::validator::round::{MinerState, RoundPhase};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::watch;

/// A validator at one moment.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct View {
    /// The number of the subnet.
    pub netuid: u16,
    /// The uid of this validator.
    pub own: u16,
    /// The number of the newest block that is known.
    pub block: u64,
    /// The first block of the epoch, and how many it has.
    pub epoch: (u64, u64),
    /// Rounds that have ended.
    pub ended: u64,
    /// Rounds that are over and not remembered yet.
    pub unsaved: usize,
    /// Whether it was told to stop.
    pub is_stopping: bool,
    /// Rounds that run, the oldest first.
    pub rounds: Vec<RunningRound>,
    /// Who can be asked, by uid.
    pub miners: BTreeMap<u16, MinerView>,
    /// The last weights that were settled in this run: epoch, and how far they are.
    pub weights: Option<(u64, WeightsState)>,
    /// What weights would be by what is remembered now; the largest is 65,535.
    pub to_come: BTreeMap<u16, u16>,
}

/// A running round.
#[derive(Clone, PartialEq, Debug)]
pub struct RunningRound {
    /// The id of the round: 32 hexadecimal digits.
    pub id: String,
    /// The model that it asks for.
    pub model: String,
    /// The block at which it began.
    pub block: u64,
    /// What the round waits for.
    pub phase: RoundPhase,
}

/// What is known of a miner.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct MinerView {
    /// Its hotkey, as SS58.
    pub hotkey: String,
    /// Where it is in the newest round that asks it.
    pub state: Option<MinerState>,
    /// What became of its last answer.
    pub last: Option<Last>,
    /// Answers of this run by outcome.
    pub counts: BTreeMap<&'static str, u64>,
}

/// A miner's last answer.
#[derive(Clone, PartialEq, Debug)]
pub struct Last {
    /// When the answer's parts arrived.
    pub timing: Timing,
    /// What verification found of the answer.
    pub outcome: Outcome,
    /// Its cause, as it was reported.
    pub cause: Option<String>,
}

/// Publishes the newest view to all who subscribe.
pub(super) struct Publisher {
    sender: watch::Sender<Arc<View>>,
    known: BTreeMap<u16, MinerView>,
    weights: Option<(u64, WeightsState)>,
    to_come: BTreeMap<u16, u16>,
    /// Whether something was remembered since the last forecast, and one is under way.
    pub(super) is_outdated: bool,
    pub(super) is_deciding: bool,
}

impl Default for Publisher {
    fn default() -> Self {
        Self {
            sender: watch::Sender::default(),
            known: BTreeMap::new(),
            weights: None,
            to_come: BTreeMap::new(),
            is_outdated: true,
            is_deciding: false,
        }
    }
}

impl Publisher {
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.sender.subscribe()
    }

    pub(super) fn is_watched(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    pub(super) fn end_round(&mut self, round: &Round) {
        for response in &round.responses {
            let known = self.known.entry(response.uid).or_default();
            if known.hotkey != response.hotkey {
                *known = MinerView { hotkey: response.hotkey.clone(), ..MinerView::default() };
            }
            *known.counts.entry(response.outcome.name()).or_default() += 1;
            let (timing, outcome) = (response.timing, response.outcome);
            known.last = Some(Last { timing, outcome, cause: response.cause.clone() });
        }
        self.is_outdated = true;
    }

    pub(super) fn set_weights(&mut self, weights: &EpochWeights) {
        self.weights = Some((weights.epoch, weights.state.clone()));
    }

    /// Takes the weights to come; where they could not be decided, the last ones stay.
    pub(super) fn set_to_come(&mut self, values: Option<Vec<(u16, u16)>>) {
        self.is_deciding = false;
        if let Some(values) = values {
            self.to_come = values.into_iter().collect();
        }
    }

    /// Publishes `view` with what is known of everyone in it.
    pub(super) fn publish<'a>(
        &self,
        mut view: View,
        subnet: &Subnet,
        live: impl Iterator<Item = &'a LiveRound>,
    ) {
        view.own = subnet.own;
        view.weights.clone_from(&self.weights);
        view.to_come.clone_from(&self.to_come);
        for member in &subnet.members {
            let hotkey = member.hotkey.to_string();
            let known = self.known.get(&member.uid).filter(|known| known.hotkey == hotkey);
            let unknown = || MinerView { hotkey: hotkey.clone(), ..MinerView::default() };
            view.miners.insert(member.uid, known.cloned().unwrap_or_else(unknown));
        }
        for live in live {
            let (id, model) = live.machine.name();
            let phase = live.machine.phase();
            view.rounds.push(RunningRound { id, model, block: live.block, phase });
            for (uid, state) in live.machine.miner_states() {
                if let Some(miner) = view.miners.get_mut(&uid) {
                    miner.state = Some(state);
                }
            }
        }
        self.sender.send_replace(Arc::new(view));
    }
}
