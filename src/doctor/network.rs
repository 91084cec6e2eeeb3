//! Examines the clock, ports, and the services that are asked over HTTP.

use super::{Finding, Level};
use crate::chain::epistula::WINDOW_MS;
use crate::clock::Clock;
use crate::endpoint::shown;
use crate::miner::address::is_private;
use crate::server::door::access::REQUEST_ID;
use crate::tls;
use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

/// How long a service may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection to this machine's own public address may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// The id of the request that asks who listens.
const OWN_ID: &str = "targon-engine-doctor";
/// Bytes of the answer to it.
const OWN_ANSWER_MAX: usize = 4 << 10;
/// A `Date` header counts whole seconds, and an answer may be a second old.
const DATE_STEP_MS: i64 = 1_000;
/// A skew from which on some signatures arrive too late: half of the window.
const SKEW_WARNING_MS: i64 = WINDOW_MS as i64 / 4;
const SKEW_FAULT_MS: i64 = WINDOW_MS as i64 / 2;

/// Asks `url` and looks at its answer's status and date.
pub async fn service(topic: &str, url: &str, clock: &Clock) -> Vec<Finding> {
    tls::install();
    let shown = shown(url);
    let client = match Client::builder().timeout(TIMEOUT).build() {
        Ok(client) => client,
        Err(e) => {
            let fault = Finding::new(topic, Level::Fault, format!("no HTTP client: {e}"));
            return vec![fault.hint("install the package ca-certificates")];
        }
    };
    let before = clock.unix_ms();
    let response = match client.get(url).send().await {
        Ok(response) => response,
        Err(e) => {
            let fact = format!("{shown} cannot be reached: {}", root_cause(&e));
            let unreached = Finding::new(topic, Level::Warning, fact).hint("is there a proxy?");
            return vec![unreached, uncompared(&format!("{shown} cannot be reached"))];
        }
    };
    let after = clock.unix_ms();
    let status = response.status();
    let fact = format!("{shown} answers {status} after {} ms", after.saturating_sub(before));
    let level = match status.is_server_error() || status == StatusCode::UNAUTHORIZED {
        true => Level::Warning,
        false => Level::Ok,
    };
    let mut findings = vec![Finding::new(topic, level, fact)];
    let date = response.headers().get(reqwest::header::DATE).and_then(|d| d.to_str().ok());
    findings.push(match date.and_then(date_ms) {
        Some(theirs) => {
            let ours = i64::try_from(before / 2 + after / 2).unwrap_or(i64::MAX);
            skew(ours - theirs - DATE_STEP_MS / 2, &shown)
        }
        None => uncompared(&format!("{shown} says no time")),
    });
    findings
}

/// What is said where nobody told the time.
pub fn uncompared(why: &str) -> Finding {
    let fact = format!("this clock was compared with no other: {why}");
    let hint = format!(
        "signatures hold {} s: see that the clock is synchronised (timedatectl)",
        WINDOW_MS / 1000
    );
    Finding::new("clock", Level::Warning, fact).hint(hint)
}

/// The reason that lies deepest: the outer ones only say that something failed.
fn root_cause(e: &dyn std::error::Error) -> String {
    let mut cause = e;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Milliseconds since 1970 of a `Date` header.
fn date_ms(text: &str) -> Option<i64> {
    let date = jiff::fmt::rfc2822::parse(text).ok()?;
    Some(date.timestamp().as_millisecond())
}

/// `ours` minus theirs, in milliseconds.
fn skew(ahead_ms: i64, url: &str) -> Finding {
    let seconds = ahead_ms as f64 / 1000.0;
    let direction = if ahead_ms < 0 { "behind" } else { "ahead of" };
    let fact = format!("this clock is {:.1} s {direction} that of {url}", seconds.abs());
    let window = WINDOW_MS / 1000;
    let hint =
        format!("signatures hold {window} s: synchronise the clock (chrony, systemd-timesyncd)");
    match ahead_ms.abs() - DATE_STEP_MS / 2 {
        i64::MIN..SKEW_WARNING_MS => Finding::new("clock", Level::Ok, fact),
        SKEW_WARNING_MS..SKEW_FAULT_MS => Finding::new("clock", Level::Warning, fact).hint(hint),
        _ => Finding::new("clock", Level::Fault, fact).hint(hint),
    }
}

/// Whether `address` can be listened on; `flag` names another port.
pub async fn port(topic: &str, flag: &str, address: SocketAddr) -> Finding {
    match TcpListener::bind(address).await {
        Ok(_) => Finding::new(topic, Level::Ok, format!("{address} is free")),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => taken(topic, flag, address).await,
        Err(e) => Finding::new(topic, Level::Fault, format!("cannot listen on {address}: {e}"))
            .hint(format!("name a port by {flag} that this user may listen on")),
    }
}

/// Who has a port that is taken: a server of this program, or another.
async fn taken(topic: &str, flag: &str, address: SocketAddr) -> Finding {
    let port = address.port();
    if is_own(address).await {
        let fact = format!("port {port} is taken by a targon-engine that runs ({address})");
        return Finding::new(topic, Level::Note, fact)
            .hint(format!("stop it before you start another, or name another port by {flag}"));
    }
    let fact = format!("port {port} is taken by another program ({address}): `serve` cannot start");
    Finding::new(topic, Level::Warning, fact)
        .hint(format!("`ss -ltnp` says by which; stop it, or name another port by {flag}"))
}

/// Whether a server of this program listens there. An open listener says its canon; a signed one
/// sends the request's id back with the refusal of a request without a signature.
async fn is_own(address: SocketAddr) -> bool {
    tls::install();
    // A listener on all addresses is asked on this machine.
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let url = format!("http://{}/version", SocketAddr::new(ip, address.port()));
    let client = Client::builder().timeout(CONNECT_TIMEOUT).no_proxy();
    let Ok(client) = client.redirect(Policy::none()).build() else { return false };
    let asked = client.get(url).header(REQUEST_ID, OWN_ID).send().await;
    let Ok(mut answer) = asked else { return false };
    let is_echoed = answer.headers().get(REQUEST_ID).is_some_and(|id| id == OWN_ID);
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = answer.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > OWN_ANSWER_MAX {
            return false;
        }
    }
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    is_echoed && (body["canon"].is_string() || body["detail"].is_string())
}

