//! What a driver or a card refuses, and what breaks while a model is served.

use crate::answers::Catalogue;
use crate::common::{tiny_config, write_checkpoint};
use crate::{Pair, fail, is_same, leave};
use std::process::Command;
use std::sync::Arc;
use targon_engine::engine::plan::{KvMemory, MemoryPlan, MemoryWanted};
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::cuda::{Card, CudaError, CudaPass, CudaWeights};
use targon_engine::models::device::{Cards, Device, cards};
use targon_engine::models::pass::{Batch, Pass, PassFault, RowAsk, Scores, Token};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

const WANTED: MemoryWanted =
    MemoryWanted { context_max: None, kv_memory: KvMemory::Auto, sequences_max: 4, drafts_max: 0 };

fn pair(device: usize) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 6);
    Pair::new(dir.path(), None, device, 16)
}

#[test]
fn cards_that_cannot_be_used_are_named() {
    let why = |ordinal| Card::open(ordinal).map(drop).unwrap_err();
    assert_eq!(why(8), CudaError::NoDevice { ordinal: 8, count: 8 });
    let old = why(4);
    assert!(matches!(old, CudaError::Architecture { capability: (7, 5), .. }), "{old}");
    assert!(old.to_string().contains("stand-in T4"), "{old}");
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_and_while_it_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = tiny_config();
    config["hidden_size"] = 512.into();
    config["intermediate_size"] = 1024.into();
    write_checkpoint(dir.path(), &config, 6);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let spec = Arc::new(checkpoint.spec().unwrap());
    let device = Device::Cuda(5);
    let free = device.free_memory().unwrap().unwrap();
    assert!(free <= 1 << 20, "{free}");
    let refused = MemoryPlan::on(device, &spec, WANTED, free).unwrap_err().to_string();
    assert!(refused.contains("hold") || refused.contains("short"), "{refused}");
    let (card, pool) = (Card::open(5).unwrap(), Pool::new(2, Isa::best()).unwrap());
    let loaded = CudaWeights::load(&card, &checkpoint, &spec, Dtype::Bf16, &pool, |_, _| {});
    let why = loaded.map(drop).unwrap_err().to_string();
    assert!(why.contains("cuda:5 has no memory for weights"), "{why}");
    // What was loaded before is given back.
    assert_eq!(device.free_memory().unwrap(), Some(free));
}

#[test]
fn plans_count_what_a_card_holds() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 6);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let spec = Arc::new(checkpoint.spec().unwrap());
    let plan = MemoryPlan::on(Device::Cuda(6), &spec, WANTED, 1 << 30).unwrap();
    let pool = Pool::new(2, Isa::best()).unwrap();
    // Nobody else allocates on this card while this runs, but its own passes in other tests.
    let card = Card::open(3).unwrap();
    let weights = CudaWeights::load(&card, &checkpoint, &spec, Dtype::Bf16, &pool, |_, _| {});
    let weights = Arc::new(weights.unwrap());
    // Norms are small; none of them shares the grain of another.
    let vectors = (4 * spec.hidden).next_multiple_of(512) * (2 * spec.layers + 1);
    assert_eq!(weights.bytes(), plan.weights as usize + vectors);
    let before = card.memory().unwrap().0;
    let pass = CudaPass::new(&weights, &pool, plan.options.blocks).unwrap();
    assert_eq!(before - card.memory().unwrap().0, plan.kv as usize);
    // The largest step that the plan allows, with logits of every row.
    let mut pass = pass;
    let before = card.memory().unwrap().0;
    let rows = plan.options.step_tokens_max;
    let sampling = targon_engine::models::sampler::Sampling::greedy();
    let ask = |row: usize| RowAsk {
        scores: Some(Scores { top: 20, ..Scores::new(Token::Drawn, &sampling) }),
        ..RowAsk::new(row, row)
    };
    let asks: Vec<RowAsk<'_>> = (0..rows).map(ask).collect();
    pass.step(&Batch::of(&vec![1; rows], 0), &asks).unwrap();
    let taken = before - card.memory().unwrap().0;
    assert!(taken <= plan.workspace as usize, "{taken} of {}", plan.workspace);
    assert!(taken * 2 > plan.workspace as usize, "{taken} of {}", plan.workspace);
}

