//! Checkpoint tensors into the engine's packed matrices, for dense layers and mixtures alike.

use super::decoder::Decoder;
use super::weights::{Embedding, FeedForward, Layer, Mixture, Mlp, Weights};
use crate::models::checkpoint::Checkpoint;
use crate::models::error::LoadError;
use crate::models::spec::{ExpertSpec, Spec};
use crate::models::tensor::{Runs, Tensor};
use crate::ops::dtype::Dtype;
use crate::ops::matmul::{Packed, gated_row, gated_rows};
use crate::ops::pool::{Pool, Turn};
use crate::ops::rope::Rope;
use crate::ops::rowwise::Norm;
use std::sync::Arc;

impl Decoder {
    /// Packs the weights of a checkpoint of this shape, to be computed in `dtype`;
    /// `progress(done, layers)` is called after each layer.
    ///
    /// # Errors
    /// When a tensor is missing, cannot be read, or is not what the shape says.
    pub fn load(
        checkpoint: &Checkpoint,
        spec: &Arc<Spec>,
        dtype: Dtype,
        pool: &Pool,
        progress: impl Fn(usize, usize),
    ) -> Result<Self, LoadError> {
        let loader = Loader {
            checkpoint,
            spec,
            dtype,
            turn: &pool.turn(),
            progress: &|done| progress(done, spec.layers),
        };
        let weights = loader.load()?;
        let mut rope = Rope::new(spec.attention.head_dim, spec.rope.theta, spec.rope.scaling);
        if checkpoint.has("rope_freqs.weight") {
            let half = [spec.attention.head_dim / 2];
            let divisors = checkpoint.tensor("rope_freqs.weight")?.expect(&half)?;
            rope = rope.divided_by(&divisors.read_f32()?);
        }
        Ok(Decoder { spec: Arc::clone(spec), dtype, weights, rope })
    }
}

/// What is being loaded, into what.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    spec: &'a Spec,
    dtype: Dtype,
    turn: &'a Turn<'a>,
    /// Called after every layer with the layers done so far.
    progress: &'a dyn Fn(usize),
}

