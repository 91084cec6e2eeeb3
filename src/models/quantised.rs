//! Finds the matrices that safetensors store as codes, and shows them under the names of plain
//! ones.
//!
//! `quantization_config` names the method: fp8, GPTQ, AWQ, and of compressed-tensors the formats
//! for floats and whole numbers of eight bits and for packed ones. Which matrices are quantised is
//! said by the names of their tensors. Values are rounded to 16 bits when they are read, and
//! activations stay in 16 bits, also where the method's own kernels round them: scales for those
//! (`input_scale`) are not used. What would change values otherwise is refused.

mod parts;

use super::error::LoadError;
use super::tensor::{StoredType, Tensor};
use parts::{Parts, Words, coding};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The module whose rows are looked up one by one.
const EMBEDDING: &str = "model.embed_tokens";
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
    /// GPTQ's words: what is added to a stored zero, and whether groups of inputs must be there.
    Gptq { words: Words, zero_more: u32, is_ordered: bool },
    /// AWQ's words.
    Awq { words: Words },
    /// The words of compressed-tensors.
    Packed { words: Words },
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
                Method::Gptq { words, zero_more, is_ordered } => {
                    parts.gptq(words, zero_more, is_ordered)?
                }
                Method::Awq { words } => parts.awq(words)?,
                Method::Packed { words } => parts.packed(words)?,
            };
            if module == EMBEDDING {
                return Err(codes.error("an embedding of codes is not supported"));
            }
            let used = [codes.name.as_str(), coded.scales.name.as_str()];
            used.iter().for_each(|name| drop(tensors.remove(*name)));
            for end in self.others().iter().chain(&UNUSED) {
                tensors.remove(&format!("{module}.{end}"));
            }
            let matrix = Tensor {
                name: format!("{module}.weight"),
                shape: coded.shape.to_vec(),
                stored: StoredType::Coded(Arc::new(coded)),
                ..codes.clone()
            };
            if let Some(plain) = tensors.insert(matrix.name.clone(), matrix) {
                return Err(plain.error(format!("stands beside `{name}`, which holds its codes")));
            }
        }
        Ok(tensors)
    }

    /// Ends of the tensors that a matrix is made of beside codes and scales.
    fn others(&self) -> &'static [&'static str] {
        match self.method {
            Method::Rows { .. } => &[],
            Method::Gptq { .. } => &["qzeros", "g_idx"],
            Method::Awq { .. } => &["qzeros"],
            Method::Packed { .. } => &["weight_zero_point", "weight_g_idx", "weight_shape"],
        }
    }

    /// The module whose codes a tensor holds, if it does.
    fn module<'a>(&self, name: &'a str, tensor: &Tensor) -> Option<&'a str> {
        match self.method {
            Method::Rows { .. } => {
                let is_coded = coding(&tensor.stored).is_some() && tensor.shape.len() == 2;
                name.strip_suffix(".weight").filter(|_| is_coded)
            }
            Method::Gptq { .. } | Method::Awq { .. } => name.strip_suffix(".qweight"),
            Method::Packed { .. } => name.strip_suffix(".weight_packed"),
        }
    }
}

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
            let all: Vec<String> = allowed.iter().map(u32::to_string).collect();
            let supported = match all.as_slice() {
                [one] => format!("{one} is"),
                [others @ .., last] => format!("{} and {last} are", others.join(", ")),
                [] => "none is".to_owned(),
            };
            self.unsupported(key, &value.to_string(), &supported)
        })
    }

    /// Inputs that share a scale; none where all of an output do.
    fn group(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_i64().map(|size| (size, usize::try_from(size))) {
            Some((-1, _)) => Ok(None),
            Some((_, Ok(size))) if size > 0 => Ok(Some(size)),
            _ => Err(self.error(key, format!("must be -1 or a number above 0, got {value}"))),
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
        let (zero_more, version) = match self.get("checkpoint_format").and_then(Value::as_str) {
            Some("gptq_v2") => (0, "-v2"),
            _ => (1, ""),
        };
        let is_ordered = self.get("desc_act").and_then(Value::as_bool).unwrap_or(false);
        let group = self.group("group_size")?;
        let method = Method::Gptq { words: Words { bits, group }, zero_more, is_ordered };
        Ok(Quantisation { method, scheme: format!("gptq{version}-int{bits}{}", of_group(group)) })
    }

    fn awq(&self) -> Result<Quantisation, LoadError> {
        let bits = self.bits("bits", self.get("bits").or(self.get("w_bit")), &[4])?;
        let versions = ["gemm".into(), "GEMM".into()];
        self.only("version", &versions, "gemm is")?;
        self.only("zero_point", &[true.into()], "true is")?;
        let key = if self.get("q_group_size").is_some() { "q_group_size" } else { "group_size" };
        let group = self.group(key)?;
        let method = Method::Awq { words: Words { bits, group } };
        Ok(Quantisation { method, scheme: format!("awq-int{bits}{}", of_group(group)) })
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
        let group = Reader { path: self.path, json: weights }.group("group_size")?;
        let of_rows = group.map(|size| [1, size]);
        let block =
            || self.block(&format!("{path}.block_structure"), weights.get("block_structure"));
        let (method, scheme) = match (format, number) {
            ("pack-quantized", "int") => {
                let bits = bits(&[4, 8])?;
                (Method::Packed { words: Words { bits, group } }, format!("int{bits}"))
            }
            ("float-quantized" | "naive-quantized", "float") => {
                bits(&[8])?;
                let block = block()?;
                (Method::Rows { block: block.or(of_rows) }, format!("fp8{}", of_block(block)))
            }
            ("int-quantized" | "naive-quantized", "int") => {
                bits(&[8])?;
                (Method::Rows { block: of_rows }, "int8".to_owned())
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
        Ok(Quantisation { method, scheme: format!("compressed-{scheme}{}", of_group(group)) })
    }
}

/// `-128x128`, or nothing where scales are of rows or of the whole.
fn of_block(block: Option<[usize; 2]>) -> String {
    block.map_or_else(String::new, |[outputs, inputs]| format!("-{outputs}x{inputs}"))
}

/// `-g128`, or nothing where all inputs of an output share a scale.
fn of_group(group: Option<usize>) -> String {
    group.map_or_else(String::new, |size| format!("-g{size}"))
}