/// Whether this machine's announced address leads back to it; only meaningful while it serves.
pub async fn reachable(address: SocketAddr) -> Finding {
    let connecting = TcpStream::connect(address);
    let why = match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(Ok(_)) => {
            let fact = format!("{address} takes connections");
            return Finding::new("public address", Level::Ok, fact);
        }
        Ok(Err(e)) => e.to_string(),
        Err(_) => format!("no answer in {} s", CONNECT_TIMEOUT.as_secs()),
    };
    let fact = format!("{address} takes no connection from here: {why}");
    Finding::new("public address", Level::Note, fact).hint(
        "open the port in firewall and router; some routers never lead back, so ask from another \
         machine: targon-engine query --address",
    )
}

/// Says what an announced address is worth.
pub fn announced(ip: IpAddr) -> Option<Finding> {
    is_private(ip).then(|| {
        let fact = format!("{ip} lies in a private network: no validator reaches it");
        Finding::new("public address", Level::Warning, fact).hint("give it by --axon.external_ip")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read_and_skews_are_found() {
        assert_eq!(date_ms("Thu, 26 Nov 2026 17:40:00 GMT"), Some(1_795_714_800_000));
        assert_eq!(date_ms("yesterday"), None);
        for (ahead, level) in [
            (0, Level::Ok),
            (-2_400, Level::Ok),
            (2_600, Level::Warning),
            (-4_400, Level::Warning),
            (4_600, Level::Fault),
            (-100_000_000, Level::Fault),
        ] {
            let finding = skew(ahead, "x");
            assert_eq!(finding.level, level, "{ahead}: {finding:?}");
            assert_eq!(finding.hint.is_some(), level > Level::Ok);
        }
        assert!(skew(-4_600, "x").fact.contains("4.6 s behind"));
    }

    #[tokio::test]
    async fn ports_and_services_are_tried() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let taken = listener.local_addr().unwrap();
        let held = port("axon port", "--axon.port", taken).await;
        assert_eq!(held.level, Level::Warning, "{held:?}");
        assert!(held.fact.contains(&format!("port {} is taken by another", taken.port())));
        assert!(held.hint.unwrap().contains("--axon.port"));
        assert_eq!(reachable(taken).await.level, Level::Ok);
        let app = axum::Router::new().route(
            "/",
            axum::routing::get(|| async {
                ([(axum::http::header::DATE, "Thu, 26 Nov 2026 17:40:00 GMT")], "")
            }),
        );
        tokio::spawn(async move { axum::serve(listener, app).await });
        let clock = Clock::manual(1_795_714_800_000 + 9_000);
        let findings = service("hub", &format!("http://{taken}/"), &clock).await;
        assert_eq!(findings[0].level, Level::Ok, "{findings:?}");
        assert_eq!(findings[1].level, Level::Fault, "{findings:?}");
        let refused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert_eq!(port("axon port", "--axon.port", refused).await.level, Level::Ok);
        assert_eq!(reachable(refused).await.level, Level::Note);
        let nobody = service("hub", &format!("http://{refused}/"), &clock).await;
        let levels: Vec<_> = nobody.iter().map(|f| (f.topic.as_str(), f.level)).collect();
        assert_eq!(levels, [("hub", Level::Warning), ("clock", Level::Warning)], "{nobody:?}");
    }

    #[test]
    fn private_addresses_are_told() {
        assert!(announced([192, 168, 1, 2].into()).is_some());
        assert!(announced([203, 0, 113, 7].into()).is_none());
    }
}
