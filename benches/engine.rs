//! `cargo bench --bench engine [-- MODEL] [--device D] [--json]`: the engine on a real model, then
//! through HTTP; `scripts/bench-peers` puts the figures beside llama.cpp's. Without MODEL, that is
//! what `scripts/fetch-model` fetched.

use targon_engine::bench::arguments::BenchArgs;
use targon_engine::bench::engine::run_by;

fn main() -> anyhow::Result<()> {
    println!("{}", run_by(BenchArgs::of_process())?);
    Ok(())
}
