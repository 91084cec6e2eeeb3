//! Counts how many numbers of a model a token is multiplied with, from the model's shape alone:
//! what its steps cost.

use super::spec::Spec;

/// Parameters that all tokens share, that a token's experts add, and that the head has. Norms and
/// biases are left out.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ParameterCounts {
    /// Attention, and the feed-forward layers of dense models, over all layers; routers too.
    pub shared: f64,
    /// One expert, over all layers; 0 in dense models.
    pub expert: f64,
    /// Experts that a token visits; 0 in dense models.
    pub used: f64,
    /// The head; the embedding is read by rows and does not count.
    pub head: f64,
}

impl ParameterCounts {
    /// Counts the parameters of a model.
    pub fn of(spec: &Spec) -> Self {
        let (hidden, layers) = (spec.hidden as f64, spec.layers as f64);
        let attention = (spec.qkv_rows() + spec.attention_cols()) as f64 * hidden;
        let mlp = 3.0 * spec.feed_forward.inter as f64 * hidden;
        let head = spec.vocab as f64 * hidden;
        match spec.feed_forward.experts {
            None => Self { shared: layers * (attention + mlp), expert: 0.0, used: 0.0, head },
            Some(e) => {
                let (router, used) = (e.count as f64 * hidden, e.used as f64);
                let shared = layers * (attention + router);
                Self { shared, expert: layers * mlp, used, head }
            }
        }
    }

    /// Those that one token is multiplied with, without the head: one multiply-add each.
    pub fn active(&self) -> f64 {
        self.shared + self.used * self.expert
    }
}
