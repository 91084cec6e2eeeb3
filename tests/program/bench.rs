//! `bench plan` as a user runs it.

use super::closed_stdout::ends_quietly;
use crate::common;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use targon_engine::verify::Limits;
use targon_engine::verify::evidence::Calibrated;
use targon_engine::verify::limits_file::{self, HeldOut, LimitsFile, Measured, Share};

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
    assert!(csv.starts_with("prompt,context,answer,") && csv.contains("\n64,64,32,h200,"), "{csv}");

    let (code, _, err) = all(&["--devices", "h200", "--html", "plan.html"]);
    let page = std::fs::read_to_string(home.join("plan.html")).unwrap();
    assert!(code == 0 && page.contains("<td>h200</td>"), "{err} {page}");
    let (code, _, err) = all(&["--html", "prices.toml/plan.html"]);
    assert!(code == 1 && err.contains("prices.toml/plan.html cannot be written"), "{err}");
}

#[test]
fn what_cannot_be_predicted_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    std::fs::write(home.join("prices.toml"), "[[price]]\ndevice = 1\n").unwrap();
    std::fs::write(home.join("bad.json"), "{\"model_type\": \"gpt2\"}").unwrap();
    for (arguments, want) in [
        (&["m", "--devices", "h300"][..], "there is no device \"h300\" in the table"),
        (&["m"], "1536 tokens are asked for, but the model's context is 512 tokens"),
        (&["m", "--prices", "prices.toml"], "prices.toml: line 2: `device`: invalid type"),
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

fn command(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(home).env_clear().env("HOME", home).env("HF_HUB_OFFLINE", "1");
    command.env("XDG_CACHE_HOME", home.join("cache")).args(arguments);
    command
}

fn bench(home: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = command(home, &[&["bench"], arguments].concat()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The smallest measurement that has all phases.
const SMALL: [&str; 8] = ["--batch", "1,3", "--depth", "40", "--tokens", "256", "--runs", "2"];

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
fn a_report_that_nobody_reads_ends_quietly() {
    let home = tempfile::tempdir().unwrap();
    common::write_checkpoint(&home.path().join("m"), &common::tiny_config(), 1);
    let smallest = ["bench", "engine", "m", "--batch", "1", "--depth", "8", "--tokens", "32"];
    ends_quietly(command(home.path(), &[&smallest[..], &["--runs", "2"]].concat()), 0);
    ends_quietly(command(home.path(), &[&smallest[..], &["--runs", "2", "--json"]].concat()), 0);
}

#[test]
fn an_engine_that_cannot_be_measured_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    for (arguments, want) in [
        (&["engine", "nowhere"][..], "nowhere"),
        (&["engine", "m", "--depth", "500"], "needs a context of"),
        (&["engine", "m", "--device", "h300"], "--device: there is no device \"h300\""),
        (&["engine", "m", "--runs", "0"], "invalid value '0' for '--runs"),
        (
            &["serve", "--url", "x", "--model", "m", "--load", "targon", "--input", "9"],
            "--input goes only with --load fixed",
        ),
        (
            &["serve", "--url", "x", "--model", "m", "--load", "targon", "--completion"],
            "--completion goes only with --load fixed",
        ),
    ] {
        let (code, _, err) = bench(home, arguments);
        assert!(code == 1 && err.contains(want), "{arguments:?}: {err}");
    }
}

#[test]
fn attacks_that_there_are_not_and_limits_of_another_model_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    write_limits(&home.join("limits.json"));
    for (arguments, want) in [
        (["--only", "nosuch"], "got \"nosuch\"; they are: "),
        (["--limits", "limits.json"], "limits.json: `model` is 0707"),
    ] {
        let small = ["attack", "m", "--prompts", "2", "--honest", "0", "--tokens", "32"];
        let (code, out, err) = bench(home, &[&small[..], &arguments].concat());
        assert!(code == 1 && out.is_empty() && err.contains(want), "{code} {out}{err}");
    }
}

/// Limits that nothing was measured for, of a model that there is not.
fn write_limits(path: &Path) {
    let share = Share::new(0, 0);
    let calibration = Measured {
        prompts: 0,
        answers: 0,
        tokens: 0,
        energy_u8: None,
        energy_u4: None,
        energy_rounding: None,
        trimmed_u8: None,
        trimmed_u4: None,
        twin_u8: None,
        twin_u4: None,
        twin_share: 0.0,
        mismatch_rate: 0.0,
        margin_mean: 0.0,
        margin_max: 0.0,
    };
    let held_out = HeldOut {
        prompts: 0,
        answers: 0,
        energy_u8: share,
        energy_u4: share,
        trimmed: share,
        twin: share,
        margin: share,
        margin_mean: share,
        rejected: share,
    };
    let limits = (Limits::default(), Calibrated::default());
    let file = LimitsFile::new(&[7; 32], "nobody", limits, calibration, held_out);
    limits_file::write(path, &file).unwrap();
}

#[test]
fn the_former_name_says_what_it_is_called_now() {
    let output = Command::new(env!("CARGO_BIN_EXE_targon-engine"))
        .args(["attack-bench", "m", "--prompts", "2"])
        .output()
        .unwrap();
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && words.contains("bench attack"), "{words}");
}

