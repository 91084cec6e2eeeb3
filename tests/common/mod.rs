//! Tiny seeded models, and what integration tests share.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test uses its part")]

pub mod budget;
pub mod gguf;
pub mod narrow;
pub mod quantised;
pub mod site;

use half::bf16;
use safetensors::tensor::{Dtype as StoredDtype, TensorView};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use targon_engine::clock::Clock;
use targon_engine::engine::output::FinishReason;
use targon_engine::engine::request::Request;
use targon_engine::engine::{Engine, Options};
use targon_engine::entropy::Entropy;
use targon_engine::intake::proof::Prover;
use targon_engine::intake::translate::Defaults;
use targon_engine::intake::understand::Reader;
use targon_engine::lifecycle::accounts::MemoryAccounts;
use targon_engine::lifecycle::load::{Loading, Plans, Progress};
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::cpu::decoder::Decoder;
use targon_engine::models::device::Device;
use targon_engine::models::error::LoadError;
use targon_engine::models::text::Text;
use targon_engine::models::{Identity, Model};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::Scheme;
use targon_engine::proof::codec::{Hash, from_hex};
use targon_engine::server::registry::{Registry, Served};
use targon_engine::verify::answer::Answer;
use targon_engine::verify::{Verifier, prefill};

/// Reads bodies as a server without flags does, with a context of 512 tokens.
pub fn reader(text: &Arc<Text>) -> Reader<'_> {
    static ENTROPY: LazyLock<Entropy> = LazyLock::new(|| Entropy::seeded(1));
    let defaults = Defaults::default();
    Reader { model: text, context_max: 512, defaults, entropy: &ENTROPY, now_ms: 0 }
}

/// Shows nothing of loading.
pub struct Quiet;

impl Progress for Quiet {
    fn file(&self, _: &str, _: u64, _: u64) {}
    fn planned(&self, _: &Plans, _: &[(Device, u64)]) {}
    fn layers(&self, _: &str, _: usize, _: usize) {}
    fn ended(&self, _: &str) {}
}

/// What the models of a registry are loaded with.
pub fn loading(registry: &Registry) -> Loading {
    Loading {
        registry: registry.clone(),
        pool: Pool::new(2, Isa::best()).unwrap(),
        clock: Clock::system(),
        memory: MemoryAccounts::default(),
        shown: Arc::new(Quiet),
    }
}

/// The golden checkpoints, one for each family.
pub const FAMILIES: [&str; 9] = [
    "llama",
    "llama-linear",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "mixtral",
    "qwen3_moe",
];

/// A test of each directory below `tests/data/golden`, a checkpoint of a family each: `$check` is
/// called with its name. `GOLDEN` has them all.
#[allow(unused_macros, reason = "each test uses its part")]
macro_rules! golden_tests {
    ($check:path) => {
        crate::common::golden_tests! { $check;
            llama = "llama";
            llama_linear_rope_and_biases = "llama-linear";
            mistral = "mistral";
            qwen2 = "qwen2";
            qwen3 = "qwen3";
            gemma2 = "gemma2";
            phi3 = "phi3";
            mixtral = "mixtral";
            qwen3_moe = "qwen3_moe";
        }
    };
    ($check:path; $($name:ident = $dir:literal;)*) => {
        $(#[test] fn $name() { $check($dir); })*
        #[allow(dead_code, reason = "each test uses its part")]
        const GOLDEN: &[&str] = &[$($dir),*];
    };
}
#[allow(unused_imports, reason = "each test uses its part")]
pub(crate) use golden_tests;

/// The golden checkpoint of a family; without a name, the directory that holds them all.
pub fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(family)
}

/// SmolLM2-135M-Instruct, where `scripts/fetch-model` puts it.
pub fn smollm2() -> PathBuf {
    let file = "SmolLM2-135M-Instruct.Q4_1.gguf";
    let dir = std::env::var("TARGON_ENGINE_MODELS").map_or_else(
        |_| Path::new(&std::env::var("HOME").unwrap()).join(".cache/targon-engine/models"),
        PathBuf::from,
    );
    let path = dir.join(file);
    assert!(path.exists(), "{} is missing: run scripts/fetch-model first", path.display());
    path
}

