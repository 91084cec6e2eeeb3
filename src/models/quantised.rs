//! Finds the matrices that safetensors store as codes, and shows them under the names of plain
//! ones.
//!
//! `quantization_config` names the method: fp8, GPTQ, AWQ, and of compressed-tensors the formats
//! for floats and whole numbers of eight bits and for packed ones. Which matrices are quantised is
//! said by the names of their tensors. Values are rounded to 16 bits when they are read, and
//! activations stay in 16 bits, also where the method's own kernels round them: scales for those
//! (`input_scale`) are not used. What would change values otherwise is refused.

use super::coded::{Coded, Coding, Groups, Layout, ScaleType, Stored, Zeros};
use super::error::LoadError;
use super::tensor::{StoredType, Tensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Key of the configuration.
const KEY: &str = "quantization_config";
/// Ends of tensors that belong to a quantised matrix and have no part in its values.
const UNUSED: [&str; 2] = ["input_scale", "input_zero_point"];

/// How a checkpoint's matrices are quantised.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quantisation {
    method: Method,
    /// Method, bits and group in one word, as identities have it: `gptq-int4-g128`.
    pub scheme: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Method {
    /// Floats or whole numbers of eight bits in rows; where scales have two dimensions, outputs and
    /// inputs that share one.
    Rows { block: Option<[usize; 2]> },
    /// Codes of so many bits in words: layout, and what is added to a stored zero.
    Words { layout: Layout, bits: u32, zero_more: u32 },
}

/// A configuration, with errors that name its keys.
struct Reader<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Quantisation {
    /// What `config` says, if it says anything; `path` is named in errors.
    ///
    /// # Errors
    /// When the method, or something about it, is not supported.
    pub fn of(path: &Path, config: &Value) -> Result<Option<Self>, LoadError> {
        let Some(json) = config.get(KEY).filter(|v| !v.is_null()) else { return Ok(None) };
        let reader = Reader { path, json };
        let name = json.get("quant_method").and_then(Value::as_str);
        let quantisation = match name {
            Some("fp8") => reader.fp8()?,
            Some("gptq") => reader.gptq()?,
            Some("awq") => reader.awq()?,
            Some("compressed-tensors") => reader.compressed()?,
            _ => {
                let method = json.get("quant_method").unwrap_or(json).to_string();
                let supported = "awq, compressed-tensors, fp8 and gptq are";
                return Err(reader.unsupported("quant_method", &method, supported));
            }
        };
        Ok(Some(quantisation))
    }

    /// The tensors of a checkpoint with each quantised matrix in place of what it is made of.
    ///
    /// # Errors
    /// When no matrix is stored so, a part of one is missing, or has another shape or type than its
    /// codes ask for.
    pub fn applied(
        &self,
        config: &Path,
        stored: &BTreeMap<String, Tensor>,
    ) -> Result<BTreeMap<String, Tensor>, LoadError> {
        if !stored.iter().any(|(name, tensor)| self.module(name, tensor).is_some()) {
            let what = format!("says that matrices are {}, and none is", self.scheme);
            let (path, key) = (config.to_owned(), KEY.to_owned());
            return Err(LoadError::Key { path, key, what });
        }
        let mut tensors = stored.clone();
        for (name, codes) in stored {
            let Some(module) = self.module(name, codes) else { continue };
            let parts = Parts { module, stored, codes };
            let coded = match self.method {
                Method::Rows { block } => parts.in_rows(block)?,
                Method::Words { layout: Layout::Rows, bits, .. } => parts.compressed(bits)?,
                Method::Words { layout, bits, zero_more } => {
                    parts.in_words(layout, bits, zero_more)?
                }
            };
            for end in PARTS.iter().chain(&UNUSED) {
                tensors.remove(&format!("{module}.{end}"));
            }
            let matrix = Tensor {
                name: format!("{module}.weight"),
                shape: coded.shape.to_vec(),
                stored: StoredType::Coded(Arc::new(coded)),
                ..codes.clone()
            };
            tensors.insert(matrix.name.clone(), matrix);
        }
        Ok(tensors)
    }

    /// The module whose codes a tensor holds, if it does.
    fn module<'a>(&self, name: &'a str, tensor: &Tensor) -> Option<&'a str> {
        match self.method {
            Method::Rows { .. } => {
                let is_coded = coding(&tensor.stored).is_some() && tensor.shape.len() == 2;
                name.strip_suffix(".weight").filter(|_| is_coded)
            }
            Method::Words { layout: Layout::Rows, .. } => name.strip_suffix(".weight_packed"),
            Method::Words { .. } => name.strip_suffix(".qweight"),
        }
    }
}

