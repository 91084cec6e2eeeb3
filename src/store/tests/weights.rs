//! Tests weights of an epoch: planned, sent and confirmed, by one run of the program.

use super::sites::{another_run, block_on, on_each, plan, postgres, sent_as};
use crate::store::record::{EpochWeights, SentBlocks, WeightsState};
use crate::store::{Store, WeightsClaim};

#[test]
fn weights_of_an_epoch_go_out_once() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let sent = sent_as("0xaa".into());
        assert_eq!(store.last_weights(4).await.unwrap(), None);
        let nothing = store.mark_weights(4, 7, &sent).await.unwrap_err();
        assert!(nothing.to_string().contains("nothing is planned for this epoch"), "{nothing}");
        // A plan that was not sent is replaced by the next one.
        assert_eq!(store.plan_weights(&plan(7, 1)).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(store.plan_weights(&plan(7, 2)).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(store.unfinished_weights().await.unwrap(), [plan(7, 2)]);
        assert_eq!(store.mark_weights(4, 7, &sent).await.unwrap(), WeightsClaim::Ours);
        // The same answer again, for the first one may have been lost; but nothing else.
        assert_eq!(store.mark_weights(4, 7, &sent).await.unwrap(), WeightsClaim::Ours);
        let other = sent_as("0xbb".into());
        assert_eq!(
            store.mark_weights(4, 7, &other).await.unwrap(),
            WeightsClaim::Taken(sent.clone())
        );
        let again = store.plan_weights(&plan(7, 3)).await.unwrap();
        assert_eq!(again, WeightsClaim::Taken(sent.clone()));
        let last = store.last_weights(4).await.unwrap().unwrap();
        assert_eq!(last, EpochWeights { state: sent, ..plan(7, 2) });
        let committed =
            WeightsState::Committed { hash: "0xcc".into(), blocks: None, reveal_round: 99 };
        assert_eq!(store.mark_weights(4, 7, &committed).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(store.unfinished_weights().await.unwrap()[0].state, committed);
        let failed = WeightsState::Failed { why: "the chain has others".into() };
        assert_eq!(store.mark_weights(4, 7, &failed).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(store.unfinished_weights().await.unwrap(), []);
        // It was seen later after all; and then it stays so.
        assert_eq!(
            store.mark_weights(4, 7, &WeightsState::Confirmed).await.unwrap(),
            WeightsClaim::Ours
        );
        let late = store.mark_weights(4, 7, &failed).await.unwrap();
        assert_eq!(late, WeightsClaim::Taken(WeightsState::Confirmed));
        // Another epoch and another subnet have their own.
        assert_eq!(store.plan_weights(&plan(8, 1)).await.unwrap(), WeightsClaim::Ours);
        let elsewhere = EpochWeights { netuid: 5, ..plan(7, 1) };
        assert_eq!(store.plan_weights(&elsewhere).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(store.last_weights(4).await.unwrap(), Some(plan(8, 1)));
        // Those of an epoch are found whatever came after it.
        let of = async |netuid, epoch| store.weights_of(netuid, epoch).await.unwrap();
        let confirmed = EpochWeights { state: WeightsState::Confirmed, ..plan(7, 2) };
        assert_eq!(of(4, 7).await, Some(confirmed));
        assert_eq!((of(4, 8).await, of(4, 9).await), (Some(plan(8, 1)), None));
        assert_eq!(of(5, 7).await, Some(elsewhere));
    });
}

#[test]
fn what_was_sent_is_known_after_a_restart() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let blocks = Some(SentBlocks { after: 2519, until: 2551 });
        let first = WeightsState::Sent { hash: "0xaa".into(), blocks, reveal_round: Some(99) };
        assert_eq!(store.plan_weights(&plan(7, 1)).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(store.mark_weights(4, 7, &first).await.unwrap(), WeightsClaim::Ours);
        // The pool has refused it, and another one goes out.
        let blocks = Some(SentBlocks { after: 2521, until: 2553 });
        let next = WeightsState::Sent { hash: "0xbb".into(), blocks, reveal_round: Some(101) };
        let replace = async |store: &Store, refused: &str| {
            store.replace_sent_weights((4, 7), refused, &next).await.unwrap()
        };
        assert_eq!(replace(&store, "0xcc").await, WeightsClaim::Taken(first));
        assert_eq!(replace(&store, "0xaa").await, WeightsClaim::Ours);
        store.close().await;
        drop(store);
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        assert_eq!(store.unfinished_weights().await.unwrap()[0].state, next);
        // What another run has sent is not replaced by this one.
        assert_eq!(replace(&store, "0xbb").await, WeightsClaim::Taken(next.clone()));
        let committed =
            WeightsState::Committed { hash: "0xbb".into(), blocks: None, reveal_round: 101 };
        assert_eq!(store.mark_weights(4, 7, &committed).await.unwrap(), WeightsClaim::Ours);
        let known = store.unfinished_weights().await.unwrap()[0].state.clone();
        assert_eq!(known.sent_blocks(), blocks, "a later step keeps what is known");
        assert_eq!(store.confirmed_weights(4).await.unwrap(), None);
        let confirmed = store.mark_weights(4, 7, &WeightsState::Confirmed).await.unwrap();
        assert_eq!(confirmed, WeightsClaim::Ours);
        assert_eq!(store.plan_weights(&plan(8, 1)).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(store.confirmed_weights(4).await.unwrap().map(|w| w.epoch), Some(7));
        assert_eq!(store.confirmed_weights(5).await.unwrap(), None);
    });
}

#[test]
fn weights_that_the_chain_refused_are_planned_again() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let withdraw = async |store: &Store, refused: &str| {
            store.withdraw_sent_weights((4, 7), refused).await.unwrap()
        };
        assert_eq!(store.plan_weights(&plan(7, 1)).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(withdraw(&store, "0xaa").await, WeightsClaim::Taken(WeightsState::Planned));
        let blocks = Some(SentBlocks { after: 2519, until: 2551 });
        let sent = WeightsState::Sent { hash: "0xaa".into(), blocks, reveal_round: Some(99) };
        assert_eq!(store.mark_weights(4, 7, &sent).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(withdraw(&store, "0xbb").await, WeightsClaim::Taken(sent.clone()));
        assert_eq!(withdraw(&store, "0xaa").await, WeightsClaim::Ours);
        assert_eq!(store.unfinished_weights().await.unwrap(), [plan(7, 1)]);
        // They may be decided anew, and sent.
        assert_eq!(store.plan_weights(&plan(7, 2)).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(store.mark_weights(4, 7, &sent).await.unwrap(), WeightsClaim::Ours);
        store.close().await;
        drop(store);
        // What another run has sent is not for this one to take back.
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        assert_eq!(withdraw(&store, "0xaa").await, WeightsClaim::Taken(sent));
    });
}

#[test]
fn weights_that_another_run_planned_are_not_sent() {
    on_each(async |site| {
        let sent = sent_as("0xaa".into());
        let first = Store::open(&site.url, &another_run()).await.unwrap();
        assert_eq!(first.plan_weights(&plan(7, 1)).await.unwrap(), WeightsClaim::Ours);
        // A crash, and the next run of the program.
        first.close().await;
        drop(first);
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        assert_eq!(store.unfinished_weights().await.unwrap(), [plan(7, 1)]);
        let taken = store.mark_weights(4, 7, &sent).await.unwrap();
        assert_eq!(taken, WeightsClaim::Taken(WeightsState::Planned));
        assert_eq!(store.plan_weights(&plan(7, 2)).await.unwrap(), WeightsClaim::Ours);
        assert_eq!(store.mark_weights(4, 7, &sent).await.unwrap(), WeightsClaim::Ours);
    });
}

/// Eight runs of the program on one PostgreSQL database, which no lock keeps apart.
#[test]
fn of_many_that_plan_at_once_one_sends() {
    block_on(async {
        let Some(site) = postgres().await else { return };
        let mut runs = tokio::task::JoinSet::new();
        for run in 0..8_u16 {
            let url = site.url.clone();
            runs.spawn(async move {
                let store = Store::open(&url, &another_run()).await.unwrap();
                let mut sends = Vec::new();
                for epoch in 0..10 {
                    let planned = store.plan_weights(&plan(epoch, run)).await.unwrap();
                    let sent = sent_as(format!("{run}"));
                    let marked = store.mark_weights(4, epoch, &sent).await.unwrap();
                    if planned == WeightsClaim::Ours && marked == WeightsClaim::Ours {
                        sends.push((epoch, run));
                    }
                }
                sends
            });
        }
        let mut sends: Vec<_> = runs.join_all().await.into_iter().flatten().collect();
        sends.sort();
        let epochs: Vec<_> = sends.iter().map(|(epoch, _)| *epoch).collect();
        assert_eq!(epochs, (0..10).collect::<Vec<_>>());
        // What is stored is what was sent.
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        for weights in store.unfinished_weights().await.unwrap() {
            let (_, run) = sends[weights.epoch as usize];
            assert_eq!(weights.state, sent_as(format!("{run}")));
            assert_eq!(weights.values[0].1, run);
        }
    });
}
