//! Reads the header of a GGUF file: metadata and the list of tensors.
//!
//! The lengths in the file are untrusted. Each is checked against the number of bytes that are left
//! in the file before memory is allocated for it, and all of them together against
//! [`HEADER_BYTES_MAX`].

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

/// Bytes of a header. Those of vocabularies with 260,000 tokens take about 20 MiB.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Dimensions of a tensor.
const DIMENSIONS_MAX: u32 = 4;
/// Alignment of tensors where the metadata gives none, and the largest one.
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;

/// Fewest bytes of a key with its value, of a tensor's description, of a text.
const KEY_BYTES_MIN: u64 = 8 + 4 + 1;
const TENSOR_BYTES_MIN: u64 = 8 + 4 + 8 + 4 + 8;
const TEXT_BYTES_MIN: u64 = 8;

/// Type numbers that are not scalars.
const TEXT: u32 = 8;
const LIST: u32 = 9;

/// The value of a metadata key.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// Any of the eight integer types.
    Integer(i128),
    /// Either of the two float types.
    Float(f64),
    /// A value of the type `bool`: one byte, 0 or 1.
    Bool(bool),
    /// A text as it is stored, which may not be UTF-8.
    Text(Box<[u8]>),
    /// Several values of one type.
    List(List),
}

/// A list of values of one type.
#[derive(Clone, PartialEq, Debug)]
pub enum List {
    /// Texts as they are stored.
    Texts(Vec<Box<[u8]>>),
    /// Numbers or booleans as they are stored.
    Scalars(ScalarType, Vec<u8>),
}

/// A type of fixed size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ScalarType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl ScalarType {
    fn of(id: u32) -> Option<Self> {
        use ScalarType::{Bool, F32, F64, I8, I16, I32, I64, U8, U16, U32, U64};
        Some(match id {
            0 => U8,
            1 => I8,
            2 => U16,
            3 => I16,
            4 => U32,
            5 => I32,
            6 => F32,
            7 => Bool,
            10 => U64,
            11 => I64,
            12 => F64,
            _ => return None,
        })
    }

    fn bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The value of little-endian `bytes`, as many as the type has.
    fn value(self, bytes: &[u8]) -> Value {
        let unsigned = bytes.iter().rev().fold(0_u64, |v, b| v << 8 | u64::from(*b));
        Value::Integer(match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => i128::from(unsigned),
            Self::I8 => i128::from(unsigned as i8),
            Self::I16 => i128::from(unsigned as i16),
            Self::I32 => i128::from(unsigned as i32),
            Self::I64 => i128::from(unsigned as i64),
            Self::F32 => return Value::Float(f64::from(f32::from_bits(unsigned as u32))),
            Self::F64 => return Value::Float(f64::from_bits(unsigned)),
            Self::Bool => return Value::Bool(unsigned != 0),
        })
    }
}

impl List {
    /// How many values the list has.
    pub fn len(&self) -> usize {
        match self {
            Self::Texts(texts) => texts.len(),
            Self::Scalars(kind, bytes) => bytes.len() / kind.bytes() as usize,
        }
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entries of a list of numbers or booleans.
    pub fn scalars(&self) -> impl Iterator<Item = Value> {
        let (kind, bytes) = match self {
            Self::Texts(_) => (ScalarType::U8, &[][..]),
            Self::Scalars(kind, bytes) => (*kind, &bytes[..]),
        };
        bytes.chunks_exact(kind.bytes() as usize).map(move |bytes| kind.value(bytes))
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(v) => write!(f, "{v}"),
            Self::Float(v) => write!(f, "{v:?}"),
            Self::Bool(v) => write!(f, "{v}"),
            Self::Text(text) => write!(f, "{:?}", String::from_utf8_lossy(text)),
            Self::List(List::Texts(texts)) => write!(f, "a list of {} texts", texts.len()),
            Self::List(list @ List::Scalars(kind, _)) => {
                write!(f, "a list of {} {kind:?}", list.len())
            }
        }
    }
}

/// What the file says of one tensor.
#[derive(Debug)]
pub struct Described {
    /// The name that the file gives the tensor.
    pub name: String,
    /// Its shape, slowest dimension first; no dimension is 0 and the product fits.
    pub shape: Vec<usize>,
    /// The number of its type.
    pub kind: u32,
    /// Where it begins, from the start of the data.
    pub offset: u64,
}

