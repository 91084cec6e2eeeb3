//! The chain client against a node with a real runtime's metadata: what is read, what is signed,
//! what is refused and in which words, and every way in which a connection can fail.

use crate::node;
use crate::node::{FakeNode, Neuron, Outcome, SPEC, Subnet};
use parking_lot::Mutex;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;
use targon_engine::chain::error::{ChainError, ExtrinsicRefusal, ExtrinsicStage};
use targon_engine::chain::keys::{Hotkey, Keypair};
use targon_engine::chain::metagraph::Axon;
use targon_engine::chain::network::{Endpoints, Network};
use targon_engine::chain::pace::DOUBT_MAX;
use targon_engine::chain::subtensor::Subtensor;
use targon_engine::chain::{Chain, Head};
use targon_engine::clock::Clock;
use targon_engine::miner::{Announced, Miner, MinerError, MinerOptions};
use targon_engine::server::door::{Gate, Policy};

pub(crate) const BLOCK: Duration = Duration::from_millis(20);
const TAO: u64 = 1_000_000_000;

pub(crate) fn key(seed: u8) -> Keypair {
    Keypair::from_seed(&[seed; 32]).unwrap()
}

pub(crate) fn subnet() -> Subnet {
    let neuron = |seed: u8, stake: u64, permit| Neuron {
        stake_rao: stake * TAO,
        permit,
        incentive: 13_107,
        ..Neuron::new(key(seed).hotkey().0)
    };
    let mut all = vec![neuron(1, 20_000, true), neuron(2, 7, false), neuron(3, 0, false)];
    all[1].axon = Some(node::Axon::new(Ipv4Addr::new(127, 0, 0, 2), 8091));
    Subnet::new(4, all)
}

fn endpoints(urls: &[String]) -> Endpoints {
    let (timeout, stall) = (Duration::from_secs(5), Duration::from_millis(400));
    let (again, drand) = (5 * BLOCK, node::drand::network());
    Endpoints { timeout, stall, again, drand, ..Endpoints::new(Network::Finney, urls).unwrap() }
}

pub(crate) fn client(nodes: &[&FakeNode]) -> Subtensor {
    let urls: Vec<String> = nodes.iter().map(|node| node.url()).collect();
    Subtensor::new(endpoints(&urls))
}

fn axon(port: u16) -> Axon {
    let address = (Ipv4Addr::new(127, 0, 0, 3), port).into();
    Axon { address, version: 1, protocol: 4 }
}

fn sent(_: &str) -> bool {
    true
}

fn check(metagraph: &targon_engine::chain::metagraph::Metagraph) {
    assert_eq!((metagraph.netuid, metagraph.neurons().len()), (4, 3));
    assert_eq!(metagraph.hyperparameters.tempo, 360);
    let first = metagraph.neuron(&key(1).hotkey()).unwrap();
    assert_eq!((first.uid, first.permit, first.stake.tao()), (0, true, 20_000.0));
    assert!((first.incentive - 0.2).abs() < 1e-4);
    assert_eq!(first.coldkey, Hotkey(key(1).hotkey().0.map(|b| !b)));
    let second = metagraph.uid(1).unwrap();
    assert_eq!(second.axon.unwrap().address.to_string(), "127.0.0.2:8091");
    assert_eq!(metagraph.uid(2).unwrap().axon, None);
    assert!(metagraph.neuron(&key(4).hotkey()).is_none());
}

#[tokio::test]
async fn the_metagraph_is_read_in_one_call_or_from_storage() {
    let node = FakeNode::start(subnet()).await;
    let chain = client(&[&node]);
    check(&chain.metagraph(4).await.unwrap());
    assert_eq!(node.method_counts().get("state_getKeysPaged"), None);
    assert_eq!(chain.metagraph(77).await, Err(ChainError::NoSubnet(77)));
    node.set_runtime_api(false);
    let stored = chain.metagraph(4).await.unwrap();
    check(&stored);
    assert!(stored.is_stake_partial);
    assert!(node.method_counts()["state_getKeysPaged"] > 0);
    assert_eq!(chain.metagraph(77).await, Err(ChainError::NoSubnet(77)));
}

