//! `cargo bench --bench attack [-- MODEL [PROMPTS [HONEST]]]`: what each scheme catches, at a small
//! size; `targon-engine bench attack` is the same with tables, JSON and a picture. Without MODEL,
//! that is what `scripts/fetch-model` fetched.

use targon_engine::bench::attack::{AttackBench, AttackSetup};
use targon_engine::bench::host::{self, model_or_fetched};
use targon_engine::verify::Limits;
use targon_engine::verify::evidence::Calibrated;
use targon_engine::verify::scrutiny::Scrutiny;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let path = model_or_fetched(arguments.first().cloned())?;
    let number = |place: usize, default: usize| {
        arguments.get(place).map_or(default, |text| text.parse().expect("a number"))
    };
    let setup = AttackSetup {
        prompts: number(1, 4),
        honest: number(2, 32),
        tokens: None,
        only: None,
        limits: Limits::default(),
        rates: Calibrated::default(),
        scrutiny: Scrutiny::default(),
    };
    let (scratch, pool) = (tempfile::tempdir()?, host::pool()?);
    let bench = AttackBench::new(&path, scratch.path(), &pool, setup);
    let results = bench.and_then(|bench| bench.run(|next| eprintln!("{next}")));
    println!("{}", results.map_err(anyhow::Error::msg)?);
    Ok(())
}
