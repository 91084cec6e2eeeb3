//! Translates API fields into engine requests: defaults, bounds, and what is refused by name.

use super::error::{RequestError, echo};
use crate::engine::request::{Request, StopRules, TOP_LOGPROBS_MAX};
use crate::entropy::Entropy;
use crate::models::grammar::Grammar;
use crate::models::pass::LogprobMode;
use crate::models::sampler::Sampling;
use crate::models::text::Text;
use crate::proof::seed::noise_key;
use crate::wire::openai::request::{Common, Logprobs};
use serde_json::{Map, Value};

/// Choices of one request, over all prompts.
const CHOICES_MAX: usize = 128;
/// Tokens of a completion where nothing is said.
pub const COMPLETION_TOKENS_DEFAULT: usize = 16;

/// Fields that would change the output and are not built: refused, never ignored. Null, false and
/// an empty list ask for nothing; so does the number beside a field.
const NOT_BUILT: [(&str, Option<f64>); 41] = [
    ("functions", None),
    ("function_call", None),
    ("guided_json", None),
    ("guided_regex", None),
    ("guided_choice", None),
    ("guided_grammar", None),
    ("structural_tag", None),
    ("regex", None),
    ("ebnf", None),
    ("grammar", None),
    ("json_schema", None),
    ("format", None),
    ("bad_words", None),
    ("allowed_token_ids", None),
    ("use_beam_search", None),
    ("length_penalty", Some(1.0)),
    ("repeat_penalty", Some(1.0)),
    ("typical_p", Some(1.0)),
    ("tfs_z", Some(1.0)),
    ("top_n_sigma", Some(-1.0)),
    ("mirostat", Some(0.0)),
    ("dynatemp_range", Some(0.0)),
    ("dry_multiplier", Some(0.0)),
    ("xtc_probability", Some(0.0)),
    ("n_predict", Some(-1.0)),
    ("samplers", None),
    ("custom_logit_processor", None),
    ("logits_processors", None),
    ("watermark", None),
    ("thinking_token_budget", None),
    ("stop_regex", None),
    ("no_stop_trim", None),
    ("documents", None),
    ("chat_template", None),
    ("audio", None),
    ("web_search_options", None),
    ("prompt_embeds", None),
    ("input_ids", None),
    ("input_embeds", None),
    ("lora_path", None),
    ("return_hidden_states", None),
];
/// Fields that clients send and that change nothing here.
const IGNORED: [&str; 11] = [
    "metadata",
    "store",
    "service_tier",
    "priority",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "modalities",
    "spaces_between_special_tokens",
    "session_id",
];

/// How responses are written, beyond the tokens themselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResponseOptions {
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
    /// Special tokens are left out of the text.
    pub skip_special: bool,
    /// Completions begin with their prompt.
    pub echo: bool,
    /// Log-probabilities of the prompt with this many alternatives.
    pub prompt_logprobs: Option<usize>,
}

impl ResponseOptions {
    /// Alternatives of the prompt's rows, where anything needs them.
    fn prompt_rows(&self) -> Option<usize> {
        let echoed = self.logprobs.filter(|_| self.echo);
        self.prompt_logprobs.max(echoed)
    }
}

/// What the server's flags say where a request does not.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Defaults {
    /// Token strings become `token_id:<n>`.
    pub tokens_as_ids: bool,
    /// Which distribution log-probabilities describe.
    pub logprob_mode: LogprobMode,
}

impl Defaults {
    /// What validators of 4.x expect: ids in place of token texts, scaled log-probabilities.
    pub const TARGON: Self = Self { tokens_as_ids: true, logprob_mode: LogprobMode::Scaled };
}

/// Refuses fields that would change the output and are not built.
pub fn refuse_unsupported(unknown: &Map<String, Value>) -> Result<(), RequestError> {
    for (field, neutral) in NOT_BUILT {
        if unknown.get(field).is_some_and(|value| !asks_nothing(value, neutral)) {
            return Err(not_built(field));
        }
    }
    let is_text = |value: &Value| {
        value.is_null() || value.as_array().is_some_and(|l| l.iter().all(|kind| kind == "text"))
    };
    match unknown.get("modalities") {
        Some(value) if !is_text(value) => {
            Err(RequestError::field("modalities", "must be [\"text\"]: this server makes no other"))
        }
        _ => Ok(()),
    }
}

