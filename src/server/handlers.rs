//! Handles the routes that generate: it reads the request, routes it to a model, and sends what is
//! written.

use super::door::Caller;
use super::door::access::{REQUEST_ID, REQUEST_ID_MAX, is_request_id};
use super::error::ApiError;
use super::generate::{Job, run};
use super::refusals::Refusals;
use super::registry::{Routed, Served};
use super::state::ServerState;
use crate::engine::scheduler::Owner;
use crate::intake::body;
use crate::intake::proof::Prover;
use crate::intake::translate::{Defaults, salt_of};
use crate::intake::understand::{Reader, Understood};
use crate::proof::commit::nonce_of;
use crate::wire::openai::request::Common;
use crate::wire::openai::response::{ChatChoice, CompletionChoice, Response as Answer};
use crate::wire::openai::{ChatRequest, CompletionRequest};
use axum::body::Bytes;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::Response;
use std::sync::Arc;

/// The header by which Targon's validators say which model they mean.
const MODEL_HEADER: &str = "x-targon-model";

/// `POST /v1/chat/completions`.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; with `stream` as server-sent events",
            content((Answer<ChatChoice> = "application/json"), (String = "text/event-stream"))),
        Refusals
    )
)]
pub async fn chat(
    State(state): State<ServerState>,
    caller: Option<Extension<Caller>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let request: Arc<ChatRequest> = Arc::new(body::read(body).await?);
    let asking = Asking { state: &state, headers: &headers, caller: caller.map(|c| c.0) };
    let routed = asking.admit(&request.common)?;
    let understood = asking.reader(&routed.served).shared_chat(&request).await?;
    asking.answer(&request.common, routed, understood).await
}

/// `POST /v1/completions`.
#[utoipa::path(
    post,
    path = "/v1/completions",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The continuation; with `stream` as server-sent events",
            content(
                (Answer<CompletionChoice> = "application/json"),
                (String = "text/event-stream")
            )),
        Refusals
    )
)]
pub async fn completions(
    State(state): State<ServerState>,
    caller: Option<Extension<Caller>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let request: CompletionRequest = body::read(body).await?;
    let asking = Asking { state: &state, headers: &headers, caller: caller.map(|c| c.0) };
    let routed = asking.admit(&request.common)?;
    let understood = asking.reader(&routed.served).completion(&request).await?;
    asking.answer(&request.common, routed, understood).await
}

/// A request besides its body.
struct Asking<'a> {
    state: &'a ServerState,
    headers: &'a HeaderMap,
    caller: Option<Caller>,
}

impl Asking<'_> {
    /// The model of a request, whose unknown fields are counted.
    fn admit(&self, common: &Common) -> Result<Routed, ApiError> {
        let routed = route(self.state, self.headers, common.model.as_deref())?;
        self.state.note_unknown(&common.unknown);
        Ok(routed)
    }

    fn reader<'a>(&'a self, served: &'a Served) -> Reader<'a> {
        let context_max = served.engine.options().context_max;
        // Validators expect what Targon's own miners send.
        let defaults = match &self.caller {
            Some(_) => Defaults::TARGON,
            None => self.state.defaults(),
        };
        Reader {
            model: served.engine.text(),
            context_max,
            defaults,
            entropy: self.state.entropy(),
            now_ms: self.state.clock().unix_ms(),
        }
    }

    /// Whose a request is, by hotkey or key: owners share the engine, and what one has sent must
    /// not show in how many tokens another finds in the prefix cache.
    fn owner(&self) -> Option<[u8; 32]> {
        match &self.caller {
            Some(caller) => Some(caller.hotkey.0),
            None => self.state.settings().keys.owner(self.headers),
        }
    }

    /// Runs what was understood.
    async fn answer(
        &self,
        common: &Common,
        routed: Routed,
        understood: Understood,
    ) -> Result<Response, ApiError> {
        let prover = self.prover(&routed.served, common)?;
        let Understood { endpoint, mut requests, n, report, tools } = understood;
        if let Some(owner) = self.owner() {
            for request in &mut requests {
                request.owner = Owner(owner);
                request.cache_salt = salt_of(&owner, request.cache_salt);
            }
        }
        let mut proofs = Vec::new();
        if let Some(prover) = &prover {
            let (identity, seed) = (&routed.served.identity, common.seed);
            let choices = (0..).zip(&mut requests);
            proofs.extend(choices.map(|(n, request)| prover.bind(request, identity, seed, n)));
        }
        let stream = common.stream.unwrap_or(false);
        let request_id = request_id(self.headers, common)?;
        let job = Job { endpoint, routed, requests, n, report, proofs, tools, stream, request_id };
        run(self.state, job).await
    }

    /// What proves the request's choices, where it asks for that. The name of a signed request is
    /// its nonce where it brings none: its sender chose it.
    fn prover(&self, served: &Served, common: &Common) -> Result<Option<Prover>, ApiError> {
        let Some(field) = &common.proof else { return Ok(None) };
        let dtype = served.engine.info().dtype;
        let own = match &self.caller {
            Some(caller) => nonce_of(&caller.name),
            None => self.state.entropy().bytes(),
        };
        Ok(Some(Prover::read(field, dtype, own, self.state.signer())?))
    }
}

/// The request's name: the client's own, or the one it has in the log.
fn request_id(headers: &HeaderMap, common: &Common) -> Result<Option<String>, ApiError> {
    match &common.request_id {
        Some(id) if !is_request_id(id) => {
            let what = format!("must have 1 to {REQUEST_ID_MAX} visible ASCII characters");
            Err(ApiError::field("request_id", what))
        }
        Some(id) => Ok(Some(id.clone())),
        None => {
            let id = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
            Ok(id.filter(|id| is_request_id(id)).map(str::to_owned))
        }
    }
}

/// The model that a body and its headers name.
///
/// # Errors
/// As for [`Registry::route`](super::registry::Registry::route).
pub fn route(
    state: &ServerState,
    headers: &HeaderMap,
    model: Option<&str>,
) -> Result<Routed, ApiError> {
    let header = match headers.get(MODEL_HEADER) {
        Some(value) => Some(value.to_str().map_err(|_| {
            ApiError::bad_request(format!("the header {MODEL_HEADER} must be visible ASCII"))
        })?),
        None => None,
    };
    state.registry().route(model, header)
}
