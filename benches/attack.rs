//! The attack bench at a small size: what each scheme catches, and how long that takes to find out.
//!
//! `cargo bench --bench attack -- MODEL [PROMPTS [HONEST]]`; `targon-engine attack-bench` is the
//! same with tables, JSON and a picture.

use std::path::Path;
use std::time::Instant;
use targon_engine::bench::attack::{Bench, Options};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::verify::Limits;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let path = arguments.first().expect("usage: cargo bench --bench attack -- MODEL");
    let number = |place: usize, default: usize| {
        arguments.get(place).map_or(default, |text| text.parse().expect("a number"))
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::new(threads, Isa::best()).expect("threads start");
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (prompts, honest) = (number(1, 4), number(2, 32));
    let options = Options { prompts, honest, tokens: None, only: None };
    let started = Instant::now();
    let bench = Bench::new(Path::new(path), scratch.path(), &pool, options, Limits::default());
    let bench = bench.expect("the model loads");
    let at = |next: &str| eprintln!("{:7.1} s  {next}", started.elapsed().as_secs_f64());
    let results = bench.run(at).expect("the engines work");
    for line in &results.lines {
        let rejected = format!("{}/{}", line.rejected.count, line.rejected.of);
        println!("{:36} {:32} {rejected:>9}", line.name, line.judge);
    }
    for outcome in &results.goals {
        let met = if outcome.is_met { "met" } else { "missed" };
        println!("{met:7} {}: {}", outcome.goal, outcome.measured);
    }
    println!("{:.0} s", started.elapsed().as_secs_f64());
}
