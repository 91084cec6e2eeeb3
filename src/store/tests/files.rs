//! Tests SQLite files: one writer, damage, full disks.

use super::sites::{another_run, block_on, id, newest, refusal, response, round, sqlite};
use crate::store::Store;
use crate::store::record::Sampled;
use sqlx::Connection;
use std::path::Path;

/// Runs statements on a SQLite file, as another program would.
async fn tamper(path: &str, sql: &str) {
    sqlx::any::install_default_drivers();
    let url = format!("sqlite://{path}?mode=rwc");
    let mut connection = sqlx::AnyConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

#[test]
fn one_process_writes_a_file_and_others_read_it() {
    block_on(async {
        let site = sqlite();
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let link = Path::new(&site.url).with_file_name("link.sqlite");
        std::os::unix::fs::symlink(&site.url, &link).unwrap();
        for name in [site.url.as_str(), link.to_str().unwrap(), &format!("sqlite://{}", site.url)] {
            let words = refusal(name).await;
            let process = std::process::id();
            let why = format!("process {process} writes it, and only one process may");
            assert!(words.starts_with(&site.url) && words.ends_with(&why), "{words}");
        }
        store.save_round(&round(1, 1, vec![])).await.unwrap();
        let reader = Store::open_to_read(&site.url).await.unwrap();
        assert_eq!(newest(&reader, 4).await, Some(1));
        store.save_round(&round(2, 2, vec![])).await.unwrap();
        assert_eq!(newest(&reader, 4).await, Some(2));
        let words = reader.save_round(&round(3, 3, vec![])).await.unwrap_err().to_string();
        assert!(words.contains("the store was opened to be read"), "{words}");
        store.close().await;
        drop(store);
        assert_eq!(newest(&reader, 4).await, Some(2));
        Store::open(&site.url, &another_run()).await.unwrap();
    });
}

#[test]
fn files_that_are_no_store_of_ours_are_refused_by_name() {
    block_on(async {
        let site = sqlite();
        std::fs::write(&site.url, [b'x'; 5000]).unwrap();
        let words = refusal(&site.url).await;
        assert!(words.starts_with(&format!("{}: cannot open the store: ", site.url)), "{words}");
        assert!(words.contains("file is not a database"), "{words}");
        let site = sqlite();
        tamper(&site.url, "CREATE TABLE users (name TEXT)").await;
        let words = refusal(&site.url).await;
        assert!(words.ends_with("it holds tables of another one"), "{words}");
        let read = Store::open_to_read(&site.url).await.err().unwrap().to_string();
        assert!(read.ends_with("it has no table `targon_schema`"), "{read}");
        let missing = Path::new(&site.url).with_file_name("none.sqlite");
        let read = Store::open_to_read(missing.to_str().unwrap()).await.err().unwrap().to_string();
        assert!(read.contains("none.sqlite: cannot open the store: No such file"), "{read}");
        assert!(!missing.exists());
        let words = refusal("/nowhere/store.sqlite").await;
        assert!(
            words.starts_with("/nowhere/store.sqlite: cannot open the store: No such"),
            "{words}"
        );
        let words = refusal("mysql://root:secret@host/db").await;
        assert!(words.contains("must be a path") && !words.contains("secret"), "{words}");
    });
}

/// A kill does not show what a power cut would lose, so the setting itself is looked at.
#[test]
fn what_is_committed_is_on_the_disk() {
    block_on(async {
        let site = sqlite();
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let mut session = store.write("look at settings").await.unwrap();
        // 2 is FULL.
        for (setting, expected) in [("synchronous", 2), ("foreign_keys", 1)] {
            let found = session.integer(&format!("PRAGMA {setting}"), Vec::new()).await.unwrap();
            assert_eq!(found, Some(expected), "{setting}");
        }
        session.commit().await.unwrap();
        assert!(Path::new(&format!("{}-wal", site.url)).exists());
    });
}

#[test]
fn a_full_disk_refuses_a_round_and_loses_none() {
    block_on(async {
        let site = sqlite();
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        let large = |number| {
            let mut large = round(number, number, vec![response(1, "a", Sampled::Tps(1.0))]);
            large.responses[0].capture = Some("x".repeat(100_000).into());
            large
        };
        store.save_round(&large(0)).await.unwrap();
        let mut session = store.write("set a quota").await.unwrap();
        session.rows("PRAGMA max_page_count = 120", Vec::new()).await.unwrap();
        session.commit().await.unwrap();
        let mut saved = 0;
        let words = loop {
            match store.save_round(&large(saved + 1)).await {
                Ok(()) => saved += 1,
                Err(e) => break e.to_string(),
            }
            assert!(saved < 10, "the quota holds nothing back");
        };
        let expected = format!("cannot save round {}: database or disk is full", id(saved + 1));
        assert!(words.contains(&expected) && words.starts_with(&site.url), "{words}");
        assert_eq!(store.round(&id(saved + 1)).await.unwrap(), None);
        assert_eq!(store.samples(4, 100, 0).await.unwrap().len(), saved as usize + 1);
        // Space again: the next run goes on where this one stopped.
        store.close().await;
        drop(store);
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        store.save_round(&large(saved + 1)).await.unwrap();
        for number in 0..=saved + 1 {
            assert_eq!(store.round(&id(number)).await.unwrap(), Some(large(number)));
        }
    });
}

#[test]
fn a_file_that_is_gone_or_replaced_is_written_no_more() {
    block_on(async {
        let site = sqlite();
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        store.save_round(&round(1, 1, vec![])).await.unwrap();
        let aside = Path::new(&site.url).with_extension("aside");
        std::fs::rename(&site.url, &aside).unwrap();
        let gone = "the file was removed or replaced since it was opened";
        let words = store.save_round(&round(2, 2, vec![])).await.unwrap_err().to_string();
        assert!(words.ends_with(gone), "{words}");
        std::fs::write(&site.url, "").unwrap();
        let words = store.rounds(4, u64::MAX, 1).await.unwrap_err().to_string();
        assert!(words.ends_with(gone), "{words}");
        std::fs::rename(&aside, &site.url).unwrap();
        store.save_round(&round(2, 2, vec![])).await.unwrap();
        assert_eq!(newest(&store, 4).await, Some(2));
    });
}

#[test]
fn a_damaged_file_is_reported() {
    block_on(async {
        let site = sqlite();
        let store = Store::open(&site.url, &another_run()).await.unwrap();
        for number in 0..50 {
            let next = round(number, number, vec![response(1, "a", Sampled::Tps(1.0))]);
            store.save_round(&next).await.unwrap();
        }
        store.close().await;
        drop(store);
        let mut bytes = std::fs::read(&site.url).unwrap();
        // The first page, with the schema, stays.
        bytes[4096..].fill(0xaa);
        std::fs::write(&site.url, &bytes).unwrap();
        let read = async {
            let store = Store::open(&site.url, &another_run()).await?;
            store.round(&id(25)).await
        };
        let words = read.await.unwrap_err().to_string();
        assert!(words.starts_with(&site.url) && words.contains("malformed"), "{words}");
        // A file that was cut says so too.
        std::fs::write(&site.url, &bytes[..6000]).unwrap();
        let words = refusal(&site.url).await;
        assert!(words.starts_with(&site.url) && words.contains("malformed"), "{words}");
    });
}
