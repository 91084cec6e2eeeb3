//! Tests what is kept beside rounds, what is removed, what is exported and what users may ask.

use super::sites::{another_run, id, on_each, plan, response, round};
use crate::store::record::{MeasuredValue, MinerResponse, Outcome, ResponseCause, Sampled};
use crate::store::{Filter, Removed, Retention, Store, What};
use serde_json::{Value, json};

#[test]
fn evidence_is_replaced_as_a_whole() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        assert_eq!(store.evidence("a", "m").await.unwrap(), None);
        let state = json!({"answers": 3, "sums": {"margin": 0.1, "energy": 1e-9}});
        let save = |known: Option<Value>, state: Value| {
            let store = store.clone();
            async move {
                let change = |found| {
                    assert_eq!(found, known);
                    anyhow::Ok(state)
                };
                store.change_evidence("a", "m", change).await
            }
        };
        assert_eq!(save(None, state.clone()).await.unwrap(), state);
        assert_eq!(store.evidence("a", "m").await.unwrap(), Some(state.clone()));
        let refused =
            store.change_evidence("a", "m", |_| Err(anyhow::anyhow!("no"))).await.unwrap_err();
        assert!(refused.to_string().ends_with("cannot change the evidence about a: no"));
        save(Some(state), json!({"answers": 4})).await.unwrap();
        assert_eq!(store.evidence("a", "m").await.unwrap(), Some(json!({"answers": 4})));
        assert_eq!(store.evidence("a", "n").await.unwrap(), None);
        assert_eq!(store.evidence("b", "m").await.unwrap(), None);
    });
}

#[test]
fn changes_of_evidence_at_once_all_count() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let one = |_: u32| {
            let store = store.clone();
            async move {
                let more = |known: Option<Value>| {
                    let answers = known.map_or(0, |known| known["answers"].as_u64().unwrap());
                    anyhow::Ok(json!({ "answers": answers + 1 }))
                };
                store.change_evidence("a", "m", more).await.unwrap();
            }
        };
        futures_util::future::join_all((0..8).map(one)).await;
        assert_eq!(store.evidence("a", "m").await.unwrap(), Some(json!({"answers": 8})));
    });
}

#[test]
fn retention_removes_what_it_says_and_no_more() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        for number in 0..10 {
            let hotkey = if number < 5 { "old" } else { "new" };
            let of = |uid, hotkey| response(uid, hotkey, Sampled::Tps(number as f64));
            let next = round(number, 100 + number, vec![of(1, "a"), of(2, hotkey)]);
            store.save_round(&next).await.unwrap();
        }
        let nothing = store.retain(&Retention::default()).await.unwrap();
        assert_eq!(nothing, Removed::default());
        let at = |number: u64| Some(1_000_000 + number);
        let removed = store
            .retain(&Retention {
                captures_before_ms: at(6),
                reports_before_ms: at(2),
                ..Retention::default()
            })
            .await
            .unwrap();
        assert_eq!((removed.captures, removed.reports, removed.rounds), (12, 4, 0));
        let kept = async |number| store.round(&id(number)).await;
        let response = kept(5).await.unwrap().unwrap().responses.remove(0);
        assert_eq!((response.capture.is_some(), response.report.is_some()), (false, true));
        assert!(kept(6).await.unwrap().unwrap().responses[0].capture.is_some());
        let old = Retention { rounds_before_ms: at(600), ..Retention::default() };
        let old = Retention { rounds_before_ms: at(3), ..old };
        let removed = store.retain(&old).await.unwrap();
        assert_eq!((removed.rounds, removed.samples), (3, 0));
        assert_eq!(kept(2).await.unwrap(), None);
        assert!(kept(3).await.unwrap().is_some());
        assert_eq!(store.responses(4, 1, 100).await.unwrap().len(), 7);
        // Samples outlive their rounds, as long as their hotkey holds its place.
        assert_eq!(store.samples(4, 100, 0).await.unwrap().len(), 15);
        let few = Retention { rounds_max: Some(4), samples_max: Some(2), ..Retention::default() };
        let removed = store.retain(&few).await.unwrap();
        assert_eq!((removed.rounds, removed.samples), (3, 8 + 3 + 3));
        assert_eq!(store.rounds(4, u64::MAX, 100).await.unwrap().len(), 4);
        assert_eq!(store.samples(4, 100, 0).await.unwrap().len(), 4);
        let all = Retention { rounds_before_ms: at(10_000), ..Retention::default() };
        let removed = store.retain(&all).await.unwrap();
        assert_eq!((removed.rounds, removed.samples), (4, 2));
    });
}

