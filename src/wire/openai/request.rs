//! Defines the request bodies of `/v1/chat/completions` and `/v1/completions`.

pub use super::loose::Logprobs;
use super::loose::{
    PromptItem, flag, integer, integers, invalid, items, logprobs, numbers, string_or_list,
};
use super::tools::{Tool, ToolChoice, ToolChoiceForm};
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use utoipa::ToSchema;

/// Body of `/v1/chat/completions`.
#[derive(Clone, Deserialize, Debug, ToSchema)]
pub struct ChatRequest {
    /// The messages of the conversation, the oldest first.
    pub messages: Vec<Message>,
    /// Newer name of `max_tokens`.
    #[serde(default, deserialize_with = "integer")]
    pub max_completion_tokens: Option<i64>,
    /// Alternatives reported for each token.
    #[serde(default, deserialize_with = "integer")]
    pub top_logprobs: Option<i64>,
    /// Whether the prompt ends with the assistant's opening; true unless said otherwise.
    pub add_generation_prompt: Option<bool>,
    /// Whether the prompt ends inside the last message, which the answer then continues.
    pub continue_final_message: Option<bool>,
    /// More inputs of the template.
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// An input of templates that know it.
    pub reasoning_effort: Option<String>,
    /// Tools that the model may call.
    pub tools: Option<Vec<Tool>>,
    /// Whether and which tools are called; `auto` unless said otherwise.
    #[schema(value_type = Option<ToolChoiceForm>)]
    pub tool_choice: Option<ToolChoice>,
    /// Whether more than one call may be made; true unless said otherwise.
    pub parallel_tool_calls: Option<bool>,
    /// Fields of both endpoints.
    #[serde(flatten)]
    pub common: Common,
}

/// Body of `/v1/completions`.
#[derive(Clone, Deserialize, Debug, ToSchema)]
pub struct CompletionRequest {
    /// The text or ids to continue.
    #[schema(value_type = PromptForm)]
    pub prompt: Prompt,
    /// Prompts are returned before their continuation.
    pub echo: Option<bool>,
    /// Accepted when equal to `n`.
    #[serde(default, deserialize_with = "integer")]
    pub best_of: Option<i64>,
    /// Text after the insertion: not supported.
    pub suffix: Option<String>,
    /// Fields of both endpoints.
    #[serde(flatten)]
    pub common: Common,
}

