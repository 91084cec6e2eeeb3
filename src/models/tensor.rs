//! One stored tensor: where its bytes lie and how a row becomes 16-bit values.

use super::error::LoadError;
use crate::ops::dtype::Dtype;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use memmap2::Mmap;
use std::borrow::Cow;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// Element type in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    /// 32-bit floats.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// A block-quantised GGUF type.
    Quantised(GgmlDType),
}

impl Stored {
    /// Elements of one block, and its bytes.
    fn block(self) -> (usize, usize) {
        match self {
            Stored::F32 => (1, 4),
            Stored::F16 | Stored::Bf16 => (1, 2),
            Stored::Quantised(dtype) => (dtype.block_size(), dtype.type_size()),
        }
    }

    /// The name in files and hashes.
    pub fn name(self) -> String {
        match self {
            Stored::F32 => "F32".into(),
            Stored::F16 => "F16".into(),
            Stored::Bf16 => "BF16".into(),
            Stored::Quantised(dtype) => format!("{dtype:?}"),
        }
    }

    /// Bytes of `count` elements; `None` when they do not fill whole blocks or overflow.
    pub fn bytes(self, count: usize) -> Option<usize> {
        let (elements, bytes) = self.block();
        if !count.is_multiple_of(elements) {
            return None;
        }
        (count / elements).checked_mul(bytes)
    }
}

/// A tensor in a memory-mapped file.
#[derive(Clone)]
pub struct Tensor {
    /// Name in the file.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Element type.
    pub stored: Stored,
    /// Shape, slowest dimension first.
    pub shape: Vec<usize>,
    pub(super) map: Arc<Mmap>,
    pub(super) range: Range<usize>,
    /// Stored row of each logical row, where a format keeps them in another order.
    pub(super) order: Option<Arc<dyn Fn(usize) -> usize + Send + Sync>>,
}

impl Tensor {
    /// The stored bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

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
            path: self.path.clone(),
            what: what.to_string(),
        }
    }

    /// Writes row `row` as `dtype`.
    pub fn read_row(&self, row: usize, dtype: Dtype, out: &mut [u16]) -> Result<(), LoadError> {
        let bytes = self.row_bytes(row)?;
        match (self.stored, dtype) {
            (Stored::Bf16, Dtype::Bf16) | (Stored::F16, Dtype::F16) => {
                for (to, from) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *to = u16::from_le_bytes([from[0], from[1]]);
                }
            }
            _ => {
                let values = self.widen(bytes)?;
                out.iter_mut().zip(values).for_each(|(to, x)| *to = dtype.round(x));
            }
        }
        if out.iter().any(|bits| !dtype.widen(*bits).is_finite()) {
            return Err(self.error(format!("row {row} holds a NaN or a value outside {dtype}")));
        }
        Ok(())
    }

    /// All values of a one-dimensional tensor, rounded to `dtype` and widened again.
    pub fn read_vector(&self, dtype: Dtype) -> Result<Vec<f32>, LoadError> {
        let mut bits = vec![0; self.cols()];
        self.read_row(0, dtype, &mut bits)?;
        Ok(bits.into_iter().map(|b| dtype.widen(b)).collect())
    }

    /// All values of a one-dimensional tensor as they are stored.
    pub fn read_f32(&self) -> Result<Vec<f32>, LoadError> {
        self.widen(self.row_bytes(0)?)
    }

    /// Largest magnitude of row `row`.
    pub fn row_max(&self, row: usize) -> Result<f32, LoadError> {
        let values = self.widen(self.row_bytes(row)?)?;
        Ok(values.into_iter().fold(0.0, |m, x| x.abs().max(m)))
    }

    fn row_bytes(&self, row: usize) -> Result<&[u8], LoadError> {
        let row = self.order.as_ref().map_or(row, |order| order(row));
        let len = self.stored.bytes(self.cols()).ok_or_else(|| {
            self.error(format!("rows of {} do not fill whole quantisation blocks", self.cols()))
        })?;
        Ok(&self.bytes()[row * len..(row + 1) * len])
    }

    /// One stored element, widened; of a quantised row only its block is read.
    pub fn element(&self, row: usize, col: usize) -> Result<f32, LoadError> {
        let (elements, bytes) = self.stored.block();
        let at = col / elements * bytes;
        let block = self.row_bytes(row)?.get(at..at + bytes);
        let block = block.ok_or_else(|| self.error(format!("has no column {col}")))?;
        Ok(self.widen(block)?[col % elements])
    }

    fn widen(&self, bytes: &[u8]) -> Result<Vec<f32>, LoadError> {
        let pairs = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        Ok(match self.stored {
            Stored::F32 => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            Stored::F16 => pairs().map(|b| f16::from_bits(b).to_f32()).collect(),
            Stored::Bf16 => pairs().map(|b| bf16::from_bits(b).to_f32()).collect(),
            Stored::Quantised(dtype) => {
                let blocks = dtype.from_data(Cow::Borrowed(bytes));
                match blocks.dequantize(bytes.len() / dtype.type_size() * dtype.block_size()) {
                    Ok(candle_core::CpuStorage::F32(values)) => values,
                    Ok(_) => return Err(self.error("dequantised to something other than f32")),
                    Err(e) => return Err(self.error(e)),
                }
            }
        })
    }

    /// Lets the system take the file's pages back: they were copied into the packed layout.
    pub fn release(&self) {
        #[cfg(unix)]
        {
            let (start, len) = (self.range.start, self.range.len());
            // SAFETY: the map is private and read only: dropped pages are read from the file again.
            let advice = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len)
            };
            // Only a hint: without it more memory counts as resident.
            let _ = advice;
        }
    }
}
