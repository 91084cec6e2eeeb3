//! Evidence over many answers, limits from honest pairs, and both as a user meets them.

use crate::common;
use crate::common::site::{CHAT, chat, post, site};
use axum::http::StatusCode;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use targon_engine::config::models_toml;
use targon_engine::lifecycle::pairs::{MEASURING, WantedPairs, check_pairs};
use targon_engine::lifecycle::verifiers::Verifiers;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::Scheme;
use targon_engine::verify::ChunkEvidence;
use targon_engine::verify::RowEvidence;
use targon_engine::verify::calibrate::{
    ENERGY_FACTOR, HonestSample, STATISTIC_FACTOR, limits_file, split,
};
use targon_engine::verify::classes::{fits, narrowest};
use targon_engine::verify::evidence::{
    ALARM, ANSWER_MAX, Calibrated, Evidence, EvidenceStore, MemoryStore, Observed, Test, weigh,
};
use targon_engine::verify::evidence_file::EvidenceFile;
use targon_engine::verify::rows::check_margins;
use targon_engine::verify::{Limits, Report, Verdict, limits_file};

/// Tokens that a fast check looks at.
const TOKENS: usize = 33;
/// Shape of simulated energies.
const SHAPE: usize = 4;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Strictly between 0 and 1.
    fn unit(&mut self) -> f64 {
        ((self.word() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * self.unit().ln()
    }
}

/// A simulated miner: share of mismatches, their mean margin, mean energy in limits.
#[derive(Clone, Copy)]
struct Miner {
    mismatch: f64,
    scale: f64,
    energy: f64,
}

/// What [`Calibrated::default`] calls honest.
const HONEST: Miner = Miner { mismatch: 0.025, scale: 0.052, energy: 0.4 };

impl Miner {
    fn answer(self, random: &mut Random) -> Observed {
        let mut margins = vec![0.0; TOKENS];
        // From one mismatch to the next.
        let gap = |random: &mut Random| (random.unit().ln() / (1.0 - self.mismatch).ln()) as usize;
        let mut at = gap(random);
        while at < TOKENS {
            margins[at] = random.exponential(self.scale).min(1.0);
            at += 1 + gap(random);
        }
        let part = self.energy / SHAPE as f64;
        let energy = (0..SHAPE).map(|_| random.exponential(part)).sum();
        Observed { margins, energies: vec![energy], twin: None }
    }

    /// The answer that raises the alarm, of at most `answers`.
    fn caught(self, seed: u64, answers: usize) -> Option<usize> {
        let (rates, mut random) = (Calibrated::default(), Random(seed));
        let mut evidence = Evidence::default();
        (1..=answers).find(|_| {
            evidence.add(&rates, &self.answer(&mut random));
            evidence.alarm().is_some()
        })
    }
}

#[test]
fn a_check_of_every_row_weighs_no_more_than_a_fast_one() {
    let all =
        Observed { margins: (0..1000).map(f64::from).collect(), energies: vec![0.5], twin: None };
    let some = all.clone().thinned(7);
    assert!((20..=33).contains(&some.margins.len()), "{some:?}");
    assert_ne!(some, all.clone().thinned(8));
    let few = Observed { margins: Vec::new(), energies: vec![0.5], twin: None };
    assert_eq!(few.clone().thinned(7), few);
}

#[test]
fn honest_miners_raise_no_alarm_in_ten_thousand_answers() {
    let alarms: Vec<u64> =
        (0..500).filter(|seed| HONEST.caught(1000 + seed, 10_000).is_some()).collect();
    assert!(alarms.is_empty(), "runs {alarms:?}");
}

#[test]
fn cheats_are_found_within_so_many_answers() {
    let cases = [
        (
            "int8 per channel, then a true prefill",
            Miner { mismatch: 0.052, scale: 0.11, ..HONEST },
            80,
        ),
        ("int8 rows", Miner { energy: 0.9, ..HONEST }, 60),
        ("both", Miner { mismatch: 0.052, scale: 0.11, energy: 0.9 }, 30),
        ("temperature 0.7 for 0.8", Miner { mismatch: 0.064, scale: 0.2, ..HONEST }, 40),
        ("temperature 0.9 for 0.8", Miner { mismatch: 0.08, scale: 0.34, ..HONEST }, 20),
        ("int4, then a true prefill", Miner { mismatch: 0.38, scale: 0.7, ..HONEST }, 6),
    ];
    for (name, miner, answers) in cases {
        for seed in 0..50 {
            let caught = miner.caught(seed, answers);
            assert!(caught.is_some(), "{name}: seed {seed} got through {answers} answers");
            assert!(caught > Some(4), "{name}: {caught:?} answers decided");
        }
    }
}

#[test]
fn one_answer_never_decides_and_old_evidence_fades() {
    let rates = Calibrated::default();
    let damning = Observed { margins: vec![1.0; 1000], energies: vec![1e6; 32], twin: None };
    let mut evidence = Evidence::default();
    for answer in 1..=4 {
        let gain = evidence.add(&rates, &damning);
        assert_eq!([gain.margin, gain.energy, gain.joint], [ANSWER_MAX; 3]);
        assert_eq!(evidence.alarm(), None, "after {answer}");
    }
    evidence.add(&rates, &damning);
    assert_eq!((evidence.alarm(), evidence.alarms), (Some(Test::Margin), 1));
    for _ in 0..100 {
        evidence.add(&rates, &damning);
    }
    assert!(evidence.sums.margin <= 2.0 * ALARM, "certainty has an end");
    // Energies alone say nothing of margins, whose evidence fades by half.
    let before = evidence.sums.margin;
    for _ in 0..200 {
        evidence.add(&rates, &Observed { margins: vec![], energies: vec![0.0], twin: None });
    }
    assert!((evidence.sums.margin - before / 2.0).abs() < 1e-6);
    assert_eq!(evidence.sums.energy, 0.0);
    let silent = evidence;
    evidence.add(&rates, &Observed::default());
    assert_eq!(evidence, silent, "a hard failure says nothing here");
}

/// A spoofer's answers that are too short or too lucky to be rejected: each passes by itself.
#[test]
fn answers_that_pass_add_up_to_an_alarm() {
    let (rates, limits) = (Calibrated::default(), Limits::default());
    let passing = |margin: f64| {
        let mut margins = vec![0.0; 60];
        margins[7] = margin;
        let report = sample(1, &margins, &[0.0; 2]).report;
        assert!(check_margins(&report.rows, &limits).is_ok(), "{margin}");
        Observed::of(&report, Some(Scheme::Residue), &limits)
    };
    let answers_until_alarm = |margin: f64| {
        let (mut evidence, answer) = (Evidence::default(), passing(margin));
        (1..=1000).find(|_| {
            evidence.add(&rates, &answer);
            evidence.alarm().is_some()
        })
    };
    // The control: none of it can be rejected, but one that is a little larger can.
    let over = sample(1, &[0.51; 60], &[0.0]).report;
    assert!(check_margins(&over.rows, &limits).is_err());
    assert_eq!(answers_until_alarm(0.4), Some(6));
    assert_eq!(answers_until_alarm(0.3), Some(11));
    assert_eq!(answers_until_alarm(0.02), None, "as honest stacks err");
}

#[test]
fn margins_and_energies_are_told_apart() {
    let rates = Calibrated::default();
    let alarm = |answer: &Observed| {
        let mut store = MemoryStore::default();
        let mut last = None;
        for _ in 0..8 {
            let (evidence, _) = weigh(&mut store, "miner", &rates, answer).unwrap();
            last = evidence.alarm();
        }
        assert_eq!(store.load("another").unwrap(), None);
        last
    };
    let margins = Observed { margins: vec![0.9; 33], energies: vec![0.0], twin: None };
    assert_eq!(alarm(&margins), Some(Test::Margin));
    let energies = Observed { margins: vec![0.0; 33], energies: vec![3.0], twin: None };
    assert_eq!(alarm(&energies), Some(Test::Energy));
    let mild = Observed { margins: vec![], energies: vec![0.5], twin: None };
    assert_eq!(alarm(&mild), None);
    // Where the twin measured the rows, it alone counts of them.
    let seen = Observed { twin: Some(1.8), ..mild.clone() };
    assert_eq!(alarm(&seen), Some(Test::Energy));
    let cleared = Observed { twin: Some(0.65), ..energies };
    assert_eq!(alarm(&cleared), None);
    let broken = Observed { twin: Some(f64::NAN), ..mild };
    assert_eq!(alarm(&broken), None, "what is no number says nothing");
}

#[test]
fn evidence_outlives_the_process_and_a_damaged_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("evidence.json");
    let (rates, answer) = (Calibrated::default(), HONEST.answer(&mut Random(3)));
    let mut file = EvidenceFile::open(&path).unwrap();
    let (kept, _) = weigh(&mut file, "alice", &rates, &answer).unwrap();
    weigh(&mut file, "bob", &rates, &answer).unwrap();
    let read = EvidenceFile::open(&path).unwrap();
    assert_eq!(read.load("alice").unwrap(), Some(kept));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    assert!(file.save("", &kept).is_err());
    let text = std::fs::read_to_string(&path).unwrap();
    for (from, to, want) in [
        ("\"version\": 1", "\"version\": 2", "`version` must be 1, got 2"),
        ("\"answers\"", "\"replies\"", "unknown field `replies`"),
        ("\"margin\": ", "\"margin\": 9", "`miners.alice.sums` must lie between 0 and"),
        (text.as_str(), "{", "EOF"),
    ] {
        std::fs::write(&path, text.replace(from, to)).unwrap();
        let refused = EvidenceFile::open(&path).unwrap_err().to_string();
        assert!(refused.contains("evidence.json: ") && refused.contains(want), "{refused}");
    }
}

