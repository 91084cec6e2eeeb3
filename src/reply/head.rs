//! Holds the values that all parts of one response share: its endpoint, its id, its prompts.

use crate::intake::Endpoint;
use crate::intake::translate::ResponseOptions;
use crate::wire::openai::Usage;
use crate::wire::openai::response::Response;

impl Endpoint {
    /// The `object` of a whole response.
    pub fn whole(self) -> &'static str {
        match self {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completion => "text_completion",
        }
    }

    /// The `object` of a chunk.
    pub fn chunk(self) -> &'static str {
        match self {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completion => "text_completion",
        }
    }

    fn id_prefix(self) -> &'static str {
        match self {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Completion => "cmpl",
        }
    }
}

/// The prompts of a request; each has `n` choices, side by side.
#[derive(Clone, Debug)]
pub struct Prompts {
    /// The ids of each prompt.
    pub prompts: Vec<Vec<u32>>,
    /// How many choices each prompt has.
    pub n: usize,
}

impl Prompts {
    /// The prompt of choice `index`.
    pub fn of(&self, index: usize) -> &[u32] {
        &self.prompts[index / self.n]
    }

    /// Tokens, counted once for each prompt however many choices it has.
    pub fn tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    /// The first choice of the same prompt.
    pub fn first(&self, index: usize) -> usize {
        index - index % self.n
    }
}

/// What all chunks of a response share.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    /// The endpoint, which decides the names and forms of all objects.
    pub endpoint: Endpoint,
    /// How it is written.
    pub report: ResponseOptions,
    /// The prompts that it answers.
    pub prompts: Prompts,
    /// Name of the request, without the endpoint's prefix.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Name of the model.
    pub model: String,
    /// What stands for weights and engine.
    pub fingerprint: String,
}

impl ResponseHead {
    /// A body with these choices.
    pub fn body<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Usage>,
    ) -> Response<C> {
        Response {
            id: format!("{}-{}", self.endpoint.id_prefix(), self.id),
            object,
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: self.fingerprint.clone(),
            choices,
            prompt_logprobs: None,
            prompt_token_ids: None,
            logprobs_mode: self.report.logprobs.map(|_| self.report.mode.name()),
            usage,
        }
    }

    /// The ids of choice `index`'s prompt, where asked for.
    pub fn prompt_ids(&self, index: usize) -> Option<Vec<u32>> {
        self.report.token_ids.then(|| self.prompts.of(index).to_vec())
    }
}
