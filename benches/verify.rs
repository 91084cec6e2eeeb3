//! `cargo bench --bench verify [-- MODEL]`: what verifying costs. Without MODEL, that is what
//! `scripts/fetch-model` fetched.

use targon_engine::bench::arguments::BenchArgs;
use targon_engine::bench::host::model_or_fetched;

fn main() -> anyhow::Result<()> {
    let path = model_or_fetched(BenchArgs::of_process().word())?;
    let scratch = tempfile::tempdir()?;
    targon_engine::bench::verify::run(&path, scratch.path(), &mut |line| println!("{line}"))
}
