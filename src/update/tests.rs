//! Releases of all kinds, from a server on this machine.

use super::*;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Path as Part;
use axum::http::{Response, StatusCode};
use axum::routing::get;
use futures_util::StreamExt;
use minisign::KeyPair;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Cursor;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::TcpListener;

const NEW: &[u8] = b"#!/bin/sh\necho targon-engine 9.9.9\n";

/// What a server answers under a name.
#[derive(Clone)]
enum Answer {
    Whole(Vec<u8>),
    /// So many bytes are announced, and fewer come.
    Cut(Vec<u8>, usize),
    /// One byte every so many milliseconds.
    Slow(Vec<u8>, u64),
    Elsewhere(String),
    Status(StatusCode),
}

fn respond(answer: Option<&Answer>) -> Response<Body> {
    let plain = |status, body| Response::builder().status(status).body(body).unwrap();
    match answer {
        None => plain(StatusCode::NOT_FOUND, Body::empty()),
        Some(Answer::Status(status)) => plain(*status, Body::empty()),
        Some(Answer::Whole(bytes)) => plain(StatusCode::OK, bytes.clone().into()),
        Some(Answer::Elsewhere(to)) => {
            let found = Response::builder().status(StatusCode::FOUND).header("location", to);
            found.body(Body::empty()).unwrap()
        }
        Some(Answer::Cut(bytes, length)) => {
            let part = Ok::<_, std::io::Error>(Bytes::from(bytes.clone()));
            // The bytes are on their way before the connection breaks.
            let pause = futures_util::stream::once(async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                Ok(Bytes::new())
            });
            let body = futures_util::stream::iter([part]).chain(pause);
            let body = Body::from_stream(body);
            Response::builder().header("content-length", *length).body(body).unwrap()
        }
        Some(Answer::Slow(bytes, pause_ms)) => {
            let (bytes, pause) = (bytes.clone(), Duration::from_millis(*pause_ms));
            let stream = futures_util::stream::unfold((bytes, 0), move |(bytes, at)| async move {
                tokio::time::sleep(pause).await;
                let part = Bytes::copy_from_slice(bytes.get(at..=at)?);
                Some((Ok::<_, std::io::Error>(part), (bytes, at + 1)))
            });
            plain(StatusCode::OK, Body::from_stream(stream))
        }
    }
}

async fn serve(answers: BTreeMap<&'static str, Answer>) -> String {
    let answers = Arc::new(answers);
    let answer = move |Part(name): Part<String>| {
        let response = respond(answers.get(name.as_str()));
        async move { response }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/{name}", get(answer));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    format!("http://{address}/list.json")
}

/// A program in a directory of its own, and a key that signs its releases.
struct Place {
    directory: tempfile::TempDir,
    key: KeyPair,
}

fn sum(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("engine");
        fs::write(&path, "the old one").unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o750)).unwrap();
        Self { directory, key: KeyPair::generate_unencrypted_keypair().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("engine")
    }

    fn sign(&self, bytes: &[u8], comment: &str) -> String {
        minisign::sign(None, &self.key.sk, Cursor::new(bytes), Some(comment), None)
            .unwrap()
            .into_string()
    }

    fn comment() -> String {
        format!("targon-engine 9.9.9 {}", target())
    }

    /// A list whose one build is `bytes`, with some fields replaced.
    fn list(&self, bytes: &[u8], change: serde_json::Value) -> Answer {
        let mut build = serde_json::json!({
            "target": target(), "file": "engine-9.9.9", "bytes": bytes.len(),
            "sha256": sum(bytes), "signature": self.sign(bytes, &Self::comment()),
        });
        let version = change["version"].as_str().unwrap_or("9.9.9").to_owned();
        build.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let list = serde_json::json!({"format": 1, "version": version, "builds": [build]});
        Answer::Whole(list.to_string().into_bytes())
    }

    fn updater(&self, url: &str, limits: DownloadLimits) -> Updater {
        let key = self.key.pk.to_base64();
        let source = ReleaseSource::new(Some(url), Some(&key)).unwrap();
        let installed = Installed::at(&self.path()).unwrap();
        Updater::of(installed, "0.1.0".parse().unwrap(), source, limits).unwrap()
    }

    /// Looks at a server with this list and this file.
    async fn look(
        &self,
        list: Answer,
        file: Answer,
        limits: DownloadLimits,
    ) -> Result<FoundRelease, UpdateError> {
        let url = serve([("list.json", list), ("engine-9.9.9", file)].into()).await;
        self.updater(&url, limits).look().await
    }

    /// The old program is there as it was, and nothing else.
    fn check_untouched(&self, what: &str) {
        assert_eq!(names(self.directory.path()), ["engine"], "{what}");
        assert_eq!(fs::read(self.path()).unwrap(), b"the old one", "{what}");
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn none() -> serde_json::Value {
    serde_json::json!({})
}

#[tokio::test]
async fn a_newer_release_takes_the_place_of_the_program_and_the_old_one_is_kept() {
    let place = Place::new();
    let list = place.list(NEW, none());
    let found =
        place.look(list, Answer::Whole(NEW.into()), DownloadLimits::default()).await.unwrap();
    let FoundRelease::Newer(staged) = found else { panic!("{found:?}") };
    assert_eq!(staged.version().to_string(), "9.9.9");
    assert_eq!(fs::read(place.path()).unwrap(), b"the old one");
    staged.install().unwrap();
    assert_eq!(fs::read(place.path()).unwrap(), NEW);
    let previous = place.directory.path().join("engine.previous");
    assert_eq!(fs::read(&previous).unwrap(), b"the old one");
    for path in [&place.path(), &previous] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o750);
    }
    assert_eq!(names(place.directory.path()), ["engine", "engine.previous"]);
    // Whoever comes later keeps the copy of the old program, and only starts the new one.
    let list = place.list(NEW, none());
    let found =
        place.look(list, Answer::Whole(NEW.into()), DownloadLimits::default()).await.unwrap();
    let FoundRelease::Newer(staged) = found else { panic!("{found:?}") };
    staged.install().unwrap();
    assert_eq!(fs::read(&previous).unwrap(), b"the old one");
    assert_eq!(names(place.directory.path()), ["engine", "engine.previous"]);
}

