//! Wraps bodies that keep something for as long as they are read or written.

use axum::body::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};

/// A body that keeps something until it is at its end or given up.
pub(super) struct KeepingBody<B, K> {
    pub(super) body: B,
    /// Dropped with the body.
    pub(super) _kept: K,
}

impl<B: Body<Data = Bytes> + Unpin, K: Unpin> Body for KeepingBody<B, K> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
