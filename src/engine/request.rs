//! Defines what a caller asks of the engine, checked once: past [`Request::validate`] nothing is
//! checked again.

use super::scheduler::Owner;
use crate::models::grammar::Grammar;
use crate::models::pass::LogprobMode;
use crate::models::sampler::Sampling;
use crate::models::text::Text;
use crate::proof::codec::Hash;
use crate::proof::commit::{RequestTerms, RowProver};

/// Stop strings of a request.
pub const STOP_STRINGS_MAX: usize = 16;
/// Bytes of one stop string.
pub const STOP_BYTES_MAX: usize = 1024;
/// Alternatives reported for each token.
pub const TOP_LOGPROBS_MAX: usize = 20;
/// Ids whose log-probabilities can be asked for.
pub const LOGPROB_IDS_MAX: usize = 128;
/// Entries of a logit bias.
pub const LOGIT_BIAS_MAX: usize = 1024;

/// When a generation ends.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StopRules {
    /// Ids that end it, the model's own and the request's.
    pub ids: Vec<u32>,
    /// Strings that end it.
    pub strings: Vec<String>,
    /// Whether the text that matched is part of the output.
    pub include_in_output: bool,
    /// The model's own end tokens do not count.
    pub ignore_eos: bool,
}

/// One sequence to generate from (or only to score).
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// Whom its place counts for.
    pub owner: Owner,
    /// The prompt's tokens, as ids.
    pub prompt: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// The rules that end the output.
    pub stop: StopRules,
    /// Most tokens to generate; 0 only with `prompt_logprobs`.
    pub max_tokens: usize,
    /// No end before this many tokens.
    pub min_tokens: usize,
    /// Alternatives reported with each generated token.
    pub top_logprobs: usize,
    /// Report these ids in place of the most probable ones.
    pub logprob_ids: Vec<u32>,
    /// Which distribution log-probabilities of the output describe; a prompt's are raw.
    pub logprob_mode: LogprobMode,
    /// Report every prompt token's log-probability, with this many alternatives.
    pub prompt_logprobs: Option<usize>,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Whether the prefix cache may be read.
    pub reads_cache: bool,
    /// Separates prefix caches of different owners.
    pub cache_salt: u64,
    /// Prove the output's hidden rows.
    pub proof: Option<ProofOptions>,
    /// What the output must look like.
    pub grammar: Option<Grammar>,
    /// It fills the prefix cache for others, and is not counted among the requests.
    pub is_warmup: bool,
}

/// How an output is proved.
#[derive(Clone, PartialEq, Debug)]
pub struct ProofOptions {
    /// Root of the digest chain.
    pub root: Hash,
    /// Computes what each row contributes.
    pub prover: RowProver,
}

