//! Runs `audit`: asks a server for answers with log-probabilities, and says how far they are from
//! the weights that are here.

use super::Failure;
use super::out::{note, outln};
use super::printable::printable;
use super::shared::{ComputeArgs, ModelsArg, plain_verifier, runtime};
use crate::audit::answer::{ServerAnswer, TokensByName, read};
use crate::audit::evidence::{AuditEvidence, Conclusion, Drawn};
use crate::audit::score::{TokenScore, score};
use crate::audit::seeds::{OtherSeed, SeedTest};
use crate::bench::prompts;
use crate::clock::Clock;
use crate::endpoint::shown;
use crate::entropy::Entropy;
use crate::proof::codec::to_hex;
use crate::validator::query::{DEPTH_MAX, QueryError, Size, Target, is_deeper};
use crate::verify::{Verifier, question};
use clap::Args;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::Duration;

/// Alternatives that are asked for: what every server gives.
const TOP: u32 = 5;
/// Every fourth answer is greedy.
const GREEDY_EVERY: u32 = 4;
/// Answers before the test may end.
const ANSWERS_MIN: u32 = 6;
/// Answers by which it is tried whether seeds are honoured.
const SEED_TRIES: u32 = 3;
/// Exit codes, as those of `verify`.
const NOT_THESE: u8 = 3;
const CANNOT_TELL: u8 = 4;

/// Arguments of `audit`.
#[derive(Args)]
#[command(after_help = "Examples:
  targon-engine audit --url https://llm.example --model M --models models.toml
  targon-engine audit --url http://127.0.0.1:8000 --model M --local mine --json

Exit code 0: the answers agree with these weights; 3: they were computed with
others; 4: too little was said to tell.")]
pub(super) struct AuditArgs {
    /// The server, without /v1.
    #[arg(long)]
    url: String,
    /// The model's name there.
    #[arg(long)]
    model: String,
    /// The model's name in the models file, if it is another one.
    #[arg(long)]
    local: Option<String>,
    /// A key of the server's API.
    #[arg(long, env = "TARGON_AUDIT_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Use the chat endpoint. The default is completions, which use no chat template.
    #[arg(long)]
    chat: bool,
    /// The most answers to ask for; the test ends earlier when it is certain.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=1000))]
    answers: u32,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 48, value_parser = clap::value_parser!(u32).range(8..=128))]
    tokens: u32,
    /// The time limit of one answer, in seconds.
    #[arg(long, default_value_t = 120)]
    timeout: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    compute: ComputeArgs,
}

pub(super) fn run(args: &AuditArgs) -> Result<ExitCode, Failure> {
    let name = args.local.as_ref().unwrap_or(&args.model);
    let models = args.models.read(&[])?.models;
    let config = models.into_iter().find(|m| m.name == *name).ok_or_else(|| {
        let what = format!("{} has no model `{name}`", args.models.path.display());
        Failure::user(printable(&what)).with_hint(Some("name one of its models by --local"))
    })?;
    let (runtime, pool) = (runtime()?, args.compute.pool()?);
    let target = args.target()?;
    let verifier = plain_verifier(&runtime, config, &pool)?;
    let mut audit = Audit { args, target, verifier: &verifier, has_extras: true };
    let (evidence, seeds) = runtime.block_on(audit.all())?;
    let (verdict, why) = evidence.verdict();
    let root = to_hex(&verifier.identity.weights_root);
    match args.json {
        true => outln!("{}", as_json(&evidence, seeds, (verdict, &why), &root)),
        false => print(args, &evidence, seeds, (verdict, &why), &root),
    }
    Ok(match verdict {
        Conclusion::Agrees => ExitCode::SUCCESS,
        Conclusion::CannotTell => ExitCode::from(CANNOT_TELL),
        Conclusion::NotTheseWeights => ExitCode::from(NOT_THESE),
    })
}

/// Whether a server honours seeds: `None` where it was not seen.
type Seeds = Option<bool>;

