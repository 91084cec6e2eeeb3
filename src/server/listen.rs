//! Accepts connections up to a limit, limits how long each peer may take, and ends a connection
//! once its peer has left.

use super::connections::{Connections, Full, Peer, connections_max};
use super::door::access::is_open;
use super::error::ApiError;
use super::keeping::KeepingBody;
use super::router;
use super::settings::HttpLimits;
use super::state::ServerState;
use crate::clock::Clock;
use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{Request, Response};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use std::convert::Infallible;
use std::future::Future;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_io_timeout::TimeoutStream;

/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Headers of a request.
const HEADERS_MAX: usize = 100;
/// How long answers may still be written once all requests have ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait after a failed accept: mostly too many open files, which passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often a peer that has sent more than is read yet is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Unread bytes that a peer may have sent ahead of the answer to its request.
const AHEAD_BYTES_MAX: usize = 32 << 10;
/// Between two lines in the log about connections that were not taken.
const WARN_EVERY: Duration = Duration::from_secs(10);

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
    let most = connections_max(listeners.len());
    let accepting = listeners.into_iter().map(|(listener, app)| {
        accept_within(listener, app, limits, Connections::new(most), drained.clone())
    });
    join_all(accepting).await;
}

/// Serves `app` until `done` completes; each new connection gets the `limits` of its moment.
pub async fn accept(
    listener: TcpListener,
    app: Router,
    limits: impl Fn() -> HttpLimits,
    done: impl Future<Output = ()>,
) {
    accept_within(listener, app, limits, Connections::new(connections_max(1)), done).await;
}

/// Like [`accept`], within `connections`.
pub async fn accept_within(
    listener: TcpListener,
    app: Router,
    limits: impl Fn() -> HttpLimits,
    connections: Connections,
    done: impl Future<Output = ()>,
) {
    let graceful = GracefulShutdown::new();
    let mut refusals = Refusals { clock: Clock::system(), count: 0, warned: None };
    let accept = async {
        loop {
            let (socket, address) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(e) => {
                    tracing::warn!("cannot accept a connection: {e}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let limits = limits();
            let place = match connections.admit(address.ip(), limits.connections_per_address) {
                Ok(place) => place,
                Err(full) => {
                    refusals.refuse(socket, address, full);
                    continue;
                }
            };
            let peer = place.peer();
            let (connection, socket) = connection(socket, address, &app, peer.clone(), limits);
            let connection = graceful.watch(connection);
            tokio::spawn(async move {
                tokio::select! {
                    // A peer that breaks off or is too slow is not worth a log line.
                    ended = connection => if let Err(e) = ended {
                        tracing::debug!("connection ended: {e}");
                    },
                    () = gone(socket.as_ref().as_ref(), &peer) => tracing::debug!("a peer left"),
                    () = place.given_up() => tracing::debug!("an idle connection gave way"),
                }
            });
        }
    };
    tokio::select! {
        () = accept => {}
        () = done => {}
    }
    // A peer that has not taken the answer by then does not get it.
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, graceful.shutdown()).await;
}

type Connection = http1::Connection<TokioIo<Pin<Box<TimeoutStream<Socket>>>>, Answering>;

fn connection(
    socket: TcpStream,
    address: SocketAddr,
    app: &Router,
    peer: Peer,
    limits: HttpLimits,
) -> (Connection, Arc<OwnedReadHalf>) {
    // Tokens are small and must not wait for each other.
    let _ = socket.set_nodelay(true);
    let (read, write) = socket.into_split();
    let read = Arc::new(read);
    let mut socket = TimeoutStream::new(Socket { read: Arc::clone(&read), write });
    socket.set_write_timeout(Some(limits.write_time));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_time)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(
            TokioIo::new(Box::pin(socket)),
            Answering { app: app.clone(), address, peer },
        );
    (connection, read)
}

