//! Runs `query`: sends one request to a miner as a validator does, prints the answer token by
//! token, and saves it for `verify`.

use super::Failure;
use super::out::outln;
use super::printable::{printable, printable_lines};
use super::shared::{check_writable, proof_scheme, runtime};
use super::subnet_args::{ChainArgs, WalletArgs};
use crate::chain::Chain;
use crate::chain::keys::Hotkey;
use crate::chain::subtensor::Subtensor;
use crate::clock::Clock;
use crate::doctor::miner::names;
use crate::endpoint::shown;
use crate::entropy::Entropy;
use crate::proof::codec::to_hex;
use crate::validator::query::{
    Arrival, DEPTH_MAX, QueryError, QuerySigner, Size, Streamed, Target, is_deeper,
};
use crate::verify::captures::CapturedStream;
use anyhow::bail;
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Most seconds of any wait: a day.
const SECONDS_MAX: u64 = 86_400;

/// Arguments of `query`.
#[derive(Args)]
pub(super) struct QueryArgs {
    /// The miner's number on the subnet; its address comes from the chain.
    #[arg(long, required_unless_present = "address")]
    uid: Option<u16>,
    /// The miner's address, `ip:port` or a URL.
    #[arg(long, conflicts_with = "uid")]
    address: Option<String>,
    /// The hotkey behind --address: who the request is signed for, and who must have signed proofs.
    #[arg(long, requires = "address")]
    hotkey: Option<Hotkey>,
    /// The model; by default the first one that the miner or the server lists.
    #[arg(long)]
    model: Option<String>,
    /// The text that the model reads.
    prompt: Option<String>,
    /// A JSON file with a whole request body instead of a prompt and of the flags that make one.
    #[arg(long, conflicts_with_all = [
        "prompt", "model", "completion", "max_tokens", "temperature", "proof",
    ])]
    body: Option<PathBuf>,
    /// Use the completions endpoint instead of chat.
    #[arg(long)]
    completion: bool,
    /// The most tokens of the answer.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// The temperature that tokens are drawn at; 0 takes the most probable ones.
    #[arg(long, default_value_t = 0.7, value_parser = temperature)]
    temperature: f32,
    /// The proof to ask for: residue-v1, residue-v1-u4, toploc or none.
    #[arg(long, default_value = "residue-v1")]
    proof: String,
    /// Append request and answer to this file, for `verify`.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Seconds that may pass between two reads.
    #[arg(long, default_value_t = 60)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    read_timeout: u64,
    /// Seconds that the whole answer may take.
    #[arg(long, default_value_t = 600)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    timeout: u64,
    /// A key of the open API of your own server; never sent with a signed request.
    #[arg(long, env = "TARGON_QUERY_API_KEY", hide_env_values = true, requires = "address")]
    api_key: Option<String>,
    #[command(flatten)]
    wallet: WalletArgs,
    #[command(flatten)]
    chain: ChainArgs,
}

/// A temperature that a request can have.
fn temperature(text: &str) -> anyhow::Result<f32> {
    let value: f32 = text.parse()?;
    match (0.0..f32::INFINITY).contains(&value) {
        true => Ok(value),
        false => bail!("must be a finite number from 0 on, got {value}"),
    }
}

pub(super) fn run(args: &QueryArgs) -> Result<(), Failure> {
    proof_scheme(&args.proof)?;
    check_writable("save", args.save.as_deref())?;
    let signer = match args.wallet.is_named() || args.uid.is_some() {
        true => {
            let key = Arc::new(args.wallet.keypair()?);
            Some(QuerySigner { key, entropy: Entropy::system() })
        }
        false => None,
    };
    runtime()?.block_on(async {
        let (url, hotkey) = find(args).await?;
        let (read_timeout, timeout) =
            (Duration::from_secs(args.read_timeout), Duration::from_secs(args.timeout));
        let api_key = args.api_key.clone().filter(|_| signer.is_none());
        let size = Size::LARGE;
        ask(args, Target { url, hotkey, signer, api_key, read_timeout, timeout, size }).await
    })
}

/// The URL of `ip:port`, or of a URL.
pub(super) fn url(address: &str) -> String {
    match address.contains("://") {
        true => address.to_owned(),
        false => format!("http://{address}"),
    }
}

