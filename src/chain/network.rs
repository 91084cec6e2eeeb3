//! Lists networks by name: their endpoints and the genesis block that must be behind them.

use super::timelock::{Drand, QUICKNET};
use crate::endpoint::shown;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Genesis of finney, the main network.
const FINNEY_GENESIS: [u8; 32] = [
    0x2f, 0x05, 0x55, 0xcc, 0x76, 0xfc, 0x28, 0x40, 0xa2, 0x5a, 0x6e, 0xa3, 0xb9, 0x63, 0x71, 0x46,
    0x80, 0x6f, 0x1f, 0x44, 0xb0, 0x90, 0xc1, 0x75, 0xff, 0xde, 0x2a, 0x7e, 0x5a, 0xb3, 0x6c, 0x03,
];
const FINNEY: [&str; 2] =
    ["wss://entrypoint-finney.opentensor.ai:443", "wss://lite.chain.opentensor.ai:443"];
const TEST: [&str; 1] = ["wss://test.finney.opentensor.ai:443"];
const LOCAL: [&str; 1] = ["ws://127.0.0.1:9944"];

/// A network of the Bittensor chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Network {
    /// The main network, whose tokens have value.
    Finney,
    /// The public test network.
    Test,
    /// A node of one's own.
    Local,
}

/// A network or an address that cannot be understood.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NetworkError {
    /// No network of that name.
    #[error("must be finney, test or local, got {0}")]
    Unknown(String),
    /// No address of a WebSocket.
    #[error("must begin with ws:// or wss://, got {0}")]
    Address(String),
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        match text {
            "finney" => Ok(Self::Finney),
            "test" => Ok(Self::Test),
            "local" => Ok(Self::Local),
            other => Err(NetworkError::Unknown(other.to_owned())),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Finney => "finney",
            Self::Test => "test",
            Self::Local => "local",
        })
    }
}

/// Where the chain is asked, and which chain it must be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoints {
    /// `ws://` or `wss://` addresses, the preferred one first.
    pub urls: Vec<String>,
    /// The genesis they must have; `None` allows any.
    pub genesis: Option<[u8; 32]>,
    /// How long an answer may take.
    pub timeout: Duration,
    /// How long no new block may come before the connection counts as broken: several block times.
    pub stall: Duration,
    /// How long to wait before a refused extrinsic is signed and sent anew.
    pub again: Duration,
    /// Whose rounds reveal committed weights.
    pub drand: Drand,
}

impl Endpoints {
    /// Those of a network; `urls` of one's own come in their place.
    ///
    /// # Errors
    /// When an address is not one of a WebSocket.
    pub fn new(network: Network, urls: &[String]) -> Result<Self, NetworkError> {
        let known: &[&str] = match network {
            Network::Finney => &FINNEY,
            Network::Test => &TEST,
            Network::Local => &LOCAL,
        };
        if let Some(bad) = urls.iter().find(|u| !u.starts_with("ws://") && !u.starts_with("wss://"))
        {
            return Err(NetworkError::Address(shown(bad)));
        }
        let urls = match urls {
            [] => known.iter().map(|u| (*u).to_owned()).collect(),
            own => own.to_vec(),
        };
        let genesis = (network == Network::Finney).then_some(FINNEY_GENESIS);
        let (timeout, stall) = (Duration::from_secs(30), Duration::from_secs(60));
        let again = Duration::from_secs(15);
        Ok(Self { urls, genesis, timeout, stall, again, drand: QUICKNET })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_give_endpoints_and_only_finney_is_pinned() {
        let of = |name: &str| Endpoints::new(name.parse().unwrap(), &[]).unwrap();
        assert!(of("finney").genesis.is_some() && of("finney").urls.len() > 1);
        assert!(of("test").genesis.is_none());
        assert_eq!(of("local").urls, ["ws://127.0.0.1:9944"]);
        let own = ["ws://127.0.0.1:1".to_owned()];
        let mine = Endpoints::new(Network::Finney, &own).unwrap();
        assert!(mine.urls == own && mine.genesis.is_some());
        let wrong = Endpoints::new(Network::Test, &["http://x/key".into()]).unwrap_err();
        assert_eq!(wrong.to_string(), "must begin with ws:// or wss://, got http://x");
        assert!(
            "main".parse::<Network>().unwrap_err().to_string().contains("finney, test or local")
        );
    }
}
