//! `attend_tensor.cu` against a scalar text of its canon, over the host shim's model of `mma`, and
//! against exact attention.

use super::attention::{BLOCK, Case, PARTITION, Partial, exp, sequences, shape, tanh};
use super::tensor::{SLICE, mma, product};
use super::{Kernels, args, broken, first_difference, kernels};
use crate::common::Noise;
use std::ffi::c_void;
use targon_engine::ops::dtype::Dtype;

/// Queries of a thread block: those of decode and of prefill.
const SIZES: [usize; 2] = [8, 32];

/// The two steps of a block of positions.
fn add_block(sum: f32, values: &[f32], weights: &[f32]) -> f32 {
    let step = |sum: f32, is_second: bool| {
        let chosen = (0..values.len()).filter(|j| (j % 8 >= 4) == is_second);
        mma(sum, &chosen.map(|j| (values[j], weights[j])).collect::<Vec<_>>())
    };
    step(step(sum, false), true)
}

/// The tree over the weights of a block.
fn sum_of_block(w: &[f32]) -> f32 {
    let mut sums: Vec<f32> = (0..8).map(|g| (w[g] + w[g + 8]) + (w[g + 16] + w[g + 24])).collect();
    for distance in [4, 2, 1] {
        sums = (0..distance).map(|g| sums[g] + sums[g + distance]).collect();
    }
    sums[0]
}

/// Whether a query at a position sees another.
fn sees(case: &Case, position: usize, other: usize) -> bool {
    let window = case.shape.window as usize;
    other <= position && (window == 0 || other + window > position)
}

/// One query over one partition of so many blocks.
fn partial(
    case: &Case,
    [s, kv_head, position]: [usize; 3],
    query: &[f32],
    first: usize,
    blocks: usize,
) -> Partial {
    let shape = case.shape;
    let score = |p: usize| {
        if !sees(case, position, p) {
            return f32::NEG_INFINITY;
        }
        let x = product(case.head(&case.keys[s], p, kv_head), query, SLICE) * shape.scale;
        if shape.cap == 0.0 { x } else { tanh(x / shape.cap) * shape.cap }
    };
    let scores: Vec<f32> = (first..first + blocks * BLOCK).map(score).collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |x: &f32| match *x == f32::NEG_INFINITY {
        true => 0.0,
        false => case.dtype.widen(case.dtype.round(exp(x - max))),
    };
    let weights: Vec<f32> = scores.iter().map(weight).collect();
    let mut part = Partial::nothing(shape.head_dim as usize);
    (part.max, part.sum) = (max, weights.chunks(BLOCK).map(sum_of_block).fold(0.0, |s, b| s + b));
    for (d, out) in part.out.iter_mut().enumerate() {
        let value = |p: usize| match p <= position {
            true => case.head(&case.values[s], p, kv_head)[d],
            false => 0.0,
        };
        let values: Vec<f32> = (first..first + blocks * BLOCK).map(value).collect();
        let of_blocks = values.chunks(BLOCK).zip(weights.chunks(BLOCK));
        *out = of_blocks.fold(0.0, |sum, (v, w)| add_block(sum, v, w));
    }
    part
}

/// The rounded rows, and the partial results of all partitions (NaN where a query sees nothing),
/// with so many blocks to a partition.
fn want(case: &Case, blocks: usize) -> [Vec<f32>; 2] {
    let partitions = (case.partitions() * PARTITION).div_ceil(blocks * BLOCK);
    case.joined(partitions, |at, query, partition| {
        partial(case, at, query, partition * blocks * BLOCK, blocks)
    })
}

/// Values as packed matrices of dimensions by positions; what belongs to nobody is NaN.
fn packed_values(case: &Case, tables: &[Vec<u32>], len: usize) -> Vec<u16> {
    let (kv_heads, tiles) =
        (case.shape.kv_heads as usize, (case.shape.head_dim as usize).div_ceil(32));
    let mut packed = vec![case.dtype.round(f32::NAN); len];
    for (s, sequence) in case.sequences.iter().enumerate() {
        for position in 0..sequence.start + sequence.rows {
            let (block, slot) = (tables[s][position / BLOCK] as usize, position % BLOCK);
            for head in 0..kv_heads {
                let value = case.head(&case.values[s], position, head);
                for d in 0..tiles * 32 {
                    let word = d / 32 * 128 + slot / 8 * 32 + d % 32;
                    let at = (block * kv_heads + head) * tiles * 1024 + word * 8 + slot % 8;
                    packed[at] = case.dtype.round(value.get(d).copied().unwrap_or(0.0));
                }
            }
        }
    }
    packed
}

