//! Tensor arithmetic: a row has the same bits in every batch and chunk, in prefill and in decode,
//! behind a shared prefix, before and after preemption; and it is near the portable one.

use crate::answers::Catalogue;
use crate::common::{options, tiny_config, write_checkpoint};
use crate::engine::{model_by, outputs, requests};
use crate::families::Sequence;
use crate::{Counter, count, golden, is_same};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use targon_engine::clock::Clock;
use targon_engine::engine::{Engine, Options};
use targon_engine::models::Identity;
use targon_engine::models::arithmetic::Arithmetic;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::cuda::{Card, CudaPass, CudaWeights};
use targon_engine::models::device::Device;
use targon_engine::models::pass::{Batch, Pass, RowAsk, RowResult, blocks_of};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

/// Tokens of every sequence.
const TOKENS: usize = 100;
/// How far hidden rows of the two arithmetics are apart, root mean square to root mean square: what
/// sums in another order move, after rounding to 16 bits in every layer.
const ERROR_MAX: f64 = 0.02;

/// A model on the card, and passes of it.
struct Subject {
    weights: Arc<CudaWeights>,
    pool: Pool,
    vocab: usize,
    hidden: usize,
    dtype: Dtype,
}

impl Subject {
    fn new(path: &Path, dtype: Dtype) -> Self {
        let pool = Pool::new(2, Isa::best()).unwrap();
        let checkpoint = Checkpoint::open(path).unwrap();
        let spec = Arc::new(checkpoint.spec().unwrap());
        let card = Card::open(0).unwrap();
        let weights = CudaWeights::load(&card, &checkpoint, &spec, dtype, &pool, |_, _| {});
        let (vocab, hidden) = (spec.vocab, spec.hidden);
        Self { weights: Arc::new(weights.unwrap()), pool, vocab, hidden, dtype }
    }

    fn pass(&self, arithmetic: Arithmetic, blocks: usize) -> CudaPass {
        CudaPass::new(&self.weights, &self.pool, blocks).unwrap().computing(arithmetic)
    }

    /// The hidden rows of a sequence at once, as numbers.
    fn hidden(&self, arithmetic: Arithmetic, ids: &[u32]) -> Vec<f64> {
        let asks: Vec<RowAsk<'_>> =
            (0..ids.len()).map(|row| RowAsk { hidden: true, ..RowAsk::new(row, row) }).collect();
        let mut pass = self.pass(arithmetic, blocks_of(ids.len()));
        let rows = pass.step(&Batch::of(ids, 0), &asks).unwrap();
        let bits = rows.into_iter().flat_map(|row| row.unwrap().hidden.unwrap());
        bits.map(|bits| f64::from(self.dtype.widen(bits))).collect()
    }
}

/// What the rows of sequences said when each was run alone and at once.
struct Alone<'a> {
    catalogue: &'a Catalogue,
    said: BTreeMap<(usize, usize), RowResult>,
}

impl<'a> Alone<'a> {
    fn new(subject: &Subject, catalogue: &'a Catalogue, sequences: &[Sequence]) -> Self {
        let mut said = BTreeMap::new();
        for (index, Sequence { ids, .. }) in sequences.iter().enumerate() {
            let mut pass = subject.pass(Arithmetic::Tensor, blocks_of(TOKENS));
            let asks: Vec<RowAsk<'_>> =
                (0..TOKENS).map(|at| catalogue.ask(at, at, at + index)).collect();
            let results = pass.step(&Batch::of(ids, 0), &asks).unwrap();
            said.extend(results.into_iter().enumerate().map(|(at, r)| ((index, at), r)));
        }
        Self { catalogue, said }
    }