/// Where the miner listens, and who it is.
async fn find(args: &QueryArgs) -> Result<(String, Option<Hotkey>), Failure> {
    if let Some(address) = &args.address {
        return Ok((url(address), args.hotkey));
    }
    let (netuid, uid) = (args.chain.netuid(), args.uid.unwrap_or_default());
    let chain = Subtensor::new(args.chain.endpoints()?);
    let metagraph = chain.metagraph(netuid).await.map_err(Failure::user)?;
    let neuron = metagraph
        .uid(uid)
        .ok_or_else(|| Failure::user(format!("subnet {netuid} has no uid {uid}")))?;
    let axon = neuron.axon.ok_or_else(|| {
        Failure::user(format!("uid {uid} ({}) has announced no address", neuron.hotkey))
    })?;
    tracing::info!(uid, hotkey = %neuron.hotkey, axon = %axon.address, "found on chain");
    Ok((format!("http://{}", axon.address), Some(neuron.hotkey)))
}

async fn ask(args: &QueryArgs, target: Target) -> Result<(), Failure> {
    let clock = Clock::system();
    let body = body(args, &target, &clock).await?;
    let is_chat = body.get("messages").is_some();
    let path = if is_chat { "/v1/chat/completions" } else { "/v1/completions" };
    outln!("{:>8} {:>9} {:>10} {:>8} {:>12}  text", "ms", "token id", "log-prob", "chunk", "powv");
    let asked_ms = clock.unix_ms();
    let Streamed { arrivals, outcome, .. } = target.stream(path, &body, &clock, print).await;
    if !arrivals.is_empty() {
        summarize(&arrivals);
        if let Some(path) = &args.save {
            save(path, &target, (&body, asked_ms), &arrivals)?;
        }
    }
    let failed = |what: &str| Failure::user(format!("{}: {what}", shown(&target.url)));
    // What the server itself says of its failure explains how the stream ends.
    if let Some(message) = arrivals.iter().find_map(|a| error_of(&a.chunk)) {
        return Err(failed(&printable(message)));
    }
    outcome.map_err(query_failure)?;
    match arrivals.is_empty() {
        true => Err(failed("the stream ends before its first event: it is no answer")),
        false => Ok(()),
    }
}

/// What an event says of a failure, if it says anything of one.
fn error_of(chunk: &Value) -> Option<&str> {
    let error = &chunk["error"];
    error["message"].as_str().or_else(|| error.as_str())
}

fn query_failure(e: QueryError) -> Failure {
    let hint = match &e {
        QueryError::Status { body, .. } if body.contains("Epistula version") => {
            Some("this is a signed listener: name a wallet by --wallet.name and --wallet.hotkey")
        }
        QueryError::Status { body, .. } if body.contains("not intended for self") => {
            Some("name the miner's own hotkey by --hotkey, or ask by --uid")
        }
        _ => None,
    };
    Failure::user(printable(&e.to_string())).with_hint(hint)
}

/// The request: a file's, or one made of the flags.
async fn body(args: &QueryArgs, target: &Target, clock: &Clock) -> Result<Value, Failure> {
    let entropy = Entropy::system();
    if let Some(path) = &args.body {
        return body_of_file(path, &entropy);
    }
    let prompt = args.prompt.as_deref().ok_or_else(|| Failure::user("a prompt is missing"))?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(target, clock).await?,
    };
    let mut body = json!({
        "model": model, "max_tokens": args.max_tokens, "temperature": args.temperature,
        "seed": i64::from(entropy.word() as u32), "stream": true,
        "logprobs": true, "logprobs_mode": "scaled",
    });
    match args.completion {
        true => body["prompt"] = prompt.into(),
        false => body["messages"] = json!([{"role": "user", "content": prompt}]),
    }
    if args.proof != "none" {
        body["proof"] = json!({"scheme": args.proof, "nonce": fresh_nonce(&entropy)});
    }
    Ok(body)
}

/// A body as a user wrote it, which is asked as a stream and bound to a nonce of ours.
fn body_of_file(path: &Path, entropy: &Entropy) -> Result<Value, Failure> {
    let place = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::user(format!("--body {place} cannot be read: {e}")))?;
    let mut body: Value = serde_json::from_str(&text)
        .map_err(|e| Failure::user(format!("--body {place} is not JSON: {e}")))?;
    let Some(fields) = body.as_object_mut() else {
        return Err(Failure::user(format!("--body {place} must hold a JSON object")));
    };
    fields.insert("stream".into(), true.into());
    if let Some(proof) = fields.get_mut("proof").and_then(Value::as_object_mut)
        && proof.get("nonce").is_none_or(Value::is_null)
    {
        // Without one of ours the answer may be another's.
        proof.insert("nonce".into(), fresh_nonce(entropy).into());
    }
    if is_deeper(&body, DEPTH_MAX) {
        return Err(Failure::user(format!("--body {place} must nest at most {DEPTH_MAX} deep")));
    }
    Ok(body)
}

