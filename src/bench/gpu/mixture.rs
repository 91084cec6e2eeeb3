//! Compares the kernels of mixtures: routing and sums over experts with the CPU's bits, products of
//! slots that are grouped by expert with those of single slots, and these with the CPU's.

use super::runner::{KernelRunner, same, same_words, words};
use crate::models::cuda::launch::{Memory, args};
use crate::ops::lanes::{Lanes, Scalar};
use crate::ops::math;
use crate::ops::matmul::{Packed, matmul_into};
use crate::ops::rounded::Rounded;

const EXPERTS: usize = 6;
/// Experts of a token.
const USED: usize = 2;
const TOKENS: usize = 70;
/// Rows of an expert's matrix.
const ROWS: usize = 45;

/// All of them on matrices of `cols` columns; results by kernel.
pub(super) fn compare(
    runner: &KernelRunner<'_>,
    cols: usize,
) -> anyhow::Result<Vec<(&'static str, usize)>> {
    // Quarters, so that there are ties.
    let noise = runner.noise(TOKENS * EXPERTS);
    let scores: Vec<f32> = noise.iter().map(|x| (20.0 * x).round() * 0.25).collect();
    let (chosen, shares) = on_the_cpu(&scores);
    let routed = route(runner, &scores, (&chosen, &shares))?;
    let case = Case::new(runner, cols, chosen)?;
    let mut single = 0;
    let want = case.on_the_cpu();
    let portable = case.single(["expert_bf16", "expert_f16"])?;
    single += same("expert_*", &portable, &want)?;
    let tensor = case.single(["expert_mma_bf16", "expert_mma_f16"])?;
    let mut grouped = 0;
    for (names, size, want) in [
        (["grouped_bf16_8", "grouped_f16_8"], 8, &portable),
        (["grouped_bf16_64", "grouped_f16_64"], 64, &portable),
        (["grouped_mma_bf16_32", "grouped_mma_f16_32"], 32, &tensor),
        (["grouped_mma_bf16_128", "grouped_mma_f16_128"], 128, &tensor),
    ] {
        if size < 128 || cols.is_multiple_of(8) {
            grouped += same(runner.name(names), &case.grouped(names, size)?, want)?;
        }
    }
    Ok(vec![
        ("route", routed),
        ("expert_*", single),
        ("group_slots and grouped_*", grouped),
        ("combine", combine(runner, &portable, &shares)?),
    ])
}

/// Chosen experts and their shares: a softmax in ascending order, the largest, ascending.
fn on_the_cpu(scores: &[f32]) -> (Vec<u32>, Vec<f32>) {
    let exp = |x: f32| math::exp(Scalar::splat(x)).to_array()[0];
    let (mut chosen, mut shares) = (Vec::new(), Vec::new());
    for row in scores.chunks_exact(EXPERTS) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps: Vec<f32> = row.iter().map(|x| exp(x - max)).collect();
        let total: f32 = exps.iter().sum();
        let all: Vec<f32> = exps.iter().map(|e| e / total).collect();
        let mut order: Vec<usize> = (0..EXPERTS).collect();
        order.sort_by(|a, b| all[*b].total_cmp(&all[*a]).then(a.cmp(b)));
        order.truncate(USED);
        order.sort_unstable();
        let kept: f32 = order.iter().map(|e| all[*e]).sum();
        chosen.extend(order.iter().map(|e| *e as u32));
        shares.extend(order.iter().map(|e| all[*e] / kept));
    }
    (chosen, shares)
}

fn route(
    runner: &KernelRunner<'_>,
    scores: &[f32],
    (chosen, shares): (&[u32], &[f32]),
) -> anyhow::Result<usize> {
    let slots = chosen.len();
    let from = runner.put(scores)?;
    let (c, s) = (runner.put(&vec![0_u32; slots])?, runner.put(&vec![0.0_f32; slots])?);
    let args = args![&from, &c, &s, EXPERTS as i32, USED as i32, 1_i32];
    runner.launch("route", [TOKENS, 1, 1], (32, 0), args)?;
    let got: Vec<u32> = runner.get(&c, slots)?;
    same_words("route, experts", &words(&got), &words(chosen))?;
    same("route", &runner.get(&s, slots)?, shares)
}

/// Products of the first matrix of experts, whose slots read their token's row.
struct Case<'a> {
    runner: &'a KernelRunner<'a>,
    chosen: Vec<u32>,
    on_cpu: Vec<Packed>,
    inputs: Rounded,
    packed: Memory,
    x: Memory,
    places: Memory,
}

