//! Names which arithmetic is in force, and over how many samples.

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
pub enum ScoringProfile {
    /// This program's own arithmetic.
    #[serde(rename = "default")]
    Default,
    /// Targon 4.4's.
    #[serde(rename = "targon-4.4")]
    Targon44,
}

impl fmt::Display for ScoringProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ScoringProfile::Default => "default",
            ScoringProfile::Targon44 => "targon-4.4",
        })
    }
}

impl FromStr for ScoringProfile {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "default" => Ok(ScoringProfile::Default),
            "targon-4.4" => Ok(ScoringProfile::Targon44),
            _ => Err(anyhow!("a scoring profile is `default` or `targon-4.4`, got `{text}`")),
        }
    }
}

/// What is in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScoringRules {
    /// The arithmetic that weights are decided by.
    pub profile: ScoringProfile,
    /// The newest samples of a miner and model that count.
    pub window: usize,
}

impl ScoringRules {
    /// A profile with its own window.
    pub fn of(profile: ScoringProfile) -> Self {
        let window = match profile {
            ScoringProfile::Default => WINDOW_TARGON_442,
            ScoringProfile::Targon44 => WINDOW_TARGON_441,
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
