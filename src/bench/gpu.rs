//! Measures an NVIDIA card: whether its bits equal the CPU's, and how fast it is.
//!
//! The most important measurements come first, and every line is reported as soon as it is known,
//! so that an interrupted run has reported what it measured. Weights are filled with noise, so
//! nothing is downloaded.

mod asked;
mod attention;
mod ceilings;
mod draws;
mod invariance;
mod mixture;
mod products;
mod rows;
mod runner;

use self::asked::{is_same, prover, samplings};
pub(super) use self::ceilings::CardCeilings;
use self::runner::KernelRunner;
use super::arguments::BenchArgs;
use super::host::{self, Say};
use super::verify::write_model;
use crate::clock::Clock;
use crate::files::ScratchDirectory;
use crate::models::arithmetic::Arithmetic;
use crate::models::checkpoint::Checkpoint;
use crate::models::config;
use crate::models::cpu::CpuPass;
use crate::models::cpu::decoder::Decoder;
use crate::models::cuda::{Card, CudaError, CudaPass, CudaWeights, Sizes, cards};
use crate::models::pass::{Batch, Pass, RowAsk, Scores, Token, blocks_of};
use crate::models::sampler::Sampling;
use crate::models::spec::Spec;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use anyhow::{anyhow, bail, ensure};
use serde_json::json;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Rows of a prefill step that is timed.
const PREFILL_ROWS: usize = 512;
/// Positions behind which decoding is timed.
const CONTEXT: usize = 1024;
/// Seconds after which nothing more is begun, where no others are asked for.
const SECONDS: u64 = 540;
/// Seconds that a figure is measured for, at most.
const SECONDS_EACH: f64 = 4.0;

/// The card and the shape that are measured.
pub struct Wanted {
    /// The card's number.
    pub device: usize,
    /// Tiny shapes: shows that the measurement itself works.
    pub is_dry: bool,
    /// Seconds after which nothing more is begun.
    pub seconds: u64,
    /// A checkpoint whose bits are compared as well.
    pub model: Option<PathBuf>,
    /// The parts that are measured, in the order of [`Part`]; all where none is named.
    parts: Vec<Part>,
    /// Layers of the shapes, where not all are wanted: for a profiler.
    layers: Option<NonZeroUsize>,
    /// Runs of each figure, where fewer are wanted: for a profiler too.
    runs: NonZeroUsize,
}

/// A part of the measurement.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Kernels for products, one by one.
    Products,
    /// All other kernels.
    Kernels,
    /// Whole answers beside the CPU's.
    Answers,
    /// Rows however they are computed.
    Rows,
    /// The most that the card does.
    Ceilings,
    /// Prefill and decode.
    Speeds,
}

impl FromStr for Part {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        Ok(match text {
            "products" => Self::Products,
            "kernels" => Self::Kernels,
            "answers" => Self::Answers,
            "rows" => Self::Rows,
            "ceilings" => Self::Ceilings,
            "speeds" => Self::Speeds,
            _ => bail!("must be products, kernels, answers, rows, ceilings or speeds"),
        })
    }
}

impl Wanted {
    /// Reads the arguments of `cargo bench --bench gpu`.
    ///
    /// # Errors
    /// A flag whose value cannot be read.
    pub fn read(mut args: BenchArgs) -> anyhow::Result<Self> {
        let number = args.value::<usize>("--device")?;
        let only = args.value::<String>("--only")?;
        let parse = |part: &str| part.parse().map_err(|e| anyhow!("--only {e}, got {part}"));
        Ok(Self {
            parts: only
                .iter()
                .flat_map(|parts| parts.split(','))
                .map(parse)
                .collect::<Result<_, _>>()?,
            layers: args.value("--layers")?,
            runs: args.value("--runs")?.unwrap_or(NonZeroUsize::MAX),
            device: number.unwrap_or(0),
            is_dry: args.has("--dry"),
            seconds: args.value("--seconds")?.unwrap_or(SECONDS),
            model: args.value("--model")?,
        })
    }

    fn has(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }
}

