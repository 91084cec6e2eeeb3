//! The CUDA kernels on the CPU: the unchanged `.cu` files, compiled with g++ through
//! `kernels/host/shim.h`, against the Rust code they are twins of. Nothing here has run on a card.

#![allow(clippy::undocumented_unsafe_blocks, reason = "a test may fail")]

use crate::common::Noise;
use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::logits::{LogSumExp, rank, top_k};
use targon_engine::proof::residue::{Calibration, Profile, exact_hash, sketch};

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/host").join(name)
}

fn compile(output: &str, extra: &[&str], sources: &[&str]) -> PathBuf {
    // Tests run in processes of their own, side by side.
    let output = format!("{}-{output}", std::process::id());
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join(output);
    let status = Command::new("g++")
        .args(["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"])
        .args(extra)
        .args(sources.iter().map(|s| source(s)))
        .arg("-o")
        .arg(&output)
        .arg("-lpthread")
        .status()
        .expect("g++ is needed to run the kernels on the CPU");
    assert!(status.success());
    output
}

type Launch = unsafe extern "C" fn(
    *const u32,
    *const u32,
    usize,
    u64,
    *mut *mut c_void,
    *mut c_char,
    usize,
) -> i32;

fn library() -> &'static libloading::Library {
    static LIBRARY: OnceLock<libloading::Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let path = compile("kernels.so", &["-shared", "-fPIC"], &["proof.cpp", "logprob.cpp"]);
        unsafe { libloading::Library::new(path) }.unwrap()
    })
}

/// Launches `kernel` as cuLaunchKernel would; `seed` picks the order of threads.
fn launch(kernel: &str, rows: usize, threads: u32, smem: usize, seed: u64, args: &[*mut c_void]) {
    let launch: libloading::Symbol<Launch> = unsafe { library().get(kernel.as_bytes()) }.unwrap();
    let (grid, block) = ([rows as u32, 1, 1], [threads, 1, 1]);
    let (mut args, mut error) = (args.to_vec(), [0 as c_char; 400]);
    let code = unsafe {
        launch(
            grid.as_ptr(),
            block.as_ptr(),
            smem,
            seed,
            args.as_mut_ptr(),
            error.as_mut_ptr(),
            400,
        )
    };
    assert_eq!(code, 0, "{:?}", unsafe { CStr::from_ptr(error.as_ptr()) });
}

/// The address of a scalar, or of a pointer to a slice's data.
macro_rules! args {
    ($($value:expr),* $(,)?) => { [$((&raw const $value).cast_mut().cast::<c_void>()),*] };
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    sketch_key: u64,
    exact_key: u64,
    position: u32,
    slot: i32,
}

fn calibration(channels: usize, noise: &mut Noise) -> Calibration {
    Calibration {
        exponents: (0..channels).map(|_| noise.below(9) as i8 - 4).collect(),
        means: (0..channels).map(|_| noise.below(401) as i16 - 200).collect(),
        shift: 4,
    }
}

