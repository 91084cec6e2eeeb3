//! What goes wrong before a card can be used: the driver, the context, the compiler. Each is a
//! process of its own, because a driver starts once.

use crate::failures::{alone, is_alone};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc::{Sender, channel};
use targon_engine::bench::arguments::BenchArgs;
use targon_engine::bench::gpu::{Wanted, run};
use targon_engine::models::cuda::{Card, CudaError};
use targon_engine::models::device::{Cards, Device, cards};

/// Lines of a log, as they are written.
struct Lines(Sender<String>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.send(String::from_utf8_lossy(bytes).into_owned()).unwrap();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What `auto` stands for, and what is logged of that.
fn auto() -> (Device, String) {
    let (sender, lines) = channel();
    let writer = move || Lines(sender.clone());
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish();
    let device = tracing::subscriber::with_default(subscriber, || Device::Auto.resolved());
    (device, lines.try_iter().collect())
}

/// What the measurement of a card says, and how it ends.
fn measured() -> (Vec<String>, Result<(), String>) {
    let (wanted, mut said) = (Wanted::read(BenchArgs::of_process()).unwrap(), Vec::new());
    let outcome = run(&wanted, &mut |line| said.push(line));
    (said, outcome.map_err(|error| error.to_string()))
}

/// Whatever names a driver that does not work says this.
fn everyone_says(why: &str) {
    let wrong = Card::open(0).map(drop).unwrap_err();
    assert!(matches!(wrong, CudaError::Driver { .. } | CudaError::OldDriver { .. }), "{wrong}");
    assert!(wrong.to_string().contains(why), "{wrong}");
    assert!(matches!(cards(), Cards::Unusable(said) if said.contains(why)));
    let (device, log) = auto();
    assert_eq!(device, Device::Cpu);
    assert!(log.contains(" WARN ") && log.contains(why), "{log}");
    let (said, outcome) = measured();
    assert!(said.is_empty() && outcome.unwrap_err().contains(why), "{said:?}");
}

#[test]
fn a_driver_that_does_not_start_is_named() {
    let Ok(code) = std::env::var("FAKE_CUDA_INIT") else {
        // The fabric manager, another version than the kernel's, a card that is stuck, unknown, a
        // library that is only there to link with.
        for code in ["802", "803", "804", "999", "34"] {
            let test = "opening::a_driver_that_does_not_start_is_named";
            alone(test, &[("FAKE_CUDA_INIT", code)], &[]);
        }
        return;
    };
    let call = if code == "34" { "cuDriverGetVersion" } else { "cuInit" };
    everyone_says(&format!("{call} says stand-in error {code} (error {code})"));
}

#[test]
fn a_driver_that_is_too_old_fails_the_measurement() {
    if !is_alone() {
        let test = "opening::a_driver_that_is_too_old_fails_the_measurement";
        return alone(test, &[("FAKE_CUDA_DRIVER", "12080")], &[]);
    }
    everyone_says("install driver 580 or newer");
}

#[test]
fn a_machine_without_a_card_is_measured_well() {
    if !is_alone() {
        let test = "opening::a_machine_without_a_card_is_measured_well";
        alone(test, &[("FAKE_CUDA_DEVICES", "0")], &[]);
        return alone(test, &[], &["LD_LIBRARY_PATH"]);
    }
    let (device, log) = auto();
    assert_eq!(device, Device::Cpu);
    assert!(log.contains(" INFO ") && log.contains("computing on the processor"), "{log}");
    let (said, outcome) = measured();
    assert!(outcome.is_ok() && said.len() == 1 && said[0].contains("nothing was measured"));
}

#[test]
fn a_card_that_cannot_be_opened_is_not_lost() {
    // Another process has it for itself, the fabric manager, no compiler, PTX that it refuses.
    let cases = [
        ("FAKE_CUDA_RETAIN", "46", "cuDevicePrimaryCtxRetain: stand-in error 46 (error 46)"),
        ("FAKE_CUDA_RETAIN", "802", "cuDevicePrimaryCtxRetain: stand-in error 802 (error 802)"),
        ("FAKE_CUDA_JIT", "221", "cuModuleLoadDataEx: stand-in error 221 (error 221)"),
        (
            "FAKE_CUDA_JIT",
            "218",
            "cuModuleLoadDataEx: stand-in error 218: ptxas application ptx input, line 9; \
             error   : stand-in (error 218)",
        ),
    ];
    if !is_alone() {
        for (variable, code, _) in cases {
            let test = "opening::a_card_that_cannot_be_opened_is_not_lost";
            alone(test, &[(variable, code)], &[]);
        }
        return;
    }
    let is_set = |name: &str, code: &str| std::env::var(name).is_ok_and(|value| value == code);
    let (_, _, want) = cases.iter().find(|(name, code, _)| is_set(name, code)).unwrap();
    for _ in 0..2 {
        let why = Card::open(0).map(drop).unwrap_err();
        assert!(matches!(why, CudaError::Refused { .. }), "{why}");
        assert_eq!(why.to_string(), format!("cuda:0 refused {want}"));
    }
    let (device, log) = auto();
    assert!(device == Device::Cpu && log.contains(" WARN ") && log.contains(want), "{log}");
}

#[test]
fn multiprocessors_hold_what_their_cards_say() {
    let threads = |number| Card::open(number).unwrap().multiprocessor_threads().unwrap();
    assert_eq!([0, 5, 6].map(threads), [2048, 1536, 2048]);
}

/// A program of a directory that says how it was called.
fn program(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// `scripts/check-gpu`, called from a directory with only these programs beside the system's.
fn check_gpu(from: &Path, words: &[&str], programs: &str) -> Output {
    let script: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check-gpu");
    let mut command = Command::new(script);
    command.args(words).current_dir(from).env_clear();
    command.env("PATH", format!("{programs}:/usr/bin:/bin")).env("HOME", from);
    command.output().unwrap()
}

#[test]
fn paths_are_those_of_the_callers_directory() {
    let dir = tempfile::tempdir().unwrap();
    let tell = "echo \"$PWD\" \"$@\"";
    program(&dir.path().join("here/measure"), &format!("{tell}; exit 3"));
    program(&dir.path().join("bin/cargo"), tell);
    program(&dir.path().join("bin/rustc"), "echo rustc 9.0.0");
    let here = dir.path().join("here").canonicalize().unwrap();
    let said = |output: &Output| String::from_utf8_lossy(&output.stdout).trim().to_owned();
    // A program needs no toolchain, is found beside the caller, and says how it ended.
    for name in ["measure", "./measure", "../here/measure"] {
        let output = check_gpu(&here, &[name, "--model", "m x", "--dry"], "/nowhere");
        assert_eq!(said(&output), format!("{} --model m x --dry", here.display()));
        assert_eq!(output.status.code(), Some(3));
    }
    let missing = check_gpu(&here, &["missing", "--dry"], "/nowhere");
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("missing is no program"));
    // A build runs in a directory of its own.
    let bin = dir.path().join("bin").display().to_string();
    for (path, want) in [("m x", here.join("m x")), ("/m", "/m".into())] {
        let text = said(&check_gpu(&here, &["--dry", "--model", path, "--runs", "1"], &bin));
        let end = format!("--bench gpu -- --dry --model {} --runs 1", want.display());
        assert!(text.ends_with(&end) && text.starts_with(env!("CARGO_MANIFEST_DIR")), "{text}");
    }
    let bare = said(&check_gpu(&here, &[], &bin));
    assert!(bare.ends_with("--bench gpu --"), "{bare}");
}