#[tokio::test]
async fn a_release_that_is_given_up_leaves_nothing() {
    let place = Place::new();
    let list = place.list(NEW, none());
    let found =
        place.look(list, Answer::Whole(NEW.into()), DownloadLimits::default()).await.unwrap();
    assert_eq!(names(place.directory.path()).len(), 2);
    drop(found);
    place.check_untouched("dropped");
}

#[tokio::test]
async fn the_same_version_and_older_ones_are_left_alone() {
    let place = Place::new();
    for (version, is_same) in [("0.1.0", true), ("0.0.9", false), ("0.0.100", false)] {
        let list = place.list(NEW, serde_json::json!({"version": version}));
        let found =
            place.look(list, Answer::Whole(NEW.into()), DownloadLimits::default()).await.unwrap();
        match found {
            FoundRelease::Same => assert!(is_same, "{version}"),
            FoundRelease::Older(_) => assert!(!is_same, "{version}"),
            FoundRelease::Newer(_) => panic!("{version}"),
        }
        place.check_untouched(version);
    }
}

/// Looks, and expects a refusal.
async fn refused(place: &Place, list: Answer, file: Answer, limits: DownloadLimits) -> UpdateError {
    let found = place.look(list, file, limits).await;
    let refusal = found.expect_err("it must be refused");
    place.check_untouched(&refusal.to_string());
    refusal
}

#[tokio::test]
async fn a_file_that_the_key_has_not_signed_for_this_version_and_machine_is_refused() {
    let (place, other) = (Place::new(), Place::new());
    let (whole, all) = (Answer::Whole(NEW.into()), DownloadLimits::default());
    let with = |signature: String| place.list(NEW, serde_json::json!({"signature": signature}));
    let foreign = with(other.sign(NEW, &Place::comment()));
    let refusal = refused(&place, foreign, whole.clone(), all).await;
    assert!(matches!(refusal, UpdateError::Signature { .. }), "{refusal}");
    // The list says what the server has: only the signature tells.
    let changed = [NEW, b"# and something else\n"].concat();
    let signature = serde_json::json!({"signature": place.sign(NEW, &Place::comment())});
    let list = place.list(&changed, signature);
    let refusal = refused(&place, list, Answer::Whole(changed), all).await;
    assert!(matches!(refusal, UpdateError::Signature { .. }), "{refusal}");
    // A signed comment that was changed afterwards.
    let older = place.sign(NEW, &Place::comment().replace("9.9.9", "0.0.1"));
    let refusal = refused(&place, with(older.replace("0.0.1", "9.9.9")), whole.clone(), all).await;
    assert!(matches!(refusal, UpdateError::Signature { .. }), "{refusal}");
    // Validly signed, as something else.
    let target = target();
    for comment in ["targon-engine 0.0.1", "targon-engine", "other 9.9.9"] {
        let list = with(place.sign(NEW, &format!("{comment} {target}")));
        let refusal = refused(&place, list, whole.clone(), all).await;
        assert!(matches!(refusal, UpdateError::SignedFor { .. }), "{refusal}");
    }
    let list = with(place.sign(NEW, "targon-engine 9.9.9 pdp11-dec-unix"));
    let refusal = refused(&place, list, whole.clone(), all).await;
    assert!(matches!(refusal, UpdateError::SignedFor { .. }), "{refusal}");
    let list = place.list(NEW, serde_json::json!({"target": "pdp11-dec-unix"}));
    let refusal = refused(&place, list, whole, all).await;
    assert!(matches!(refusal, UpdateError::NoBuild { .. }), "{refusal}");
}

