//! `verify`: judges captured answers, one a line.

use super::load::{self, DownloadBars};
use super::shared::{ComputeArgs, ModelsArg};
use super::{Failure, runtime};
use crate::chain::keys::Hotkey;
use crate::config::models_toml::ModelConfig;
use crate::engine::request::Request;
use crate::models::{Identity, Model};
use crate::ops::pool::Pool;
use crate::proof::Scheme;
use crate::proof::codec::from_hex;
use crate::server::translate::Defaults;
use crate::server::understand::Reader;
use crate::verify::answer::Answer;
use crate::verify::proof::Asked;
use crate::verify::{Claim, Depth, Limits, Profile, Report, Verdict, Verifier};
use crate::wire::openai::{ChatRequest, CompletionRequest};
use clap::Args;
use comfy_table::{Table, presets};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

/// Exit code where an answer was rejected.
const REJECTED: u8 = 3;
/// Exit code where nothing was rejected, but not everything could be scored.
const UNSCORED: u8 = 4;

/// Arguments of `verify`.
#[derive(Args)]
pub(super) struct VerifyArgs {
    /// Captured answers, one JSON object a line: `request` (the body), and `response` (a whole
    /// answer) or `chunks` (the events of a stream).
    file: PathBuf,
    #[command(flatten)]
    models: ModelsArg,
    /// Which rules: targon-4.1 (powv), targon-4.4 (ranks) or proof (of the scheme that the request
    /// asked for). Where absent, the proof if there is one to expect, else targon-4.4.
    #[arg(long)]
    profile: Option<Profile>,
    /// Compute logits at every row, not only at 32 random ones and the last.
    #[arg(long)]
    slow: bool,
    /// Demand that hidden rows are equal bit for bit: the miner runs this engine.
    #[arg(long)]
    exact: bool,
    /// Print what was found for every token.
    #[arg(long)]
    explain: bool,
    /// Print one JSON object for each answer.
    #[arg(long)]
    json: bool,
    /// Decides which rows are looked at; random where absent.
    #[arg(long)]
    chance: Option<u64>,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// One line of the file.
#[derive(Deserialize)]
struct Capture {
    request: Value,
    response: Option<Value>,
    chunks: Option<Vec<Value>>,
    /// The hotkey that must have signed the proof.
    hotkey: Option<String>,
}

pub(super) fn run(args: &VerifyArgs) -> Result<ExitCode, Failure> {
    let config = args.models.read(&[])?;
    let path = args.file.display();
    let text = std::fs::read_to_string(&args.file)
        .map_err(|e| Failure::user(format!("{path} cannot be read: {e}")))?;
    let pool = args.compute.pool()?;
    let runtime = runtime()?;
    let mut verifiers = Verifiers { models: config.models, pool, loaded: HashMap::new() };
    let mut worst = 0;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (number, line) in lines {
        let place = format!("{path}:{}", number + 1);
        let capture: Capture = serde_json::from_str(line)
            .map_err(|e| Failure::user(format!("{place} is not a captured answer: {e}")))?;
        let verifier = verifiers.of(&runtime, &capture, args)?;
        let done = runtime.block_on(judge(&verifier, &capture, args));
        let done = done.map_err(|what| Failure::user(format!("{place}: {what}")))?;
        for judged in &done {
            worst = worst.max(weight(&judged.report.verdict));
            print(&place, judged, &verifier.model, args);
        }
    }
    Ok(ExitCode::from([0, UNSCORED, REJECTED][worst]))
}

/// A rejection outweighs an answer that could not be scored, in whatever order they come.
fn weight(verdict: &Verdict) -> usize {
    match verdict {
        Verdict::Pass => 0,
        Verdict::Unscored(_) => 1,
        Verdict::Reject(_) => 2,
    }
}

/// Loads each model once, when it is first needed.
struct Verifiers {
    models: Vec<ModelConfig>,
    pool: Pool,
    loaded: HashMap<String, Verifier>,
}

impl Verifiers {
    fn of(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        capture: &Capture,
        args: &VerifyArgs,
    ) -> Result<Verifier, Failure> {
        let asked = capture.request["model"].as_str();
        let config = match (asked, self.models.as_slice()) {
            (Some(name), models) => models.iter().find(|m| m.name == name),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        let config = config.cloned().ok_or_else(|| {
            let what =
                format!("{} has no model `{}`", args.models.path.display(), asked.unwrap_or(""));
            Failure::user(what).with_hint(Some("add a [[model]] entry of that name"))
        })?;
        if let Some(verifier) = self.loaded.get(&config.name) {
            return Ok(verifier.clone());
        }
        let name = config.name.clone();
        let refuse = |why: String| Failure::user(format!("{name} cannot be loaded: {why}"));
        let bars = DownloadBars::new();
        let located = runtime.block_on(load::locate(config, &bars)).map_err(refuse)?;
        let plan = load::plan(&located, load::available_memory()).map_err(refuse)?;
        let model = Model::load(&located.path, located.config.dtype, &self.pool, |_, _| {});
        let model = model.map_err(|e| refuse(e.to_string()))?;
        let identity = Identity::of(&model, &self.pool).map_err(|e| refuse(e.to_string()))?;
        let verifier = Verifier {
            model: Arc::new(model),
            identity: Arc::new(identity),
            pool: self.pool.separate(),
            limits: Limits { exact: args.exact, ..Limits::default() },
            context_max: plan.options.context_max,
        };
        self.loaded.insert(name.clone(), verifier.clone());
        Ok(verifier)
    }
}

/// One choice, judged.
struct Judged {
    choice: u32,
    profile: Profile,
    answer: Option<Answer>,
    report: Report,
    seconds: f64,
}

/// Judges every choice of a captured answer.
async fn judge(
    verifier: &Verifier,
    capture: &Capture,
    args: &VerifyArgs,
) -> Result<Vec<Judged>, String> {
    let body = &capture.request;
    let requests = understand(verifier, body).await?;
    let asked = asked(capture)?;
    let profile = args.profile.unwrap_or(match asked {
        Some(_) => Profile::Proof,
        None => Profile::Ranks,
    });
    let depth = if args.slow { Depth::Slow } else { Depth::Fast };
    let clock = crate::clock::Clock::system();
    let mut all = Vec::new();
    for (choice, request) in (0..).zip(&requests) {
        let answer = match (&capture.response, &capture.chunks) {
            (Some(response), None) => Answer::of_response(response, choice),
            (None, Some(chunks)) => Answer::of_stream(chunks, choice),
            _ => return Err("must have either `response` or `chunks`".into()),
        };
        let started = clock.elapsed();
        let (answer, report) = match answer {
            Err(rejection) => {
                let verdict = Verdict::Reject(rejection);
                (None, Report { verdict, rows: Vec::new(), chunks: Vec::new() })
            }
            Ok(answer) => {
                let seed = body["seed"].as_i64();
                let claim = Claim {
                    request,
                    seed,
                    choice,
                    proof: asked,
                    answer: &answer,
                    end_is_implied: false,
                };
                let chance = args.chance.unwrap_or_else(|| uuid::Uuid::new_v4().as_u128() as u64);
                let report = verifier.verify(&claim, profile, depth, chance);
                (Some(answer), report)
            }
        };
        let seconds = (clock.elapsed() - started).as_secs_f64();
        all.push(Judged { choice, profile, answer, report, seconds });
    }
    Ok(all)
}

async fn understand(verifier: &Verifier, body: &Value) -> Result<Vec<Request>, String> {
    let reader = Reader {
        model: &verifier.model,
        context_max: verifier.context_max,
        defaults: Defaults::default(),
    };
    let wrong = |e: serde_json::Error| format!("`request` is not a body: {e}");
    let understood = if body.get("messages").is_some() {
        let request: ChatRequest = serde_json::from_value(body.clone()).map_err(wrong)?;
        reader.chat(&request).await
    } else {
        let request: CompletionRequest = serde_json::from_value(body.clone()).map_err(wrong)?;
        reader.completion(&request).await
    };
    understood.map(|u| u.requests).map_err(|e| format!("`request`: {}", e.message))
}

fn asked(capture: &Capture) -> Result<Option<Asked>, String> {
    let Some(scheme) = capture.request["proof"]["scheme"].as_str() else { return Ok(None) };
    let scheme: Scheme = scheme.parse().map_err(|rule| format!("proof.scheme {rule}"))?;
    let nonce = capture.request["proof"]["nonce"].as_str().map(from_hex).transpose();
    let nonce = nonce.map_err(|rule| format!("proof.nonce {rule}"))?;
    let hotkey = capture.hotkey.as_deref().map(str::parse::<Hotkey>).transpose();
    let hotkey = hotkey.map_err(|e| format!("`hotkey`: {e}"))?;
    Ok(Some(Asked { scheme, nonce, hotkey }))
}

fn print(place: &str, judged: &Judged, model: &Model, args: &VerifyArgs) {
    let Judged { choice, profile, answer, report, seconds } = judged;
    let tokens = answer.as_ref().map_or(0, |a| a.ids.len());
    let exact = report.chunks.iter().filter(|c| c.is_exact).count();
    if args.json {
        let reason = match &report.verdict {
            Verdict::Reject(r) => Some((r.reason.name(), r.what.clone())),
            Verdict::Unscored(why) => Some(("UNSCORED", why.clone())),
            Verdict::Pass => None,
        };
        let rows = report.rows.iter().map(|r| {
            json!({
                "index": r.index, "token": r.token, "rank": r.rank, "logprob": r.logprob,
                "reported": r.reported, "margin": r.margin,
            })
        });
        let line = json!({
            "place": place, "choice": choice, "passed": report.verdict == Verdict::Pass,
            "reason": reason.as_ref().map(|r| r.0), "what": reason.as_ref().map(|r| &r.1),
            "tokens": tokens, "seconds": seconds, "chunks": report.chunks.len(),
            "exact_chunks": exact, "energies":
                report.chunks.iter().map(|c| c.energy).collect::<Vec<_>>(),
            "rows": if args.explain { rows.collect::<Vec<_>>() } else { Vec::new() },
        });
        println!("{line}");
        return;
    }
    println!("{place} choice {choice}: {}", report.verdict);
    let rules = match profile {
        Profile::Powv => "targon-4.1".to_owned(),
        Profile::Ranks => "targon-4.4".to_owned(),
        Profile::Proof => format!("{exact} of {} chunks equal bit for bit", report.chunks.len()),
    };
    println!("  {tokens} tokens, {} rows scored, {rules}, {seconds:.3} s", report.rows.len());
    if args.explain {
        println!("{}", table(report, model));
    }
}

/// What was found for every row that was scored.
fn table(report: &Report, model: &Model) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["token", "id", "text", "log-prob", "reported", "rank", "margin", "energy"]);
    let number = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.4}"));
    for row in &report.rows {
        let chunk = report.chunks.get(row.index / crate::proof::CHUNK_ROWS);
        let energy = match chunk {
            Some(c) if c.is_exact => "exact".to_owned(),
            Some(c) => number(c.energy),
            None => "-".into(),
        };
        table.add_row([
            row.index.to_string(),
            row.token.to_string(),
            format!("{:?}", model.tokenizer.text_of(row.token)),
            format!("{:.4}", row.logprob),
            number(row.reported),
            row.rank.to_string(),
            number(row.margin),
            energy,
        ]);
    }
    table
}
