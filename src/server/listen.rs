//! Connections: accepted up to a limit, each with limits on how long its peer may take.

use super::router;
use super::settings::Limits;
use super::state::ServerState;
use axum::Router;
use axum::extract::{ConnectInfo, Request};
use axum::response::Response;
use futures_util::FutureExt;
use futures_util::future::join_all;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tower::Service;

/// Open connections; more wait in the system's queue.
pub const CONNECTIONS_MAX: usize = 4096;
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Headers of a request.
const HEADERS_MAX: usize = 100;
/// How long answers may still be written once all requests have ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait after a failed accept: mostly too many open files, which passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stop` completes, then refuses new requests, lets running ones end for up to
/// `drain_timeout`, and aborts the rest.
pub async fn serve(
    listener: TcpListener,
    state: ServerState,
    stop: impl Future<Output = ()> + Send + 'static,
    drain_timeout: Duration,
) {
    let app = router(state.clone());
    serve_all(vec![(listener, app)], state, stop, drain_timeout).await;
}

/// Like [`serve`] for several listeners, each with routes of its own over the same state.
pub async fn serve_all(
    listeners: Vec<(TcpListener, Router)>,
    state: ServerState,
    stop: impl Future<Output = ()> + Send + 'static,
    drain_timeout: Duration,
) {
    let drained = async {
        stop.await;
        drain(&state, drain_timeout).await;
    };
    let drained = drained.boxed().shared();
    let limits = || state.settings().limits;
    let accepting = listeners.into_iter().map(|(l, app)| accept(l, app, limits, drained.clone()));
    join_all(accepting).await;
}

/// Serves `app` until `done` completes; each new connection gets the `limits` of its moment.
pub async fn accept(
    listener: TcpListener,
    app: Router,
    limits: impl Fn() -> Limits,
    done: impl Future<Output = ()>,
) {
    let graceful = GracefulShutdown::new();
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let accept = async {
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let (socket, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(e) => {
                    tracing::warn!("cannot accept a connection: {e}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let connection = graceful.watch(connection(socket, peer, &app, limits()));
            tokio::spawn(async move {
                // A peer that breaks off or is too slow is no event of ours.
                if let Err(e) = connection.await {
                    tracing::debug!("connection ended: {e}");
                }
                drop(slot);
            });
        }
    };
    tokio::select! {
        () = accept => {}
        () = done => {}
    }
    // Whoever has not taken the answer by then does not get it.
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, graceful.shutdown()).await;
}

type Connection = http1::Connection<TokioIo<std::pin::Pin<Box<TimeoutStream<TcpStream>>>>, Served>;

/// The routes for one peer, whose requests carry its address.
struct Served {
    app: Router,
    peer: SocketAddr,
}

impl hyper::service::Service<Request<Incoming>> for Served {
    type Response = Response;
    type Error = Infallible;
    type Future = <Router as Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(ConnectInfo(self.peer));
        // A router is always ready.
        self.app.clone().call(request)
    }
}

fn connection(socket: TcpStream, peer: SocketAddr, app: &Router, limits: Limits) -> Connection {
    // Tokens are small and must not wait for each other.
    let _ = socket.set_nodelay(true);
    let mut socket = TimeoutStream::new(socket);
    socket.set_write_timeout(Some(limits.write_time));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_time)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(Box::pin(socket)), Served { app: app.clone(), peer })
}

async fn drain(state: &ServerState, timeout: Duration) {
    state.drain();
    tracing::info!(requests = state.in_flight(), "draining");
    let idle = async {
        while state.in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(timeout, idle).await.is_err() {
        tracing::warn!(requests = state.in_flight(), "aborting what still runs");
        state.abort();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
