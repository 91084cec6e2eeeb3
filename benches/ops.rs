//! `cargo bench --bench ops`: kernels against the ceilings of this machine.

fn main() -> anyhow::Result<()> {
    targon_engine::bench::ops::run(&mut |line| println!("{line}"))
}
