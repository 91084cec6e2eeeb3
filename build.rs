//! Tells a release build the commit that it is built from, for reports of measurements. What
//! `TARGON_COMMIT` says counts first: `scripts/release` builds from copies without a repository.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=TARGON_COMMIT");
    let given = std::env::var("TARGON_COMMIT").ok().filter(|commit| !commit.is_empty());
    // Other builds would be compiled anew after every commit.
    let is_release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let commit = given.or_else(|| if is_release { of_the_sources() } else { None });
    if let Some(commit) = commit {
        println!("cargo:rustc-env=TARGON_COMMIT={commit}");
    }
}

/// The commit that the sources are at, with `-dirty` where they differ from it.
fn of_the_sources() -> Option<String> {
    let root = std::env::var("CARGO_MANIFEST_DIR").ok()?;
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).current_dir(&root).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    // Sources without a repository may lie within somebody else's.
    let top = git(&["rev-parse", "--show-toplevel"])?;
    if Path::new(&top).canonicalize().ok()? != Path::new(&root).canonicalize().ok()? {
        return None;
    }
    for watched in ["src", "ops", "kernels", "Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={watched}");
    }
    println!("cargo:rerun-if-changed={}", git(&["rev-parse", "--git-path", "logs/HEAD"])?);
    let commit = git(&["rev-parse", "HEAD"])?;
    let is_dirty = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(if is_dirty { format!("{commit}-dirty") } else { commit })
}
