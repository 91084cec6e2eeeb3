//! The pass on NVIDIA cards against the CPU's, bit for bit, on the stand-in driver of
//! `scripts/cuda-check`, which runs the kernels on the CPU. Nothing here has run on a card.
//!
//! The stand-in driver has eight devices. Tests that break or count something have one of their
//! own: 0 is for everybody, 1 for engines, 2 is broken, 3 and 6 are counted, 4 is too old, 5 too
//! small, 7 is lost under an engine.

#![allow(
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    reason = "a test may fail; the stand-in driver's own functions take plain numbers"
)]

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod bench;
mod captures;
mod devices;
mod engine;
mod failures;
mod families;
mod opening;
mod shared;
mod tensor;
mod verify;

use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::cpu::CpuPass;
use targon_engine::models::cuda::{Card, CudaPass, CudaWeights};
use targon_engine::models::pass::{Batch, Pass, RowAsk, RowResult};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

/// What the stand-in driver counts, by device.
#[derive(Clone, Copy)]
enum Counter {
    Launches,
    Syncs,
    CopiesToHost,
    CopiesToDevice,
    GraphLaunches,
    Attributes = 6,
    ContextSyncs,
}

fn driver() -> &'static libloading::Library {
    static DRIVER: OnceLock<libloading::Library> = OnceLock::new();
    DRIVER.get_or_init(|| unsafe { libloading::Library::new("libcuda.so.1") }.unwrap())
}

fn count(device: i32, counter: Counter) -> i32 {
    type Count = unsafe extern "C" fn(i32, i32) -> i32;
    unsafe { driver().get::<Count>(b"fake_cuda_count").unwrap()(device, counter as i32) }
}

/// The launch of `kernel` (any where it is empty) after `after` others fails with `code`.
fn fail(device: i32, kernel: &str, after: i32, code: i32) {
    type Fail = unsafe extern "C" fn(i32, *const c_char, i32, i32) -> i32;
    let kernel = CString::new(kernel).unwrap();
    unsafe {
        driver().get::<Fail>(b"fake_cuda_fail").unwrap()(device, kernel.as_ptr(), after, code)
    };
}

/// The next capture that has so many launches is disturbed: another thread waits for the context.
fn disturb(device: i32, launches: i32) {
    type Disturb = unsafe extern "C" fn(i32, i32) -> i32;
    unsafe { driver().get::<Disturb>(b"fake_cuda_disturb").unwrap()(device, launches) };
}

/// From now on a device has only so many bytes more than are in use.
fn leave(device: i32, bytes: usize) {
    type Leave = unsafe extern "C" fn(i32, usize) -> i32;
    unsafe { driver().get::<Leave>(b"fake_cuda_leave").unwrap()(device, bytes) };
}

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(family)
}

/// One model on both devices, its passes in step.
struct Pair {
    cpu: CpuPass,
    card: CudaPass,
    vocab: usize,
    hidden: usize,
    /// Answers that were compared.
    compared: usize,
}

impl Pair {
    fn new(path: &Path, dtype: Option<Dtype>, device: usize, blocks: usize) -> Self {
        let pool = Pool::new(2, Isa::best()).unwrap();
        let checkpoint = Checkpoint::open(path).unwrap();
        let decoder = Arc::new(common::decoder(&checkpoint, dtype, &pool).unwrap());
        let (spec, dtype) = (&decoder.spec, decoder.dtype);
        let card = Card::open(device).unwrap();
        let weights = CudaWeights::load(&card, &checkpoint, spec, dtype, &pool, |_, _| {}).unwrap();
        Self {
            vocab: spec.vocab,
            hidden: spec.hidden,
            card: CudaPass::new(&Arc::new(weights), &pool, blocks).unwrap(),
            cpu: CpuPass::new(&decoder, &pool, blocks).unwrap(),
            compared: 0,
        }
    }

    /// The answers of both.
    fn both(&mut self, batch: &Batch, asks: &[RowAsk<'_>]) -> [Vec<RowResult>; 2] {
        [self.card.step(batch, asks).unwrap(), self.cpu.step(batch, asks).unwrap()]
    }

    /// A step whose answers must be equal.
    fn step(&mut self, batch: &Batch, asks: &[RowAsk<'_>], place: &str) {
        let [got, want] = self.both(batch, asks);
        assert_eq!(got.len(), asks.len());
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(is_same(got, want), "{place}: ask {i}\n{got:?}\n{want:?}");
            assert!(want.is_ok(), "{place}: {want:?}");
        }
        self.compared += got.len();
    }
}

/// Equal to the bit: numbers are written so that they can be read back, signs of zeros included.
fn is_same(got: &RowResult, want: &RowResult) -> bool {
    format!("{got:?}") == format!("{want:?}")
}
