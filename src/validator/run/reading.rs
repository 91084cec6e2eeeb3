//! Reads the subnet every epoch: its members, which of them may be asked, and which models they
//! serve.

use super::ports::Ports;
use super::subnet::Subnet;
use crate::chain::error::ChainError;
use crate::chain::metagraph::Metagraph;
use crate::chain::pace::{self, Doubt, Pace};
use crate::clock::Clock;
use crate::validator::eligible::{self, Member, MinerRules, NoPermit};
use crate::wire::models::LIST_MODELS_MAX;
use futures_util::StreamExt;
use futures_util::stream;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};

/// Miners that are asked for their models at once.
const LISTS_MAX: usize = 32;
/// Where so many miners were asked and none answered, the network is the validator's own trouble.
const ALONE_MIN: usize = 4;

/// How a subnet is read.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ReadingTerms {
    /// Who can be asked.
    pub rules: MinerRules,
    /// Whether this validator needs a permit.
    pub is_permit_needed: bool,
}

/// Why there is no subnet to validate on.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum SubnetError {
    /// What the chain's endpoints say is not believed.
    #[error("the metagraph is not taken: {0}")]
    Doubted(#[from] Doubt),
    /// The chain cannot be asked.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// This validator may not validate.
    #[error(transparent)]
    NoPermit(#[from] NoPermit),
    /// A part of the validator broke.
    #[error("{0}")]
    Broke(&'static str),
}

impl SubnetError {
    /// Whether it passes by itself.
    pub fn is_passing(&self) -> bool {
        match self {
            SubnetError::Doubted(_) | SubnetError::Broke(_) => true,
            SubnetError::Chain(e) => e.is_passing(),
            SubnetError::NoPermit(_) => false,
        }
    }
}

/// The subnet of a metagraph that is newer than `before`: every miner is asked for its models.
///
/// # Errors
/// When this validator may not validate.
pub(super) async fn read<P: Ports>(
    ports: &P,
    reading: ReadingTerms,
    metagraph: Metagraph,
    before: &Subnet,
) -> Result<Subnet, SubnetError> {
    let ReadingTerms { rules, is_permit_needed } = reading;
    let own = eligible::validator(&metagraph, &rules.own, is_permit_needed)?;
    let members = rules.members(&metagraph);
    if let Err(e) = ports.list().await {
        tracing::warn!("the list of models could not be read again: {e}");
    }
    let models = list_models(ports, &members, before).await;
    Ok(Subnet { metagraph, own, members, models })
}

/// The first subnet.
///
/// # Errors
/// When this validator may not validate, or the chain cannot be asked or is not believed.
pub(super) async fn read_first<P: Ports>(
    ports: &P,
    reading: ReadingTerms,
    pace: &Mutex<Pace>,
    clock: &Clock,
) -> Result<Subnet, SubnetError> {
    let nobody = Subnet::default();
    let once = || async {
        let metagraph = read_metagraph(ports, 0, pace, clock).await?;
        read(ports, reading, metagraph, &nobody).await
    };
    pace::confirm(once, SubnetError::is_passing, ports.doubt()).await
}

/// The metagraph of an endpoint whose block is believed, and not older than block `before`.
///
/// # Errors
/// When the chain cannot be asked or is not believed.
pub(super) async fn read_metagraph<P: Ports>(
    ports: &P,
    before: u64,
    pace: &Mutex<Pace>,
    clock: &Clock,
) -> Result<Metagraph, SubnetError> {
    let (ask, doubt) = (|| ports.metagraph(), || ports.doubt());
    pace::read_metagraph(pace, (before, clock), ask, doubt).await
}

/// What each miner serves. One that does not answer serves nothing; where none answers, what they
/// said before still holds.
async fn list_models<P: Ports>(
    ports: &P,
    members: &[Member],
    before: &Subnet,
) -> BTreeMap<u16, BTreeSet<String>> {
    let lists = stream::iter(members.to_vec()).map(|member| async move {
        let listed = ports.models(&member).await;
        if let Err(e) = &listed {
            tracing::debug!(uid = member.uid, "lists no models: {e}");
        }
        (member.uid, listed.ok())
    });
    let lists: Vec<(u16, Option<Vec<String>>)> = lists.buffer_unordered(LISTS_MAX).collect().await;
    let answered = lists.iter().filter(|(_, list)| list.is_some()).count();
    tracing::info!(members = members.len(), answered, "models are listed");
    if members.len() >= ALONE_MIN && answered == 0 && !before.members.is_empty() {
        tracing::warn!("no miner answers: their earlier lists of models still count");
        let is_same = |member: &&Member| before.members.contains(member);
        let kept = members.iter().filter(is_same);
        let of = |member: &Member| Some((member.uid, before.models.get(&member.uid)?.clone()));
        return kept.filter_map(of).collect();
    }
    let set = |list: Vec<String>| list.into_iter().take(LIST_MODELS_MAX).collect();
    lists.into_iter().map(|(uid, list)| (uid, list.map(set).unwrap_or_default())).collect()
}
