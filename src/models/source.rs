//! Finds where each matrix and vector of a model lies in its checkpoint, for dense layers and
//! mixtures alike. Devices differ in how they pack what is read here.

use super::checkpoint::Checkpoint;
use super::error::LoadError;
use super::spec::{ExpertSpec, Spec};
use super::tensor::{Runs, Tensor};
use crate::ops::dtype::Dtype;
use crate::ops::rope::Rope;
use crate::ops::rowwise::Norm;

/// A checkpoint, read as a shape says and rounded to a type.
pub struct Source<'a> {
    /// Where the stored tensors are read from.
    pub checkpoint: &'a Checkpoint,
    /// The shape that the tensors must have.
    pub spec: &'a Spec,
    /// Type of weights and arithmetic.
    pub dtype: Dtype,
}

/// A matrix as rows of stored tensors.
pub struct MatrixRows {
    parts: Vec<Part>,
}

/// Rows of one tensor.
struct Part {
    tensor: Tensor,
    first: usize,
    rows: usize,
}

/// Reads rows of a matrix; from several threads, rows near each other.
pub struct RowReader<'a> {
    parts: Vec<(&'a Part, Runs<'a>)>,
}

/// Vectors and matrices of one decoder layer, as on any device.
pub struct LayerSource {
    /// Norm before attention.
    pub attention_norm: Norm,
    /// q, k and v rows.
    pub qkv: MatrixRows,
    /// Bias of the q, k and v rows, where the model has one.
    pub qkv_bias: Option<Vec<f32>>,
    /// Norm of each query head.
    pub q_norm: Option<Norm>,
    /// Norm of each key head.
    pub k_norm: Option<Norm>,
    /// Output projection.
    pub out: MatrixRows,
    /// Bias of the output projection, where the family has one.
    pub out_bias: Option<Vec<f32>>,
    /// Norm after attention.
    pub post_attention_norm: Option<Norm>,
    /// Norm before the feed-forward layer.
    pub feed_forward_norm: Norm,
    /// Feed-forward layer.
    pub feed_forward: FeedForwardSource,
    /// Norm after it.
    pub post_feed_forward_norm: Option<Norm>,
}

/// The second half of a layer.
pub enum FeedForwardSource {
    /// One gated perceptron.
    Dense(MlpSource),
    /// A mixture of them.
    Experts {
        /// How tokens are routed.
        spec: ExpertSpec,
        /// Scores the experts.
        router: MatrixRows,
        /// One gated perceptron for each expert.
        experts: Vec<MlpSource>,
    },
}

/// The matrices of a gated perceptron.
pub struct MlpSource {
    /// Rows that the activation is applied to.
    pub gate: MatrixRows,
    /// Rows beside it.
    pub up: MatrixRows,
    /// Back to the residual stream.
    pub down: MatrixRows,
}

impl MatrixRows {
    fn of(tensors: Vec<Tensor>) -> Self {
        let part = |tensor: Tensor| Part { first: 0, rows: tensor.rows(), tensor };
        Self { parts: tensors.into_iter().map(part).collect() }
    }

    fn some(tensor: Tensor, first: usize, rows: usize) -> Self {
        Self { parts: vec![Part { tensor, first, rows }] }
    }

    /// Output rows of the matrix.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// Rows of each stored tensor.
    pub fn parts(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().map(|part| part.rows)
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.parts.first().map_or(0, |part| part.tensor.cols())
    }

    /// For so many threads.
    ///
    /// # Errors
    /// When the stored type cannot be computed with.
    pub fn reader(&self, threads: usize) -> Result<RowReader<'_>, LoadError> {
        let mut parts = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            parts.push((part, Runs::new(&part.tensor, threads)?));
        }
        Ok(RowReader { parts })
    }
}

impl RowReader<'_> {
    /// Writes row `row` as `dtype`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_row(&self, row: usize, dtype: Dtype, out: &mut [u16]) -> Result<(), LoadError> {
        let mut row = row;
        for (part, runs) in &self.parts {
            if row < part.rows {
                return runs.read_row(part.first + row, dtype, out);
            }
            row -= part.rows;
        }
        unreachable!("a matrix has as many rows as its parts")
    }
}

