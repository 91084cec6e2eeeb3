//! Opens the files of a GGUF checkpoint: one, or the parts that a split made of it.
//!
//! Parts are named `NAME-00001-of-00003.gguf`. The first holds the metadata; each says which it is
//! (`split.no`, from 0), of how many (`split.count`), and how many tensors all have together.

use super::header::{Described, Header, Value};
use crate::models::error::LoadError;
use crate::models::tensor::{StoredType, Tensor};
use crate::models::weight_file::WeightFile;
use candle_core::quantized::GgmlDType;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Parts of one checkpoint.
const PARTS_MAX: u64 = 1000;

/// An opened file with its header.
struct Part {
    file: Arc<WeightFile>,
    header: Header,
}

/// Metadata and tensors, under their names in the file, of a whole checkpoint.
pub(super) struct Parts {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

impl Parts {
    /// Opens the file at `path` and the parts that follow it.
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let first = Part::open(path)?;
        let count = first.whole("split.count")?.unwrap_or(0);
        let mut tensors = BTreeMap::new();
        first.add_tensors(&mut tensors)?;
        // Merging leaves a count of 0.
        if count > 1 {
            first.check_place(0, count)?;
            for (no, path) in (1..count).zip(following(path, count)?) {
                if !path.exists() {
                    let what = format!("part {} of {count} is missing: {}", no + 1, path.display());
                    return Err(first.error(what));
                }
                let part = Part::open(&path)?;
                part.check_place(no, count)?;
                part.add_tensors(&mut tensors)?;
            }
            first.check_total(tensors.len())?;
        }
        Ok(Self { metadata: first.header.metadata, tensors })
    }
}

/// The paths of the parts after the first.
fn following(first: &Path, count: u64) -> Result<Vec<PathBuf>, LoadError> {
    if count > PARTS_MAX {
        let what = format!("`split.count` must be at most {PARTS_MAX}, got {count}");
        return Err(LoadError::invalid(first, what));
    }
    let name = first.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let suffix = |no: u64| format!("-{no:05}-of-{count:05}.gguf");
    let stem = name.strip_suffix(&suffix(1)).ok_or_else(|| {
        let what = format!("is part 1 of {count}, so its name must end in {}", suffix(1));
        LoadError::invalid(first, what)
    })?;
    Ok((2..=count).map(|no| first.with_file_name(format!("{stem}{}", suffix(no)))).collect())
}

impl Part {
    fn open(path: &Path) -> Result<Self, LoadError> {
        let file = Arc::new(WeightFile::open(path)?);
        let header = Header::read(file.reader(), file.len());
        file.check_unchanged()?;
        let header = header.map_err(|what| LoadError::invalid(path, what))?;
        Ok(Self { file, header })
    }

    fn error(&self, what: impl ToString) -> LoadError {
        LoadError::invalid(self.file.path(), what)
    }

