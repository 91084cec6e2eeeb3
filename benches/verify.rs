//! `cargo bench --bench verify [-- MODEL]`: what verifying costs. Without MODEL, that is what
//! `scripts/fetch-model` fetched.

use std::path::PathBuf;

fn main() -> anyhow::Result<()> {
    let path = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let path = path.map_or_else(smollm2, PathBuf::from);
    assert!(path.exists(), "{} is missing: run scripts/fetch-model first", path.display());
    let scratch = tempfile::tempdir()?;
    targon_engine::bench::verify::run(&path, scratch.path(), &mut |line| println!("{line}"))
}

/// SmolLM2-135M-Instruct, where `scripts/fetch-model` puts it.
fn smollm2() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let home = || var("HOME").unwrap_or_default().join(".cache/targon-engine/models");
    let path = var("TARGON_ENGINE_MODELS").unwrap_or_else(home);
    path.join("SmolLM2-135M-Instruct.Q4_1.gguf")
}