#[test]
fn a_step_that_fails_costs_itself_and_a_lost_card_its_models() {
    let (mut broken, mut beside, mut elsewhere) = (pair(2), pair(2), pair(0));
    let catalogue = Catalogue::new(broken.vocab, broken.hidden, 3);
    let ids: Vec<u32> = (0..60).collect();
    let asks: Vec<RowAsk<'_>> = (0..60).map(|row| catalogue.ask(row, row, row)).collect();
    let batch = Batch::of(&ids, 0);
    let one = |pair: &mut Pair, place: &str| pair.step(&Batch::of(&ids[..9], 0), &asks[..9], place);
    one(&mut broken, "before");
    one(&mut beside, "two models on one card");

    // A larger step needs more than there is; the smaller one goes on.
    leave(2, 1000);
    let fault = broken.card.step(&batch, &asks).unwrap_err();
    let is_full = fault.to_string().contains("cuda:2 has no memory");
    assert!(is_full && matches!(&fault, PassFault::Memory(_)), "{fault}");
    leave(2, 1 << 30);
    one(&mut broken, "after memory ran out");
    broken.step(&batch, &asks, "with memory again");

    // A launch that the driver refuses, in the layers and while rows are read.
    for kernel in ["qkv_finish", "look_up"] {
        fail(2, kernel, 0, 701);
        let fault = broken.card.step(&batch, &asks).unwrap_err();
        assert!(
            matches!(&fault, PassFault::Device(why) if why.to_string().contains(kernel)),
            "{fault}"
        );
        broken.step(&batch, &asks, "after a refused launch");
    }

    // A context that is broken stays so, for both models on the card and for nothing else.
    fail(2, "add_norm", 1, 700);
    let fault = broken.card.step(&batch, &asks).unwrap_err();
    assert!(
        matches!(&fault, PassFault::Lost(why) if why.to_string().contains("cuda:2 is lost")),
        "{fault}"
    );
    for pair in [&mut broken, &mut beside] {
        let again = pair.card.step(&Batch::of(&ids[..9], 0), &asks[..9]).unwrap_err();
        assert!(matches!(again, PassFault::Lost(_)), "{again}");
    }
    let card = Card::open(2).unwrap();
    assert!(matches!(card.memory(), Err(CudaError::Lost { .. })));
    one(&mut elsewhere, "another card");
}

#[test]
fn models_on_one_card_do_not_touch_each_other() {
    let (mut a, mut b) = (pair(0), pair(0));
    let catalogue = Catalogue::new(a.vocab, a.hidden, 5);
    let ids: Vec<u32> = (0..50).map(|i| i * 5 % 250).collect();
    let asks: Vec<RowAsk<'_>> = (0..50).map(|row| catalogue.ask(row, row, row)).collect();
    let (mine, other) = (Batch::of(&ids, 0), Batch::of(&ids[5..], 0));
    let want = a.cpu.step(&mine, &asks).unwrap();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| a.card.step(&mine, &asks).unwrap());
        let second = scope.spawn(|| b.card.step(&other, &asks[..45]).unwrap());
        let (first, second) = (first.join().unwrap(), second.join().unwrap());
        assert!(first.iter().zip(&want).all(|(g, w)| is_same(g, w)));
        let differ = second.iter().zip(&want).filter(|(g, w)| !is_same(g, w)).count();
        assert!(differ > 30, "{differ}");
    });
}

/// Runs one test of this program alone in another environment.
pub(crate) fn alone(test: &str, set: &[(&str, &str)], unset: &[&str]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).env("TARGON_TEST_ALONE", "1");
    command.envs(set.iter().copied());
    for name in unset {
        command.env_remove(name);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

pub(crate) fn is_alone() -> bool {
    std::env::var_os("TARGON_TEST_ALONE").is_some()
}

#[test]
fn without_a_driver_the_processor_computes() {
    if !is_alone() {
        return alone(
            "failures::without_a_driver_the_processor_computes",
            &[],
            &["LD_LIBRARY_PATH"],
        );
    }
    assert_eq!(Card::open(0).map(drop).unwrap_err(), CudaError::NoDriver);
    assert_eq!(Device::Auto.resolved(), Device::Cpu);
    assert!(Device::Cuda(0).free_memory().unwrap_err().to_string().contains("libcuda.so.1"));
    assert!(matches!(cards(), Cards::Unusable(why) if why.to_string().contains("libcuda.so.1")));
}

#[test]
fn an_old_driver_is_named() {
    if !is_alone() {
        return alone("failures::an_old_driver_is_named", &[("FAKE_CUDA_DRIVER", "12080")], &[]);
    }
    let why = Card::open(0).map(drop).unwrap_err();
    assert_eq!(why, CudaError::OldDriver { have: 12_080, need: 13_000 });
    assert!(why.to_string().contains("CUDA 12.8"), "{why}");
    assert_eq!(Device::Auto.resolved(), Device::Cpu);
}

#[test]
fn a_driver_without_cards_is_named() {
    if !is_alone() {
        return alone(
            "failures::a_driver_without_cards_is_named",
            &[("FAKE_CUDA_DEVICES", "0")],
            &[],
        );
    }
    let why = Card::open(0).map(drop).unwrap_err();
    assert_eq!(why, CudaError::NoDevice { ordinal: 0, count: 0 });
    assert_eq!(Device::Auto.resolved(), Device::Cpu);
}

#[test]
fn every_card_is_looked_at() {
    let Cards::Known(known) = cards() else { panic!("the driver has cards") };
    assert_eq!(known.len(), 8);
    let (device, card) = &known[0];
    let card = card.as_ref().unwrap();
    assert_eq!((*device, card.total > 0, card.free <= card.total), (Device::Cuda(0), true, true));
    // Number 4 is too old, which keeps nobody from the others.
    let why = known[4].1.as_ref().unwrap_err().to_string();
    assert!(why.contains("compute capability") && known[5].1.is_ok(), "{known:?}");
}

#[test]
fn auto_takes_the_first_card() {
    assert_eq!(Device::Auto.resolved(), Device::Cuda(0));
}
