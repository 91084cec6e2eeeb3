//! Decides which hotkeys may send requests: members with enough stake, and the operator's
//! exceptions.

use super::{Gate, Refused, SignedOutcome};
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{Neuron, Rao};
use axum::http::StatusCode;
use std::fmt;

/// What a member must have to ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AdmissionRule {
    /// Being a member is enough.
    Member,
    /// Members with at least this stake.
    Stake(Rao),
    /// This much stake, as far as it is known, or the validator permit, which the chain gives for
    /// stake: the metagraph came from storage, where a part of the stake is missing.
    StakeOrPermit(Rao),
}

impl AdmissionRule {
    /// The refusal of a member that does not keep it.
    fn refusal(self, neuron: &Neuron) -> Option<String> {
        let has = neuron.stake.tao();
        match self {
            AdmissionRule::Stake(floor) if neuron.stake < floor => {
                Some(format!("Stake below minimum: {has} TAO, at least {}", floor.tao()))
            }
            AdmissionRule::StakeOrPermit(floor) if neuron.stake < floor && !neuron.permit => {
                Some(format!(
                    "Stake below minimum: {has} TAO are known, at least {} or a validator permit",
                    floor.tao()
                ))
            }
            _ => None,
        }
    }
}

impl fmt::Display for AdmissionRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdmissionRule::Member => f.write_str("members"),
            AdmissionRule::Stake(floor) => write!(f, "members with {} TAO of stake", floor.tao()),
            AdmissionRule::StakeOrPermit(floor) => {
                let floor = floor.tao();
                write!(f, "members with {floor} TAO of stake or a validator permit")?;
                f.write_str(" (not all stake is known: the metagraph is read from storage)")
            }
        }
    }
}

impl Gate {
    /// The rule in force.
    pub fn rule(&self) -> AdmissionRule {
        match self.0.policy.stake_min {
            None => AdmissionRule::Member,
            Some(floor) if self.0.metagraph.read().is_stake_partial => {
                AdmissionRule::StakeOrPermit(floor)
            }
            Some(floor) => AdmissionRule::Stake(floor),
        }
    }

    /// The signer's key, where it may ask.
    pub(super) fn member(&self, address: Option<&str>) -> Result<Hotkey, Refused> {
        let unauthorized =
            |outcome, detail: String| Refused::new(StatusCode::UNAUTHORIZED, outcome, detail);
        let unknown =
            || unauthorized(SignedOutcome::UnknownSigner, "Signer not in metagraph".to_owned());
        let signer: Hotkey = address.and_then(|a| a.parse().ok()).ok_or_else(unknown)?;
        if self.0.policy.deny.contains(&signer) {
            let detail = "Signer is denied by this miner".to_owned();
            return Err(unauthorized(SignedOutcome::UnknownSigner, detail));
        }
        if self.0.policy.allow.contains(&signer) {
            return Ok(signer);
        }
        let rule = self.rule();
        let metagraph = self.0.metagraph.read();
        let neuron = metagraph.neuron(&signer).ok_or_else(unknown)?;
        match rule.refusal(neuron) {
            Some(detail) => Err(unauthorized(SignedOutcome::LowStake, detail)),
            None => Ok(signer),
        }
    }
}
