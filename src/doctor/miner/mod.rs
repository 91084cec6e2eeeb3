//! Examines a miner as validators see it: the miner is asked for its models and for two streamed
//! answers with the fields, times and drawn parameters of Targon 4.4, and each rule's conclusion is
//! reported.
//!
//! [`list`] asks for names, [`ask()`] for answers. With a [`Verifier`] of the model the rules are
//! applied that need weights; without one they are named as not reached.

pub mod reading;
pub mod rules;
pub mod weights;

use super::{Finding, Level};
use crate::chance::Chance;
use crate::clock::Clock;
use crate::endpoint::shown;
use crate::validator::models;
use crate::validator::prompt::dataset::Passages;
use crate::validator::prompt::{self, Draft};
use crate::validator::query::{QueryError, Streamed, Target};
use crate::validator::round::ask::{self, Endpoint, QueryContent, QueryPrompt, QuerySampling};
use crate::verify::{Verifier, question};
use reading::StreamReading;
use rules::ReceivedAnswer;
use serde_json::Value;

/// Names of models that a finding repeats.
const NAMES_MAX: usize = 8;
/// Tokens of the shortest answer that can be asked for.
const TOKENS_MIN: u32 = 8;

/// Asks for the [`names`] of the models that are served. Gives the model to ask for: `wanted`, or
/// the first.
pub async fn list(
    target: &Target,
    wanted: Option<&str>,
    clock: &Clock,
) -> (Option<String>, Vec<Finding>) {
    let topic = "models list";
    let names = match names(target, clock).await {
        Ok(names) => names,
        Err(e) => return (None, vec![unlisted(target, &e)]),
    };
    let shown = names.iter().take(NAMES_MAX).cloned().collect::<Vec<_>>().join(", ");
    let fact = format!("{} models: {shown}", names.len());
    match wanted.map(str::to_owned).or_else(|| names.first().cloned()) {
        None => {
            let fact = "the miner lists no model, so no validator asks it";
            let hint = "see /ready of its open port, which says whether it has loaded one";
            (None, vec![Finding::new(topic, Level::Fault, fact).hint(hint)])
        }
        Some(model) if !names.contains(&model) => {
            let fact = format!("{model} is not among its {fact}; each round of it is a miss");
            let hint = "add it to the miner's models file, or name another by --model";
            (None, vec![Finding::new(topic, Level::Fault, fact).hint(hint)])
        }
        Some(model) => (Some(model), vec![Finding::new(topic, Level::Ok, fact)]),
    }
}

/// What is wrong with an answer that lists no models.
fn unlisted(target: &Target, e: &QueryError) -> Finding {
    let topic = "models list";
    let QueryError::Stream { url, what } = e else {
        return Finding::new(topic, Level::Fault, e.to_string()).hint(rules::hint(e));
    };
    let fact = format!("{url}: the list of models is malformed: {what}");
    let hint = match target.signer {
        Some(_) => r#"answer /models with a JSON list of names, such as ["MODEL"]"#,
        None => r#"answer /v1/models with JSON such as {"data": [{"id": "MODEL"}]}"#,
    };
    Finding::new(topic, Level::Fault, fact).hint(hint)
}

/// The models that are served: asked for at a signed listener as validators do, otherwise by the
/// open API.
///
/// # Errors
/// When there is no answer, or another than a list.
pub async fn names(target: &Target, clock: &Clock) -> Result<Vec<String>, QueryError> {
    match target.signer {
        Some(_) => models::served(target, clock).await,
        None => open_list(target, clock).await,
    }
}

/// The list of an OpenAI server.
async fn open_list(target: &Target, clock: &Clock) -> Result<Vec<String>, QueryError> {
    let bytes = target.call("/v1/models", None, clock).await?;
    let malformed = |what: String| QueryError::Stream { url: shown(&target.url), what };
    let body: Value = serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
    let data = body["data"].as_array().ok_or_else(|| malformed("it lists no models".into()))?;
    let names = data.iter().filter_map(|model| model["id"].as_str().map(str::to_owned));
    Ok(names.collect())
}

/// What a miner is asked, and who checks its answers.
#[derive(Clone, Copy)]
pub struct Asking<'a> {
    /// The name of the model to ask for.
    pub model: &'a str,
    /// The most tokens of each answer.
    pub max_tokens: u32,
    /// The temperature; `None` draws one.
    pub temperature: Option<f64>,
    /// Who checks with the model's weights, where they are here.
    pub verifier: Option<&'a Verifier>,
}