/// A checked answer with these margins, and chunks of these energies.
fn sample(prompt: u32, margins: &[f64], energies: &[f64]) -> HonestSample {
    let row = |(index, margin): (usize, &f64)| RowEvidence {
        index,
        token: 1,
        rank: 1,
        logprob: -0.5,
        reported: None,
        end_rank: None,
        margin: Some(*margin),
        is_drawn: Some(*margin == 0.0),
        top_error: None,
    };
    let chunk = |(index, energy): (usize, &f64)| ChunkEvidence {
        index,
        rows: 32,
        energy: Some(*energy),
        ..ChunkEvidence::default()
    };
    let report = Report {
        rows: margins.iter().enumerate().map(row).collect(),
        chunks: energies.iter().enumerate().map(chunk).collect(),
        energies: energies.iter().flat_map(|energy| [*energy; 32]).collect(),
        ..Report::bare(Verdict::Pass)
    };
    HonestSample::new(&[prompt, 2, 3], Scheme::Residue, report)
}

/// Answers of a stack that is off by a little: two to each prompt.
fn honest_samples(prompts: u32) -> Vec<HonestSample> {
    let mut random = Random(11);
    let all = (0..2 * prompts).map(|i| {
        let margins = HONEST.answer(&mut random).margins;
        let energies = [20.0 + 20.0 * random.unit(), 20.0 + 20.0 * random.unit()];
        sample(i / 2, &margins, &energies)
    });
    all.collect()
}