/// Refuses what only completions have.
pub fn refuse_in_chats(unknown: &Map<String, Value>) -> Result<(), RequestError> {
    match unknown.get("echo") {
        Some(value) if !asks_nothing(value, None) => {
            Err(RequestError::field("echo", "is supported by /v1/completions only"))
        }
        _ => Ok(()),
    }
}

fn not_built(field: &str) -> RequestError {
    RequestError::field(field, "is not supported by this server")
}

fn asks_nothing(value: &Value, neutral: Option<f64>) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Array(list) => list.is_empty(),
        Value::Number(number) => neutral.is_some() && number.as_f64() == neutral,
        Value::String(_) | Value::Object(_) => false,
    }
}

/// Whether a field that no endpoint reads is known to change nothing.
pub fn is_ignored(field: &str) -> bool {
    IGNORED.contains(&field)
}

/// A whole number of at least `low`.
pub fn whole(field: &str, value: Option<i64>, low: i64) -> Result<Option<usize>, RequestError> {
    match value {
        None => Ok(None),
        Some(v) if v >= low => Ok(usize::try_from(v).ok()),
        Some(v) => Err(RequestError::field(field, format!("must be at least {low}, got {v}"))),
    }
}

/// How many alternatives a chat asks for; `None` without log-probabilities. `logprobs` is true or
/// false there, and 1 and 0 mean the same; another number counts alternatives as in completions.
///
/// # Errors
/// What is out of bounds, or said twice.
pub fn chat_logprobs(
    logprobs: Option<Logprobs>,
    top: Option<i64>,
) -> Result<Option<usize>, RequestError> {
    let top = whole("top_logprobs", top, 0)?;
    if let Some(count) = top.filter(|count| *count > TOP_LOGPROBS_MAX) {
        let what = format!("must be at most {TOP_LOGPROBS_MAX}, got {count}");
        return Err(RequestError::field("top_logprobs", what));
    }
    match (logprobs, top) {
        (None | Some(Logprobs::Flag(false) | Logprobs::Count(0)), Some(1..)) => {
            Err(RequestError::field("top_logprobs", "needs `logprobs` to be true"))
        }
        (None | Some(Logprobs::Flag(false) | Logprobs::Count(0)), _) => Ok(None),
        (Some(Logprobs::Flag(true)), top) => Ok(Some(top.unwrap_or(0))),
        (Some(Logprobs::Count(1)), Some(top)) => Ok(Some(top)),
        (Some(Logprobs::Count(count)), Some(_)) => {
            let what = format!("must be true or false beside `top_logprobs`, got {count}");
            Err(RequestError::field("logprobs", what))
        }
        (Some(Logprobs::Count(count)), None) => whole("logprobs", Some(count), 0),
    }
}

/// How many alternatives a completion asks for: there `true` has always meant one.
///
/// # Errors
/// When it is negative.
pub fn completion_logprobs(logprobs: Option<Logprobs>) -> Result<Option<usize>, RequestError> {
    match logprobs {
        None | Some(Logprobs::Flag(false)) => Ok(None),
        Some(Logprobs::Flag(true)) => Ok(Some(1)),
        Some(Logprobs::Count(count)) => whole("logprobs", Some(count), 0),
    }
}

