//! Tests rounds: their records, verifications that fail, stops.

use super::super::*;
use super::fake::{Fake, Running, driver, options, until};
use crate::store::record::{Outcome, Sampled, WeightsState};
use crate::validator::round::MinerState;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

#[tokio::test(flavor = "multi_thread")]
async fn rounds_end_in_records_and_weights() {
    let world = Arc::new(Fake::new());
    let seen = AtomicUsize::new(0);
    let running = driver(&world, options(Some(3))).await;
    let on_round = |_: &Round| {
        seen.fetch_add(1, SeqCst);
    };
    let summary = running.run(CancellationToken::new(), &on_round).await.unwrap();
    assert_eq!((summary.rounds, seen.load(SeqCst)), (3, 3));
    let saved = world.saved.lock();
    assert_eq!(saved.iter().map(|r| r.id.clone()).collect::<BTreeSet<_>>().len(), 3);
    for round in saved.iter() {
        let found: Vec<_> =
            round.responses.iter().map(|r| (r.uid, r.outcome, r.cause.as_deref())).collect();
        assert_eq!(
            found,
            [
                (1, Outcome::Verified, None),
                (2, Outcome::Rejected, Some("SAMPLER_MARGIN")),
                (3, Outcome::Failed, Some("STATUS")),
                (4, Outcome::Unscored, Some("UNSCORED")), // its query broke
                (5, Outcome::NotServed, Some("NOT_SERVED")),
            ]
        );
        assert_eq!(round.responses[0].sample, Sampled::Tps(100.0));
        assert_eq!(round.responses[3].sample, Sampled::Nothing);
    }
    assert_eq!(world.checking_max.load(SeqCst), CHECKS_DEFAULT);
    assert_eq!(*world.sends.lock(), [(0, vec![(1, u16::MAX)])]);
    let Some(Settled::Weights(weights)) = summary.weights else { panic!("{summary:?}") };
    assert_eq!((weights.state, weights.block), (WeightsState::Confirmed, 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn rounds_without_an_answer_do_not_follow_each_other_at_once() {
    for (answers, at_most) in [(false, 1), (true, u64::MAX)] {
        let world = Arc::new(Fake::new());
        world.answers.store(answers, SeqCst);
        let running = Running::start(&world, options(None)).await;
        until("a round", || !world.saved.lock().is_empty()).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let rounds = running.progress.rounds();
        assert!(rounds <= at_most, "{rounds} rounds");
        assert!(!answers || rounds > 1, "the control: rounds with answers follow each other");
        running.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_gone_costs_no_round() {
    let world = Arc::new(Fake::new());
    let dir = tempfile::tempdir().unwrap();
    let spill = dir.path().join("rounds.jsonl");
    let options = RunOptions { spill: Some(spill.clone()), ..options(None) };
    let running = Running::start(&world, options.clone()).await;
    let progress = Arc::clone(&running.progress);
    until("a round", || !world.saved.lock().is_empty()).await;
    world.records.store(false, SeqCst);
    let at = world.saved.lock().len() as u64;
    until("all places taken", || progress.rounds() >= at + UNSAVED_MAX as u64).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let held = progress.rounds() - world.saved.lock().len() as u64;
    assert!(held <= (UNSAVED_MAX + ROUNDS_MAX) as u64, "{held} rounds are held in memory");
    let error = running.stop().await.unwrap_err().to_string();
    assert!(error.contains("could not be remembered; they are in"), "{error}");
    // The next start takes them over, in order and each once.
    world.records.store(true, SeqCst);
    let options = RunOptions { rounds: Some(1), ..options };
    let (clock, chance) = (Clock::system(), Chance::seeded(2));
    let next = Driver::new(Arc::clone(&world), options, clock, chance).await.unwrap();
    next.run(CancellationToken::new(), &|_| {}).await.unwrap();
    assert!(!spill.exists());
    let ids: Vec<String> = world.saved.lock().iter().map(|r| r.id.clone()).collect();
    assert_eq!(ids.len() as u64, progress.rounds() + 1);
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_that_hangs_or_breaks_holds_up_nothing_and_blames_nobody() {
    for is_hanging in [true, false] {
        let world = Arc::new(Fake::new());
        world.hangs.store(is_hanging, SeqCst);
        world.panics.store(!is_hanging, SeqCst);
        let running = driver(&world, options(Some(2))).await;
        running.run(CancellationToken::new(), &|_| {}).await.unwrap();
        for round in world.saved.lock().iter() {
            let of = |uid| round.responses.iter().find(|r| r.uid == uid).unwrap();
            assert_eq!(of(1).outcome, Outcome::Unscored);
            assert_eq!((of(2).sample, of(3).sample), (Sampled::Nothing, Sampled::Miss));
            let why = of(1).error.clone().unwrap();
            let expected = if is_hanging { "not verified in time" } else { "validator broke" };
            assert!(why.contains(expected), "{why}");
        }
    }
}

/// A validator whose verifications do not end within the test.
async fn hanging() -> (Arc<Fake>, Running) {
    let world = Arc::new(Fake::new());
    world.hangs.store(true, SeqCst);
    let mut options = options(None);
    options.round.times.verdicts = Duration::from_secs(600);
    let running = Running::start(&world, options).await;
    (world, running)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_in_time_with_everything_remembered() {
    let (world, running) = hanging().await;
    until("verifications", || world.checking.load(SeqCst) == CHECKS_DEFAULT).await;
    let summary = running.stop().await.unwrap();
    let saved = world.saved.lock();
    assert_eq!(summary.rounds, saved.len() as u64);
    assert!(!saved.is_empty());
    let stopped = saved.iter().flat_map(|round| &round.responses);
    let why = |r: &crate::store::record::MinerResponse| r.error.clone().unwrap_or_default();
    assert!(stopped.filter(|r| r.uid == 1).all(|r| why(r).contains("was stopped")));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_watches_sees_rounds_miners_verdicts_and_weights_to_come() {
    let (world, running) = hanging().await;
    let views = running.views.clone();
    let state = |uid: u16| views.borrow().miners.get(&uid).and_then(|m| m.state);
    until("a verification", || matches!(state(1), Some(MinerState::Checking(_)))).await;
    let is_checking = || views.borrow().rounds.iter().any(|r| r.phase == RoundPhase::Checking);
    until("a round that waits for verdicts", is_checking).await;
    let view = Arc::clone(&views.borrow());
    assert_eq!((view.netuid, view.block, view.epoch), (4, 10, (0, 100)));
    assert_eq!(view.miners.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert_eq!(state(5), Some(MinerState::NotServed));
    assert!(view.rounds.iter().all(|round| round.model == "m"));
    assert_eq!(view.miners[&1].last, None);
    world.hangs.store(false, SeqCst);
    let last = |uid: u16| views.borrow().miners[&uid].last.clone();
    until("a verdict", || last(1).is_some_and(|l| l.outcome == Outcome::Verified)).await;
    assert_eq!(last(2).unwrap().cause.as_deref(), Some("SAMPLER_MARGIN"));
    assert!(views.borrow().miners[&1].counts["verified"] > 0);
    until("weights to come", || views.borrow().to_come.get(&1) == Some(&u16::MAX)).await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_permit_nothing_begins() {
    let world = Arc::new(Fake { permit: false, ..Fake::new() });
    let (clock, chance) = (Clock::system(), Chance::seeded(1));
    let refused = Driver::new(Arc::clone(&world), options(None), clock.clone(), chance.clone());
    let error = refused.await.map(drop).unwrap_err().to_string();
    assert!(error.contains("uid 0") && error.contains("no validator permit"), "{error}");
    let mut options = options(Some(1));
    options.reading.is_permit_needed = false;
    assert!(Driver::new(world, options, clock, chance).await.is_ok());
}
