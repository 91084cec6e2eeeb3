//! `cache` as a user runs it.

use serde_json::Value;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

fn run(home: &Path, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.env_clear().env("HOME", home).arg("cache").args(arguments);
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// A home with two models, one of them half fetched, and a calibration.
fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let own = home.path().join(".cache/targon-engine/calibration");
    std::fs::create_dir_all(&own).unwrap();
    std::fs::write(own.join("ab-bf16.json"), "{}").unwrap();
    for (name, bytes) in [("models--org--one", 2048), ("models--org--two", 64)] {
        let model = home.path().join(".cache/huggingface/hub").join(name);
        std::fs::create_dir_all(model.join("blobs")).unwrap();
        std::fs::create_dir_all(model.join("snapshots/c")).unwrap();
        std::fs::write(model.join("blobs/aa"), vec![1; bytes]).unwrap();
        symlink("../../blobs/aa", model.join("snapshots/c/model.safetensors")).unwrap();
    }
    let partial = ".cache/huggingface/hub/models--org--two/blobs/bb.incomplete";
    std::fs::write(home.path().join(partial), "half").unwrap();
    home
}

#[test]
fn what_is_kept_is_listed_and_cleaned_by_kind_and_age() {
    let home = home();
    let (code, out, err) = run(home.path(), &["list", "--json"]);
    assert_eq!(code, 0, "{err}");
    let listed: Value = serde_json::from_str(&out).unwrap();
    let of = |item: &Value| format!("{} {}", item["kind"], item["name"]).replace('"', "");
    let items = listed["items"].as_array().unwrap();
    let names: Vec<String> = items.iter().map(of).collect();
    let expected =
        ["model org/one", "model org/two", "partial bb.incomplete", "calibration ab-bf16.json"];
    assert_eq!(names, expected);
    assert_eq!(listed["bytes"], 2048 + 64 + 4 + 2);
    let (_, out, _) = run(home.path(), &["list"]);
    assert!(out.contains("org/one") && out.contains("shared with other"), "{out}");

    // Nothing goes without being told to.
    let (code, out, _) = run(home.path(), &["clean"]);
    assert!(code == 0 && out.contains("3 could be removed"), "{out}");
    let (_, out, _) = run(home.path(), &["clean", "--older-than", "1d", "--yes"]);
    assert!(out.ends_with("removed 0, 0 B freed\n"), "{out}");
    let (_, out, _) = run(home.path(), &["clean", "--only", "partial", "--yes"]);
    assert!(out.contains("removed partial bb.incomplete"), "{out}");
    let (code, _, err) = run(home.path(), &["clean", "--only", "photos"]);
    assert!(code == 1 && err.contains("possible values: model, partial"), "{err}");
    let (code, _, err) = run(home.path(), &["clean", "--older-than", "soon"]);
    assert!(code == 1 && err.contains("as in 30d"), "{err}");

    // What somebody reads stays.
    let blob = home.path().join(".cache/huggingface/hub/models--org--one/blobs/aa");
    let open = std::fs::File::open(blob).unwrap();
    let mut reader = Command::new("sleep").arg("60").stdin(Stdio::from(open)).spawn().unwrap();
    let (code, out, err) = run(home.path(), &["clean", "--yes"]);
    let held = format!("model org/one stays: process {} uses it", reader.id());
    assert!(code == 0 && err.contains(&held), "{out}{err}");
    assert!(out.contains("removed model org/two") && out.contains("removed calibration"), "{out}");
    reader.kill().unwrap();
    reader.wait().unwrap();
    let (_, out, _) = run(home.path(), &["clean", "--yes"]);
    assert!(out.contains("removed model org/one"), "{out}");
    let (_, out, _) = run(home.path(), &["list", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["items"], serde_json::json!([]));
}

/// The program in a directory of its own, with these variables alone.
fn run_with(variables: &[(&str, &str)], arguments: &[&str]) -> (i32, String) {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(directory.path()).env_clear().envs(variables.iter().copied());
    let output = command.args(arguments).output().unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn without_a_home_nothing_is_kept_where_the_program_happens_to_be() {
    for home in [&[][..], &[("HOME", "")]] {
        let (code, err) = run_with(home, &["cache", "list"]);
        assert!(code == 1 && err.contains("no place for files of the Hub: HOME is not"), "{err}");
        let elsewhere = [home, &[("HF_HOME", "/nowhere")]].concat();
        let (code, err) = run_with(&elsewhere, &["cache", "list"]);
        assert!(code == 1 && err.contains("no place for a cache: HOME is not set"), "{err}");
        let all = [&elsewhere[..], &[("TARGON_CACHE", "/nowhere")]].concat();
        assert_eq!(run_with(&all, &["cache", "list"]).0, 0);
        let (code, err) = run_with(home, &["wallet", "show", "--wallet.name", "w"]);
        let want = "--wallet.path ~/.bittensor/wallets: HOME is not set";
        assert!(code == 1 && err.contains(want), "{err}");
    }
}
