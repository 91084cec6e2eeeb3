//! Names the device that computes a model, and finds the cards of this machine.

use std::fmt;
use std::str::FromStr;

/// Where a model is computed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub enum Device {
    /// The first NVIDIA card where there is one that this build can use, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The NVIDIA card of this number.
    Cuda(usize),
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There is none of this name.
    #[error("must be auto, cpu or cuda:N, got {0}")]
    Name(String),
    /// This program was built without kernels for cards.
    #[error("{0} needs a build with the feature `cuda`; this build does not have it")]
    NotBuilt(Device),
    /// The card is not there, or does not work.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Card(#[from] super::cuda::CudaError),
}

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            other => match other.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(number)) if cfg!(feature = "cuda") => Ok(Self::Cuda(number)),
                Some(Ok(number)) => Err(DeviceError::NotBuilt(Self::Cuda(number))),
                _ => Err(DeviceError::Name(other.to_owned())),
            },
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl Device {
    /// The device that `auto` stands for on this machine; any other is itself. Why a card is not
    /// used is logged, once.
    pub fn resolved(self) -> Self {
        match self {
            Self::Auto => best(),
            other => other,
        }
    }

    /// Bytes that a card has free; `None` for the processor.
    ///
    /// # Errors
    /// When there is no such card, or it does not work.
    pub fn free_memory(self) -> Result<Option<u64>, DeviceError> {
        match self.resolved() {
            Self::Cuda(number) => free(number).map(Some),
            _ => Ok(None),
        }
    }
}

/// The devices by name.
pub fn names(devices: impl IntoIterator<Item = Device>) -> String {
    devices.into_iter().map(|device| device.to_string()).collect::<Vec<_>>().join(", ")
}

/// A card that works.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CardMemory {
    /// The maker's name of it.
    pub name: String,
    /// Bytes that nobody uses.
    pub free: u64,
    /// Bytes of the card's memory.
    pub total: u64,
}

/// The cards of this machine.
#[derive(Debug)]
pub enum Cards {
    /// This build cannot use any.
    NotBuilt,
    /// There is no driver, or none that can be used: why.
    Unusable(String),
    /// Each with its memory, or why it cannot be used.
    Known(Vec<(Device, Result<CardMemory, DeviceError>)>),
}

/// Opens every card, which may take seconds for each.
#[cfg(feature = "cuda")]
pub fn cards() -> Cards {
    use super::cuda::{Card, CudaError, cards};
    let look = |number| -> Result<CardMemory, CudaError> {
        let card = Card::open(number)?;
        let (free, total) = card.memory()?;
        Ok(CardMemory { name: card.name().to_owned(), free: free as u64, total: total as u64 })
    };
    match cards() {
        Ok(count) => {
            let card = |number| (Device::Cuda(number), look(number).map_err(DeviceError::from));
            Cards::Known((0..count).map(card).collect())
        }
        Err(why) => Cards::Unusable(why.to_string()),
    }
}

/// Opens every card that this build can use: none.
#[cfg(not(feature = "cuda"))]
pub fn cards() -> Cards {
    Cards::NotBuilt
}

#[cfg(feature = "cuda")]
fn best() -> Device {
    use super::cuda::{Card, CudaError};
    use std::sync::OnceLock;
    static BEST: OnceLock<Device> = OnceLock::new();
    *BEST.get_or_init(|| match Card::open(0) {
        Ok(card) => {
            tracing::info!(card = card.name(), "computing on cuda:0");
            Device::Cuda(0)
        }
        Err(why @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
            tracing::info!("computing on the processor: {why}");
            Device::Cpu
        }
        Err(why) => {
            tracing::warn!("computing on the processor: {why}");
            Device::Cpu
        }
    })
}

#[cfg(not(feature = "cuda"))]
fn best() -> Device {
    Device::Cpu
}

#[cfg(feature = "cuda")]
fn free(number: usize) -> Result<u64, DeviceError> {
    let (free, _) = super::cuda::Card::open(number)?.memory()?;
    Ok(free as u64)
}

#[cfg(not(feature = "cuda"))]
fn free(number: usize) -> Result<u64, DeviceError> {
    Err(DeviceError::NotBuilt(Device::Cuda(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for name in ["auto", "cpu"] {
            assert_eq!(name.parse::<Device>().unwrap().to_string(), name);
        }
        let card = "cuda:3".parse::<Device>();
        match cfg!(feature = "cuda") {
            true => assert_eq!(card.unwrap().to_string(), "cuda:3"),
            false => {
                let refused = card.unwrap_err().to_string();
                let said =
                    "cuda:3 needs a build with the feature `cuda`; this build does not have it";
                assert_eq!(refused, said);
            }
        }
        for wrong in ["", "cuda", "cuda:", "cuda:x", "cuda:-1", "gpu", "CPU"] {
            let error = wrong.parse::<Device>().unwrap_err().to_string();
            assert!(error.contains("auto, cpu or cuda:N"), "{error}");
        }
    }
}
