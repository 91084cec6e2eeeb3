//! Sends a response as server-sent events.

use super::error::ApiError;
use super::state::InFlight;
use crate::engine::output::{Event, Fault, Generation};
use crate::reply::frames::Frames;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{Event as Frame, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{SelectAll, Stream, StreamExt, select_all, unfold};
use std::convert::Infallible;
use std::pin::Pin;
use tokio_util::sync::CancellationToken;

type Events = Pin<Box<dyn Stream<Item = (usize, Event)> + Send>>;

/// A response that is being sent.
pub struct Streaming {
    /// Writes the chunks.
    pub frames: Frames,
    /// Counts the request until its last frame.
    pub in_flight: InFlight,
    /// Ends the stream with an error.
    pub abort: CancellationToken,
}

/// Sends the events of all choices as server-sent events, each when it comes.
pub fn stream(streaming: Streaming, generations: Vec<Generation>) -> Response {
    let events = generations.into_iter().enumerate().map(|(index, generation)| {
        let next = move |mut g: Generation| async move { g.next().await.map(|e| ((index, e), g)) };
        Box::pin(unfold(generation, next)) as Events
    });
    let frames =
        unfold((streaming, select_all(events)), |(mut streaming, mut events)| async move {
            let frame = streaming.next_frame(&mut events).await?;
            Some((Ok::<_, Infallible>(Frame::default().data(frame)), (streaming, events)))
        });
    let mut response = Sse::new(frames).into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, kind);
    let no_buffering = HeaderName::from_static("x-accel-buffering");
    headers.insert(no_buffering, HeaderValue::from_static("no"));
    response
}

impl Streaming {
    async fn next_frame(&mut self, events: &mut SelectAll<Events>) -> Option<String> {
        loop {
            if let Some(frame) = self.frames.pop() {
                return Some(frame);
            }
            if self.frames.is_done() {
                return None;
            }
            let taken = tokio::select! {
                event = events.next() => match event {
                    Some((index, event)) => self.frames.take(index, event).map_err(ApiError::from),
                    None => Err(Fault::Stopped.into()),
                },
                () = self.abort.cancelled() => {
                    Err(ApiError::unavailable("the server is shutting down"))
                }
            };
            if let Err(error) = taken {
                self.frames.fail(&error.body());
            }
            if self.frames.is_done() {
                self.in_flight.end();
            }
        }
    }
}
