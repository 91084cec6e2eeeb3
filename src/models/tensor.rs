//! Reads one stored tensor: where its bytes lie, and how a row becomes 16-bit values.

use super::coded::{Coded, Loaded};
use super::error::LoadError;
use super::weight_file::WeightFile;
use crate::ops::dtype::Dtype;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use parking_lot::Mutex;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

/// Rows that are read at once: as many as one task of packing takes.
const RUN_ROWS: usize = 64;
/// Bytes that are read at once, if one row is not longer.
const RUN_BYTES_MAX: usize = 4 << 20;
/// Bytes that hashing reads at once.
const HASH_BYTES: usize = 1 << 20;

/// Element type in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoredType {
    /// 32-bit floats.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// A block-quantised GGUF type.
    Quantised(GgmlDType),
    /// Codes with scales beside them.
    Coded(Arc<Coded>),
    /// A type of this name, which the engine does not compute with.
    Unread(String),
}

impl StoredType {
    /// Elements of one block, and its bytes.
    fn block(&self) -> Option<(usize, usize)> {
        match self {
            StoredType::F32 => Some((1, 4)),
            StoredType::F16 | StoredType::Bf16 => Some((1, 2)),
            StoredType::Quantised(dtype) => Some((dtype.block_size(), dtype.type_size())),
            StoredType::Coded(_) | StoredType::Unread(_) => None,
        }
    }

    /// The name in files and hashes.
    pub fn name(&self) -> String {
        match self {
            StoredType::F32 => "F32".into(),
            StoredType::F16 => "F16".into(),
            StoredType::Bf16 => "BF16".into(),
            StoredType::Quantised(dtype) => format!("{dtype:?}"),
            StoredType::Coded(coded) => format!("{:?}", coded.coding),
            StoredType::Unread(name) => name.clone(),
        }
    }

    /// Bytes of `count` elements; `None` when they do not fill whole blocks, overflow, or the type
    /// is not known.
    pub fn bytes(&self, count: usize) -> Option<usize> {
        let (elements, bytes) = self.block()?;
        if !count.is_multiple_of(elements) {
            return None;
        }
        (count / elements).checked_mul(bytes)
    }
}

/// A tensor in a file.
#[derive(Clone)]
pub struct Tensor {
    /// Name in the file.
    pub name: String,
    /// The type of the elements in the file.
    pub stored: StoredType,
    /// Shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// The file that holds the bytes.
    pub file: Arc<WeightFile>,
    /// Its bytes, which lie in the file as it was opened.
    pub(super) range: Range<u64>,
    /// Stored row of each logical row, where a format keeps them in another order.
    pub(super) order: Option<Arc<dyn Fn(usize) -> usize + Send + Sync>>,
}

impl Tensor {
    /// Elements of the fastest dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Product of the other dimensions.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Fails unless the shape is `want`.
    pub fn expect(self, want: &[usize]) -> Result<Self, LoadError> {
        if self.shape == want {
            return Ok(self);
        }
        let what = format!("expected shape {want:?}, got {:?}", self.shape);
        Err(self.error(what))
    }

    pub(super) fn error(&self, what: impl ToString) -> LoadError {
        LoadError::Tensor {
            name: self.name.clone(),
            path: self.file.path().to_owned(),
            what: what.to_string(),
        }
    }

    /// Writes row `row` as `dtype`.
    pub fn read_row(&self, row: usize, dtype: Dtype, out: &mut [u16]) -> Result<(), LoadError> {
        match &self.stored {
            StoredType::Coded(coded) => self.round(row, &coded.load()?.row(row), dtype, out),
            _ => self.decode(row, &self.row_bytes(row)?, dtype, out),
        }
    }

    /// All values of a one-dimensional tensor, rounded to `dtype` and widened again.
    pub fn read_vector(&self, dtype: Dtype) -> Result<Vec<f32>, LoadError> {
        let mut bits = vec![0; self.cols()];
        self.read_row(0, dtype, &mut bits)?;
        Ok(bits.into_iter().map(|b| dtype.widen(b)).collect())
    }

    /// All values of a one-dimensional tensor as they are stored.
    pub fn read_f32(&self) -> Result<Vec<f32>, LoadError> {
        self.widen(&self.row_bytes(0)?)
    }