    /// The next rows of some sequences in one step, which must say the same.
    fn step(
        &self,
        pass: &mut CudaPass,
        sequences: &mut [Sequence],
        rows: &[(usize, usize)],
        place: &str,
    ) -> usize {
        let (mut batch, mut asks, mut places) = (Batch::default(), Vec::new(), Vec::new());
        for (index, count) in rows {
            let Sequence { ids, at, blocks } = &mut sequences[*index];
            let placed = batch.push(&ids[*at..*at + count], *at, blocks.clone());
            for (row, at) in placed.zip(*at..) {
                asks.push(self.catalogue.ask(row, at, at + index));
                places.push((*index, at));
            }
            *at += count;
        }
        let results = pass.step(&batch, &asks).unwrap();
        for (got, key) in results.iter().zip(&places) {
            let want = &self.said[key];
            assert!(got.is_ok(), "{place}: {got:?}");
            assert!(
                is_same(got, want),
                "{place}: sequence, row {key:?} differs\n{got:?}\n{want:?}"
            );
        }
        results.len()
    }
}

fn check(family: &str) {
    let mut apart = 0.0;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let subject = Subject::new(&golden(family), dtype);
        let vocab = subject.vocab;
        let mut s = vec![
            Sequence::new(0, vocab, vec![5, 3, 9, 11]),
            Sequence::new(1, vocab, vec![0, 60, 61, 62]),
            Sequence::new(2, vocab, vec![7, 63, 64, 65]),
        ];
        for seed in 3..16 {
            let own = (0..3).map(|i| 70 + 3 * seed as u32 + i).collect();
            let fork = s[0].fork(seed, vocab, own);
            s.push(fork);
        }
        let catalogue = Catalogue::new(vocab, subject.hidden, 11);
        let alone = Alone::new(&subject, &catalogue, &s);
        let mut pass = subject.pass(Arithmetic::Tensor, 128);
        let mut compared = 0;
        let mut go = |rows: &[(usize, usize)]| {
            let place = format!("{family} {dtype} {rows:?}");
            compared += alone.step(&mut pass, &mut s, rows, &place);
        };
        // Batch 1: a chunk, then token by token. Batch 4: chunks beside decoding, a sequence that
        // shares a block. A chunk that is more than a decode kernel takes.
        go(&[(0, 40)]);
        go(&[(0, 1)]);
        go(&[(0, 1), (1, 33), (2, 1), (3, 5)]);
        go(&[(0, 1), (1, 1), (2, 1), (3, 1)]);
        go(&[(2, 3), (1, 20), (3, 2), (0, 50)]);
        // Batch 16, twelve of which share the first block.
        let all: Vec<(usize, usize)> = (0..16).map(|i| (i, 1)).collect();
        go(&all);
        go(&all);
        assert_eq!(compared, 40 + 1 + 40 + 4 + 75 + 32, "{family}");
        apart += near(&subject, &s[1].ids, &format!("{family} {dtype}"));
    }
    // Rounding to bf16 may hide it in so small a model.
    assert!(apart > 0.0, "{family}: tensor and portable rows are equal");
}

/// How far rows of the two arithmetics are from each other: not far.
fn near(subject: &Subject, ids: &[u32], place: &str) -> f64 {
    let portable = subject.hidden(Arithmetic::Portable, ids);
    let tensor = subject.hidden(Arithmetic::Tensor, ids);
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let apart = square(&mut portable.iter().zip(&tensor).map(|(p, t)| p - t));
    let error = (apart / square(&mut portable.iter().copied())).sqrt();
    println!("{place}: rows of tensor and portable are {error:.1e} apart");
    assert!(error < ERROR_MAX, "{place}: {error:e}");
    error
}

crate::common::golden_tests!(check);

#[test]
fn preemption_and_batches_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 8);
    let (model, pool) = model_by(Arithmetic::Tensor, Device::Cuda(1), dir.path());
    let identity = Identity::compute(&model, &pool).unwrap();
    let mut of_options = Vec::new();
    // Room for all but a few blocks; one sequence at a time.
    for (blocks, sequences_max) in [(9, 8), (64, 1)] {
        let options = Options { blocks, sequences_max, ..options() };
        let model = Arc::clone(&model);
        let engine = Engine::start(model, pool.clone(), options, Clock::system()).unwrap();
        let (outputs, cached) = outputs(&engine, requests(&identity, 40));
        let preemptions = engine.stats().snapshot().load.preemptions;
        assert_eq!(preemptions > 0, sequences_max == 8, "{preemptions}");
        assert!(cached > 0);
        of_options.push(outputs);
    }
    let [got, want] = &of_options[..] else { unreachable!() };
    assert_eq!(format!("{got:?}"), format!("{want:?}"));
}

