//! A fake subtensor node as a program, for trying commands out without a chain.
//!
//! It prints its address, then as lines of JSON each extrinsic that it accepts and all weights that
//! it stores, and makes blocks until it is killed. Commits of weights can be opened only where they
//! are encrypted to the fake's own drand; those to quicknet wait, and are forgotten at their epoch.

#[path = "../common/node.rs"]
mod node;

use node::{Axon, FakeNode, Neuron, Subnet};
use serde_json::json;
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::str::FromStr;
use std::time::Duration;
use targon_engine::chain::keys::Hotkey;

const USAGE: &str = "usage: fake-node [--port N] [--netuid N] [--block-ms N] \
    [--tempo BLOCKS] [--commit-reveal 0|1] [--weights-rate-limit BLOCKS] \
    [--neuron SS58_HOTKEY,STAKE_TAO,PERMIT(0|1)[,IPV4:PORT]]...";
/// How often new extrinsics are looked for.
const LOOK: Duration = Duration::from_millis(50);

struct Options {
    port: u16,
    netuid: u16,
    block: Duration,
    tempo: u16,
    commit_reveal: bool,
    weights_rate_limit: u64,
    neurons: Vec<Neuron>,
}

impl Options {
    fn read(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            port: 0,
            netuid: 4,
            block: Duration::from_millis(1000),
            tempo: 360,
            commit_reveal: false,
            weights_rate_limit: 100,
            neurons: Vec::new(),
        };
        while let Some(name) = args.next() {
            let value = args.next().ok_or_else(|| format!("{name} wants a value"))?;
            match name.as_str() {
                "--port" => options.port = number(&value)?,
                "--netuid" => options.netuid = number(&value)?,
                "--block-ms" => options.block = Duration::from_millis(number(&value)?),
                "--tempo" => options.tempo = number(&value)?,
                "--commit-reveal" => options.commit_reveal = number::<u8>(&value)? != 0,
                "--weights-rate-limit" => options.weights_rate_limit = number(&value)?,
                "--neuron" => options.neurons.push(neuron(&value)?),
                _ => return Err(format!("unknown argument {name}")),
            }
        }
        Ok(options)
    }
}

fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("not a number in range: {text}"))
}

fn neuron(text: &str) -> Result<Neuron, String> {
    let parts: Vec<&str> = text.split(',').collect();
    let (hotkey, stake, permit, axon) = match parts[..] {
        [hotkey, stake, permit] => (hotkey, stake, permit, None),
        [hotkey, stake, permit, axon] => (hotkey, stake, permit, Some(axon)),
        _ => return Err(format!("a neuron is SS58_HOTKEY,STAKE_TAO,PERMIT, got {text}")),
    };
    let hotkey = hotkey.parse::<Hotkey>().map_err(|e| format!("{hotkey}: {e}"))?;
    let tao: f64 = number(stake)?;
    let mut neuron = Neuron::new(hotkey.0);
    neuron.stake_rao = (tao * 1e9).round() as u64;
    neuron.permit = number::<u8>(permit)? != 0;
    let address = axon.map(number::<SocketAddrV4>).transpose()?;
    neuron.axon = address.map(|address| Axon::new(*address.ip(), address.port()));
    Ok(neuron)
}

#[tokio::main]
async fn main() {
    let options = Options::read(std::env::args().skip(1)).unwrap_or_else(|e| {
        eprintln!("{e}\n{USAGE}");
        std::process::exit(1)
    });
    let mut subnet = Subnet::new(options.netuid, options.neurons);
    (subnet.tempo, subnet.commit_reveal) = (options.tempo, options.commit_reveal);
    subnet.weights_rate_limit = options.weights_rate_limit;
    let node = FakeNode::start_on(options.port, subnet).await;
    println!("{}", node.url());
    node.auto_blocks(options.block);
    let (mut shown, mut stored) = (0, BTreeMap::new());
    loop {
        let calls = node.calls();
        for call in &calls[shown..] {
            let signer = Hotkey(call.signer).to_string();
            let (pallet, name, args) = (&call.pallet, &call.name, &call.args);
            println!("{}", json!({"signer": signer, "pallet": pallet, "name": name, "args": args}));
        }
        shown = calls.len();
        let weights = node.subnet(|s| s.weights.clone());
        for ((index, uid), values) in &weights {
            if stored.get(&(*index, *uid)) != Some(values) {
                println!("{}", json!({"storage_index": index, "uid": uid, "weights": values}));
            }
        }
        stored = weights;
        tokio::time::sleep(LOOK).await;
    }
}
