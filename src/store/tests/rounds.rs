//! Tests rounds, their responses and the samples of miners.

use super::any::any_round;
use super::sites::{another_run, id, newest, on_each, record_words, response, round};
use crate::store::Store;
use crate::store::record::{Outcome, Round, Sampled};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// What the databases do to a text.
fn kept(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

#[test]
fn any_round_comes_back_as_it_was() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: 64,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let handle = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| {
            let ran = runner.run(&any_round(), |mut round| {
                let back = handle.block_on(async {
                    store.save_round(&round).await.unwrap();
                    store.round(&round.id).await.unwrap().unwrap()
                });
                for text in [&mut round.model, &mut round.endpoint, &mut round.profile] {
                    *text = kept(text);
                }
                for response in &mut round.responses {
                    response.hotkey = kept(&response.hotkey);
                    response.coldkey = kept(&response.coldkey);
                    response.cause = response.cause.as_deref().map(kept);
                    response.error = response.error.as_deref().map(kept);
                    if let Some(cheat) = &mut response.statistics.likeliest {
                        cheat.name = kept(&cheat.name);
                    }
                }
                prop_assert_eq!(back, round);
                Ok(())
            });
            ran.unwrap();
        });
        store.close().await;
    });
}

#[test]
fn a_round_is_kept_once() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let first = round(1, 10, vec![response(3, "a", Sampled::Tps(9.0))]);
        store.save_round(&first).await.unwrap();
        store.save_round(&first).await.unwrap();
        assert_eq!(store.samples(4, 15, 0).await.unwrap().len(), 1);
        let other = Round { block: 11, ..first.clone() };
        assert_eq!(record_words(store.save_round(&other).await), "another round has this `id`");
        assert_eq!(store.round(&first.id).await.unwrap(), Some(first));
        assert_eq!(store.round(&id(2)).await.unwrap(), None);
        // It is all there after the program has ended.
        store.close().await;
        drop(store);
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        assert_eq!(newest(&store, 4).await, Some(10));
        assert_eq!(newest(&store, 5).await, None);
    });
}

#[test]
fn records_that_cannot_be_kept_are_refused_by_name() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let good = round(1, 10, vec![response(3, "a", Sampled::Tps(9.0))]);
        let mut bad = good.clone();
        bad.responses[0].timing.total = f64::NAN;
        let words = record_words(store.save_round(&bad).await);
        assert_eq!(words, "uid 3: `total` must be finite, got NaN");
        let mut bad = good.clone();
        bad.responses.push(bad.responses[0].clone());
        let words = record_words(store.save_round(&bad).await);
        assert_eq!(words, "uid 3 must be in a round only once");
        let bad = Round { block: u64::MAX, ..good.clone() };
        let words = record_words(store.save_round(&bad).await);
        assert!(words.starts_with("`block` must be at most 9223372036854775807, got"), "{words}");
        let bad = Round { id: "1".into(), ..good };
        let words = record_words(store.save_round(&bad).await);
        assert_eq!(words, "`id` must have 32 lowercase hexadecimal digits, got \"1\"");
        assert_eq!(newest(&store, 4).await, None);
    });
}

#[test]
fn samples_are_the_newest_of_each_miner_and_model_oldest_first() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        for number in 0..20 {
            let sample = match number % 5 {
                4 => Sampled::Miss,
                _ => Sampled::Tps(number as f64),
            };
            let quiet = response(2, "b", Sampled::Nothing);
            let mut next = round(number, 100 + number / 2, vec![response(1, "a", sample), quiet]);
            next.model = if number % 2 == 0 { "even".into() } else { "odd".into() };
            store.save_round(&next).await.unwrap();
        }
        let samples = store.samples(4, 3, 0).await.unwrap();
        let seen: Vec<_> = samples.iter().map(|s| (s.uid, s.model.as_str(), s.tps)).collect();
        let even = [(1, "even", None), (1, "even", Some(16.0)), (1, "even", Some(18.0))];
        let odd = [(1, "odd", Some(15.0)), (1, "odd", Some(17.0)), (1, "odd", None)];
        assert_eq!(seen, [even, odd].concat());
        // The newest round began at block 109: then all count, however old, and else none.
        assert_eq!(store.samples(4, 100, 109).await.unwrap().len(), 20);
        assert_eq!(store.samples(4, 100, 110).await.unwrap(), []);
        assert_eq!(store.samples(4, 100, u64::MAX).await.unwrap(), []);
        assert_eq!(store.samples(5, 100, 0).await.unwrap(), []);
        assert_eq!(store.samples(4, 0, 0).await.unwrap(), []);
    });
}

#[test]
fn another_hotkey_at_a_uid_has_none_of_its_samples() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let of =
            |n, block, hotkey| round(n, block, vec![response(1, hotkey, Sampled::Tps(n as f64))]);
        store.save_round(&of(1, 100, "a")).await.unwrap();
        assert_eq!(store.samples(4, 15, 0).await.unwrap().len(), 1);
        // The metagraph shows another one: nothing is left before it has answered.
        let held = BTreeMap::from([(1, "b".to_owned()), (2, "c".to_owned())]);
        store.save_hotkeys(4, 110, &held).await.unwrap();
        assert_eq!(store.hotkeys(4).await.unwrap(), held);
        assert_eq!(store.samples(4, 15, 0).await.unwrap(), []);
        // A round that began before is still written, and changes nothing of that.
        store.save_round(&of(2, 109, "a")).await.unwrap();
        assert_eq!(store.hotkeys(4).await.unwrap(), held);
        assert_eq!(store.samples(4, 15, 0).await.unwrap(), []);
        store.save_round(&of(3, 120, "b")).await.unwrap();
        let samples = store.samples(4, 15, 0).await.unwrap();
        assert_eq!((samples.len(), samples[0].hotkey.as_str()), (1, "b"));
        // The first one comes back, with nothing of what it had; a round alone shows that.
        store.save_round(&of(4, 130, "a")).await.unwrap();
        let samples = store.samples(4, 15, 0).await.unwrap();
        assert_eq!((samples.len(), samples[0].tps), (1, Some(4.0)));
        // Another subnet has other hotkeys.
        assert_eq!(store.hotkeys(5).await.unwrap(), BTreeMap::new());
    });
}

#[test]
fn rounds_and_responses_are_listed_newest_first() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        for number in 0..6 {
            let uids = if number % 2 == 0 { vec![1, 2] } else { vec![2] };
            let of = |uid| response(uid, &format!("hotkey {uid}"), Sampled::Tps(1.0));
            let mut next = round(number, number, uids.into_iter().map(of).collect());
            next.responses[0].outcome = Outcome::Rejected;
            store.save_round(&next).await.unwrap();
        }
        let heads = store.rounds(4, u64::MAX, 2).await.unwrap();
        let seen: Vec<_> = heads.iter().map(|h| (h.block, h.asked, h.verified)).collect();
        assert_eq!(seen, [(5, 1, 0), (4, 2, 1)]);
        let older = store.rounds(4, heads[1].started_ms, 100).await.unwrap();
        assert_eq!(older.iter().map(|h| h.block).collect::<Vec<_>>(), [3, 2, 1, 0]);
        let answered = store.responses(4, 1, 2).await.unwrap();
        let seen: Vec<_> = answered.iter().map(|a| (a.round.block, a.round.asked)).collect();
        assert_eq!(seen, [(4, 2), (2, 2)]);
        let whole = store.round(&id(4)).await.unwrap().unwrap();
        assert_eq!(answered[0].response, whole.responses[0]);
        assert_eq!(store.responses(4, 9, 2).await.unwrap(), []);
    });
}
