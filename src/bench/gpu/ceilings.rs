//! Measures the most that a card can do: reading its memory, and multiply-adds of its lanes and of
//! its tensor cores. What the kernels give is compared with the host's results, so that a ceiling
//! is one of work that was done.
//!
//! Tensor cores are driven by `mma.sync`, as the engine's kernels drive them; the larger
//! instructions of newer architectures do more. They multiply ones, and real weights draw more
//! power: a card at its power limit reaches less.

use super::runner::{KernelRunner, same};
use crate::clock::Clock;
use crate::models::arithmetic::Arithmetic;
use crate::models::cuda::Card;
use crate::models::cuda::launch::{Arg, Memory, args};
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use anyhow::ensure;
use std::sync::Arc;

/// Threads of a block.
const THREADS: usize = 256;
/// Chains of multiply-adds in a thread.
const CHAINS: usize = 16;
/// Tiles of sums in a warp, and the operations on one in a round: 16 x 8 sums over 16 products.
const TILES: usize = 8;
const TILE_OPERATIONS: usize = 2 * 16 * 8 * 16;
/// Factor and term of a multiply-add.
const STEP: (f32, f32) = (0.999, 0.001);
/// Bytes that are read: more than the largest cache of a card has.
const READ_BYTES: usize = 2 << 30;
/// The share of free memory that may be taken for that.
const FREE_SHARE: f64 = 0.5;
/// Rounds of the first run; no more than `ROUNDS_MAX`, up to which sums of ones are exact.
const ROUNDS: usize = 20;
const ROUNDS_MAX: usize = 1 << 19;
/// Seconds that a run of multiply-adds should last at least.
const RUN_SECONDS: f64 = 0.1;
/// Runs of which the fastest counts.
const RUNS: usize = 3;

/// A card whose ceilings are measured.
pub(crate) struct CardCeilings<'a> {
    runner: KernelRunner<'a>,
    card: Arc<Card>,
    blocks: usize,
    read_bytes: usize,
    clock: Clock,
}

impl<'a> CardCeilings<'a> {
    /// For products of values of `dtype`. A dry run is small: it shows that the kernels work.
    ///
    /// # Errors
    /// When the card fails.
    pub(crate) fn new(
        card: &Arc<Card>,
        pool: &'a Pool,
        dtype: Dtype,
        is_dry: bool,
    ) -> anyhow::Result<Self> {
        let (blocks, read_bytes) = match is_dry {
            true => (2, 1 << 16),
            false => {
                let room = (card.memory()?.0 as f64 * FREE_SHARE) as usize;
                // As many as all multiprocessors hold at once: 8 each on some cards, 6 on others.
                let each = (card.multiprocessor_threads()? / THREADS).max(1);
                (each * card.multiprocessors()?, READ_BYTES.min(room))
            }
        };
        let (runner, clock) = (KernelRunner::new(card, pool, dtype)?, Clock::system());
        Ok(Self { runner, card: Arc::clone(card), blocks, read_bytes, clock })
    }

    fn threads(&self) -> usize {
        THREADS * self.blocks
    }

    fn launch(&self, kernel: &'static str, args: &[Arg]) -> anyhow::Result<f64> {
        let started = self.clock.elapsed();
        self.runner.launch(kernel, [self.blocks, 1, 1], (THREADS as u32, 0), args)?;
        Ok((self.clock.elapsed() - started).as_secs_f64())
    }

    /// Seconds of the fastest run of `kernel` over so many rounds that one lasts, and these rounds.
    fn rounds(&self, run: impl Fn(usize) -> anyhow::Result<f64>) -> anyhow::Result<(f64, usize)> {
        run(ROUNDS)?;
        let factor = (RUN_SECONDS / run(ROUNDS)?).max(1.0);
        let rounds = ((ROUNDS as f64 * factor) as usize).min(ROUNDS_MAX);
        let runs = (0..RUNS).map(|_| run(rounds)).collect::<anyhow::Result<Vec<f64>>>()?;
        Ok((runs.into_iter().fold(f64::INFINITY, f64::min), rounds))
    }

    /// Bytes a second that are read.
    ///
    /// # Errors
    /// When the card fails, or did not read what is there.
    pub(crate) fn read_bandwidth(&self) -> anyhow::Result<f64> {
        let (data, count) = self.words()?;
        let out = self.runner.put(&vec![0_u32; self.threads()])?;
        let args = args![&data, &out, (count / 4) as u64];
        let run = || self.launch("read_ceiling", args);
        run()?;
        let runs = (0..2 * RUNS).map(|_| run()).collect::<anyhow::Result<Vec<f64>>>()?;
        let all = self.runner.get::<u32>(&out, self.threads())?.into_iter().fold(0, |a, b| a ^ b);
        let want = (0..count as u32).fold(0, |a, b| a ^ b);
        ensure!(all == want, "read_ceiling read {all:#x}, not {want:#x}");
        Ok(4.0 * count as f64 / runs.into_iter().fold(f64::INFINITY, f64::min))
    }

    /// The numbers from zero on in the card's memory.
    fn words(&self) -> anyhow::Result<(Memory, usize)> {
        const PIECE: usize = 1 << 20;
        let count = self.read_bytes / 16 * 4;
        let data = Memory::new(&self.card, 4 * count, "what is read")?;
        for first in (0..count).step_by(PIECE) {
            let end = (first + PIECE).min(count);
            let piece: Vec<u32> = (first as u32..end as u32).collect();
            data.write(&self.runner.stream, 4 * first, &piece)?;
        }
        Ok((data, count))
    }

    /// Operations a second of multiply-adds by an arithmetic.
    ///
    /// # Errors
    /// When the card fails, or gives other sums.
    pub(crate) fn peak(&self, arithmetic: Arithmetic) -> anyhow::Result<f64> {
        match arithmetic {
            Arithmetic::Portable => self.fma_peak(),
            Arithmetic::Tensor => self.mma_peak(),
        }
    }

    fn fma_peak(&self) -> anyhow::Result<f64> {
        let out = self.runner.put(&vec![0.0_f32; self.threads()])?;
        let (factor, term) = STEP;
        let run =
            |rounds: usize| self.launch("fma_ceiling", args![&out, factor, term, rounds as i32]);
        run(ROUNDS)?;
        let got: Vec<f32> = self.runner.get(&out, self.threads())?;
        let of_lane = |lane: usize| {
            let chain =
                |j: usize| (0..ROUNDS).fold((lane + j) as f32, |x, _| factor.mul_add(x, term));
            (0..CHAINS).map(chain).fold(0.0, |a, b| a + b)
        };
        let lanes: Vec<f32> = (0..32).map(of_lane).collect();
        let want: Vec<f32> = (0..got.len()).map(|i| lanes[i % 32]).collect();
        same("fma_ceiling", &got, &want)?;
        let (seconds, rounds) = self.rounds(run)?;
        Ok((2 * CHAINS * self.threads() * rounds) as f64 / seconds)
    }

    fn mma_peak(&self) -> anyhow::Result<f64> {
        let kernel = self.runner.name(["mma_ceiling_bf16", "mma_ceiling_f16"]);
        let out = self.runner.put(&vec![0.0_f32; self.threads()])?;
        let run = |rounds: usize| self.launch(kernel, args![&out, rounds as i32]);
        let (seconds, rounds) = self.rounds(run)?;
        let got: Vec<f32> = self.runner.get(&out, self.threads())?;
        same(kernel, &got, &vec![(16 * rounds) as f32; got.len()])?;
        let warps = self.threads() / 32;
        Ok((TILE_OPERATIONS * TILES * warps * rounds) as f64 / seconds)
    }
}
