//! API fields to engine requests: defaults, bounds, and what is refused by name.

use super::error::{ApiError, echo};
use super::proof::Prover;
use super::registry::Served;
use crate::engine::request::{LogprobMode, Request, StopRules};
use crate::engine::sampler::Sampling;
use crate::proof::seed::noise_key;
use crate::wire::openai::request::{Common, Logprobs};
use serde_json::{Map, Value};

/// Choices of one request, over all prompts.
const CHOICES_MAX: usize = 128;
/// Tokens of a completion where nothing is said.
pub const COMPLETION_TOKENS_DEFAULT: usize = 16;

/// Fields that would change the output and are not built: refused, never ignored.
const NOT_BUILT: [&str; 16] = [
    "response_format",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "prompt_logprobs",
    "logprob_token_ids",
    "bad_words",
    "allowed_token_ids",
    "truncate_prompt_tokens",
    "use_beam_search",
];

/// How responses are written, beyond the tokens themselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// Log-probabilities with this many alternatives.
    pub logprobs: Option<usize>,
    /// Which distribution they describe.
    pub mode: LogprobMode,
    /// Token strings become `token_id:<n>`.
    pub tokens_as_ids: bool,
    /// Integer ids beside the text.
    pub token_ids: bool,
    /// The usage in a last chunk.
    pub include_usage: bool,
    /// The usage so far on every chunk.
    pub continuous_usage: bool,
}

/// What the server's flags say where a request does not.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Defaults {
    /// Token strings become `token_id:<n>`.
    pub tokens_as_ids: bool,
    /// Which distribution log-probabilities describe.
    pub logprob_mode: LogprobMode,
}

/// Refuses fields that would change the output and are not built.
pub fn refuse_unsupported(unknown: &Map<String, Value>) -> Result<(), ApiError> {
    for field in NOT_BUILT {
        let neutral = |value: &Value| match value {
            Value::Null => true,
            Value::Bool(on) => !on,
            Value::Array(list) => list.is_empty(),
            Value::String(word) => field == "tool_choice" && (word == "none" || word == "auto"),
            Value::Object(object) => {
                field == "response_format" && object.get("type") == Some(&"text".into())
            }
            Value::Number(_) => false,
        };
        if unknown.get(field).is_some_and(|value| !neutral(value)) {
            return Err(ApiError::field(field, "is not supported by this server"));
        }
    }
    Ok(())
}

/// A whole number of at least `low`.
pub fn whole(field: &str, value: Option<i64>, low: i64) -> Result<Option<usize>, ApiError> {
    match value {
        None => Ok(None),
        Some(v) if v >= low => Ok(usize::try_from(v).ok()),
        Some(v) => Err(ApiError::field(field, format!("must be at least {low}, got {v}"))),
    }
}

/// How the response is to be written; `top` is the chat endpoint's count of alternatives.
pub fn report(common: &Common, top: Option<i64>, defaults: Defaults) -> Result<Report, ApiError> {
    let top = whole("top_logprobs", top, 0)?;
    let logprobs = match (common.logprobs, top) {
        (None | Some(Logprobs::Flag(false)), Some(1..)) => {
            return Err(ApiError::field("top_logprobs", "needs `logprobs` to be true"));
        }
        (None | Some(Logprobs::Flag(false)), _) => None,
        (Some(Logprobs::Flag(true)), top) => Some(top.unwrap_or(0)),
        (Some(Logprobs::Count(count)), _) => whole("logprobs", Some(count), 0)?,
    };
    let mode = match common.logprobs_mode.as_deref() {
        None => defaults.logprob_mode,
        Some("raw") => LogprobMode::Raw,
        Some("scaled") => LogprobMode::Scaled,
        Some(other) => {
            let what = format!("must be raw or scaled, got {}", echo(other));
            return Err(ApiError::field("logprobs_mode", what));
        }
    };
    let stream = common.stream.unwrap_or(false);
    let options = common.stream_options.unwrap_or_default();
    if common.stream_options.is_some() && !stream {
        return Err(ApiError::field("stream_options", "needs `stream` to be true"));
    }
    Ok(Report {
        logprobs,
        mode,
        tokens_as_ids: common.return_tokens_as_token_ids.unwrap_or(defaults.tokens_as_ids),
        token_ids: common.return_token_ids.unwrap_or(false),
        include_usage: options.include_usage,
        continuous_usage: options.continuous_usage_stats,
    })
}