#[test]
fn limits_rest_on_one_half_of_the_prompts_and_are_tested_on_the_other() {
    let samples = honest_samples(60);
    let halves = split(samples.clone(), 0.5).unwrap();
    assert_eq!((halves.0.len(), halves.1.len()), (60, 60));
    let is_shared = |s: &HonestSample| halves.1.iter().any(|other| other.prompt == s.prompt);
    assert!(!halves.0.iter().any(is_shared), "a prompt is on one side only");
    let file = limits_file(&[7; 32], "a stack", &halves);
    let largest = halves.0.iter().flat_map(|s| &s.report.chunks).filter_map(|c| c.energy);
    let largest = largest.fold(0.0, f64::max);
    assert_eq!(file.limits.energy_u8, ENERGY_FACTOR * largest);
    assert_eq!(file.limits.energy_u4, Limits::default().energy_u4, "none was measured");
    assert_eq!((file.limits.energy_rounding, file.calibration.energy_rounding), (0.0, None));
    let [_, one, two, ..] = file.limits.trimmed_u8.0;
    assert!(one > two && two > STATISTIC_FACTOR * 20.0, "more rows, closer limits: {one} {two}");
    assert_eq!(file.limits.trimmed_u4, Limits::default().trimmed_u4, "none was measured");
    assert_eq!((file.held_out.trimmed.of, file.calibration.trimmed_u4), (60, None));
    let spread = file.calibration.energy_u8.unwrap();
    assert!(spread.mean < spread.p999 && spread.p999 <= spread.max && spread.count == 120);
    let held = &file.held_out;
    assert_eq!((held.answers, held.energy_u8.over, held.energy_u8.of), (60, 0, 60));
    // 1 - 0.05^(1/60).
    assert!((held.energy_u8.upper95 - 0.048_703).abs() < 1e-6, "{:?}", held.energy_u8);
    assert_eq!((held.energy_u4.of, held.energy_u4.upper95), (0, 1.0));
    assert!(held.rejected.over >= held.margin_mean.over.max(held.margin.over));
    let rates = file.rates;
    assert!(rates.honest.mismatch > file.calibration.mismatch_rate, "a bound, not a mean");
    assert!(rates.check().is_ok());
    let one = split(samples[..2].to_vec(), 0.5).unwrap_err().to_string();
    assert!(one.contains("needs prompts on both sides"), "{one}");
}