/// Ends of the tensors that a quantised matrix is made of.
const PARTS: [&str; 11] = [
    "weight",
    "qweight",
    "weight_packed",
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
];

impl Reader<'_> {
    fn error(&self, key: &str, what: impl ToString) -> LoadError {
        let (path, key) = (self.path.to_owned(), format!("{KEY}.{key}"));
        LoadError::Key { path, key, what: what.to_string() }
    }

    fn unsupported(&self, key: &str, value: &str, supported: &str) -> LoadError {
        LoadError::Unsupported {
            path: self.path.to_owned(),
            key: format!("{KEY}.{key}"),
            value: value.to_owned(),
            supported: supported.to_owned(),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    /// Refuses any value of `key` but these.
    fn only(&self, key: &str, allowed: &[Value], supported: &str) -> Result<(), LoadError> {
        match self.get(key) {
            Some(value) if !allowed.contains(value) => {
                Err(self.unsupported(key, &value.to_string(), supported))
            }
            _ => Ok(()),
        }
    }

    fn bits(&self, key: &str, value: Option<&Value>, allowed: &[u32]) -> Result<u32, LoadError> {
        let value = value.ok_or_else(|| self.error(key, "is missing"))?;
        let bits = value.as_u64().and_then(|bits| u32::try_from(bits).ok());
        bits.filter(|bits| allowed.contains(bits)).ok_or_else(|| {
            let supported: Vec<String> = allowed.iter().map(u32::to_string).collect();
            let verb = if allowed.len() == 1 { "is" } else { "are" };
            let supported = format!("{} {verb}", supported.join(" and "));
            self.unsupported(key, &value.to_string(), &supported)
        })
    }

    /// `-g128`, or nothing where all inputs of an output share a scale.
    fn group(&self) -> String {
        match self.get("group_size").and_then(Value::as_i64) {
            Some(size) if size > 0 => format!("-g{size}"),
            _ => String::new(),
        }
    }

    fn fp8(&self) -> Result<Quantisation, LoadError> {
        self.only("fmt", &["e4m3".into(), "float8_e4m3fn".into()], "e4m3 is")?;
        self.only("scale_fmt", &["float".into()], "float is")?;
        let block = self.block("weight_block_size", self.get("weight_block_size"))?;
        Ok(Quantisation {
            method: Method::Rows { block },
            scheme: format!("fp8{}", of_block(block)),
        })
    }

    fn block(&self, key: &str, value: Option<&Value>) -> Result<Option<[usize; 2]>, LoadError> {
        let Some(value) = value.filter(|v| !v.is_null()) else { return Ok(None) };
        let size = |v: &Value| v.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| *v > 0);
        let sizes: Option<Vec<usize>> = value.as_array().and_then(|l| l.iter().map(size).collect());
        match sizes.as_deref() {
            Some(&[outputs, inputs]) => Ok(Some([outputs, inputs])),
            _ => Err(self.error(key, format!("must hold two sizes above 0, got {value}"))),
        }
    }

    fn gptq(&self) -> Result<Quantisation, LoadError> {
        let bits = self.bits("bits", self.get("bits"), &[2, 4, 8])?;
        let formats = ["gptq".into(), "gptq_v2".into()];
        self.only("checkpoint_format", &formats, "gptq and gptq_v2 are")?;
        self.only("dynamic", &[Value::Object(Default::default())], "one for all matrices is")?;
        // In the first format a zero is stored as one less.
        let zero_more = match self.get("checkpoint_format").and_then(Value::as_str) {
            Some("gptq_v2") => 0,
            _ => 1,
        };
        let method = Method::Words { layout: Layout::Columns, bits, zero_more };
        Ok(Quantisation { method, scheme: format!("gptq-int{bits}{}", self.group()) })
    }

    fn awq(&self) -> Result<Quantisation, LoadError> {
        let bits = self.bits("bits", self.get("bits").or(self.get("w_bit")), &[4])?;
        let versions = ["gemm".into(), "GEMM".into()];
        self.only("version", &versions, "gemm is")?;
        self.only("zero_point", &[true.into()], "true is")?;
        let method = Method::Words { layout: Layout::Interleaved, bits, zero_more: 0 };
        Ok(Quantisation { method, scheme: format!("awq-int{bits}{}", self.group()) })
    }

    fn compressed(&self) -> Result<Quantisation, LoadError> {
        for key in ["kv_cache_scheme", "transform_config"] {
            self.only(key, &[Value::Object(Default::default())], "null is")?;
        }
        if let Some(format) = self.get("sparsity_config").and_then(|s| s.get("format"))
            && format != "dense"
        {
            return Err(self.unsupported(
                "sparsity_config.format",
                &format.to_string(),
                "dense is",
            ));
        }
        let groups = self.get("config_groups").and_then(Value::as_object);
        let groups = groups.ok_or_else(|| self.error("config_groups", "must be an object"))?;
        let mut all: Vec<Quantisation> = Vec::new();
        for (name, group) in groups {
            let path = format!("config_groups.{name}.weights");
            let weights = group.get("weights").filter(|w| w.is_object());
            let weights = weights.ok_or_else(|| self.error(&path, "must be an object"))?;
            let format = group.get("format").filter(|f| !f.is_null()).or(self.get("format"));
            all.push(self.compressed_group(&path, weights, format)?);
        }
        match all.as_slice() {
            [] => Err(self.error("config_groups", "must have a group")),
            [first, others @ ..] if others.iter().all(|other| other == first) => Ok(first.clone()),
            _ => Err(self.error("config_groups", "must quantise all weights in the same way")),
        }
    }

    fn compressed_group(
        &self,
        path: &str,
        weights: &Value,
        format: Option<&Value>,
    ) -> Result<Quantisation, LoadError> {
        let format = format.and_then(Value::as_str).unwrap_or_default();
        let number = (weights.get("type").and_then(Value::as_str)).unwrap_or("int");
        let bits =
            |allowed| self.bits(&format!("{path}.num_bits"), weights.get("num_bits"), allowed);
        let group = Reader { path: self.path, json: weights }.group();
        let block =
            || self.block(&format!("{path}.block_structure"), weights.get("block_structure"));
        let (method, scheme) = match (format, number) {
            ("pack-quantized", "int") => {
                let (layout, bits) = (Layout::Rows, bits(&[4, 8])?);
                (Method::Words { layout, bits, zero_more: 0 }, format!("int{bits}{group}"))
            }
            ("float-quantized" | "naive-quantized", "float") => {
                bits(&[8])?;
                let block = block()?;
                (Method::Rows { block }, format!("fp8{group}{}", of_block(block)))
            }
            ("int-quantized" | "naive-quantized", "int") => {
                bits(&[8])?;
                (Method::Rows { block: None }, format!("int8{group}"))
            }
            _ => {
                let supported = "float-quantized, int-quantized and pack-quantized are";
                return Err(self.unsupported(
                    "format",
                    &format!("{format} of {number}"),
                    supported,
                ));
            }
        };
        Ok(Quantisation { method, scheme: format!("compressed-{scheme}") })
    }
}

