//! Defines what goes wrong between this program and an NVIDIA card.

use crate::models::error::LoadError;
use crate::models::pass::PassFault;
use std::ops::RangeInclusive;

/// Why a card cannot be used, or stopped working.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CudaError {
    /// No driver library.
    #[error("no NVIDIA driver: libcuda.so.1 could not be loaded")]
    NoDriver,
    /// The driver is there and does not work: the machine may have cards.
    #[error("the NVIDIA driver does not work: {call} says {text} (error {code})")]
    Driver {
        /// The call of the driver that failed.
        call: &'static str,
        /// The driver's number for it.
        code: u32,
        /// What the driver says of its error.
        text: String,
    },
    /// A number that no card has.
    #[error("cuda:{ordinal}: the driver knows {count} cards")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The driver cannot compile the kernels.
    #[error(
        "the NVIDIA driver knows CUDA {}.{}, the kernels are PTX of CUDA {}.{}: install driver 580 \
         or newer",
        have / 1000, have % 1000 / 10, need / 1000, need % 1000 / 10
    )]
    OldDriver {
        /// CUDA's version as the driver reports it: 1000 major + 10 minor.
        have: u32,
        /// The version that is needed.
        need: u32,
    },
    /// The card is older than the kernels.
    #[error("cuda:{ordinal} ({name}) has compute capability {}.{}, the kernels need 8.0",
            capability.0, capability.1)]
    Architecture {
        /// Number of the card.
        ordinal: usize,
        /// The name that the driver gives it.
        name: String,
        /// Major and minor version.
        capability: (i32, i32),
    },
    /// A shape that a kernel was not made for.
    #[error("{0}")]
    Shape(String),
    /// The card's memory is full.
    #[error("cuda:{ordinal} has no memory for {what}: {needed} bytes are needed, {free} are free")]
    OutOfMemory {
        /// Number of the card.
        ordinal: usize,
        /// What it was for.
        what: &'static str,
        /// Bytes that were asked for.
        needed: usize,
        /// Bytes that are free.
        free: usize,
    },
    /// The driver refused one call; the next may succeed.
    #[error("cuda:{ordinal} refused {call}: {text} (error {code})")]
    Refused {
        /// Number of the card.
        ordinal: usize,
        /// A kernel or a function of the driver.
        call: &'static str,
        /// The driver's number for it.
        code: u32,
        /// What the driver says of its error.
        text: String,
    },
    /// The card's state is lost to this process; models on it cannot go on.
    #[error("cuda:{ordinal} is lost to this process at {call}: {text} (error {code})")]
    Lost {
        /// Number of the card.
        ordinal: usize,
        /// The call of the driver that failed.
        call: &'static str,
        /// The driver's number for it.
        code: u32,
        /// What the driver says of its error.
        text: String,
    },
}

/// What the driver says of a capture that it refuses or that something else made invalid.
const CAPTURE_CODES: RangeInclusive<u32> = 900..=907;

impl CudaError {
    /// Whether it is the capture that failed: the same launches may succeed without one.
    pub(super) fn is_of_capture(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if CAPTURE_CODES.contains(code))
    }
}

impl From<CudaError> for PassFault {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::OutOfMemory { .. } => PassFault::Memory(error.into()),
            CudaError::Lost { .. } => PassFault::Lost(error.into()),
            _ => PassFault::Device(error.into()),
        }
    }
}

impl From<CudaError> for LoadError {
    fn from(error: CudaError) -> Self {
        LoadError::Device(error.into())
    }
}