/// Asks for a conversation and for a completion, and says what each rule concludes.
pub async fn ask(
    target: &Target,
    asking: Asking<'_>,
    chance: &mut Chance,
    clock: &Clock,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for endpoint in [Endpoint::Chat, Endpoint::Completion] {
        let has_chat = asking.verifier.is_none_or(|v| v.model.text.chat.is_some());
        if endpoint == Endpoint::Chat && !has_chat {
            let fact = "the model has no chat template: validators ask for completions only";
            findings.push(Finding::new("chat", Level::Note, fact));
            continue;
        }
        findings.extend(ask_one(target, asking, endpoint, chance, clock).await);
    }
    if asking.verifier.is_none() {
        let fact = format!(
            "the weights of {} are not here: rules that need them say nothing",
            asking.model
        );
        findings.push(
            Finding::new("weights", Level::Note, fact)
                .hint("name a models file with an entry of that name by --models"),
        );
    }
    findings
}

async fn ask_one(
    target: &Target,
    asking: Asking<'_>,
    endpoint: Endpoint,
    chance: &mut Chance,
    clock: &Clock,
) -> Vec<Finding> {
    let topic = match endpoint {
        Endpoint::Chat => "chat",
        Endpoint::Completion => "completion",
    };
    let made = body(asking, endpoint, chance, clock).await;
    let (body, sampling) = match made {
        Ok(made) => made,
        Err(what) => {
            let hint = "ask for fewer tokens by --max-tokens";
            return vec![Finding::new(topic, Level::Warning, what.to_string()).hint(hint)];
        }
    };
    let QuerySampling { seed, temperature, max_tokens } = sampling;
    let fact = format!(
        "asked for at most {max_tokens} tokens at temperature {temperature:.3} with seed {seed}"
    );
    let mut findings = vec![Finding::new(topic, Level::Ok, fact)];
    let streamed = target.stream(endpoint.path(), &body, clock, |_| {}).await;
    let reading = StreamReading::of(&streamed.arrivals);
    let answered = ReceivedAnswer { topic, streamed: &streamed, reading: &reading, sampling };
    findings.extend(answered.findings());
    if let (Some(verifier), true) = (asking.verifier, is_whole(&streamed)) {
        let place = chance.bits();
        findings.extend(weights::check(verifier, topic, &body, &streamed, place).await);
    }
    findings
}

/// Whether there is an answer that weights can say something of.
fn is_whole(streamed: &Streamed) -> bool {
    streamed.outcome.is_ok() && !streamed.arrivals.is_empty()
}

/// The original's fields over a prompt of our own, which nobody can have seen.
async fn body(
    asking: Asking<'_>,
    endpoint: Endpoint,
    chance: &mut Chance,
    clock: &Clock,
) -> anyhow::Result<(Value, QuerySampling)> {
    let Asking { model, max_tokens, temperature, verifier } = asking;
    let drawn = QuerySampling::draw(chance, &(max_tokens..=max_tokens));
    let temperature = temperature.unwrap_or(drawn.temperature);
    let sampling = QuerySampling { temperature, ..drawn };
    let date = prompt::date(clock.unix_ms())?;
    let draft = Draft::draw(&Passages::Ours, &date, chance);
    let drawn = draft.finish(None);
    let content = match endpoint {
        Endpoint::Chat => QueryContent::Messages(drawn.messages()),
        Endpoint::Completion => QueryContent::Text(drawn.text()),
    };
    let prompt = |tokens| QueryPrompt { content: content.clone(), tokens };
    // How long the prompt is in tokens only the miner can say where the model is not here.
    let Some(verifier) = verifier else {
        return ask::body(model, endpoint, sampling, prompt(0), usize::MAX);
    };
    let shortest = QuerySampling { max_tokens: TOKENS_MIN, ..sampling };
    let (plain, _) = ask::body(model, endpoint, shortest, prompt(0), usize::MAX)?;
    let understood = question::understand(verifier, &plain, Clock::system().unix_ms()).await?;
    let tokens = understood.requests.first().map_or(0, |request| request.prompt.len());
    ask::body(model, endpoint, sampling, prompt(tokens), verifier.context_max)
}
