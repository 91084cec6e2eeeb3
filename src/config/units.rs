//! Parses sizes with units: `4 GiB`, `60%`, `auto`.

use crate::engine::plan::KvMemory;

/// A text that cannot be read as a quantity.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnitError {
    /// Neither a size nor a share.
    #[error("must be a size such as \"4 GiB\", a share such as \"60%\", or \"auto\", got \"{0}\"")]
    Memory(String),
    /// A share of nothing, or of more than all.
    #[error("a share must lie above 0% and up to 100%, got {0}")]
    Share(String),
    /// The text cannot be read as a size.
    #[error("must be a size such as \"8 MiB\", got \"{0}\"")]
    Size(String),
}

/// Reads the memory of a KV cache.
///
/// # Errors
/// The rule and the fact.
pub fn kv_memory(text: &str) -> Result<KvMemory, UnitError> {
    let text = text.trim();
    if text == "auto" {
        return Ok(KvMemory::Auto);
    }
    if let Some(number) = text.strip_suffix('%') {
        let percent: f64 = number.trim().parse().map_err(|_| UnitError::Memory(text.to_owned()))?;
        if !(percent > 0.0 && percent <= 100.0) {
            return Err(UnitError::Share(text.to_owned()));
        }
        return Ok(KvMemory::Share(percent / 100.0));
    }
    bytes(text).map(KvMemory::Bytes).ok_or_else(|| UnitError::Memory(text.to_owned()))
}

/// Reads a size that fits in memory.
///
/// # Errors
/// The rule and the fact.
pub fn size(text: &str) -> Result<usize, UnitError> {
    let size = bytes(text.trim()).and_then(|b| usize::try_from(b).ok()).filter(|b| *b > 0);
    size.ok_or_else(|| UnitError::Size(text.to_owned()))
}

/// A number of bytes with its unit.
fn bytes(text: &str) -> Option<u64> {
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "KB" | "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return None,
    };
    let number: f64 = number.trim().parse().ok()?;
    let total = number * factor as f64;
    (1.0..1e18).contains(&total).then_some(total as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_shares_and_auto() {
        assert_eq!(kv_memory("auto"), Ok(KvMemory::Auto));
        assert_eq!(kv_memory("4 GiB"), Ok(KvMemory::Bytes(4 << 30)));
        assert_eq!(kv_memory("1.5GiB"), Ok(KvMemory::Bytes(3 << 29)));
        assert_eq!(kv_memory("500 MB"), Ok(KvMemory::Bytes(500_000_000)));
        assert_eq!(kv_memory("60%"), Ok(KvMemory::Share(0.6)));
        for bad in ["", "4", "GiB", "-1 GiB", "0%", "120%", "4 gigs", "nan GiB"] {
            assert!(kv_memory(bad).is_err(), "{bad}");
        }
    }
}
