//! `bench plan` as a user runs it.

use crate::common;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn run(home: &Path, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(home).env_clear().env("HOME", home).env("HF_HUB_OFFLINE", "1");
    let output = command.args(["bench", "plan"]).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_model_is_predicted_on_devices_with_prices() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    let price = "[[price]]\ndevice = \"h200\"\nper_hour = 3.5\ndate = \"2026-11-01\"\n";
    std::fs::write(home.join("prices.toml"), price).unwrap();
    let sizes = ["--context", "64", "--prompt", "64", "--answer", "32"];
    let all = |extra: &[&str]| run(home, &[&["m"], sizes.as_slice(), extra].concat());

    let (code, table, err) = all(&["--prices", "prices.toml"]);
    assert_eq!(code, 0, "{err}");
    assert!(table.contains("| h200 ") && table.contains("| xeon-8480 "), "{table}");
    assert!(table.contains("Predicted, not measured"), "{table}");
    assert!(table.contains("h200: $3.5 an hour on 2026-11-01"), "{table}");

    // The configuration alone is enough, and says the same.
    let both = ["--json", "--devices", "h200,rtx-4090"];
    let (_, json, _) = all(&both);
    let config = run(home, &[&["m/config.json"], sizes.as_slice(), &both].concat()).1;
    let [json, config]: [Value; 2] = [json, config].map(|j| serde_json::from_str(&j).unwrap());
    assert_eq!(json["predictions"], config["predictions"]);
    assert_eq!(json["predictions"].as_array().unwrap().len(), 2);

    let (_, csv, _) = all(&["--csv", "--batch", "1,8", "--devices", "h200"]);
    assert_eq!(csv.lines().count(), 3, "{csv}");
}

#[test]
fn what_cannot_be_predicted_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    std::fs::write(home.join("prices.toml"), "[[price]]\ndevice = 1\n").unwrap();
    std::fs::write(home.join("bad.json"), "{\"model_type\": \"gpt2\"}").unwrap();
    for (arguments, want) in [
        (&["m", "--devices", "h300"][..], "there is no device h300 in the table"),
        (&["m"], "1536 tokens are asked for, but the model's context is 512 tokens"),
        (&["m", "--prices", "prices.toml"], "prices.toml: line 2: invalid type"),
        (&["m", "--batch", "0"], "invalid value '0' for '--batch"),
        (&["m", "--memory-share", "2", "--compute-share", "1"], "must lie above 0 and at most"),
        (&["bad.json"], "gpt2"),
        (&["nowhere"], "nowhere is neither a file here nor OWNER/NAME"),
        (&["owner/name"], "owner/name"),
    ] {
        let (code, _, err) = run(home, arguments);
        assert!(code == 1 && err.contains(want), "{arguments:?}: {err}");
    }
}

fn bench(home: &Path, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(home).env_clear().env("HOME", home).env("HF_HUB_OFFLINE", "1");
    command.env("XDG_CACHE_HOME", home.join("cache"));
    let output = command.arg("bench").args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The smallest measurement that has all phases.
const SMALL: [&str; 8] = ["--batch", "1,3", "--depth", "40", "--tokens", "32", "--runs", "2"];

#[test]
fn an_engine_is_measured_reported_and_signed() {
    use targon_engine::bench::report::{schema::Phase, seal};
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    let wallet = ["--wallet.path", "wallets", "--wallet.name", "a", "--wallet.hotkey", "h"];
    let made = Command::new(env!("CARGO_BIN_EXE_targon-engine"))
        .current_dir(home)
        .args(["wallet", "new-hotkey"])
        .args(wallet)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

    let arguments = [&["engine", "m"], &SMALL[..], &["--out", "o"], &wallet].concat();
    let (code, table, err) = bench(home, &arguments);
    assert_eq!(code, 0, "{err}");
    assert!(table.contains("| prefill | 1     | 40 ") && table.contains("- ceilings: "), "{table}");
    let report = seal::read(&home.join("o/report.json")).unwrap();
    assert!(matches!(seal::check(&report), Ok(seal::Sealed::By(_))));
    assert!(!report.is_partial && report.model.weights_root.is_some());
    let rows: Vec<_> = report.rows.iter().map(|r| (r.phase, r.batch, r.runs.len())).collect();
    let phases = [Phase::Prefill, Phase::Decode, Phase::Verify];
    let expected: Vec<_> = phases.iter().flat_map(|p| [(*p, 1, 2), (*p, 3, 2)]).collect();
    assert_eq!(rows, expected);
    for row in &report.rows {
        assert!(row.speed.mean > 0.0 && row.predicted > 0.0, "{row:?}");
        let error = row.predicted / row.speed.mean - 1.0;
        assert!((row.error - error).abs() < 1e-9, "{row:?}");
    }
    let doubts = |kind: &str| report.marks.iter().any(|m| m.kind.name() == kind);
    assert!(!doubts("warm-cache") && !doubts("interrupted"), "{:?}", report.marks);
    for (file, word) in
        [("report.html", "Roofline"), ("report.csv", "prefill,1,40"), ("report.md", "decode")]
    {
        let text = std::fs::read_to_string(home.join("o").join(file)).unwrap();
        assert!(text.contains(word), "{file}: {text}");
    }
}

#[test]
fn an_engine_that_cannot_be_measured_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    for (arguments, want) in [
        (&["engine", "nowhere"][..], "nowhere"),
        (&["engine", "m", "--depth", "500"], "needs a context of"),
        (&["engine", "m", "--device", "h300"], "--device: there is no device h300"),
        (&["engine", "m", "--runs", "0"], "invalid value '0' for '--runs"),
    ] {
        let (code, _, err) = bench(home, arguments);
        assert!(code == 1 && err.contains(want), "{arguments:?}: {err}");
    }
}
