//! The methods that clients call.

use super::chain::{Block, Chain, Fault, Outbox};
use super::{apis, metadata};
use serde_json::{Value as Json, json};
use std::ops::Bound;
use subxt::ext::codec::{self, Decode, Encode};
use subxt::utils::to_hex;
use targon_engine::chain::keys::Hotkey;

static NULL: Json = Json::Null;

const METHODS: [&str; 32] = [
    "account_nextIndex",
    "author_submitAndWatchExtrinsic",
    "author_submitExtrinsic",
    "author_unwatchExtrinsic",
    "chain_getBlock",
    "chain_getBlockHash",
    "chain_getFinalizedHead",
    "chain_getHead",
    "chain_getHeader",
    "chain_subscribeAllHeads",
    "chain_subscribeFinalizedHeads",
    "chain_subscribeNewHeads",
    "chain_unsubscribeAllHeads",
    "chain_unsubscribeFinalizedHeads",
    "chain_unsubscribeNewHeads",
    "rpc_methods",
    "state_call",
    "state_getKeysPaged",
    "state_getMetadata",
    "state_getRuntimeVersion",
    "state_getStorage",
    "state_getStorageAt",
    "state_queryStorageAt",
    "state_subscribeRuntimeVersion",
    "state_unsubscribeRuntimeVersion",
    "system_accountNextIndex",
    "system_chain",
    "system_chainType",
    "system_health",
    "system_name",
    "system_properties",
    "system_version",
];

/// Answers one request; `None` where it wants no answer.
pub fn answer(chain: &mut Chain, text: &str, outbox: &Outbox) -> Option<String> {
    let Ok(request) = serde_json::from_str::<Json>(text) else {
        let error = json!({"code": -32700, "message": "Parse error"});
        return Some(json!({"jsonrpc": "2.0", "id": null, "error": error}).to_string());
    };
    let method = request["method"].as_str().unwrap_or_default();
    *chain.counts.entry(method.to_owned()).or_default() += 1;
    let params = request["params"].as_array().map_or(&[][..], Vec::as_slice);
    let result = call(chain, method, Params(params), outbox);
    let id = request.get("id")?;
    let answer = match result {
        Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
        Err(Fault { code, message, data: None }) => {
            json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}})
        }
        Err(Fault { code, message, data: Some(data) }) => {
            let error = json!({"code": code, "message": message, "data": data});
            json!({"jsonrpc": "2.0", "id": id, "error": error})
        }
    };
    Some(answer.to_string())
}

type Answer = Result<Json, Fault>;

fn call(chain: &mut Chain, method: &str, params: Params, outbox: &Outbox) -> Answer {
    if !METHODS.contains(&method) {
        return Err(Fault::new(-32601, "Method not found"));
    }
    match method.split_once('_') {
        Some(("account", _)) => system(chain, "accountNextIndex", params),
        Some(("author", name)) => author(chain, name, params, outbox),
        Some(("chain", name)) => blocks(chain, name, params, outbox),
        Some(("state", name)) => state(chain, name, params, outbox),
        Some(("system", name)) => system(chain, name, params),
        _ => Ok(json!({"methods": METHODS})),
    }
}

fn author(chain: &mut Chain, name: &str, params: Params, outbox: &Outbox) -> Answer {
    match name {
        "submitExtrinsic" => {
            let hash = chain.submit(params.bytes(0)?, None)?;
            Ok(to_hex(hash).into())
        }
        "submitAndWatchExtrinsic" => {
            let bytes = params.bytes(0)?;
            let watcher = chain.subscriber("author_extrinsicUpdate", outbox);
            let id = watcher.id.clone();
            chain.submit(bytes, Some(watcher))?;
            Ok(id.into())
        }
        // Watchers end with their extrinsics; nothing is kept for them.
        _ => Ok(true.into()),
    }
}

