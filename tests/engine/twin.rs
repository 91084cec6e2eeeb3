//! The twin: every family in the arithmetic of a stack of 16 bits is near the canon, is something
//! else, and is as deterministic; recipes move rows further.

use crate::common;
use std::sync::Arc;
use targon_engine::models::Model;
use targon_engine::models::cpu::decoder::Decoder;
use targon_engine::models::departure::{Departure, RECIPES};
use targon_engine::models::pass::{Batch, Pass, RowAsk, blocks_of};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::ops::rounding::Rounding;

const TOKENS: usize = 70;
const TWIN: Departure =
    Departure { rounding: Rounding::Everywhere(Dtype::Bf16), cache: None, inputs: None };

fn model(family: &str, pool: &Pool) -> Model {
    let dir = common::golden(family);
    let checkpoint = targon_engine::models::checkpoint::Checkpoint::open(&dir).unwrap();
    let decoder = Arc::new(common::decoder(&checkpoint, Some(Dtype::Bf16), pool).unwrap());
    let mut model = common::tiny_model(1, pool);
    (model.spec, model.dtype) = (Arc::clone(&decoder.spec), Dtype::Bf16);
    model.checkpoint = checkpoint;
    model.weights = targon_engine::models::model::DeviceWeights::Cpu(decoder);
    model
}

/// Every hidden row of a sequence that is run in chunks of `chunk`.
fn rows(mut pass: Box<dyn Pass>, chunk: usize) -> Vec<Vec<u16>> {
    let mut noise = common::Noise(1);
    let ids: Vec<u32> = (0..TOKENS).map(|_| noise.below(64) as u32).collect();
    let mut rows = Vec::new();
    for (index, part) in ids.chunks(chunk).enumerate() {
        let ask = |row| RowAsk { hidden: true, ..RowAsk::new(row, row) };
        let asks: Vec<RowAsk<'_>> = (0..part.len()).map(ask).collect();
        let reports = pass.step(&Batch::of(part, index * chunk), &asks).unwrap();
        rows.extend(reports.into_iter().map(|report| report.unwrap().hidden.unwrap()));
    }
    rows
}

/// Root mean square of the difference, in units of the rows' own.
fn distance(a: &[Vec<u16>], b: &[Vec<u16>]) -> f64 {
    let widen = |bits: &u16| f64::from(Dtype::Bf16.widen(*bits));
    let squares = |rows: &[Vec<u16>]| rows.iter().flatten().map(|x| widen(x).powi(2)).sum::<f64>();
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    let apart: f64 = pairs.map(|(x, y)| (widen(x) - widen(y)).powi(2)).sum();
    (apart / squares(a)).sqrt()
}

#[test]
fn every_family_has_a_twin_near_it_whose_bits_depend_on_nothing_else() {
    for family in common::FAMILIES {
        let pools = [Pool::new(1, Isa::best()).unwrap(), Pool::new(2, Isa::SCALAR).unwrap()];
        let pass = |departure: Departure, pool: &Pool| {
            let model = model(family, pool);
            let decoder = Arc::clone(model.weights.cpu().unwrap());
            Model::departing(&decoder, departure, (pool, blocks_of(TOKENS))).unwrap()
        };
        let canon = rows(pass(Departure::default(), &pools[0]), TOKENS);
        let own = model(family, &pools[0]).pass(&pools[0], blocks_of(TOKENS)).unwrap();
        assert_eq!(canon, rows(own, TOKENS), "{family}: nothing departs by default");
        let twin = rows(pass(TWIN, &pools[0]), TOKENS);
        for (pool, chunk) in [(&pools[0], 1), (&pools[0], 33), (&pools[1], TOKENS)] {
            assert_eq!(twin, rows(pass(TWIN, pool), chunk), "{family}, chunks of {chunk}");
        }
        let apart = distance(&canon, &twin);
        // A token that is routed to another expert moves far.
        let most = if family.contains("mix") || family.contains("moe") { 0.5 } else { 0.05 };
        assert!((0.000_5..most).contains(&apart), "{family}: {apart}");
    }
}

#[test]
fn recipes_move_rows_and_leave_what_they_do_not_name() {
    let pool = Pool::new(2, Isa::best()).unwrap();
    for family in ["llama", "gemma2", "mixtral", "phi3"] {
        let model = model(family, &pool);
        let own = model.weights.cpu().unwrap();
        let run = |decoder: &Arc<Decoder>, departure: Departure| {
            rows(Model::departing(decoder, departure, (&pool, blocks_of(TOKENS))).unwrap(), TOKENS)
        };
        let canon = run(own, Departure::default());
        let mut seen = vec![canon.clone()];
        for recipe in RECIPES {
            let decoder = model.coarse(&recipe, &pool).unwrap();
            assert_eq!(Arc::ptr_eq(&decoder, own), recipe.weights.is_none(), "{}", recipe.name);
            let moved = run(&decoder, recipe.departure);
            let apart = distance(&canon, &moved);
            assert!(apart > 0.0 && apart < 1.5, "{family}, {}: {apart}", recipe.name);
            // Groups wider than a row are whole rows.
            let is_new = !seen.contains(&moved) || recipe.name.contains("128");
            assert!(is_new || recipe.name.contains("per channel"), "{family}, {}", recipe.name);
            seen.push(moved);
        }
    }
}
