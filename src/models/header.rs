//! Reads the header of a safetensors file, which is untrusted: eight bytes of length, then JSON
//! that names every tensor. Every size is checked against the file before memory is allocated for
//! it.

use super::error::LoadError;
use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// Bytes of a header; those of the largest published shards have three million.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Dimensions of a tensor.
pub const DIMENSIONS_MAX: usize = 8;
/// The bytes before the header that hold its length.
const LENGTH_BYTES: u64 = 8;
const METADATA: &str = "__metadata__";
/// Bits of an element, by the format's names.
const TYPES: [(&str, u64); 22] = [
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("I64", 64),
    ("U64", 64),
    ("F64", 64),
    ("C64", 64),
];

/// A tensor as the header describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorEntry {
    /// The tensor's name, as Hugging Face files have it.
    pub name: String,
    /// Its element type, by the format's name.
    pub dtype: String,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub range: Range<u64>,
}

/// The tensors of a file of `len` bytes, in the order of their bytes; `read_at` fills a buffer from
/// a place on. Together the tensors fill the file.
///
/// # Errors
/// When the file cannot be read, or its header is longer than the file or [`HEADER_BYTES_MAX`],
/// names a tensor twice, or describes bytes that are not there, belong to two tensors, or to none.
pub fn read(
    path: &Path,
    len: u64,
    mut read_at: impl FnMut(&mut [u8], u64) -> Result<(), LoadError>,
) -> Result<Vec<TensorEntry>, LoadError> {
    let Some(rest) = len.checked_sub(LENGTH_BYTES) else {
        return Err(incomplete(path, len, format!("it is shorter than {LENGTH_BYTES} bytes")));
    };
    let mut length = [0; LENGTH_BYTES as usize];
    read_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    if length > rest {
        return Err(incomplete(path, len, format!("its header has {length} bytes")));
    }
    if length > HEADER_BYTES_MAX {
        let what = format!("the header must be at most {HEADER_BYTES_MAX} bytes, got {length}");
        return Err(LoadError::invalid(path, what));
    }
    let mut header = vec![0; length as usize];
    read_at(&mut header, LENGTH_BYTES)?;
    let header: Header = serde_json::from_slice(&header)
        .map_err(|e| LoadError::invalid(path, format!("safetensors header: {e}")))?;
    let data = LENGTH_BYTES + length;
    entries(path, header, data, len)
}

fn incomplete(path: &Path, len: u64, what: String) -> LoadError {
    LoadError::invalid(path, format!("not a whole safetensors file ({len} bytes): {what}"))
}

/// What the header says, held against the bytes from `data` to `len`.
fn entries(
    path: &Path,
    header: Header,
    data: u64,
    len: u64,
) -> Result<Vec<TensorEntry>, LoadError> {
    let mut tensors: Vec<(String, Raw)> = header.0.into_iter().collect();
    tensors.sort_by_key(|(_, raw)| raw.data_offsets);
    let mut entries = Vec::with_capacity(tensors.len());
    let mut at = 0;
    for (name, raw) in tensors {
        let error =
            |what: String| LoadError::Tensor { name: name.clone(), path: path.into(), what };
        let (start, stop) = raw.data_offsets;
        let bytes = raw.bytes().map_err(|e| error(e.to_string()))?;
        if stop.checked_sub(start) != Some(bytes) {
            return Err(error(format!(
                "{:?} elements of {} have {bytes} bytes, its offsets are {start}..{stop}",
                raw.shape.0, raw.dtype
            )));
        }
        if start != at {
            let what = if start < at { "overlaps the tensor before it" } else { "leaves a gap" };
            return Err(error(format!("{what}: the next free byte is {at}, it begins at {start}")));
        }
        at = stop;
        let Some(end) = stop.checked_add(data).filter(|end| *end <= len) else {
            let what = format!("tensor `{name}` ends at byte {stop} of the data");
            return Err(incomplete(path, len, what));
        };
        entries.push(TensorEntry {
            name,
            dtype: raw.dtype,
            shape: raw.shape.0,
            range: end - bytes..end,
        });
    }
    match at == len - data {
        true => Ok(entries),
        false => Err(incomplete(path, len, format!("its tensors end at byte {at} of the data"))),
    }
}

/// All tensors by name.
struct Header(BTreeMap<String, Raw>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    dtype: String,
    shape: Dimensions,
    data_offsets: (u64, u64),
}

/// Why a tensor has no size in bytes.
#[derive(Debug, thiserror::Error)]
enum SizeError {
    #[error("dtype {0} is unknown")]
    Dtype(String),
    #[error("a tensor of shape {0:?} does not fill whole bytes")]
    Shape(Vec<usize>),
}

impl Raw {
    fn bytes(&self) -> Result<u64, SizeError> {
        let known = TYPES.iter().find(|(name, _)| *name == self.dtype);
        let (_, bits) = known.ok_or_else(|| SizeError::Dtype(self.dtype.clone()))?;
        let count = self.shape.0.iter().try_fold(1_u64, |n, d| n.checked_mul(*d as u64));
        let bits = count.and_then(|count| count.checked_mul(*bits));
        let whole = bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8);
        whole.ok_or_else(|| SizeError::Shape(self.shape.0.clone()))
    }
}

