//! Tests epochs and the weights that are sent in them.

use super::super::*;
use super::fake::{Fake, Running, driver, options, sent_as, until};

use super::super::ports::{NotSent, Stand};
use crate::store::record::{EpochWeights, Outcome, SentBlocks, WeightsState};
use serde_json::Value;
use std::sync::atomic::Ordering::SeqCst;

#[tokio::test(flavor = "multi_thread")]
async fn weights_are_set_where_an_epoch_begins_and_once() {
    let world = Arc::new(Fake::new().settled(0));
    let running = Running::start(&world, options(None)).await;
    let progress = Arc::clone(&running.progress);
    until("a round", || progress.rounds() > 0).await;
    world.heads.send_replace(99);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((world.sends.lock().len(), world.readings.load(SeqCst)), (0, 1));
    // The block itself was missed; and the chain says no once for what passes.
    world.fates.lock().push_back(NotSent::Later("the rate limit".into()));
    world.heads.send_replace(103);
    until("the subnet read anew", || world.readings.load(SeqCst) == 2).await;
    until("a refusal", || world.fates.lock().is_empty()).await;
    assert_eq!(world.sends.lock().len(), 0);
    for block in [104, 105, 150, 199] {
        world.heads.send_replace(block);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    until("weights", || world.sends.lock().len() == 1).await;
    assert_eq!(world.weights.lock()[&100].state, WeightsState::Confirmed);
    // The chain is gone where the next epoch begins: the members of before are asked on.
    world.chain.store(false, SeqCst);
    world.heads.send_replace(200);
    until("a try", || world.readings.load(SeqCst) > 2).await;
    let before = progress.rounds();
    until("rounds without a chain", || progress.rounds() > before + 2).await;
    world.chain.store(true, SeqCst);
    world.heads.send_replace(205);
    until("weights of the next epoch", || world.sends.lock().len() == 2).await;
    assert_eq!(world.sends.lock()[1].0, 200);
    let summary = running.stop().await.unwrap();
    assert_eq!(summary.weights, None);
    assert_eq!(summary.rounds, world.saved.lock().len() as u64);
    let seen = progress.snapshot();
    let weights = seen.weights.clone().unwrap();
    assert_eq!((weights.epoch, weights.state), (200, WeightsState::Confirmed));
    assert_eq!((seen.block, seen.members, seen.weights_age()), (205, 5, Some(0)));
    assert!(seen.beat_ms > 0 && seen.block_ms > 0 && seen.is_stopping);
}

#[tokio::test(flavor = "multi_thread")]
async fn epochs_of_the_chain_are_found_where_the_chain_runs_them() {
    let world = Arc::new(Fake::new().settled(7));
    world.last_step.store(7, SeqCst);
    let options = RunOptions { epochs: EpochRule::Chain, ..options(None) };
    let running = Running::start(&world, options).await;
    // A multiple of any length is nothing; the epoch is due at 107 and is late.
    for block in [100, 106] {
        world.heads.send_replace(block);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert_eq!(world.readings.load(SeqCst), 1);
    for (block, readings) in [(107, 2), (108, 3), (110, 4)] {
        world.heads.send_replace(block);
        until("a look", || world.readings.load(SeqCst) == readings).await;
    }
    assert!(world.sends.lock().is_empty());
    world.last_step.store(112, SeqCst);
    world.heads.send_replace(114);
    until("weights", || world.sends.lock().len() == 1).await;
    assert_eq!(world.sends.lock()[0].0, 112);
    // One of the owner's own, noticed where the next one would be due.
    world.last_step.store(150, SeqCst);
    world.heads.send_replace(212);
    until("weights of the next epoch", || world.sends.lock().len() == 2).await;
    assert_eq!(world.sends.lock()[1].0, 150);
    assert_eq!(world.rotations.load(SeqCst), 3);
    // Blocks 100, 120 and so on were passed by 100, 108 and 212 only; a hub that is gone costs no
    // round.
    until("questions for users' requests", || world.pulls.load(SeqCst) >= 2).await;
    until("a report of a round", || !world.reported.lock().is_empty()).await;
    until("a look at old records in each epoch", || world.tidied.load(SeqCst) == 3).await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_serves_the_subnet_is_read_again_before_the_next_epoch() {
    for epochs in [EpochRule::Chain, EpochRule::Every(1_000)] {
        let world = Arc::new(Fake::new());
        world.serves.store(false, SeqCst);
        world.last_step.store(*world.heads.borrow(), SeqCst);
        let options = RunOptions { epochs, ..options(None) };
        let running = Running::start(&world, options).await;
        let progress = Arc::clone(&running.progress);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(progress.rounds(), 0);
        world.serves.store(true, SeqCst);
        let first = *world.heads.borrow();
        for block in first + 1..=first + IDLE_BLOCKS {
            world.heads.send_replace(block);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        until("a round", || progress.rounds() > 0).await;
        running.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_in_the_middle_of_an_epoch_sets_its_weights_where_they_are_not() {
    for (world, sends) in [(Fake::new(), 1), (Fake::new().settled(0), 0)] {
        let world = Arc::new(world);
        let running = Running::start(&world, options(None)).await;
        let progress = Arc::clone(&running.progress);
        until("weights", || progress.snapshot().weights.is_some()).await;
        assert_eq!(world.sends.lock().len(), sends);
        assert_eq!(world.weights.lock()[&0].state, WeightsState::Confirmed);
        running.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_subnet_is_read_once_a_block_until_an_epoch_is_final() {
    let world = Arc::new(Fake::new().settled(0));
    world.heads.send_replace(50);
    world.behind.store(3, SeqCst);
    // Rounds without an answer follow each other slowly: only the epoch's work is looked at.
    world.answers.store(false, SeqCst);
    let running = Running::start(&world, options(None)).await;
    let before = world.rotations.load(SeqCst);
    let (readings, mut blocks) = (world.readings.load(SeqCst), 0);
    // A reading that is not over when the next block comes waits for the one after it.
    while world.sends.lock().is_empty() && blocks < 200 {
        world.heads.send_replace(100 + blocks.min(99));
        blocks += 1;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let read = world.readings.load(SeqCst) - readings;
    assert!((2..=blocks).contains(&read), "{read} readings in {blocks} blocks");
    assert_eq!(world.sends.lock()[0].0, 100);
    until("models swapped once", || world.rotations.load(SeqCst) == before + 1).await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_that_breaks_is_made_again() {
    let world = Arc::new(Fake::new().settled(0));
    let running = Running::start(&world, options(None)).await;
    world.breaks.store(u64::MAX, SeqCst);
    world.heads.send_replace(100);
    until("a break", || world.breaks.load(SeqCst) < u64::MAX).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(world.sends.lock().is_empty());
    world.breaks.store(0, SeqCst);
    world.heads.send_replace(101);
    until("weights", || world.sends.lock().len() == 1).await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_number_that_was_too_large_delays_no_epoch() {
    for epochs in [EpochRule::Chain, EpochRule::Every(100)] {
        let world = Arc::new(Fake::new().settled(0));
        let driver = driver(&world, RunOptions { epochs, ..options(None) }).await;
        let (progress, pace) = (driver.progress(), Arc::clone(&driver.pace));
        let run = tokio::spawn(async move { driver.run(CancellationToken::new(), &|_| {}).await });
        until("a round", || progress.rounds() > 0).await;
        // Believed, because a connection may have been away for so long; and then not.
        let readings = world.readings.load(SeqCst);
        world.behind.store(900, SeqCst);
        world.heads.send_replace(910);
        until("a look", || world.readings.load(SeqCst) > readings).await;
        world.behind.store(0, SeqCst);
        *pace.lock() = Pace::default();
        world.last_step.store(100, SeqCst);
        world.heads.send_replace(101);
        until("weights", || world.sends.lock().iter().any(|(epoch, _)| *epoch == 100)).await;
        run.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_are_gone_where_weights_are_due_delay_them_and_no_more() {
    let world = Arc::new(Fake::new().settled(0));
    let running = Running::start(&world, options(None)).await;
    world.records.store(false, SeqCst);
    for block in [100, 101, 102] {
        world.heads.send_replace(block);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert!(world.sends.lock().is_empty());
    world.records.store(true, SeqCst);
    world.heads.send_replace(103);
    until("weights", || !world.sends.lock().is_empty()).await;
    // The chain is gone in the middle of the next epoch's: said no, later, and sent once.
    world.fates.lock().push_back(NotSent::Later("no endpoint answers".into()));
    for block in [200, 201, 202, 203] {
        world.heads.send_replace(block);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    until("the next weights", || world.sends.lock().len() == 2).await;
    let epochs: Vec<u64> = world.sends.lock().iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(epochs, [100, 200]);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retirement_waits_for_verdicts_and_for_the_weights_of_the_epoch() {
    let world = Arc::new(Fake::new());
    let mut options = options(None);
    options.round.times.verdicts = Duration::from_secs(600);
    let running = Running::start(&world, options).await;
    let progress = Arc::clone(&running.progress);
    until("a round", || progress.rounds() > 0).await;
    // An epoch begins, and its weights cannot be set yet.
    world.fates.lock().push_back(NotSent::Later("the rate limit".into()));
    world.heads.send_replace(100);
    until("a refusal", || world.fates.lock().is_empty()).await;
    running.retirement.cancel();
    let before = progress.rounds();
    until("rounds while weights are missing", || progress.rounds() > before + 2).await;
    world.hangs.store(true, SeqCst);
    until("verifications", || world.checking.load(SeqCst) == CHECKS_DEFAULT).await;
    world.heads.send_replace(101);
    until("weights", || world.sends.lock().len() == 1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!running.is_finished(), "a round waits for verdicts");
    world.hangs.store(false, SeqCst);
    let summary = running.end().await.unwrap();
    let saved = world.saved.lock();
    assert_eq!(summary.rounds, saved.len() as u64);
    // Nothing was given up.
    let first = |round: &Round| round.responses[0].outcome;
    assert!(saved.iter().all(|round| first(round) == Outcome::Verified));
}

/// Weights of epoch 0 in a state, as an earlier run has left them.
fn left(state: WeightsState) -> Arc<Fake> {
    let world = Arc::new(Fake::new());
    let weights = EpochWeights {
        netuid: 4,
        epoch: 0,
        block: 3,
        values: vec![(2, u16::MAX)],
        explanation: Value::Null,
        state,
    };
    world.weights.lock().insert(0, weights);
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_step_never_sends_twice() {
    let sent = || sent_as("0x1".into());
    let blocks = |until| Some(SentBlocks { after: 3, until });
    let sent_until = |until| WeightsState::Sent {
        hash: "0x1".into(),
        blocks: blocks(until),
        reveal_round: None,
    };
    let (hash, reveal_round) = ("0x1".to_owned(), 9);
    let commit_sent = || WeightsState::Sent {
        hash: hash.clone(),
        blocks: blocks(35),
        reveal_round: Some(reveal_round),
    };
    let committed =
        || WeightsState::Committed { hash: hash.clone(), blocks: blocks(35), reveal_round };
    let failed = |why: &str| WeightsState::Failed { why: why.into() };
    let gone = || Stand::NotThere("nothing".into());
    for (state, stand, block, sends, expected) in [
        // Planned is not sent.
        (WeightsState::Planned, Stand::Confirmed, 10, 1, WeightsState::Confirmed),
        (sent(), Stand::Confirmed, 10, 0, WeightsState::Confirmed),
        // It may still arrive.
        (sent(), gone(), 10, 0, sent()),
        (sent(), gone(), 90, 0, failed("nothing")),
        // As long as its record says, and no longer.
        (sent_until(90), gone(), 90, 0, sent_until(90)),
        (sent_until(20), gone(), 21, 0, failed("nothing")),
        // A commit that is in a block, though the run that sent it ended before it knew.
        (commit_sent(), Stand::Waiting, 10, 0, committed()),
        (WeightsState::Confirmed, gone(), 90, 0, WeightsState::Confirmed),
        (failed("why"), gone(), 90, 0, failed("why")),
    ] {
        let world = left(state.clone());
        world.heads.send_replace(block);
        *world.stand.lock() = stand;
        let running = driver(&world, options(Some(1))).await;
        running.run(CancellationToken::new(), &|_| {}).await.unwrap();
        assert_eq!(world.sends.lock().len(), sends, "{state:?}");
        assert_eq!(world.weights.lock()[&0].state, expected, "{state:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_sends_and_remembers_no_weights() {
    let world = Arc::new(Fake::new());
    let options = RunOptions { is_dry: true, ..options(Some(1)) };
    let running = driver(&world, options).await;
    let summary = running.run(CancellationToken::new(), &|_| {}).await.unwrap();
    let Some(Settled::Weights(weights)) = summary.weights else { panic!("{summary:?}") };
    assert_eq!((weights.state, weights.values), (WeightsState::Planned, vec![(1, u16::MAX)]));
    assert!(world.sends.lock().is_empty() && world.weights.lock().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_of_earlier_epochs_are_looked_up_again() {
    let committed =
        || WeightsState::Committed { hash: "0x1".into(), blocks: None, reveal_round: 9 };
    let failed = |why: &str| WeightsState::Failed { why: why.into() };
    let gone = || Stand::NotThere("it was not revealed".into());
    for (stand, block, expected) in [
        (Stand::Confirmed, 110, WeightsState::Confirmed),
        (Stand::Waiting, 110, committed()),
        (gone(), 110, failed("it was not revealed")),
        // It may still be in a block.
        (gone(), 60, committed()),
    ] {
        let world = left(committed());
        world.heads.send_replace(block);
        *world.stand.lock() = stand.clone();
        let options = RunOptions { epochs: EpochRule::Every(50), ..options(Some(1)) };
        let running = driver(&world, options).await;
        assert_eq!(running.progress().snapshot().weights_age(), None, "nothing was seen there");
        running.run(CancellationToken::new(), &|_| {}).await.unwrap();
        assert_eq!(world.weights.lock()[&0].state, expected, "{stand:?} {block}");
        assert_eq!(world.sends.lock().len(), 1, "{stand:?} {block}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_age_of_weights_counts_from_those_that_stood_on_the_chain_last() {
    // A run before this one has confirmed those of epoch 0; all commits since wait.
    let world = left(WeightsState::Confirmed);
    *world.stand.lock() = Stand::Waiting;
    let running = Running::start(&world, options(None)).await;
    let progress = Arc::clone(&running.progress);
    assert_eq!(progress.snapshot().weights_age(), Some(7));
    until("a round", || progress.rounds() > 0).await;
    for block in [100, 200] {
        world.heads.send_replace(block);
        until("weights", || world.weights.lock().contains_key(&block)).await;
        until("an end", || progress.snapshot().weights.is_some_and(|w| w.epoch == block)).await;
        assert_eq!(progress.snapshot().weights_age(), Some(block - 3), "none was revealed");
    }
    *world.stand.lock() = Stand::Confirmed;
    world.heads.send_replace(300);
    until("weights on the chain", || progress.snapshot().weights_age() == Some(0)).await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_starts_where_only_the_first_endpoint_says_that_it_may_not() {
    let world = Arc::new(Fake::new());
    world.lies.store(true, SeqCst);
    driver(&world, options(None)).await;
    assert_eq!(world.readings.load(SeqCst), 2);
    let world = Arc::new(Fake { permit: false, ..Fake::new() });
    let (clock, chance) = (Clock::system(), Chance::seeded(1));
    let ended = Driver::new(Arc::clone(&world), options(None), clock, chance).await.err();
    assert!(matches!(ended, Some(RunError::Subnet(SubnetError::NoPermit(_)))), "{ended:?}");
    assert_eq!(world.readings.load(SeqCst), 2, "the control: another one was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_endpoint_without_the_permit_ends_no_validator() {
    let world = Arc::new(Fake::new().settled(0));
    let running = Running::start(&world, options(None)).await;
    world.lies.store(true, SeqCst);
    for block in 100..105 {
        world.heads.send_replace(block);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    until("weights", || world.sends.lock().len() == 1).await;
    assert!(!running.is_finished());
    running.stop().await.unwrap();
}
