//! Names the instruction sets, and finds which of them this CPU has.

use std::fmt;
use std::str::FromStr;

/// Instruction set of the CPU kernels. All give equal bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Isa {
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Arm NEON.
    Neon,
    /// Plain Rust; the reference.
    Scalar,
}

impl Isa {
    const ALL: [Isa; 4] = [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Scalar];

    /// The fastest set this CPU has.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    /// Every set this CPU has, fastest first; never empty.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn is_available(self) -> bool {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        match self {
            Isa::Avx512 => avx512,
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Isa::Neon => false,
            Isa::Scalar => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn is_available(self) -> bool {
        match self {
            Isa::Neon => cfg!(target_arch = "aarch64"),
            Isa::Scalar => true,
            Isa::Avx512 | Isa::Avx2 => false,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Scalar => "scalar",
        })
    }
}

/// A name that is no instruction set of this CPU.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IsaError {
    /// This CPU lacks it.
    #[error("this CPU has no {0}; it has {available}", available = names(&Isa::available()))]
    Missing(Isa),
    /// No instruction set has this name.
    #[error("unknown instruction set `{0}`; known: {all}", all = names(&Isa::ALL))]
    Unknown(String),
}

fn names(sets: &[Isa]) -> String {
    sets.iter().map(Isa::to_string).collect::<Vec<_>>().join(", ")
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        let known = Isa::ALL.into_iter().find(|isa| isa.to_string() == name);
        match known {
            Some(isa) if isa.is_available() => Ok(isa),
            Some(isa) => Err(IsaError::Missing(isa)),
            None => Err(IsaError::Unknown(name.to_owned())),
        }
    }
}