/// Fields of both endpoints. Numbers keep their sign, so that a negative one is refused by name.
#[derive(Clone, Deserialize, Default, Debug, ToSchema)]
pub struct Common {
    /// Name of the model that must answer.
    pub model: Option<String>,
    /// Most tokens to generate.
    #[serde(default, deserialize_with = "integer")]
    pub max_tokens: Option<i64>,
    /// No end before this many.
    #[serde(default, deserialize_with = "integer")]
    pub min_tokens: Option<i64>,
    /// What logits are divided by before the draw; 0 is greedy.
    pub temperature: Option<f32>,
    /// Keeps the smallest set with this much probability.
    pub top_p: Option<f32>,
    /// Keeps the k most probable; -1 and 0 keep all.
    #[serde(default, deserialize_with = "integer")]
    pub top_k: Option<i64>,
    /// Drops tokens below this share of the most probable one.
    pub min_p: Option<f32>,
    /// Drops tokens below this times the square of the largest probability.
    pub top_a: Option<f32>,
    /// Penalty on tokens seen anywhere.
    pub repetition_penalty: Option<f32>,
    /// Penalty on tokens generated before.
    pub presence_penalty: Option<f32>,
    /// Penalty on how often a token was generated.
    pub frequency_penalty: Option<f32>,
    /// Added to single logits, by token id.
    pub logit_bias: Option<Map<String, Value>>,
    /// Seed of the noise.
    #[serde(default, deserialize_with = "integer")]
    pub seed: Option<i64>,
    /// Choices for each prompt.
    #[serde(default, deserialize_with = "integer")]
    pub n: Option<i64>,
    /// Texts that end the output where they appear; they are not part of it.
    #[serde(default, deserialize_with = "string_or_list")]
    #[schema(value_type = Option<StringOrList>)]
    pub stop: Vec<String>,
    /// Ids that end the output.
    #[serde(default, deserialize_with = "integers")]
    pub stop_token_ids: Option<Vec<i64>>,
    /// Whether the match stays in the text.
    pub include_stop_str_in_output: Option<bool>,
    /// The model's own end does not count.
    pub ignore_eos: Option<bool>,
    /// Whether the tokenizer adds its beginning token; true for completions and false for chats,
    /// whose template writes it, unless said otherwise.
    pub add_special_tokens: Option<bool>,
    /// Leave special tokens out of the text; true unless said otherwise.
    pub skip_special_tokens: Option<bool>,
    /// A boolean (chat) or a number (completions); each endpoint takes both.
    #[serde(default, deserialize_with = "logprobs")]
    #[schema(value_type = Option<FlagOrCount>)]
    pub logprobs: Option<Logprobs>,
    /// `raw` or `scaled`: of the output. A prompt's log-probabilities are always raw.
    pub logprobs_mode: Option<String>,
    /// Report every prompt token's log-probability, with this many alternatives.
    #[serde(default, deserialize_with = "integer")]
    pub prompt_logprobs: Option<i64>,
    /// Report these ids in place of the most probable ones.
    #[serde(default, deserialize_with = "integers")]
    pub logprob_token_ids: Option<Vec<i64>>,
    /// What the output must look like.
    pub response_format: Option<ResponseFormat>,
    /// What the output must look like, in vLLM's form.
    pub structured_outputs: Option<StructuredOutputs>,
    /// Keeps only the last so many tokens of the prompt; -1 keeps what the context holds.
    #[serde(default, deserialize_with = "integer")]
    pub truncate_prompt_tokens: Option<i64>,
    /// Prefixes are shared only among requests with the same salt.
    pub cache_salt: Option<String>,
    /// The request's name in the response's `id`.
    pub request_id: Option<String>,
    /// Send chunks as they come.
    pub stream: Option<bool>,
    /// What a stream sends beside its tokens.
    pub stream_options: Option<StreamOptions>,
    /// Token strings become `token_id:<n>`.
    pub return_tokens_as_token_ids: Option<bool>,
    /// Add integer ids to choices.
    pub return_token_ids: Option<bool>,
    /// Prove the output's hidden rows.
    pub proof: Option<ProofRequest>,
    /// Who asks; not used.
    pub user: Option<Value>,
    /// Fields that are not known, by name.
    #[serde(flatten)]
    #[schema(ignore)]
    pub unknown: Map<String, Value>,
}

/// The `response_format` field.
#[derive(Clone, PartialEq, Deserialize, Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Anything.
    Text,
    /// Some JSON object, of whatever form.
    JsonObject {
        /// What the object must look like, in llama.cpp's form.
        schema: Option<Map<String, Value>>,
    },
    /// A JSON value that a schema accepts.
    JsonSchema {
        /// The schema and its name.
        json_schema: JsonSchema,
    },
}

/// A named JSON schema.
#[derive(Clone, PartialEq, Deserialize, Debug, ToSchema)]
pub struct JsonSchema {
    /// What the client calls it; not used.
    pub name: Option<String>,
    /// The JSON schema that the output follows.
    pub schema: Map<String, Value>,
}

/// The `structured_outputs` field: exactly one of its keys.
#[derive(Clone, PartialEq, Deserialize, Default, Debug, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StructuredOutputs {
    /// A JSON schema, or its text.
    pub json: Option<Value>,
    /// Any JSON object.
    pub json_object: Option<bool>,
    /// A regular expression for the whole output.
    pub regex: Option<String>,
    /// One of these texts.
    pub choice: Option<Vec<String>>,
    /// A Lark grammar.
    pub grammar: Option<String>,
}

/// The `proof` field.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, Debug, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProofRequest {
    /// Name of the scheme.
    pub scheme: String,
    /// 32 bytes in hexadecimal, chosen by the verifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
}

/// What a stream sends beside its tokens.
#[derive(Clone, Copy, Deserialize, Default, Debug, ToSchema)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    #[serde(default, deserialize_with = "flag")]
    pub include_usage: bool,
    /// The usage so far on every chunk.
    #[serde(default, deserialize_with = "flag")]
    pub continuous_usage_stats: bool,
}

/// One message of a conversation.
#[derive(Clone, Deserialize, Serialize, Debug, ToSchema)]
pub struct Message {
    /// `system`, `user`, `assistant`, ...
    pub role: String,
    /// The text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// Everything else the template may read.
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: Map<String, Value>,
}