    fn whole(&self, key: &str) -> Result<Option<u64>, LoadError> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Integer(v)) if u64::try_from(*v).is_ok() => Ok(Some(*v as u64)),
            Some(other) => {
                Err(self
                    .error(format!("`{key}` must be a whole number of at least 0, got {other}")))
            }
        }
    }

    /// Fails unless this is part `no` (from 0) of `count`.
    fn check_place(&self, no: u64, count: u64) -> Result<(), LoadError> {
        for (key, want) in [("split.count", count), ("split.no", no)] {
            let got = self.whole(key)?.ok_or_else(|| self.error(format!("`{key}` is missing")))?;
            if got != want {
                let hint = if no == 0 { "; the first part is the one to name" } else { "" };
                return Err(self.error(format!("`{key}` must be {want}, got {got}{hint}")));
            }
        }
        Ok(())
    }

    fn check_total(&self, tensors: usize) -> Result<(), LoadError> {
        let key = "split.tensors.count";
        match self.whole(key)? {
            Some(total) if total == tensors as u64 => Ok(()),
            Some(total) => Err(self.error(format!("`{key}` = {total}, the parts have {tensors}"))),
            None => Err(self.error(format!("`{key}` is missing"))),
        }
    }

    /// Adds this part's tensors, each of which lies in the file, aligned, and alone.
    fn add_tensors(&self, tensors: &mut BTreeMap<String, Tensor>) -> Result<(), LoadError> {
        let mut described: Vec<&Described> = self.header.tensors.iter().collect();
        described.sort_by_key(|d| d.offset);
        let starts: Vec<u64> = described.iter().map(|d| self.start(d)).collect::<Result<_, _>>()?;
        let mut before: Option<(&str, u64)> = None;
        for (index, d) in described.iter().enumerate() {
            let next = starts.get(index + 1).copied().unwrap_or(self.file.len());
            let tensor = self.tensor(d, starts[index], next)?;
            if let Some((other, end)) = before.filter(|(_, end)| *end > tensor.range.start) {
                let what = format!("begins at {}, before `{other}` ends at {end}", starts[index]);
                return Err(tensor.error(what));
            }
            before = Some((&d.name, tensor.range.end));
            if tensors.contains_key(&d.name) {
                return Err(tensor.error("is there twice"));
            }
            tensors.insert(d.name.clone(), tensor);
        }
        Ok(())
    }

    /// Where a tensor begins in the file.
    fn start(&self, d: &Described) -> Result<u64, LoadError> {
        let alignment = self.header.alignment;
        let start = self.header.data.checked_add(d.offset).filter(|s| *s <= self.file.len());
        match start {
            Some(start) if d.offset.is_multiple_of(alignment) => Ok(start),
            Some(_) => {
                let what =
                    format!("its offset must be a multiple of {alignment}, got {}", d.offset);
                Err(self.tensor_error(d, what))
            }
            None => Err(self.outside(d)),
        }
    }

    fn tensor(&self, d: &Described, start: u64, next: u64) -> Result<Tensor, LoadError> {
        let stored = stored(d.kind);
        let end = match &stored {
            // Its size is not known: it reaches as far as it can.
            StoredType::Unread(_) => Some(next),
            known => {
                let cols = d.shape.last().copied().unwrap_or(1);
                let row = known.bytes(cols).ok_or_else(|| {
                    let what = format!("rows of {cols} do not fill blocks of {}", known.name());
                    self.tensor_error(d, what)
                })?;
                let rows: usize = d.shape.iter().rev().skip(1).product();
                let len = row.checked_mul(rows).and_then(|len| u64::try_from(len).ok());
                len.and_then(|len| start.checked_add(len))
            }
        };
        let end = end.filter(|end| *end <= self.file.len()).ok_or_else(|| self.outside(d))?;
        Ok(Tensor {
            name: d.name.clone(),
            stored,
            shape: d.shape.clone(),
            file: Arc::clone(&self.file),
            range: start..end,
            order: None,
        })
    }

    fn outside(&self, d: &Described) -> LoadError {
        let what = format!("ends beyond the file ({} bytes): truncated?", self.file.len());
        self.tensor_error(d, what)
    }

    fn tensor_error(&self, d: &Described, what: String) -> LoadError {
        LoadError::Tensor { name: d.name.clone(), path: self.file.path().to_owned(), what }
    }
}

/// The type with a number.
fn stored(kind: u32) -> StoredType {
    match kind {
        0 => StoredType::F32,
        1 => StoredType::F16,
        30 => StoredType::Bf16,
        2 => StoredType::Quantised(GgmlDType::Q4_0),
        3 => StoredType::Quantised(GgmlDType::Q4_1),
        6 => StoredType::Quantised(GgmlDType::Q5_0),
        7 => StoredType::Quantised(GgmlDType::Q5_1),
        8 => StoredType::Quantised(GgmlDType::Q8_0),
        12 => StoredType::Quantised(GgmlDType::Q4K),
        13 => StoredType::Quantised(GgmlDType::Q5K),
        14 => StoredType::Quantised(GgmlDType::Q6K),
        other => {
            let name = UNREAD.iter().find(|(id, _)| *id == other).map(|(_, name)| *name);
            StoredType::Unread(name.map_or_else(|| format!("number {other}"), str::to_owned))
        }
    }
}

/// Types that are known by name only.
const UNREAD: &[(u32, &str)] = &[
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];
