//! A request body to what the engine is asked: the reading that a server generates by, and that a
//! verifier repeats.

use super::Endpoint;
use super::constraint::{Tooling, grammar};
use super::error::RequestError;
use super::prompt::{chat_prompt, completion_prompts};
use super::tools::ToolParser;
use super::translate::{
    Ask, COMPLETION_TOKENS_DEFAULT, Defaults, Report, refuse_unsupported, report, whole,
};
use crate::engine::request::Request;
use crate::models::Model;
use crate::models::chat::ChatTemplate;
use crate::wire::openai::request::{Common, Logprobs};
use crate::wire::openai::{ChatRequest, CompletionRequest};
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
    pub report: Report,
    /// What finds calls of tools.
    pub tools: Option<ToolParser>,
}

/// Who reads: the model, and what the server's flags say where a request does not.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// The model.
    pub model: &'a Arc<Model>,
    /// Longest sequence.
    pub context_max: usize,
    /// The flags.
    pub defaults: Defaults,
}

impl Reader<'_> {
    /// Reads a body of `/v1/chat/completions`.
    ///
    /// # Errors
    /// 400 that names the field.
    pub async fn chat(self, request: &ChatRequest) -> Result<Understood, RequestError> {
        let (model, common) = (self.model, &request.common);
        refuse_unsupported(&common.unknown)?;
        let report = report(common, request.top_logprobs, self.defaults)?;
        let max_tokens = match whole("max_completion_tokens", request.max_completion_tokens, 1)? {
            Some(max) => Some(max),
            None => whole("max_tokens", common.max_tokens, 1)?,
        };
        let format = model.chat.as_ref().and_then(ChatTemplate::tool_format);
        let tooling = Tooling::new(request, format)?;
        let prompts = vec![chat_prompt(model, request)?];
        self.finish(Endpoint::Chat, common, report, max_tokens, (prompts, tooling)).await
    }

    /// Reads a body of `/v1/completions`.
    ///
    /// # Errors
    /// 400 that names the field.
    pub async fn completion(self, request: &CompletionRequest) -> Result<Understood, RequestError> {
        let mut common = request.common.clone();
        // Here `true` has always meant one alternative.
        if common.logprobs == Some(Logprobs::Flag(true)) {
            common.logprobs = Some(Logprobs::Count(1));
        }
        refuse_unsupported(&common.unknown)?;
        refuse_completion_fields(request)?;
        let echo = request.echo == Some(true);
        let report = Report { echo, ..report(&common, None, self.defaults)? };
        // Nothing need be generated where the prompt is what is asked about.
        let low = i64::from(!report.echo && report.prompt_logprobs.is_none());
        let max_tokens = whole("max_tokens", common.max_tokens, low)?;
        let max_tokens = Some(max_tokens.unwrap_or(COMPLETION_TOKENS_DEFAULT));
        let prompts = completion_prompts(self.model, &request.prompt)?;
        let rest = (prompts, Tooling::default());
        self.finish(Endpoint::Completion, &common, report, max_tokens, rest).await
    }

    async fn finish(
        self,
        endpoint: Endpoint,
        common: &Common,
        report: Report,
        max_tokens: Option<usize>,
        (prompts, tooling): (Vec<Vec<u32>>, Tooling),
    ) -> Result<Understood, RequestError> {
        let grammar = grammar(Arc::clone(self.model), common, &tooling).await?;
        let Self { model, context_max, .. } = self;
        let ask = Ask { model, context_max, common, max_tokens, grammar, report: &report };
        let count = prompts.len();
        let requests = ask.requests(prompts)?;
        let n = requests.len() / count;
        Ok(Understood { endpoint, requests, n, report, tools: tooling.parser() })
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
