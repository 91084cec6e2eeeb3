//! Applies the checks that every request passes before its handler: it gets an id and a log line,
//! its API key is checked, and its body must arrive in time.

use crate::server::error::{ApiError, echo};
use crate::server::operations::counters::HttpLabels;
use crate::server::settings::HttpLimits;
use crate::server::state::ServerState;
use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};

/// The client's name for a request, or ours; every response has it.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Characters of a request's name.
pub const REQUEST_ID_MAX: usize = 128;
/// Routes that tell how the server is: open to all, and too many to log.
const PROBES: [&str; 6] = ["/health", "/health/decode", "/ready", "/version", "/metrics", "/load"];
/// Other routes that need no key: the page and the description of the API, which ask with the key
/// that their user types. Every route that is not listed needs one.
const OPEN: [&str; 4] = ["/", "/page/style.css", "/page/page.js", "/api-doc/openapi.json"];
pub(in crate::server) const OPEN_VIEWER: &str = "/docs";

/// Whether a route asks for no key.
pub(in crate::server) fn is_open(path: &str) -> bool {
    let is_viewer =
        path.strip_prefix(OPEN_VIEWER).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    PROBES.contains(&path) || OPEN.contains(&path) || is_viewer
}

/// Whether a name is fit for headers and logs.
pub fn is_request_id(id: &str) -> bool {
    (1..=REQUEST_ID_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// Names, times, counts and logs a request.
pub async fn observe(
    State(state): State<ServerState>,
    mut request: Request,
    next: Next,
) -> Response {
    let started = state.clock().elapsed();
    let given = request.headers().get(REQUEST_ID).and_then(|v| v.to_str().ok());
    let id = match given.filter(|id| is_request_id(id)) {
        Some(id) => id.to_owned(),
        None => state.entropy().uuid().simple().to_string(),
    };
    let name = HeaderValue::from_str(&id)
        .unwrap_or_else(|_| unreachable!("request ids are visible ASCII: {id}"));
    request.headers_mut().insert(REQUEST_ID, name.clone());
    let method = request.method().clone();
    // The pattern, not the path: clients must not be able to make up labels.
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("<unmatched>".to_owned(), |r| r.as_str().to_owned());
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, name);
    let seconds = state.clock().elapsed().saturating_sub(started).as_secs_f64();
    let status = response.status().as_u16();
    state.metrics().observe(
        HttpLabels { method: method_label(&method), path: route.clone(), status },
        seconds,
    );
    if PROBES.contains(&route.as_str()) {
        tracing::debug!(method = method_label(&method), route, status, seconds, id, "request");
    } else {
        tracing::info!(method = method_label(&method), route, status, seconds, id, "request");
    }
    response
}

fn method_label(method: &axum::http::Method) -> String {
    let known = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"];
    known.into_iter().find(|m| *m == method.as_str()).unwrap_or("other").to_owned()
}

/// Lets requests with a key pass, and those to open routes.
pub async fn authenticate(
    State(state): State<ServerState>,
    request: Request,
    next: Next,
) -> Response {
    if is_open(request.uri().path()) || state.settings().keys.admit(request.headers()) {
        return next.run(request).await;
    }
    let what = "this server needs a valid API key in the header `Authorization: Bearer ...`";
    let mut response = ApiError::with_status(StatusCode::UNAUTHORIZED, what).into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// Reads the body, which must be small and quick enough. No open route has a use for one: what
/// anyone may send without a key is not kept.
pub async fn limit_body(
    State(state): State<ServerState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let body = match is_open(head.uri.path()) {
        true => Bytes::new(),
        false => read_body(&head.headers, body, &state.settings().limits).await?,
    };
    Ok(next.run(Request::from_parts(head, Body::from(body))).await)
}

/// The bytes of a body as its sender announces them.
pub fn announced(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// A body within its limits.
///
/// # Errors
/// 415 where it is compressed, 413 where it is too large, 408 where it is too slow, 400 where it
/// breaks off.
pub async fn read_body(
    headers: &HeaderMap,
    body: Body,
    limits: &HttpLimits,
) -> Result<Bytes, ApiError> {
    check_encoding(headers)?;
    let too_large = || {
        let message = format!("the body must have at most {} bytes", limits.body_bytes);
        ApiError::with_status(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    if announced(headers).is_some_and(|bytes| bytes > limits.body_bytes) {
        return Err(too_large());
    }
    let read = Limited::new(body, limits.body_bytes).collect();
    match tokio::time::timeout(limits.body_time, read).await {
        Err(_) => {
            let message = format!("the body must arrive within {:?}", limits.body_time);
            Err(ApiError::with_status(StatusCode::REQUEST_TIMEOUT, message))
        }
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(e)) => Err(ApiError::bad_request(format!("the body cannot be read: {e}"))),
        Ok(Ok(body)) => Ok(body.to_bytes()),
    }
}

/// Bodies come as they are: a compressed one could grow beyond every limit.
///
/// # Errors
/// 415 that names the encoding.
pub fn check_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(encoding) = headers.get(header::CONTENT_ENCODING) else { return Ok(()) };
    if encoding.as_bytes().eq_ignore_ascii_case(b"identity") {
        return Ok(());
    }
    let got = echo(&String::from_utf8_lossy(encoding.as_bytes()));
    let message = format!("the header `Content-Encoding` must be identity or absent, got {got}");
    Err(ApiError::with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}
