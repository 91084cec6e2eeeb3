//! Reads matrices that a checkpoint stores as codes of few bits, with scales beside them.
//!
//! A value is `(code - zero) * scale` in f32, where codes are whole numbers, or `code * scale`,
//! where they are floats of eight bits. Codes of a row lie in a row of bytes, or several in a word
//! of 32 bits, the first in its lowest bits, in one of three [layouts](Layout).

use super::error::LoadError;
use super::weight_file::WeightFile;
use half::{bf16, f16};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a word that holds several codes.
const WORD_BYTES: usize = 4;
/// Where AWQ puts the eight codes of a word: the place of each of eight neighbours.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The bytes of one stored tensor.
#[derive(Clone)]
pub struct Stored {
    /// Its name in the file.
    pub name: String,
    /// The file that holds them.
    pub file: Arc<WeightFile>,
    /// Where they lie in it.
    pub range: Range<u64>,
}

impl Stored {
    /// All of them.
    ///
    /// # Errors
    /// When the file cannot be read, or was changed since it was opened.
    pub fn read(&self) -> Result<Vec<u8>, LoadError> {
        let mut bytes = vec![0; (self.range.end - self.range.start) as usize];
        self.file.read_at(&mut bytes, self.range.start)?;
        Ok(bytes)
    }

    fn some<const N: usize>(&self, at: usize) -> Result<[u8; N], LoadError> {
        let (mut bytes, at) = ([0; N], self.range.start + at as u64);
        if at + N as u64 > self.range.end {
            let what = format!("has no {N} bytes at {}", at - self.range.start);
            return Err(self.error(what));
        }
        self.file.read_at(&mut bytes, at)?;
        Ok(bytes)
    }

    /// An error that names the tensor.
    pub fn error(&self, what: impl ToString) -> LoadError {
        LoadError::Tensor {
            name: self.name.clone(),
            path: self.file.path().to_owned(),
            what: what.to_string(),
        }
    }
}

/// Where codes lie in words. A matrix has `rows` outputs and `cols` inputs, a word `n` codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// GPTQ: words of `[cols / n, rows]`, each with neighbours of one output.
    Columns,
    /// AWQ: words of `[cols, rows / 8]`, each with eight outputs, interleaved.
    Interleaved,
    /// compressed-tensors: words of `[rows, cols / n]`, each with neighbours of one output.
    Rows,
}

/// What a code is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Coding {
    /// A float of eight bits: four of exponent, three of mantissa, no infinity.
    Float8,
    /// A whole number of eight bits with a sign.
    Int8,
    /// A whole number of so many bits without one, in words.
    Packed(Layout, u32),
}

/// Type of a scale.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScaleType {
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 32-bit floats.
    F32,
}

impl ScaleType {
    /// By its name in safetensors.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "F16" => Some(Self::F16),
            "BF16" => Some(Self::Bf16),
            "F32" => Some(Self::F32),
            _ => None,
        }
    }

    fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn widen(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Self::F16, [a, b, ..]) => f16::from_le_bytes([*a, *b]).to_f32(),
            (Self::Bf16, [a, b, ..]) => bf16::from_le_bytes([*a, *b]).to_f32(),
            (Self::F32, [a, b, c, d]) => f32::from_le_bytes([*a, *b, *c, *d]),
            _ => f32::NAN,
        }
    }
}

/// Which elements share a scale.
#[derive(Clone, PartialEq, Debug)]
pub struct Groups {
    /// Outputs and inputs of a group.
    pub block: [usize; 2],
    /// Groups along outputs and inputs.
    pub count: [usize; 2],
    /// Whether those of one input lie together, and not those of one output.
    pub by_input: bool,
    /// Group of each input, where they are not neighbours.
    pub of_inputs: Option<Vec<u32>>,
}

impl Groups {
    /// Groups along outputs and inputs that an element is in.
    fn of(&self, row: usize, col: usize) -> [usize; 2] {
        let along = self.of_inputs.as_ref().map_or(col / self.block[1], |of| of[col] as usize);
        [row / self.block[0], along]
    }

    /// Number of a group in the order of the file.
    fn place(&self, [out, along]: [usize; 2]) -> usize {
        match self.by_input {
            true => along * self.count[0] + out,
            false => out * self.count[1] + along,
        }
    }
}

/// The codes that stand for zero.
#[derive(Clone)]
pub enum Zeros {
    /// The middle of all codes.
    Middle,
    /// One for each group of an output, packed as codes are. This much is added to each; the sum
    /// may need a bit more than a code.
    Stored(Stored, u32),
}

/// A matrix of codes.
pub struct Coded {
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// What its codes are.
    pub coding: Coding,
    /// Its codes.
    pub codes: Stored,
    /// Its scales.
    pub scales: Stored,
    /// Type of its scales.
    pub scale_type: ScaleType,
    /// The codes of zero.
    pub zeros: Zeros,
    /// Which elements share scale and zero.
    pub groups: Groups,
}

/// A matrix of codes in memory.
pub struct Loaded<'a> {
    coded: &'a Coded,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

/// Where a code lies: its word, or byte, and the bits below it.
struct Place {
    word: usize,
    shift: u32,
}

impl fmt::Debug for Coded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.coding)
    }
}

impl PartialEq for Coded {
    /// Whether it is the same matrix.
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Coded {}

impl Coded {
    /// Reads all of it.
    ///
    /// # Errors
    /// When a file cannot be read, or was changed since it was opened.
    pub fn load(&self) -> Result<Loaded<'_>, LoadError> {
        let scales = self.scales.read()?;
        let scales = scales.chunks_exact(self.scale_type.bytes());
        Ok(Loaded {
            codes: self.codes.read()?,
            scales: scales.map(|bytes| self.scale_type.widen(bytes)).collect(),
            zeros: match &self.zeros {
                Zeros::Middle => Vec::new(),
                Zeros::Stored(zeros, _) => zeros.read()?,
            },
            coded: self,
        })
    }