/// Compares and measures; without a card or a driver it says so and does nothing.
///
/// # Errors
/// When the driver does not work or is too old, or the card computes other bits than the CPU, or
/// fails.
pub fn run(wanted: &Wanted, say: Say<'_>) -> anyhow::Result<()> {
    let why = match cards() {
        Ok(0) => Some("no NVIDIA card".to_owned()),
        Err(why @ CudaError::NoDriver) => Some(why.to_string()),
        Err(why) => return Err(why.into()),
        Ok(_) => None,
    };
    if let Some(why) = why {
        say(format!("{why}: nothing was measured"));
        return Ok(());
    }
    let (card, clock, pool) = (Card::open(wanted.device)?, Clock::system(), host::pool()?);
    let (free, total) = card.memory()?;
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    say(format!("{}: {:.1} of {:.1} GiB free", card.name(), gib(free), gib(total)));
    compare_bits(&card, &pool, wanted, say)?;
    if wanted.has(Part::Ceilings) {
        ceilings(&card, &pool, wanted.is_dry, say)?;
    }
    if !wanted.has(Part::Speeds) {
        return Ok(());
    }
    for (name, spec) in shapes(wanted.is_dry)? {
        let spec = match wanted.layers {
            Some(layers) => first_layers(spec, layers.get()),
            None => spec,
        };
        if clock.elapsed() > Duration::from_secs(wanted.seconds) {
            say(format!("{name}: left out, the time is over"));
            continue;
        }
        speeds(&card, (&clock, &pool, wanted.runs.get()), (name, &Arc::new(spec)), say)?;
    }
    Ok(())
}

/// All comparisons of bits that are wanted.
fn compare_bits(
    card: &Arc<Card>,
    pool: &Pool,
    wanted: &Wanted,
    say: Say<'_>,
) -> anyhow::Result<()> {
    let is_dry = wanted.is_dry;
    let matrices: &[(usize, usize)] = match is_dry {
        true => &[(70, 1_096)],
        false => &[(1_000, 2_048), (1_024, 14_336)],
    };
    if wanted.has(Part::Products) {
        products::compare(card, pool, matrices, say)?;
    }
    if wanted.has(Part::Kernels) {
        kernels(card, pool, is_dry, say)?;
    }
    if wanted.has(Part::Answers) {
        equal(card, pool, wanted, say)?;
    }
    let Some((_, spec)) = shapes(is_dry)?.into_iter().next() else { return Ok(()) };
    // Long enough for the kernels of a prefill.
    let tokens = if is_dry { 75 } else { 300 };
    for dtype in [Dtype::Bf16, Dtype::F16] {
        if wanted.has(Part::Rows) {
            let weights = CudaWeights::noise(card, &Arc::new(spec.clone()), dtype)?;
            invariance::compare(&Arc::new(weights), pool, tokens, say)?;
        }
    }
    Ok(())
}

/// A shape cut to its first layers.
fn first_layers(spec: Spec, layers: usize) -> Spec {
    let layers = layers.min(spec.layers);
    let mut attention = spec.attention.clone();
    attention.windows.truncate(layers);
    Spec { layers, attention, ..spec }
}

fn shapes(is_dry: bool) -> anyhow::Result<Vec<(&'static str, Spec)>> {
    let shape = |vocab: usize, hidden: usize, layers: usize, heads: usize, inter: usize| {
        let json = json!({
            "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": (heads / 4).clamp(1, 8), "intermediate_size": inter,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": hidden < 4096,
        });
        config::parse(Path::new("config.json"), &json)
    };
    Ok(match is_dry {
        true => vec![("tiny", shape(300, 64, 1, 4, 96)?)],
        false => vec![
            ("1B", shape(128_256, 2048, 16, 32, 8192)?),
            ("8B", shape(128_256, 4096, 32, 32, 14_336)?),
        ],
    })
}

/// The kernels that are not products, one by one.
fn kernels(card: &Arc<Card>, pool: &Pool, is_dry: bool, say: Say<'_>) -> anyhow::Result<()> {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let runner = KernelRunner::new(card, pool, dtype)?;
        // Columns, positions before some rows, tokens of the vocabulary.
        let (cols, [start, rows], vocab) = match is_dry {
            true => (200, [520, 3], 1_500),
            false => (4_096, [1_100, 40], 128_256),
        };
        let mut results = rows::compare(&runner, cols)?;
        results.extend(attention::compare(&runner, (start, rows))?);
        results.extend(draws::compare(&runner, vocab, cols)?);
        results.extend(mixture::compare(&runner, cols)?);
        for (kernel, count) in results {
            say(format!("{kernel} in {dtype}: {count} of {count} results are what they must be"));
        }
    }
    Ok(())
}

/// Answers of both devices, for a model of noise in both types and for the one that was given.
fn equal(card: &Arc<Card>, pool: &Pool, wanted: &Wanted, say: Say<'_>) -> anyhow::Result<()> {
    let scratch = ScratchDirectory::new("targon-gpu")?;
    write_model(scratch.path(), 131_072)?;
    let rows = if wanted.is_dry { 9 } else { 300 };
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let count = compare(card, pool, scratch.path(), Some(dtype), rows)?;
        say(format!("noise in {dtype}: {count} of {count} answers have the CPU's bits"));
    }
    if let Some(path) = &wanted.model {
        let count = compare(card, pool, path, None, 64)?;
        say(format!("{}: {count} of {count} answers have the CPU's bits", path.display()));
    }
    Ok(())
}