/// How the response is to be written, with `logprobs` alternatives.
///
/// # Errors
/// 400 that names the field.
pub fn report(
    common: &Common,
    logprobs: Option<usize>,
    defaults: Defaults,
) -> Result<ResponseOptions, RequestError> {
    let mode = match common.logprobs_mode.as_deref() {
        None => defaults.logprob_mode,
        Some("raw") => LogprobMode::Raw,
        Some("scaled") => LogprobMode::Scaled,
        Some(other) => {
            let what = format!("must be raw or scaled, got {}", echo(other));
            return Err(RequestError::field("logprobs_mode", what));
        }
    };
    let stream = common.stream.unwrap_or(false);
    let options = common.stream_options.unwrap_or_default();
    if common.stream_options.is_some() && !stream {
        return Err(RequestError::field("stream_options", "needs `stream` to be true"));
    }
    let prompt_logprobs = whole("prompt_logprobs", common.prompt_logprobs, 0)?;
    if prompt_logprobs.is_some() && stream {
        return Err(RequestError::field("prompt_logprobs", "cannot be combined with `stream`"));
    }
    if common.logprob_token_ids.is_some() && logprobs.is_none() {
        return Err(RequestError::field("logprob_token_ids", "needs `logprobs`"));
    }
    Ok(ResponseOptions {
        logprobs,
        mode,
        skip_special: common.skip_special_tokens.unwrap_or(true),
        echo: false,
        prompt_logprobs,
        tokens_as_ids: common.return_tokens_as_token_ids.unwrap_or(defaults.tokens_as_ids),
        token_ids: common.return_token_ids.unwrap_or(false),
        include_usage: options.include_usage,
        continuous_usage: options.continuous_usage_stats,
    })
}

/// What the fields at fault are called where the context does not hold a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FieldNames {
    /// The field with the prompt.
    pub prompt: &'static str,
    /// The field with the most tokens.
    pub limit: &'static str,
}

/// What makes engine requests of an API request.
pub struct Translator<'a> {
    /// What the model makes of texts.
    pub model: &'a Text,
    /// Tokens of prompt and output together, at most.
    pub context_max: usize,
    /// The fields of both endpoints.
    pub common: &'a Common,
    /// The endpoint's own reading of that field; without it the context is the limit.
    pub max_tokens: Option<usize>,
    /// What the output must look like.
    pub grammar: Option<Grammar>,
    /// What fields are called.
    pub names: FieldNames,
    /// How the response is written.
    pub report: &'a ResponseOptions,
    /// Where seeds come from.
    pub entropy: &'a Entropy,
}

impl Translator<'_> {
    /// `n` requests for each prompt, choices of a prompt side by side.
    ///
    /// # Errors
    /// 400 for a field out of bounds or a prompt that the context cannot hold.
    pub fn requests(&self, prompts: Vec<Vec<u32>>) -> Result<Vec<Request>, RequestError> {
        let n = whole("n", self.common.n, 1)?.unwrap_or(1);
        let choices = n.saturating_mul(prompts.len());
        if choices > CHOICES_MAX {
            let what =
                format!("times the number of prompts must be at most {CHOICES_MAX}, got {choices}");
            return Err(RequestError::field("n", what));
        }
        let common = self.template()?;
        let vocab = self.model.vocab;
        let rows = self.report.prompt_rows().or((self.max_tokens == Some(0)).then_some(0));
        // The rows of a prompt are the same for all its choices; in a stream each repeats them.
        let repeats_rows = self.report.echo && self.common.stream == Some(true);
        let mut requests = Vec::with_capacity(choices);
        for prompt in prompts {
            let (prompt, room) = self.fit(prompt)?;
            for i in 0..n {
                let mut request = common.clone();
                let choice = requests.len() as u32;
                let noise = |seed| noise_key(seed, choice);
                request.sampling.noise_key =
                    self.common.seed.map_or_else(|| self.entropy.word(), noise);
                request.prompt.clone_from(&prompt);
                request.max_tokens = self.max_tokens.unwrap_or(room);
                let is_empty = request.max_tokens == 0;
                request.prompt_logprobs = rows.filter(|_| i == 0 || repeats_rows || is_empty);
                request.validate(vocab)?;
                requests.push(request);
            }
        }
        Ok(requests)
    }

    /// What all choices share.
    fn template(&self) -> Result<Request, RequestError> {
        let common = self.common;
        let list = |field, list: &Option<Vec<i64>>| ids(field, list.as_deref().unwrap_or_default());
        Ok(Request {
            sampling: sampling(common)?,
            stop: StopRules {
                ids: list("stop_token_ids", &common.stop_token_ids)?,
                strings: common.stop.clone(),
                include_in_output: common.include_stop_str_in_output.unwrap_or(false),
                ignore_eos: common.ignore_eos.unwrap_or(false),
            },
            min_tokens: whole("min_tokens", common.min_tokens, 0)?.unwrap_or(0),
            top_logprobs: self.report.logprobs.unwrap_or(0),
            logprob_ids: list("logprob_token_ids", &common.logprob_token_ids)?,
            logprob_mode: self.report.mode,
            skip_special_tokens: self.report.skip_special,
            cache_salt: cache_salt(common.cache_salt.as_deref())?,
            grammar: self.grammar.clone(),
            ..Request::greedy(Vec::new(), 0)
        })
    }

    /// A prompt cut as `truncate_prompt_tokens` says, and the tokens that may follow it.
    fn fit(&self, mut prompt: Vec<u32>) -> Result<(Vec<u32>, usize), RequestError> {
        let context = self.context_max;
        let kept = match self.common.truncate_prompt_tokens {
            // What the context holds beside the answer.
            Some(-1) => Some(context.saturating_sub(self.max_tokens.unwrap_or(1).max(1)).max(1)),
            other => whole("truncate_prompt_tokens", other, 1)?,
        };
        if let Some(kept) = kept {
            prompt.drain(..prompt.len().saturating_sub(kept));
        }
        let scores_only = self.max_tokens == Some(0);
        let most = if scores_only { context } else { context.saturating_sub(1) };
        let length = prompt.len();
        if length > most {
            let what = match length > context {
                true => format!("the prompt has {length} tokens"),
                false => format!("the prompt has {length} tokens and leaves no room for an answer"),
            };
            return Err(RequestError::context(self.names.prompt, context, what));
        }
        // The last token of an answer is never computed on.
        let asked = self.max_tokens.unwrap_or(0);
        if length + asked.saturating_sub(1) > context {
            let field = self.names.limit;
            let what = format!(
                "you requested {} tokens ({length} in the prompt, {asked} by `{field}`)",
                length + asked
            );
            return Err(RequestError::context(field, context, what));
        }
        Ok((prompt, context - length))
    }
}

