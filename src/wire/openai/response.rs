//! Defines response bodies and stream chunks.

use super::tools::ToolCall;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// How many tokens the request took.
#[derive(Clone, Copy, Serialize, Default, PartialEq, Eq, Debug, ToSchema)]
pub struct Usage {
    /// Tokens of all prompts, cached ones included.
    pub prompt_tokens: usize,
    /// Prompt and generated tokens together.
    pub total_tokens: usize,
    /// Tokens that were generated, of all choices.
    pub completion_tokens: usize,
    /// How many of the prompts' tokens came from a cache.
    pub prompt_tokens_details: PromptTokensDetails,
}

impl Usage {
    /// The usage of a response with these counts.
    pub fn new(prompt_tokens: usize, cached_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

/// What of the prompts needed no computing.
#[derive(Clone, Copy, Serialize, Default, PartialEq, Eq, Debug, ToSchema)]
pub struct PromptTokensDetails {
    /// Tokens found in the prefix cache.
    pub cached_tokens: usize,
}

/// The proof of one chunk of output rows.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, ToSchema)]
pub struct ProofChunk {
    /// The chunk's number, from 0.
    pub index: u32,
    /// Base 64.
    pub data: String,
    /// The chain up to and including it, in hexadecimal.
    pub digest: String,
}

/// What closes a proof: its root, what it is bound to, and who signs it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, ToSchema)]
pub struct ProofEnd {
    /// Name of the scheme.
    pub scheme: String,
    /// The numeric canon in which the rows were computed.
    pub canon: String,
    /// The nonce that was used.
    pub nonce: String,
    /// Hash of the model: weights, type, canon and calibration.
    pub model: String,
    /// Root of the chain.
    pub root: String,
    /// Tokens of the output.
    pub tokens: usize,
    /// The hotkey that signs, as its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotkey: Option<String>,
    /// Its signature over the end of the chain, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
}

/// One chunk's proof in a stream, all of them in a whole response.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, ToSchema)]
#[serde(untagged)]
pub enum Proofs {
    /// The chunk that this token closes.
    One(ProofChunk),
    /// The proof of a whole response.
    All(Vec<ProofChunk>),
}

/// What Targon adds to a choice; absent fields are left out.
#[derive(Clone, Serialize, Default, PartialEq, Eq, Debug, ToSchema)]
pub struct Extras {
    /// Proof-of-weights value of a streamed token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub powv: Option<i64>,
    /// The ids of the chunk's tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Proofs of hidden rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proofs>,
    /// What closes the proof.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proof_end: Option<ProofEnd>,
}

/// A response or one chunk of a stream.
#[derive(Clone, Serialize, Debug, ToSchema)]
pub struct Response<C> {
    /// Same for all chunks of a stream.
    pub id: String,
    /// The kind of object, by OpenAI's name.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// Name of the model that answered.
    pub model: String,
    /// Engine, weights and kernels.
    pub system_fingerprint: String,
    /// One for each answer that was asked for.
    pub choices: Vec<C>,
    /// Log-probabilities of the prompt, where asked for (chat; completions have them in choices).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<Object>>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Ids of the prompt, where asked for (chat; completions have them in choices).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Which distribution log-probabilities of the output describe, where they are reported.
    /// Those of a prompt are always raw, because nothing was drawn there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs_mode: Option<&'static str>,
    /// How many tokens the request took, where that is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// A choice of a whole chat response.
#[derive(Clone, Serialize, Debug, ToSchema)]
pub struct ChatChoice {
    /// Its number among the choices.
    pub index: usize,
    /// What the model said.
    pub message: ChatMessage,
    /// Log-probabilities, where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// The stop string or id that matched.
    pub stop_reason: Option<Value>,
    /// Fields beyond OpenAI's, at the same level.
    #[serde(flatten)]
    pub extras: Extras,
}

/// An assistant's message.
#[derive(Clone, Serialize, Debug, ToSchema)]
pub struct ChatMessage {
    /// `assistant`.
    pub role: &'static str,
    /// Its text; null beside calls without any.
    pub content: Option<String>,
    /// Calls of the tools that the request offers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// What a chat chunk adds to a choice.
#[derive(Clone, Serialize, Debug)]
pub struct ChatChunkChoice {
    /// Its number among the choices.
    pub index: usize,
    /// What this chunk adds to the message.
    pub delta: Delta,
    /// Log-probability of the chunk's token, where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Set on the last chunk.
    pub finish_reason: Option<&'static str>,
    /// The stop string or id that matched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<Value>,
    /// Fields beyond OpenAI's, at the same level.
    #[serde(flatten)]
    pub extras: Extras,
}

/// New text of a chat stream.
#[derive(Clone, Serialize, Default, Debug)]
pub struct Delta {
    /// Set on the first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// The text.
    pub content: String,
    /// Calls, or parts of calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// Log-probabilities in the chat form.
#[derive(Clone, Serialize, Default, Debug, ToSchema)]
pub struct ChatLogprobs {
    /// One entry for each token.
    pub content: Vec<ChatLogprob>,
}

/// A token's log-probability in the chat form.
#[derive(Clone, Serialize, Debug, ToSchema)]
pub struct ChatLogprob {
    /// The token and its value.
    #[serde(flatten)]
    pub token: TokenLogprob,
    /// The most probable tokens.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A token, its log-probability, and its bytes.
#[derive(Clone, Serialize, Debug, ToSchema)]
pub struct TokenLogprob {
    /// Text, or `token_id:<n>`.
    pub token: String,
    /// The natural logarithm of the token's probability.
    pub logprob: f64,
    /// The token's own bytes, half characters included.
    pub bytes: Vec<u8>,
}

/// A choice of a completion, whole or one chunk of it: every field is present.
#[derive(Clone, Serialize, Debug, ToSchema)]
pub struct CompletionChoice {
    /// `prompt index * n + i`.
    pub index: usize,
    /// The text that was generated.
    pub text: String,
    /// Log-probabilities, where asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null while the stream goes on.
    pub finish_reason: Option<&'static str>,
    /// The stop string or id that matched.
    pub stop_reason: Option<Value>,
    /// Fields beyond OpenAI's, at the same level.
    #[serde(flatten)]
    pub extras: Extras,
    /// Log-probabilities of the prompt, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<Object>>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Ids of the prompt, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// For each prompt token a map from ids to `{logprob, rank, decoded_token}`, its own first; null
/// for the first token, which follows nothing.
pub type PromptLogprobs = Vec<Option<Map<String, Value>>>;

/// Log-probabilities in the completions form: four parallel lists.
#[derive(Clone, Serialize, Default, Debug, ToSchema)]
pub struct CompletionLogprobs {
    /// Where each token's text begins, in characters.
    pub text_offset: Vec<usize>,
    /// Log-probabilities; null for a first prompt token.
    pub token_logprobs: Vec<Option<f64>>,
    /// Texts, or `token_id:<n>`.
    pub tokens: Vec<String>,
    /// The token itself, then the most probable ones; null for a first prompt token.
    #[schema(value_type = Vec<Option<Object>>)]
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
}

/// The error object that every failure is wrapped in.
#[derive(Clone, Serialize, PartialEq, Eq, Debug, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorObject,
}

/// What went wrong.
#[derive(Clone, Serialize, PartialEq, Eq, Debug, ToSchema)]
pub struct ErrorObject {
    /// What is wrong with the request, in one sentence.
    pub message: String,
    /// The kind of error, in a word that stays the same.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The field at fault.
    pub param: Option<String>,
    /// The HTTP status, or a word by which clients know the case.
    #[schema(value_type = CodeForm)]
    pub code: ErrorCode,
}

/// What stands in `code`: a number or a word.
#[derive(Clone, Copy, Serialize, PartialEq, Eq, Debug)]
#[serde(untagged)]
pub enum ErrorCode {
    /// The HTTP status.
    Status(u16),
    /// A stable word.
    Word(&'static str),
}

/// The forms of a code, for the description of the API.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes `ErrorCode`")]
enum CodeForm {
    Status(u16),
    Word(String),
}

/// Entry of `/v1/models`.
#[derive(Clone, Serialize, Debug, ToSchema)]
pub struct ModelCard {
    /// The name that requests use.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// `targon-engine`.
    pub owned_by: &'static str,
    /// `loading`, `ready` or `failed`.
    pub status: &'static str,
    /// Tokens of prompt and output together, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<usize>,
    /// Type of the weights in memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// Where the weights came from: a commit or a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Why the model cannot be loaded, where it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
