//! Captured answers: one JSON object a line, read, understood and judged.

use super::load::{self, DownloadBars};
use super::shared::ModelsArg;
use super::{Failure, runtime};
use crate::chain::keys::Hotkey;
use crate::clock::Clock;
use crate::config::models_toml::ModelConfig;
use crate::engine::request::Request;
use crate::intake::translate::Defaults;
use crate::intake::understand::Reader;
use crate::models::{Identity, Model};
use crate::ops::pool::Pool;
use crate::proof::Scheme;
use crate::proof::codec::from_hex;
use crate::verify::answer::Answer;
use crate::verify::proof::Asked;
use crate::verify::{Claim, Depth, Limits, Profile, Reason, Rejection, Report, Verdict, Verifier};
use crate::wire::openai::{ChatRequest, CompletionRequest};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::runtime::Runtime;

/// One line of a file.
#[derive(Deserialize)]
pub(super) struct Capture {
    /// The body of the request.
    pub(super) request: Value,
    response: Option<Value>,
    chunks: Option<Vec<Value>>,
    /// The hotkey that must have signed the proof.
    hotkey: Option<String>,
    /// Who answered, where there is no hotkey.
    miner: Option<String>,
}

impl Capture {
    /// Whom evidence is about.
    pub(super) fn miner(&self) -> Option<&str> {
        self.hotkey.as_deref().or(self.miner.as_deref())
    }

    fn answer(&self, choice: u32) -> Result<Result<Answer, Rejection>, String> {
        match (&self.response, &self.chunks) {
            (Some(response), None) => Ok(Answer::of_response(response, choice)),
            (None, Some(chunks)) => Ok(Answer::of_stream(chunks, choice)),
            _ => Err("must have either `response` or `chunks`".into()),
        }
    }

    fn asked(&self) -> Result<Option<Asked>, String> {
        let Some(scheme) = self.request["proof"]["scheme"].as_str() else { return Ok(None) };
        let scheme: Scheme = scheme.parse().map_err(|rule| format!("proof.scheme {rule}"))?;
        let nonce = self.request["proof"]["nonce"].as_str().map(from_hex).transpose();
        let nonce = nonce.map_err(|rule| format!("proof.nonce {rule}"))?;
        let hotkey = self.hotkey.as_deref().map(str::parse::<Hotkey>).transpose();
        let hotkey = hotkey.map_err(|e| format!("`hotkey`: {e}"))?;
        Ok(Some(Asked { scheme, nonce, hotkey }))
    }
}

/// A file of captured answers.
pub(super) struct Captures {
    path: PathBuf,
    text: String,
}

impl Captures {
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Failure::user(format!("{} cannot be read: {e}", path.display())))?;
        Ok(Self { path: path.to_owned(), text })
    }

    /// Every answer with the place it stands at; each line is read when its turn comes.
    pub(super) fn iter(&self) -> impl Iterator<Item = Result<(String, Capture), Failure>> {
        let lines = self.text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        lines.map(move |(number, line)| {
            let place = format!("{}:{}", self.path.display(), number + 1);
            let capture = serde_json::from_str(line)
                .map_err(|e| Failure::user(format!("{place} is not a captured answer: {e}")))?;
            Ok((place, capture))
        })
    }
}

/// How captures are judged.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    /// Where absent, the proof if there is one to expect, else Targon's ranks.
    pub(super) profile: Option<Profile>,
    pub(super) depth: Depth,
    /// Random where absent.
    pub(super) chance: Option<u64>,
}

/// One choice, judged.
pub(super) struct Judged {
    pub(super) choice: u32,
    pub(super) profile: Profile,
    pub(super) scheme: Option<Scheme>,
    pub(super) request: Request,
    pub(super) answer: Option<Answer>,
    pub(super) report: Report,
    pub(super) seconds: f64,
}

/// Loads each model once, when it is first needed.
pub(super) struct Verifiers {
    path: PathBuf,
    models: Vec<ModelConfig>,
    pool: Pool,
    limits: Limits,
    runtime: Runtime,
    loaded: HashMap<String, Verifier>,
}

impl Verifiers {
    pub(super) fn new(models: &ModelsArg, pool: Pool, limits: Limits) -> Result<Self, Failure> {
        let (path, models) = (models.path.clone(), models.read(&[])?.models);
        Ok(Self { path, models, pool, limits, runtime: runtime()?, loaded: HashMap::new() })
    }

    /// Judges every choice of a capture from `place`.
    pub(super) fn judge(
        &self,
        verifier: &Verifier,
        place: &str,
        capture: &Capture,
        rules: Rules,
    ) -> Result<Vec<Judged>, Failure> {
        let judged = self.runtime.block_on(judge(verifier, capture, rules));
        judged.map_err(|what| Failure::user(format!("{place}: {what}")))
    }

