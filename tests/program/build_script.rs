//! Which commit a build says it is from (`build.rs`).

use std::path::{Path, PathBuf};
use std::process::Command;

/// The compiled script.
fn script(directory: &Path) -> PathBuf {
    let program = directory.join("script");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("build.rs");
    let mut rustc = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into()));
    let status = rustc.args(["--edition", "2024", "-o"]).arg(&program).arg(source).status();
    assert!(status.unwrap().success());
    program
}

fn git(directory: &Path, arguments: &[&str]) -> String {
    let who = ["-c", "user.name=a", "-c", "user.email=a@b"];
    let output =
        Command::new("git").args(who).args(arguments).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_release_build_knows_its_commit_and_whether_it_was_changed() {
    let scratch = tempfile::tempdir().unwrap();
    let script = script(scratch.path());
    let sources = scratch.path().join("sources");
    std::fs::create_dir_all(sources.join("within")).unwrap();
    let said = |root: &Path, profile: &str, given: &str| {
        let mut run = Command::new(&script);
        run.env("CARGO_MANIFEST_DIR", root).env("PROFILE", profile).env("TARGON_COMMIT", given);
        let text = String::from_utf8(run.output().unwrap().stdout).unwrap();
        let commit =
            |line: &str| Some(line.strip_prefix("cargo:rustc-env=TARGON_COMMIT=")?.to_owned());
        text.lines().find_map(commit)
    };
    assert_eq!(said(&sources, "release", ""), None, "there is no repository");
    git(&sources, &["init", "--quiet"]);
    std::fs::write(sources.join("a"), "1").unwrap();
    git(&sources, &["add", "a"]);
    git(&sources, &["commit", "--quiet", "--message", "a"]);
    let commit = git(&sources, &["rev-parse", "HEAD"]);
    assert_eq!(said(&sources, "release", ""), Some(commit.clone()));
    assert_eq!(said(&sources, "debug", ""), None);
    assert_eq!(said(&sources, "debug", "abc").as_deref(), Some("abc"));
    assert_eq!(said(&sources.join("within"), "release", ""), None, "another's repository");
    std::fs::write(sources.join("a"), "2").unwrap();
    assert_eq!(said(&sources, "release", ""), Some(format!("{commit}-dirty")));
}
