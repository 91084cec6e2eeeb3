//! `cargo bench --bench engine [-- MODEL] [--device D] [--short] [--json]`: the engine on a real
//! model, then, unless it is to be short, with long contexts, shared prompts and through HTTP;
//! `scripts/bench-peers` puts the figures beside those of other engines. Without MODEL, that is
//! what `scripts/fetch-model` fetched.

use targon_engine::bench::arguments::BenchArgs;
use targon_engine::bench::engine::run_by;

fn main() -> anyhow::Result<()> {
    println!("{}", run_by(BenchArgs::of_process())?);
    Ok(())
}
