//! `cargo bench --bench proof [-- MODEL]`: what proofs cost. Without MODEL, that is what
//! `scripts/fetch-model` fetched.

use targon_engine::bench::arguments::BenchArgs;
use targon_engine::bench::host::model_or_fetched;

fn main() -> anyhow::Result<()> {
    let path = model_or_fetched(BenchArgs::of_process().word())?;
    targon_engine::bench::proof::run(&path, &mut |line| println!("{line}"))
}
