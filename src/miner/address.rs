//! Finds out where others reach this machine.

use crate::endpoint::{reasons, shown};
use crate::tls;
use anyhow::{anyhow, bail};
use reqwest::Client;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Who tells a machine its public address, as the official tools ask it.
pub const CHECK_IP: &str = "https://checkip.amazonaws.com";
/// How long that may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an answer; no more of it is read.
const ANSWER_BYTES_MAX: usize = 256;

/// The address to announce: the given one, else what `check_ip` says.
///
/// # Errors
/// When nobody says, in words.
pub async fn external(
    given: Option<IpAddr>,
    port: u16,
    check_ip: &str,
) -> anyhow::Result<SocketAddr> {
    let ip = match given {
        Some(ip) => ip,
        None => ask(check_ip).await.map_err(|why| {
            anyhow!("the public address of this machine cannot be found out: {why}")
        })?,
    };
    Ok(SocketAddr::new(ip, port))
}

/// Whether an address can be announced.
///
/// # Errors
/// When it is that of no machine.
pub fn check(ip: IpAddr) -> anyhow::Result<()> {
    match ip.to_canonical().is_unspecified() {
        true => bail!("must be an address that others can reach, got {ip}"),
        false => Ok(()),
    }
}

/// Whether only machines nearby can reach an address: validators cannot.
pub fn is_private(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.is_private() || v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

async fn ask(url: &str) -> anyhow::Result<IpAddr> {
    tls::install();
    let client = Client::builder().timeout(TIMEOUT).build()?;
    let asked = client.get(url).send().await.and_then(reqwest::Response::error_for_status);
    let mut response =
        asked.map_err(|e| anyhow!("{}: {}", shown(url), reasons(&e.without_url())))?;
    let mut answer = Vec::new();
    while let Some(part) = response.chunk().await.map_err(reqwest::Error::without_url)? {
        answer.extend_from_slice(&part);
        if answer.len() > ANSWER_BYTES_MAX {
            let url = shown(url);
            return Err(anyhow!("{url} answered more than {ANSWER_BYTES_MAX} bytes"));
        }
    }
    let text = String::from_utf8_lossy(&answer);
    let (text, url) = (text.trim(), shown(url));
    let ip = text.parse().map_err(|_| anyhow!("{url} answered {text:?}, no IP address"))?;
    check(ip).map_err(|rule| anyhow!("what {url} answers {rule}"))?;
    Ok(ip)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::body::Body;
    use axum::routing::get;

    #[test]
    fn addresses_that_nobody_or_only_neighbours_reach_are_known() {
        let of = |text: &str| text.parse::<IpAddr>().unwrap();
        for none in ["0.0.0.0", "::", "::ffff:0.0.0.0"] {
            assert!(check(of(none)).is_err(), "{none}");
        }
        for near in ["127.0.0.2", "10.1.2.3", "169.254.0.1", "::1", "fe80::1", "::ffff:10.0.0.1"] {
            assert!(is_private(of(near)) && check(of(near)).is_ok(), "{near}");
        }
        for far in ["203.0.113.7", "2001:db8::1"] {
            assert!(!is_private(of(far)) && check(of(far)).is_ok(), "{far}");
        }
    }

    /// An answer that never ends.
    async fn endless() -> Body {
        let part = || Ok::<_, std::io::Error>("203.0.113.7 ");
        Body::from_stream(tokio_stream::iter(std::iter::repeat_with(part)))
    }

    #[tokio::test]
    async fn a_given_address_wins_and_nonsense_is_an_error() {
        let app = Router::new()
            .route("/good", get(|| async { "203.0.113.7\n" }))
            .route("/endless", get(endless))
            .route("/nowhere", get(|| async { "0.0.0.0" }))
            .route("/bad", get(|| async { "<html>" }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        let of = |path: &str| format!("{base}{path}");
        let given = Some(IpAddr::from([127, 0, 0, 2]));
        let address = external(given, 8091, &of("/bad")).await.unwrap();
        assert_eq!(address.to_string(), "127.0.0.2:8091");
        let address = external(None, 1, &of("/good")).await.unwrap();
        assert_eq!(address.to_string(), "203.0.113.7:1");
        let error = external(None, 1, &of("/bad")).await.unwrap_err().to_string();
        assert!(error.contains("no IP address"), "{error}");
        let error = external(None, 1, &of("/nowhere")).await.unwrap_err().to_string();
        assert!(
            error.ends_with("must be an address that others can reach, got 0.0.0.0"),
            "{error}"
        );
        let error = external(None, 1, &of("/endless")).await.unwrap_err().to_string();
        assert!(error.contains("answered more than 256 bytes"), "{error}");
        assert!(external(None, 1, &of("/none")).await.unwrap_err().to_string().contains("404"));
    }
}
