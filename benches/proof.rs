//! `cargo bench --bench proof [-- MODEL]`: what proofs cost. Without MODEL, that is what
//! `scripts/fetch-model` fetched.

use targon_engine::bench::host::model_or_fetched;

fn main() -> anyhow::Result<()> {
    let path = model_or_fetched(std::env::args().skip(1).find(|a| a != "--bench"))?;
    targon_engine::bench::proof::run(&path, &mut |line| println!("{line}"))
}
