//! Defines the interface of a running validator to everything outside: the chain, miners, the
//! engine, and its records.
//!
//! A test can replace all of it by another implementation of [`Ports`]. [`super::world`] has the
//! real one.

use super::residents::Hold;
use super::subnet::Subnet;
use crate::chain::Head;
use crate::chain::error::ChainError;
use crate::chain::metagraph::Metagraph;
use crate::store::Removed;
use crate::store::record::{EpochWeights, Round, WeightsState};
use crate::validator::eligible::Member;
use crate::validator::round::ask::{Endpoint, QueryPrompt};
use crate::validator::round::{AnswerReport, Answered, Offer};
use serde_json::Value;
use std::future::Future;
use std::sync::Arc;

/// One query, as a round wants it.
#[derive(Clone, PartialEq, Debug)]
pub struct MinerQuery {
    /// The miner that is asked.
    pub member: Member,
    /// The path of the request.
    pub path: &'static str,
    /// The body of the request.
    pub body: Value,
    /// Tokens that it may answer.
    pub max_tokens: u32,
}

/// An answer that is to be checked.
#[derive(Clone, PartialEq, Debug)]
pub struct AnswerToCheck {
    /// The model that was asked for.
    pub model: String,
    /// The miner that answered.
    pub member: Member,
    /// The id of the round that asked.
    pub round: String,
    /// The block at which the round began.
    pub block: u64,
    /// The request with the answer.
    pub capture: Arc<Value>,
    /// Whether every row is looked at.
    pub is_slow: bool,
}

/// Weights that were decided, or why there are none.
#[derive(Clone, PartialEq, Debug)]
pub struct Decided {
    /// Uids with their weights; empty if there are none.
    pub values: Vec<(u16, u16)>,
    /// Why there are no weights.
    pub none: Option<String>,
    /// How each number came about.
    pub explanation: Value,
}

/// Why weights are not sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotSent {
    /// Nothing was sent, and the same may be sent later.
    Later(String),
    /// Nothing was sent, and only an operator can change that.
    Never(String),
    /// They were remembered as sent, and may have been: what stands on the chain tells, some blocks
    /// later.
    Unknown(String),
}

/// What stands on the chain for weights that were decided.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stand {
    /// The weights are on the chain.
    Confirmed,
    /// A commit of them waits for its revelation.
    Waiting,
    /// This validator's last weights are newer than these, and others.
    Others(Vec<(u16, u16)>),
    /// None of them are on the chain, for this reason.
    NotThere(String),
}

/// Everything outside a running validator. Every wait in it has a limit.
pub trait Ports: Send + Sync + 'static {
    /// The subnet as of now.
    fn metagraph(&self) -> impl Future<Output = Result<Metagraph, ChainError>> + Send;

    /// Follows the chain, as [`crate::chain::Chain::follow`] does.
    fn follow(
        &self,
        on_head: &(dyn Fn(Head) -> bool + Sync),
    ) -> impl Future<Output = Result<(), ChainError>> + Send;

    /// The last answer of the chain was not plausible: the next one is asked of another endpoint.
    fn doubt(&self) -> impl Future<Output = ()> + Send;

    /// Sends weights, once, and waits until the chain has taken them. They are remembered as sent
    /// before they are sent, and not sent where that fails.
    fn send(
        &self,
        weights: &EpochWeights,
    ) -> impl Future<Output = Result<WeightsState, NotSent>> + Send;

    /// What stands on the chain for weights.
    fn look_up(&self, weights: &EpochWeights)
    -> impl Future<Output = anyhow::Result<Stand>> + Send;

    /// Reads again the list of models that miners are told.
    fn list(&self) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Tells a miner which models are asked for, and asks which ones it serves.
    fn models(&self, member: &Member) -> impl Future<Output = anyhow::Result<Vec<String>>> + Send;

    /// Sends one query to a miner and waits until its answer has ended.
    fn ask(&self, query: MinerQuery) -> impl Future<Output = Answered> + Send;

    /// The models that can be verified now.
    fn offers(&self) -> Vec<Offer>;

    /// Loads the models whose turn it is; rounds may continue meanwhile.
    fn rotate(&self) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Keeps a model in memory as long as what is returned.
    fn hold(&self, model: &str) -> Hold;

    /// Draws a prompt for a model, and has it written where prompts are rewritten.
    fn prompt(
        &self,
        model: &str,
        endpoint: Endpoint,
    ) -> impl Future<Output = anyhow::Result<QueryPrompt>> + Send;

    /// Verifies an answer, and adds what it shows to the evidence about its miner.
    fn verify(&self, case: AnswerToCheck) -> impl Future<Output = AnswerReport> + Send;

    /// Stores a round: once it returns, nothing of the round can be lost. Saving the same round
    /// again changes nothing.
    fn save(&self, round: &Round) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Scores requests of users, where a hub hands them out; returns how many counted.
    fn pull(&self, subnet: &Subnet) -> impl Future<Output = anyhow::Result<usize>> + Send;

    /// Whether rounds are to be reported.
    fn wants_reports(&self) -> bool;

    /// Sends the statistics of a round that has ended to the hub.
    fn report(&self, round: &Round) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Deletes records that are older than the operator wants them kept.
    fn tidy(&self) -> impl Future<Output = anyhow::Result<Removed>> + Send;

    /// Decides weights from the stored records.
    fn decide(&self, subnet: &Subnet) -> impl Future<Output = anyhow::Result<Decided>> + Send;

    /// The weights that are stored for an epoch.
    fn planned(
        &self,
        epoch: u64,
    ) -> impl Future<Output = anyhow::Result<Option<EpochWeights>>> + Send;

    /// The weights that were sent or committed and whose end is not known yet, oldest first.
    fn unfinished(&self) -> impl Future<Output = anyhow::Result<Vec<EpochWeights>>> + Send;

    /// The newest weights that were read back from the chain.
    fn confirmed(&self) -> impl Future<Output = anyhow::Result<Option<EpochWeights>>> + Send;

    /// Remembers weights that were decided, in place of those that were decided for the same epoch
    /// and not sent. Where those have gone further, says how far: nothing is to be sent then.
    fn plan(
        &self,
        weights: &EpochWeights,
    ) -> impl Future<Output = anyhow::Result<Option<WeightsState>>> + Send;

    /// Stores the state of an epoch's weights.
    fn mark(
        &self,
        epoch: u64,
        state: &WeightsState,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}
