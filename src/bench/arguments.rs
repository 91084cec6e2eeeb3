//! Reads the arguments of a bench target: words in order, and flags, some with a value.

use anyhow::{Context, anyhow};
use std::fmt::Display;
use std::str::FromStr;

/// Arguments that are taken one by one.
pub struct BenchArgs(Vec<String>);

impl BenchArgs {
    /// Those of this process, without the `--bench` that cargo adds.
    pub fn of_process() -> Self {
        Self(std::env::args().skip(1).filter(|arg| arg != "--bench").collect())
    }

    /// Those of a line of text.
    #[cfg(test)]
    pub(super) fn of(text: &str) -> Self {
        Self(text.split(' ').map(str::to_owned).collect())
    }

    /// Whether the flag is there.
    pub(super) fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|arg| arg == flag)
    }

    /// Takes a flag with its value, if it is there.
    ///
    /// # Errors
    /// The flag, and what is wrong with its value.
    pub(super) fn value<T: FromStr<Err: Display>>(
        &mut self,
        flag: &str,
    ) -> anyhow::Result<Option<T>> {
        let Some(at) = self.0.iter().position(|arg| arg == flag) else { return Ok(None) };
        self.0.remove(at);
        if at == self.0.len() {
            return Err(anyhow!("{flag} needs a value"));
        }
        let value = self.0.remove(at);
        value.parse().map(Some).map_err(|e| anyhow!("{flag} {e}, got {value}"))
    }

    /// Takes the next word that is no flag. Values of flags are taken before.
    pub fn word(&mut self) -> Option<String> {
        let at = self.0.iter().position(|arg| !arg.starts_with("--"))?;
        Some(self.0.remove(at))
    }

    /// Takes the next word as the number that `what` names; `otherwise` where there is none.
    ///
    /// # Errors
    /// What is no number.
    pub(super) fn number(&mut self, what: &str, otherwise: usize) -> anyhow::Result<usize> {
        let Some(word) = self.word() else { return Ok(otherwise) };
        word.parse().with_context(|| format!("{what} must be a whole number, got {word}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_flags_may_be_mixed() {
        let args = BenchArgs::of;
        let mut mixed = args("--device cuda m.gguf --json 4 x");
        assert_eq!(mixed.value::<String>("--device").unwrap().as_deref(), Some("cuda"));
        assert_eq!(mixed.value::<u64>("--seconds").unwrap(), None);
        assert!(mixed.has("--json") && !mixed.has("--dry"));
        assert_eq!(mixed.word().as_deref(), Some("m.gguf"));
        assert_eq!(mixed.number("PROMPTS", 9).unwrap(), 4);
        let wrong = mixed.number("HONEST", 9).unwrap_err().to_string();
        assert_eq!(wrong, "HONEST must be a whole number, got x");
        assert_eq!(mixed.number("HONEST", 9).unwrap(), 9);
        assert!(args("--device").value::<String>("--device").is_err());
        let wrong = args("--seconds -1").value::<u64>("--seconds").unwrap_err().to_string();
        assert!(wrong.starts_with("--seconds ") && wrong.ends_with(", got -1"), "{wrong}");
    }
}
