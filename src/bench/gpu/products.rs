//! Compares the kernels for products, one by one: the portable ones with the CPU's bits, those for
//! tensor cores with each other and, by distance, with the portable ones.

use crate::bench::host::Say;
use crate::models::cuda::Card;
use crate::models::cuda::launch::{Arg, Launch, Memory, Pinned, Stream, values_of};
use crate::ops::dtype::Dtype;
use crate::ops::lcg::Lcg;
use crate::ops::matmul::{Packed, matmul_into};
use crate::ops::pool::Pool;
use crate::ops::rounded::Rounded;
use anyhow::ensure;
use std::sync::Arc;

/// A kernel: its name in both types, tokens and rows of a thread block, its threads.
type Kernel = ([&'static str; 2], usize, usize, u32);

const PORTABLE: [Kernel; 4] = [
    (["decode_bf16_1", "decode_f16_1"], 1, 32, 256),
    (["decode_bf16_4", "decode_f16_4"], 4, 32, 256),
    (["decode_bf16_8", "decode_f16_8"], 8, 32, 256),
    (["prefill_bf16", "prefill_f16"], 64, 64, 128),
];
const TENSOR: [Kernel; 3] = [
    (["decode_mma_bf16_8", "decode_mma_f16_8"], 8, 32, 256),
    (["decode_mma_bf16_32", "decode_mma_f16_32"], 32, 32, 256),
    (["prefill_mma_bf16", "prefill_mma_f16"], 128, 64, 128),
];
/// Batches, so that tiles are full and partly empty.
const TOKENS: [usize; 4] = [1, 7, 40, 150];

/// One matrix and inputs for it, on both devices.
struct Case {
    stream: Stream,
    dtype: Dtype,
    packed: Memory,
    on_cpu: Packed,
    inputs: Rounded,
}

/// Compares all of them on matrices of `rows` by `cols`.
///
/// # Errors
/// When bits differ that must be equal, or the card fails.
pub(super) fn compare(
    card: &Arc<Card>,
    pool: &Pool,
    shapes: &[(usize, usize)],
    say: Say<'_>,
) -> anyhow::Result<()> {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for shape in shapes {
            let case = Case::new(card, pool, dtype, *shape)?;
            let (rows, cols) = shape;
            let (mut compared, mut worst) = (0, 0.0_f64);
            for tokens in TOKENS {
                let mut want = vec![0.0; tokens * rows];
                matmul_into(&pool.turn(), &case.on_cpu, &case.first(tokens), &mut want);
                for kernel in PORTABLE {
                    compared += same(&case, kernel, tokens, &want)?;
                }
                // Any of them is what the others must equal.
                let own = case.run(TENSOR[0], tokens)?;
                for kernel in &TENSOR[1..] {
                    compared += same(&case, *kernel, tokens, &own)?;
                }
                worst = worst.max(distance(&own, &want));
            }
            say(format!(
                "products of {rows} x {cols} in {dtype}: {compared} of {compared} results are \
                 equal; tensor and portable are {worst:.1e} apart"
            ));
        }
    }
    Ok(())
}

fn same(case: &Case, kernel: Kernel, tokens: usize, want: &[f32]) -> anyhow::Result<usize> {
    let got = case.run(kernel, tokens)?;
    let differ = got.iter().zip(want).position(|(g, w)| g.to_bits() != w.to_bits());
    let name = kernel.0[0];
    ensure!(
        differ.is_none() && got.len() == want.len(),
        "{name} ({}) for {tokens} tokens: element {} is {:e}, not {:e}",
        case.dtype,
        differ.unwrap_or(0),
        got[differ.unwrap_or(0)],
        want[differ.unwrap_or(0)],
    );
    Ok(got.len())
}

/// Root mean square of the difference to that of the values.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let apart: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (apart / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}

impl Case {
    fn new(
        card: &Arc<Card>,
        pool: &Pool,
        dtype: Dtype,
        (rows, cols): (usize, usize),
    ) -> anyhow::Result<Self> {
        let mut generator = Lcg::new(7);
        let mut noise = || generator.bits() as f32 / u32::MAX as f32 - 0.5;
        let bits: Vec<u16> = (0..rows * cols).map(|_| dtype.round(noise())).collect();
        let on_cpu = Packed::pack(&pool.turn(), (rows, cols), dtype, |row, out| {
            out.copy_from_slice(&bits[row * cols..][..cols]);
            Ok::<_, std::io::Error>(())
        })?;
        let stream = Stream::new(card)?;
        let raw = Memory::new(card, 2 * bits.len(), "a product")?;
        raw.write(&stream, 0, &bits)?;
        let tiles = rows.next_multiple_of(32) * cols.next_multiple_of(32);
        let packed = Memory::new(card, 2 * tiles, "a product")?;
        packed.zero(&stream)?;
        let is_f16 = i32::from(dtype == Dtype::F16);
        let args = vec![
            Arg::from(&raw),
            Arg::from(&packed),
            Arg::from(cols as i32),
            Arg::from(0_i32),
            Arg::from(is_f16),
        ];
        let grid = [rows, 1, 1];
        stream.run(&[Launch { kernel: "pack", grid, threads: 256, shared: 0, args }])?;
        stream.wait()?;
        let most = TOKENS[TOKENS.len() - 1];
        let mut inputs = Rounded::new(dtype, cols);
        inputs.set_rows(most);
        for row in 0..most {
            let values: Vec<f32> = (0..cols).map(|_| noise()).collect();
            inputs.set_row(row, &values);
        }
        Ok(Self { stream, dtype, packed, on_cpu, inputs })
    }

    /// The first rows of the inputs.
    fn first(&self, tokens: usize) -> Rounded {
        let mut first = Rounded::new(self.dtype, self.inputs.cols());
        first.set_rows(tokens);
        (0..tokens).for_each(|row| first.copy_row(row, &self.inputs, row));
        first
    }

    /// The products of the first tokens by one kernel.
    fn run(&self, kernel: Kernel, tokens: usize) -> anyhow::Result<Vec<f32>> {
        let (names, group, block_rows, threads) = kernel;
        let (rows, cols) = (self.on_cpu.rows(), self.inputs.cols());
        let card = self.stream.card();
        let bits: Vec<u16> =
            (0..tokens).flat_map(|row| self.inputs.bits(row).iter().copied()).collect();
        let x = Memory::new(card, 2 * bits.len(), "a product")?;
        x.write(&self.stream, 0, &bits)?;
        let bytes = 4 * tokens * rows;
        let out = Memory::new(card, bytes, "a product")?;
        let args = vec![
            Arg::from(&self.packed),
            Arg::from(&x),
            Arg::from(&out),
            Arg::from(rows as i32),
            Arg::from(cols as i32),
            Arg::from(tokens as i32),
        ];
        let grid = [tokens.div_ceil(group), rows.div_ceil(block_rows), 1];
        let kernel = names[usize::from(self.dtype == Dtype::F16)];
        self.stream.run(&[Launch { kernel, grid, threads, shared: 0, args }])?;
        let mut host = Pinned::new(&self.stream, bytes)?;
        host.fetch(&out, 0..bytes)?;
        Ok(values_of(host.bytes()?, tokens * rows))
    }
}
