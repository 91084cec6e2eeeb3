//! Reads prices of devices from a file with dates, and computes what tokens cost at them.

use crate::files;
use anyhow::{anyhow, bail};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What an hour of a device cost on a date.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// A device of the table.
    pub device: String,
    /// In dollars an hour, for one device.
    pub per_hour: f64,
    /// When that was asked: YYYY-MM-DD.
    pub date: String,
    /// Where the price was found.
    pub source: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    price: Vec<Price>,
}

/// Bytes of a file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Reads `[[price]]` entries.
///
/// # Errors
/// A file that cannot be read, or an entry that is wrong, by name.
pub fn read(path: &Path) -> anyhow::Result<Vec<Price>> {
    let place = path.display();
    let bytes = files::read(path, FILE_BYTES_MAX);
    let bytes = bytes.map_err(|e| anyhow!("{place} cannot be read: {e}"))?;
    let text = String::from_utf8(bytes).map_err(|_| anyhow!("{place} is not text"))?;
    parse(&text).map_err(|what| anyhow!("{place}: {what}"))
}

fn parse(text: &str) -> anyhow::Result<Vec<Price>> {
    let file: File = toml::from_str(text).map_err(|e| anyhow!(files::toml_fault(text, &e)))?;
    if file.price.is_empty() {
        bail!("it has no `[[price]]` entry");
    }
    for (index, price) in file.price.iter().enumerate() {
        let Price { device, per_hour, date, .. } = price;
        if !(per_hour.is_finite() && *per_hour > 0.0) {
            bail!("price of {device}: `per_hour` must be over 0, got {per_hour}");
        }
        if date.parse::<jiff::civil::Date>().is_err() {
            bail!("price of {device}: `date` must be YYYY-MM-DD, got {date}");
        }
        if file.price[..index].iter().any(|p| p.device == *device) {
            bail!("there are two prices of {device}");
        }
    }
    Ok(file.price)
}

/// Dollars for a million tokens at `tokens_per_second`, where an hour costs `per_hour`.
pub fn per_million(per_hour: f64, tokens_per_second: f64) -> f64 {
    per_hour / 3600.0 / tokens_per_second * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_are_read_and_faults_are_named() {
        let good = "[[price]]\ndevice = \"h200\"\nper_hour = 3.5\ndate = \"2026-11-01\"\n";
        assert_eq!(parse(good).unwrap()[0].per_hour, 3.5);
        for (text, want) in [
            (good.replace("3.5", "0"), "`per_hour` must be over 0, got 0"),
            (good.replace("3.5", "nan"), "`per_hour` must be over 0, got NaN"),
            (good.replace("2026-11-01", "yesterday"), "`date` must be YYYY-MM-DD, got yesterday"),
            (good.repeat(2), "two prices of h200"),
            (good.replace("date", "day"), "line 4: unknown field `day`"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn a_million_tokens_cost_their_time() {
        // 1,000 tokens/s are 3.6 million an hour.
        assert!((per_million(3.6, 1000.0) - 1.0).abs() < 1e-12);
    }
}