/// A models.toml in `home` with the model `tiny` of directory `m`.
fn tiny_models(home: &Path, directory: &str) -> String {
    let entry = format!(
        "[[model]]\nname = \"tiny\"\nsource = \"path\"\npath = {directory:?}\n\
         kv_memory = \"4 MiB\"\nsequences_max = 4\n"
    );
    let file = home.join(format!("{directory}.toml"));
    std::fs::write(&file, entry).unwrap();
    file.display().to_string()
}

/// A server whose model `tiny` of this directory is ready.
fn started(home: &Path, directory: &str) -> super::cli::Server {
    let server = super::cli::Server::start(&tiny_models(home, directory));
    let is_ready = (0..600).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        server.get("/ready").0 == 200
    });
    assert!(is_ready, "the model is not ready after 30 s");
    server
}

/// A name in a report cannot make a line of its own in a comparison.
fn a_name_makes_no_line(home: &Path, report: &str) {
    let text = std::fs::read_to_string(home.join(report)).unwrap();
    let mut forged: Value = serde_json::from_str(&text).unwrap();
    forged["model"]["name"] = "m\nNot alike: nothing".into();
    std::fs::write(home.join("forged.json"), forged.to_string()).unwrap();
    let (code, table, _) = bench(home, &["compare", "forged.json"]);
    assert!(code == 0 && table.contains("Not alike: nothing"), "{table}");
    assert!(!table.contains("\nNot alike"), "{table}");
}

#[test]
fn a_server_is_measured_and_its_report_compared() {
    use targon_engine::bench::report::seal;
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    let server = started(home, "m");
    let url = server.url();
    let with_key = url.replace("http://", "http://user:secret@");
    let base = ["serve", "--url", &with_key, "--model", "tiny", "--input", "16"];
    let more = ["--output-tokens", "12", "--requests", "8", "--seed", "3", "--out", "o"];
    let (code, table, err) = bench(home, &[&base[..], &more, &["--concurrency", "1,4"]].concat());
    assert_eq!(code, 0, "{err}");
    assert!(table.contains("1 at once") && table.contains("4 at once"), "{table}");
    let report = seal::read(&home.join("o/report.json")).unwrap();
    assert!(!report.is_partial && report.levels.len() == 2);
    for level in &report.levels {
        assert_eq!((level.sent, level.completed, level.output_tokens), (8, 8, 96), "{level:?}");
        assert!(level.steady_tokens_per_second > 0.0 && level.worst_gap > 0.0);
        assert!(level.vllm["median_ttft_ms"].as_f64().unwrap() > 0.0);
    }
    let kinds: Vec<&str> = report.marks.iter().map(|m| m.kind.name()).collect();
    assert!(!kinds.contains(&"server-failed") && !kinds.contains(&"length"), "{kinds:?}");
    let page = std::fs::read_to_string(home.join("o/report.html")).unwrap();
    assert!(page.contains("Throughput against latency"), "{page}");
    let written = std::fs::read_to_string(home.join("o/report.json")).unwrap();
    assert!(written.contains(&url) && ![written, page].concat().contains("secret"));

    std::fs::write(
        home.join("prices.toml"),
        "[[price]]\ndevice = \"o\"\nper_hour = 2.0\ndate = \"2026-11-01\"\n",
    )
    .unwrap();
    let (code, json, err) =
        bench(home, &["compare", "o/report.json", "--prices", "prices.toml", "--json"]);
    assert_eq!(code, 0, "{err}");
    let json: Value = serde_json::from_str(&json).unwrap();
    let speed = report.best_level().unwrap().steady_tokens_per_second;
    let per_dollar = json["compared"][0]["per_dollar_hour"].as_f64().unwrap();
    assert!((per_dollar - speed / 2.0).abs() < 1e-6 * speed, "{json}");

    let (code, csv, _) = bench(home, &["compare", "o/report.json", "--csv", "--html", "c.html"]);
    assert!(code == 0 && csv.starts_with("rank,report,model,") && csv.contains("\n1,o,"), "{csv}");
    assert!(std::fs::read_to_string(home.join("c.html")).unwrap().contains("<td>o</td>"));
    a_name_makes_no_line(home, "o/report.json");
    let compare = ["bench", "compare", "o/report.json"];
    ends_quietly(command(home, &compare), 0);
    ends_quietly(command(home, &[&compare[..], &["--json"]].concat()), 0);
    let serve = [&["bench"], &base[..], &["--output-tokens", "8", "--requests", "2"]].concat();
    ends_quietly(command(home, &serve), 0);

    // A number that was changed after the report was written by another program.
    std::fs::write(home.join("bad.json"), "{\"schema\": \"targon-engine-bench\", \"version\": 9}")
        .unwrap();
    for (arguments, want) in [
        (&["compare", "bad.json"][..], "bad.json: `version` must be 1, got 9"),
        (&["compare", "none.json"], "none.json cannot be read"),
        (&["compare", "--strict", "o/report.json"], "o/report.json: it is unsigned"),
        (&["serve", "--url", "127.0.0.1:1", "--model", "m"], "--url must begin with http://"),
        (&["serve", "--url", "http://127.0.0.1:1", "--model", "m"], "is a server running there?"),
        (&["serve", "--url", &url, "--model", "other"], "404"),
    ] {
        let (code, _, err) = bench(home, arguments);
        assert!(code == 1 && err.contains(want), "{arguments:?}: {err}");
    }
}

