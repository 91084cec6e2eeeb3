//! `cargo bench --bench canon`: what the canon costs, and what its partitions give.

fn main() -> anyhow::Result<()> {
    targon_engine::bench::canon::run(&mut |line| println!("{line}"))
}