impl Request {
    /// A request with neutral settings: greedy, no stop rules, nothing reported but tokens.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            owner: Owner::default(),
            prompt,
            sampling: Sampling::greedy(),
            stop: StopRules::default(),
            max_tokens,
            min_tokens: 0,
            top_logprobs: 0,
            logprob_ids: Vec::new(),
            logprob_mode: LogprobMode::Raw,
            prompt_logprobs: None,
            skip_special_tokens: true,
            reads_cache: true,
            cache_salt: 0,
            proof: None,
            grammar: None,
            is_warmup: false,
        }
    }

    /// The end tokens of a model that count for this request.
    pub fn end_ids(&self, text: &Text) -> Vec<u32> {
        if self.stop.ignore_eos { Vec::new() } else { text.stop_ids.clone() }
    }

    /// What of the request decides its output, for hashing; `seed` and `choice` are the API's.
    pub fn terms(&self, seed: Option<i64>, choice: u32) -> RequestTerms {
        let s = &self.sampling;
        let mut logit_bias = s.logit_bias.clone();
        logit_bias.sort_by_key(|(id, _)| *id);
        let mut stop_ids = self.stop.ids.clone();
        stop_ids.sort_unstable();
        RequestTerms {
            prompt: self.prompt.clone(),
            floats: [
                s.temperature,
                s.top_p,
                s.min_p,
                s.top_a,
                s.repetition_penalty,
                s.presence_penalty,
                s.frequency_penalty,
            ],
            top_k: s.top_k as u32,
            logit_bias,
            seed,
            choice,
            max_tokens: self.max_tokens as u32,
            min_tokens: self.min_tokens as u32,
            ignore_eos: self.stop.ignore_eos,
            stop_ids,
            stop_strings: self.stop.strings.clone(),
            constraint: self.grammar.as_ref().map(|g| {
                let (kind, text) = g.constraint().tagged();
                (kind, text.to_owned())
            }),
        }
    }

    /// Checks every field against its bounds.
    ///
    /// # Errors
    /// The field, the rule and the fact.
    pub fn validate(&self, vocab: usize) -> Result<(), InvalidRequest> {
        let rule = |field: &'static str, what: String| Err(InvalidRequest { field, what });
        if let Some(id) = self.prompt.iter().find(|id| **id as usize >= vocab) {
            return rule("prompt", format!("holds token id {id}, but the vocabulary has {vocab}"));
        }
        if self.max_tokens == 0 && self.prompt_logprobs.is_none() {
            return rule("max_tokens", "must be at least 1, got 0".into());
        }
        if self.min_tokens > self.max_tokens {
            let (min, max) = (self.min_tokens, self.max_tokens);
            return rule("min_tokens", format!("must be at most max_tokens = {max}, got {min}"));
        }
        for (field, count) in [
            ("logprobs", self.top_logprobs),
            ("prompt_logprobs", self.prompt_logprobs.unwrap_or(0)),
        ] {
            if count > TOP_LOGPROBS_MAX {
                return rule(field, format!("must be at most {TOP_LOGPROBS_MAX}, got {count}"));
            }
        }
        let strings = &self.stop.strings;
        if strings.len() > STOP_STRINGS_MAX {
            let what = format!("must hold at most {STOP_STRINGS_MAX}, got {}", strings.len());
            return rule("stop", what);
        }
        if strings.iter().any(|s| s.is_empty() || s.len() > STOP_BYTES_MAX) {
            return rule("stop", format!("strings must have 1 to {STOP_BYTES_MAX} bytes"));
        }
        if let Some(id) = self.stop.ids.iter().find(|id| **id as usize >= vocab) {
            return rule("stop_token_ids", format!("holds {id}, but the vocabulary has {vocab}"));
        }
        if self.logprob_ids.len() > LOGPROB_IDS_MAX {
            let what =
                format!("must hold at most {LOGPROB_IDS_MAX}, got {}", self.logprob_ids.len());
            return rule("logprob_token_ids", what);
        }
        if let Some(id) = self.logprob_ids.iter().find(|id| **id as usize >= vocab) {
            return rule(
                "logprob_token_ids",
                format!("holds {id}, but the vocabulary has {vocab}"),
            );
        }
        check_sampling(&self.sampling, vocab)
    }
}

fn check_sampling(sampling: &Sampling, vocab: usize) -> Result<(), InvalidRequest> {
    let rules = [
        ("temperature", sampling.temperature, 0.0, 100.0),
        ("top_p", sampling.top_p, f32::MIN_POSITIVE, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("top_a", sampling.top_a, 0.0, 1.0),
        ("repetition_penalty", sampling.repetition_penalty, 0.01, 100.0),
        ("presence_penalty", sampling.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0),
    ];
    for (field, value, low, high) in rules {
        if !(low..=high).contains(&value) {
            let low = if low == f32::MIN_POSITIVE { "above 0".into() } else { low.to_string() };
            let what = format!("must lie between {low} and {high}, got {value}");
            return Err(InvalidRequest { field, what });
        }
    }
    let field = "logit_bias";
    if sampling.logit_bias.len() > LOGIT_BIAS_MAX {
        let what = format!("must hold at most {LOGIT_BIAS_MAX}, got {}", sampling.logit_bias.len());
        return Err(InvalidRequest { field, what });
    }
    for (id, bias) in &sampling.logit_bias {
        if *id as usize >= vocab {
            let what = format!("names token {id}, but the vocabulary has {vocab}");
            return Err(InvalidRequest { field, what });
        }
        if !(-100.0..=100.0).contains(bias) {
            let what = format!("must lie between -100 and 100, got {bias} for token {id}");
            return Err(InvalidRequest { field, what });
        }
    }
    Ok(())
}

/// A field outside its bounds.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{field}` {what}")]
pub struct InvalidRequest {
    /// The field, as the API names it.
    pub field: &'static str,
    /// The rule for the field, and what the request has.
    pub what: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_named() {
        for (sampling, want) in [
            (
                Sampling { temperature: -0.1, ..Sampling::greedy() },
                "`temperature` must lie between 0",
            ),
            (Sampling { temperature: f32::NAN, ..Sampling::greedy() }, "`temperature`"),
            (
                Sampling { top_p: 0.0, ..Sampling::greedy() },
                "`top_p` must lie between above 0 and 1",
            ),
            (
                Sampling { logit_bias: vec![(9, 0.0)], ..Sampling::greedy() },
                "`logit_bias` names token 9",
            ),
        ] {
            let error = check_sampling(&sampling, 5).unwrap_err().to_string();
            assert!(error.starts_with(want), "{error}");
        }
    }
}