    /// The verifier of the model that was asked.
    pub(super) fn of(&mut self, capture: &Capture) -> Result<Verifier, Failure> {
        let asked = capture.request["model"].as_str();
        let config = match (asked, self.models.as_slice()) {
            (Some(name), models) => models.iter().find(|m| m.name == name),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        let config = config.cloned().ok_or_else(|| {
            let what = format!("{} has no model `{}`", self.path.display(), asked.unwrap_or(""));
            Failure::user(what).with_hint(Some("add a [[model]] entry of that name"))
        })?;
        if let Some(verifier) = self.loaded.get(&config.name) {
            return Ok(verifier.clone());
        }
        let name = config.name.clone();
        let refuse = |why: String| Failure::user(format!("{name} cannot be loaded: {why}"));
        let bars = DownloadBars::new();
        let located = self.runtime.block_on(load::locate(config, &bars)).map_err(refuse)?;
        let plan = load::plan(&located, load::available_memory()).map_err(refuse)?;
        let model = Model::load(&located.path, located.config.dtype, &self.pool, |_, _| {});
        let model = model.map_err(|e| refuse(e.to_string()))?;
        let identity = Identity::of(&model, &self.pool).map_err(|e| refuse(e.to_string()))?;
        let verifier = Verifier {
            model: Arc::new(model),
            identity: Arc::new(identity),
            pool: self.pool.separate(),
            limits: self.limits,
            context_max: plan.options.context_max,
        };
        self.loaded.insert(name.clone(), verifier.clone());
        Ok(verifier)
    }
}

/// Choices of one prompt are judged together: the prompt is run once.
async fn judge(
    verifier: &Verifier,
    capture: &Capture,
    rules: Rules,
) -> Result<Vec<Judged>, String> {
    let requests = understand(verifier, &capture.request).await?;
    let asked = capture.asked()?;
    let profile = rules.profile.unwrap_or(match asked {
        Some(_) => Profile::Proof,
        None => Profile::Ranks,
    });
    let answers = (0..).zip(&requests).map(|(choice, _)| capture.answer(choice));
    let answers = answers.collect::<Result<Vec<_>, _>>()?;
    // Calls of tools that nobody offered would only hide the text.
    let has_tools = capture.request["tools"].as_array().is_some_and(|t| !t.is_empty());
    let uncalled = |answer: Answer| match answer.text.is_none() && !has_tools {
        true => {
            let what = "it calls tools, and the request offered none";
            Err(Rejection::new(Reason::TextMismatch, what))
        }
        false => Ok(answer),
    };
    let answers: Vec<_> = answers.into_iter().map(|a| a.and_then(uncalled)).collect();
    let seed = capture.request["seed"].as_i64();
    let claims = (0..).zip(requests.iter().zip(&answers));
    let claims: Vec<Claim<'_>> = claims
        .filter_map(|(choice, (request, answer))| {
            let (answer, end_is_implied) = (answer.as_ref().ok()?, false);
            Some(Claim { request, seed, choice, proof: asked, answer, end_is_implied })
        })
        .collect();
    let (clock, chance) = (Clock::system(), rules.chance.unwrap_or_else(random));
    let reports = verifier.verify_all(&claims, profile, rules.depth, chance);
    let seconds = clock.elapsed().as_secs_f64() / claims.len().max(1) as f64;
    drop(claims);
    let mut reports = reports.into_iter();
    let judged = (0..).zip(requests.into_iter().zip(answers)).map(|(choice, (request, answer))| {
        let (answer, report) = match answer {
            Err(rejection) => (None, Some(Report::bare(Verdict::Reject(rejection)))),
            Ok(answer) => (Some(answer), reports.next()),
        };
        let report = report.ok_or("a claim was left without a report")?;
        let scheme = asked.map(|a| a.scheme);
        Ok(Judged { choice, profile, scheme, request, answer, report, seconds })
    });
    judged.collect()
}

fn random() -> u64 {
    uuid::Uuid::new_v4().as_u128() as u64
}

/// Reads a body as a server does.
pub(super) async fn understand(verifier: &Verifier, body: &Value) -> Result<Vec<Request>, String> {
    let is_limited = ["max_tokens", "max_completion_tokens"].iter().any(|k| !body[*k].is_null());
    if body["proof"].is_object() && body.get("messages").is_some() && !is_limited {
        let what = "must name `max_tokens`: without it the limit is the context, which is another \
                    on every machine, and proofs are bound to it";
        return Err(format!("`request` {what}"));
    }
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
