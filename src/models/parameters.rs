//! Lists the parameters of a model as vLLM does, because Targon's powv counts through that list.
//!
//! Order, fusion and padding follow vLLM's modules (`vllm/model_executor/models/*.py`, tensor
//! parallel size 1): a module's parameters come in the order of its registration, a weight before
//! its bias; q, k, v are one parameter, gate and up another; the vocabulary is padded to 64 rows of
//! zeros. Within attention: qkv, o, then the head norms (`qwen3.py`). Experts are two stacked
//! parameters, before the router in `qwen3_moe.py`, after it in `mixtral.py`. The original cannot
//! take an element of a three-dimensional parameter; ours reads row `out mod experts` flat.
//!
//! Elements are read one by one from the checkpoint's files, each by its position, and rounded to
//! the engine's type, which is what vLLM would hold.

use super::checkpoint::Checkpoint;
use super::error::LoadError;
use super::spec::{ExpertSpec, Spec};
use super::tensor::Tensor;
use crate::ops::dtype::Dtype;
use crate::proof::powv::{PowvShape, select, value};

/// Rows that vLLM pads a vocabulary to.
const VOCAB_MULTIPLE: usize = 64;

/// A parameter as vLLM registers it.
pub struct Parameter {
    /// vLLM's name for it.
    pub name: String,
    /// Its shape, padding included.
    pub shape: PowvShape,
    /// Tensors below each other; for experts, those of one expert after the other.
    parts: Vec<Tensor>,
    /// Parts that make one row, read flat: an expert's matrices, or the pieces of a fused bias.
    /// 0 where parts are rows of a matrix.
    parts_of_row: usize,
    /// Added to the stored value (a GGUF norm of Gemma holds `1 + w`).
    offset: f32,
}

/// All parameters, in order.
pub struct Parameters {
    dtype: Dtype,
    list: Vec<Parameter>,
    shapes: Vec<PowvShape>,
}

impl Parameters {
    /// The list for a checkpoint.
    ///
    /// # Errors
    /// When a tensor is missing.
    pub fn new(checkpoint: &Checkpoint, spec: &Spec, dtype: Dtype) -> Result<Self, LoadError> {
        let mut b = Builder { checkpoint, spec, list: Vec::new() };
        b.matrix("model.embed_tokens.weight", &["model.embed_tokens.weight".to_owned()])?;
        for layer in 0..spec.layers {
            b.layer(&format!("model.layers.{layer}"))?;
        }
        b.norm("model.norm.weight")?;
        if !spec.tied {
            b.matrix("lm_head.weight", &["lm_head.weight".to_owned()])?;
        }
        let shapes = b.list.iter().map(|p| p.shape).collect();
        Ok(Self { dtype, list: b.list, shapes })
    }

    /// The parameters, in order.
    pub fn list(&self) -> &[Parameter] {
        &self.list
    }

    /// The powv of a token: of the sum of the prompt's ids and the sum of the output's before it.
    ///
    /// # Errors
    /// When the element cannot be read.
    pub fn powv(&self, input_sum: u64, output_sum: u64) -> Result<i64, LoadError> {
        let Some(element) = select(&self.shapes, input_sum, output_sum) else { return Ok(0) };
        let parameter = &self.list[element.parameter];
        let weight = parameter.element(element.row, element.col)?;
        Ok(value(self.dtype.nearest(weight), input_sum, output_sum))
    }
}

impl Parameter {
    fn element(&self, row: usize, col: usize) -> Result<f32, LoadError> {
        if self.parts_of_row > 0 {
            let first = row * self.parts_of_row;
            return stacked(&self.parts[first..first + self.parts_of_row], col);
        }
        let mut row = row;
        for part in &self.parts {
            if row < part.rows() {
                return Ok(part.element(row, col)? + self.offset);
            }
            row -= part.rows();
        }
        Ok(0.0) // padding of the vocabulary
    }
}

/// Element `at` of matrices below each other, read flat.
fn stacked(parts: &[Tensor], at: usize) -> Result<f32, LoadError> {
    let mut at = at;
    for part in parts {
        let count = part.rows() * part.cols();
        if at < count {
            return part.element(at / part.cols(), at % part.cols());
        }
        at -= count;
    }
    Ok(0.0)
}

struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    spec: &'a Spec,
    list: Vec<Parameter>,
}

