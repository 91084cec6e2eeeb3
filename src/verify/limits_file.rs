//! Reads and writes the file of [`Limits`]: what they are, and which measurement they come from.
//!
//! `calibrate` writes it from honest pairs ([`super::calibrate`]), `verify` reads it. Limits
//! without the model, the class of miners and the counts that they rest on are refused.

use super::bounds::upper;
use super::evidence::Calibrated;
use super::file::{FileError, read_json, write_json};
use super::limits::Limits;
use crate::files::KeyError;
use crate::proof::codec::{Hash, from_hex, to_hex};
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::Path;

/// Version of the file.
const VERSION: u32 = 2;
/// Bytes of a class's name.
const CLASS_BYTES_MAX: usize = 200;

/// Limits with what they rest on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsFile {
    /// Version of the file.
    pub version: u32,
    /// Hash of the model that was measured, in hexadecimal.
    pub model: String,
    /// Which miners: their stack and hardware, in words.
    pub class: String,
    /// What verification rejects by.
    pub limits: Limits,
    /// What honest miners and the mildest cheat look like over many answers.
    pub rates: Calibrated,
    /// The honest answers that the limits were taken from.
    pub calibration: Measured,
    /// Other honest answers, checked by the limits.
    pub held_out: HeldOut,
}

/// What honest answers measured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Distinct prompts.
    pub prompts: usize,
    /// Answers to these prompts.
    pub answers: usize,
    /// Tokens of all answers together.
    pub tokens: usize,
    /// Energies of chunks of `residue-v1`, where there were any.
    pub energy_u8: Option<ValueSpread>,
    /// Energies of chunks of `residue-v1-u4`, where there were any.
    pub energy_u4: Option<ValueSpread>,
    /// Energies of chunks of both in units of what rounding alone gives them, where the twin was
    /// run.
    #[serde(default)]
    pub energy_rounding: Option<ValueSpread>,
    /// Trimmed means of whole answers of `residue-v1`, where there were any.
    pub trimmed_u8: Option<ValueSpread>,
    /// Trimmed means of whole answers of `residue-v1-u4`, where there were any.
    pub trimmed_u4: Option<ValueSpread>,
    /// The same in units of what rounding moves rows by, of `residue-v1`.
    pub twin_u8: Option<ValueSpread>,
    /// The same of `residue-v1-u4`.
    pub twin_u4: Option<ValueSpread>,
    /// How much of the way that the twin goes honest rows went with it, on average.
    pub twin_share: f64,
    /// Share of tokens with a margin above zero.
    pub mismatch_rate: f64,
    /// Mean margin of a token, clipped.
    pub margin_mean: f64,
    /// Largest margin of a token, clipped.
    pub margin_max: f64,
}

/// How values of honest answers are distributed.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueSpread {
    /// How many values there were.
    pub count: usize,
    /// The arithmetic mean of the values.
    pub mean: f64,
    /// 99.9th percentile: the value that at most one in a thousand exceeds.
    pub p999: f64,
    /// The largest value.
    pub max: f64,
}

impl ValueSpread {
    /// Of values, if there are any.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (count, max) = (values.len(), *values.last()?);
        let rank = (count * 999).div_ceil(1000);
        let mean = values.iter().sum::<f64>() / count as f64;
        Some(Self { count, mean, p999: values[rank.max(1) - 1], max })
    }
}

/// What the limits do to honest answers that they were not taken from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldOut {
    /// Distinct prompts.
    pub prompts: usize,
    /// Answers to these prompts.
    pub answers: usize,
    /// Answers with a chunk above the energy of `residue-v1`.
    pub energy_u8: Share,
    /// Answers with a chunk above the energy of `residue-v1-u4`.
    pub energy_u4: Share,
    /// Answers that are suspicious by the trimmed mean of their rows, which rejects none.
    pub trimmed: Share,
    /// Answers that the twin finds too far, which alone rejects none.
    pub twin: Share,
    /// Answers with a single margin above its limit.
    pub margin: Share,
    /// Answers with a mean margin above its limit.
    pub margin_mean: Share,
    /// Answers that a check of every row or of the fewest rejects, for any of these.
    pub rejected: Share,
}