fn blocks(chain: &mut Chain, name: &str, params: Params, outbox: &Outbox) -> Answer {
    let notice = match name {
        "subscribeAllHeads" => "chain_allHead",
        "subscribeFinalizedHeads" => "chain_finalizedHead",
        "subscribeNewHeads" => "chain_newHead",
        "getBlock" => return Ok(params.block(chain, 0)?.map_or(Json::Null, whole)),
        "getBlockHash" | "getHead" => return Ok(block_hash(chain, params.get(0))),
        "getFinalizedHead" => return Ok(to_hex(chain.head().hash).into()),
        "getHeader" => return Ok(params.block(chain, 0)?.map_or(Json::Null, Block::header)),
        _ => {
            chain.unsubscribe(params.text(0)?);
            return Ok(true.into());
        }
    };
    let subscriber = chain.subscriber(notice, outbox);
    let id = subscriber.id.clone();
    chain.subscribe_heads(subscriber);
    Ok(id.into())
}

fn whole(block: &Block) -> Json {
    let extrinsics: Vec<String> = block.extrinsics.iter().map(to_hex).collect();
    let block = json!({"header": block.header(), "extrinsics": extrinsics});
    json!({"block": block, "justifications": null})
}

fn block_hash(chain: &Chain, number: &Json) -> Json {
    let number = match number {
        Json::Null => Some(chain.head().number),
        Json::String(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16).ok(),
        other => other.as_u64(),
    };
    let block = number.and_then(|number| chain.blocks.get(number as usize));
    block.map_or(Json::Null, |block| to_hex(block.hash).into())
}

fn state(chain: &mut Chain, name: &str, params: Params, outbox: &Outbox) -> Answer {
    match name {
        "call" => {
            let (function, input) = (params.text(0)?, params.bytes(1)?);
            let block = params.known_block(chain, 2)?.number;
            Ok(to_hex(runtime_call(chain, function, &input, block)?).into())
        }
        "getKeysPaged" => keys_paged(chain, params),
        "getMetadata" => {
            let bytes = &chain.runtime.bytes;
            Ok(to_hex(metadata::v14_of(bytes).unwrap_or_else(|| bytes.clone())).into())
        }
        "getRuntimeVersion" => Ok(chain.runtime_version()),
        "getStorage" | "getStorageAt" => {
            let block = params.known_block(chain, 1)?.number;
            let value = chain.storage_value(&params.bytes(0)?, block);
            Ok(value.map_or(Json::Null, |value| to_hex(value).into()))
        }
        "queryStorageAt" => query_storage(chain, params),
        "subscribeRuntimeVersion" => {
            let subscriber = chain.subscriber("state_runtimeVersion", outbox);
            let id = subscriber.id.clone();
            chain.subscribe_versions(subscriber);
            Ok(id.into())
        }
        _ => {
            chain.unsubscribe(params.text(0)?);
            Ok(true.into())
        }
    }
}

fn keys_paged(chain: &mut Chain, params: Params) -> Answer {
    let prefix = params.bytes(0)?;
    let count = params.get(1).as_u64().unwrap_or(0) as usize;
    let from = match params.get(2) {
        Json::Null => Bound::Included(prefix.clone()),
        _ => Bound::Excluded(params.bytes(2)?),
    };
    params.known_block(chain, 3)?;
    let entries = chain.storage().range::<Vec<u8>, _>((from, Bound::Unbounded));
    let keys = entries.map(|(key, _)| key).take_while(|key| key.starts_with(&prefix)).take(count);
    Ok(keys.map(to_hex).collect::<Vec<String>>().into())
}

fn query_storage(chain: &mut Chain, params: Params) -> Answer {
    let block = params.known_block(chain, 1)?;
    let (number, hash) = (block.number, to_hex(block.hash));
    let mut changes = Vec::new();
    for key in params.get(0).as_array().into_iter().flatten() {
        let value = chain.storage_value(&bytes(key)?, number).map(to_hex);
        changes.push(json!([key, value]));
    }
    Ok(json!([{"block": hash, "changes": changes}]))
}