/// Prefixes are shared among requests with the same salt only.
fn cache_salt(salt: Option<&str>) -> Result<u64, RequestError> {
    match salt {
        None => Ok(0),
        Some("") => Err(RequestError::field("cache_salt", "must not be empty")),
        Some(salt) => Ok(short(&blake3::hash(salt.as_bytes()))),
    }
}

/// The salt of one caller's requests: others, whatever salt they give, share nothing with it.
pub fn salt_of(owner: &[u8; 32], salt: u64) -> u64 {
    short(&blake3::keyed_hash(owner, &salt.to_le_bytes()))
}

fn short(hash: &blake3::Hash) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]))
}

fn sampling(common: &Common) -> Result<Sampling, RequestError> {
    let top_k = match common.top_k {
        None | Some(-1) => 0,
        other => whole("top_k", other, 0)?.unwrap_or(0),
    };
    Ok(Sampling {
        temperature: common.temperature.unwrap_or(1.0),
        top_k,
        top_p: common.top_p.unwrap_or(1.0),
        min_p: common.min_p.unwrap_or(0.0),
        top_a: common.top_a.unwrap_or(0.0),
        repetition_penalty: common.repetition_penalty.unwrap_or(1.0),
        presence_penalty: common.presence_penalty.unwrap_or(0.0),
        frequency_penalty: common.frequency_penalty.unwrap_or(0.0),
        logit_bias: common.logit_bias.as_ref().map_or_else(|| Ok(Vec::new()), logit_bias)?,
        noise_key: 0,
    })
}

fn logit_bias(map: &Map<String, Value>) -> Result<Vec<(u32, f32)>, RequestError> {
    map.iter()
        .map(|(key, value)| {
            let id = key.parse().map_err(|_| {
                RequestError::field(
                    "logit_bias",
                    format!("keys must be token ids, got {}", echo(key)),
                )
            })?;
            let bias = value.as_f64().ok_or_else(|| {
                let what = format!("must hold numbers, got {}", echo(&value.to_string()));
                RequestError::field("logit_bias", what)
            })?;
            Ok((id, bias as f32))
        })
        .collect()
}

/// Token ids of a client; whether the vocabulary has them is checked later.
pub fn ids(field: &str, ids: &[i64]) -> Result<Vec<u32>, RequestError> {
    let id = |id: &i64| {
        u32::try_from(*id)
            .map_err(|_| RequestError::field(field, format!("holds {id}, not a token id")))
    };
    ids.iter().map(id).collect()
}