impl Loader<'_> {
    fn load(&self) -> Result<Weights, LoadError> {
        let spec = self.spec;
        let shape = [spec.vocab, spec.hidden];
        let stored = self.checkpoint.tensor("model.embed_tokens.weight")?.expect(&shape)?;
        let (embedding, head) = if spec.tied {
            (Embedding::Tied(self.pack(&[stored])?), None)
        } else {
            let head = self.matrix("lm_head.weight", shape)?;
            (Embedding::Stored(stored), Some(head))
        };
        let layers = (0..spec.layers)
            .map(|index| {
                let layer = self.layer(index)?;
                (self.progress)(index + 1);
                Ok(layer)
            })
            .collect::<Result<_, LoadError>>()?;
        Ok(Weights { embedding, head, norm: self.norm("model.norm.weight", spec.hidden)?, layers })
    }

    fn layer(&self, index: usize) -> Result<Layer, LoadError> {
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
        Ok(Layer {
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
                None => FeedForward::Dense(self.mlp(index)?),
                Some(experts) => FeedForward::Experts(self.mixture(index, experts)?),
            },
            post_feed_forward_norm: optional(
                spec.norm.post,
                "post_feedforward_layernorm",
                spec.hidden,
            )?,
        })
    }

    fn qkv(&self, index: usize) -> Result<Packed, LoadError> {
        let (a, hidden) = (&self.spec.attention, self.spec.hidden);
        let tensor = |part: &str, rows: usize| {
            let name = format!("model.layers.{index}.self_attn.{part}.weight");
            self.checkpoint.tensor(&name)?.expect(&[rows, hidden])
        };
        if a.fused {
            return self.pack(&[tensor("qkv_proj", self.spec.qkv_rows())?]);
        }
        let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        self.pack(&[tensor("q_proj", q)?, tensor("k_proj", kv)?, tensor("v_proj", kv)?])
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

    fn mlp(&self, index: usize) -> Result<Mlp, LoadError> {
        let (hidden, inter) = (self.spec.hidden, self.spec.feed_forward.inter);
        let name = |part: &str| format!("model.layers.{index}.mlp.{part}.weight");
        if self.spec.feed_forward.fused {
            let joint = self.checkpoint.tensor(&name("gate_up_proj"))?;
            let joint = joint.expect(&[2 * inter, hidden])?;
            let gate_up = self.pack_gated((&joint, 0), (&joint, inter), [inter, hidden])?;
            return Ok(Mlp { gate_up, down: self.matrix(&name("down_proj"), [hidden, inter])? });
        }
        self.gated_mlp(["gate_proj", "up_proj", "down_proj"].map(name))
    }

    /// A perceptron from the names of its gate, up and down matrices.
    fn gated_mlp(&self, [gate, up, down]: [String; 3]) -> Result<Mlp, LoadError> {
        let shape = [self.spec.feed_forward.inter, self.spec.hidden];
        let gate = self.checkpoint.tensor(&gate)?.expect(&shape)?;
        let up = self.checkpoint.tensor(&up)?.expect(&shape)?;
        let gate_up = self.pack_gated((&gate, 0), (&up, 0), shape)?;
        Ok(Mlp { gate_up, down: self.matrix(&down, [shape[1], shape[0]])? })
    }

    fn mixture(&self, index: usize, spec: ExpertSpec) -> Result<Mixture, LoadError> {
        let module = format!("model.layers.{index}.{}", spec.names.module);
        let router = format!("{module}.gate.weight");
        let router = self.matrix(&router, [spec.count, self.spec.hidden])?;
        let expert = |e: usize| {
            let name = |part: &str| format!("{module}.experts.{e}.{part}.weight");
            self.gated_mlp(spec.names.projections.map(name))
        };
        let experts = (0..spec.count).map(expert).collect::<Result<_, _>>()?;
        Ok(Mixture { spec, router, experts })
    }

    fn norm(&self, name: &str, cols: usize) -> Result<Norm, LoadError> {
        let mut weight = self.checkpoint.tensor(name)?.expect(&[cols])?.read_vector(self.dtype)?;
        weight.iter_mut().for_each(|w| *w += self.spec.norm.offset);
        Ok(Norm::new(weight, self.spec.norm.eps))
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Packed, LoadError> {
        self.pack(&[self.checkpoint.tensor(name)?.expect(&shape)?])
    }

    /// Packs the rows of `parts`, one below the other.
    fn pack(&self, parts: &[Tensor]) -> Result<Packed, LoadError> {
        let (rows, dtype) = (parts.iter().map(Tensor::rows).sum(), self.dtype);
        let runs: Vec<Runs<'_>> = parts.iter().map(|p| self.runs(p)).collect::<Result<_, _>>()?;
        Packed::pack(self.turn, (rows, parts[0].cols()), dtype, |row, out| {
            let mut row = row;
            for (part, runs) in parts.iter().zip(&runs) {
                if row < part.rows() {
                    return runs.read_row(row, dtype, out);
                }
                row -= part.rows();
            }
            unreachable!("rows are counted above")
        })
    }

    /// Packs gate and up rows in alternating blocks; each is a tensor and the row it begins at.
    fn pack_gated(
        &self,
        gate: (&Tensor, usize),
        up: (&Tensor, usize),
        [inter, cols]: [usize; 2],
    ) -> Result<Packed, LoadError> {
        let (rows, dtype) = (gated_rows(inter), self.dtype);
        let (gate_runs, up_runs) = (self.runs(gate.0)?, self.runs(up.0)?);
        Packed::pack(self.turn, (rows, cols), dtype, |row, out| match gated_row(row, inter) {
            Some(Ok(row)) => gate_runs.read_row(gate.1 + row, dtype, out),
            Some(Err(row)) => up_runs.read_row(up.1 + row, dtype, out),
            None => {
                out.fill(0);
                Ok(())
            }
        })
    }

    fn runs<'t>(&self, tensor: &'t Tensor) -> Result<Runs<'t>, LoadError> {
        Runs::new(tensor, self.turn.threads())
    }
}
