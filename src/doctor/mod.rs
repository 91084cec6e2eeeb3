//! Checks everything that a miner or validator depends on: machine, clock, wallet, chain, ports,
//! model files.
//!
//! Each part gives [`Finding`]s: the fact, how severe it is, and what to do. Nothing is changed,
//! nothing is downloaded, and no password is asked for.

mod kept;
pub mod machine;
pub mod membership;
pub mod miner;
pub mod models;
pub mod network;
pub mod wallet;

use serde::Serialize;

/// How bad a finding is, from best to worst.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// Works, but worse than it could, or not for long.
    Warning,
    /// Does not work.
    Fault,
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// What was looked at: `cpu`, `wallet`, `model NAME`.
    pub topic: String,
    /// How bad it is.
    pub level: Level,
    /// What was seen, with its numbers.
    pub fact: String,
    /// Advice on how to mend it.
    pub hint: Option<String>,
}

impl Finding {
    /// A finding without advice.
    pub fn new(topic: impl Into<String>, level: Level, fact: impl Into<String>) -> Self {
        Self { topic: topic.into(), level, fact: fact.into(), hint: None }
    }

    /// The same with advice.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// The worst level among findings; [`Level::Ok`] where there are none.
pub fn worst(findings: &[Finding]) -> Level {
    findings.iter().map(|f| f.level).max().unwrap_or(Level::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_counts() {
        let of = |levels: &[Level]| {
            worst(&levels.iter().map(|l| Finding::new("x", *l, "y")).collect::<Vec<_>>())
        };
        assert_eq!(of(&[]), Level::Ok);
        assert_eq!(of(&[Level::Ok, Level::Fault, Level::Warning]), Level::Fault);
        assert_eq!(of(&[Level::Warning, Level::Note]), Level::Warning);
    }
}