    /// One stored element, widened; of a quantised row only its block is read.
    pub fn element(&self, row: usize, col: usize) -> Result<f32, LoadError> {
        if let StoredType::Coded(coded) = &self.stored {
            return coded.element(row, col);
        }
        let (elements, len) = self.block()?;
        if col >= self.cols() {
            return Err(self.error(format!("has no column {col}")));
        }
        let mut block = vec![0; len];
        let at = self.row_at(self.stored_row(row))? + (col / elements * len) as u64;
        self.file.read_at(&mut block, at)?;
        Ok(self.widen(&block)?[col % elements])
    }

    /// Begins to hash the stored bytes.
    pub(super) fn hashing(&self) -> Hashing<'_> {
        Hashing { tensor: self, hasher: blake3::Hasher::new(), at: self.range.start }
    }

    fn block(&self) -> Result<(usize, usize), LoadError> {
        let what = || format!("type {} cannot be computed with", self.stored.name());
        self.stored.block().ok_or_else(|| self.error(what()))
    }

    /// Bytes of a row.
    fn row_len(&self) -> Result<usize, LoadError> {
        self.block()?;
        self.stored.bytes(self.cols()).ok_or_else(|| {
            self.error(format!("rows of {} do not fill whole quantisation blocks", self.cols()))
        })
    }

    fn stored_row(&self, row: usize) -> usize {
        self.order.as_ref().map_or(row, |order| order(row))
    }

    /// Where a row as stored begins in the file.
    fn row_at(&self, stored_row: usize) -> Result<u64, LoadError> {
        if stored_row >= self.rows() {
            return Err(self.error(format!("has no row {stored_row}")));
        }
        Ok(self.range.start + (stored_row * self.row_len()?) as u64)
    }

    fn row_bytes(&self, row: usize) -> Result<Vec<u8>, LoadError> {
        let mut bytes = vec![0; self.row_len()?];
        self.file.read_at(&mut bytes, self.row_at(self.stored_row(row))?)?;
        Ok(bytes)
    }

    fn decode(
        &self,
        row: usize,
        bytes: &[u8],
        dtype: Dtype,
        out: &mut [u16],
    ) -> Result<(), LoadError> {
        match (&self.stored, dtype) {
            (StoredType::Bf16, Dtype::Bf16) | (StoredType::F16, Dtype::F16) => {
                for (to, from) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *to = u16::from_le_bytes([from[0], from[1]]);
                }
            }
            _ => return self.round(row, &self.widen(bytes)?, dtype, out),
        }
        self.check_finite(row, dtype, out)
    }

    fn round(
        &self,
        row: usize,
        values: &[f32],
        dtype: Dtype,
        out: &mut [u16],
    ) -> Result<(), LoadError> {
        out.iter_mut().zip(values).for_each(|(to, x)| *to = dtype.round(*x));
        self.check_finite(row, dtype, out)
    }

    fn check_finite(&self, row: usize, dtype: Dtype, out: &[u16]) -> Result<(), LoadError> {
        if out.iter().any(|bits| !dtype.widen(*bits).is_finite()) {
            return Err(self.error(format!("row {row} holds a NaN or a value outside {dtype}")));
        }
        Ok(())
    }

    fn widen(&self, bytes: &[u8]) -> Result<Vec<f32>, LoadError> {
        let pairs = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        Ok(match &self.stored {
            StoredType::F32 => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            StoredType::F16 => pairs().map(|b| f16::from_bits(b).to_f32()).collect(),
            StoredType::Bf16 => pairs().map(|b| bf16::from_bits(b).to_f32()).collect(),
            StoredType::Quantised(dtype) => {
                let blocks = dtype.from_data(Cow::Borrowed(bytes));
                match blocks.dequantize(bytes.len() / dtype.type_size() * dtype.block_size()) {
                    Ok(candle_core::CpuStorage::F32(values)) => values,
                    // The error's own text may hold a backtrace.
                    Ok(_) | Err(_) => return Err(self.error("a row cannot be dequantised")),
                }
            }
            StoredType::Coded(_) | StoredType::Unread(_) => {
                return self.block().map(|_| Vec::new());
            }
        })
    }
}

/// Reads a tensor's rows in runs, so that few of them need a call to the system; codes, whose rows
/// do not lie together, are read at once. Rows near each other may be asked for from several
/// threads.
pub struct Runs<'a> {
    tensor: &'a Tensor,
    kept: Kept<'a>,
}