/// By tiles of `size` queries, in one walk or split over partitions.
fn run(case: &Case, kernels: &Kernels, size: usize, is_split: bool, seed: u64) -> [Vec<f32>; 2] {
    let (keys, _, tables) = case.cache();
    let values = packed_values(case, &tables, keys.len());
    let (tiles, table) = (case.tiles(size, &tables), tables.concat());
    let positions: Vec<u32> =
        case.sequences.iter().flat_map(|s| (s.start..s.start + s.rows).map(|p| p as u32)).collect();
    let (heads, head_dim) = (case.shape.heads as usize, case.shape.head_dim as usize);
    let partitions = case.partitions() as i32;
    let mut out = vec![0_u16; positions.len() * heads * head_dim];
    let mut parts = vec![f32::NAN; positions.len() * heads * partitions as usize * (head_dim + 2)];
    let (q, k, v) = (case.queries.as_ptr(), keys.as_ptr(), values.as_ptr());
    let (t, tl, p, o) = (table.as_ptr(), tiles.as_ptr(), parts.as_mut_ptr(), out.as_mut_ptr());
    let (shape, split) = (case.shape, i32::from(is_split));
    let args = args![q, k, v, t, tl, p, o, shape, partitions, split];
    let smem = 16 * size * (4 * (head_dim.div_ceil(32) | 1) + 68);
    let depth = if is_split { partitions as u32 } else { 1 };
    let grid = [tiles.len() as u32, case.shape.kv_heads as u32, depth];
    kernels.launch(&format!("attend_mma_{}_{size}", case.dtype), grid, 512, smem, seed, &args);
    if is_split {
        let (at, f16) = (positions.as_ptr(), i32::from(case.dtype == Dtype::F16));
        let args = args![p, at, o, shape, partitions, f16];
        let grid = [positions.len() as u32, heads as u32, 1];
        super::kernels().launch("attend_merge", grid, 128, 0, seed, &args);
    }
    // What no query sees may be written or not.
    for part in parts.chunks_exact_mut(head_dim + 2).filter(|part| part[1] == 0.0) {
        part.fill(f32::NAN);
    }
    [out.iter().map(|b| case.dtype.widen(*b)).collect(), parts]
}

/// The first place where a run has other bits than the canon, among rows or partial results.
fn difference([rows, parts]: &[Vec<f32>; 2], is_split: bool, got: &[Vec<f32>; 2]) -> Option<usize> {
    let of_parts = is_split.then(|| first_difference(&got[1], parts)).flatten();
    first_difference(&got[0], rows).or(of_parts)
}

/// Every size and both ways, each by another order of threads.
fn assert_canon(case: &Case, place: &str) {
    let want = want(case, PARTITION / BLOCK);
    for (seed, size) in SIZES.into_iter().enumerate() {
        for is_split in [false, true] {
            let got = run(case, kernels(), size, is_split, seed as u64 * 3 + u64::from(is_split));
            let difference = difference(&want, is_split, &got);
            assert_eq!(difference, None, "{place} {} {size} split {is_split}", case.dtype);
        }
    }
}

#[test]
fn attention_by_tensor_cores_equals_its_canon() {
    let mut noise = Noise(81);
    // One head, groups that share a tile with others and that do not, every width of heads, caps,
    // windows, one partition and several, more queries than a tile.
    let cases = [
        (shape(1, 1, 16, 0, 0.0), sequences(&[[0, 1]])),
        (shape(4, 2, 64, 0, 0.0), sequences(&[[0, 19], [31, 1], [40, 3]])),
        (shape(3, 1, 80, 0, 0.0), sequences(&[[505, 12], [63, 2]])),
        (shape(8, 1, 128, 0, 20.0), sequences(&[[1_100, 1], [0, 2]])),
        (shape(2, 2, 96, 40, 0.0), sequences(&[[500, 30], [7, 1]])),
        (shape(2, 1, 32, 600, 5.0), sequences(&[[1_600, 2]])),
        (shape(2, 1, 256, 0, 50.0), sequences(&[[20, 2], [530, 1]])),
    ];
    for (i, (shape, sequences)) in cases.iter().enumerate() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let case = Case::new(&mut noise, dtype, *shape, sequences);
            assert_canon(&case, &format!("case {i}"));
        }
    }
}