#[tokio::test]
async fn files_that_are_not_what_the_list_says_are_refused() {
    let (place, all) = (Place::new(), DownloadLimits::default());
    let wrong = serde_json::json!({"sha256": sum(b"something else")});
    let refusal = refused(&place, place.list(NEW, wrong), Answer::Whole(NEW.into()), all).await;
    assert!(matches!(refusal, UpdateError::Checksum { .. }), "{refusal}");
    let short = NEW[..20].to_vec();
    for file in [Answer::Whole(short.clone()), Answer::Cut(short, NEW.len())] {
        let refusal = refused(&place, place.list(NEW, none()), file, all).await;
        let UpdateError::Truncated { expected, got, .. } = refusal else { panic!("{refusal}") };
        assert_eq!((expected, got), (NEW.len() as u64, 20));
    }
    let long = Answer::Whole([NEW, b"#"].concat());
    let refusal = refused(&place, place.list(NEW, none()), long, all).await;
    assert!(matches!(refusal, UpdateError::Long { limit: 35, .. }), "{refusal}");
    let small = DownloadLimits { file_bytes: 10, ..all };
    let list = place.list(NEW, none());
    let refusal = refused(&place, list, Answer::Whole(NEW.into()), small).await;
    assert!(matches!(refusal, UpdateError::Long { limit: 10, .. }), "{refusal}");
    let list = Answer::Whole(vec![b' '; 300 << 10]);
    let refusal = refused(&place, list, Answer::Whole(NEW.into()), all).await;
    assert!(matches!(refusal, UpdateError::Long { .. }), "{refusal}");
    let list = Answer::Whole(b"<html>".into());
    let refusal = refused(&place, list, Answer::Whole(NEW.into()), all).await;
    assert!(matches!(refusal, UpdateError::List { .. }), "{refusal}");
    let broken = Answer::Status(StatusCode::INTERNAL_SERVER_ERROR);
    let refusal = refused(&place, place.list(NEW, none()), broken, all).await;
    assert!(matches!(refusal, UpdateError::Status { status: 500, .. }), "{refusal}");
}

#[tokio::test]
async fn servers_that_trickle_or_stall_are_given_up() {
    let (place, all) = (Place::new(), DownloadLimits::default());
    let time = Duration::from_millis(300);
    // A byte every 50 ms keeps every gap short: only the deadline for the whole ends it.
    let trickle = Answer::Slow(NEW.into(), 50);
    let limits = DownloadLimits { file_time: time, ..all };
    let refusal = refused(&place, place.list(NEW, none()), trickle.clone(), limits).await;
    assert!(matches!(refusal, UpdateError::Late { .. }), "{refusal}");
    let limits = DownloadLimits { list_time: time, ..all };
    let refusal = refused(&place, trickle, Answer::Whole(NEW.into()), limits).await;
    assert!(matches!(refusal, UpdateError::Late { .. }), "{refusal}");
    let stall = Answer::Slow(NEW.into(), 60_000);
    let limits = DownloadLimits { gap: time, ..all };
    let refusal = refused(&place, place.list(NEW, none()), stall, limits).await;
    assert!(matches!(refusal, UpdateError::Late { .. }), "{refusal}");
}

#[tokio::test]
async fn only_redirects_on_the_same_host_are_followed() {
    let (place, all) = (Place::new(), DownloadLimits::default());
    let other = serve([("engine-9.9.9", Answer::Whole(NEW.into()))].into()).await;
    let away = Answer::Elsewhere(other.replace("list.json", "engine-9.9.9"));
    let refusal = refused(&place, place.list(NEW, none()), away, all).await;
    let UpdateError::Redirected { to, .. } = refusal else { panic!("{refusal}") };
    assert_eq!(to, other.trim_end_matches("/list.json"));
    let circle = Answer::Elsewhere("/list.json".into());
    let refusal = refused(&place, circle, Answer::Whole(NEW.into()), all).await;
    assert!(matches!(refusal, UpdateError::Redirected { .. }), "{refusal}");
    let file = Answer::Whole(NEW.into());
    let list = place.list(NEW, none());
    let answers = [("list.json", list), ("engine-9.9.9", Answer::Elsewhere("/there".into()))];
    let url = serve(answers.into_iter().chain([("there", file)]).collect()).await;
    assert!(matches!(place.updater(&url, all).look().await, Ok(FoundRelease::Newer(_))));
}