    /// One element, of which nothing else is read.
    ///
    /// # Errors
    /// As for [`load`](Self::load), and when there is no such element.
    pub fn element(&self, row: usize, col: usize) -> Result<f32, LoadError> {
        if row >= self.shape[0] || col >= self.shape[1] {
            return Err(self.codes.error(format!("has no element {row}, {col}")));
        }
        let Place { word, shift } = self.place(row, col);
        let code = match self.coding {
            Coding::Float8 | Coding::Int8 => u32::from(self.codes.some::<1>(word)?[0]),
            Coding::Packed(..) => {
                self.code(u32::from_le_bytes(self.codes.some(word * WORD_BYTES)?), shift)
            }
        };
        let group = self.groups.of(row, col);
        let zero = match &self.zeros {
            Zeros::Middle => self.middle(),
            Zeros::Stored(zeros, more) => {
                let Place { word, shift } = self.zero_place(row, group[1]);
                self.code(u32::from_le_bytes(zeros.some(word * WORD_BYTES)?), shift) + more
            }
        };
        let at = self.groups.place(group) * self.scale_type.bytes();
        let scale = match self.scale_type {
            ScaleType::F32 => self.scale_type.widen(&self.scales.some::<4>(at)?),
            _ => self.scale_type.widen(&self.scales.some::<2>(at)?),
        };
        Ok(self.value(code, zero, scale))
    }

    fn value(&self, code: u32, zero: u32, scale: f32) -> f32 {
        match self.coding {
            Coding::Float8 => float8(code as u8) * scale,
            Coding::Int8 => f32::from(code as u8 as i8) * scale,
            Coding::Packed(..) => (code as i32 - zero as i32) as f32 * scale,
        }
    }

    /// Bits of a code.
    fn bits(&self) -> u32 {
        match self.coding {
            Coding::Packed(_, bits) => bits,
            Coding::Float8 | Coding::Int8 => 8,
        }
    }

    fn code(&self, word: u32, shift: u32) -> u32 {
        word >> shift & ((1 << self.bits()) - 1)
    }

    fn middle(&self) -> u32 {
        1 << (self.bits() - 1)
    }

    fn place(&self, row: usize, col: usize) -> Place {
        let [rows, cols] = self.shape;
        let Coding::Packed(layout, bits) = self.coding else {
            return Place { word: row * cols + col, shift: 0 };
        };
        let many = (u32::BITS / bits) as usize;
        let (word, place) = match layout {
            Layout::Columns => (col / many * rows + row, col % many),
            Layout::Interleaved => (col * (rows / many) + row / many, AWQ_PLACES[row % 8]),
            Layout::Rows => (row * cols.div_ceil(many) + col / many, col % many),
        };
        Place { word, shift: place as u32 * bits }
    }

    /// Where the zero of an output's group lies.
    fn zero_place(&self, row: usize, along: usize) -> Place {
        let bits = self.bits();
        let many = (u32::BITS / bits) as usize;
        let (word, place) = match self.coding {
            Coding::Packed(Layout::Rows, _) => {
                (row / many * self.groups.count[1] + along, row % many)
            }
            Coding::Packed(Layout::Interleaved, _) => {
                (along * (self.shape[0] / many) + row / many, AWQ_PLACES[row % 8])
            }
            _ => (along * (self.shape[0] / many) + row / many, row % many),
        };
        Place { word, shift: place as u32 * bits }
    }
}

impl Loaded<'_> {
    /// The values of a row.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let coded = self.coded;
        let word = |bytes: &[u8], at: usize| {
            let bytes = &bytes[at * WORD_BYTES..][..WORD_BYTES];
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        };
        let mut last = None;
        let (mut scale, mut zero) = (0.0, 0);
        let value = |col: usize| {
            let group = coded.groups.of(row, col);
            if last != Some(group) {
                last = Some(group);
                scale = self.scales[coded.groups.place(group)];
                zero = match &coded.zeros {
                    Zeros::Middle => coded.middle(),
                    Zeros::Stored(_, more) => {
                        let place = coded.zero_place(row, group[1]);
                        coded.code(word(&self.zeros, place.word), place.shift) + more
                    }
                };
            }
            let place = coded.place(row, col);
            let code = match coded.coding {
                Coding::Float8 | Coding::Int8 => u32::from(self.codes[place.word]),
                Coding::Packed(..) => coded.code(word(&self.codes, place.word), place.shift),
            };
            coded.value(code, zero, scale)
        };
        (0..coded.shape[1]).map(value).collect()
    }
}

/// The value of a float of eight bits (e4m3fn of the OCP's 8-bit floating point specification).
fn float8(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match exponent {
        15 if bits & 7 == 7 => f32::NAN,
        0 => mantissa * 2.0_f32.powi(-9),
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    };
    if bits & 0x80 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_of_eight_bits_have_the_values_of_the_specification() {
        let known = [
            (0x00, 0.0),
            (0x01, 2.0_f32.powi(-9)),
            (0x07, 7.0 * 2.0_f32.powi(-9)),
            (0x08, 2.0_f32.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xc0, -2.0),
            (0xfe, -448.0),
        ];
        for (bits, want) in known {
            assert_eq!(float8(bits), want, "{bits:#x}");
        }
        assert!(float8(0x7f).is_nan() && float8(0xff).is_nan());
        let increasing = (0..0x7e_u8).all(|bits| float8(bits) < float8(bits + 1));
        assert!(increasing, "each code is more than the one before");
    }
}
