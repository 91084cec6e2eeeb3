//! A decoder of every family over `candle-nn`, in f32. It reads `config.json` by itself and shares
//! no code with the engine.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use candle_nn::rotary_emb::rope;
use candle_nn::{Linear, Module};
use serde_json::Value;
use std::collections::HashMap;
use std::f64::consts::TAU;
use std::path::Path;

/// Positions of a block of softmax weights, which are rounded relative to the maximum so far.
const BLOCK: usize = 32;

/// A checkpoint, computed in f32 with the inputs of matrix products rounded to `rounding`.
pub(super) struct Reference {
    pub config: Value,
    weights: HashMap<String, Tensor>,
    rounding: DType,
}

impl Reference {
    pub(super) fn load(dir: &Path, rounding: DType) -> Result<Self> {
        let text = std::fs::read(dir.join("config.json"))?;
        let config = serde_json::from_slice(&text).map_err(candle_core::Error::wrap)?;
        let file = dir.join("model.safetensors");
        let weights = candle_core::safetensors::load(file, &Device::Cpu)?;
        let in_f32 = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_dtype(DType::F32)?));
        let weights = weights.into_iter().map(in_f32).collect::<Result<_>>()?;
        Ok(Self { config, weights, rounding })
    }

    /// Logits (tokens, vocab).
    pub(super) fn logits(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let table = self.weight("model.embed_tokens.weight")?;
        let mut x =
            candle_nn::Embedding::new(table.clone(), self.size("hidden_size")).forward(&ids)?;
        if self.is("gemma2") {
            let scale = Tensor::new((self.size("hidden_size") as f32).sqrt(), &Device::Cpu)?;
            x = x.broadcast_mul(&self.rounded(&scale)?)?;
        }
        for layer in 0..self.size("num_hidden_layers") {
            x = self.layer(layer, &x)?;
        }
        let x = self.norm("model.norm", &x)?;
        let tied = self.config["tie_word_embeddings"] == true;
        let head = if tied { table.clone() } else { self.weight("lm_head.weight")?.clone() };
        let logits = self.product(&x, head, None)?;
        capped(&logits, self.number("final_logit_softcapping"))
    }

    fn layer(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let attended = self.attention(layer, &self.norm(&name("input_layernorm"), x)?)?;
        if self.is("gemma2") {
            let x = (x + self.norm(&name("post_attention_layernorm"), &attended)?)?;
            let normed = self.norm(&name("pre_feedforward_layernorm"), &x)?;
            let fed = self.perceptron(&name("mlp"), &normed)?;
            return x + self.norm(&name("post_feedforward_layernorm"), &fed)?;
        }
        let x = (x + attended)?;
        let normed = self.norm(&name("post_attention_layernorm"), &x)?;
        x + match self.config["model_type"].as_str() {
            Some("mixtral") => {
                self.mixture(&name("block_sparse_moe"), ["w1", "w3", "w2"], &normed)?
            }
            Some("qwen3_moe") => {
                self.mixture(&name("mlp"), ["gate_proj", "up_proj", "down_proj"], &normed)?
            }
            _ => self.perceptron(&name("mlp"), &normed)?,
        }
    }

    fn attention(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let (heads, kv_heads) =
            (self.size("num_attention_heads"), self.size("num_key_value_heads"));
        let (dim, tokens) = (self.size("head_dim"), x.dim(0)?);
        let [q, k, v] = if self.is("phi3") {
            let joint = self.linear(&name("qkv_proj"), x)?;
            let (q, kv) = (heads * dim, kv_heads * dim);
            [joint.narrow(1, 0, q)?, joint.narrow(1, q, kv)?, joint.narrow(1, q + kv, kv)?]
        } else {
            let part = |part: &str| self.linear(&name(part), x);
            [part("q_proj")?, part("k_proj")?, part("v_proj")?]
        };
        let split = |x: Tensor, heads: usize| x.reshape((tokens, heads, dim))?.transpose(0, 1);
        let (mut q, mut k, v) = (split(q, heads)?, split(k, kv_heads)?, split(v, kv_heads)?);
        if self.config["model_type"].as_str().is_some_and(|f| f.starts_with("qwen3")) {
            q = self.norm(&name("q_norm"), &q)?;
            k = self.norm(&name("k_norm"), &k)?;
        }
        let (cos, sin) = self.rotation(tokens)?;
        let rotated = |x: Tensor| {
            let x = x.contiguous()?.unsqueeze(0)?;
            self.rounded(&rope(&x, &cos, &sin)?.squeeze(0)?)
        };
        let repeated = |x: Tensor| {
            let shape = (kv_heads, heads / kv_heads, tokens, dim);
            x.unsqueeze(1)?.broadcast_as(shape)?.reshape((heads, tokens, dim))?.contiguous()
        };
        let (q, k) = (rotated(q)?, repeated(rotated(k)?)?);
        let v = repeated(self.rounded(&v)?)?;
        let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * self.score_scale())?;
        let scores = capped(&scores, self.number("attn_logit_softcapping"))?;
        let scores = scores.broadcast_add(&self.mask(layer, tokens)?)?;
        let out = self.weighed(&scores, &v)?.transpose(0, 1)?.reshape((tokens, heads * dim))?;
        self.linear(&name("o_proj"), &out)
    }

    /// Softmax of `scores` (heads, tokens, tokens) times `v`, in blocks of positions.
    fn weighed(&self, scores: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (heads, tokens, _) = scores.dims3()?;
        // Lower than any score but finite, so that a fully masked block weighs zero.
        let mut top = Tensor::full(-1e30_f32, (heads, tokens, 1), &Device::Cpu)?;
        let mut total = top.zeros_like()?;
        let mut out = v.zeros_like()?;
        for start in (0..tokens).step_by(BLOCK) {
            let len = BLOCK.min(tokens - start);
            let block = scores.narrow(2, start, len)?;
            let new = top.maximum(&block.max_keepdim(D::Minus1)?)?;
            let weights = self.rounded(&block.broadcast_sub(&new)?.exp()?)?;
            let fall = (top - &new)?.exp()?;
            total = ((total * &fall)? + weights.sum_keepdim(D::Minus1)?)?;
            let values = v.narrow(1, start, len)?.contiguous()?;
            out = (out.broadcast_mul(&fall)? + weights.contiguous()?.matmul(&values)?)?;
            top = new;
        }
        out.broadcast_div(&total)
    }

    /// What each query may see, as something to be added: causal, and within the layer's window.
    fn mask(&self, layer: usize, tokens: usize) -> Result<Tensor> {
        let window = match self.config["model_type"].as_str() {
            Some("gemma2") if layer % 2 == 1 => None,
            Some("llama" | "qwen2" | "qwen3" | "qwen3_moe") => None,
            _ => self.config["sliding_window"].as_u64().map(|w| w as usize),
        };
        let sees = |q: usize, k: usize| k <= q && window.is_none_or(|w| q - k < w);
        let cells = (0..tokens * tokens)
            .map(|i| if sees(i / tokens, i % tokens) { 0.0 } else { f32::NEG_INFINITY });
        Tensor::from_iter(cells, &Device::Cpu)?.reshape((tokens, tokens))
    }

    fn score_scale(&self) -> f64 {
        let scalar = self.number("query_pre_attn_scalar");
        1.0 / scalar.unwrap_or(self.size("head_dim") as f64).sqrt()
    }

    /// Cosines and sines (tokens, head_dim / 2).
    fn rotation(&self, tokens: usize) -> Result<(Tensor, Tensor)> {
        let dim = self.size("head_dim");
        let theta = self.config["rope_theta"].as_f64().unwrap_or(10_000.0);
        let frequency = |i: usize| self.stretched(theta.powf(-(2.0 * i as f64) / dim as f64));
        let angles: Vec<f64> =
            (0..tokens).flat_map(|t| (0..dim / 2).map(move |i| t as f64 * frequency(i))).collect();
        let table = |f: fn(f64) -> f64| {
            let values = angles.iter().map(|a| f(*a) as f32);
            Tensor::from_iter(values, &Device::Cpu)?.reshape((tokens, dim / 2))
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }

    fn stretched(&self, frequency: f64) -> f64 {
        let scaling = &self.config["rope_scaling"];
        let get = |key: &str| scaling[key].as_f64().unwrap();
        match scaling["rope_type"].as_str() {
            None => frequency,
            Some("linear") => frequency / get("factor"),
            Some("llama3") => {
                let (low, high) = (get("low_freq_factor"), get("high_freq_factor"));
                let turns = get("original_max_position_embeddings") * frequency / TAU;
                let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - share) * frequency / get("factor") + share * frequency
            }
            Some(other) => panic!("no reference for {other}"),
        }
    }

    fn perceptron(&self, module: &str, x: &Tensor) -> Result<Tensor> {
        if self.is("phi3") {
            let inter = self.size("intermediate_size");
            let joint = self.linear(&format!("{module}.gate_up_proj"), x)?;
            let inner = (silu(&joint.narrow(1, 0, inter)?)? * joint.narrow(1, inter, inter)?)?;
            return self.linear(&format!("{module}.down_proj"), &inner);
        }
        self.gated(module, ["gate_proj", "up_proj", "down_proj"], x)
    }

    fn gated(&self, module: &str, [gate, up, down]: [&str; 3], x: &Tensor) -> Result<Tensor> {
        let gate = self.linear(&format!("{module}.{gate}"), x)?;
        let gate = if self.is("gemma2") { gate.gelu()? } else { silu(&gate)? };
        let inner = (gate * self.linear(&format!("{module}.{up}"), x)?)?;
        self.linear(&format!("{module}.{down}"), &inner)
    }

    /// Every expert for every row; those that a row does not visit weigh nothing.
    fn mixture(&self, module: &str, parts: [&str; 3], x: &Tensor) -> Result<Tensor> {
        let routes = softmax_last_dim(&self.linear(&format!("{module}.gate"), x)?)?;
        let used = self.size("num_experts_per_tok");
        let renormalise = self.is("mixtral") || self.config["norm_topk_prob"] == true;
        let mut chosen = routes.to_vec2::<f32>()?;
        for row in &mut chosen {
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            order[used..].iter().for_each(|expert| row[*expert] = 0.0);
            let total: f32 = if renormalise { row.iter().sum() } else { 1.0 };
            row.iter_mut().for_each(|weight| *weight /= total);
        }
        let chosen = Tensor::new(chosen, &Device::Cpu)?;
        let mut out = x.zeros_like()?;
        for expert in 0..chosen.dim(1)? {
            let y = self.gated(&format!("{module}.experts.{expert}"), parts, x)?;
            out = (out + y.broadcast_mul(&chosen.narrow(1, expert, 1)?)?)?;
        }
        Ok(out)
    }

    fn norm(&self, module: &str, x: &Tensor) -> Result<Tensor> {
        let stored = self.weight(&format!("{module}.weight"))?;
        let weight = if self.is("gemma2") { (stored + 1.0)? } else { stored.clone() };
        let eps = self.config["rms_norm_eps"].as_f64().unwrap();
        rms_norm(&x.contiguous()?, &weight, eps as f32)
    }

    fn linear(&self, module: &str, x: &Tensor) -> Result<Tensor> {
        let bias = self.weights.get(&format!("{module}.bias")).cloned();
        self.product(x, self.weight(&format!("{module}.weight"))?.clone(), bias)
    }

    fn product(&self, x: &Tensor, weight: Tensor, bias: Option<Tensor>) -> Result<Tensor> {
        Linear::new(weight, bias).forward(&self.rounded(x)?)
    }

    fn rounded(&self, x: &Tensor) -> Result<Tensor> {
        x.to_dtype(self.rounding)?.to_dtype(DType::F32)
    }

    fn weight(&self, name: &str) -> Result<&Tensor> {
        self.weights.get(name).ok_or_else(|| candle_core::Error::msg(format!("no {name}")))
    }

    fn is(&self, family: &str) -> bool {
        self.config["model_type"] == family
    }

    fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap_or_else(|| panic!("no {key}")) as usize
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.config[key].as_f64()
    }
}

fn capped(x: &Tensor, cap: Option<f64>) -> Result<Tensor> {
    match cap {
        Some(cap) => (x / cap)?.tanh()? * cap,
        None => Ok(x.clone()),
    }
}