#[test]
fn sketch_and_hash_are_bit_equal_to_rust() {
    let mut noise = Noise(3);
    for channels in [1, 31, 32, 33, 96, 576, 2048, 4096 + 17] {
        for (profile, projections, shift) in [(Profile::U8, 4, 4_i32), (Profile::U4, 8, 6)] {
            for (dtype, seed) in [(Dtype::Bf16, 0), (Dtype::Bf16, 1), (Dtype::F16, 7)] {
                let rows = 4;
                let calibration = calibration(channels, &mut noise);
                let mut bits: Vec<u16> =
                    (0..rows * channels).map(|_| dtype.round(noise.next() * 8.0)).collect();
                // Extremes: infinities, NaN, the largest value, a subnormal, minus zero.
                for (i, x) in [0x7f80, 0xff80, 0x7fc1, 0x7f7f, 0x0001, 0x8000].iter().enumerate() {
                    let at = (i * 5) % bits.len();
                    bits[at] = *x;
                }
                let slots = [2, -1, 0, 3];
                let entry = |r: usize| Entry {
                    sketch_key: 0x1234_5678_9abc_def0 + r as u64,
                    exact_key: u64::MAX - r as u64,
                    position: 1_000_000 * r as u32,
                    slot: slots[r],
                };
                let table: Vec<Entry> = (0..rows).map(entry).collect();
                let (mut sketches, mut hashes) = ([0xdead_u32; 4], [0xdead_u64; 4]);
                let is_f16 = i32::from(dtype == Dtype::F16);
                let (rows_ptr, e_ptr) = (bits.as_ptr(), calibration.exponents.as_ptr());
                let (m_ptr, t_ptr) = (calibration.means.as_ptr(), table.as_ptr());
                let (s_ptr, h_ptr) = (sketches.as_mut_ptr(), hashes.as_mut_ptr());
                let (d, k) = (channels as i32, projections);
                let args = args![rows_ptr, e_ptr, m_ptr, t_ptr, s_ptr, h_ptr, d, shift, k, is_f16];
                launch("emu_sketch_rows", rows, 128, 0, seed, &args);
                for r in 0..rows {
                    let Ok(slot) = usize::try_from(slots[r]) else { continue };
                    let row = &bits[r * channels..][..channels];
                    let values: Vec<f32> = row.iter().map(|b| dtype.widen(*b)).collect();
                    let Entry { sketch_key, exact_key, position, .. } = table[r];
                    let want = sketch(&calibration, profile, sketch_key, position, &values);
                    let place = format!("{channels} {profile:?} {dtype} row {r}");
                    assert_eq!(sketches[slot].to_le_bytes(), want, "{place}");
                    assert_eq!(hashes[slot], exact_hash(exact_key, position, row), "{place}");
                }
                assert_eq!((sketches[1], hashes[1]), (0xdead, 0xdead), "a skipped row");
            }
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
struct Reduced {
    max: f32,
    sum: f32,
    target_logit: f32,
    target_rank: u32,
    stop_rank: u32,
}

/// Relative tolerance of the sum of exponentials: f32 in another order, and another exp.
const SUM_ERROR_MAX: f64 = 2e-5;

#[test]
fn logit_reductions_agree_with_rust() {
    let mut noise = Noise(4);
    for vocab in [1, 5, 255, 256, 257, 49_152] {
        for (temperature, k, seed) in [(1.0_f32, 20, 0), (0.7, 5, 1), (1.3, 0, 9)] {
            let rows = 3;
            let logits: Vec<f32> =
                (0..rows * vocab).map(|_| (noise.next() * 3000.0).round() * 0.01).collect();
            let targets = [(vocab / 2) as i32, -1, vocab as i32 - 1];
            let stops = [0_i32, vocab as i32 / 3];
            let mut results = [Reduced::default(); 3];
            let (mut ids, mut top) = (vec![0_u32; rows * k + 1], vec![0.0_f32; rows * k + 1]);
            let inverse = 1.0 / temperature;
            let (l_ptr, t_ptr, s_ptr) = (logits.as_ptr(), targets.as_ptr(), stops.as_ptr());
            let (r_ptr, i_ptr, top_ptr) =
                (results.as_mut_ptr(), ids.as_mut_ptr(), top.as_mut_ptr());
            let (v, n, k32) = (vocab as i32, 2_i32, k as i32);
            let args = args![l_ptr, t_ptr, s_ptr, r_ptr, i_ptr, top_ptr, v, n, k32, inverse];
            launch("emu_reduce_logits", rows, 256, 256 * k * 8, seed, &args);
            for r in 0..rows {
                let (row, got) = (&logits[r * vocab..][..vocab], results[r]);
                let lse = LogSumExp::new(Isa::best(), row, temperature);
                assert_eq!(got.max, lse.max());
                let want = -lse.logprob(got.max);
                assert!((f64::from(got.sum).ln() - want).abs() <= SUM_ERROR_MAX, "{vocab} {got:?}");
                let target = u32::try_from(targets[r]).ok();
                assert_eq!(got.target_rank, target.map_or(0, |t| rank(row, t)));
                let best_stop = stops.iter().map(|s| rank(row, *s as u32)).min();
                assert_eq!(Some(got.stop_rank), best_stop);
                let want = top_k(Isa::best(), row, k);
                let pairs = ids[r * k..].iter().copied().zip(top[r * k..].iter().copied());
                assert_eq!(pairs.take(want.len()).collect::<Vec<_>>(), want, "{vocab} {k}");
            }
        }
    }
}

#[test]
fn a_nan_shows_in_the_sum() {
    let mut logits = vec![0.5_f32; 1000];
    logits[777] = f32::NAN;
    let (targets, stops, mut result) = ([-1_i32], [0_i32], Reduced::default());
    let (l_ptr, t_ptr, s_ptr) = (logits.as_ptr(), targets.as_ptr(), stops.as_ptr());
    let (r_ptr, nothing) = (&raw mut result, std::ptr::null::<u32>());
    let (v, n, k, inverse) = (1000_i32, 0_i32, 0_i32, 1.0_f32);
    let args = args![l_ptr, t_ptr, s_ptr, r_ptr, nothing, nothing, v, n, k, inverse];
    launch("emu_reduce_logits", 1, 256, 0, 0, &args);
    assert!(result.sum.is_nan());
}

fn sanitized(name: &str) {
    let flag = format!("-fsanitize={name}");
    let sources = ["proof.cpp", "logprob.cpp", "check.cpp"];
    let program = compile(&format!("check-{name}"), &[flag.as_str()], &sources);
    let output = Command::new(program).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("0 failed") && !text.contains("WARNING: ThreadSanitizer"), "{text}");
}

#[test]
fn no_access_is_out_of_bounds() {
    sanitized("address");
}

#[test]
fn no_two_threads_race() {
    sanitized("thread");
}
