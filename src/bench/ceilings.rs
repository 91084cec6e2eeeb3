//! Measures the most that this machine can do: reading memory, and multiply-adds. Other
//! measurements are compared with these figures.

use super::host::caches_bytes;
use crate::clock::Clock;
use crate::ops::buffer::Buffer;
use crate::ops::dtype::Dtype;
use crate::ops::lanes::{Kernel, Lanes, dispatch};
use crate::ops::pool::Turn;
use std::hint::black_box;
use std::path::Path;

/// Values that are read at least, and how many times what the caches hold.
const READ_VALUES: usize = 128 << 20;
const CACHES: usize = 2;
/// How often all of it is read: the fastest counts, and a machine may be shared.
const READ_RUNS: usize = 40;
/// Seconds that a run of multiply-adds should last at least.
const RUN_SECONDS: f64 = 0.1;
/// Rounds of the first run.
const ROUNDS: usize = 20_000;

/// What a device does at most.
#[derive(Clone, Copy)]
pub(super) struct Peaks {
    /// Bytes a second.
    pub(super) read_bandwidth: f64,
    /// Multiply-adds as the model's products do them, in operations a second.
    pub(super) fma_peak: f64,
}

/// Seconds of the fastest of several runs.
pub(super) fn best_of(runs: usize, mut f: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let started = Clock::system();
            f();
            started.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        let mut acc = [L::splat(0.0); 8];
        for chunk in self.0.chunks_exact(128) {
            for (i, a) in acc.iter_mut().enumerate() {
                // SAFETY: the chunk has 128 values.
                *a = a.add(unsafe { L::load(chunk.as_ptr().add(16 * i)) });
            }
        }
        acc.into_iter().map(L::sum).sum()
    }
}

/// Bytes a second that all threads read, from such memory as weights have: on huge pages where the
/// system grants them.
///
/// # Errors
/// When there is no such memory.
pub(super) fn read_bandwidth(turn: &Turn<'_>) -> anyhow::Result<f64> {
    let count = READ_VALUES.max(CACHES * caches_bytes(Path::new("/")) / size_of::<f32>());
    let (mut data, pieces) = (Buffer::zeroed(2 * count)?, 256);
    data.fill(0x3f80);
    // SAFETY: any four bytes are a valid f32; `align_to` gives only what is aligned.
    let (_, data, _) = unsafe { data.align_to::<f32>() };
    let piece = data.len() / pieces;
    let seconds = best_of(READ_RUNS, || {
        turn.run(pieces, |i| {
            black_box(dispatch(turn.isa(), Sum(&data[i * piece..][..piece])));
        });
    });
    Ok((piece * pieces) as f64 * 4.0 / seconds)
}

struct Fma(usize);

impl Kernel for Fma {
    type Out = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        let (b, c) = (L::splat(black_box(0.999)), L::splat(black_box(0.001)));
        let mut acc = [L::splat(1.0); 12];
        for _ in 0..self.0 {
            for a in &mut acc {
                *a = a.mul_add(b, c);
            }
        }
        acc.into_iter().map(L::sum).sum()
    }
}

struct Dots(usize);

impl Kernel for Dots {
    type Out = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        let (w, x) = (L::splat(black_box(0.999)), black_box(0x3a80_3a80));
        let mut acc = [L::splat(1.0); 12];
        for _ in 0..self.0 {
            for a in &mut acc {
                *a = w.dot_bf16(&x, *a);
            }
        }
        acc.into_iter().map(L::sum).sum()
    }
}

/// Operations a second of products of many rows of `dtype`, by what multiplies them.
pub(super) fn product_peak(turn: &Turn<'_>, dtype: Dtype) -> f64 {
    let of_bf16 = || tile_peak(turn).or_else(|| dot_peak(turn));
    let own = if dtype == Dtype::Bf16 { of_bf16() } else { None };
    own.unwrap_or_else(|| fma_peak(turn))
}

/// Operations a second of VDPBF16PS on all threads.
pub(super) fn dot_peak(turn: &Turn<'_>) -> Option<f64> {
    let multiply = |rounds| {
        black_box(dispatch(turn.isa(), Dots(rounds)));
    };
    turn.isa().has_dot().then(|| peak(turn, 12 * 16 * 4, multiply))
}

/// Operations a second of AMX on all threads, on what its tiles hold.
pub(super) fn tile_peak(turn: &Turn<'_>) -> Option<f64> {
    let isa = turn.isa();
    let multiply = |rounds| isa.tiles().into_iter().for_each(|mut tiles| tiles.exercise(rounds));
    isa.has_tiles().then(|| peak(turn, 4 * 16 * 16 * 32 * 2, multiply))
}

/// Operations a second of multiply-adds of vectors on all threads.
pub(super) fn fma_peak(turn: &Turn<'_>) -> f64 {
    peak(turn, 12 * 16 * 2, |rounds| {
        black_box(dispatch(turn.isa(), Fma(rounds)));
    })
}

/// Operations a second of all threads, each of which runs so many rounds of `operations`.
fn peak(turn: &Turn<'_>, operations: usize, run: impl Fn(usize) + Sync) -> f64 {
    let tasks = turn.threads();
    let seconds = |runs: usize, rounds: usize| best_of(runs, || turn.run(tasks, |_| run(rounds)));
    // Long enough to be measured, however fast the machine is or the program was compiled.
    let factor = (RUN_SECONDS / seconds(1, ROUNDS)).clamp(1.0, 1e4);
    let rounds = (ROUNDS as f64 * factor) as usize;
    (tasks * rounds * operations) as f64 / seconds(3, rounds)
}
