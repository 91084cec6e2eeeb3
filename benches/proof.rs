//! `cargo bench --bench proof -- MODEL`: what proofs cost.

use std::path::Path;

fn main() -> anyhow::Result<()> {
    let path = std::env::args().skip(1).find(|a| a != "--bench");
    let path = path.expect("usage: cargo bench --bench proof -- MODEL");
    targon_engine::bench::proof::run(Path::new(&path), &mut |line| println!("{line}"))
}