/// A prompt, then eight tokens one by one, on both devices; how many answers were equal.
fn compare(
    card: &Arc<Card>,
    pool: &Pool,
    path: &Path,
    dtype: Option<Dtype>,
    rows: usize,
) -> anyhow::Result<usize> {
    let checkpoint = Checkpoint::open(path)?;
    let spec = Arc::new(checkpoint.spec()?);
    let dtype = dtype.map_or_else(|| checkpoint.dtype(&spec), Ok)?;
    let decoder = Arc::new(Decoder::load(&checkpoint, &spec, dtype, pool, |_, _| {})?);
    let weights = CudaWeights::load(card, &checkpoint, &spec, dtype, pool, |_, _| {})?;
    let blocks = blocks_of(rows + 8);
    let mut on_card = CudaPass::new(&Arc::new(weights), pool, blocks)?;
    let mut on_cpu = CpuPass::new(&decoder, pool, blocks)?;
    let ids: Vec<u32> = (0..rows + 8).map(|i| (i * i * 31 + i * 7) as u32 % 1000).collect();
    let prover = prover(&spec);
    let samplings = samplings();
    let mut compared = 0;
    let steps = std::iter::once(0..rows).chain((rows..rows + 8).map(|at| at..at + 1));
    for range in steps {
        let batch = Batch::of(&ids[range.clone()], range.start);
        let asks: Vec<RowAsk<'_>> = range
            .clone()
            .rev()
            .take(8)
            .map(|position| RowAsk {
                hidden: true,
                prover: Some(&prover),
                scores: Some(Scores {
                    top: 5,
                    ..Scores::new(Token::Drawn, &samplings[position % 3])
                }),
                ..RowAsk::new(position - range.start, position)
            })
            .collect();
        let (got, want) = (on_card.step(&batch, &asks)?, on_cpu.step(&batch, &asks)?);
        let differ = got.iter().zip(&want).position(|(got, want)| !is_same(got, want));
        ensure!(
            differ.is_none() && got.len() == want.len(),
            "rows {range:?} of {} in {dtype} have other bits than the CPU's:\n{:?}\n{:?}",
            path.display(),
            got[differ.unwrap_or(0)],
            want[differ.unwrap_or(0)],
        );
        compared += got.len();
    }
    Ok(compared)
}

/// The most that the card does.
fn ceilings(card: &Arc<Card>, pool: &Pool, is_dry: bool, say: Say<'_>) -> anyhow::Result<()> {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let all = CardCeilings::new(card, pool, dtype, is_dry)?;
        if dtype == Dtype::Bf16 {
            say(format!("ceiling of reading: {:.0} GB/s", all.read_bandwidth()? / 1e9));
            let peak = all.peak(Arithmetic::Portable)? / 1e12;
            say(format!("ceiling of multiply-adds: {peak:.1} TFLOP/s in f32"));
        }
        let peak = all.peak(Arithmetic::Tensor)? / 1e12;
        say(format!("ceiling of mma.sync in {dtype}: {peak:.1} TFLOP/s"));
    }
    Ok(())
}

/// Seconds of the fastest of some runs, after one that does not count.
fn fastest(
    clock: &Clock,
    runs: usize,
    mut work: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    work()?;
    let begun = clock.elapsed();
    let mut least = f64::INFINITY;
    for _ in 0..runs {
        let started = clock.elapsed();
        work()?;
        least = least.min((clock.elapsed() - started).as_secs_f64());
        if (clock.elapsed() - begun).as_secs_f64() > SECONDS_EACH {
            break;
        }
    }
    Ok(least)
}

