//! Sketches and exact hashes: `proof.cu` against `proof/residue.rs`.

use super::{args, kernels};
use crate::common::Noise;
use std::ffi::c_void;
use targon_engine::ops::dtype::Dtype;
use targon_engine::proof::residue::{Calibration, ResidueBits, exact_hash, sketch};

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
        for (profile, projections, shift) in [(ResidueBits::U8, 4, 4_i32), (ResidueBits::U4, 8, 6)]
        {
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
                kernels().launch("sketch_rows", [rows as u32, 1, 1], 128, 0, seed, &args);
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