/// Numbers from a linear congruential generator, uniform in -0.5..0.5.
pub struct Noise(pub u32);

impl Noise {
    pub fn next(&mut self) -> f32 {
        (self.next_u32() as f32 / u32::MAX as f32) - 0.5
    }

    pub fn next_u32(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // The low bits of this generator are poor.
        self.0 ^ (self.0 >> 15)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.next_u32() as usize % limit
    }
}

/// The configuration of a tiny Llama with 261 tokens: every byte, four words, an end token.
pub fn tiny_config() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 261, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "eos_token_id": 260,
    })
}

/// Names and shapes of the tensors of a Llama configuration.
pub fn llama_shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    let get = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, inter, head) = (get("hidden_size"), get("intermediate_size"), get("head_dim"));
    let (q, kv) = (get("num_attention_heads") * head, get("num_key_value_heads") * head);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![get("vocab_size"), hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if config["tie_word_embeddings"] == false {
        shapes.push(("lm_head.weight".to_owned(), vec![get("vocab_size"), hidden]));
    }
    for layer in 0..get("num_hidden_layers") {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        shapes.extend([
            (name("self_attn.q_proj"), vec![q, hidden]),
            (name("self_attn.k_proj"), vec![kv, hidden]),
            (name("self_attn.v_proj"), vec![kv, hidden]),
            (name("self_attn.o_proj"), vec![hidden, q]),
            (name("mlp.gate_proj"), vec![inter, hidden]),
            (name("mlp.up_proj"), vec![inter, hidden]),
            (name("mlp.down_proj"), vec![hidden, inter]),
            (name("input_layernorm"), vec![hidden]),
            (name("post_attention_layernorm"), vec![hidden]),
        ]);
    }
    shapes
}

/// Writes a checkpoint with seeded random bf16 weights into `dir`.
pub fn write_checkpoint(dir: &Path, config: &Value, seed: u32) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut noise = Noise(seed);
    let tensors: HashMap<String, (Vec<usize>, Vec<u8>)> = llama_shapes(config)
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let fan_in = *shape.last().unwrap() as f32;
            let value = |noise: &mut Noise| match shape.len() {
                1 => 1.0 + 0.3 * noise.next(),
                _ => 4.0 * noise.next() / fan_in.sqrt(),
            };
            let bytes =
                (0..count).flat_map(|_| bf16::from_f32(value(&mut noise)).to_le_bytes()).collect();
            (name, (shape, bytes))
        })
        .collect();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name.as_str(), TensorView::new(StoredDtype::BF16, shape.clone(), bytes).unwrap())
    });
    let path = dir.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    std::fs::write(dir.join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    let chat = json!({"chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}\
        {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"});
    std::fs::write(dir.join("tokenizer_config.json"), chat.to_string()).unwrap();
}

