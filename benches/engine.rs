//! `cargo bench --bench engine [-- MODEL] [--device D] [--json]`: the engine on a real model, then
//! through HTTP; `scripts/bench-peers` puts the figures beside llama.cpp's. Without MODEL, that is
//! what `scripts/fetch-model` fetched.

use targon_engine::bench::engine::run;
use targon_engine::bench::host::model_or_fetched;
use targon_engine::models::device::Device;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let at = args.iter().position(|a| a == "--device");
    let device = match at.map(|at| args.get(at + 1).expect("--device needs a value")) {
        Some(name) => name.parse().map_err(|e| anyhow::anyhow!("--device {e}"))?,
        None => Device::default(),
    };
    let is_path = |i: usize, arg: &str| !arg.starts_with("--") && at.is_none_or(|at| i != at + 1);
    let path = args.iter().enumerate().find(|(i, arg)| is_path(*i, arg)).map(|(_, path)| path);
    let figures = run(device, &model_or_fetched(path.cloned())?)?;
    match args.iter().any(|a| a == "--json") {
        true => println!("{}", figures.json()),
        false => println!("{figures}"),
    }
    Ok(())
}