#[test]
fn a_server_that_dies_leaves_a_partial_report() {
    use targon_engine::bench::report::seal;
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    let server = started(home, "m");
    let url = server.url();
    let mut command = Command::new(env!("CARGO_BIN_EXE_targon-engine"));
    command.current_dir(home).args(["bench", "serve", "--url", &url, "--model", "tiny"]);
    command.args(["--input", "9", "--output-tokens", "100", "--requests", "5000"]);
    command.args(["--rate", "20", "--out", "o"]);
    let running = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    // It dies after it has answered some, however long that takes here.
    let has_answered = (0..1200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        let ended = "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"length\"} ";
        let metrics = server.get("/metrics").1;
        let count = metrics.split(ended).nth(1).and_then(|rest| rest.split_whitespace().next());
        count.is_some_and(|count| count.parse::<f64>().unwrap() >= 5.0)
    });
    assert!(has_answered, "five answers take more than a minute");
    drop(server);
    let output = running.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && words.contains("was given up"), "{words}");
    let report = seal::read(&home.join("o/report.json")).unwrap();
    assert!(report.is_partial && report.levels[0].completed > 0, "{:?}", report.levels);
    assert!(report.marks.iter().any(|m| m.kind.name() == "server-failed"), "{:?}", report.marks);
}

#[test]
fn an_audit_tells_true_weights_from_four_bits() {
    use targon_engine::bench::attack::tamper::{Tamper, tampered};
    use targon_engine::models::checkpoint::Checkpoint;
    use targon_engine::ops::{lanes::Isa, pool::Pool};
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 1);
    let four = home.join("four");
    std::fs::create_dir(&four).unwrap();
    let pool = Pool::new(1, Isa::best()).unwrap();
    let checkpoint = Checkpoint::open(&home.join("m")).unwrap();
    tampered(&checkpoint, &pool, Tamper::Integers { bits: 4, group: 0 }, &four).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(home.join("m").join(file), four.join(file)).unwrap();
    }
    let own = tiny_models(home, "m");
    for (directory, code, verdict) in [("m", 0, "agrees"), ("four", 3, "not these weights")] {
        let server = started(home, directory);
        for extra in [&[][..], &["--chat"]] {
            let output = Command::new(env!("CARGO_BIN_EXE_targon-engine"))
                .current_dir(home)
                .env("HOME", home)
                .args(["audit", "--url", &server.url(), "--model", "tiny", "--models", &own])
                .args(["--json", "--tokens", "64", "--answers", "40"])
                .args(extra)
                .output()
                .unwrap();
            let (text, words) = (output.stdout, String::from_utf8_lossy(&output.stderr));
            let json: Value = serde_json::from_slice(&text).unwrap_or_default();
            assert_eq!(output.status.code(), Some(code), "{directory} {extra:?} {json} {words}");
            assert_eq!(json["verdict"], verdict);
            assert_eq!(json["seed_honoured"], true, "{json}");
        }
        let url = server.url();
        let audit = ["audit", "--url", &url, "--model", "tiny", "--models", &own];
        let few = ["--tokens", "8", "--answers", "2"];
        ends_quietly(command(home, &[&audit[..], &few].concat()), 0);
    }
}
