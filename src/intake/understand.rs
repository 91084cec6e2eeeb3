//! Turns a request body into what the engine is asked. A server generates by this reading, and a
//! verifier repeats it.

use super::Endpoint;
use super::constraint::{Tooling, grammar};
use super::error::RequestError;
use super::prompt::{Room, chat_prompt, completion_prompts, count_prompts};
use super::tools::ToolParser;
use super::translate::{
    COMPLETION_TOKENS_DEFAULT, Defaults, FieldNames, ResponseOptions, Translator, chat_logprobs,
    completion_logprobs, refuse_in_chats, refuse_unsupported, report, whole,
};
use super::work::{self, SMALL_BYTES_MAX, weight};
use crate::engine::request::Request;
use crate::entropy::Entropy;
use crate::models::chat::ChatTemplate;
use crate::models::text::Text;
use crate::wire::openai::request::Common;
use crate::wire::openai::{ChatRequest, CompletionRequest, Prompt};
use std::sync::Arc;

/// A request body, understood for one model.
pub struct Understood {
    /// Which endpoint it was sent to.
    pub endpoint: Endpoint,
    /// One sequence for each choice, not yet proved.
    pub requests: Vec<Request>,
    /// Choices of each prompt.
    pub n: usize,
    /// How the response is written.
    pub report: ResponseOptions,
    /// What finds calls of tools.
    pub tools: Option<ToolParser>,
}

/// Who reads: the model, and what the server's flags say where a request does not.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// What the model makes of texts.
    pub model: &'a Arc<Text>,
    /// Tokens of prompt and output together, at most.
    pub context_max: usize,
    /// What the server's flags say where a request says nothing.
    pub defaults: Defaults,
    /// Where seeds and names of calls come from.
    pub entropy: &'a Entropy,
    /// When the request was asked, in milliseconds since 1970: a chat template may print it.
    pub now_ms: u64,
}

impl Reader<'_> {
    /// Reads a body of `/v1/chat/completions`.
    ///
    /// # Errors
    /// 400 that names the field.
    pub async fn chat(self, request: &ChatRequest) -> Result<Understood, RequestError> {
        self.shared_chat(&Arc::new(request.clone())).await
    }

    /// The same without a copy.
    ///
    /// # Errors
    /// As for [`Reader::chat`].
    pub async fn shared_chat(self, request: &Arc<ChatRequest>) -> Result<Understood, RequestError> {
        let common = &request.common;
        refuse_unsupported(&common.unknown)?;
        refuse_in_chats(&common.unknown)?;
        let logprobs = chat_logprobs(common.logprobs, request.top_logprobs)?;
        let report = report(common, logprobs, self.defaults)?;
        let newer = whole("max_completion_tokens", request.max_completion_tokens, 1)?;
        let older = whole("max_tokens", common.max_tokens, 1)?;
        let limit = if newer.is_some() { "max_completion_tokens" } else { "max_tokens" };
        let format = self.model.chat.as_ref().and_then(ChatTemplate::tool_format);
        let tooling = Tooling::new(request, format)?;
        let (model, room, asked) = (Arc::clone(self.model), self.room(common), Arc::clone(request));
        let now_ms = self.now_ms;
        let inputs = (&request.messages, &request.tools, &request.chat_template_kwargs);
        let prompt = work::run(weight(&inputs, SMALL_BYTES_MAX), move || {
            chat_prompt(&model, &asked, room, now_ms)
        })
        .await?;
        let names = FieldNames { prompt: "messages", limit };
        let what = (Endpoint::Chat, names, report, newer.or(older));
        self.finish(common, what, (vec![prompt], tooling)).await
    }

    /// Reads a body of `/v1/completions`.
    ///
    /// # Errors
    /// 400 that names the field.
    pub async fn completion(self, request: &CompletionRequest) -> Result<Understood, RequestError> {
        let common = request.common.clone();
        refuse_unsupported(&common.unknown)?;
        refuse_completion_fields(request)?;
        let echo = request.echo == Some(true);
        let logprobs = completion_logprobs(common.logprobs)?;
        let report = ResponseOptions { echo, ..report(&common, logprobs, self.defaults)? };
        // Nothing need be generated where the prompt is what is asked about.
        let low = i64::from(!report.echo && report.prompt_logprobs.is_none());
        let max_tokens = whole("max_tokens", common.max_tokens, low)?;
        let max_tokens = Some(max_tokens.unwrap_or(COMPLETION_TOKENS_DEFAULT));
        let prompts = self.prompts(&request.prompt, &common).await?;
        let names = FieldNames { prompt: "prompt", limit: "max_tokens" };
        let what = (Endpoint::Completion, names, report, max_tokens);
        self.finish(&common, what, (prompts, Tooling::default())).await
    }

    /// How much text makes sense: a prompt that is cut may be longer than the context.
    fn room(self, common: &Common) -> Room {
        match common.truncate_prompt_tokens {
            Some(_) => Room::Free(self.context_max),
            None => Room::Context(self.context_max),
        }
    }

    async fn prompts(
        self,
        prompt: &Prompt,
        common: &Common,
    ) -> Result<Vec<Vec<u32>>, RequestError> {
        count_prompts(prompt)?;
        let (room, special) = (self.room(common), common.add_special_tokens.unwrap_or(true));
        let Prompt::Texts(texts) = prompt else {
            return completion_prompts(self.model, prompt, special, room);
        };
        let bytes = texts.iter().map(String::len).sum();
        let (model, prompt) = (Arc::clone(self.model), prompt.clone());
        work::run(bytes, move || completion_prompts(&model, &prompt, special, room)).await
    }

    async fn finish(
        self,
        common: &Common,
        (endpoint, names, report, max_tokens): (
            Endpoint,
            FieldNames,
            ResponseOptions,
            Option<usize>,
        ),
        (prompts, tooling): (Vec<Vec<u32>>, Tooling),
    ) -> Result<Understood, RequestError> {
        let grammar = grammar(Arc::clone(self.model), common, &tooling).await?;
        let Self { model, context_max, entropy, .. } = self;
        let ask = Translator {
            model,
            context_max,
            common,
            max_tokens,
            grammar,
            names,
            report: &report,
            entropy,
        };
        let count = prompts.len();
        let requests = ask.requests(prompts)?;
        let n = requests.len() / count;
        Ok(Understood { endpoint, requests, n, report, tools: tooling.parser(entropy) })
    }
}

fn refuse_completion_fields(request: &CompletionRequest) -> Result<(), RequestError> {
    if request.suffix.as_ref().is_some_and(|s| !s.is_empty()) {
        return Err(RequestError::field("suffix", "is not supported by this server"));
    }
    let n = request.common.n.unwrap_or(1);
    match request.best_of {
        Some(best_of) if best_of != n => {
            Err(RequestError::field("best_of", format!("must equal n = {n}, got {best_of}")))
        }
        _ => Ok(()),
    }
}
