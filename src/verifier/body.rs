//! Reads bodies: each within a time and a size, and all of them within a limit of bytes.

use super::reply::VerifierRefusal;
use crate::server::door::access::announced;
use axum::body::Body;
use axum::http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of all bodies that are held at once.
const HELD_BYTES_MAX: usize = 1 << 30;
/// Bytes for each permit of that.
const UNIT: usize = 1 << 10;
/// Bytes beyond the limit that are read and thrown away: a caller that is not heard to the end may
/// never read its answer, and a peer that makes it too long would be spared.
const DISCARDED_BYTES_MAX: usize = 256 << 20;

/// The room for bodies.
#[derive(Clone)]
pub(super) struct BodyMemory(Arc<Semaphore>);

/// A body, and its part of the room until dropped.
pub(super) struct ReceivedBody {
    /// What arrived; `None` where it is more than the limit.
    pub(super) bytes: Option<Vec<u8>>,
    _room: OwnedSemaphorePermit,
}

impl BodyMemory {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(HELD_BYTES_MAX / UNIT)))
    }

    /// Reads a body of at most `most` bytes that must arrive within `time`.
    pub(super) async fn read(
        &self,
        headers: &HeaderMap,
        body: Body,
        (most, time): (usize, Duration),
    ) -> Result<ReceivedBody, VerifierRefusal> {
        let room = announced(headers).unwrap_or(most).min(most).min(HELD_BYTES_MAX).div_ceil(UNIT);
        let room = Arc::clone(&self.0).try_acquire_many_owned(room as u32).map_err(|_| {
            VerifierRefusal::busy(format!(
                "{HELD_BYTES_MAX} bytes of bodies are held already, the limit"
            ))
        })?;
        let mut arrived = Arrived { kept: Vec::new(), count: 0, most };
        let is_over = |arrived: &Arrived| arrived.count > most;
        match tokio::time::timeout(time, arrived.collect(body)).await {
            Ok(Err(e)) => {
                let what = format!("the body cannot be read: {e}");
                return Err(VerifierRefusal::detail(StatusCode::BAD_REQUEST, what));
            }
            Err(_) if !is_over(&arrived) => {
                let what = format!("the body must arrive within {time:?}");
                return Err(VerifierRefusal::detail(StatusCode::REQUEST_TIMEOUT, what));
            }
            Ok(Ok(())) | Err(_) => {}
        }
        let bytes = (!is_over(&arrived)).then_some(arrived.kept);
        Ok(ReceivedBody { bytes, _room: room })
    }
}

struct Arrived {
    kept: Vec<u8>,
    count: usize,
    most: usize,
}

impl Arrived {
    async fn collect(&mut self, mut body: Body) -> Result<(), axum::Error> {
        let end = self.most.saturating_add(DISCARDED_BYTES_MAX);
        while self.count <= end
            && let Some(frame) = body.frame().await
        {
            let Ok(data) = frame?.into_data() else { continue };
            self.count = self.count.saturating_add(data.len());
            match self.count <= self.most {
                true => self.kept.extend_from_slice(&data),
                false => self.kept = Vec::new(),
            }
        }
        Ok(())
    }
}
