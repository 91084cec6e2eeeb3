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