#[test]
fn energies_are_limited_by_what_rounding_gives_where_the_twin_was_run() {
    let mut samples = honest_samples(20);
    for (place, sample) in samples.iter_mut().enumerate() {
        for chunk in &mut sample.report.chunks {
            // All but one stand at half of what rounding gives.
            let share = if place == 7 { 2.5 } else { 0.5 };
            chunk.rounding = chunk.energy.map(|energy| energy / share);
        }
        // Few rows say little, and what rounding hardly moves is no unit.
        let [first, ..] = sample.report.chunks.as_slice() else { panic!("no chunk") };
        let short = ChunkEvidence { index: 2, rows: 5, rounding: Some(2.0), ..*first };
        let still = ChunkEvidence { index: 3, energy: Some(0.3), rounding: Some(0.01), ..*first };
        sample.report.chunks.extend([short, still]);
    }
    let halves = split(samples, 0.5).unwrap();
    let file = limits_file(&[7; 32], "a stack", &halves);
    let largest = file.calibration.energy_rounding.unwrap().max;
    let whole = halves.0.iter().flat_map(|s| &s.report.chunks[..2]);
    let want = whole.map(|c| c.energy.unwrap() / c.rounding.unwrap()).fold(0.0, f64::max);
    assert_eq!(largest, want);
    assert_eq!(file.limits.energy_rounding, ENERGY_FACTOR * largest);
    let mut written = serde_json::to_value(&file).unwrap();
    for (part, key) in [("limits", "energy_rounding"), ("calibration", "energy_rounding")] {
        written[part].as_object_mut().unwrap().remove(key).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("limits.json");
    std::fs::write(&path, written.to_string()).unwrap();
    let older = limits_file::read(&path).unwrap();
    assert_eq!(older.limits.energy_rounding, 0.0, "what was not measured excuses nobody");
}

#[test]
fn a_limits_file_is_read_back_or_its_fault_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("limits.json");
    let halves = split(honest_samples(20), 0.3).unwrap();
    let file = limits_file(&[7; 32], "a stack", &halves);
    limits_file::write(&path, &file).unwrap();
    assert_eq!(limits_file::read(&path).unwrap(), file);
    assert!(file.check_model(&path, &[7; 32]).is_ok());
    let other = file.check_model(&path, &[8; 32]).unwrap_err().to_string();
    assert!(other.contains("`model` is 0707") && other.contains("0808"), "{other}");
    let good: Value = serde_json::to_value(&file).unwrap();
    for (pointer, value, want) in [
        ("/version", json!(9), "`version` must be 2, got 9"),
        ("/version", json!(1), "`version` 1 has limits for single chunks and none for whole"),
        ("/limits/trimmed_u8/4", json!(0), "`limits.trimmed_u8` must be a number above 0, got 0"),
        ("/limits/trimmed_u8", json!([1, 2]), "`limits.trimmed_u8` is wrong: invalid length 2"),
        ("/model", json!("xyz"), "`model` must be 64 lower-case hexadecimal digits, got xyz"),
        ("/class", json!(""), "`class` must have 1 to 200 bytes, got 0"),
        ("/limits/margin", json!(-1), "`limits.margin` must lie above 0 and be at most 1, got -1"),
        ("/limits/margin", json!("x"), "`limits.margin` is wrong: invalid type"),
        ("/limits/energy_rounding", json!(-1), "`limits.energy_rounding` must be a number of at"),
        ("/limits/energy_u8", json!(0), "`limits.energy_u8` must be a number above 0, got 0"),
        ("/rates/cheat/mismatch", json!(0), "`rates.cheat.mismatch` must lie between"),
        ("/rates/half_life", json!(1), "`rates.half_life` must lie between 1 and"),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        std::fs::write(&path, bad.to_string()).unwrap();
        let refused = limits_file::read(&path).unwrap_err().to_string();
        assert!(refused.contains("limits.json: ") && refused.contains(want), "{refused}");
    }
    let mut missing = good.clone();
    missing.as_object_mut().unwrap().remove("held_out");
    std::fs::write(&path, missing.to_string()).unwrap();
    let refused = limits_file::read(&path).unwrap_err().to_string();
    assert!(refused.contains("missing field `held_out`"), "{refused}");
    let absent = limits_file::read(&dir.path().join("absent")).unwrap_err().to_string();
    assert!(absent.contains("absent: cannot be read"), "{absent}");
}