/// What a header says.
#[derive(Debug)]
pub struct Header {
    /// Values by their keys.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors in the order of the file.
    pub tensors: Vec<Described>,
    /// Where the data begins.
    pub data: u64,
    /// What every offset is a multiple of.
    pub alignment: u64,
}

/// Why the header of a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Other bytes than a GGUF file begins with.
    #[error("not a GGUF file: it begins with {0:?}")]
    Magic(String),
    /// Numbers the other way round.
    #[error("a big-endian GGUF file is not supported; little-endian ones are")]
    BigEndian,
    /// A version that is not read.
    #[error("GGUF version {0} is not supported; 2 and 3 are")]
    Version(u32),
    /// The file ends too early.
    #[error("not a whole GGUF file: {what} ends beyond its {len} bytes")]
    Incomplete {
        /// What is not all there.
        what: String,
        /// Bytes of the file.
        len: u64,
    },
    /// More than a header may take.
    #[error("its header takes more than {HEADER_BYTES_MAX} bytes, at {what}")]
    Long {
        /// What was being read at the limit.
        what: String,
    },
    /// The system does not read.
    #[error("cannot read {what}: {source}")]
    Read {
        /// What was to be read.
        what: String,
        /// Why the system refuses.
        source: std::io::Error,
    },
    /// A name that is not UTF-8.
    #[error("{what} has a name that is not UTF-8")]
    Name {
        /// The key or tensor that has the name.
        what: String,
    },
    /// One key with two values.
    #[error("the key `{key}` is there twice")]
    Twice {
        /// The key that holds it.
        key: String,
    },
    /// Lists within lists, which no known key has.
    #[error("{what} is a list of lists, which is not supported")]
    Lists {
        /// The key whose value it is.
        what: String,
    },
    /// A type that the format does not have.
    #[error("{what} has the unknown type {id}")]
    Type {
        /// The key or tensor that has the type.
        what: String,
        /// The number that stands for the type in the file.
        id: u32,
    },
    /// None, or too many.
    #[error("tensor `{name}` has {dimensions} dimensions; 1 to {DIMENSIONS_MAX} are supported")]
    Dimensions {
        /// Name of the tensor.
        name: String,
        /// How many it has.
        dimensions: u32,
    },
    /// A shape that no tensor can have.
    #[error("tensor `{name}` has the impossible shape {shape:?}: a 0, or too many elements")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// Its dimensions, fastest first.
        shape: Vec<u64>,
    },
    /// What data is aligned to.
    #[error("`general.alignment` must be a power of two up to {ALIGNMENT_MAX}, got {0}")]
    Alignment(String),
}