#[test]
fn an_export_has_every_row_once_in_order() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        for number in 0..70 {
            // Pairs of one time, and more rows than a page has.
            let mut next = round(number, number, vec![]);
            next.started_ms = 1_000_000 + number / 2;
            next.responses =
                vec![response(1, "a", Sampled::Tps(0.1)), response(2, "b", Sampled::Miss)];
            store.save_round(&next).await.unwrap();
        }
        let _ = store.plan_weights(&plan(1, 5)).await.unwrap();
        let reader = Store::open_to_read(&site.url).await.unwrap();
        let count = async |what, filter| {
            let mut export = reader.export(what, filter);
            let mut rows = Vec::new();
            loop {
                let page = export.next().await.unwrap();
                if page.is_empty() {
                    return rows;
                }
                rows.extend(page);
            }
        };
        let all = Filter::default();
        let responses = count(What::Responses, all).await;
        assert_eq!(responses.len(), 140);
        assert!(responses.iter().all(|row| row.len() == What::Responses.columns().len()));
        let keys: Vec<_> =
            responses.iter().map(|r| format!("{:?}{:?}{:?}", r[3], r[0], r[5])).collect();
        assert!(keys.windows(2).all(|pair| pair[0] < pair[1]));
        let filter = Filter { since_ms: 1_000_030, uid: Some(2) };
        assert_eq!(count(What::Responses, filter).await.len(), 10);
        assert_eq!(count(What::Rounds, filter).await.len(), 10);
        assert_eq!(count(What::Rounds, all).await.len(), 70);
        assert_eq!(count(What::Rounds, Filter { uid: Some(3), ..all }).await.len(), 0);
        assert_eq!(count(What::Samples, all).await.len(), 140);
        assert_eq!(count(What::Weights, all).await.len(), 1);
    });
}

/// The queries of the documentation run on both databases, over every kind of row.
#[test]
fn documented_queries_run() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let mut rejected = response(7, "b", Sampled::Miss);
        (rejected.outcome, rejected.cause) = (Outcome::Rejected, Some("TOO_SHORT".into()));
        let mut good = response(3, "a", Sampled::Tps(9.0));
        good.statistics.trimmed = Some(MeasuredValue { value: 91.5, limit: 225.0 });
        store.save_round(&round(1, 10, vec![good, rejected])).await.unwrap();
        let _ = store.plan_weights(&plan(1, 5)).await.unwrap();
        let text = include_str!("../../../docs/database.md");
        let blocks = text.split("```sql\n").skip(1).map(|rest| rest.split("```").next().unwrap());
        let queries: Vec<_> = blocks.flat_map(|b| b.split(';')).map(str::trim).collect();
        let queries: Vec<_> = queries.into_iter().filter(|query| !query.is_empty()).collect();
        assert_eq!(queries.len(), 8);
        for query in queries {
            let mut session = store.read("run a query of the documentation").await.unwrap();
            let rows = session.rows(query, Vec::new()).await.unwrap();
            assert!(!rows.is_empty(), "{query}");
            session.commit().await.unwrap();
        }
    });
}

#[test]
fn causes_are_read_without_what_makes_answers_large() {
    on_each(async |site| {
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        for number in 1..=3 {
            let good = response(2, "b", Sampled::Tps(9.0));
            let error = Some(format!("token {number}"));
            let cause = Some("LATE".to_owned());
            let bad = MinerResponse { cause, error, ..response(3, "a", Sampled::Miss) };
            store.save_round(&round(number, number, vec![good, bad])).await.unwrap();
        }
        let newest = store.causes(4, 3, 2).await.unwrap();
        let found = |number: u64| ResponseCause {
            round: id(number),
            uid: 3,
            cause: Some("LATE".into()),
            error: Some(format!("token {number}")),
        };
        assert_eq!(newest, [found(3), found(2)]);
        assert_eq!(store.causes(4, 2, 9).await.unwrap(), []);
        assert_eq!(store.causes(5, 3, 9).await.unwrap(), []);
    });
}