impl Builder<'_> {
    fn layer(&mut self, layer: &str) -> Result<(), LoadError> {
        let a = &self.spec.attention;
        let (qkv_bias, out_bias, qk_norm, post) =
            (a.qkv_bias, a.out_bias, a.qk_norm, self.spec.norm.post);
        let attention = format!("{layer}.self_attn");
        let halves: &[&str] = if a.fused { &["qkv_proj"] } else { &["q_proj", "k_proj", "v_proj"] };
        self.fused(&attention, "qkv_proj", halves, qkv_bias)?;
        self.fused(&attention, "o_proj", &["o_proj"], out_bias)?;
        if qk_norm {
            self.vector(&format!("{attention}.q_norm.weight"))?;
            self.vector(&format!("{attention}.k_norm.weight"))?;
        }
        match self.spec.feed_forward.experts {
            None => {
                let fused = self.spec.feed_forward.fused;
                let halves: &[&str] =
                    if fused { &["gate_up_proj"] } else { &["gate_proj", "up_proj"] };
                let mlp = format!("{layer}.mlp");
                self.fused(&mlp, "gate_up_proj", halves, false)?;
                self.fused(&mlp, "down_proj", &["down_proj"], false)?;
            }
            Some(experts) => self.mixture(layer, experts)?,
        }
        self.norm(&format!("{layer}.input_layernorm.weight"))?;
        self.norm(&format!("{layer}.post_attention_layernorm.weight"))?;
        if post {
            self.norm(&format!("{layer}.pre_feedforward_layernorm.weight"))?;
            self.norm(&format!("{layer}.post_feedforward_layernorm.weight"))?;
        }
        Ok(())
    }

    /// A fused matrix, and its bias where there is one.
    fn fused(
        &mut self,
        module: &str,
        name: &str,
        halves: &[&str],
        bias: bool,
    ) -> Result<(), LoadError> {
        let of = |suffix: &str| -> Vec<String> {
            halves.iter().map(|h| format!("{module}.{h}.{suffix}")).collect()
        };
        self.matrix(&format!("{module}.{name}.weight"), &of("weight"))?;
        if bias {
            let parts = self.tensors(&of("bias"))?;
            let shape = PowvShape { rows: 1, cols: parts.iter().map(Tensor::cols).sum() };
            let parts_of_row = parts.len();
            self.push(format!("{module}.{name}.bias"), shape, parts, parts_of_row);
        }
        Ok(())
    }

    fn mixture(&mut self, layer: &str, experts: ExpertSpec) -> Result<(), LoadError> {
        let module = format!("{layer}.{}", experts.names.module);
        let [gate, up, down] = experts.names.projections;
        let router_first = experts.names.router_first;
        let router = format!("{module}.gate.weight");
        if router_first {
            self.matrix(&router, std::slice::from_ref(&router))?;
        }
        self.stack(&module, "w13_weight", &[gate, up], experts.count)?;
        self.stack(&module, "w2_weight", &[down], experts.count)?;
        if !router_first {
            self.matrix(&router, std::slice::from_ref(&router))?;
        }
        Ok(())
    }

    fn stack(
        &mut self,
        module: &str,
        name: &str,
        projections: &[&str],
        count: usize,
    ) -> Result<(), LoadError> {
        let of_expert =
            |e: usize| projections.iter().map(move |p| format!("{module}.experts.{e}.{p}.weight"));
        let names: Vec<String> = (0..count).flat_map(of_expert).collect();
        let parts = self.tensors(&names)?;
        let cols = parts[..projections.len()].iter().map(|t| t.rows() * t.cols()).sum();
        let shape = PowvShape { rows: count, cols };
        self.push(format!("{module}.experts.{name}"), shape, parts, projections.len());
        Ok(())
    }

    fn matrix(&mut self, name: &str, tensors: &[String]) -> Result<(), LoadError> {
        let parts = self.tensors(tensors)?;
        let rows: usize = parts.iter().map(Tensor::rows).sum();
        let is_vocabulary = name == "model.embed_tokens.weight" || name == "lm_head.weight";
        let rows = if is_vocabulary { rows.next_multiple_of(VOCAB_MULTIPLE) } else { rows };
        let cols = parts[0].cols();
        self.push(name.to_owned(), PowvShape { rows, cols }, parts, 0);
        Ok(())
    }

    fn norm(&mut self, name: &str) -> Result<(), LoadError> {
        self.vector(name)?;
        let norm = &self.spec.norm;
        if let Some(last) = self.list.last_mut() {
            last.offset = norm.offset - norm.published_offset;
        }
        Ok(())
    }

    fn vector(&mut self, name: &str) -> Result<(), LoadError> {
        let parts = self.tensors(&[name.to_owned()])?;
        let cols = parts[0].cols();
        self.push(name.to_owned(), PowvShape { rows: 1, cols }, parts, 0);
        Ok(())
    }

    fn tensors(&self, names: &[String]) -> Result<Vec<Tensor>, LoadError> {
        names.iter().map(|name| self.checkpoint.tensor(name)).collect()
    }

    fn push(&mut self, name: String, shape: PowvShape, parts: Vec<Tensor>, parts_of_row: usize) {
        self.list.push(Parameter { name, shape, parts, parts_of_row, offset: 0.0 });
    }
}
