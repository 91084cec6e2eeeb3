//! Examines the chain's endpoints, and how a hotkey stands on a subnet.

use super::{Finding, Level};
use crate::chain::Chain;
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{Metagraph, Neuron};
use crate::chain::network::Endpoints;
use crate::chain::subtensor::Subtensor;
use crate::clock::Clock;
use crate::server::door::STAKE_MIN;
use std::time::Duration;

/// How long an endpoint may take.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Asks every endpoint for the subnet; gives the newest metagraph.
pub async fn endpoints(
    endpoints: &Endpoints,
    netuid: u16,
    clock: &Clock,
) -> (Option<Metagraph>, Vec<Finding>) {
    let (mut newest, mut findings): (Option<Metagraph>, _) = (None, Vec::new());
    for url in &endpoints.urls {
        let one = Endpoints { urls: vec![url.clone()], timeout: TIMEOUT, ..endpoints.clone() };
        let started = clock.elapsed();
        let chain = Subtensor::new(one);
        let answer = tokio::time::timeout(2 * TIMEOUT, chain.metagraph(netuid)).await;
        let took = (clock.elapsed() - started).as_millis();
        let finding = match answer {
            Ok(Ok(metagraph)) => {
                let (n, block) = (metagraph.neurons().len(), metagraph.block);
                let fact = format!("subnet {netuid} has {n} members at block {block} ({took} ms)");
                if newest.as_ref().is_none_or(|m| m.block < block) {
                    newest = Some(metagraph);
                }
                Finding::new("chain", Level::Ok, fact)
            }
            Ok(Err(e)) => Finding::new("chain", Level::Warning, e.to_string()),
            Err(_) => {
                let fact = format!("an endpoint gives no answer in {} s", 2 * TIMEOUT.as_secs());
                Finding::new("chain", Level::Warning, fact)
            }
        };
        findings.push(finding);
    }
    if newest.is_none() {
        let fact = "no endpoint of the chain can be used";
        findings.push(
            Finding::new("chain", Level::Fault, fact)
                .hint("name one by --subtensor.network or --subtensor.chain_endpoint"),
        );
    }
    (newest, findings)
}

/// Registration, stake and axon of `hotkey` as the metagraph has them.
pub fn registration(metagraph: &Metagraph, hotkey: &Hotkey) -> Vec<Finding> {
    let netuid = metagraph.netuid;
    let Some(neuron) = metagraph.neuron(hotkey) else {
        let fact = format!("{hotkey} is not registered on subnet {netuid}");
        return vec![
            Finding::new("registration", Level::Fault, fact)
                .hint(format!("btcli subnets register --netuid {netuid}")),
        ];
    };
    let fact = format!("uid {} on subnet {netuid}, incentive {}", neuron.uid, neuron.incentive);
    vec![Finding::new("registration", Level::Ok, fact), stake(neuron), axon(neuron)]
}

/// Stake matters to whoever asks miners: they refuse validators with little of it.
fn stake(neuron: &Neuron) -> Finding {
    let (stake, least) = (neuron.stake, STAKE_MIN);
    let permit = if neuron.permit { "a" } else { "no" };
    let fact = format!("{} TAO, {permit} validator permit", stake.tao());
    match neuron.permit && stake < least {
        true => Finding::new("stake", Level::Warning, fact)
            .hint(format!("miners answer validators from {} TAO on", least.tao())),
        false => Finding::new("stake", Level::Ok, fact),
    }
}

fn axon(neuron: &Neuron) -> Finding {
    match &neuron.axon {
        Some(axon) => {
            let fact = format!("{} is announced on chain", axon.address);
            Finding::new("axon", Level::Ok, fact)
        }
        None => Finding::new("axon", Level::Note, "no address is announced on chain")
            .hint("`serve` announces it; a validator needs none"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::metagraph::{Axon, Hyperparameters, Rao};

    fn neuron(uid: u16, stake: u64, permit: bool) -> Neuron {
        let hotkey = Hotkey([uid as u8 + 1; 32]);
        let axon = Axon::from_chain(0x7f00_0001, 8091, 4, 1, 4);
        Neuron { permit, axon, incentive: 0.5, ..Neuron::new(uid, hotkey, Rao(stake)) }
    }

    #[test]
    fn strangers_and_poor_validators_are_told() {
        let members = vec![neuron(0, 5_000_000_000, true), neuron(1, 5_000_000_000, false)];
        let metagraph = Metagraph::new(4, 7, Hyperparameters::default(), members);
        let stranger = registration(&metagraph, &Hotkey([9; 32]));
        assert!(stranger.len() == 1 && stranger[0].level == Level::Fault, "{stranger:?}");
        let levels = |uid: u8| {
            let found = registration(&metagraph, &Hotkey([uid + 1; 32]));
            found.into_iter().map(|f| f.level).collect::<Vec<_>>()
        };
        assert_eq!(levels(0), [Level::Ok, Level::Warning, Level::Ok]);
        assert_eq!(levels(1), [Level::Ok, Level::Ok, Level::Ok]);
    }

    #[tokio::test]
    async fn a_chain_that_is_not_there_is_a_fault() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        drop(listener);
        let network = crate::chain::network::Network::Local;
        let all = Endpoints::new(network, &[url]).unwrap();
        let (metagraph, findings) = endpoints(&all, 4, &Clock::system()).await;
        assert!(metagraph.is_none());
        let levels: Vec<Level> = findings.iter().map(|f| f.level).collect();
        assert_eq!(levels, [Level::Warning, Level::Fault], "{findings:?}");
    }
}