/// Prefill and decode of one shape in bf16, in both arithmetics.
fn speeds(
    card: &Arc<Card>,
    (clock, pool, runs): (&Clock, &Pool, usize),
    (name, spec): (&str, &Arc<Spec>),
    say: Say<'_>,
) -> anyhow::Result<()> {
    let sizes = Sizes::new(spec, PREFILL_ROWS);
    let per_sequence = blocks_of(CONTEXT + 64);
    let is_tiny = spec.layers == 1;
    let batches = if is_tiny { vec![1, 2] } else { vec![1, 8, 64] };
    let most = batches.last().copied().unwrap_or(1);
    let needed = sizes.held + sizes.workspace + sizes.block * (per_sequence * most) as u64;
    let free = card.memory()?.0 as u64;
    if needed > free {
        say(format!("{name}: left out, {needed} bytes are needed and {free} are free"));
        return Ok(());
    }
    let weights = Arc::new(CudaWeights::noise(card, spec, Dtype::Bf16)?);
    for arithmetic in [Arithmetic::Tensor, Arithmetic::Portable] {
        let pass = CudaPass::new(&weights, pool, per_sequence * most)?.computing(arithmetic);
        let name = format!("{name} {arithmetic}");
        let mut timed = Timed { pass, name, clock, spec, sizes, per_sequence, runs };
        timed.prefill(if is_tiny { 20 } else { PREFILL_ROWS }, say)?;
        for batch in &batches {
            for proves in [false, true] {
                timed.decode(*batch, if is_tiny { 40 } else { CONTEXT }, proves, say)?;
            }
        }
    }
    Ok(())
}

/// A pass that is timed.
struct Timed<'a> {
    pass: CudaPass,
    name: String,
    clock: &'a Clock,
    spec: &'a Spec,
    sizes: Sizes,
    /// KV blocks of a sequence.
    per_sequence: usize,
    /// The most runs of each figure.
    runs: usize,
}

impl Timed<'_> {
    fn prefill(&mut self, rows: usize, say: Say<'_>) -> anyhow::Result<()> {
        let ids: Vec<u32> = (0..rows as u32).collect();
        let greedy = Sampling::greedy();
        let pass = &mut self.pass;
        let seconds = fastest(self.clock, self.runs.min(5), || {
            let ask = ask(rows - 1, rows - 1, &greedy);
            pass.step(&Batch::of(&ids, 0), &[ask]).map(drop).map_err(Into::into)
        })?;
        let parameters = self.sizes.weights as f64 / 2.0;
        say(format!(
            "{} prefill of {rows}: {:.0} tokens/s, {:.1} TFLOP/s",
            self.name,
            rows as f64 / seconds,
            2.0 * parameters * rows as f64 / seconds / 1e12
        ));
        Ok(())
    }

    fn decode(
        &mut self,
        batch: usize,
        context: usize,
        proves: bool,
        say: Say<'_>,
    ) -> anyhow::Result<()> {
        let Self { pass, per_sequence, runs, .. } = self;
        let (greedy, prover) = (Sampling::greedy(), prover(self.spec));
        let mut at = context;
        let seconds = fastest(self.clock, (*runs).min(30), || {
            let mut rows = Batch::default();
            for sequence in 0..batch {
                let first = sequence * *per_sequence;
                let blocks = (first..first + *per_sequence).map(|b| b as u32).collect();
                rows.push(&[sequence as u32], at, blocks);
            }
            let prover = proves.then_some(&prover);
            let asks: Vec<RowAsk<'_>> =
                (0..batch).map(|row| RowAsk { prover, ..ask(row, at, &greedy) }).collect();
            at += 1;
            pass.step(&rows, &asks).map(drop).map_err(Into::into)
        })?;
        let kv = self.sizes.block as f64 * (batch * context) as f64 / 32.0;
        say(format!(
            "{} decode of {batch} after {context}{}: {:.0} tokens/s, {:.0} GB/s",
            self.name,
            if proves { ", proved" } else { "" },
            batch as f64 / seconds,
            (self.sizes.weights as f64 + kv) / seconds / 1e9
        ));
        Ok(())
    }
}

fn ask(row: usize, at: usize, sampling: &Sampling) -> RowAsk<'_> {
    RowAsk { scores: Some(Scores::new(Token::Drawn, sampling)), ..RowAsk::new(row, at) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_named_and_others_refused() {
        let read = |text: &str| Wanted::read(BenchArgs::of(text));
        let some = read("--only rows,speeds --layers 2 --runs 1").unwrap();
        assert!(some.has(Part::Rows) && some.has(Part::Speeds) && !some.has(Part::Products));
        assert_eq!((some.layers.map(NonZeroUsize::get), some.runs.get()), (Some(2), 1));
        let all = read("--dry").unwrap();
        assert!(all.has(Part::Products) && all.has(Part::Ceilings) && all.layers.is_none());
        for (text, want) in [("--only speed", "got speed"), ("--layers 0", "--layers")] {
            let error = read(text).err().unwrap().to_string();
            assert!(error.contains(want), "{error}");
        }
        let spec = shapes(false).unwrap().remove(0).1;
        let cut = first_layers(spec.clone(), 2);
        assert_eq!((cut.layers, cut.attention.windows.len()), (2, 2));
        assert_eq!(first_layers(spec, 1_000).layers, 16);
    }
}
