//! `ceiling.cu`: every result is what the same work gives here, so that a measured ceiling is one
//! of work that was done.

use super::{args, assert_same, kernels};
use std::ffi::c_void;

const BLOCKS: usize = 3;
const THREADS: usize = 256 * BLOCKS;

fn launch(kernel: &str, args: &[*mut c_void]) {
    kernels().launch(kernel, [BLOCKS as u32, 1, 1], 256, 0, 1, args);
}

#[test]
fn every_word_is_read_once() {
    for groups in [1_u64, 700, 10_000] {
        let data: Vec<[u32; 4]> = (0..groups as u32)
            .map(|i| [0, 1, 2, 3].map(|j| (4 * i + j).wrapping_mul(2_654_435_761)))
            .collect();
        let mut out = vec![7_u32; THREADS];
        let (from, to) = (data.as_ptr(), out.as_mut_ptr());
        launch("read_ceiling", &args![from, to, groups]);
        for (thread, got) in out.iter().enumerate() {
            let own = data.iter().skip(thread).step_by(THREADS).flatten();
            assert_eq!(*got, own.fold(0, |a, b| a ^ b), "thread {thread} of {groups} groups");
        }
    }
}

#[test]
fn chains_of_multiply_adds_have_all_their_steps() {
    let (factor, term) = (0.999_f32, 0.001_f32);
    for rounds in [0_i32, 1, 20] {
        let mut out = vec![7.0_f32; THREADS];
        let to = out.as_mut_ptr();
        launch("fma_ceiling", &args![to, factor, term, rounds]);
        let chain = |begin: usize| (0..rounds).fold(begin as f32, |x, _| factor.mul_add(x, term));
        let sum = |lane: usize| (0..16).fold(0.0, |sum, j| sum + chain(lane + j));
        let want: Vec<f32> = (0..THREADS).map(|thread| sum(thread % 32)).collect();
        assert_same(&out, &want, &format!("{rounds} rounds"));
    }
}

#[test]
fn tiles_of_ones_grow_by_sixteen_in_a_round() {
    for kernel in ["mma_ceiling_bf16", "mma_ceiling_f16"] {
        for rounds in [0_i32, 1, 9] {
            let mut out = vec![7.0_f32; THREADS];
            let to = out.as_mut_ptr();
            launch(kernel, &args![to, rounds]);
            assert_same(&out, &vec![16.0 * rounds as f32; THREADS], kernel);
        }
    }
}
