//! The instruction sets, and which of them this CPU has.

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

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Isa::ALL.into_iter().find(|isa| isa.to_string() == name);
        match known {
            Some(isa) if isa.is_available() => Ok(isa),
            Some(isa) => Err(format!("this CPU has no {isa}; it has {:?}", Isa::available())),
            None => Err(format!("unknown instruction set `{name}`; known: {:?}", Isa::ALL)),
        }
    }
}
