//! Tests the reading of file names and of URLs of servers.

use super::sites::{another_run, block_on, round};
use crate::store::Store;
use crate::store::place::Location;

#[test]
fn passwords_are_never_shown() {
    let shown = |url| Location::parse(url).ok().unwrap().shown();
    let url = "postgres://me:s%40crt@db.example.com:6543/postgres?sslmode=require";
    assert_eq!(shown(url), "postgres://me@db.example.com:6543/postgres");
    let asked = "postgresql://db.example.com/x?user=me&password=s3crt";
    assert_eq!(shown(asked), "postgres://db.example.com/x");
    let scrubbed = |url, words: &str| Location::parse(url).ok().unwrap().scrub(words.to_owned());
    assert_eq!(scrubbed(url, "not s@crt, not s%40crt"), "not ***, not ***");
    assert_eq!(scrubbed(asked, "not s3crt"), "not ***");
    for url in [
        "postgres://me:s3crt#x@host/db",
        "postgres://me:12#s3crt@host/db",
        "postgres://me:12?s3crt@host/db",
        "postgres://me:12/s3crt@host/db",
        "postgres://me:12?s3crt=@host/db",
        "postgres://me:s3crt@host:port/db",
    ] {
        let words = Location::parse(url).err().unwrap().to_string();
        assert!(words.contains("percent-encoded") && !words.contains("s3crt"), "{url}: {words}");
    }
    let words = Location::parse("postgres://me@host/db?pgbouncer=true").err().unwrap().to_string();
    assert!(words.contains("the parameter `pgbouncer` is unknown; known are"), "{words}");
    for (url, why) in [
        ("sqlite://", "it names no file"),
        ("sqlite::memory:", "a store in memory would forget with the process"),
        ("sqlite://a.sqlite?mode=ro", "a SQLite URL takes no parameters"),
    ] {
        let words = Location::parse(url).err().unwrap().to_string();
        assert!(words.ends_with(why), "{url}: {words}");
    }
}

/// Names that mean something in a URL.
#[test]
fn any_file_name_is_taken_as_it_is() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a b", "50%41?x=1#y", "ü.sqlite", "file:x"] {
            let path = directory.path().join(name);
            let store = Store::open(path.to_str().unwrap(), &another_run()).await.unwrap();
            store.save_round(&round(1, 1, vec![])).await.unwrap();
            assert!(path.exists(), "{name}");
            Store::open_to_read(path.to_str().unwrap()).await.unwrap();
        }
    });
}
