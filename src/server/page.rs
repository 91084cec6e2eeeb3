//! Serves the page at `/`, where a person can chat with a model and look at its tokens. The page
//! consists of plain files and loads nothing from other hosts.

use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

/// Nothing but this server's own files and answers; the empty icon is a `data:` address.
const POLICY: &str = "default-src 'self'; img-src data:; frame-ancestors 'none'";

/// `GET /`.
pub async fn index() -> Response {
    file("text/html; charset=utf-8", include_str!("page/index.html"))
}

/// `GET /page/style.css`.
pub async fn style() -> Response {
    file("text/css; charset=utf-8", include_str!("page/style.css"))
}

/// `GET /page/page.js`.
pub async fn script() -> Response {
    file("text/javascript; charset=utf-8", include_str!("page/page.js"))
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers =
        [(CONTENT_TYPE, kind), (CONTENT_SECURITY_POLICY, POLICY), (CACHE_CONTROL, "no-cache")];
    (headers, text).into_response()
}