impl Header {
    /// Reads the header of a file of `len` bytes.
    ///
    /// # Errors
    /// When it is not a whole header of version 2 or 3; the text says why.
    pub fn read(source: impl Read, len: u64) -> Result<Self, HeaderError> {
        let mut reader = Reader { source, at: 0, len };
        reader.magic()?;
        let tensors = reader.u64("the number of tensors")?;
        let keys = reader.u64("the number of keys")?;
        let metadata = reader.metadata(keys)?;
        let tensors = reader.tensors(tensors)?;
        let alignment = alignment(&metadata)?;
        let data = reader.at.next_multiple_of(alignment);
        Ok(Self { metadata, tensors, data, alignment })
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, HeaderError> {
    let key = "general.alignment";
    let Some(value) = metadata.get(key) else { return Ok(ALIGNMENT_DEFAULT) };
    let number = match value {
        Value::Integer(number) => u64::try_from(*number).ok(),
        _ => None,
    };
    number
        .filter(|n| n.is_power_of_two() && *n <= ALIGNMENT_MAX)
        .ok_or_else(|| HeaderError::Alignment(value.to_string()))
}

struct Reader<R> {
    source: R,
    at: u64,
    len: u64,
}

impl<R: Read> Reader<R> {
    fn magic(&mut self) -> Result<(), HeaderError> {
        let magic: [u8; 4] = self.array("the magic number")?;
        if &magic != b"GGUF" {
            return Err(HeaderError::Magic(String::from_utf8_lossy(&magic).into_owned()));
        }
        match self.u32("the version")? {
            2 | 3 => Ok(()),
            version if version & 0xffff == 0 && version != 0 => Err(HeaderError::BigEndian),
            version => Err(HeaderError::Version(version)),
        }
    }

    /// Fails unless the file holds `count` more things of at least `each` bytes.
    fn room(&self, count: u64, each: u64, what: &str) -> Result<(), HeaderError> {
        let (rest, len) = (self.len - self.at, self.len);
        match count.checked_mul(each).filter(|bytes| *bytes <= rest) {
            None => Err(HeaderError::Incomplete { what: what.to_owned(), len }),
            Some(bytes) if self.at + bytes > HEADER_BYTES_MAX => {
                Err(HeaderError::Long { what: what.to_owned() })
            }
            Some(_) => Ok(()),
        }
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Result<(), HeaderError> {
        let failed = |source| HeaderError::Read { what: what.to_owned(), source };
        self.source.read_exact(bytes).map_err(failed)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], HeaderError> {
        self.room(1, N as u64, what)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, HeaderError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, HeaderError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn bytes(&mut self, count: u64, each: u64, what: &str) -> Result<Vec<u8>, HeaderError> {
        self.room(count, each, what)?;
        let mut bytes = vec![0; (count * each) as usize];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn text(&mut self, what: &str) -> Result<Box<[u8]>, HeaderError> {
        let len = self.u64(what)?;
        self.bytes(len, 1, what).map(Vec::into_boxed_slice)
    }

    fn name(&mut self, what: &str) -> Result<String, HeaderError> {
        let text = self.text(what)?.into_vec();
        String::from_utf8(text).map_err(|_| HeaderError::Name { what: what.to_owned() })
    }

    fn metadata(&mut self, keys: u64) -> Result<BTreeMap<String, Value>, HeaderError> {
        self.room(keys, KEY_BYTES_MIN, &format!("the last of {keys} keys"))?;
        let mut metadata = BTreeMap::new();
        for index in 0..keys {
            let key = self.name(&format!("key {index}"))?;
            let value = self.value(&key)?;
            if metadata.contains_key(&key) {
                return Err(HeaderError::Twice { key });
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }

    fn value(&mut self, key: &str) -> Result<Value, HeaderError> {
        let what = format!("the value of `{key}`");
        match self.u32(&what)? {
            TEXT => self.text(&what).map(Value::Text),
            LIST => self.list(&what).map(Value::List),
            id => {
                let kind = scalar(id, &what)?;
                Ok(kind.value(&self.bytes(1, kind.bytes(), &what)?))
            }
        }
    }

    fn list(&mut self, what: &str) -> Result<List, HeaderError> {
        let (id, count) = (self.u32(what)?, self.u64(what)?);
        match id {
            LIST => Err(HeaderError::Lists { what: what.to_owned() }),
            TEXT => {
                self.room(count, TEXT_BYTES_MIN, what)?;
                (0..count).map(|_| self.text(what)).collect::<Result<_, _>>().map(List::Texts)
            }
            id => {
                let kind = scalar(id, what)?;
                let bytes = self.bytes(count, kind.bytes(), what)?;
                Ok(List::Scalars(kind, bytes))
            }
        }
    }

    fn tensors(&mut self, count: u64) -> Result<Vec<Described>, HeaderError> {
        self.room(count, TENSOR_BYTES_MIN, &format!("the last of {count} tensors"))?;
        (0..count).map(|index| self.tensor(index)).collect()
    }

    fn tensor(&mut self, index: u64) -> Result<Described, HeaderError> {
        let name = self.name(&format!("the description of tensor {index}"))?;
        let what = format!("the description of tensor `{name}`");
        let dimensions = self.u32(&what)?;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return Err(HeaderError::Dimensions { name, dimensions });
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64(&what)?);
        }
        let (kind, offset) = (self.u32(&what)?, self.u64(&what)?);
        let shape = sound_shape(&shape)
            .ok_or_else(|| HeaderError::Shape { name: name.clone(), shape: shape.clone() })?;
        Ok(Described { name, shape, kind, offset })
    }
}

fn scalar(id: u32, what: &str) -> Result<ScalarType, HeaderError> {
    ScalarType::of(id).ok_or_else(|| HeaderError::Type { what: what.to_owned(), id })
}

/// The dimensions slowest first, if their product can be counted.
fn sound_shape(fastest_first: &[u64]) -> Option<Vec<usize>> {
    let shape: Option<Vec<usize>> =
        fastest_first.iter().rev().map(|d| usize::try_from(*d).ok().filter(|d| *d > 0)).collect();
    shape.filter(|s| s.iter().try_fold(1_usize, |n, d| n.checked_mul(*d)).is_some())
}