#[tokio::test]
async fn a_program_that_does_not_run_here_is_refused() {
    let place = Place::new();
    for (script, want) in [
        (&b"\x7fELF of another machine"[..], "not run on this machine"),
        (b"#!/bin/sh\nexit 3\n", "exit status: 3"),
        (b"#!/bin/sh\necho targon-engine 9.9.8\n", "it says \"targon-engine 9.9.8\""),
    ] {
        let list = place.list(script, none());
        let file = Answer::Whole(script.into());
        let refusal = refused(&place, list, file, DownloadLimits::default()).await;
        assert!(matches!(refusal, UpdateError::Unfit { .. }), "{refusal}");
        assert!(refusal.to_string().contains(want), "{refusal}");
    }
}

#[tokio::test]
async fn a_full_disk_and_a_directory_that_cannot_be_written_are_named() {
    let place = Place::new();
    let Answer::Whole(list) = place.list(NEW, none()) else { unreachable!() };
    let url = serve([("engine-9.9.9", Answer::Whole(NEW.into()))].into()).await;
    let updater = place.updater(&url, DownloadLimits::default());
    let release = Release::read(&url, &list).unwrap();
    // Every write to it fails as on a full disk.
    let path = Path::new("/dev/full");
    let mut full = fs::OpenOptions::new().write(true).open(path).unwrap();
    let build = release.build(&target()).unwrap();
    let outcome = updater.server.program(&updater.source, build, (&mut full, path)).await;
    let refusal = outcome.unwrap_err();
    assert!(matches!(refusal, UpdateError::DiskFull { .. }), "{refusal}");
    // Nobody can create a file there, root neither.
    let refusal = Installed::at(Path::new("/sys/kernel")).unwrap().begin().unwrap_err();
    assert!(matches!(refusal, UpdateError::ReadOnly { .. }), "{refusal}");
}

#[test]
fn two_updaters_of_one_program_do_not_meet() {
    let place = Place::new();
    let installed = Installed::at(&place.path()).unwrap();
    let first = installed.begin().unwrap();
    let refusal = installed.begin().unwrap_err();
    assert!(matches!(refusal, UpdateError::Busy { .. }), "{refusal}");
    drop(first);
    drop(installed.begin().unwrap());
    place.check_untouched("both are gone");
}

#[test]
fn without_an_address_and_a_key_that_can_be_used_there_is_no_updater() {
    let key = KeyPair::generate_unencrypted_keypair().unwrap().pk.to_base64();
    let (url, key) = (Some("https://releases.example/list.json"), Some(key.as_str()));
    for (url, key) in [(None, None), (url, None), (None, key), (Some(" "), key)] {
        assert!(matches!(ReleaseSource::new(url, key), Err(UpdateError::NotConfigured)));
    }
    assert!(ReleaseSource::new(url, key).is_ok());
    assert!(matches!(ReleaseSource::new(url, Some("RWQ")), Err(UpdateError::Key { .. })));
    for (url, is_taken) in [
        ("http://releases.example/list.json", false),
        ("http://localhost.example/", false),
        ("http://127.0.0.1:1/", true),
        ("http://[::1]/", true),
        ("ftp://127.0.0.1/", false),
        ("releases", false),
    ] {
        let source = ReleaseSource::new(Some(url), key);
        match source {
            Ok(_) => assert!(is_taken, "{url}"),
            Err(UpdateError::Address { .. }) => assert!(!is_taken, "{url}"),
            Err(other) => panic!("{url}: {other}"),
        }
    }
    let url = "http://user:secret@releases.example/secret/list.json?key=secret";
    let error = ReleaseSource::new(Some(url), key).unwrap_err().to_string();
    assert!(error.contains("http://releases.example: must be https"), "{error}");
    assert!(!error.contains("secret"), "{error}");
}

/// The new program is in place and on probation, the old one is kept.
fn on_probation(place: &Place) -> (Installed, Vec<OsString>) {
    let (path, previous) = (place.path(), place.directory.path().join("engine.previous"));
    fs::rename(&path, &previous).unwrap();
    fs::write(&path, NEW).unwrap();
    let installed = Installed::at(&path).unwrap();
    let arguments: Vec<OsString> = ["serve", "--port", "1"].map(OsString::from).into();
    installed.put_on_probation(&arguments).unwrap();
    (installed, arguments)
}