/// What the elements of a stored type are codes of.
fn coding(stored: &StoredType) -> Option<Coding> {
    match stored {
        StoredType::Unread(name) if name == "F8_E4M3" => Some(Coding::Float8),
        StoredType::Unread(name) if name == "I8" => Some(Coding::Int8),
        _ => None,
    }
}

/// The tensors that one matrix is made of.
struct Parts<'a> {
    module: &'a str,
    stored: &'a BTreeMap<String, Tensor>,
    codes: &'a Tensor,
}

impl<'a> Parts<'a> {
    fn find(&self, end: &str) -> Option<&'a Tensor> {
        self.stored.get(&format!("{}.{end}", self.module))
    }

    fn get(&self, end: &str) -> Result<&'a Tensor, LoadError> {
        self.find(end)
            .ok_or_else(|| self.codes.error(format!("has no `{}.{end}` beside it", self.module)))
    }

    fn scale_type(scales: &Tensor) -> Result<ScaleType, LoadError> {
        let name = scales.stored.name();
        ScaleType::of(&name)
            .ok_or_else(|| scales.error(format!("must be F16, BF16 or F32, got {name}")))
    }

    /// Words of 32 bits in this shape.
    fn words(tensor: &Tensor, shape: [usize; 2]) -> Result<Stored, LoadError> {
        let name = tensor.stored.name();
        if name != "I32" {
            return Err(tensor.error(format!("must be I32, got {name}")));
        }
        Ok(bytes(&tensor.clone().expect(&shape)?))
    }

    /// Group of each input, where inputs of a group are no neighbours.
    fn of_inputs(
        tensor: Option<&Tensor>,
        cols: usize,
        (size, count): (usize, usize),
    ) -> Result<Option<Vec<u32>>, LoadError> {
        let Some(tensor) = tensor else { return Ok(None) };
        let name = tensor.stored.name();
        if name != "I32" {
            return Err(tensor.error(format!("must be I32, got {name}")));
        }
        let words = bytes(&tensor.clone().expect(&[cols])?).read()?;
        let words = words.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let groups: Result<Vec<u32>, i32> = words
            .map(|g| u32::try_from(g).ok().filter(|g| (*g as usize) < count).ok_or(g))
            .collect();
        let groups = groups.map_err(|group| {
            tensor.error(format!("must name groups below {count}, got {group}"))
        })?;
        let is_plain = groups.iter().enumerate().all(|(col, group)| col / size == *group as usize);
        Ok((!is_plain).then_some(groups))
    }

    /// The size of `count` groups of `inputs`.
    fn group_size(scales: &Tensor, inputs: usize, count: usize) -> Result<usize, LoadError> {
        match inputs.checked_div(count) {
            Some(size) if size > 0 && inputs.is_multiple_of(count) => Ok(size),
            _ => Err(scales.error(format!("has {count} groups for {inputs} inputs"))),
        }
    }

    /// GPTQ and AWQ.
    fn in_words(&self, layout: Layout, bits: u32, zero_more: u32) -> Result<Coded, LoadError> {
        let (codes, scales) = (self.codes, self.get("scales")?);
        let many = (u32::BITS / bits) as usize;
        let &[first, second] = codes.shape.as_slice() else {
            return Err(codes.error(format!("must have two dimensions, got {:?}", codes.shape)));
        };
        let (words, fits) = match layout {
            Layout::Columns => (first, second.is_multiple_of(many)),
            _ => (second, true),
        };
        let whole = words
            .checked_mul(many)
            .filter(|_| fits)
            .ok_or_else(|| codes.error(format!("{second} outputs must be a multiple of {many}")))?;
        let [rows, cols] = match layout {
            Layout::Columns => [second, whole],
            _ => [whole, first],
        };
        let count = scales.shape.first().copied().unwrap_or(0);
        let scales = scales.clone().expect(&[count, rows])?;
        let size = Self::group_size(&scales, cols, count)?;
        let zeros = Self::words(self.get("qzeros")?, [count, rows / many])?;
        let of_inputs = match layout {
            Layout::Columns => Self::of_inputs(self.find("g_idx"), cols, (size, count))?,
            _ => None,
        };
        Ok(Coded {
            shape: [rows, cols],
            coding: Coding::Packed(layout, bits),
            codes: Self::words(codes, [first, second])?,
            scale_type: Self::scale_type(&scales)?,
            scales: bytes(&scales),
            zeros: Zeros::Stored(zeros, zero_more),
            groups: Groups { block: [1, size], count: [rows, count], by_input: true, of_inputs },
        })
    }

    /// Packed codes of compressed-tensors.
    fn compressed(&self, bits: u32) -> Result<Coded, LoadError> {
        let [rows, cols] = self.shape()?;
        let many = (u32::BITS / bits) as usize;
        let scales = self.get("weight_scale")?;
        let count = if scales.shape.len() < 2 { 1 } else { scales.cols() };
        let size = Self::group_size(scales, cols, count)?;
        let shape = if scales.shape.len() < 2 { vec![rows] } else { vec![rows, count] };
        let scales = scales.clone().expect(&shape)?;
        let zeros = match self.find("weight_zero_point") {
            None => Zeros::Middle,
            Some(zeros) => Zeros::Stored(Self::words(zeros, [rows.div_ceil(many), count])?, 0),
        };
        let of_inputs = Self::of_inputs(self.find("weight_g_idx"), cols, (size, count))?;
        Ok(Coded {
            shape: [rows, cols],
            coding: Coding::Packed(Layout::Rows, bits),
            codes: Self::words(self.codes, [rows, cols.div_ceil(many)])?,
            scale_type: Self::scale_type(&scales)?,
            scales: bytes(&scales),
            zeros,
            groups: Groups { block: [1, size], count: [rows, count], by_input: false, of_inputs },
        })
    }

    /// The shape that compressed-tensors store beside packed codes.
    fn shape(&self) -> Result<[usize; 2], LoadError> {
        let tensor = self.get("weight_shape")?;
        let (name, all) = (tensor.stored.name(), bytes(tensor).read()?);
        let number = |bytes: &[u8]| match (name.as_str(), bytes.len()) {
            ("I64", 8) => i64::from_le_bytes(bytes.try_into().ok()?).try_into().ok(),
            ("I32", 4) => i32::from_le_bytes(bytes.try_into().ok()?).try_into().ok(),
            _ => None,
        };
        let sizes: Option<Vec<usize>> = all.chunks(all.len().max(2) / 2).map(number).collect();
        match sizes.as_deref() {
            Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok([rows, cols]),
            _ => Err(tensor.error("must hold the two sizes of a matrix as I64 or I32")),
        }
    }

    /// Codes of eight bits in rows.
    fn in_rows(&self, block: Option<[usize; 2]>) -> Result<Coded, LoadError> {
        let codes = self.codes;
        let [rows, cols] = [codes.rows(), codes.cols()];
        let scales = match self.find("weight_scale") {
            Some(scales) => scales,
            None => self.get("weight_scale_inv")?,
        };
        if let Some(zeros) = self.find("weight_zero_point") {
            return Err(zeros.error("zeros beside codes of eight bits are not supported"));
        }
        let of_group = |count: usize| cols.checked_div(count).filter(|size| size * count == cols);
        let block = match (scales.shape.as_slice(), block) {
            ([] | [1] | [1, 1], _) => Some([rows, cols]),
            (&[out], _) if out == rows => Some([1, cols]),
            (&[_, _], Some(block)) => Some(block),
            (&[out, count], None) if out == rows => of_group(count).map(|size| [1, size]),
            _ => None,
        };
        let block = block.filter(|block| !block.contains(&0));
        let count = block.map(|[out, along]| [rows.div_ceil(out), cols.div_ceil(along)]);
        let fits =
            |[out, along]: &[usize; 2]| scales.shape.iter().product::<usize>() == out * along;
        let (block, count) = block.zip(count.filter(fits)).ok_or_else(|| {
            scales.error(format!("has shape {:?} for {rows} x {cols} codes", scales.shape))
        })?;
        Ok(Coded {
            shape: [rows, cols],
            coding: coding(&codes.stored).ok_or_else(|| codes.error("holds no codes"))?,
            codes: bytes(codes),
            scale_type: Self::scale_type(scales)?,
            scales: bytes(scales),
            zeros: Zeros::Middle,
            groups: Groups { block, count, by_input: false, of_inputs: None },
        })
    }
}

/// `-128x128`, or nothing where scales are of rows or of the whole.
fn of_block(block: Option<[usize; 2]>) -> String {
    block.map_or_else(String::new, |[outputs, inputs]| format!("-{outputs}x{inputs}"))
}

fn bytes(tensor: &Tensor) -> Stored {
    let Tensor { name, file, range, .. } = tensor;
    Stored { name: name.clone(), file: Arc::clone(file), range: range.clone() }
}
