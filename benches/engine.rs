//! `cargo bench --bench engine -- MODEL [--json]`: the engine on a real model, then through HTTP;
//! `scripts/bench-peers` puts the figures beside llama.cpp's.

use std::path::Path;

fn main() -> anyhow::Result<()> {
    let path = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let path = path.expect("usage: cargo bench --bench engine -- MODEL [--json]");
    let figures = targon_engine::bench::engine::run(Path::new(&path))?;
    match std::env::args().any(|a| a == "--json") {
        true => println!("{}", figures.json()),
        false => println!("{figures}"),
    }
    Ok(())
}