#[test]
fn a_miner_belongs_to_the_narrowest_class_that_its_answers_keep() {
    let file = |class, samples| limits_file(&[7; 32], class, &split(samples, 0.3).unwrap());
    let of = |energy: f64, margin: f64| -> Vec<HonestSample> {
        let one = |prompt: u32| {
            let wave = 1.0 + f64::from(prompt % 5) / 10.0;
            sample(prompt, &[0.0, margin * wave, 0.0, 0.0], &[energy * wave; 4])
        };
        (0..24).map(one).collect()
    };
    // In whatever order they are given.
    let files = [file("bf16", of(110.0, 0.2)), file("f32", of(13.0, 0.05))];
    let told = |answers: &[HonestSample]| {
        let fits = fits(&files, answers);
        assert_eq!([&*fits[0].file.class, &*fits[1].file.class], ["f32", "bf16"]);
        let class = narrowest(&fits).map(|fit| fit.file.class.clone());
        (class, fits.iter().map(|fit| fit.broken.clone()).collect::<Vec<_>>())
    };
    assert_eq!(told(&of(12.0, 0.05)[..8]), (Some("f32".into()), vec![None, None]));
    let (class, broken) = told(&of(110.0, 0.2)[..8]);
    assert_eq!((class, &broken[1]), (Some("bf16".into()), &None));
    let (number, what) = broken[0].clone().unwrap();
    assert!(number == 1 && what.starts_with("chunk 0 has energy"), "{number}: {what}");
    // One answer that is far decides, wherever it stands among them.
    let mut mixed = of(12.0, 0.05)[..8].to_vec();
    mixed[5] = of(12.0, 0.45).remove(0);
    let (class, broken) = told(&mixed);
    assert_eq!(class, None);
    assert!(
        broken.iter().all(|b| b
            .as_ref()
            .is_some_and(|(n, what)| *n == 6 && what.contains("logits from being drawn"))),
        "{broken:?}"
    );
    let missed = fits(&files, &mixed)[0].missed;
    let held = &files[1].held_out;
    let one = held.rejected.upper95 + held.trimmed.upper95;
    assert_eq!((held.twin.of, held.trimmed.of > 0), (0, true));
    assert!((missed - (8.0 * one).min(1.0)).abs() < 1e-12, "{missed} {one}");
}