impl AuditArgs {
    fn target(&self) -> Result<Target, Failure> {
        let url = self.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        if !["http://", "https://"].iter().any(|scheme| url.starts_with(scheme)) {
            let what =
                format!("--url must begin with http:// or https://, got {}", shown(&self.url));
            return Err(Failure::user(printable(&what)));
        }
        let timeout = Duration::from_secs(self.timeout);
        Ok(Target {
            url,
            hotkey: None,
            signer: None,
            api_key: self.api_key.clone(),
            read_timeout: timeout,
            timeout,
            size: Size::LARGE,
        })
    }

    /// What every server understands.
    fn body(&self, prompt: &str, drawn: Drawn, seed: u32) -> Value {
        let temperature = if drawn == Drawn::Greedy { 0 } else { 1 };
        let mut body = json!({
            "model": self.model, "max_tokens": self.tokens, "temperature": temperature,
            "top_p": 1, "seed": seed, "stream": false,
        });
        match self.chat {
            true => {
                body["messages"] = json!([{"role": "user", "content": prompt}]);
                body["logprobs"] = true.into();
                body["top_logprobs"] = TOP.into();
            }
            false => {
                body["prompt"] = prompt.into();
                body["logprobs"] = TOP.into();
            }
        }
        body
    }

    fn path(&self) -> &'static str {
        if self.chat { "/v1/chat/completions" } else { "/v1/completions" }
    }
}

struct Audit<'a> {
    args: &'a AuditArgs,
    target: Target,
    verifier: &'a Verifier,
    /// The server takes fields that not all have.
    has_extras: bool,
}

impl Audit<'_> {
    async fn all(&mut self) -> Result<(AuditEvidence, Seeds), Failure> {
        let text = &self.verifier.model.text;
        let names = TokensByName::new(&text.tokenizer, text.vocab);
        let (prompts, entropy) = (prompts::all(), Entropy::system());
        let mut evidence = AuditEvidence::default();
        let mut seeds = None;
        for index in 0..self.args.answers {
            let drawn = if index % GREEDY_EVERY == 3 { Drawn::Greedy } else { Drawn::Sampled };
            // Chosen by chance: a server cannot know what it will be asked.
            let prompt = &prompts[entropy.word() as usize % prompts.len()];
            let body = self.args.body(prompt, drawn, entropy.word() as u32 >> 1);
            let answer = self.ask(&body, &names).await?;
            let understood = question::understand(self.verifier, &body).await;
            let requests = understood.map_err(Failure::user)?.requests;
            let request = requests.first().ok_or_else(|| Failure::ours("no request"))?;
            let rows = score(self.verifier, request, &answer).map_err(Failure::ours)?;
            if let Some(id) = answer.ids.first().filter(|_| rows.is_empty()) {
                return Err(Failure::ours(format!("token {id} has no row")));
            }
            evidence.add(&answer, drawn, &rows, request.prompt.len());
            if seeds.is_none() && index < SEED_TRIES {
                seeds = self.honours_seed(&body, (&answer, &rows), &names).await?;
            }
            let (eight_bits, other) = (evidence.nats_eight_bits, evidence.nats_other);
            note!("answer {}: {eight_bits:+.1} and {other:+.1} nats so far", index + 1);
            if index + 1 >= ANSWERS_MIN && evidence.verdict().0 != Conclusion::CannotTell {
                break;
            }
        }
        Ok((evidence, seeds))
    }

    /// Asks for an answer again, with its own seed and with another one.
    async fn honours_seed(
        &mut self,
        body: &Value,
        (answer, rows): (&ServerAnswer, &[TokenScore]),
        names: &TokensByName<'_>,
    ) -> Result<Seeds, Failure> {
        let Some(test) = SeedTest::new(answer, rows) else { return Ok(None) };
        if !test.is_repeated(&self.ask(body, names).await?) {
            return Ok(Some(false));
        }
        let mut other = body.clone();
        other["seed"] = (body["seed"].as_u64().unwrap_or(0) ^ 1).into();
        match test.conclude(&self.ask(&other, names).await?) {
            OtherSeed::Differs => Ok(Some(true)),
            OtherSeed::Same => Ok(None),
        }
    }

    /// One answer; a server that refuses token ids is asked without them from then on.
    async fn ask(
        &mut self,
        body: &Value,
        names: &TokensByName<'_>,
    ) -> Result<ServerAnswer, Failure> {
        if self.has_extras {
            let mut more = body.clone();
            more["return_token_ids"] = true.into();
            match self.call(&more).await {
                Err(QueryError::Status { status, .. }) if matches!(status.as_u16(), 400 | 422) => {
                    self.has_extras = false;
                }
                answered => return self.read(answered, names),
            }
        }
        let answered = self.call(body).await;
        self.read(answered, names)
    }

    async fn call(&self, body: &Value) -> Result<Vec<u8>, QueryError> {
        let bytes = body.to_string().into_bytes();
        self.target.call(self.args.path(), Some(bytes), &Clock::system()).await
    }

    fn read(
        &self,
        answered: Result<Vec<u8>, QueryError>,
        names: &TokensByName<'_>,
    ) -> Result<ServerAnswer, Failure> {
        let refuse = |what: String| Failure::user(printable(&what));
        let bytes = answered.map_err(|e| refuse(e.to_string()))?;
        let url = shown(&self.target.url);
        let body: Value = serde_json::from_slice(&bytes)
            .map_err(|e| refuse(format!("{url}: the answer is not JSON: {e}")))?;
        if is_deeper(&body, DEPTH_MAX) {
            return Err(refuse(format!("{url}: the answer nests more than {DEPTH_MAX} deep")));
        }
        read(&body, names).map_err(|what| refuse(format!("{url}: {what}")))
    }
}