impl<'a> Case<'a> {
    fn new(runner: &'a KernelRunner<'a>, cols: usize, chosen: Vec<u32>) -> anyhow::Result<Self> {
        let rows = ROWS.next_multiple_of(32);
        let mut bits = runner.rounded(&runner.noise(EXPERTS * rows * cols));
        for expert in bits.chunks_exact_mut(rows * cols) {
            expert[ROWS * cols..].fill(0);
        }
        let pack = |expert: &[u16]| {
            Packed::pack(&runner.pool.turn(), (ROWS, cols), runner.dtype, |row, out| {
                out.copy_from_slice(&expert[row * cols..][..cols]);
                Ok::<_, std::io::Error>(())
            })
        };
        let on_cpu = bits.chunks_exact(rows * cols).map(pack).collect::<Result<_, _>>()?;
        let raw = runner.put(&bits)?;
        let packed = runner.put(&vec![0_u16; EXPERTS * rows * cols.next_multiple_of(32)])?;
        let args = args![&raw, &packed, cols as i32, 0_i32, runner.is_f16()];
        runner.launch("pack", [EXPERTS * rows, 1, 1], (256, 0), args)?;
        let values = runner.noise(TOKENS * cols);
        let mut inputs = Rounded::new(runner.dtype, cols);
        inputs.set_rows(TOKENS);
        values.chunks_exact(cols).enumerate().for_each(|(row, x)| inputs.set_row(row, x));
        let x = runner.put(&runner.rounded(&values))?;
        let places = runner.put(&chosen)?;
        Ok(Self { runner, chosen, on_cpu, inputs, packed, x, places })
    }

    /// Slot by slot on the CPU.
    fn on_the_cpu(&self) -> Vec<f32> {
        let of_expert = |packed: &Packed| {
            let mut out = vec![0.0; TOKENS * ROWS];
            matmul_into(&self.runner.pool.turn(), packed, &self.inputs, &mut out);
            out
        };
        let all: Vec<Vec<f32>> = self.on_cpu.iter().map(of_expert).collect();
        let slots = self.chosen.iter().enumerate();
        slots
            .flat_map(|(slot, e)| all[*e as usize][slot / USED * ROWS..][..ROWS].to_vec())
            .collect()
    }

    fn single(&self, names: [&'static str; 2]) -> anyhow::Result<Vec<f32>> {
        let (runner, slots) = (self.runner, self.chosen.len());
        let out = runner.put(&vec![0.0_f32; slots * ROWS])?;
        let (rows, cols, used) = (ROWS as i32, self.inputs.cols() as i32, USED as i32);
        let args = args![&self.packed, &self.places, &self.x, &out, rows, cols, used, 1_i32];
        runner.launch(runner.name(names), [ROWS.div_ceil(32), slots, 1], (256, 0), args)?;
        runner.get(&out, slots * ROWS)
    }

    fn grouped(&self, names: [&'static str; 2], size: usize) -> anyhow::Result<Vec<f32>> {
        let (runner, slots) = (self.runner, self.chosen.len());
        let count = slots / size + EXPERTS.min(slots);
        let (grouped, tiles) =
            (runner.put(&vec![0_u32; slots])?, runner.put(&vec![0_u32; 4 * count])?);
        let args = args![&self.places, &grouped, &tiles, slots as i32, size as i32, count as i32];
        runner.launch("group_slots", [1, 1, 1], (256, 0), args)?;
        let out = runner.put(&vec![0.0_f32; slots * ROWS])?;
        let (rows, cols, used) = (ROWS as i32, self.inputs.cols() as i32, USED as i32);
        let args = args![&self.packed, &self.x, &out, &grouped, &tiles, rows, cols, used];
        let [block_rows, threads] = if size >= 64 { [64, 128] } else { [32, 256] };
        let grid = [count, ROWS.div_ceil(block_rows), 1];
        runner.launch(runner.name(names), grid, (threads as u32, 0), args)?;
        runner.get(&out, slots * ROWS)
    }
}

/// Sums of a token's slots, weighted.
fn combine(runner: &KernelRunner<'_>, y: &[f32], shares: &[f32]) -> anyhow::Result<usize> {
    let (from, weights) = (runner.put(y)?, runner.put(shares)?);
    let out = runner.put(&[0.0_f32; TOKENS * ROWS])?;
    let args = args![&from, &weights, &out, ROWS as i32, USED as i32];
    runner.launch("combine", [TOKENS, 1, 1], (256, 0), args)?;
    let mut want = vec![0.0_f32; TOKENS * ROWS];
    for (slot, y) in y.chunks_exact(ROWS).enumerate() {
        let row = &mut want[slot / USED * ROWS..][..ROWS];
        row.iter_mut().zip(y).for_each(|(o, y)| *o += shares[slot] * y);
    }
    same("combine", &runner.get(&out, want.len())?, &want)
}