#[tokio::test]
async fn an_axon_is_served_with_the_fields_that_the_chain_expects() {
    let node = FakeNode::start(subnet()).await;
    node.auto_blocks(BLOCK);
    let chain = client(&[&node]);
    let shown = Mutex::new(String::new());
    let show = |words: &str| {
        *shown.lock() = words.to_owned();
        true
    };
    assert!(chain.serve_axon(&key(3), 4, &axon(8091), &show).await.unwrap());
    let words = shown.lock().clone();
    for part in ["SubtensorModule", "serve_axon", "netuid: 4", "port: 8091", "ip_type: 4"] {
        assert!(words.contains(part), "{part} is not in {words}");
    }
    let calls = node.calls();
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].signer, calls[0].name.as_str()), (key(3).hotkey().0, "serve_axon"));
    assert_eq!(calls[0].args["ip"], 0x7f00_0003_u64);
    let standing = chain.metagraph(4).await.unwrap().uid(2).unwrap().axon;
    assert_eq!(standing, Some(axon(8091)));
    // A dry run shows the same and sends nothing.
    assert!(!chain.serve_axon(&key(3), 4, &axon(9000), &|_| false).await.unwrap());
    assert_eq!(node.calls().len(), 1);
    // The next one takes the next number.
    chain.serve_axon(&key(3), 4, &axon(9000), &sent).await.unwrap();
    assert_eq!(node.calls().len(), 2);
}

#[tokio::test]
async fn refusals_of_the_pool_and_of_the_runtime_become_sentences() {
    let node = FakeNode::start(subnet()).await;
    node.auto_blocks(BLOCK);
    let chain = client(&[&node]);
    let refused = |outcome: Outcome| {
        node.set_next(outcome);
        async { chain.serve_axon(&key(3), 4, &axon(8091), &sent).await.unwrap_err() }
    };
    let low = Outcome::PoolError {
        code: 1014,
        message: "Priority is too low: (18446744073709551615 vs 0)".into(),
        data: None,
    };
    for (outcome, want, is_passing) in [
        (Outcome::custom(12), "wait about 50 blocks", true),
        (Outcome::custom(10), "btcli subnets register", false),
        (low, "still in the pool", true),
        (Outcome::DispatchError("ServingRateLimitExceeded".into()), "wait about 50", true),
        (Outcome::DispatchError("InvalidPort".into()), "--axon.external_port", false),
        (Outcome::Dropped, "lost", true),
    ] {
        let error = refused(outcome).await;
        assert!(error.to_string().contains(want), "{error}");
        let ChainError::Refused(refusal) = error else { panic!("{error}") };
        assert_eq!(refusal.is_passing(), is_passing, "{refusal}");
    }
    let local = Axon { address: (Ipv4Addr::LOCALHOST, 8091).into(), ..axon(8091) };
    let error = chain.serve_axon(&key(3), 4, &local, &sent).await.unwrap_err();
    assert!(error.to_string().contains("--axon.external_ip"), "{error}");
    let stranger = chain.serve_axon(&key(9), 4, &axon(8091), &sent).await.unwrap_err();
    let ChainError::Refused(ExtrinsicRefusal { stage: ExtrinsicStage::Pool, .. }) = stranger else {
        panic!("{stranger}")
    };
}

#[tokio::test]
async fn another_chain_is_never_signed_for() {
    let node = FakeNode::start(subnet()).await;
    node.set_genesis([7; 32]);
    let chain = client(&[&node]);
    let error = chain.metagraph(4).await.unwrap_err();
    assert!(matches!(error, ChainError::WrongChain { .. }), "{error}");
    let error = chain.serve_axon(&key(3), 4, &axon(8091), &sent).await.unwrap_err();
    assert!(error.to_string().contains("nothing is signed for it"), "{error}");
    assert!(matches!(chain.follow(&|_| true).await, Err(ChainError::WrongChain { .. })));
    assert_eq!(node.calls().len(), 0);
    // One wrong endpoint among right ones is passed over.
    let right = FakeNode::start(subnet()).await;
    check(&client(&[&node, &right]).metagraph(4).await.unwrap());
    // A network without a pinned genesis takes it.
    let own = Endpoints { genesis: None, ..endpoints(&[node.url()]) };
    check(&Subtensor::new(own).metagraph(4).await.unwrap());
}

#[tokio::test]
async fn broken_connections_are_replaced_also_by_another_endpoint() {
    let (first, second) = (FakeNode::start(subnet()).await, FakeNode::start(subnet()).await);
    let chain = client(&[&first, &second]);
    check(&chain.metagraph(4).await.unwrap());
    assert_eq!(second.requests(), 0);
    first.drop_connections();
    check(&chain.metagraph(4).await.unwrap());
    first.refuse(true);
    first.drop_connections();
    second.drop_connections();
    check(&chain.metagraph(4).await.unwrap());
    assert!(second.requests() > 0);
    second.refuse(true);
    second.drop_connections();
    let error = chain.metagraph(4).await.unwrap_err();
    assert!(error.is_passing(), "{error}");
    first.refuse(false);
    check(&chain.metagraph(4).await.unwrap());
}