impl Source<'_> {
    /// The embedding: a row for each token.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    pub fn embedding(&self) -> Result<Tensor, LoadError> {
        let shape = [self.spec.vocab, self.spec.hidden];
        self.checkpoint.tensor("model.embed_tokens.weight")?.expect(&shape)
    }

    /// The matrix of the head: the embedding where they are tied.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    pub fn head(&self) -> Result<MatrixRows, LoadError> {
        match self.spec.tied {
            true => Ok(MatrixRows::of(vec![self.embedding()?])),
            false => self.matrix("lm_head.weight", [self.spec.vocab, self.spec.hidden]),
        }
    }

    /// The norm before the head.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    pub fn final_norm(&self) -> Result<Norm, LoadError> {
        self.norm("model.norm.weight", self.spec.hidden)
    }

    /// Rotary frequencies.
    ///
    /// # Errors
    /// When the file's own divisors cannot be read.
    pub fn rope(&self) -> Result<Rope, LoadError> {
        let head_dim = self.spec.attention.head_dim;
        let rope = Rope::new(head_dim, self.spec.rope.theta, self.spec.rope.scaling);
        if !self.checkpoint.has("rope_freqs.weight") {
            return Ok(rope);
        }
        let divisors = self.checkpoint.tensor("rope_freqs.weight")?.expect(&[head_dim / 2])?;
        Ok(rope.divided_by(&divisors.read_f32()?))
    }

    /// Layer `index`.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, or is one that the family does not have.
    pub fn layer(&self, index: usize) -> Result<LayerSource, LoadError> {
        let (spec, a) = (self.spec, &self.spec.attention);
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let norm = |part: &str| self.norm(&name(part), spec.hidden);
        let optional = |wanted: bool, part: &str, cols: usize| {
            if wanted { self.norm(&name(part), cols).map(Some) } else { Ok(None) }
        };
        // With post-norms, `post_attention_layernorm` comes after attention, not before the
        // feed-forward layer.
        let before_feed_forward =
            if spec.norm.post { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let out = [spec.hidden, spec.attention_cols()];
        Ok(LayerSource {
            attention_norm: norm("input_layernorm")?,
            qkv: self.qkv(index)?,
            qkv_bias: self.qkv_bias(index)?,
            q_norm: optional(a.qk_norm, "self_attn.q_norm", a.head_dim)?,
            k_norm: optional(a.qk_norm, "self_attn.k_norm", a.head_dim)?,
            out: self.matrix(&name("self_attn.o_proj"), out)?,
            out_bias: self.bias(a.out_bias, index, "self_attn.o_proj", spec.hidden)?,
            post_attention_norm: optional(spec.norm.post, "post_attention_layernorm", spec.hidden)?,
            feed_forward_norm: norm(before_feed_forward)?,
            feed_forward: match spec.feed_forward.experts {
                None => FeedForwardSource::Dense(self.mlp(index)?),
                Some(experts) => self.mixture(index, experts)?,
            },
            post_feed_forward_norm: optional(
                spec.norm.post,
                "post_feedforward_layernorm",
                spec.hidden,
            )?,
        })
    }

    fn qkv(&self, index: usize) -> Result<MatrixRows, LoadError> {
        let (a, hidden) = (&self.spec.attention, self.spec.hidden);
        let tensor = |part: &str, rows: usize| {
            let name = format!("model.layers.{index}.self_attn.{part}.weight");
            self.checkpoint.tensor(&name)?.expect(&[rows, hidden])
        };
        if a.fused {
            return Ok(MatrixRows::of(vec![tensor("qkv_proj", self.spec.qkv_rows())?]));
        }
        let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        Ok(MatrixRows::of(vec![tensor("q_proj", q)?, tensor("k_proj", kv)?, tensor("v_proj", kv)?]))
    }

    fn qkv_bias(&self, index: usize) -> Result<Option<Vec<f32>>, LoadError> {
        let a = &self.spec.attention;
        let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let mut joint = Vec::new();
        for (part, len) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
            match self.bias(a.qkv_bias, index, &format!("self_attn.{part}"), len)? {
                Some(bias) => joint.extend(bias),
                None => return Ok(None),
            }
        }
        Ok(Some(joint))
    }

    fn bias(
        &self,
        wanted: bool,
        index: usize,
        part: &str,
        len: usize,
    ) -> Result<Option<Vec<f32>>, LoadError> {
        let name = format!("model.layers.{index}.{part}.bias");
        if !wanted {
            return match self.checkpoint.has(&name) {
                // Computing without it would give other logits than the model's.
                true => {
                    Err(self.checkpoint.tensor(&name)?.error("unexpected: the family has none"))
                }
                false => Ok(None),
            };
        }
        self.checkpoint.tensor(&name)?.expect(&[len])?.read_vector(self.dtype).map(Some)
    }

    fn mlp(&self, index: usize) -> Result<MlpSource, LoadError> {
        let (hidden, inter) = (self.spec.hidden, self.spec.feed_forward.inter);
        let name = |part: &str| format!("model.layers.{index}.mlp.{part}.weight");
        if self.spec.feed_forward.fused {
            let joint = self.checkpoint.tensor(&name("gate_up_proj"))?;
            let joint = joint.expect(&[2 * inter, hidden])?;
            return Ok(MlpSource {
                gate: MatrixRows::some(joint.clone(), 0, inter),
                up: MatrixRows::some(joint, inter, inter),
                down: self.matrix(&name("down_proj"), [hidden, inter])?,
            });
        }
        self.gated_mlp(["gate_proj", "up_proj", "down_proj"].map(name))
    }

    /// A perceptron from the names of its gate, up and down matrices.
    fn gated_mlp(&self, [gate, up, down]: [String; 3]) -> Result<MlpSource, LoadError> {
        let shape = [self.spec.feed_forward.inter, self.spec.hidden];
        Ok(MlpSource {
            gate: self.matrix(&gate, shape)?,
            up: self.matrix(&up, shape)?,
            down: self.matrix(&down, [shape[1], shape[0]])?,
        })
    }

    fn mixture(&self, index: usize, spec: ExpertSpec) -> Result<FeedForwardSource, LoadError> {
        let module = format!("model.layers.{index}.{}", spec.names.module);
        let router = format!("{module}.gate.weight");
        let router = self.matrix(&router, [spec.count, self.spec.hidden])?;
        let expert = |e: usize| {
            let name = |part: &str| format!("{module}.experts.{e}.{part}.weight");
            self.gated_mlp(spec.names.projections.map(name))
        };
        let experts = (0..spec.count).map(expert).collect::<Result<_, _>>()?;
        Ok(FeedForwardSource::Experts { spec, router, experts })
    }

    fn norm(&self, name: &str, cols: usize) -> Result<Norm, LoadError> {
        let mut weight = self.checkpoint.tensor(name)?.expect(&[cols])?.read_vector(self.dtype)?;
        weight.iter_mut().for_each(|w| *w += self.spec.norm.offset);
        Ok(Norm::new(weight, self.spec.norm.eps))
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<MatrixRows, LoadError> {
        Ok(MatrixRows::of(vec![self.checkpoint.tensor(name)?.expect(&shape)?]))
    }
}