fn as_json(
    evidence: &AuditEvidence,
    seeds: Seeds,
    (verdict, why): (Conclusion, &str),
    root: &str,
) -> Value {
    json!({
        "verdict": verdict, "why": why, "weights_root": root, "evidence": evidence,
        "logit_noise": evidence.noise(), "mean_logprob_error": evidence.mean_error(),
        "surprise_sd": evidence.surprise(), "seed_honoured": seeds,
    })
}

fn print(
    args: &AuditArgs,
    e: &AuditEvidence,
    seeds: Seeds,
    (verdict, why): (Conclusion, &str),
    root: &str,
) {
    let percent = |part: usize, of: usize| 100.0 * part as f64 / of.max(1) as f64;
    outln!("{} at {}", printable(&args.model), printable(&shown(&args.url)));
    outln!("  weights here   {root}");
    let [ids, names, text] = e.sources;
    outln!("  answers        {} with {} tokens", e.answers, e.tokens);
    outln!("  tokens known   by ids {ids}, by their bytes {names}, guessed from text {text}");
    let (first, five) = (percent(e.first, e.tokens), percent(e.among_five, e.tokens));
    outln!("  ranks          {first:.1} % first, {five:.1} % among five");
    match (e.noise(), e.mean_error()) {
        (Some(noise), Some(error)) => {
            outln!("  log-probs      off by {error:.4} nats; logits differ by about {noise:.3}");
        }
        _ => outln!("  log-probs      none could be compared"),
    }
    let [greedy, flipped] = e.greedy;
    outln!("  greedy         {flipped} of {greedy} tokens are not our most probable ones");
    if let Some(far) = e.surprise() {
        outln!("  sampled        tokens surprise by {far:+.1} standard deviations");
    }
    let [drawn, of] = e.drawn;
    match seeds {
        None => outln!("  seed           cannot be told"),
        Some(false) => outln!("  seed           not honoured"),
        Some(true) => {
            let share = percent(drawn, of);
            outln!("  seed           honoured; this engine draws {share:.1} % of the same tokens");
        }
    }
    outln!("{}: {why}", verdict.words());
}
