//! Computes Philox4x32-10 (Salmon et al., 2011): noise that is a function of a key and a counter.
//!
//! The sampler's noise and the signs of the sketch come from here, so prover and verifier (and a
//! GPU) draw the same bits without any state.

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// 128 bits for a counter.
#[inline(always)]
pub fn philox(key: u64, counter: [u32; 4]) -> [u32; 4] {
    let lanes = philox_lanes::<1>(key, [[counter[0]], [counter[1]], [counter[2]], [counter[3]]]);
    [lanes[0][0], lanes[1][0], lanes[2][0], lanes[3][0]]
}

/// `N` counters at once, word by word; loops over lanes vectorise where it is inlined.
#[inline(always)]
pub fn philox_lanes<const N: usize>(key: u64, counter: [[u32; N]; 4]) -> [[u32; N]; 4] {
    let mut key = [key as u32, (key >> 32) as u32];
    let mut c = counter;
    for _ in 0..ROUNDS {
        for i in 0..N {
            let a = u64::from(MULTIPLIERS[0]) * u64::from(c[0][i]);
            let b = u64::from(MULTIPLIERS[1]) * u64::from(c[2][i]);
            (c[0][i], c[1][i], c[2][i], c[3][i]) = (
                (b >> 32) as u32 ^ c[1][i] ^ key[0],
                b as u32,
                (a >> 32) as u32 ^ c[3][i] ^ key[1],
                a as u32,
            );
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let ones = u32::MAX;
        for (key, counter, want) in [
            (0, [0; 4], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            (u64::MAX, [ones; 4], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                0x299f_31d0_a409_3822,
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(key, counter), want);
        }
    }

    #[test]
    fn lanes_equal_single_counters() {
        let column = |i: u32| [7, i, 0, 3];
        let lanes = philox_lanes::<16>(
            99,
            std::array::from_fn(|w| std::array::from_fn(|i| column(i as u32)[w])),
        );
        for i in 0..16 {
            assert_eq!(philox(99, column(i as u32)), std::array::from_fn(|w| lanes[w][i]));
        }
    }
}
