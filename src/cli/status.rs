//! Runs `status`: shows how a running miner stands on its subnet.

use super::Failure;
use super::out::outln;
use super::printable::printable;
use super::query::url;
use super::shared::{check_http, runtime};
use super::tables::bordered;
use crate::endpoint::{reasons, shown};
use crate::tls;
use clap::Args;
use serde_json::Value;
use std::time::Duration;

/// How long the miner may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// What to do where no miner answers.
const HINT: &str = "is `targon-engine serve` running, and is --url its open listener?";

/// Arguments of `status`.
#[derive(Args)]
pub(super) struct StatusArgs {
    /// The open listener of the miner: a URL, or `ip:port`.
    #[arg(long, env = "TARGON_URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Its API key, if it has keys; of several the first is used.
    #[arg(long, env = "TARGON_API_KEY", hide_env_values = true, value_delimiter = ',')]
    api_key: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &StatusArgs) -> Result<(), Failure> {
    let url = url(&args.url);
    check_http("url", &url)?;
    let status = runtime()?.block_on(ask(&url, args))?;
    if args.json {
        outln!("{status}");
    } else {
        print(&status);
    }
    Ok(())
}

async fn ask(address: &str, args: &StatusArgs) -> Result<Value, Failure> {
    tls::install();
    let client = reqwest::Client::builder().timeout(TIMEOUT).build().map_err(Failure::ours)?;
    let url = shown(address);
    let mut request = client.get(format!("{}/targon/status", address.trim_end_matches('/')));
    if let Some(key) = args.api_key.first() {
        request = request.bearer_auth(key);
    }
    let response = request.send().await.map_err(|e| {
        let why = reasons(&e.without_url());
        Failure::user(format!("{url} does not answer: {why}")).with_hint(Some(HINT))
    })?;
    let status = response.status();
    let other = |why: &str| {
        let what = format!("{url} answered {status}, which is not a miner's status: {why}");
        Failure::user(what).with_hint(Some(HINT))
    };
    let body: Value = response.json().await.map_err(|e| other(&reasons(&e.without_url())))?;
    if let Some(message) = body["error"]["message"].as_str() {
        return Err(Failure::user(format!("{url}: {}", printable(message))));
    }
    match body["hotkey"].is_string() {
        true => Ok(body),
        false => Err(other("it names no `hotkey`")),
    }
}

fn print(status: &Value) {
    for (label, key) in [
        ("hotkey", "hotkey"),
        ("subnet", "netuid"),
        ("uid", "uid"),
        ("stake, TAO", "stake_tao"),
        ("incentive", "incentive"),
        ("axon on chain", "axon"),
        ("axon refused", "axon_refused"),
        ("who may ask", "may_ask"),
        ("members", "members"),
        ("metagraph of block", "metagraph_block"),
        ("newest block", "block"),
        ("seconds since then", "block_age_seconds"),
        ("signed requests", "signed_requests"),
    ] {
        outln!("{label:<20}{}", text(&status[key]));
    }
    let columns = [
        "hotkey",
        "uid",
        "stake_tao",
        "requests",
        "running",
        "waiting",
        "models",
        "asked_seconds_ago",
    ];
    let header =
        ["validator", "uid", "stake", "requests", "running", "waiting", "wants", "seconds ago"];
    let mut table = bordered(header);
    let none = Vec::new();
    let validators = status["validators"].as_array().unwrap_or(&none);
    for validator in validators {
        table.add_row(columns.map(|key| text(&validator[key])));
    }
    if !validators.is_empty() {
        outln!("{table}");
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => printable(text),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(", "),
        Value::Object(map) => {
            let pair = |(key, value): (&String, &Value)| format!("{key} {}", text(value));
            map.iter().map(pair).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}