#[tokio::test]
async fn a_new_program_that_never_lasts_gives_way_to_the_kept_one_once() {
    let place = Place::new();
    let (installed, arguments) = on_probation(&place);
    let begun = |arguments: &[OsString]| Probation::of(installed.clone(), arguments).unwrap();
    // A command of the same program with other arguments has nothing to do with it.
    assert!(begun(&[]).is_none() && begun(&arguments[..2]).is_none());
    for start in 1..=STARTS_MAX {
        let probation = begun(&arguments).unwrap();
        assert!(!probation.is_over() && probation.is_open(), "start {start}");
    }
    let probation = begun(&arguments).unwrap();
    assert!(probation.is_over());
    probation.put_back("9.9.9").unwrap();
    assert_eq!(names(place.directory.path()), ["engine", "engine.failed", "engine.previous"]);
    assert_eq!(fs::read(place.path()).unwrap(), b"the old one");
    assert_eq!(fs::metadata(place.path()).unwrap().permissions().mode() & 0o7777, 0o750);
    assert!(begun(&arguments).is_none(), "the old program is not on probation");
    // The release that failed is not taken again, for as long as that stands there.
    let file = Answer::Whole(NEW.into());
    let found = place.look(place.list(NEW, none()), file.clone(), DownloadLimits::default()).await;
    let refusal = found.unwrap_err();
    assert!(
        matches!(&refusal, UpdateError::Failed { version, .. } if version == "9.9.9"),
        "{refusal}"
    );
    let said = refusal.to_string();
    assert!(said.contains("to try it again, remove ") && said.ends_with("engine.failed"), "{said}");
    // Another one is looked at: this one is not signed for its version.
    let other = place.list(NEW, serde_json::json!({"version": "9.9.10"}));
    let refusal = place.look(other, file.clone(), DownloadLimits::default()).await.unwrap_err();
    assert!(matches!(refusal, UpdateError::SignedFor { .. }), "{refusal}");
    fs::remove_file(place.directory.path().join("engine.failed")).unwrap();
    let found = place.look(place.list(NEW, none()), file, DownloadLimits::default()).await;
    assert!(matches!(found, Ok(FoundRelease::Newer(_))));
}

#[test]
fn where_no_other_program_is_kept_the_new_one_stays_and_its_probation_ends() {
    let place = Place::new();
    let previous = place.directory.path().join("engine.previous");
    let (installed, arguments) = on_probation(&place);
    fs::remove_file(&previous).unwrap();
    let probation = Probation::of(installed.clone(), &arguments).unwrap().unwrap();
    let refusal = probation.put_back("9.9.9").unwrap_err();
    assert!(refusal.to_string().contains("engine.previous: cannot be found"), "{refusal}");
    assert_eq!(names(place.directory.path()), ["engine"]);
    fs::hard_link(place.path(), &previous).unwrap();
    installed.put_on_probation(&arguments).unwrap();
    let probation = Probation::of(installed.clone(), &arguments).unwrap().unwrap();
    let refusal = probation.put_back("9.9.9").unwrap_err();
    assert!(refusal.to_string().contains("there is no older program to return to"), "{refusal}");
    assert_eq!(names(place.directory.path()), ["engine", "engine.previous"]);
    assert_eq!(fs::read(place.path()).unwrap(), NEW);
}

#[test]
fn a_note_that_says_nothing_ends_the_probation_and_one_that_is_no_file_is_named() {
    let place = Place::new();
    let (installed, arguments) = on_probation(&place);
    let in_directory = names(place.directory.path());
    let note = in_directory.iter().find(|name| name.starts_with(".engine.trial-")).unwrap();
    let note = place.directory.path().join(note);
    for nonsense in [&b"many"[..], b"-1", b"99999999999", b"\xff", b""] {
        fs::write(&note, nonsense).unwrap();
        let probation = Probation::of(installed.clone(), &arguments).unwrap().unwrap();
        assert!(probation.is_over(), "{nonsense:?}");
    }
    fs::write(&note, vec![b'1'; 65]).unwrap();
    let refusal = Probation::of(installed.clone(), &arguments).unwrap_err();
    assert!(refusal.to_string().contains("more than 64 bytes"), "{refusal}");
    fs::remove_file(&note).unwrap();
    fs::create_dir(&note).unwrap();
    let refusal = Probation::of(installed, &arguments).unwrap_err();
    assert!(refusal.to_string().contains("it is not a file"), "{refusal}");
}