#[test]
fn numbers_that_are_none_stay_where_they_are() {
    let mut noise = Noise(82);
    for (i, broken) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38].into_iter().enumerate() {
        let sequences = sequences(&[[515, 1]]);
        let mut case = Case::new(&mut noise, Dtype::Bf16, shape(2, 1, 32, 0, 0.0), &sequences);
        let broken = case.dtype.widen(case.dtype.round(broken));
        match i % 2 {
            0 => case.keys[0][300 * 32 + i] = broken,
            _ => case.values[0][514 * 32 + i] = broken,
        }
        assert_canon(&case, &format!("{broken}"));
    }
}

/// A row alone, and the same row among others that come before and after it.
#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let shape = shape(4, 1, 64, 0, 0.0);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let all = Case::new(&mut Noise(83), dtype, shape, &sequences(&[[490, 40]]));
        let [rows, _] = run(&all, kernels(), 32, false, 2);
        for row in [0, 7, 21, 22, 39] {
            let (width, position) = (4 * 64, 490 + row);
            let mut alone = Case::new(&mut Noise(1), dtype, shape, &sequences(&[[position, 1]]));
            alone.queries = all.queries[row * width..][..width].to_vec();
            alone.keys[0] = all.keys[0][..(position + 1) * 64].to_vec();
            alone.values[0] = all.values[0][..(position + 1) * 64].to_vec();
            for (size, is_split) in [(8, false), (8, true), (32, true)] {
                let [got, _] = run(&alone, kernels(), size, is_split, 0);
                let want = &rows[row * width..][..width];
                assert_eq!(first_difference(&got, want), None, "{dtype} {row} {size} {is_split}");
            }
        }
    }
}

/// Softmax and its mean in f64, from the same rounded queries, keys and values.
#[test]
fn attention_is_close_to_the_exact_one() {
    let (heads, head_dim) = (2, 64);
    let case =
        Case::new(&mut Noise(84), Dtype::F16, shape(2, 1, 64, 0, 0.0), &sequences(&[[700, 1]]));
    let [got, _] = run(&case, kernels(), 8, true, 0);
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    for head in 0..heads {
        let query = &case.queries[head * head_dim..][..head_dim];
        let query: Vec<f32> = query.iter().map(|b| case.dtype.widen(*b)).collect();
        let scores: Vec<f64> = (0..=700)
            .map(|p| dot(case.head(&case.keys[0], p, 0), &query) * f64::from(case.shape.scale))
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for d in 0..head_dim {
            let value = |p: usize| f64::from(case.head(&case.values[0], p, 0)[d]);
            let exact: f64 =
                weights.iter().enumerate().map(|(p, w)| w * value(p)).sum::<f64>() / sum;
            let size: f64 =
                weights.iter().enumerate().map(|(p, w)| w * value(p).abs()).sum::<f64>() / sum;
            let error = (f64::from(got[head * head_dim + d]) - exact).abs() / size;
            // Weights and the result are each rounded to 11 bits.
            assert!(error < 2.0_f64.powi(-10), "{head} {d}: {error:e} of the mean magnitude");
        }
    }
}

#[test]
fn another_partition_is_noticed() {
    let sequences = sequences(&[[600, 3]]);
    let case = Case::new(&mut Noise(85), Dtype::Bf16, shape(4, 1, 64, 0, 0.0), &sequences);
    let (canon, half) = (want(&case, 16), want(&case, 8));
    for size in SIZES {
        let got = run(&case, broken("attend_tensor", "MMA_BLOCKS=8"), size, false, 0);
        assert!(difference(&canon, false, &got).is_some(), "{size}");
        // It is another canon, not another error.
        assert_eq!(difference(&half, false, &got), None, "{size}");
    }
}

#[test]
fn attention_without_its_barriers_is_noticed() {
    let sequences = sequences(&[[1_300, 3]]);
    let case = Case::new(&mut Noise(86), Dtype::Bf16, shape(4, 1, 64, 0, 0.0), &sequences);
    let (want, broken) = (want(&case, 16), broken("attend_tensor", "CONTROL_NO_BARRIER"));
    for size in SIZES {
        let caught = (0..4)
            .any(|seed| difference(&want, false, &run(&case, broken, size, false, seed)).is_some());
        assert!(caught, "{size}");
    }
}
