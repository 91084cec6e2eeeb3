//! `cargo bench --features cuda --bench gpu -- [--dry] [--device N] [--seconds S] [--model PATH]`:
//! an NVIDIA card against the CPU's bits, then its speed. `scripts/check-gpu` runs it.

use std::path::Path;
use targon_engine::bench::gpu::{Wanted, run};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let value = |flag: &str| {
        let at = args.iter().position(|a| a == flag)?;
        Some(args.get(at + 1).unwrap_or_else(|| panic!("{flag} needs a value")))
    };
    let number = |flag: &str, otherwise: u64| {
        value(flag).map_or(otherwise, |v| v.parse().expect("a whole number"))
    };
    let wanted = Wanted {
        device: number("--device", 0) as usize,
        is_dry: args.iter().any(|a| a == "--dry"),
        seconds: number("--seconds", 540),
        model: value("--model").map(Path::new),
    };
    run(&wanted, &mut |line| println!("{line}"))
}