/// The content of a message.
#[derive(Clone, Serialize, Debug, ToSchema)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Parts, of which only text is supported.
    Parts(Vec<Value>),
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(parts) => Ok(Self::Parts(parts)),
            other => Err(invalid(&other, &"a string or a list of parts")),
        }
    }
}

/// The prompt of a completion.
#[derive(Clone, PartialEq, Debug)]
pub enum Prompt {
    /// One or more texts.
    Texts(Vec<String>),
    /// One or more lists of token ids.
    Ids(Vec<Vec<i64>>),
}

/// The forms of a prompt, for the description of the API.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes what `Prompt` reads")]
enum PromptForm {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<i64>),
    Lists(Vec<Vec<i64>>),
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of strings, a list of token ids, or a list of such lists")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Texts(vec![text.to_owned()]))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Prompt, E> {
        Ok(Prompt::Texts(vec![text]))
    }

    /// The first item says what the others must be.
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompt, A::Error> {
        Ok(match list.next_element()? {
            None => Prompt::Texts(Vec::new()),
            Some(PromptItem::Text(first)) => Prompt::Texts(items(first, list)?),
            Some(PromptItem::Id(first)) => Prompt::Ids(vec![numbers(items(first, list)?)]),
            Some(PromptItem::Ids(first)) => {
                Prompt::Ids(items(first, list)?.into_iter().map(numbers).collect())
            }
        })
    }
}

/// The forms of a list of stop strings, for the description of the API.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes what `stop` reads")]
enum StringOrList {
    None(()),
    One(String),
    Many(Vec<String>),
}

/// The forms of `logprobs`, for the description of the API.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes what `logprobs` reads")]
enum FlagOrCount {
    Flag(bool),
    Count(i64),
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn loose_forms_are_understood() {
        let chat: ChatRequest = serde_json::from_value(json!({
            "model": "m", "messages": [{"role": "user", "content": "hi", "name": "x"}],
            "logprobs": true, "stop": "a", "seed": 7, "made_up": [1],
        }))
        .unwrap();
        assert_eq!(chat.common.logprobs, Some(Logprobs::Flag(true)));
        assert_eq!(chat.common.stop, ["a"]);
        assert_eq!(chat.common.unknown.keys().collect::<Vec<_>>(), ["made_up"]);
        assert_eq!(chat.messages[0].rest["name"], "x");
    }

    #[test]
    fn prompts_come_in_four_forms() {
        for (json, want) in [
            (json!("a"), Prompt::Texts(vec!["a".into()])),
            (json!(["a", "b"]), Prompt::Texts(vec!["a".into(), "b".into()])),
            (json!([1, 2]), Prompt::Ids(vec![vec![1, 2]])),
            (json!([[1], [2]]), Prompt::Ids(vec![vec![1], vec![2]])),
        ] {
            let request: CompletionRequest =
                serde_json::from_value(json!({"prompt": json, "logprobs": 1})).unwrap();
            assert_eq!(request.prompt, want);
            assert_eq!(request.common.logprobs, Some(Logprobs::Count(1)));
        }
        let error = serde_json::from_value::<CompletionRequest>(json!({"prompt": {"a": 1}}));
        assert!(error.unwrap_err().to_string().contains("a list of token ids"));
    }

    #[test]
    fn numbers_and_nulls_are_read_as_pydantic_reads_them() {
        let chat: ChatRequest = serde_json::from_value(json!({
            "messages": [], "max_tokens": 16.0, "seed": -3.0, "top_logprobs": 2.0, "logprobs": 1.0,
            "stop_token_ids": [7.0], "stop": null, "min_tokens": null,
            "stream_options": {"include_usage": null},
        }))
        .unwrap();
        let common = &chat.common;
        assert_eq!((common.max_tokens, common.seed, common.min_tokens), (Some(16), Some(-3), None));
        assert_eq!((chat.top_logprobs, common.logprobs), (Some(2), Some(Logprobs::Count(1))));
        assert_eq!(common.stop_token_ids, Some(vec![7]));
        assert!(!common.stream_options.unwrap().include_usage);
        let ids: CompletionRequest = serde_json::from_value(json!({"prompt": [1.0, 2]})).unwrap();
        assert_eq!(ids.prompt, Prompt::Ids(vec![vec![1, 2]]));
    }
}