/// A shape with a bounded number of dimensions.
struct Dimensions(Vec<usize>);

impl<'de> Deserialize<'de> for Dimensions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shape;
        impl<'de> Visitor<'de> for Shape {
            type Value = Dimensions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {DIMENSIONS_MAX} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Dimensions, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = items.next_element()? {
                    if shape.len() == DIMENSIONS_MAX {
                        return Err(A::Error::invalid_length(DIMENSIONS_MAX + 1, &self));
                    }
                    shape.push(dimension);
                }
                Ok(Dimensions(shape))
            }
        }
        deserializer.deserialize_seq(Shape)
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Header, A::Error> {
                let mut tensors = BTreeMap::new();
                while let Some(name) = entries.next_key::<String>()? {
                    if name == METADATA {
                        entries.next_value::<BTreeMap<String, IgnoredAny>>()?;
                        continue;
                    }
                    match tensors.entry(name) {
                        MapEntry::Vacant(place) => place.insert(entries.next_value()?),
                        MapEntry::Occupied(other) => {
                            let what = format!("the tensor `{}` stands in it twice", other.key());
                            return Err(A::Error::custom(what));
                        }
                    };
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with `header` and `data` bytes of data.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn of(header: &str, data: usize) -> Result<Vec<TensorEntry>, String> {
        whole(&file(header, data)).map_err(|e| e.to_string())
    }

    fn whole(bytes: &[u8]) -> Result<Vec<TensorEntry>, LoadError> {
        read(Path::new("m.safetensors"), bytes.len() as u64, |out, at| {
            out.copy_from_slice(&bytes[at as usize..][..out.len()]);
            Ok(())
        })
    }

    fn tensor(name: &str, dtype: &str, shape: &str, from: u64, to: u64) -> String {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    }

    #[test]
    fn tensors_come_in_the_order_of_their_bytes() {
        let (b, a) = (tensor("b", "BF16", "[2,3]", 4, 16), tensor("a", "F32", "[]", 0, 4));
        let header = format!(r#"{{"__metadata__":{{"format":"pt"}},{b},{a}}}  "#);
        let entries = of(&header, 16).unwrap();
        let names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
        assert_eq!((names, entries[1].shape.as_slice()), (vec!["a", "b"], [2, 3].as_slice()));
        assert_eq!(entries[1].range.end, 8 + header.len() as u64 + 16);
        assert_eq!(of("{}", 0), Ok(Vec::new()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let a = tensor("a", "BF16", "[2,2]", 0, 8);
        let both = |second: &str| format!("{{{a},{second}}}");
        let deep = format!(r#"{{"a":{}"#, "[".repeat(100_000));
        for (header, data, want) in [
            (both(&tensor("b", "BF16", "[2]", 6, 10)), 10, "tensor `b` in m.safetensors: overlaps"),
            (
                both(&tensor("b", "BF16", "[2]", 10, 14)),
                14,
                "tensor `b` in m.safetensors: leaves a",
            ),
            (both(&tensor("a", "BF16", "[4]", 0, 8)), 8, "the tensor `a` stands in it twice"),
            (both(&tensor("b", "BF16", "[2]", 8, 12)), 11, "tensor `b` ends at byte 12 of the"),
            (both(&tensor("b", "BF16", "[2]", 8, 12)), 13, "tensors end at byte 12 of the data"),
            (both(&tensor("b", "BF16", "[3]", 8, 12)), 12, "[3] elements of BF16 have 6 bytes"),
            (both(&tensor("b", "BF16", "[2]", 12, 8)), 12, "its offsets are 12..8"),
            (both(&tensor("b", "Q4_K", "[2]", 8, 12)), 12, "dtype Q4_K is unknown"),
            (
                both(&tensor("b", "F4", "[1]", 8, 9)),
                9,
                "a tensor of shape [1] does not fill whole bytes",
            ),
            (
                both(&tensor("b", "BF16", "[4294967296,4294967296]", 8, 8)),
                8,
                "shape [4294967296, 4294967296] does not fill",
            ),
            (both(&tensor("b", "BF16", "[1,1,1,1,1,1,1,1,1]", 8, 10)), 10, "at most 8 dimensions"),
            (both(r#""b":{"dtype":"F32"}"#), 8, "missing field `shape`"),
            (both(r#""b":{"dtype":"F32","more":1}"#), 8, "unknown field `more`"),
            (r#"{"a":{"dtype":"F32","dtype":"F16"}}"#.into(), 8, "duplicate field `dtype`"),
            ("[]".into(), 8, "expected an object of tensors"),
            (deep, 8, "safetensors header:"),
        ] {
            let error = of(&header, data).unwrap_err();
            assert!(error.contains(want), "expected `{want}` in `{error}`");
        }
    }

    #[test]
    fn no_length_is_believed() {
        for length in [u64::MAX, u64::MAX - 7, 1 << 62, HEADER_BYTES_MAX + 1, 3] {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend(b"{}");
            let error = whole(&bytes).unwrap_err().to_string();
            assert!(error.contains(&format!("its header has {length} bytes")), "{error}");
        }
        assert!(whole(b"1234567").is_err());
        let long = " ".repeat(HEADER_BYTES_MAX as usize + 1);
        assert!(of(&long, 0).unwrap_err().contains("header must be at most 67108864 bytes"));
    }
}
