//! Proofs from end to end: what the server streams is what anyone with the weights computes again,
//! whatever else the engine did meanwhile.

use crate::common;
use axum::Router;
use axum::body::Body;
use axum::http::{Request as HttpRequest, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use targon_engine::chain::keys::{Hotkey, Keypair};
use targon_engine::clock::Clock;
use targon_engine::engine::output::{Ended, Step};
use targon_engine::engine::request::Request;
use targon_engine::engine::{Engine, Options};
use targon_engine::intake::proof::Prover;
use targon_engine::intake::translate::Defaults;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::parameters::Parameters;
use targon_engine::models::pass::{Batch, RowAsk, blocks_of};
use targon_engine::models::sampler::Sampling;
use targon_engine::models::{Identity, Model};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::Scheme;
use targon_engine::proof::codec::from_hex;
use targon_engine::proof::commit::{Binding, ChunkProof, RowProver, chunks_of, end_message};
use targon_engine::server::registry::{ModelState, Registry, Served};
use targon_engine::server::router;
use targon_engine::server::state::ServerState;
use tower::ServiceExt;

/// All chunks of an output, from one prefill over prompt and output.
fn recompute(
    model: &Model,
    prover: &RowProver,
    root: [u8; 32],
    prompt: &[u32],
    output: &[u32],
) -> Vec<ChunkProof> {
    let pool = Pool::new(2, Isa::best()).unwrap();
    let ids = [prompt, &output[..output.len() - 1]].concat();
    let ask = |row| RowAsk { prover: Some(prover), ..RowAsk::new(row, row) };
    let asks: Vec<RowAsk<'_>> = (prompt.len() - 1..ids.len()).map(ask).collect();
    let mut pass = model.pass(&pool, blocks_of(ids.len())).unwrap();
    let reports = pass.step(&Batch::of(&ids, 0), &asks).unwrap();
    let rows = reports.into_iter().map(|report| report.unwrap().proof.unwrap());
    chunks_of(root, output.iter().copied().zip(rows))
}

fn request(
    identity: &Identity,
    scheme: Scheme,
    seed: u32,
    prompt: usize,
    output: usize,
) -> Request {
    let mut noise = common::Noise(seed);
    let ids = (0..prompt).map(|_| noise.below(256) as u32).collect();
    let mut request = Request::greedy(ids, output);
    request.stop.ignore_eos = true;
    request.sampling = Sampling { temperature: 1.0, ..Sampling::greedy() };
    let prover = Prover { scheme, nonce: [seed as u8; 32], signer: None };
    prover.bind(&mut request, identity, None, 0);
    request
}

fn chunks(steps: &[Step]) -> Vec<ChunkProof> {
    steps.iter().filter_map(|s| s.proof.clone()).collect()
}

fn run(engine: &Engine, request: Request) -> Vec<Step> {
    engine.submit(request).unwrap().collect_blocking().unwrap().steps
}

#[test]
fn proofs_survive_batching_chunking_preemption_and_prefix_reuse() {
    let tight = Options { blocks: 14, step_tokens_max: 40, ..common::options() };
    let Served { engine, model, identity, .. } = common::tiny_served(5, tight);
    for scheme in Scheme::ALL {
        let requests: Vec<Request> =
            (0..10).map(|i| request(&identity, scheme, i, 40 + 9 * i as usize, 70)).collect();
        let running: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
        for (request, generation) in requests.iter().zip(running) {
            let Ended { steps, finish, .. } = generation.collect_blocking().unwrap();
            let ids: Vec<u32> = steps.iter().map(|s| s.token).collect();
            let options = request.proof.as_ref().unwrap();
            let want = recompute(&model, &options.prover, options.root, &request.prompt, &ids);
            assert_eq!(chunks(&steps), want, "{scheme}");
            assert_eq!(want.len(), 3);
            assert_eq!(finish.digest, Some(want[2].digest));
        }
        // Once more alone, now from the prefix cache.
        let again = run(&engine, requests[9].clone());
        let alone = common::tiny_engine(5, common::options());
        assert_eq!(chunks(&again), chunks(&run(&alone, requests[9].clone())), "{scheme}");
    }
    assert!(engine.stats().snapshot().load.preemptions > 0);
}

#[test]
fn rows_of_another_model_prompt_or_token_make_other_proofs() {
    let Served { engine, model, identity, .. } = common::tiny_served(5, common::options());
    let request = request(&identity, Scheme::Residue, 1, 50, 64);
    let steps = run(&engine, request.clone());
    let honest = chunks(&steps);
    let ids: Vec<u32> = steps.iter().map(|s| s.token).collect();
    let options = request.proof.as_ref().unwrap();
    let with = |model: &Model, prompt: &[u32], output: &[u32]| {
        recompute(model, &options.prover, options.root, prompt, output)
    };
    assert_eq!(with(&model, &request.prompt, &ids), honest);
    let pool = Pool::new(2, Isa::best()).unwrap();
    let other = common::tiny_model(6, &pool);
    assert_ne!(with(&other, &request.prompt, &ids)[0].data, honest[0].data);
    let mut prompt = request.prompt.clone();
    prompt[3] += 1;
    assert_ne!(with(&model, &prompt, &ids)[0].data, honest[0].data);
    let mut output = ids;
    output[40] = (output[40] + 1) % 256;
    let tampered = with(&model, &request.prompt, &output);
    assert_eq!(tampered[0], honest[0], "rows before the change are the same");
    assert_ne!(tampered[1].digest, honest[1].digest);
}

fn alice() -> Keypair {
    Keypair::from_seed(&[7; 32]).unwrap()
}

fn site() -> (Router, Served) {
    let registry = Registry::default();
    registry.announce(["tiny".to_owned()]);
    let served = common::tiny_served(3, common::options());
    registry.set("tiny", None, ModelState::Ready(Box::new(served.clone())));
    let state = ServerState::new(registry, Defaults::default(), Clock::manual(1_000_000));
    (router(state.signed_by(std::sync::Arc::new(alice()))), served)
}

async fn post(app: &Router, body: &Value) -> (StatusCode, String) {
    let request = HttpRequest::post("/v1/chat/completions").body(Body::from(body.to_string()));
    let response = app.clone().oneshot(request.unwrap()).await.unwrap();
    let status = response.status();
    let bytes = axum::body::to_bytes(response.into_body(), 8 << 20).await.unwrap();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

fn chat(scheme: &str) -> Value {
    json!({
        "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40,
        "ignore_eos": true, "temperature": 0.9, "seed": 3,
        "proof": {"scheme": scheme, "nonce": "11".repeat(32)},
    })
}

#[tokio::test]
async fn a_signed_proof_travels_with_the_stream_and_with_the_whole() {
    let (app, served) = site();
    let identity = &served.identity;
    for scheme in Scheme::ALL {
        let (status, text) = post(&app, &chat(scheme.name())).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        let whole: Value = serde_json::from_str(&text).unwrap();
        let choice = &whole["choices"][0];
        let end = &choice["proof_end"];
        // The chunks as the wire has them.
        let proofs = choice["proof"].as_array().unwrap();
        assert_eq!(proofs.len(), 2);
        let size = |i: usize| STANDARD.decode(proofs[i]["data"].as_str().unwrap()).unwrap().len();
        let want = if scheme == Scheme::Toploc { (258, 258) } else { (136, 40) };
        assert_eq!((size(0), size(1)), want, "{scheme}");
        // The signature covers the chain, the count and the reason.
        let digest: [u8; 32] = from_hex(proofs[1]["digest"].as_str().unwrap()).unwrap();
        let signature: [u8; 64] = from_hex(end["signature"].as_str().unwrap()).unwrap();
        let hotkey: Hotkey = end["hotkey"].as_str().unwrap().parse().unwrap();
        assert_eq!((hotkey, &end["tokens"]), (alice().hotkey(), &json!(40)));
        assert!(hotkey.verify(&end_message(&digest, 40, 4), &signature));
        assert!(!hotkey.verify(&end_message(&digest, 39, 4), &signature));
        // A verifier derives the root from what it knows.
        let prompt: Vec<u32> = b"<user>hello<assistant>".iter().map(|b| u32::from(*b)).collect();
        let mut known = Request::greedy(prompt, 40);
        known.stop.ignore_eos = true;
        known.sampling.temperature = 0.9;
        let binding = Binding {
            scheme,
            nonce: [0x11; 32],
            request: known.terms(Some(3), 0).hash(),
            model: identity.model_hash,
            hotkey: hotkey.0,
        };
        assert_eq!(from_hex(end["root"].as_str().unwrap()), Ok(binding.root()));
        assert_eq!(from_hex(end["model"].as_str().unwrap()), Ok(identity.model_hash));
        // Streamed, the same chunks arrive at tokens 32 and 40, with powv and ids at each.
        let mut body = chat(scheme.name());
        body["stream"] = json!(true);
        let (_, text) = post(&app, &body).await;
        let frames: Vec<Value> = text
            .lines()
            .filter_map(|l| l.strip_prefix("data: {"))
            .map(|l| serde_json::from_str(&format!("{{{l}")).unwrap())
            .collect();
        let at = |i: usize| &frames[i]["choices"][0];
        assert_eq!(at(32)["proof"], proofs[0]);
        assert_eq!(at(40)["proof"], proofs[1]);
        assert_eq!(at(40)["proof_end"]["root"], end["root"]);
        assert!((1..40).filter(|i| *i != 32).all(|i| at(i)["proof"].is_null()));
        let sum = known.prompt.iter().map(|id| u64::from(*id)).sum::<u64>();
        let mut output_sum = 0;
        for i in 1..=40 {
            let powv = served.model.parameters.powv(sum, output_sum).unwrap();
            assert_eq!(at(i)["powv"], json!(powv), "token {i}");
            output_sum += at(i)["token_ids"][0].as_u64().unwrap();
        }
    }
}

#[tokio::test]
async fn bad_proof_fields_are_refused_by_name() {
    let (app, _) = site();
    for (proof, want) in [
        (json!({"scheme": "magic"}), "must be one of residue-v1, residue-v1-u4, toploc, got magic"),
        (json!({"scheme": "residue-v1", "nonce": "12"}), "must be 32 bytes as 64 hexadecimal"),
        (json!({"scheme": "residue-v1", "none": 1}), "unknown field `none`"),
        (json!({}), "`proof` lacks `scheme`"),
        (json!(7), "`proof` must be an object, got 7"),
    ] {
        let mut body = chat("residue-v1");
        body["proof"] = proof;
        let (status, text) = post(&app, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(text.contains(want), "{text}");
    }
    // Without a nonce the server draws one, and says which.
    let mut body = chat("residue-v1");
    body["proof"] = json!({"scheme": "residue-v1"});
    let nonce = |text: String| {
        let body: Value = serde_json::from_str(&text).unwrap();
        body["choices"][0]["proof_end"]["nonce"].as_str().unwrap().to_owned()
    };
    let (first, second) = (nonce(post(&app, &body).await.1), nonce(post(&app, &body).await.1));
    assert_ne!(first, second);
}

fn golden(family: &str) -> Checkpoint {
    Checkpoint::open(&common::golden(family)).unwrap()
}

/// Parameters of one layer, as vLLM registers them.
fn layer_names(family: &str) -> Vec<&'static str> {
    const ATTENTION: &[&str] = &["self_attn.qkv_proj.weight", "self_attn.o_proj.weight"];
    const MLP: &[&str] = &["mlp.gate_up_proj.weight", "mlp.down_proj.weight"];
    const NORMS: &[&str] = &["input_layernorm.weight", "post_attention_layernorm.weight"];
    const QK_NORMS: &[&str] = &["self_attn.q_norm.weight", "self_attn.k_norm.weight"];
    let parts: &[&[&str]] = match family {
        "llama-linear" => &[
            &["self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias"],
            &["self_attn.o_proj.weight", "self_attn.o_proj.bias"],
            MLP,
            NORMS,
        ],
        "qwen2" => &[
            &["self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias", "self_attn.o_proj.weight"],
            MLP,
            NORMS,
        ],
        "qwen3" => &[ATTENTION, QK_NORMS, MLP, NORMS],
        "gemma2" => &[
            ATTENTION,
            MLP,
            NORMS,
            &["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"],
        ],
        "mixtral" => &[
            ATTENTION,
            &["block_sparse_moe.gate.weight"],
            &["block_sparse_moe.experts.w13_weight", "block_sparse_moe.experts.w2_weight"],
            NORMS,
        ],
        "qwen3_moe" => &[
            ATTENTION,
            QK_NORMS,
            &["mlp.experts.w13_weight", "mlp.experts.w2_weight", "mlp.gate.weight"],
            NORMS,
        ],
        _ => &[ATTENTION, MLP, NORMS],
    };
    parts.concat()
}

/// One parameter, fused and padded by brute force: its rows.
fn rows_of(checkpoint: &Checkpoint, name: &str, dtype: Dtype) -> Vec<Vec<f32>> {
    let read = |name: &str| -> Vec<Vec<f32>> {
        let tensor = checkpoint.tensor(name).unwrap();
        let mut bits = vec![0; tensor.cols()];
        let row = |r: usize| {
            tensor.read_row(r, dtype, &mut bits).unwrap();
            bits.iter().map(|b| dtype.widen(*b)).collect()
        };
        (0..tensor.rows()).map(row).collect()
    };
    let fuse = |parts: &[&str], whole: &str| -> Vec<Vec<f32>> {
        if checkpoint.has(name) {
            return read(name);
        }
        parts.iter().flat_map(|p| read(&name.replace(whole, p))).collect()
    };
    let flat = |rows: Vec<Vec<f32>>| vec![rows.concat()];
    if name.ends_with("qkv_proj.bias") {
        return flat(fuse(&["q_proj", "k_proj", "v_proj"], "qkv_proj"));
    }
    if name.contains("qkv_proj") {
        return fuse(&["q_proj", "k_proj", "v_proj"], "qkv_proj");
    }
    if name.contains("gate_up_proj") {
        return fuse(&["gate_proj", "up_proj"], "gate_up_proj");
    }
    if let Some((module, stack)) = name.split_once(".experts.") {
        let mixtral = module.ends_with("block_sparse_moe");
        let parts: &[&str] = match (stack, mixtral) {
            ("w13_weight", true) => &["w1", "w3"],
            ("w13_weight", false) => &["gate_proj", "up_proj"],
            (_, true) => &["w2"],
            (_, false) => &["down_proj"],
        };
        let expert = |e: usize| -> Vec<f32> {
            let names = parts.iter().map(|p| format!("{module}.experts.{e}.{p}.weight"));
            names.flat_map(|n| read(&n).concat()).collect()
        };
        let has = |e: &usize| checkpoint.has(&format!("{module}.experts.{e}.{}.weight", parts[0]));
        return (0..).take_while(has).map(expert).collect();
    }
    read(name)
}

#[test]
fn powv_counts_the_parameters_of_every_family_as_vllm_does() {
    for family in common::FAMILIES {
        let checkpoint = golden(family);
        let pool = Pool::new(1, Isa::best()).unwrap();
        let decoder = common::decoder(&checkpoint, None, &pool).unwrap();
        let parameters = Parameters::new(&checkpoint, &decoder.spec, decoder.dtype).unwrap();
        let mut names = vec!["model.embed_tokens.weight".to_owned()];
        for layer in 0..2 {
            let of_layer = |n: &&str| format!("model.layers.{layer}.{n}");
            names.extend(layer_names(family).iter().map(of_layer));
        }
        names.push("model.norm.weight".into());
        if !decoder.spec.tied {
            names.push("lm_head.weight".into());
        }
        let listed: Vec<&str> = parameters.list().iter().map(|p| p.name.as_str()).collect();
        assert_eq!(listed, names, "{family}");
        let stored: Vec<Vec<Vec<f32>>> =
            names.iter().map(|n| rows_of(&checkpoint, n, decoder.dtype)).collect();
        let mut noise = common::Noise(7);
        for _ in 0..2_000 {
            let (input, output) = (noise.below(100_000) as u64, noise.below(5_000) as u64);
            let parameter = &stored[(input + output) as usize % stored.len()];
            let row = &parameter[output as usize % parameter.len()];
            let weight = row[input as usize % row.len()];
            let want = (f64::from(weight) * (input + output) as f64).floor() as i64;
            assert_eq!(parameters.powv(input, output).unwrap(), want, "{family} {input} {output}");
        }
    }
}

#[test]
fn a_vocabulary_is_padded_to_64_rows_of_zeros() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 1);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let pool = Pool::new(1, Isa::best()).unwrap();
    let decoder = common::decoder(&checkpoint, None, &pool).unwrap();
    let parameters = Parameters::new(&checkpoint, &decoder.spec, decoder.dtype).unwrap();
    assert_eq!(parameters.list()[0].shape.rows, 320, "261 tokens");
    // Parameter 0, row 300: padding.
    let count = parameters.list().len() as u64;
    let input = count * 1_000 - 300;
    assert_eq!(parameters.powv(input, 300).unwrap(), 0);
}

#[test]
fn the_identity_is_remembered_and_does_not_depend_on_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 1);
    let identity = |isa: Isa| {
        let pool = Pool::new(2, isa).unwrap();
        let load = targon_engine::models::Model::load;
        let model = load(dir.path(), None, &pool, |_, _| {}).unwrap();
        Identity::compute(&model, &pool).unwrap()
    };
    let reference = identity(Isa::SCALAR);
    for isa in Isa::available() {
        let same = identity(isa);
        assert_eq!(same.model_hash, reference.model_hash, "{isa}");
        assert_eq!(same.calibration, reference.calibration, "{isa}");
    }
}
