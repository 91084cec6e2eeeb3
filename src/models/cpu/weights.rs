//! Holds the weights of a model as the CPU multiplies by them.

use crate::models::spec::ExpertSpec;
use crate::models::tensor::Tensor;
use crate::ops::matmul::Packed;
use crate::ops::rowwise::Norm;

/// All weights of a model.
pub struct Weights {
    /// Rows by token id.
    pub embedding: Embedding,
    /// The output head, where it is not the embedding.
    pub head: Option<Packed>,
    /// The norm before the head.
    pub norm: Norm,
    /// The layers, in the order in which a row passes them.
    pub layers: Vec<Layer>,
}

/// Where embedding rows are read from.
pub enum Embedding {
    /// The packed matrix that is also the head.
    Tied(Packed),
    /// The file: a lookup reads one row of it, so no packed copy is needed.
    Stored(Tensor),
}

/// The weights of one decoder layer.
pub struct Layer {
    /// Norm before attention.
    pub attention_norm: Norm,
    /// q, k and v rows of one matrix.
    pub qkv: Packed,
    /// Bias of the q, k and v rows, where the model has one.
    pub qkv_bias: Option<Vec<f32>>,
    /// Norm of each query head.
    pub q_norm: Option<Norm>,
    /// Norm of each key head.
    pub k_norm: Option<Norm>,
    /// The matrix that attention's output is multiplied by.
    pub out: Packed,
    /// Bias of the output projection, where the family has one.
    pub out_bias: Option<Vec<f32>>,
    /// Norm after attention (Gemma 2).
    pub post_attention_norm: Option<Norm>,
    /// Norm before the feed-forward layer.
    pub feed_forward_norm: Norm,
    /// One perceptron, or a mixture of them.
    pub feed_forward: FeedForward,
    /// Norm after it (Gemma 2).
    pub post_feed_forward_norm: Option<Norm>,
}

/// The second half of a layer.
pub enum FeedForward {
    /// One gated perceptron.
    Dense(Mlp),
    /// A mixture of them.
    Experts(Mixture),
}

/// `down(activation(gate x) * (up x))`.
pub struct Mlp {
    /// Gate and up rows in alternating blocks.
    pub gate_up: Packed,
    /// Back to the residual stream.
    pub down: Packed,
}

/// The experts of one layer.
pub struct Mixture {
    /// How tokens are routed.
    pub spec: ExpertSpec,
    /// Scores the experts.
    pub router: Packed,
    /// One gated perceptron for each expert.
    pub experts: Vec<Mlp>,
}

impl Weights {
    /// The matrix that gives logits: the head, or the embedding that is tied to it.
    pub fn head(&self) -> &Packed {
        match (&self.head, &self.embedding) {
            (Some(head), _) | (None, Embedding::Tied(head)) => head,
            (None, Embedding::Stored(_)) => unreachable!("an untied model is loaded with a head"),
        }
    }

    /// Bytes of all packed matrices.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter().map(|layer| {
            let feed_forward = match &layer.feed_forward {
                FeedForward::Dense(mlp) => mlp.bytes(),
                FeedForward::Experts(m) => {
                    m.router.bytes() + m.experts.iter().map(Mlp::bytes).sum::<usize>()
                }
            };
            layer.qkv.bytes() + layer.out.bytes() + feed_forward
        });
        layers.sum::<usize>() + self.head().bytes()
    }
}

impl Mlp {
    fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }
}