/// Answers over a limit.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Answers that are over the limit.
    pub over: usize,
    /// Of how many that it applies to.
    pub of: usize,
    /// The false-positive rate that was seen.
    pub rate: f64,
    /// The upper 95 % bound on the true one.
    pub upper95: f64,
}

impl Share {
    /// Counts a share, with its rate and the 95 % upper bound of the true one.
    pub fn new(over: usize, of: usize) -> Self {
        Self { over, of, rate: over as f64 / of.max(1) as f64, upper95: upper(over, of) }
    }
}

/// Any version of the file.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

impl LimitsFile {
    /// The current version of a file, for the model of that hash.
    pub fn new(
        model: &Hash,
        class: &str,
        (limits, rates): (Limits, Calibrated),
        calibration: Measured,
        held_out: HeldOut,
    ) -> Self {
        let (version, model, class) = (VERSION, to_hex(model), class.to_owned());
        Self { version, model, class, limits, rates, calibration, held_out }
    }

    /// Refuses limits of another model than that of hash `model`.
    ///
    /// # Errors
    /// Both hashes.
    pub fn check_model(&self, path: &Path, model: &Hash) -> Result<(), FileError> {
        let (want, got) = (&self.model, to_hex(model));
        match *want == got {
            true => Ok(()),
            false => {
                let what = format!("is {want}, the model that is loaded has {got}");
                Err(FileError::key(path, "model", &what))
            }
        }
    }

    fn check(&self) -> Result<(), KeyError> {
        if self.version != VERSION {
            let what = format!("must be {VERSION}, got {}", self.version);
            return Err(KeyError::new("version", what));
        }
        let canonical = from_hex::<32>(&self.model).map(|hash| to_hex(&hash));
        if canonical.as_ref() != Ok(&self.model) {
            let what = format!("must be 64 lower-case hexadecimal digits, got {:.80}", self.model);
            return Err(KeyError::new("model", what));
        }
        if self.class.is_empty() || self.class.len() > CLASS_BYTES_MAX {
            let what = format!("must have 1 to {CLASS_BYTES_MAX} bytes, got {}", self.class.len());
            return Err(KeyError::new("class", what));
        }
        self.limits.check()?;
        self.rates.check()
    }
}

/// Reads a limits file.
///
/// # Errors
/// The file, the key, the rule and the fact.
pub fn read(path: &Path) -> Result<LimitsFile, FileError> {
    let Versioned { version } = read_json(path)?;
    if version == 1 {
        let what = "1 has limits for single chunks and none for whole answers, which is not \
                    enough any more: run `calibrate --pairs` again";
        return Err(FileError::key(path, "version", what));
    }
    let file: LimitsFile = read_json(path)?;
    file.check().map_err(|e| FileError::new(path, e.to_string()))?;
    Ok(file)
}

/// Refuses to write where another file lies than one of limits: it would be lost.
///
/// # Errors
/// What lies there, and why it is not a limits file.
pub fn check_place(path: &Path) -> Result<(), FileError> {
    if std::fs::symlink_metadata(path).is_err_and(|e| e.kind() == ErrorKind::NotFound) {
        return Ok(());
    }
    read(path).map(|_| ()).map_err(|e| {
        let what = format!("is in the way, remove it: it is not a limits file: {}", e.what);
        FileError::new(path, what)
    })
}

/// Writes a limits file in one piece, in place of an older one if there is one.
///
/// # Errors
/// When a value could not be read back, or the file cannot be written.
pub fn write(path: &Path, file: &LimitsFile) -> Result<(), FileError> {
    file.check().map_err(|e| FileError::new(path, e.to_string()))?;
    check_place(path)?;
    write_json(path, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_not_written_over_what_is_something_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("limits.json");
        check_place(&path).unwrap();
        for other in ["", "{\"version\": 1}", "my notes"] {
            std::fs::write(&path, other).unwrap();
            let error = check_place(&path).unwrap_err().to_string();
            assert!(error.starts_with(&path.display().to_string()), "{error}");
            assert!(error.contains("it is not a limits file"), "{error}");
        }
        assert!(check_place(dir.path()).is_err());
    }
}
