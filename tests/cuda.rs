//! The launch path of the CUDA kernels through candle: on the driver of `scripts/cuda-check`, which
//! runs the kernels on the CPU, or on a card.

#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, reason = "a test may fail")]

mod common;

use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::sys;
use candle_core::{DType, Device, Tensor};
use common::Noise;
use targon_engine::models::cuda::{ReduceLogits, SketchEntry, SketchRows};
use targon_engine::proof::residue::{Calibration, Profile};

fn device() -> Device {
    let device = Device::new_cuda_with_stream(0).expect("a CUDA driver");
    if let Device::Cuda(cuda) = &device {
        // Before any tensor is made: a capture must not wait on events from outside it.
        unsafe { cuda.disable_event_tracking() };
    }
    device
}

struct Case {
    op: SketchRows,
    reference: SketchRows,
    rows: Tensor,
    table: Tensor,
}

const ROWS: usize = 5;

fn case(device: &Device, profile: Profile) -> Case {
    let (mut noise, channels) = (Noise(5), 576);
    let calibration = Calibration {
        exponents: (0..channels).map(|c| (c % 5) as i8 - 2).collect(),
        means: (0..channels).map(|c| (c % 90) as i16 - 45).collect(),
        shift: 4,
    };
    let values: Vec<f32> = (0..ROWS * channels).map(|_| noise.next() * 6.0).collect();
    let rows = Tensor::from_vec(values, (ROWS, channels), &Device::Cpu).unwrap();
    let entry = |r: usize| SketchEntry {
        sketch_key: 99 + r as u64,
        exact_key: 7,
        position: r as u32 * 1000,
        slot: [3, 1, -1, 0, 4][r],
    };
    let words: Vec<i64> = (0..ROWS).flat_map(|r| entry(r).words()).collect();
    let Device::Cuda(cuda) = device else { panic!("not a CUDA device") };
    Case {
        op: SketchRows::new(calibration.clone(), profile, Some(cuda)).unwrap(),
        reference: SketchRows::new(calibration, profile, None).unwrap(),
        rows: rows.to_dtype(DType::BF16).unwrap(),
        table: Tensor::from_vec(words, (ROWS, 3), &Device::Cpu).unwrap(),
    }
}

fn results(device: &Device) -> Tensor {
    Tensor::zeros(SketchRows::result_words(ROWS), DType::I64, device).unwrap()
}

#[test]
fn sketches_through_candle_equal_the_reference() {
    let device = device();
    for profile in [Profile::U8, Profile::U4] {
        let Case { op, reference, rows, table } = case(&device, profile);
        let want = results(&Device::Cpu);
        want.inplace_op3(&rows, &table, &reference).unwrap();
        let got = results(&device);
        let (rows, table) = (rows.to_device(&device).unwrap(), table.to_device(&device).unwrap());
        got.inplace_op3(&rows, &table, &op).unwrap();
        assert_eq!(got.to_vec1::<i64>().unwrap(), want.to_vec1::<i64>().unwrap(), "{profile:?}");
    }
}

#[test]
fn a_captured_graph_replays_the_sketch() {
    let device = device();
    let Case { op, rows, table, .. } = case(&device, Profile::U8);
    let (rows, table) = (rows.to_device(&device).unwrap(), table.to_device(&device).unwrap());
    let out = results(&device);
    // Once before the capture: modules may not be loaded inside it.
    out.inplace_op3(&rows, &table, &op).unwrap();
    let want = out.to_vec1::<i64>().unwrap();
    let Device::Cuda(cuda) = &device else { unreachable!() };
    let stream = cuda.cuda_stream();
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).w().unwrap();
    out.inplace_op3(&rows, &table, &op).unwrap();
    let flags = unsafe { std::mem::transmute::<u32, sys::CUgraphInstantiate_flags>(1) };
    let graph = stream.end_capture(flags).w().unwrap().unwrap();
    // Other keys overwrite the results; the replay must bring the first ones back.
    let words: Vec<i64> = (0..ROWS as u64)
        .flat_map(|r| {
            SketchEntry { sketch_key: r, exact_key: r, position: 1, slot: r as i32 }.words()
        })
        .collect();
    let other = Tensor::from_vec(words, (ROWS, 3), &Device::Cpu).unwrap();
    out.inplace_op3(&rows, &other.to_device(&device).unwrap(), &op).unwrap();
    assert_ne!(out.to_vec1::<i64>().unwrap(), want);
    graph.launch().w().unwrap();
    let replayed = out.to_vec1::<i64>().unwrap();
    // Slot 2 belongs to no row of the captured table.
    let of = |v: &[i64]| [v[0], v[1], v[3], v[4], v[5]];
    assert_eq!(of(&replayed), of(&want));
}

#[test]
fn logit_reductions_through_candle_agree_with_the_reference() {
    let device = device();
    let (mut noise, rows, vocab) = (Noise(6), 3, 1_000);
    let op = ReduceLogits::new(5, 0.8);
    let values: Vec<f32> = (0..rows * vocab).map(|_| noise.next() * 20.0).collect();
    let logits = Tensor::from_vec(values, (rows, vocab), &Device::Cpu).unwrap();
    let targets = Tensor::from_vec(vec![5_i32, -1, 999], rows, &Device::Cpu).unwrap();
    let run = |device: &Device| -> Vec<u32> {
        let out = Tensor::zeros(op.result_words(rows), DType::U32, device).unwrap();
        let (logits, targets) =
            (logits.to_device(device).unwrap(), targets.to_device(device).unwrap());
        out.inplace_op3(&logits, &targets, &op).unwrap();
        out.to_vec1().unwrap()
    };
    let (got, want) = (run(&device), run(&Device::Cpu));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        if i < rows * 5 && i % 5 == 1 {
            let (got, want) = (f32::from_bits(*got), f32::from_bits(*want));
            assert!((got / want - 1.0).abs() <= 2e-5, "sum {got} {want}");
        } else {
            assert_eq!(got, want, "word {i}");
        }
    }
}
