//! The numeric canon: a row's bits depend on the tokens before it and the weights, and on nothing
//! else. Every family is run in every arrangement and on every instruction set of this machine, and
//! hidden rows and logits must agree bit for bit.

use crate::common::{self, FAMILIES};
use std::sync::Arc;
use targon_engine::engine::output::Step;
use targon_engine::engine::request::Request;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::cpu::CpuPass;
use targon_engine::models::cpu::decoder::Decoder;
use targon_engine::models::pass::{Batch, Pass, RowAsk, RowReport, blocks_of};
use targon_engine::models::sampler::Sampling;
use targon_engine::ops::attention::PARTITION_TOKENS;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

const TOKENS: usize = 70;

/// Bits of a hidden row and of its logits.
type RowBits = (Vec<u16>, Vec<u32>);

struct Bench {
    pool: Pool,
    decoder: Arc<Decoder>,
}

impl Bench {
    fn new(family: &str, isa: Isa, threads: usize) -> Self {
        let dir = common::golden(family);
        let pool = Pool::new(threads, isa).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let decoder = common::decoder(&checkpoint, None, &pool).unwrap();
        Self { pool, decoder: Arc::new(decoder) }
    }

    /// Runs `sequences` side by side; sequence s is cut into the chunks `cuts[s]`, one chunk of
    /// every sequence in each step. Returns every row of every sequence.
    fn run(&self, sequences: &[Vec<u32>], cuts: &[Vec<usize>]) -> Vec<Vec<RowBits>> {
        let longest = sequences.iter().map(Vec::len).max().unwrap();
        let blocks_each = blocks_of(longest);
        let mut pass =
            CpuPass::new(&self.decoder, &self.pool, blocks_each * sequences.len()).unwrap();
        let mut rows: Vec<Vec<RowBits>> = vec![Vec::new(); sequences.len()];
        for step in 0..cuts.iter().map(Vec::len).max().unwrap() {
            let (mut batch, mut owners) = (Batch::default(), Vec::new());
            for (s, sequence) in sequences.iter().enumerate() {
                let Some(count) = cuts[s].get(step) else { continue };
                let start: usize = cuts[s][..step].iter().sum();
                // Blocks of different sequences interleave, so that an index error would show.
                let blocks = (0..blocks_each).map(|b| (b * sequences.len() + s) as u32).collect();
                let range = batch.push(&sequence[start..start + count], start, blocks);
                owners.extend(range.map(|_| s));
            }
            let ask = |row| RowAsk { hidden: true, logits: true, ..RowAsk::new(row, 0) };
            let asks: Vec<RowAsk<'_>> = (0..owners.len()).map(ask).collect();
            let reports = pass.step(&batch, &asks).unwrap();
            for (report, owner) in reports.into_iter().zip(owners) {
                let RowReport { hidden, logits, .. } = report.unwrap();
                let bits = logits.unwrap().iter().map(|x| x.to_bits()).collect();
                rows[owner].push((hidden.unwrap(), bits));
            }
        }
        rows
    }
}

fn sequence(seed: u32) -> Vec<u32> {
    tokens(seed, TOKENS)
}

fn tokens(seed: u32, count: usize) -> Vec<u32> {
    let mut noise = common::Noise(seed);
    (0..count).map(|_| noise.below(64) as u32).collect()
}

/// Chunks that add up to [`TOKENS`].
fn cuts(size: usize) -> Vec<usize> {
    let mut cuts = vec![size; TOKENS / size];
    cuts.extend((!TOKENS.is_multiple_of(size)).then_some(TOKENS % size));
    cuts
}

fn check_family(family: &str) {
    let subject = sequence(1);
    let whole = [cuts(TOKENS)];
    let reference = Bench::new(family, Isa::SCALAR, 1).run(std::slice::from_ref(&subject), &whole);
    for isa in Isa::available() {
        for threads in [1, 2] {
            let bench = Bench::new(family, isa, threads);
            for chunk in [TOKENS, 1, 33] {
                for batch in [1, 4, 16] {
                    let slow = isa == Isa::SCALAR && batch * TOKENS / chunk > 100;
                    if slow || (threads == 1 && batch != 4) {
                        continue; // time; the kernels are the same code
                    }
                    let others = (1..batch).map(|s| sequence(s as u32 + 10));
                    let sequences: Vec<_> = [subject.clone()].into_iter().chain(others).collect();
                    // Neighbours are cut differently, so prefill and decode rows share steps.
                    let chunks: Vec<_> =
                        (0..batch).map(|s| cuts([chunk, 5, 64, 1][s % 4])).collect();
                    let rows = bench.run(&sequences, &chunks);
                    let place =
                        format!("{family} {isa} threads {threads} chunk {chunk} batch {batch}");
                    assert!(rows[0] == reference[0], "{place}");
                }
            }
        }
    }
}

