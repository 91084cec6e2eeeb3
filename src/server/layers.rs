//! Adds what surrounds the routes: it tidies paths, writes panics and refusals as error objects,
//! and answers other origins.

use super::door::access;
use super::error::ApiError;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{Any, CorsLayer};

/// Takes `//v1/models/` for `/v1/models`: base URLs come with and without a slash at their end.
/// The API's viewer has relative links, for which its own slash matters.
pub(super) fn tidy_path(mut request: Request) -> Request {
    let path = request.uri().path();
    let parts = path.split('/').filter(|part| !part.is_empty()).flat_map(|part| ["/", part]);
    let mut tidy: String = parts.collect();
    if tidy.is_empty() || (path.ends_with('/') && tidy.starts_with(access::OPEN_VIEWER)) {
        tidy.push('/');
    }
    if tidy == path {
        return request;
    }
    if let Some(query) = request.uri().query() {
        tidy.push('?');
        tidy.push_str(query);
    }
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = tidy.parse().ok();
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
    request
}

/// What answers for a handler that panics.
pub type OnPanic = fn(Box<dyn std::any::Any + Send>) -> Response;

/// Answers for a handler that panics.
pub fn catch_panics() -> CatchPanicLayer<OnPanic> {
    CatchPanicLayer::custom(|_| {
        ApiError::with_status(StatusCode::INTERNAL_SERVER_ERROR, "a handler failed").into_response()
    })
}

/// Lets pages of other origins ask; `*` stands for all.
pub(super) fn cors(origins: &[String]) -> CorsLayer {
    let layer =
        CorsLayer::new().allow_methods(Any).allow_headers(Any).expose_headers([access::REQUEST_ID]);
    match origins.iter().any(|o| o == "*") {
        true => layer.allow_origin(Any),
        false => {
            let values = origins.iter().filter_map(|o| HeaderValue::from_str(o).ok());
            layer.allow_origin(values.collect::<Vec<_>>())
        }
    }
}

/// Failures that axum itself answers get the error object too.
pub(super) async fn as_error_objects(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let is_json = response
        .headers()
        .get(axum::http::header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"application/json"));
    if is_json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let message = status.canonical_reason().unwrap_or("refused").to_lowercase();
    ApiError::with_status(status, message).into_response()
}