fn run(cache: &Path, arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_targon-engine"))
        .env_remove("TARGON_LIMITS")
        .env_remove("TARGON_EVIDENCE")
        .env("TARGON_THREADS", "2")
        .env("TARGON_CACHE", cache)
        .env("TARGON_MODELS", cache.join("models.toml"))
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// A directory with the model that the site serves, and two answers to each of six prompts.
async fn captured(dir: &Path) -> String {
    common::write_checkpoint(&dir.join("m"), &common::tiny_config(), 3);
    let models = "[[model]]\nname = \"tiny\"\npath = \"m\"\n";
    std::fs::write(dir.join("models.toml"), models).unwrap();
    let site = site(common::options());
    let mut lines = Vec::new();
    for prompt in ["one", "two", "three", "four", "five", "six"] {
        let body = chat(json!({
            "messages": [{"role": "user", "content": prompt}], "n": 2, "max_tokens": 40,
            "temperature": 0.8, "logprobs": true, "return_token_ids": true,
            "proof": {"scheme": "residue-v1", "nonce": "22".repeat(32)},
        }));
        let (status, response) = post(&site.app, CHAT, body.clone()).await;
        assert_eq!(status, StatusCode::OK, "{response}");
        let line = json!({"request": body, "response": response, "miner": "tester"});
        lines.push(line.to_string());
    }
    let file = dir.join("answers.jsonl");
    std::fs::write(&file, lines.join("\n")).unwrap();
    file.display().to_string()
}

#[tokio::test]
async fn the_program_calibrates_checks_and_remembers() {
    let dir = tempfile::tempdir().unwrap();
    let file = captured(dir.path()).await;
    let place = |name: &str| dir.path().join(name).display().to_string();
    let (out, store, page) = (place("limits.json"), place("evidence.json"), place("page.html"));
    let class = "this engine";
    let (code, table, err) =
        run(dir.path(), &["calibrate", "--pairs", &file, "--limits", &out, "--class", class]);
    assert_eq!(code, 0, "{table}{err}");
    for want in ["class `this engine`", "6 answers to 3 prompts", "0 of 6", "equal bit for bit"] {
        assert!(table.contains(want), "{want}: {table}");
    }
    assert_eq!(limits_file::read(Path::new(&out)).unwrap().class, class);
    let told = ["calibrate", "--pairs", &file, "--classes", &out, "--first", "3"];
    let (code, classes, err) = run(dir.path(), &told);
    assert_eq!(code, 0, "{classes}{err}");
    for want in ["tester: class `this engine`, by 3 answers", "`this engine` fits", "0 captures"] {
        assert!(classes.contains(want), "{want}: {classes}");
    }
    let (code, _, err) = run(dir.path(), &["calibrate", "--pairs", &file]);
    assert!(code == 1 && err.contains("--limits") && err.contains("--classes"), "{err}");
    let check = |more: &[&str]| {
        let base: [&str; 8] =
            ["verify", &file, "--limits", &out, "--evidence", &store, "--html", &page];
        run(dir.path(), &[&base[..], more].concat())
    };
    let (code, lines, err) = check(&["--json"]);
    assert_eq!(code, 0, "{lines}{err}");
    let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 12);
    for (answers, line) in (1..).zip(&lines) {
        let evidence = &line["evidence"];
        assert_eq!((&evidence["miner"], &evidence["answers"]), (&json!("tester"), &json!(answers)));
        assert_eq!((&evidence["alarm"], &evidence["sums"]["joint"]), (&Value::Null, &json!(0.0)));
    }
    // A peer's words are text, wherever they stand.
    let hostile = json!({
        "request": chat(json!({})), "miner": "tester",
        "chunks": [{"error": {"message": "<script>alert(1)</script>"}}],
    });
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{text}\n{hostile}\n")).unwrap();
    let (code, shown, _) = check(&["--explain"]);
    assert!(code == 3 && shown.contains("evidence on tester after 24 answers"), "{shown}");
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.contains("&lt;script&gt;") && !page.contains("<script"), "{page:.2000}");
    assert!(page.contains("<svg") && page.contains("Content-Security-Policy"));
    let (code, _, err) = run(dir.path(), &["verify", &file, "--limits", &store]);
    assert!(code == 1 && err.contains("evidence.json: "), "{err}");
}