fn fresh_nonce(entropy: &Entropy) -> String {
    to_hex(&entropy.bytes::<32>())
}

async fn first_model(target: &Target, clock: &Clock) -> Result<String, Failure> {
    let hint = Some("name one by --model");
    let listed = names(target, clock).await.map_err(|e| {
        let failure = query_failure(e);
        let hint = failure.hint.clone().or(hint.map(str::to_owned));
        failure.with_hint(hint)
    })?;
    let none = || Failure::user(format!("{} lists no model", shown(&target.url))).with_hint(hint);
    listed.into_iter().next().ok_or_else(none)
}

/// One line for each token.
fn print(arrival: &Arrival) {
    let choice = &arrival.chunk["choices"][0];
    let entry = match choice["logprobs"]["content"].as_array() {
        Some(content) => content.first().map(|e| (e["token"].clone(), e["logprob"].clone())),
        None => {
            let lists = &choice["logprobs"];
            lists["tokens"].get(0).map(|t| (t.clone(), lists["token_logprobs"][0].clone()))
        }
    };
    let Some((_, logprob)) = entry else { return };
    let text = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str());
    let or_dash = |value: &Value| if value.is_null() { "-".into() } else { value.to_string() };
    let logprob = logprob.as_f64().map_or("-".into(), |l| format!("{l:.4}"));
    outln!(
        "{:>8} {:>9} {:>10} {:>8} {:>12}  {:?}",
        arrival.at.as_millis(),
        or_dash(&choice["token_ids"][0]),
        logprob,
        or_dash(&choice["proof"]["index"]),
        or_dash(&choice["powv"]),
        text.unwrap_or_default(),
    );
}

fn summarize(arrivals: &[Arrival]) {
    let tokens = arrivals.iter().filter(|a| a.chunk["choices"][0]["token_ids"].is_array()).count();
    let text = |a: &Arrival| {
        let choice = &a.chunk["choices"][0];
        let text = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str());
        text.unwrap_or_default().to_owned()
    };
    let first = arrivals.iter().find(|a| !text(a).is_empty()).map(|a| a.at);
    let end = arrivals.last().map(|a| a.at).unwrap_or_default();
    outln!("\n{}\n", printable_lines(&arrivals.iter().map(text).collect::<String>()));
    let seconds = end.as_secs_f64();
    let chunks = arrivals.iter().filter(|a| !a.chunk["choices"][0]["proof"].is_null()).count();
    let proof_end = arrivals.iter().find_map(|a| {
        let end = &a.chunk["choices"][0]["proof_end"];
        end["scheme"].as_str().map(|s| (s.to_owned(), end["hotkey"].as_str().map(str::to_owned)))
    });
    outln!(
        "{tokens} tokens in {seconds:.3} s: {:.1} tokens/s, first text after {:.3} s",
        tokens as f64 / seconds.max(1e-9),
        first.unwrap_or(end).as_secs_f64(),
    );
    match proof_end {
        Some((scheme, Some(hotkey))) => {
            let (scheme, hotkey) = (printable(&scheme), printable(&hotkey));
            outln!("{chunks} proof chunks of {scheme}, signed by {hotkey}");
        }
        Some((scheme, None)) => {
            outln!("{chunks} proof chunks of {}, unsigned", printable(&scheme));
        }
        None => outln!("no proof"),
    }
}

/// One more line of a file of captures.
fn save(
    path: &Path,
    target: &Target,
    (body, asked_ms): (&Value, u64),
    arrivals: &[Arrival],
) -> Result<(), Failure> {
    let stream = CapturedStream {
        request: body,
        chunks: arrivals.iter().map(|a| &a.chunk).collect(),
        at_ms: arrivals.iter().map(|a| a.at.as_millis() as u64).collect(),
        asked_ms,
        hotkey: target.hotkey.map(|hotkey| hotkey.to_string()),
    };
    stream.append_to(path).map_err(|e| Failure::user(format!("--save {e}")))?;
    tracing::info!(file = %path.display(), "saved for `verify`");
    Ok(())
}