/// Blocks that a follower has seen, so far.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<u64>>>);

impl Seen {
    fn last(&self) -> u64 {
        self.0.lock().last().copied().unwrap_or(0)
    }

    async fn wait_beyond(&self, block: u64) {
        for _ in 0..1000 {
            if self.last() > block {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no block after {block} within ten seconds");
    }
}

#[tokio::test]
async fn blocks_are_followed_over_breaks_stalls_and_upgrades() {
    let node = Arc::new(FakeNode::start(subnet()).await);
    node.auto_blocks(BLOCK);
    let chain = Arc::new(client(&[&node]));
    let seen = Seen::default();
    let (follower, note) = (Arc::clone(&chain), seen.clone());
    let following = tokio::spawn(async move {
        let on_head = |head: Head| {
            note.0.lock().push(head.block);
            true
        };
        follower.follow(&on_head).await
    });
    seen.wait_beyond(2).await;
    node.drop_connections();
    seen.wait_beyond(node.head()).await;
    // Nothing comes, but the connection stays: only the clock tells.
    node.stall(true);
    tokio::time::sleep(Duration::from_millis(600)).await;
    node.stall(false);
    seen.wait_beyond(node.head()).await;
    node.refuse(true);
    node.drop_connections();
    tokio::time::sleep(Duration::from_millis(300)).await;
    node.refuse(false);
    seen.wait_beyond(node.head()).await;
    node.upgrade(SPEC + 1);
    seen.wait_beyond(node.head()).await;
    check(&chain.metagraph(4).await.unwrap());
    chain.serve_axon(&key(3), 4, &axon(8091), &sent).await.unwrap();
    following.abort();
    let blocks = seen.0.lock().clone();
    assert!(blocks.windows(2).all(|w| w[0] <= w[1]), "{blocks:?}");
}

fn miner(node: &FakeNode, seed: u8, epoch_length: u64) -> (Miner<Subtensor>, Gate) {
    miner_of(&[node], seed, epoch_length)
}

fn miner_of(nodes: &[&FakeNode], seed: u8, epoch_length: u64) -> (Miner<Subtensor>, Gate) {
    let clock = Clock::system();
    let gate = Gate::new(key(seed).hotkey(), Policy::default(), clock);
    let options = MinerOptions { netuid: 4, epoch_length, axon: axon(8091) };
    (Miner::new(client(nodes), gate.clone(), Arc::new(key(seed)), options), gate)
}

#[tokio::test]
async fn a_miner_announces_itself_only_where_something_changed() {
    let node = FakeNode::start(subnet()).await;
    node.auto_blocks(BLOCK);
    let (miner, gate) = miner(&node, 3, 5);
    miner.join().await.unwrap();
    assert_eq!(gate.metagraph().neurons().len(), 3);
    gate.set_refused_axon(Some("refused before".into()));
    assert_eq!(miner.announce(&|_| false).await, Ok(Announced::Withheld));
    assert_eq!((node.calls().len(), gate.status()["axon_refused"].is_null()), (0, false));
    assert_eq!(miner.announce(&sent).await, Ok(Announced::Sent));
    assert!(gate.status()["axon_refused"].is_null());
    assert_eq!(node.calls().len(), 1);
    miner.join().await.unwrap();
    let again = miner.announce(&|_| panic!("nothing has changed")).await;
    assert_eq!(again, Ok(Announced::Already));
    assert_eq!(node.calls().len(), 1);
    let error = self::miner(&node, 9, 5).0.join().await.unwrap_err();
    assert!(error.to_string().contains("is not registered on subnet 4"), "{error}");
}

#[tokio::test]
async fn a_miner_notices_new_members_and_that_it_is_gone() {
    let node = FakeNode::start(subnet()).await;
    node.auto_blocks(BLOCK);
    let (miner, gate) = miner(&node, 3, 3);
    miner.join().await.unwrap();
    let following = tokio::spawn(async move { miner.follow().await });
    let stranger = key(8).hotkey();
    assert!(gate.metagraph().neuron(&stranger).is_none());
    node.subnet(|s| s.neurons.push(Neuron::new(stranger.0)));
    for _ in 0..500 {
        if gate.metagraph().neuron(&stranger).is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(gate.metagraph().neuron(&stranger).is_some());
    assert!(gate.head().is_some());
    node.subnet(|s| s.neurons[2] = Neuron::new(key(7).hotkey().0));
    let ended = tokio::time::timeout(Duration::from_secs(10), following).await.unwrap().unwrap();
    assert!(matches!(ended, Err(MinerError::NotRegistered { .. })), "{ended:?}");
}

/// Waits until the gate knows this member.
async fn wait_for_member(gate: &Gate, hotkey: &Hotkey) -> bool {
    for _ in 0..1000 {
        if gate.metagraph().neuron(hotkey).is_some() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}

#[tokio::test]
async fn an_endpoint_that_names_a_huge_block_is_left_for_another() {
    let (first, second) = (FakeNode::start(subnet()).await, FakeNode::start(subnet()).await);
    first.auto_blocks(BLOCK);
    second.auto_blocks(BLOCK);
    let (miner, gate) = miner_of(&[&first, &second], 3, 3);
    miner.join().await.unwrap();
    first.claim_block(Some(u64::from(u32::MAX) - 7));
    let following = tokio::spawn(async move { miner.follow().await });
    let stranger = key(8).hotkey();
    second.subnet(|s| s.neurons.push(Neuron::new(stranger.0)));
    assert!(wait_for_member(&gate, &stranger).await, "no news of members within ten seconds");
    assert!(gate.metagraph().block <= second.head(), "{}", gate.metagraph().block);
    assert!(gate.head().unwrap().0.block <= second.head());
    following.abort();
}

#[tokio::test]
async fn one_endpoint_without_the_member_ends_no_miner() {
    let (first, second) = (FakeNode::start(subnet()).await, FakeNode::start(subnet()).await);
    // The second one is never behind what the first has said.
    second.auto_blocks(BLOCK);
    tokio::time::sleep(5 * BLOCK).await;
    first.auto_blocks(BLOCK);
    let (miner, gate) = miner_of(&[&first, &second], 3, 3);
    miner.join().await.unwrap();
    first.subnet(|s| s.neurons[2] = Neuron::new(key(7).hotkey().0));
    let stranger = key(8).hotkey();
    second.subnet(|s| s.neurons.push(Neuron::new(stranger.0)));
    let following = tokio::spawn(async move { miner.follow().await });
    assert!(wait_for_member(&gate, &stranger).await, "no news of members within ten seconds");
    assert!(!following.is_finished());
    following.abort();
}

#[tokio::test]
async fn a_miner_starts_where_only_the_first_endpoint_lacks_it() {
    let (first, second) = (FakeNode::start(subnet()).await, FakeNode::start(subnet()).await);
    first.subnet(|s| s.neurons[2] = Neuron::new(key(7).hotkey().0));
    let (miner, gate) = miner_of(&[&first, &second], 3, 3);
    miner.join().await.unwrap();
    assert!(gate.metagraph().neuron(&key(3).hotkey()).is_some());
    // Both lack it now: that is believed, and the members of before stay until then and after.
    second.subnet(|s| s.neurons[2] = Neuron::new(key(7).hotkey().0));
    let asked = (first.requests(), second.requests());
    let ended = miner.join().await;
    assert!(matches!(ended, Err(MinerError::NotRegistered { .. })), "{ended:?}");
    assert!(first.requests() > asked.0 && second.requests() > asked.1, "each was asked");
    assert!(gate.metagraph().neuron(&key(3).hotkey()).is_some());
    assert!(gate.metagraph().neuron(&key(7).hotkey()).is_none());
}

#[tokio::test]
async fn a_first_endpoint_that_lied_does_not_freeze_the_members_for_ever() {
    let node = FakeNode::start(subnet()).await;
    node.claim_block(Some(1 << 31));
    let clock = Clock::manual(1_795_333_310_123);
    let gate = Gate::new(key(3).hotkey(), Policy::default(), clock.clone());
    let options = MinerOptions { netuid: 4, epoch_length: 3, axon: axon(8091) };
    let miner = Miner::new(client(&[&node]), gate.clone(), Arc::new(key(3)), options);
    miner.join().await.unwrap();
    node.claim_block(None);
    let stranger = key(8).hotkey();
    node.subnet(|s| s.neurons.push(Neuron::new(stranger.0)));
    let error = miner.join().await.unwrap_err();
    assert!(error.is_passing() && error.to_string().contains("is not believed"), "{error}");
    clock.advance(DOUBT_MAX);
    miner.join().await.unwrap();
    assert!(gate.metagraph().neuron(&stranger).is_some());
}
