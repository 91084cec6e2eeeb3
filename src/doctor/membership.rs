//! Examines the chain's endpoints, and how a hotkey stands on a subnet.

use super::{Finding, Level};
use crate::chain::Chain;
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::{Metagraph, Neuron};
use crate::chain::network::Endpoints;
use crate::chain::subtensor::Subtensor;
use crate::clock::Clock;
use crate::endpoint::shown;
use crate::server::door::STAKE_MIN;
use std::net::SocketAddr;
use std::time::Duration;

const ENDPOINT_ADVICE: &str = "name one by --subtensor.network or --subtensor.chain_endpoint";
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
        let place = shown(url);
        let started = clock.elapsed();
        let chain = Subtensor::new(one);
        let answer = tokio::time::timeout(2 * TIMEOUT, chain.metagraph(netuid)).await;
        let took = (clock.elapsed() - started).as_millis();
        let finding = match answer {
            Ok(Ok(metagraph)) => {
                let (n, block) = (metagraph.neurons().len(), metagraph.block);
                let fact = format!(
                    "{place}: subnet {netuid} has {n} members at block {block} ({took} ms)"
                );
                if newest.as_ref().is_none_or(|m| m.block < block) {
                    newest = Some(metagraph);
                }
                Finding::new("chain", Level::Ok, fact)
            }
            Ok(Err(e)) => {
                Finding::new("chain", Level::Warning, format!("{place}: {e}")).hint(ENDPOINT_ADVICE)
            }
            Err(_) => {
                let fact = format!("{place} gives no answer in {} s", 2 * TIMEOUT.as_secs());
                Finding::new("chain", Level::Warning, fact).hint(ENDPOINT_ADVICE)
            }
        };
        findings.push(finding);
    }
    if newest.is_none() {
        let fact = "no endpoint of the chain can be used";
        findings.push(Finding::new("chain", Level::Fault, fact).hint(ENDPOINT_ADVICE));
    }
    (newest, findings)
}

/// Registration, stake and axon of `hotkey` as the metagraph has them; `external` is the address
/// that a miner here would announce.
pub fn registration(
    metagraph: &Metagraph,
    hotkey: &Hotkey,
    external: Option<SocketAddr>,
) -> Vec<Finding> {
    let netuid = metagraph.netuid;
    let Some(neuron) = metagraph.neuron(hotkey) else {
        let fact = format!("{hotkey} is not registered on subnet {netuid}");
        return vec![
            Finding::new("registration", Level::Fault, fact)
                .hint(format!("btcli subnets register --netuid {netuid}")),
        ];
    };
    let fact = format!("uid {} on subnet {netuid}, incentive {}", neuron.uid, neuron.incentive);
    let stake = stake(neuron, metagraph.is_stake_partial);
    vec![Finding::new("registration", Level::Ok, fact), stake, axon(neuron, external)]
}

/// Stake matters to validators: miners refuse those with little of it.
fn stake(neuron: &Neuron, is_partial: bool) -> Finding {
    let (stake, least) = (neuron.stake, STAKE_MIN);
    let permit = if neuron.permit { "a" } else { "no" };
    // Then miners admit by permit.
    let known = if is_partial { ", as far as the endpoint says" } else { "" };
    let fact = format!("{} TAO{known}, {permit} validator permit", stake.tao());
    match neuron.permit && stake < least && !is_partial {
        true => Finding::new("stake", Level::Warning, fact)
            .hint(format!("miners answer validators from {} TAO on", least.tao())),
        false => Finding::new("stake", Level::Ok, fact),
    }
}

fn axon(neuron: &Neuron, external: Option<SocketAddr>) -> Finding {
    match (&neuron.axon, external) {
        (Some(axon), Some(external)) if axon.address != external => {
            let fact = format!("{} is announced on chain, {external} is here", axon.address);
            Finding::new("axon", Level::Note, fact).hint(
                "`serve` announces the address of its own flags; another machine's may still be \
                 right",
            )
        }
        (Some(axon), _) => {
            let fact = format!("{} is announced on chain", axon.address);
            Finding::new("axon", Level::Ok, fact)
        }
        (None, _) => Finding::new("axon", Level::Note, "no address is announced on chain")
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
        let stranger = registration(&metagraph, &Hotkey([9; 32]), None);
        assert!(stranger.len() == 1 && stranger[0].level == Level::Fault, "{stranger:?}");
        let levels = |uid: u8| {
            let found = registration(&metagraph, &Hotkey([uid + 1; 32]), None);
            found.into_iter().map(|f| f.level).collect::<Vec<_>>()
        };
        assert_eq!(levels(0), [Level::Ok, Level::Warning, Level::Ok]);
        assert_eq!(levels(1), [Level::Ok, Level::Ok, Level::Ok]);
        let here: SocketAddr = "127.0.0.1:8091".parse().unwrap();
        let axon = |external| registration(&metagraph, &Hotkey([1; 32]), Some(external)).remove(2);
        assert_eq!(axon(here).level, Level::Ok);
        let moved = axon("127.0.0.1:8092".parse().unwrap());
        assert!(moved.level == Level::Note && moved.fact.contains("8092 is here"), "{moved:?}");
        let partial = metagraph.clone().with_partial_stake();
        let stake = registration(&partial, &Hotkey([1; 32]), None).remove(1);
        assert!(stake.level == Level::Ok && stake.fact.contains("as far as"), "{stake:?}");
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
        assert!(findings.iter().all(|f| f.hint.is_some()), "{findings:?}");
        assert!(findings[0].fact.contains("127.0.0.1"), "{findings:?}");
    }
}
