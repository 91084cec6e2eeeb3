//! `cargo bench --bench attack [-- MODEL [PROMPTS [HONEST]]]`: what each scheme catches, at a small
//! size; `targon-engine bench attack` is the same with tables, JSON and a picture. Without MODEL,
//! that is what `scripts/fetch-model` fetched.

use targon_engine::bench::arguments::BenchArgs;
use targon_engine::bench::attack::run_by;

fn main() -> anyhow::Result<()> {
    println!("{}", run_by(BenchArgs::of_process(), |next| eprintln!("{next}"))?);
    Ok(())
}