/// A byte-level tokenizer: 256 bytes, four words, `<|end|>`.
pub fn tokenizer_json() -> Value {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut extra = 256;
    let chars: Vec<char> = (0..256)
        .map(|b| {
            let code = if printable(b) { b } else { extra };
            extra += u32::from(!printable(b));
            char::from_u32(code).unwrap()
        })
        .collect();
    let mut vocab = serde_json::Map::new();
    for (id, c) in chars.iter().enumerate() {
        vocab.insert(c.to_string(), id.into());
    }
    for (i, text) in ["é", "日", " the", "\u{1f600}"].iter().enumerate() {
        let token: String = text.bytes().map(|b| chars[usize::from(b)]).collect();
        vocab.insert(token, (256 + i).into());
    }
    json!({
        "version": "1.0", "added_tokens": [
            {"id": 260, "content": "<|end|>", "single_word": false, "lstrip": false,
             "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// The tiny model, loaded.
pub fn tiny_model(seed: u32, pool: &Pool) -> Model {
    tiny_model_with_context(seed, pool, 512)
}

fn tiny_model_with_context(seed: u32, pool: &Pool, context_max: usize) -> Model {
    let mut config = tiny_config();
    config["max_position_embeddings"] = context_max.into();
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &config, seed);
    Model::load(dir.path(), None, pool, |_, _| {}).unwrap()
}

pub fn options() -> Options {
    Options {
        context_max: 512,
        blocks: 64,
        sequences_max: 16,
        waiting_max: 64,
        step_tokens_max: 512,
        drafts_max: 0,
    }
}

/// As many tokens take a second at least, so that a test can do something while they are computed.
/// What fits into [`options`] may have ended before a client is found to have left.
pub const LASTING_TOKENS: usize = 16_000;

/// Options for answers of [`LASTING_TOKENS`], as many at once as there are places.
pub fn lasting(sequences_max: usize) -> Options {
    let context_max = 16_384;
    let blocks = (sequences_max + 1) * context_max / 32;
    Options { context_max, blocks, sequences_max, ..options() }
}

/// A model as a server holds it.
pub fn served(model: Model, options: Options) -> Served {
    let (pool, model) = (Pool::new(2, Isa::best()).unwrap(), Arc::new(model));
    let identity = Arc::new(Identity::compute(&model, &pool).unwrap());
    let engine = Engine::start(Arc::clone(&model), pool, options, Clock::system()).unwrap();
    Served { engine, model, fingerprint: "fp".into(), identity }
}

/// The tiny model as a server holds it.
pub fn tiny_served(seed: u32, options: Options) -> Served {
    let pool = Pool::new(2, Isa::best()).unwrap();
    served(tiny_model_with_context(seed, &pool, options.context_max.max(512)), options)
}

/// An engine over the tiny model.
pub fn tiny_engine(seed: u32, options: Options) -> Engine {
    let pool = Pool::new(2, Isa::best()).unwrap();
    let model = tiny_model_with_context(seed, &pool, options.context_max.max(512));
    Engine::start(model, pool, options, Clock::system()).unwrap()
}

/// Who checks answers of a model that is served.
pub fn verifier(served: &Served) -> Verifier {
    Verifier::new(
        Arc::clone(&served.model),
        Arc::clone(&served.identity),
        Pool::new(2, Isa::best()).unwrap(),
        served.engine.options().context_max,
    )
}

/// The decoder of a checkpoint.
pub fn decoder(
    checkpoint: &Checkpoint,
    dtype: Option<Dtype>,
    pool: &Pool,
) -> Result<Decoder, LoadError> {
    let spec = Arc::new(checkpoint.spec()?);
    let dtype = dtype.map_or_else(|| checkpoint.dtype(&spec), Ok)?;
    Decoder::load(checkpoint, &spec, dtype, pool, |_, _| {})
}

/// Proves `answer`, whatever its tokens, to a request with the rows that `verifier`'s weights
/// compute after `prompt`: as a prover would that did not draw the tokens with them.
pub fn spoof(
    verifier: &Verifier,
    asked: (&Request, &[u32]),
    seed: Option<i64>,
    nonce: &str,
    answer: &mut Answer,
) {
    spoof_by(Scheme::Residue, verifier, asked, seed, nonce, answer);
}

/// The same by any scheme.
pub fn spoof_by(
    scheme: Scheme,
    verifier: &Verifier,
    (request, prompt): (&Request, &[u32]),
    seed: Option<i64>,
    nonce: &str,
    answer: &mut Answer,
) {
    let pass = |blocks| verifier.model.pass(&verifier.pool, blocks);
    let rows = prefill::hidden_rows(pass, prompt, &answer.ids).unwrap();
    spoof_rows(scheme, verifier, (request, rows), seed, nonce, answer);
}

/// The same with rows that come from wherever.
pub fn spoof_rows(
    scheme: Scheme,
    verifier: &Verifier,
    (request, rows): (&Request, Vec<Vec<u16>>),
    seed: Option<i64>,
    nonce: &str,
    answer: &mut Answer,
) {
    let nonce: Hash = from_hex(nonce).unwrap();
    let prover = Prover { scheme, nonce, signer: None };
    let head = prover.head(&request.terms(seed, 0), &verifier.identity);
    let prompt = request.prompt.len();
    answer.chunks = head.chunks(&verifier.identity, prompt, (&answer.ids, &rows));
    let digest = answer.chunks.last().map(|chunk| chunk.digest);
    answer.end = Some(head.end(digest, answer.ids.len(), &FinishReason::Length));
}
