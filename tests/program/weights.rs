//! Setting weights against a node that has the chain's rules: what is sent, what is not, what is
//! sent again, and what is read back.

use crate::chain::{BLOCK, client, key, subnet};
use crate::node::{Commit, FakeNode, Outcome, SPEC, Subnet, drand};
use parking_lot::Mutex;
use targon_engine::chain::Chain;
use targon_engine::chain::subtensor::Subtensor;
use targon_engine::chain::timelock::QUICKNET;
use targon_engine::chain::weights::Vector;
use targon_engine::chain::weights::outcome::{
    Approval, Call, Order, ReadBack, SendError, SentWeights,
};
use targon_engine::chain::weights::standing::Unmet;

const METADATA: &[u8] = include_bytes!("../data/subtensor_metadata_spec365_v16_finney.scale");
const VALUES: [(u16, u16); 2] = [(1, 100), (2, 65_535)];

fn order() -> Order {
    let vector = Vector::new(VALUES.to_vec()).unwrap();
    Order { netuid: 4, mechanism: 0, vector, version_key: Some(7) }
}

async fn node(change: impl FnOnce(&mut Subnet)) -> FakeNode {
    let mut subnet = subnet();
    change(&mut subnet);
    let node = FakeNode::start(subnet).await;
    node.auto_blocks(BLOCK);
    node
}

/// The metadata with another call in the place of some.
fn without(calls: &[&str]) -> Vec<u8> {
    let mut bytes = METADATA.to_vec();
    for call in calls {
        let places: Vec<usize> = bytes
            .windows(call.len())
            .enumerate()
            .filter(|(_, window)| *window == call.as_bytes())
            .map(|(place, _)| place)
            .collect();
        assert!(!places.is_empty(), "{call}");
        places.into_iter().for_each(|place| bytes[place] = b'x');
    }
    bytes
}

/// Says yes to everything, and remembers what was signed.
#[derive(Default)]
struct Signed(Mutex<Vec<SentWeights>>);

impl Signed {
    async fn set(
        &self,
        chain: &Subtensor,
        order: &Order,
    ) -> Result<Option<SentWeights>, SendError> {
        self.set_after(chain, order, &|_| true).await
    }

