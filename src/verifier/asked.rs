//! Reads the caller's part of a body: which model, and which request. If its form is wrong, the
//! response is a 422 as FastAPI writes it. If its form is right and it cannot be verified here, the
//! peer is not at fault.

use super::reply::{VerifierRefusal, fault};
use super::scan::members;
use crate::engine::request::Request;
use crate::entropy::Entropy;
use crate::intake::error::echo;
use crate::intake::translate::Defaults;
use crate::intake::understand::Reader;
use crate::server::registry::Served;
use crate::wire::openai::{ChatRequest, CompletionRequest};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::ops::Range;

/// Seed where a request names none.
const SEED_DEFAULT: i64 = 42;

/// What a body of `/verify` says besides the answer, which is only located in it.
#[derive(Debug)]
pub(super) struct VerifyBody {
    /// The model; the only one where it is not named.
    pub(super) model: Option<String>,
    /// Whether the answer came from the chat endpoint.
    pub(super) is_chat: bool,
    /// Whether there is no limit on its tokens: in the container 0 means that.
    pub(super) is_endless: bool,
    /// What was asked there.
    pub(super) params: Map<String, Value>,
    /// Where the answer stands in the body.
    pub(super) output: Range<usize>,
}

impl VerifyBody {
    /// Takes a body apart. The caller's part may have `most` bytes.
    pub(super) fn read(text: &[u8], most: usize) -> Result<Self, VerifierRefusal> {
        if text.trim_ascii_start().first() != Some(&b'{') {
            let what = "Input should be a valid dictionary or object to extract fields from";
            return Err(VerifierRefusal::field("model_attributes_type", &[], what));
        }
        let all = members(text).map_err(|what| {
            VerifierRefusal::field("json_invalid", &[], &format!("JSON decode error: {what}"))
        })?;
        // Of several members of one name the last counts, as in Python.
        let find =
            |name: &str| all.iter().rev().find(|(key, _)| key == name).map(|(_, r)| r.clone());
        let (kind, params, output) =
            (find("request_type"), find("request_params"), find("output_sequence"));
        let (Some(kind), Some(params), Some(output)) = (&kind, &params, &output) else {
            let later = find("raw_chunks").is_some();
            let fields =
                [("request_type", kind), ("request_params", params), ("output_sequence", output)];
            let absent = fields.into_iter().filter(|(_, value)| value.is_none());
            return Err(VerifierRefusal::fields(
                absent.map(|(name, _)| missing(name, later)).collect(),
            ));
        };
        if params.len() > most {
            let what = format!("must have at most {most} bytes, got {}", params.len());
            return Err(VerifierRefusal::field("too_long", &["request_params"], &what));
        }
        let kind: String = parse(&text[kind.clone()], "request_type", "string")?;
        let model = find("model").map(|range| parse(&text[range], "model", "string"));
        let params: Map<String, Value> =
            parse(&text[params.clone()], "request_params", "dictionary")?;
        Ok(Self {
            model: model.transpose()?.flatten(),
            is_chat: kind != "COMPLETION",
            is_endless: is_endless(&params),
            params,
            output: output.clone(),
        })
    }
}

fn is_endless(params: &Map<String, Value>) -> bool {
    params.get("max_tokens").and_then(Value::as_i64) == Some(0)
}

fn missing(name: &str, is_later: bool) -> Value {
    let what = match name {
        "output_sequence" if is_later => {
            "Field required: bodies of Targon 4.2 to 4.4 are read here, `raw_chunks` came with 4.5"
        }
        _ => "Field required",
    };
    fault("missing", &[name], what)
}

fn parse<T: DeserializeOwned>(text: &[u8], name: &str, kind: &str) -> Result<T, VerifierRefusal> {
    serde_json::from_slice(text).map_err(|e| {
        let what = format!("Input should be a valid {kind}: {}", echo(&e.to_string()));
        VerifierRefusal::field(&format!("{kind}_type"), &[name], &what)
    })
}

/// Reads what was asked by the rules of the server, with the container's defaults. `path` says
/// where in the body it stands.
pub(super) async fn understand(
    served: &Served,
    is_chat: bool,
    mut params: Map<String, Value>,
    path: &str,
    (entropy, now_ms): (&Entropy, u64),
) -> Result<Request, VerifierRefusal> {
    // The rules of a server refuse it.
    let is_endless = is_endless(&params);
    if is_endless {
        params.insert("max_tokens".into(), 1.into());
    }
    for (key, default) in
        [("temperature", json!(0.0)), ("seed", json!(SEED_DEFAULT)), ("n", json!(1))]
    {
        params.entry(key).or_insert(default);
    }
    params.insert("logprobs".into(), true.into());
    params.insert("logprobs_mode".into(), "scaled".into());
    // The other endpoint's, and what says only how an answer is sent.
    for key in [if is_chat { "prompt" } else { "messages" }, "stream", "stream_options"] {
        params.remove(key);
    }
    let context_max = served.engine.options().context_max;
    let (model, defaults) = (served.engine.text(), Defaults::default());
    let reader = Reader { model, context_max, defaults, entropy, now_ms };
    let understood = match is_chat {
        true => reader.chat(&body::<ChatRequest>(params, path)?).await,
        false => reader.completion(&body::<CompletionRequest>(params, path)?).await,
    };
    let mut requests = understood.map_err(|e| VerifierRefusal::unscored(e.message))?.requests;
    if requests.len() != 1 {
        let what = "one prompt and one choice are verified at a time, got";
        return Err(VerifierRefusal::unscored(format!("{what} {}", requests.len())));
    }
    let mut request = requests.remove(0);
    if is_endless {
        request.max_tokens = context_max.saturating_sub(request.prompt.len()).max(1);
    }
    Ok(request)
}

fn body<T: DeserializeOwned>(params: Map<String, Value>, path: &str) -> Result<T, VerifierRefusal> {
    serde_path_to_error::deserialize(Value::Object(params)).map_err(|e| {
        let field = e.path().to_string();
        let path = [path, &field];
        let path = &path[..if field == "." { 1 } else { 2 }];
        VerifierRefusal::field("value_error", path, &echo(&e.inner().to_string()))
    })
}
