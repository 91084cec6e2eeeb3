//! `cargo bench --features cuda --bench gpu -- [--dry] [--device N] [--seconds S] [--model PATH]
//! [--only PARTS] [--layers N] [--runs N]`: an NVIDIA card against the CPU's bits, then its speed.
//! `scripts/check-gpu` runs it and says what the flags are.

use targon_engine::bench::arguments::BenchArgs;
use targon_engine::bench::gpu::{Wanted, run};

fn main() -> anyhow::Result<()> {
    run(&Wanted::read(BenchArgs::of_process())?, &mut |line| println!("{line}"))
}