#[test]
fn the_model_has_another_identity_with_the_same_calibration() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 8);
    let of = |arithmetic, device| {
        let (model, pool) = model_by(arithmetic, device, dir.path());
        Identity::compute(&model, &pool).unwrap()
    };
    let cpu = of(Arithmetic::Portable, Device::Cpu);
    // The stand-in driver's device 6 has another architecture.
    for (device, canon) in [(1, "mma-sm90-2"), (6, "mma-sm80-2")] {
        let tensor = of(Arithmetic::Tensor, Device::Cuda(device));
        assert_eq!((&*tensor.canon, tensor.model_hash), (canon, cpu.hash_under(canon)));
        assert_eq!(tensor.portable_hash(), cpu.model_hash);
        assert_ne!(tensor.model_hash, cpu.model_hash);
        assert!(tensor.fingerprint("cuda").contains(canon));
    }
    let portable = of(Arithmetic::Portable, Device::Cuda(1));
    assert_eq!((&*portable.canon, portable.model_hash), ("canon-2", cpu.model_hash));
}

#[test]
fn only_a_card_has_it() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 8);
    let (model, pool) = model_by(Arithmetic::Portable, Device::Cpu, dir.path());
    assert!(model.pass_by(Arithmetic::Tensor, &pool, 1).is_err());
    assert_eq!(model.arithmetic_of("mma-sm90-2"), None);
    let model = Arc::into_inner(model).unwrap();
    let error = model.computing(Some(Arithmetic::Tensor)).err().unwrap().to_string();
    assert!(error.contains("tensor arithmetic needs an NVIDIA card, got cpu"), "{error}");
}

#[test]
fn a_decode_step_becomes_a_graph() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 8);
    let subject = Subject::new(dir.path(), Dtype::Bf16);
    let mut pass = subject.pass(Arithmetic::Tensor, 4);
    let before = count(0, Counter::GraphLaunches);
    for at in 0..4 {
        pass.step(&Batch::of(&[7], at), &[RowAsk { hidden: true, ..RowAsk::new(0, at) }]).unwrap();
    }
    assert!(count(0, Counter::GraphLaunches) - before >= 3);
}

#[test]
fn a_context_of_three_partitions_has_the_same_bits_in_decode() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = tiny_config();
    for (key, value) in [("num_hidden_layers", 1), ("max_position_embeddings", 2048)] {
        config[key] = value.into();
    }
    write_checkpoint(dir.path(), &config, 8);
    let subject = Subject::new(dir.path(), Dtype::Bf16);
    let ids: Vec<u32> = (0..1_040).map(|i| i * i % 250).collect();
    let ask = |first: usize, at| RowAsk { hidden: true, ..RowAsk::new(at - first, at) };
    let asked: Vec<RowAsk<'_>> = (1_030..1_040).map(|at| ask(0, at)).collect();
    let mut at_once = subject.pass(Arithmetic::Tensor, blocks_of(ids.len()));
    let want = at_once.step(&Batch::of(&ids, 0), &asked).unwrap();
    let mut pass = subject.pass(Arithmetic::Tensor, blocks_of(ids.len()));
    pass.step(&Batch::of(&ids[..1_030], 0), &[]).unwrap();
    // There is room for four partitions, of which the last is not there.
    for (at, want) in (1_030..).zip(&want) {
        let got = pass.step(&Batch::of(&ids[at..=at], at), &[ask(at, at)]).unwrap();
        assert!(is_same(&got[0], want), "row {at} differs");
    }
}