fn runtime_call(chain: &Chain, function: &str, input: &[u8], block: u64) -> Result<Vec<u8>, Fault> {
    let runtime = &chain.runtime;
    let wrong = |e: codec::Error| Fault::new(4003, format!("Client error: Execution failed: {e}"));
    let answer = match function {
        "Core_version" => Some(runtime.version()),
        "Metadata_metadata" => Some(runtime.bytes.encode()),
        "Metadata_metadata_versions" => Some(vec![14, 15, runtime.metadata_version()].encode()),
        "Metadata_metadata_at_version" => {
            let version = u32::decode(&mut &*input).map_err(wrong)?;
            let bytes = match version {
                14 => metadata::v14_of(&runtime.bytes),
                15 => metadata::v15_of(&runtime.bytes),
                version if version == runtime.metadata_version() => Some(runtime.bytes.clone()),
                _ => None,
            };
            Some(bytes.encode())
        }
        "AccountNonceApi_account_nonce" => {
            let account = <[u8; 32]>::decode(&mut &*input).map_err(wrong)?;
            Some((chain.nonce(&account) as u32).encode())
        }
        "SubnetInfoRuntimeApi_get_metagraph" if !chain.has_metagraph_api => None,
        _ => {
            let block = chain.claimed_block.unwrap_or(block);
            apis::answer(runtime, chain.subnet(), block, function, input)
        }
    };
    answer.ok_or_else(|| {
        let why = format!("Other: Exported method {function} is not found");
        Fault::new(4003, format!("Client error: Execution failed: {why}"))
    })
}

fn system(chain: &Chain, name: &str, params: Params) -> Answer {
    Ok(match name {
        "accountNextIndex" => {
            let text = params.text(0)?;
            let account = match text.parse::<Hotkey>() {
                Ok(key) => key.0,
                Err(_) => params.bytes(0)?.try_into().map_err(|_| params.wrong(0))?,
            };
            chain.next_nonce(&account).into()
        }
        "chain" => "Bittensor".into(),
        "chainType" => "Live".into(),
        "health" => json!({"peers": 8, "isSyncing": false, "shouldHavePeers": true}),
        "name" => "Node Subtensor".into(),
        "properties" => json!({"ss58Format": 42, "tokenDecimals": 9, "tokenSymbol": "TAO"}),
        _ => "4.0.0-dev".into(),
    })
}

/// The parameters of a request; absent ones are null.
#[derive(Clone, Copy)]
struct Params<'a>(&'a [Json]);

impl<'a> Params<'a> {
    fn get(self, place: usize) -> &'a Json {
        self.0.get(place).unwrap_or(&NULL)
    }

    fn wrong(self, place: usize) -> Fault {
        Fault::new(-32602, format!("Invalid params: {} at {place}", self.get(place)))
    }

    fn text(self, place: usize) -> Result<&'a str, Fault> {
        self.get(place).as_str().ok_or_else(|| self.wrong(place))
    }

    fn bytes(self, place: usize) -> Result<Vec<u8>, Fault> {
        bytes(self.get(place))
    }

    /// The block of this hash; the newest for null.
    fn block(self, chain: &Chain, place: usize) -> Result<Option<&Block>, Fault> {
        match self.get(place) {
            Json::Null => Ok(Some(chain.head())),
            _ => Ok(chain.find(&self.bytes(place)?)),
        }
    }

    fn known_block(self, chain: &Chain, place: usize) -> Result<&Block, Fault> {
        self.block(chain, place)?.ok_or_else(|| {
            let why = format!("UnknownBlock: Header was not found: {}", self.get(place));
            Fault::new(4003, format!("Client error: {why}"))
        })
    }
}

fn bytes(value: &Json) -> Result<Vec<u8>, Fault> {
    // Official clients leave the prefix out here and there, and nodes do not mind.
    let digits = value.as_str().map(|text| text.strip_prefix("0x").unwrap_or(text));
    let bytes = digits.and_then(|digits| hex::decode(digits).ok());
    bytes.ok_or_else(|| Fault::new(-32602, format!("Invalid params: {value} is not hexadecimal")))
}