/// The engine requests of one API request: `n` for each prompt, choices of a prompt side by side.
/// `max_tokens` is the endpoint's own reading of that field; without it the context is the limit.
pub fn requests(
    served: &Served,
    prover: Option<&Prover>,
    common: &Common,
    prompts: Vec<Vec<u32>>,
    max_tokens: Option<usize>,
    report: &Report,
) -> Result<Vec<Request>, ApiError> {
    let engine = &served.engine;
    let n = whole("n", common.n, 1)?.unwrap_or(1);
    let choices = n.saturating_mul(prompts.len());
    if choices > CHOICES_MAX {
        let what =
            format!("times the number of prompts must be at most {CHOICES_MAX}, got {choices}");
        return Err(ApiError::field("n", what));
    }
    let sampling = sampling(common)?;
    let stop = StopRules {
        ids: ids("stop_token_ids", common.stop_token_ids.as_deref().unwrap_or_default())?,
        strings: common.stop.clone(),
        include_in_output: common.include_stop_str_in_output.unwrap_or(false),
        ignore_eos: common.ignore_eos.unwrap_or(false),
    };
    let min_tokens = whole("min_tokens", common.min_tokens, 0)?.unwrap_or(0);
    let context = engine.options().context_max;
    let mut requests = Vec::with_capacity(choices);
    for prompt in prompts {
        if prompt.len() >= context {
            let message = format!(
                "this model's context is {context} tokens, but the prompt has {}",
                prompt.len()
            );
            return Err(ApiError {
                param: Some("prompt".into()),
                ..ApiError::bad_request(message)
            });
        }
        let room = context - prompt.len();
        for _ in 0..n {
            let choice = requests.len() as u32;
            let noise_key = common.seed.map_or_else(random_key, |seed| noise_key(seed, choice));
            let mut request = Request {
                prompt: prompt.clone(),
                sampling: Sampling { noise_key, ..sampling.clone() },
                stop: stop.clone(),
                max_tokens: max_tokens.unwrap_or(room),
                min_tokens,
                top_logprobs: report.logprobs.unwrap_or(0),
                logprob_mode: report.mode,
                prompt_logprobs: None,
                skip_special_tokens: common.skip_special_tokens.unwrap_or(true),
                reads_cache: true,
                cache_salt: 0,
                proof: None,
            };
            if let Some(prover) = prover {
                prover.bind(&mut request, &served.identity, common.seed, choice);
            }
            request.validate(engine.model().decoder.spec.vocab)?;
            requests.push(request);
        }
    }
    Ok(requests)
}

fn sampling(common: &Common) -> Result<Sampling, ApiError> {
    let top_k = match common.top_k {
        None | Some(-1) => 0,
        other => whole("top_k", other, 0)?.unwrap_or(0),
    };
    Ok(Sampling {
        temperature: common.temperature.unwrap_or(1.0),
        top_k,
        top_p: common.top_p.unwrap_or(1.0),
        min_p: common.min_p.unwrap_or(0.0),
        repetition_penalty: common.repetition_penalty.unwrap_or(1.0),
        presence_penalty: common.presence_penalty.unwrap_or(0.0),
        frequency_penalty: common.frequency_penalty.unwrap_or(0.0),
        logit_bias: common.logit_bias.as_ref().map_or_else(|| Ok(Vec::new()), logit_bias)?,
        noise_key: 0,
    })
}

fn logit_bias(map: &Map<String, Value>) -> Result<Vec<(u32, f32)>, ApiError> {
    map.iter()
        .map(|(key, value)| {
            let id = key.parse().map_err(|_| {
                ApiError::field("logit_bias", format!("keys must be token ids, got {}", echo(key)))
            })?;
            let bias = value.as_f64().ok_or_else(|| {
                let what = format!("must hold numbers, got {}", echo(&value.to_string()));
                ApiError::field("logit_bias", what)
            })?;
            Ok((id, bias as f32))
        })
        .collect()
}

/// Token ids of a client; whether the vocabulary has them is checked later.
pub fn ids(field: &str, ids: &[i64]) -> Result<Vec<u32>, ApiError> {
    let id = |id: &i64| {
        u32::try_from(*id)
            .map_err(|_| ApiError::field(field, format!("holds {id}, not a token id")))
    };
    ids.iter().map(id).collect()
}

fn random_key() -> u64 {
    uuid::Uuid::new_v4().as_u128() as u64
}