#[tokio::test]
async fn pairs_that_are_no_samples_are_refused_by_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = std::fs::read_to_string(captured(dir.path()).await).unwrap();
    common::write_checkpoint(&dir.path().join("m2"), &common::tiny_config(), 4);
    let models = dir.path().join("models.toml");
    let both =
        std::fs::read_to_string(&models).unwrap() + "[[model]]\nname = \"other\"\npath = \"m2\"\n";
    std::fs::write(&models, both).unwrap();
    let path = dir.path().join("pairs.jsonl");
    let check = async |last: &str, model: Option<&str>| {
        std::fs::write(&path, format!("{good}\n{last}\n")).unwrap();
        let config = models_toml::read(&models, &[]).unwrap();
        let (pool, quiet) = (Pool::new(2, Isa::best()).unwrap(), Arc::new(common::Quiet));
        let mut verifiers = Verifiers::new((models.as_path(), config), pool, MEASURING, quiet);
        let wanted = WantedPairs { model, answers_max: 5 };
        let checked = check_pairs(std::slice::from_ref(&path), &mut verifiers, wanted).await;
        checked.map_err(|e| (e.to_string(), e.hint()))
    };
    let found = check("", None).await.unwrap();
    let samples = &found.samples[&Some("tester".to_owned())];
    assert_eq!((found.samples.len(), samples.len(), found.left_out), (1, 5, 0));
    let named = |model: &str, body: Value| {
        let mut request = chat(body);
        request["model"] = model.into();
        json!({"request": request, "response": {}, "miner": "second"}).to_string()
    };
    let no_proof = named("tiny", json!({"max_tokens": 4}));
    assert_eq!(check(&no_proof, None).await.unwrap().left_out, 1);
    for (last, want) in [
        ("nonsense".to_owned(), "pairs.jsonl:7: BAD_STREAM"),
        (named("other", json!({})), "pairs.jsonl:7: limits belong to one model"),
        (named("tiny", json!({"max_tokens": -1})), "pairs.jsonl:7: `request`"),
        (named("gone", json!({})), "models.toml has no model `gone`"),
    ] {
        let (error, hint) = check(&last, None).await.unwrap_err();
        assert!(error.contains(want), "{error}");
        assert_eq!(hint.is_some(), want.contains("model"), "{error}");
    }
    // Another model's captures count for nothing.
    assert!(check(&named("other", json!({})), Some("tiny")).await.is_ok());
    let (error, _) = check("", Some("other")).await.unwrap_err();
    assert!(error.ends_with("pairs.jsonl hold no answer of the model `other`"), "{error}");
}

#[test]
fn the_programs_own_answers_are_all_equal() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(&dir.path().join("m"), &common::tiny_config(), 3);
    let models = "[[model]]\nname = \"tiny\"\npath = \"m\"\n";
    std::fs::write(dir.path().join("models.toml"), models).unwrap();
    let (code, out, err) = run(dir.path(), &["calibrate", "--answers", "3"]);
    assert!(code == 0 && out.contains("tiny: 3 of 3 answers are equal"), "{out}{err}");
    let limits = ["calibrate", "--pairs", "p.jsonl", "--limits", "l.json", "--held-out", "1.5"];
    let (code, _, err) = run(dir.path(), &limits);
    assert!(code == 1 && err.contains("--held-out must lie between 0 and 1, got 1.5"), "{err}");
    // What only limits rest on means nothing without them, and a model must be one of the file.
    for flag in ["--held-out", "--class"] {
        let (code, _, err) = run(dir.path(), &["calibrate", flag, "0.5"]);
        assert!(code == 1 && err.contains("--limits <FILE>"), "{err}");
    }
    let (code, _, err) = run(dir.path(), &["calibrate", "--model", "nope"]);
    assert!(code == 1 && err.contains("models.toml has no model `nope`"), "{err}");
}
