//! Tests stores of an older and a newer schema.

use super::sites::{another_run, id, on_each, record_words, response, round};
use crate::store::record::{LikelyCheat, MeasuredValue, Sampled, Statistics, WeightsState};
use crate::store::schema::VERSIONS;
use crate::store::session::LIMITS;
use crate::store::{Store, StoreError};

#[test]
fn another_version_of_the_schema_is_brought_up_to_date_or_refused() {
    on_each(async |site| {
        let one = ["CREATE TABLE first (a BIGINT)"];
        let two = [one[0], "ALTER TABLE first ADD COLUMN b TEXT"];
        let broken =
            [two[0], two[1], "CREATE TABLE second (a BIGINT); CREATE TABLE first (x TEXT)"];
        let open = async |versions: &[&str]| {
            let store = Store::open_as(&site.url, versions, LIMITS, &another_run()).await?;
            store.close().await;
            Ok::<_, StoreError>(())
        };
        open(&one).await.unwrap();
        open(&two).await.unwrap();
        open(&two).await.unwrap();
        let words = open(&one).await.unwrap_err().to_string();
        let newer = "it has version 2 of the schema, and this program knows versions up to 1";
        assert!(words.contains(newer), "{words}");
        // A step that fails leaves nothing behind, so the next program takes it.
        open(&broken).await.unwrap_err();
        let three = [two[0], two[1], "CREATE TABLE second (a BIGINT)"];
        open(&three).await.unwrap();
        open(&[three[0], three[1], three[2], "CREATE TABLE third (a BIGINT)"]).await.unwrap();
        // This program's version is 3, and knows other tables.
        let read = Store::open_to_read(&site.url).await.err().unwrap().to_string();
        assert!(read.contains("it has version 4 of the schema"), "{read}");
    });
}

#[test]
fn an_older_schema_is_not_read() {
    on_each(async |site| {
        let store = Store::open_as(&site.url, &[], LIMITS, &another_run()).await.unwrap();
        store.close().await;
        drop(store);
        let read = Store::open_to_read(&site.url).await.err().unwrap().to_string();
        let older = "it has version 0 of the schema, and version 3 is read here";
        assert!(read.contains(older), "{read}");
        Store::open(&site.url, &another_run()).await.unwrap();
        Store::open_to_read(&site.url).await.unwrap();
    });
}

#[test]
fn records_of_the_first_version_are_read_and_have_no_statistics() {
    on_each(async |site| {
        let store =
            Store::open_as(&site.url, &VERSIONS[..1], LIMITS, &another_run()).await.unwrap();
        let mut session = store.write("write as the first version did").await.unwrap();
        session
            .script(
                "INSERT INTO rounds VALUES
                    ('0000000000000000000000000000000a', 4, 40, 1, 2, 'm', '/e', 'default', '{}');
                 INSERT INTO responses VALUES
                    ('0000000000000000000000000000000a', 4, 1, 7, 'h', 'c', 0.5, 1.5, 2.0, 8.0, 16,
                     'verified', NULL, NULL, 'tps', 8.0, NULL, NULL);
                 INSERT INTO weights VALUES
                    (4, 7, 40, 1, 2, 'committed', '0xaa', 99, NULL, 'run', '[[7, 65535]]', '{}')",
            )
            .await
            .unwrap();
        session.commit().await.unwrap();
        store.close().await;
        drop(store);
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let committed =
            WeightsState::Committed { hash: "0xaa".into(), blocks: None, reveal_round: 99 };
        assert_eq!(store.unfinished_weights().await.unwrap()[0].state, committed);
        let old = store.round(&id(10)).await.unwrap().unwrap();
        assert_eq!((old.responses[0].uid, old.responses[0].timing.tokens), (7, 16));
        assert_eq!(old.responses[0].statistics, Statistics::default());
        let mut new = response(7, "h", Sampled::Tps(9.0));
        new.statistics = Statistics {
            rows: Some(96),
            margin: Some(0.0625),
            trimmed: Some(MeasuredValue { value: 91.5, limit: 225.0 }),
            twin: Some(MeasuredValue { value: 1.75, limit: 1.4 }),
            likeliest: Some(LikelyCheat { name: "int8 per channel".into(), beta: 0.97 }),
        };
        let new = round(11, 41, vec![new]);
        store.save_round(&new).await.unwrap();
        assert_eq!(store.round(&id(11)).await.unwrap(), Some(new));
        let mut broken = round(12, 42, vec![response(7, "h", Sampled::Miss)]);
        broken.responses[0].statistics.margin = Some(f64::NAN);
        let words = record_words(store.save_round(&broken).await);
        assert!(words.contains("uid 7: `margin` must be finite, got NaN"), "{words}");
    });
}
