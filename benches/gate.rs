//! `cargo bench --bench gate`: what the signed door adds to a request.

fn main() -> anyhow::Result<()> {
    targon_engine::bench::gate::run(&mut |line| println!("{line}"))
}
