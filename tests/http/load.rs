//! Many streams at once, a third of them with clients that misbehave: afterwards nothing is left.

use crate::common;
use crate::common::Noise;
use crate::common::site::{COMPLETION, completion, site};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
use targon_engine::engine::Options;
use targon_engine::server::listen::serve;
use targon_engine::server::settings::{HttpLimits, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

const STREAMS: usize = 64;
const ROUNDS: usize = 4;
const TOKENS: usize = 40;

/// What a client does with its stream.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Client {
    /// Reads to the end.
    Whole,
    /// Reads to the end in small pieces with pauses.
    Slow,
    /// Goes away after some bytes.
    Leaves(usize),
    /// Closes its sending side at once and reads on.
    HalfClosed,
    /// Never reads, and never leaves.
    Stuck,
}

impl Client {
    fn of(noise: &mut Noise) -> Self {
        match noise.below(10) {
            0 => Self::Slow,
            1 | 2 => Self::Leaves(noise.below(6_000)),
            3 => Self::HalfClosed,
            4 => Self::Stuck,
            _ => Self::Whole,
        }
    }
}

async fn open(address: SocketAddr, body: &Value, receive_buffer: Option<u32>) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    if let Some(bytes) = receive_buffer {
        socket.set_recv_buffer_size(bytes).unwrap();
    }
    let mut stream = socket.connect(address).await.unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {COMPLETION} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    stream
}

/// Plays a client; returns the chunks with tokens, where it reads to the end.
async fn play(client: Client, address: SocketAddr, seed: u32) -> Option<usize> {
    let mut body = completion(json!({"stream": true, "seed": seed, "prompt": "x".repeat(40)}));
    body["max_tokens"] = json!(TOKENS);
    let mut text = String::new();
    match client {
        Client::Whole => {
            let mut stream = open(address, &body, None).await;
            stream.read_to_string(&mut text).await.unwrap();
        }
        Client::Slow => {
            let mut stream = open(address, &body, None).await;
            let mut piece = [0; 700];
            loop {
                let read = stream.read(&mut piece).await.unwrap();
                if read == 0 {
                    break;
                }
                text.push_str(&String::from_utf8_lossy(&piece[..read]));
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        Client::Leaves(bytes) => {
            let mut stream = open(address, &body, None).await;
            let mut some = vec![0; bytes];
            let _ = stream.read_exact(&mut some).await;
            return None;
        }
        Client::HalfClosed => {
            let mut stream = open(address, &body, None).await;
            stream.shutdown().await.unwrap();
            let _ = stream.read_to_string(&mut text).await;
            return None;
        }
        Client::Stuck => {
            // More than fits in the buffers of both sides, so that the server has to wait.
            body["max_tokens"] = json!(450);
            body["logprobs"] = json!(20);
            let stream = open(address, &body, Some(4096)).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            drop(stream);
            return None;
        }
    }
    assert!(text.contains("data: [DONE]"), "{text}");
    Some(text.matches("\"token_ids\"").count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_after_clients_that_leave_stall_and_half_close() {
    let options = Options {
        blocks: 512,
        sequences_max: 32, // half of the streams wait
        ..common::options()
    };
    let site = site(options);
    let limits = HttpLimits { write_time: Duration::from_millis(500), ..HttpLimits::default() };
    site.state.set(Settings { limits, ..Settings::default() });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, site.state.clone(), std::future::pending(), Duration::ZERO));

    let mut noise = Noise(11);
    let mut whole = 0;
    for round in 0..ROUNDS {
        let mut clients = JoinSet::new();
        for i in 0..STREAMS {
            let client = Client::of(&mut noise);
            clients.spawn(play(client, address, (round * STREAMS + i) as u32));
        }
        while let Some(chunks) = clients.join_next().await {
            if let Some(chunks) = chunks.unwrap() {
                assert_eq!(chunks, TOKENS, "one chunk for each token");
                whole += 1;
            }
        }
    }
    assert!(whole > STREAMS * ROUNDS / 3, "{whole}");
    for _ in 0..500 {
        let load = site.engine.stats().snapshot().load;
        if load.running + load.waiting + load.blocks_used + site.state.in_flight() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let snapshot = site.engine.stats().snapshot();
    let load = snapshot.load;
    assert_eq!((load.running, load.waiting, load.blocks_used), (0, 0, 0), "{snapshot:?}");
    assert_eq!(site.state.in_flight(), 0);
    assert_eq!(snapshot.faults, 0);
    // A client that closes before its request was read is never submitted.
    let ended = snapshot.finished + snapshot.aborted;
    assert!(ended <= (STREAMS * ROUNDS) as u64 && snapshot.aborted > 0, "{snapshot:?}");
    assert!(snapshot.finished >= whole as u64, "{snapshot:?}");
}
