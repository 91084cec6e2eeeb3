//! A miner that cheats, as a program, for showing what a validator says of it.
//!
//! It serves a model under a hotkey of a subnet in one of the ways of `common/dishonest.rs`, prints
//! where its open routes are, and runs until it is killed.

#[path = "../common/dishonest.rs"]
#[allow(unreachable_pub, reason = "tests use it as well")]
mod dishonest;

use dishonest::{Setup, Way};
use std::path::{Path, PathBuf};
use targon_engine::chain::keyfile::KeyFileError;
use targon_engine::chain::wallet::Wallet;

const USAGE: &str = "usage: dishonest-miner WAY --model NAME --path WEIGHTS --scratch DIRECTORY \
    --wallets DIRECTORY --wallet NAME --hotkey NAME --chain URL --ip ADDRESS [--threads N]\n\
    ways: int4, slow=MILLISECONDS, spoof, spoof=BITS (2 to 8), replay";

fn read(mut args: impl Iterator<Item = String>) -> Result<Setup, String> {
    let way: Way = args.next().ok_or("a way is missing")?.parse()?;
    let mut given = std::collections::BTreeMap::new();
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag} wants a value"))?;
        given.insert(flag, value);
    }
    let mut take = |flag: &str| given.remove(flag).ok_or_else(|| format!("{flag} is missing"));
    let (wallets, wallet, hotkey) = (take("--wallets")?, take("--wallet")?, take("--hotkey")?);
    let ask = |_: &Path| Err(KeyFileError::NotAsked("must not be encrypted".into()));
    let signer = Wallet::new(Path::new(&wallets), &wallet, &hotkey)
        .and_then(|wallet| wallet.keypair(ask))
        .map_err(|e| e.to_string())?;
    let number = |what: &str, text: String| format!("{what}: not in range: {text}");
    let (ip, threads) = (take("--ip")?, take("--threads").unwrap_or_else(|_| "2".into()));
    let setup = Setup {
        way,
        model: take("--model")?,
        path: PathBuf::from(take("--path")?),
        scratch: PathBuf::from(take("--scratch")?),
        threads: threads.parse().map_err(|_| number("--threads", threads))?,
        signer,
        chain: take("--chain")?,
        ip: ip.parse().map_err(|_| number("--ip", ip))?,
    };
    match given.keys().next() {
        Some(flag) => Err(format!("unknown argument {flag}")),
        None => Ok(setup),
    }
}

#[tokio::main]
async fn main() {
    let setup = read(std::env::args().skip(1)).unwrap_or_else(|e| {
        eprintln!("{e}\n{USAGE}");
        std::process::exit(1)
    });
    if let Err(e) = dishonest::run(setup, |url| println!("{url}")).await {
        eprintln!("error: {e}");
        std::process::exit(2)
    }
}
