//! Which arithmetic is in force, and over how many samples.

use anyhow::anyhow;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Samples of one miner and model that count, oldest left out: Targon up to 4.4.1.
pub const WINDOW_TARGON_441: usize = 15;
/// The same in Targon 4.4.2, and of ours.
pub const WINDOW_TARGON_442: usize = 30;
/// The longest window that can be asked for.
pub const WINDOW_MAX: usize = 1000;

/// Which arithmetic.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Profile {
    /// Ours.
    #[serde(rename = "default")]
    Default,
    /// Targon 4.4's.
    #[serde(rename = "targon-4.4")]
    Targon44,
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Profile::Default => "default",
            Profile::Targon44 => "targon-4.4",
        })
    }
}

impl FromStr for Profile {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "default" => Ok(Profile::Default),
            "targon-4.4" => Ok(Profile::Targon44),
            _ => Err(anyhow!("a scoring profile is `default` or `targon-4.4`, got `{text}`")),
        }
    }
}

/// What is in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rules {
    /// The arithmetic.
    pub profile: Profile,
    /// The newest samples of a miner and model that count.
    pub window: usize,
}

impl Rules {
    /// A profile with its own window.
    pub fn of(profile: Profile) -> Self {
        let window = match profile {
            Profile::Default => WINDOW_TARGON_442,
            Profile::Targon44 => WINDOW_TARGON_441,
        };
        Self { profile, window }
    }

    /// The same with another window.
    ///
    /// # Errors
    /// Rule and fact, where it is none or too long.
    pub fn with_window(self, window: usize) -> anyhow::Result<Self> {
        match (1..=WINDOW_MAX).contains(&window) {
            true => Ok(Self { window, ..self }),
            false => Err(anyhow!("a window must have 1 to {WINDOW_MAX} samples, got {window}")),
        }
    }
}
