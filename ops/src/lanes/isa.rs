//! Names the instruction sets, and finds which of them this CPU has.

use super::super::amx::support::{TilesError, usable};
use super::super::amx::unit::Tiles;
use std::fmt;
use std::str::FromStr;

/// An instruction set that this CPU has, for its kernels. All give equal bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Isa(Set);

/// The instruction sets that kernels are compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Set {
    /// AVX-512, and the bf16 tiles of AMX for products.
    Amx,
    /// AVX-512 as below, and its BF16 for products.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ and VL, with FMA and F16C.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Arm NEON.
    Neon,
    /// Plain Rust; the reference.
    Scalar,
}

impl Isa {
    /// Plain Rust, which every CPU runs; the reference.
    pub const SCALAR: Isa = Isa(Set::Scalar);

    /// The fastest set this CPU has.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    /// Every set this CPU has, fastest first; never empty.
    pub fn available() -> Vec<Isa> {
        Set::ALL.into_iter().filter(|set| set.is_available()).map(Isa).collect()
    }

    /// Every set that this CPU has, and AMX: in software where the CPU has AVX-512 and no tiles.
    #[cfg(test)]
    pub(crate) fn available_and_emulated() -> Vec<Isa> {
        let mut sets = Isa::available();
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if matches!(sets[0].0, Set::Avx512Bf16 | Set::Avx512) {
            super::super::amx::emulated::install();
            sets.push(Isa(Set::Amx));
        }
        sets
    }

    /// The tiles of this thread, for products of bf16 values.
    pub fn tiles(self) -> Option<Tiles> {
        // SAFETY: this set is only made where they were found usable.
        (self.0 == Set::Amx).then(|| unsafe { Tiles::new() })
    }

    /// Whether it has tiles.
    pub fn has_tiles(self) -> bool {
        self.0 == Set::Amx
    }

    /// Whether products of bf16 values use VDPBF16PS.
    pub fn has_dot(self) -> bool {
        match self.0 {
            Set::Avx512Bf16 => true,
            #[cfg(target_arch = "x86_64")]
            Set::Amx => super::dot::is_usable(),
            _ => false,
        }
    }

    pub(super) fn set(self) -> Set {
        self.0
    }
}

impl Set {
    const ALL: [Set; 6] =
        [Set::Amx, Set::Avx512Bf16, Set::Avx512, Set::Avx2, Set::Neon, Set::Scalar];

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        let fma = is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        match self {
            Set::Amx => Set::Avx512.is_available() && usable().is_ok(),
            Set::Avx512Bf16 => super::dot::is_usable(),
            Set::Avx512 => {
                fma && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            Set::Avx2 => fma && is_x86_feature_detected!("avx2"),
            Set::Neon => false,
            Set::Scalar => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        match self {
            Set::Neon => cfg!(target_arch = "aarch64"),
            Set::Scalar => true,
            Set::Amx | Set::Avx512Bf16 | Set::Avx512 | Set::Avx2 => false,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Set::Amx => "amx",
            Set::Avx512Bf16 => "avx512-bf16",
            Set::Avx512 => "avx512",
            Set::Avx2 => "avx2",
            Set::Neon => "neon",
            Set::Scalar => "scalar",
        })
    }
}

/// A name that does not name an instruction set of this CPU.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IsaError {
    /// Tiles cannot be used.
    #[error("amx cannot be used: {0}; it has {available}", available = names(&Isa::available()))]
    Tiles(TilesError),
    /// VDPBF16PS does not compute the canon.
    #[error(
        "avx512-bf16 is not used: this CPU's VDPBF16PS gives other bits than the canon; it has {}",
        names(&Isa::available())
    )]
    Dot,
    /// This CPU lacks it.
    #[error("this CPU has no {0}; it has {available}", available = names(&Isa::available()))]
    Missing(String),
    /// No instruction set has this name.
    #[error("unknown instruction set `{0}`; known: {all}", all = names(&Set::ALL))]
    Unknown(String),
}

fn names(sets: &[impl fmt::Display]) -> String {
    sets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        match Set::ALL.into_iter().find(|set| set.to_string() == name) {
            Some(set) if set.is_available() => Ok(Isa(set)),
            Some(set) => Err(match (set, usable()) {
                (Set::Amx, Err(why)) => IsaError::Tiles(why),
                #[cfg(target_arch = "x86_64")]
                (Set::Avx512Bf16, _) if super::dot::is_there() => IsaError::Dot,
                _ => IsaError::Missing(set.to_string()),
            }),
            None => Err(IsaError::Unknown(name.to_owned())),
        }
    }
}