macro_rules! families {
    ($($name:ident $index:literal;)*) => {
        $(#[test] fn $name() { check_family(FAMILIES[$index]); })*
    };
}

families! {
    llama 0; llama_linear 1; mistral 2; qwen2 3; qwen3 4; gemma2 5; phi3_in_f16 6; mixtral 7;
    qwen3_moe 8;
}

/// A context of more than one partition: rows decoded alone have it split over threads, rows of a
/// prompt do not, and chunks end before, at and behind the border of the partitions.
#[test]
fn partitions_change_no_bit() {
    const LONG: usize = PARTITION_TOKENS + 20;
    let subject = [tokens(3, LONG)];
    let whole = vec![LONG];
    let reference = Bench::new("llama", Isa::SCALAR, 1).run(&subject, std::slice::from_ref(&whole));
    let singles = |from: usize| [vec![from], vec![1; LONG - from]].concat();
    let cuts = [
        whole,
        singles(PARTITION_TOKENS - 3),
        vec![PARTITION_TOKENS, 20],
        vec![PARTITION_TOKENS - 1, 2, 19],
        vec![17, PARTITION_TOKENS, 3],
    ];
    for isa in Isa::available() {
        for threads in [1, 5] {
            let bench = Bench::new("llama", isa, threads);
            for cuts in &cuts {
                if isa == Isa::SCALAR && (threads == 1 || cuts.len() > 3) {
                    continue; // time; the kernels are the same code
                }
                let rows = bench.run(&subject, std::slice::from_ref(cuts));
                assert!(rows == reference, "{isa} threads {threads} {cuts:?}");
            }
        }
    }
}

/// The control of this file: rows that do depend on the order are told apart. Two products that
/// differ in their order of additions alone give other bits on a golden checkpoint's own rows.
#[test]
fn another_order_of_additions_shows() {
    let bench = Bench::new("llama", Isa::best(), 1);
    let rows = bench.run(&[sequence(1)], &[cuts(TOKENS)]);
    let head = bench.decoder.weights.head();
    let (mut weights, widen) = (vec![0.0; head.cols()], |b: &u16| bench.decoder.dtype.widen(*b));
    let (mut canon, mut other) = (0, 0);
    for (hidden, logits) in &rows[0] {
        let hidden: Vec<f32> = hidden.iter().map(widen).collect();
        for (row, logit) in logits.iter().enumerate() {
            head.row_into(row, &mut weights);
            let chain = |k: &[usize], from: f32| {
                k.iter().fold(from, |sum, k| weights[*k].mul_add(hidden[*k], sum))
            };
            let blocks = (0..hidden.len()).collect::<Vec<_>>();
            let sum = blocks.chunks(32).fold(0.0, |sum, block| {
                let of = |odd| block.iter().copied().filter(move |k| k % 2 == odd);
                let [even, odd] = [0, 1].map(|odd| chain(&of(odd).collect::<Vec<_>>(), 0.0));
                sum + (even + odd)
            });
            canon += usize::from(sum.to_bits() == *logit);
            other += usize::from(chain(&blocks, 0.0).to_bits() == *logit);
        }
    }
    let count = rows[0].len() * head.rows();
    assert_eq!(canon, count, "the canon by its text");
    assert!(other < count * 9 / 10, "one chain in ascending order gave {other} of {count}");
}

/// Tokens and the bits of their log-probabilities.
fn outcome(steps: &[Step]) -> Vec<(u32, u64, u32)> {
    steps.iter().map(|s| (s.token, s.logprob.to_bits(), s.rank)).collect()
}

fn request(seed: u32, prompt: usize, output: usize) -> Request {
    let mut noise = common::Noise(seed);
    let prompt = (0..prompt).map(|_| noise.below(256) as u32).collect();
    let mut request = Request::greedy(prompt, output);
    request.stop.ignore_eos = true;
    request.sampling =
        Sampling { temperature: 1.0, noise_key: u64::from(seed), ..Sampling::greedy() };
    request
}

#[test]
fn a_prefix_hit_changes_no_bit() {
    let engine = common::tiny_engine(5, common::options());
    let run = |reads_cache: bool| {
        let mut request = request(9, 150, 20);
        request.reads_cache = reads_cache;
        engine.submit(request).unwrap().collect_blocking().unwrap()
    };
    let (cold, warm, bypassed) = (run(true), run(true), run(false));
    assert_eq!([&cold, &warm, &bypassed].map(|ended| ended.finish.cached_tokens), [0, 128, 0]);
    assert_eq!(outcome(&cold.steps), outcome(&warm.steps));
    assert_eq!(outcome(&cold.steps), outcome(&bypassed.steps));
}

#[test]
fn neighbours_and_preemption_change_no_bit() {
    let alone: Vec<_> = (0..12)
        .map(|i| {
            let engine = common::tiny_engine(5, common::options());
            let steps = engine
                .submit(request(i, 40 + 9 * i as usize, 60))
                .unwrap()
                .collect_blocking()
                .unwrap()
                .steps;
            outcome(&steps)
        })
        .collect();
    // A cache far too small for all of them at once.
    let tight = targon_engine::engine::Options { blocks: 14, ..common::options() };
    let engine = common::tiny_engine(5, tight);
    let running: Vec<_> =
        (0..12).map(|i| engine.submit(request(i, 40 + 9 * i as usize, 60)).unwrap()).collect();
    let together: Vec<_> =
        running.into_iter().map(|g| outcome(&g.collect_blocking().unwrap().steps)).collect();
    assert_eq!(alone, together);
    let load = || engine.stats().snapshot().load;
    assert!(load().preemptions > 0, "the cache was not tight enough to test preemption");
    // The last token is sent a moment before its sequence is removed.
    let freed = (0..500).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        load().blocks_used == 0
    });
    assert!(freed, "blocks leak: {:?}", load());
}