/// Completes once the peer has left, whatever it sent before that. Hyper reads on only where it has
/// nothing unread, so it would not notice before its answer is written.
async fn gone(socket: &TcpStream, peer: &Peer) {
    while let Ok(ready) = socket.ready(Interest::READABLE).await {
        if ready.is_read_closed() || (peer.is_answered() && has_too_much(socket).await) {
            return;
        }
        // More than is read yet: what comes after it does not wake us.
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether the peer has sent so much beyond its request that its leaving may be stuck behind it.
async fn has_too_much(socket: &TcpStream) -> bool {
    let mut unread = vec![0; AHEAD_BYTES_MAX];
    socket.peek(&mut unread).await.is_ok_and(|bytes| bytes == AHEAD_BYTES_MAX)
}

/// A socket whose state can be watched while it is read and written.
struct Socket {
    read: Arc<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let socket: &TcpStream = self.read.as_ref().as_ref();
        loop {
            ready!(socket.poll_read_ready(context))?;
            match socket.try_read_buf(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.write).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.write).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.write.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_shutdown(context)
    }
}

/// The routes, for one connection that learns how far each of its requests is.
struct Answering {
    app: Router,
    address: SocketAddr,
    peer: Peer,
}

impl hyper::service::Service<Request<Incoming>> for Answering {
    type Response = Response<KeepingBody<Body, Note>>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        // A client that uses open routes only and reads slowly may be disconnected for another one.
        let peer = (!is_open(request.uri().path())).then(|| self.peer.clone());
        let arrived = Note { peer: peer.clone(), note: Peer::arrived };
        let mut request = request.map(|body| KeepingBody { body, _kept: arrived });
        request.extensions_mut().insert(ConnectInfo(self.address));
        let answer = tower::Service::call(&mut self.app.clone(), request);
        let answered = Note { peer, note: Peer::answered };
        async move { Ok(answer.await?.map(|body| KeepingBody { body, _kept: answered })) }.boxed()
    }
}

/// Notes that a body is at its end, also where it is given up.
struct Note {
    peer: Option<Peer>,
    note: fn(&Peer),
}

impl Drop for Note {
    fn drop(&mut self) {
        if let Some(peer) = &self.peer {
            (self.note)(peer);
        }
    }
}

/// Connections that were not taken.
struct Refusals {
    clock: Clock,
    count: u64, // since the last line in the log
    warned: Option<Duration>,
}

impl Refusals {
    /// Says why, to the peer where it listens and to the operator now and then.
    fn refuse(&mut self, socket: TcpStream, address: SocketAddr, full: Full) {
        self.count += 1;
        let now = self.clock.elapsed();
        if self.warned.is_none_or(|at| now.saturating_sub(at) >= WARN_EVERY) {
            let count = std::mem::take(&mut self.count);
            tracing::warn!(ip = %address.ip(), count, "connections are refused: {full}");
            self.warned = Some(now);
        }
        let error = ApiError::unavailable(full.to_string());
        let body = serde_json::to_string(&error.body()).unwrap_or_default();
        let head = format!(
            "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nretry-after: 1\r\nconnection: close\r\n\r\n",
            body.len()
        );
        // A fresh socket has room for this. If it has not, closing it is enough.
        if let Ok(mut socket) = socket.into_std() {
            let _ = socket.write_all((head + &body).as_bytes());
        }
    }
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

/// A miner whose open routes others could reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the open routes of a miner must be on loopback, --host is {0}")]
pub struct OpenMiner(pub SocketAddr);

/// Whoever can reach an open listener can use it: a miner's must be on loopback.
///
/// # Errors
/// The rule and the address.
pub fn check_open(address: SocketAddr, is_open: bool, is_miner: bool) -> Result<(), OpenMiner> {
    if !is_open || address.ip().is_loopback() {
        return Ok(());
    }
    if is_miner {
        return Err(OpenMiner(address));
    }
    tracing::warn!(%address, "this server has no API keys and is not on loopback");
    Ok(())
}