/// What is kept in memory of a tensor.
enum Kept<'a> {
    Runs(LastRuns<'a>),
    Whole(Loaded<'a>),
}

impl<'a> Runs<'a> {
    /// Keeps as many runs as `threads` need.
    pub fn new(tensor: &'a Tensor, threads: usize) -> Result<Self, LoadError> {
        let kept = match &tensor.stored {
            StoredType::Coded(coded) => Kept::Whole(coded.load()?),
            _ => Kept::Runs(LastRuns::new(tensor, threads)?),
        };
        Ok(Self { tensor, kept })
    }

    /// Writes row `row` as `dtype`.
    pub fn read_row(&self, row: usize, dtype: Dtype, out: &mut [u16]) -> Result<(), LoadError> {
        match &self.kept {
            Kept::Runs(runs) => {
                runs.with_row(row, |bytes| self.tensor.decode(row, bytes, dtype, out))
            }
            Kept::Whole(loaded) => self.tensor.round(row, &loaded.row(row), dtype, out),
        }
    }

    /// Largest magnitude of row `row`.
    pub fn row_max(&self, row: usize) -> Result<f32, LoadError> {
        let values = match &self.kept {
            Kept::Runs(runs) => runs.with_row(row, |bytes| self.tensor.widen(bytes))?,
            Kept::Whole(loaded) => loaded.row(row),
        };
        Ok(values.into_iter().fold(0.0, |m, x| x.abs().max(m)))
    }
}

/// The last runs that were read.
struct LastRuns<'a> {
    tensor: &'a Tensor,
    row_len: usize,
    rows: usize, // of a run
    slots: Vec<Mutex<Option<Arc<Run>>>>,
}

struct Run {
    number: usize,
    bytes: Vec<u8>,
}

impl<'a> LastRuns<'a> {
    fn new(tensor: &'a Tensor, threads: usize) -> Result<Self, LoadError> {
        let row_len = tensor.row_len()?;
        let rows = (RUN_BYTES_MAX / row_len.max(1)).clamp(1, RUN_ROWS);
        let slots = (0..threads * 2).map(|_| Mutex::new(None)).collect();
        Ok(Self { tensor, row_len, rows, slots })
    }

    fn with_row<T>(
        &self,
        row: usize,
        read: impl FnOnce(&[u8]) -> Result<T, LoadError>,
    ) -> Result<T, LoadError> {
        let row = self.tensor.stored_row(row);
        let run = self.run(row / self.rows)?;
        read(&run.bytes[row % self.rows * self.row_len..][..self.row_len])
    }

    fn run(&self, number: usize) -> Result<Arc<Run>, LoadError> {
        let mut slot = self.slots[number % self.slots.len()].lock();
        if let Some(run) = slot.as_ref().filter(|run| run.number == number) {
            return Ok(Arc::clone(run));
        }
        let first = number * self.rows;
        let rows = self.rows.min(self.tensor.rows().saturating_sub(first));
        let at = self.tensor.row_at(first)?;
        // The memory of the run before, where nobody reads it any more.
        let mut bytes =
            slot.take().and_then(Arc::into_inner).map_or_else(Vec::new, |run| run.bytes);
        bytes.resize(rows * self.row_len, 0);
        self.tensor.file.read_at(&mut bytes, at)?;
        let run = Arc::new(Run { number, bytes });
        *slot = Some(Arc::clone(&run));
        Ok(run)
    }
}

/// A hash of a tensor's stored bytes that grows piece by piece.
pub(super) struct Hashing<'a> {
    tensor: &'a Tensor,
    hasher: blake3::Hasher,
    at: u64,
}

impl Hashing<'_> {
    /// Adds the next piece, which is read into `buffer`; the hash once there is no further piece.
    ///
    /// # Errors
    /// When the file cannot be read, or was changed since it was opened.
    pub(super) fn step(&mut self, buffer: &mut Vec<u8>) -> Result<Option<blake3::Hash>, LoadError> {
        let end = self.tensor.range.end;
        let len = (end - self.at).min(HASH_BYTES as u64);
        buffer.resize(len as usize, 0);
        self.tensor.file.read_at(buffer, self.at)?;
        self.hasher.update(buffer);
        self.at += len;
        Ok((self.at == end).then(|| self.hasher.finalize()))
    }
}