    async fn set_after(
        &self,
        chain: &Subtensor,
        order: &Order,
        show: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<Option<SentWeights>, SendError> {
        let signed = |sent: &SentWeights| {
            self.0.lock().push(sent.clone());
            true
        };
        chain.set_weights(&key(1), order, &Approval { show, signed: &signed }).await
    }

    fn count(&self) -> usize {
        self.0.lock().len()
    }
}

#[tokio::test]
async fn weights_are_set_and_read_back() {
    let node = node(|_| {}).await;
    let chain = client(&[&node]);
    let (signed, shown) = (Signed::default(), Mutex::new(String::new()));
    let show = |words: &str| {
        *shown.lock() = words.to_owned();
        true
    };
    let sent = signed.set_after(&chain, &order(), &show).await.unwrap().unwrap();
    let words = shown.lock().clone();
    for part in ["set_mechanism_weights", "netuid: 4", "mecid: 0", "65535", "version_key: 7"] {
        assert!(words.contains(part), "{part} is not in {words}");
    }
    assert_eq!(signed.0.lock().as_slice(), std::slice::from_ref(&sent));
    let calls = node.calls();
    assert_eq!((calls.len(), calls[0].name.as_str()), (1, "set_mechanism_weights"));
    assert_eq!(calls[0].signer, key(1).hotkey().0);
    assert_eq!(calls[0].args["weights"], serde_json::json!([100, 65_535]));
    assert_eq!(node.subnet(|s| s.weights[&(4, 0)].clone()), VALUES);
    assert_eq!(chain.read_back(&sent).await, ReadBack::Confirmed);
    // Others over them.
    let other = vec![(1, 65_535)];
    node.subnet(|s| s.weights.insert((4, 0), other.clone()));
    assert_eq!(chain.read_back(&sent).await, ReadBack::Differs { found: other });
    node.subnet(|s| s.weights.clear());
    let gone = chain.read_back(&sent).await;
    assert!(matches!(gone, ReadBack::NotThere { .. }), "{gone:?}");
    node.subnet(|s| s.neurons.remove(0));
    let ReadBack::NotThere { why, may_come: false } = chain.read_back(&sent).await else {
        panic!("the hotkey is gone")
    };
    assert!(why.contains("is not registered on subnet 4"), "{why}");
    node.refuse(true);
    node.drop_connections();
    assert!(matches!(chain.read_back(&sent).await, ReadBack::Unreadable(e) if e.is_passing()));
}

#[tokio::test]
async fn weights_without_a_version_name_the_one_that_the_subnet_asks_for_now() {
    let node = node(|s| s.weights_version = 7).await;
    let chain = client(&[&node]);
    chain.metagraph(4).await.unwrap();
    node.subnet(|s| s.weights_version = 9);
    let order = Order { version_key: None, ..order() };
    Signed::default().set(&chain, &order).await.unwrap().unwrap();
    assert_eq!(node.calls()[0].args["version_key"], 9);
}

#[tokio::test]
async fn a_no_before_or_after_signing_sends_nothing() {
    let node = node(|_| {}).await;
    let chain = client(&[&node]);
    let signed = Signed::default();
    assert_eq!(signed.set_after(&chain, &order(), &|_| false).await, Ok(None));
    assert_eq!(signed.count(), 0);
    let asked = Approval { show: &|_| true, signed: &|_| false };
    assert_eq!(chain.set_weights(&key(1), &order(), &asked).await, Ok(None));
    assert_eq!(node.calls().len(), 0);
}

#[tokio::test]
async fn the_call_is_the_one_that_the_metadata_has() {
    let node = node(|_| {}).await;
    node.set_metadata(&without(&["set_mechanism_weights", "MechanismCountCurrent"]));
    let chain = client(&[&node]);
    let sent = Signed::default().set(&chain, &order()).await.unwrap().unwrap();
    assert_eq!((sent.call, node.calls()[0].name.as_str()), (Call::Set, "set_weights"));
    assert_eq!(chain.read_back(&sent).await, ReadBack::Confirmed);
    let second = Order { mechanism: 1, ..order() };
    let error = Signed::default().set(&chain, &second).await.unwrap_err();
    assert!(matches!(error, SendError::Unmet(Unmet::NoMechanism { .. })), "{error}");
    // A runtime without any of the calls is named, and nothing is signed.
    let bare = self::node(|_| {}).await;
    bare.set_metadata(&without(&["set_mechanism_weights", "MechanismCountCurrent", "set_weights"]));
    let error = Signed::default().set(&client(&[&bare]), &order()).await.unwrap_err();
    assert!(error.to_string().contains("set_weights"), "{error}");
    assert_eq!(bare.calls().len(), 0);
}

#[tokio::test]
async fn a_second_mechanism_has_weights_and_a_rate_of_its_own() {
    let node = node(|s| s.mechanisms = 2).await;
    let chain = client(&[&node]);
    let signed = Signed::default();
    signed.set(&chain, &order()).await.unwrap();
    let second = Order { mechanism: 1, ..order() };
    let sent = signed.set(&chain, &second).await.unwrap().unwrap();
    assert_eq!(node.subnet(|s| s.weights[&(4100, 0)].clone()), VALUES);
    assert_eq!(chain.read_back(&sent).await, ReadBack::Confirmed);
    let error = signed.set(&chain, &second).await.unwrap_err();
    assert!(matches!(error, SendError::Unmet(Unmet::TooFast { .. })), "{error}");
    assert_eq!(node.calls().len(), 2);
}

/// A change to the subnet, what is said of it, and the chain's own word.
type Breach = (fn(&mut Subnet), &'static str, &'static str);

const BREACHES: [Breach; 7] = [
    (|s| s.neurons[0].hotkey = [9; 32], "is not registered on subnet 4", "custom error: 10"),
    (|s| s.stake_threshold_rao = 1 << 62, "stake of 20000.000 is below", "NotEnoughStake"),
    (|s| s.weights_version = 8, "version 8 or newer, these are of 7", "IncorrectWeightVersionKey"),
    (|s| s.neurons[0].permit = false, "no validator permit", "NeuronNoValidatorPermit"),
    (|s| s.neurons.truncate(2), "no uid 2 among the 2 members", "UidVecContainInvalidOne"),
    (|s| s.min_allowed_weights = 3, "at least 3 weights, got 2", "WeightVecLengthIsLow"),
    (|s| s.max_weights_limit = 60_000, "the weight of uid 2 is 0.99", "MaxWeightExceeded"),
];

#[tokio::test]
async fn what_the_chain_would_refuse_is_not_sent() {
    for (breach, want, _) in BREACHES {
        let node = node(breach).await;
        let chain = client(&[&node]);
        let error = Signed::default().set(&chain, &order()).await.unwrap_err();
        let SendError::Unmet(unmet) = &error else { panic!("{error}") };
        assert!(unmet.to_string().contains(want), "{unmet}, not {want}");
        assert!(!error.is_passing());
        assert_eq!(node.calls().len(), 0, "{want}");
    }
    let node = node(|_| {}).await;
    let chain = client(&[&node]);
    let signed = Signed::default();
    signed.set(&chain, &order()).await.unwrap();
    let error = signed.set(&chain, &order()).await.unwrap_err();
    assert!(matches!(error, SendError::Unmet(Unmet::TooFast { limit: 100, .. })), "{error}");
    assert!(error.is_passing());
    let standing = chain.weight_standing(4, 0, &key(1).hotkey()).await.unwrap();
    assert_eq!((standing.uid, standing.rate_limit, standing.mechanisms), (Some(0), 100, 1));
    node.subnet(|s| s.weights_rate_limit = 0);
    signed.set(&chain, &order()).await.unwrap();
    assert_eq!(node.calls().len(), 2);
}

/// The same breaches, that come up between reading and sending: the chain itself refuses.
#[tokio::test]
async fn the_chain_has_the_same_rules_and_its_errors_become_sentences() {
    for (breach, _, want) in BREACHES {
        let node = node(|s| s.checks_in_pool = false).await;
        let chain = client(&[&node]);
        let show = |_: &str| {
            node.subnet(breach);
            true
        };
        let set = Signed::default().set_after(&chain, &order(), &show).await;
        let error = set.unwrap_err().to_string();
        assert!(error.to_lowercase().contains(&want.to_lowercase()), "{error}, not {want}");
        assert!(node.subnet(|s| s.weights.is_empty()), "{want}");
    }
    for (change, want) in [
        ((|s| s.stake_threshold_rao = 1 << 62) as fn(&mut Subnet), "too little stake"),
        (|s| (s.weights_rate_limit, s.neurons[0].last_update) = (9999, 1), "too soon after"),
        (|s| s.commit_reveal = true, "wants weights committed"),
    ] {
        let node = node(|_| {}).await;
        let chain = client(&[&node]);
        let show = |_: &str| {
            node.subnet(change);
            true
        };
        let error = Signed::default().set_after(&chain, &order(), &show).await.unwrap_err();
        assert!(error.to_string().contains(want), "{error}, not {want}");
        let SendError::Chain(_) = error else { panic!("{error}") };
    }
}

#[tokio::test]
async fn only_what_passes_within_seconds_is_sent_again() {
    let low = || Outcome::PoolError {
        code: 1014,
        message: "Priority is too low: (1 vs 1)".into(),
        data: None,
    };
    let stale = || Outcome::PoolError {
        code: 1010,
        message: "Invalid Transaction".into(),
        data: Some("Transaction is outdated".into()),
    };
    for (outcomes, want_signed, is_set) in [
        (vec![low()], 2, true),
        (vec![stale(), low()], 3, true),
        (vec![low(), low(), low()], 3, false),
        (vec![Outcome::custom(6)], 1, false),
        (vec![Outcome::custom(255)], 1, false),
        (vec![Outcome::DispatchError("NeuronNoValidatorPermit".into())], 1, false),
    ] {
        let node = node(|_| {}).await;
        let chain = client(&[&node]);
        outcomes.iter().for_each(|outcome| node.set_next(outcome.clone()));
        let signed = Signed::default();
        let set = signed.set(&chain, &order()).await;
        assert_eq!((signed.count(), set.is_ok()), (want_signed, is_set), "{outcomes:?}: {set:?}");
    }
}

#[tokio::test]
async fn a_runtime_upgrade_between_reading_and_sending_is_signed_for_anew() {
    let node = node(|_| {}).await;
    let chain = client(&[&node]);
    let signed = Signed::default();
    let show = |_: &str| {
        node.upgrade(SPEC + 1);
        true
    };
    let sent = signed.set_after(&chain, &order(), &show).await.unwrap().unwrap();
    assert_eq!((signed.count(), node.calls().len()), (2, 1));
    assert_eq!(chain.read_back(&sent).await, ReadBack::Confirmed);
}

#[tokio::test]
async fn an_extrinsic_that_may_have_arrived_is_never_sent_again() {
    for outcome in [Outcome::Never, Outcome::Dropped] {
        let node = node(|_| {}).await;
        let chain = client(&[&node]);
        node.set_next(outcome.clone());
        let signed = Signed::default();
        let order = order();
        let setting = signed.set(&chain, &order);
        let leaving = async {
            while node.calls().is_empty() {
                tokio::time::sleep(BLOCK).await;
            }
            node.drop_connections();
        };
        let (set, ()) = tokio::join!(setting, leaving);
        let error = set.unwrap_err();
        let SendError::Uncertain { sent, .. } = &error else { panic!("{outcome:?}: {error}") };
        assert!(!error.is_passing());
        assert_eq!((signed.count(), node.calls().len()), (1, 1), "{outcome:?}");
        let ReadBack::NotThere { may_come, .. } = chain.read_back(sent).await else {
            panic!("{outcome:?}")
        };
        assert!(may_come || node.head() > sent.until);
        while node.head() <= sent.until {
            tokio::time::sleep(BLOCK).await;
        }
        let gone = chain.read_back(sent).await;
        assert!(matches!(gone, ReadBack::NotThere { may_come: false, .. }), "{gone:?}");
    }
}

/// The node answers nothing any more, takes the extrinsic all the same, and is back later.
#[tokio::test]
async fn weights_that_arrived_unseen_are_found() {
    let node = node(|_| {}).await;
    let chain = client(&[&node]);
    let signed = Signed::default();
    let order = order();
    let setting = signed.set(&chain, &order);
    let leaving = async {
        while node.calls().is_empty() {
            tokio::task::yield_now().await;
        }
        node.drop_connections();
    };
    let (set, ()) = tokio::join!(setting, leaving);
    let sent = match set {
        Err(SendError::Uncertain { sent, .. }) => *sent,
        // The block was there before the connection broke.
        other => other.unwrap().unwrap(),
    };
    for _ in 0..200 {
        if chain.read_back(&sent).await == ReadBack::Confirmed {
            break;
        }
        tokio::time::sleep(BLOCK).await;
    }
    assert_eq!(chain.read_back(&sent).await, ReadBack::Confirmed);
    assert_eq!(node.calls().len(), 1);
}

#[test]
fn commits_are_opened_by_the_signature_of_their_round() {
    let vectors: serde_json::Value =
        serde_json::from_slice(include_bytes!("../data/tlock_vectors.json")).unwrap();
    let bytes = |value: &serde_json::Value| hex::decode(value.as_str().unwrap()).unwrap();
    let signature = bytes(&vectors["drand_quicknet"]["round_1000_signature"]);
    for name in ["crv4_payload", "legacy_payload_spec293"] {
        let (plain, official) = (&vectors[name]["plaintext_hex"], &vectors[name]["inner_hex"]);
        let plain = bytes(plain);
        assert_eq!(drand::decrypt(&bytes(official), &signature), Some(plain.clone()));
        let mut ours = QUICKNET.encrypt(&plain, 1000).unwrap();
        assert_eq!(drand::decrypt(&ours, &signature), Some(plain.clone()), "{name}");
        // Another round's signature opens nothing, and no changed byte goes unnoticed.
        let other = drand::network().encrypt(&plain, 1000).unwrap();
        assert_eq!(drand::decrypt(&other, &signature), None);
        assert_eq!(drand::decrypt(&other, &drand::signature(1000)), Some(plain));
        assert_eq!(drand::decrypt(&other, &drand::signature(1001)), None);
        let last = ours.len() - 40;
        ours[last] ^= 1;
        assert_eq!(drand::decrypt(&ours, &signature), None);
    }
}

/// Short epochs, so that a commit is soon revealed.
fn committing(subnet: &mut Subnet) {
    (subnet.commit_reveal, subnet.tempo) = (true, 20);
}

/// Blocks that come slowly enough for a build without optimisation to encrypt in between.
async fn committing_node() -> FakeNode {
    let node = node(committing).await;
    node.auto_blocks(5 * BLOCK);
    node
}

async fn wait_for(node: &FakeNode, block: u64) {
    while node.head() < block {
        tokio::time::sleep(BLOCK / 2).await;
    }
}

#[tokio::test]
async fn weights_are_committed_and_revealed_where_the_subnet_wants_it() {
    let node = committing_node().await;
    let chain = client(&[&node]);
    let sent = Signed::default().set(&chain, &order()).await.unwrap().unwrap();
    assert_eq!(sent.call, Call::CommitMechanism);
    let call = node.calls().remove(0);
    assert_eq!(call.name, "commit_timelocked_mechanism_weights");
    assert_eq!(call.args["commit_reveal_version"], 4);
    assert_eq!(call.args["reveal_round"], sent.reveal_round.unwrap());
    let commit = node.subnet(|s| s.commits[0].clone());
    assert!(sent.reveal_round.unwrap() > drand::stored_round(commit.block));
    let waiting = ReadBack::Waiting { epoch: commit.epoch, period: 1 };
    assert_eq!(chain.read_back(&sent).await, waiting);
    assert!(node.subnet(|s| s.weights.is_empty()));
    // One epoch later, and the three blocks until the round is there.
    let first = (commit.epoch + 1) * 21 - 5;
    wait_for(&node, first + 4).await;
    assert_eq!(chain.read_back(&sent).await, ReadBack::Confirmed);
    assert_eq!(node.subnet(|s| s.weights[&(4, 0)].clone()), VALUES);
    let revealed = node.subnet(|s| s.revealed.clone());
    assert_eq!(revealed, [(commit.block, first + 3)]);
}

#[tokio::test]
async fn weights_that_were_not_revealed_are_noticed() {
    let node = committing_node().await;
    let chain = client(&[&node]);
    // A rule that is broken only when it comes to the revelation, and a chain that reveals nothing.
    let breaches: [fn(&mut Subnet); 2] = [|s| s.min_allowed_weights = 3, |s| s.reveals = false];
    for breach in breaches {
        node.subnet(|s| (s.weights_rate_limit, s.min_allowed_weights) = (0, 1));
        let sent = Signed::default().set(&chain, &order()).await.unwrap().unwrap();
        node.subnet(breach);
        let epoch = node.subnet(|s| s.commits.last().unwrap().epoch);
        wait_for(&node, (epoch + 1) * 21 - 5 + 4).await;
        let ReadBack::NotThere { why, may_come: false } = chain.read_back(&sent).await else {
            panic!("the commit was not revealed")
        };
        assert!(why.contains("it was not revealed"), "{why}");
    }
}

#[tokio::test]
async fn the_call_for_commits_is_the_one_that_the_metadata_has() {
    let node = committing_node().await;
    node.set_metadata(&without(&["commit_timelocked_mechanism_weights"]));
    let chain = client(&[&node]);
    let sent = Signed::default().set(&chain, &order()).await.unwrap().unwrap();
    assert_eq!(sent.call, Call::Commit);
    assert_eq!(node.calls()[0].name, "commit_timelocked_weights");
    assert!(matches!(chain.read_back(&sent).await, ReadBack::Waiting { .. }));
    let other = committing_node().await;
    let calls = ["commit_timelocked_mechanism_weights", "commit_timelocked_weights"];
    other.set_metadata(&without(&calls));
    let error = Signed::default().set(&client(&[&other]), &order()).await.unwrap_err();
    assert!(error.to_string().contains("commit_crv3_weights"), "{error}");
    assert_eq!(other.calls().len(), 0);
}

#[tokio::test]
async fn commits_have_rules_of_their_own() {
    let node = committing_node().await;
    let chain = client(&[&node]);
    let signed = Signed::default();
    signed.set(&chain, &order()).await.unwrap();
    let error = signed.set(&chain, &order()).await.unwrap_err();
    assert!(matches!(error, SendError::Unmet(Unmet::TooFast { .. })), "{error}");
    node.subnet(|s| {
        s.weights_rate_limit = 0;
        let commit = s.commits[0].clone();
        // Whatever epoch comes next.
        s.commits =
            (0..40).map(|i| Commit { epoch: commit.epoch + i / 10, ..commit.clone() }).collect();
    });
    let error = signed.set(&chain, &order()).await.unwrap_err();
    assert!(matches!(error, SendError::Unmet(Unmet::TooManyCommits { count: 10 })), "{error}");
    for (breach, want) in [
        ((|s| s.commit_reveal_version = 5) as fn(&mut Subnet), "another version of commits"),
        (|s| s.commit_reveal = false, "wants weights set and not committed"),
    ] {
        let node = committing_node().await;
        let chain = client(&[&node]);
        let show = |_: &str| {
            node.subnet(breach);
            true
        };
        let error = Signed::default().set_after(&chain, &order(), &show).await.unwrap_err();
        assert!(error.to_string().contains(want), "{error}, not {want}");
    }
}
