//! What requests may ask for beyond plain generation: structure, tools, echoes, scores.

use crate::common;
use crate::common::site::{CHAT, COMPLETION, Site, call, chat, completion, post, site, stream};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};
use targon_engine::chain::keys::Hotkey;
use targon_engine::server::door::Caller;
use targon_engine::server::settings::{ApiKeys, Settings};

fn weather() -> Value {
    json!({"type": "function", "function": {
        "name": "weather", "description": "of a city", "parameters": {
            "type": "object", "additionalProperties": false, "required": ["city", "celsius"],
            "properties": {"city": {"enum": ["Bern", "Oslo"]}, "celsius": {"type": "boolean"}},
        },
    }})
}

/// A constrained chat with room for its end.
fn constrained(extra: Value) -> Value {
    let mut body = chat(extra);
    body["max_tokens"] = json!(200);
    body["ignore_eos"] = json!(false);
    body
}

async fn ok(site: &Site, path: &str, body: Value) -> Value {
    let (status, answer) = post(&site.app, path, body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer
}

async fn content(site: &Site, extra: Value) -> String {
    let answer = ok(site, CHAT, constrained(extra)).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn outputs_have_the_structure_that_was_asked_for() {
    let site = site(common::options());
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["ok", "size"],
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 22, 333]}},
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}});
    let outputs = [
        json!({"response_format": format}),
        json!({"structured_outputs": {"json": schema}}),
        json!({"structured_outputs": {"json": schema.to_string()}}),
    ];
    for (seed, extra) in outputs.into_iter().enumerate() {
        let mut extra = extra;
        extra["seed"] = json!(seed);
        let value: Value = serde_json::from_str(&content(&site, extra).await).unwrap();
        assert!(value["ok"].is_boolean(), "{value}");
        assert!([1, 22, 333].contains(&value["size"].as_i64().unwrap()), "{value}");
        assert_eq!(value.as_object().unwrap().len(), 2);
    }
    let regex = json!({"structured_outputs": {"regex": "[ab]{3}-[0-9]{2}"}});
    let text = content(&site, regex).await;
    assert_eq!((text.len(), &text[3..4]), (6, "-"), "{text}");
    let choice = json!({"structured_outputs": {"choice": ["yes.", "no (never)"]}});
    assert!(["yes.", "no (never)"].contains(&content(&site, choice).await.as_str()));
    let lark = json!({"structured_outputs": {"grammar": "start: \"x\" /[yz]/ \"!\""}});
    assert!(["xy!", "xz!"].contains(&content(&site, lark).await.as_str()));
    let object = json!({"response_format": {"type": "json_object"}, "seed": 3});
    let answer = ok(&site, CHAT, constrained(object)).await;
    assert!(answer["choices"][0]["message"]["content"].as_str().unwrap().starts_with('{'));
}

#[tokio::test]
async fn structured_outputs_do_not_depend_on_company() {
    let site = site(common::options());
    let ask = |seed: u64| {
        let regex = json!({"regex": "[a-z]{20}[0-9]{20}"});
        constrained(json!({"structured_outputs": regex, "seed": seed, "logprobs": true}))
    };
    let mut alone = Vec::new();
    for seed in 0..4 {
        alone.push(ok(&site, CHAT, ask(seed)).await["choices"].clone());
    }
    let together = futures_util::future::join_all((0..4).map(|seed| ok(&site, CHAT, ask(seed))));
    let together: Vec<Value> = together.await.into_iter().map(|a| a["choices"].clone()).collect();
    assert_eq!(alone, together);
}

#[tokio::test]
async fn demanded_tools_are_called_with_arguments_that_fit() {
    let site = site(common::options());
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (choice, reason) in [(json!("required"), "tool_calls"), (named, "stop")] {
        let extra = json!({
            "tools": [weather()], "tool_choice": choice, "parallel_tool_calls": false,
        });
        let answer = ok(&site, CHAT, constrained(extra.clone())).await;
        let message = &answer["choices"][0]["message"];
        assert_eq!(message["content"], Value::Null, "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], reason);
        let calls = message["tool_calls"].as_array().unwrap();
        assert_eq!((calls.len(), &calls[0]["type"]), (1, &json!("function")));
        assert!(calls[0]["id"].as_str().unwrap().starts_with("call_"));
        assert!(calls[0].get("index").is_none());
        assert_eq!(calls[0]["function"]["name"], "weather");
        let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
        let value: Value = serde_json::from_str(arguments).unwrap();
        assert!(value["celsius"].is_boolean() && value["city"].is_string(), "{value}");

        let mut streamed = constrained(extra);
        streamed["stream"] = json!(true);
        let (mut name, mut parts) = (String::new(), String::new());
        let frames = stream(&site.app, CHAT, streamed).await;
        for frame in &frames {
            let choice = &frame["choices"][0];
            assert_eq!(choice["delta"]["content"], "");
            for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
                assert_eq!(call["index"], 0);
                name.push_str(call["function"]["name"].as_str().unwrap_or_default());
                parts.push_str(call["function"]["arguments"].as_str().unwrap());
            }
        }
        assert_eq!((name.as_str(), parts.as_str()), ("weather", arguments));
        assert_eq!(frames.last().unwrap()["choices"][0]["finish_reason"], reason);
    }
}

#[tokio::test]
async fn a_completion_can_repeat_and_score_its_prompt() {
    let site = site(common::options());
    let scored = completion(json!({"echo": true, "logprobs": 2, "max_tokens": 3, "n": 2}));
    let whole = ok(&site, COMPLETION, scored.clone()).await;
    for choice in whole["choices"].as_array().unwrap() {
        assert!(choice["text"].as_str().unwrap().starts_with("hello"));
        let lists = &choice["logprobs"];
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(lists[list].as_array().unwrap().len(), 5 + 3, "{list}");
        }
        assert_eq!(lists["token_logprobs"][0], Value::Null);
        assert_eq!(lists["top_logprobs"][0], Value::Null);
        assert_eq!(lists["text_offset"][5], 5);
        assert!(lists["token_logprobs"][1].as_f64().unwrap() < 0.0);
    }
    let mut streamed = scored;
    streamed["stream"] = json!(true);
    let frames = stream(&site.app, COMPLETION, streamed).await;
    assert_eq!(frames.len(), 2 * (1 + 3));
    for index in 0..2 {
        let mine: Vec<&Value> =
            frames.iter().map(|f| &f["choices"][0]).filter(|c| c["index"] == index).collect();
        assert_eq!(mine[0]["text"], "hello");
        assert_eq!(mine[0]["token_ids"], Value::Null);
        let want = &whole["choices"][index];
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let all: Vec<Value> =
                mine.iter().flat_map(|c| c["logprobs"][list].as_array().unwrap().clone()).collect();
            assert_eq!(json!(all), want["logprobs"][list]);
        }
    }
}

#[tokio::test]
async fn a_prompt_can_be_scored_without_generating() {
    let site = site(common::options());
    let only = completion(json!({"echo": true, "logprobs": 0, "max_tokens": 0}));
    let answer = ok(&site, COMPLETION, only.clone()).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("hello"), &json!("length")));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), 5);
    let mut streamed = only;
    streamed["stream"] = json!(true);
    let frames = stream(&site.app, COMPLETION, streamed).await;
    assert_eq!(frames.len(), 2);
    assert_eq!(frames[1]["choices"][0]["finish_reason"], "length");

    let scores = json!({
        "prompt_logprobs": 1, "max_tokens": 2, "return_token_ids": true, "prompt": ["ab", "c"],
    });
    let answer = ok(&site, COMPLETION, completion(scores)).await;
    let first = &answer["choices"][0];
    assert_eq!(first["prompt_token_ids"].as_array().unwrap().len(), 2);
    let rows = first["prompt_logprobs"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[0]), (2, &Value::Null));
    let id = first["prompt_token_ids"][1].to_string();
    let own = &rows[1][&id];
    assert_eq!(own["decoded_token"], "b");
    assert!(own["rank"].as_u64().unwrap() >= 1 && own["logprob"].as_f64().unwrap() < 0.0);
    assert_eq!(answer["choices"][1]["prompt_logprobs"], json!([null]));

    let answer = ok(&site, CHAT, chat(json!({"prompt_logprobs": 0}))).await;
    let rows = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(rows.len(), "<user>hello<assistant>".len());
    assert!(answer["choices"][0].get("prompt_logprobs").is_none());
}

#[tokio::test]
async fn chosen_ids_are_reported_in_place_of_the_most_probable() {
    let site = site(common::options());
    let ids = json!([7, 200, 260]);
    let extra = json!({
        "logprobs": 0, "logprob_token_ids": ids, "return_tokens_as_token_ids": true,
    });
    let answer = ok(&site, COMPLETION, completion(extra)).await;
    for map in answer["choices"][0]["logprobs"]["top_logprobs"].as_array().unwrap() {
        for id in [7, 200, 260] {
            assert!(map[&format!("token_id:{id}")].as_f64().unwrap() <= 0.0, "{map}");
        }
    }
}

#[tokio::test]
async fn the_outputs_settings_leave_the_prompts_log_probabilities_alone() {
    let site = site(common::options());
    let rows = |extra: Value| {
        let site = &site;
        async move { ok(site, COMPLETION, completion(extra)).await["choices"][0].clone() }
    };
    let plain = rows(json!({"prompt_logprobs": 2})).await;
    let chosen = rows(json!({
        "prompt_logprobs": 2, "logprobs": 1, "logprob_token_ids": [250, 251, 252],
    }));
    assert_eq!(chosen.await["prompt_logprobs"], plain["prompt_logprobs"]);
    let scaled = rows(json!({
        "prompt_logprobs": 2, "logprobs": 1, "logprobs_mode": "scaled", "temperature": 0.3,
    }));
    assert_eq!(scaled.await["prompt_logprobs"], plain["prompt_logprobs"]);
}

#[tokio::test]
async fn a_chats_log_probabilities_may_be_switched_by_numbers() {
    let site = site(common::options());
    let alternatives = |extra: Value| {
        let site = &site;
        async move {
            let answer = ok(site, CHAT, chat(extra)).await;
            let content = answer["choices"][0]["logprobs"]["content"].clone();
            content[0]["top_logprobs"].as_array().map(Vec::len)
        }
    };
    for (extra, want) in [
        (json!({"logprobs": 1, "top_logprobs": 5}), Some(5)),
        (json!({"logprobs": true, "top_logprobs": 5}), Some(5)),
        (json!({"logprobs": 0}), None),
        (json!({"logprobs": 0, "top_logprobs": 0}), None),
        (json!({"logprobs": 3}), Some(3)),
    ] {
        assert_eq!(alternatives(extra.clone()).await, want, "{extra}");
    }
}

#[tokio::test]
async fn salts_separate_prefixes_and_names_come_back() {
    let site = site(common::options());
    let prompt = "x".repeat(64);
    let mut cached = Vec::new();
    for salt in ["a", "a", "b"] {
        let extra = json!({
            "prompt": prompt, "cache_salt": salt, "request_id": "mine", "metadata": {"a": 1},
        });
        let answer = ok(&site, COMPLETION, completion(extra)).await;
        assert_eq!(answer["id"], "cmpl-mine");
        cached.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap());
    }
    assert!(cached[0] == 0 && cached[1] > 0 && cached[2] == 0, "{cached:?}");
}

#[tokio::test]
async fn prompts_are_cut_from_the_front() {
    let site = site(common::options());
    let cut = json!({"prompt": "0123456789", "truncate_prompt_tokens": 4, "echo": true});
    let answer = ok(&site, COMPLETION, completion(cut)).await;
    assert!(answer["choices"][0]["text"].as_str().unwrap().starts_with("6789"));
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    let long = json!({"prompt": "x".repeat(700), "truncate_prompt_tokens": -1});
    let answer = ok(&site, COMPLETION, completion(long)).await;
    assert_eq!(answer["usage"]["prompt_tokens"], 512 - 12);
}

#[tokio::test]
async fn earlier_calls_and_tools_reach_the_template() {
    let site = site(common::options());
    let messages = json!([
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]);
    let answer = ok(&site, CHAT, chat(json!({"messages": messages}))).await;
    let prompt = "<user>hi<assistant><tool>sunny<assistant>".len();
    assert_eq!(answer["usage"]["prompt_tokens"], prompt);
}

#[tokio::test]
async fn what_cannot_be_had_is_refused_by_name() {
    let site = site(common::options());
    let broken = json!([{"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "f", "arguments": "{"}}]}]);
    let cases = [
        (json!({"tool_choice": "required"}), "tool_choice", "needs `tools`"),
        (
            json!({"tools": [weather()],
                "tool_choice": {"type": "function", "function": {"name": "f"}}}),
            "tool_choice",
            "not among `tools`",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "tools.0.function.name",
            "letters, digits",
        ),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs", "cannot be used"),
        (
            json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}),
            "structured_outputs",
            "exactly one",
        ),
        (
            json!({"response_format": {"type": "json_object"},
                "structured_outputs": {"regex": "a"}}),
            "structured_outputs",
            "cannot be combined",
        ),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs", "`stream`"),
        (json!({"prompt_logprobs": 99}), "prompt_logprobs", "at most 20, got 99"),
        (json!({"logprob_token_ids": [1]}), "logprob_token_ids", "needs `logprobs`"),
        (json!({"logprobs": 0, "top_logprobs": 2}), "top_logprobs", "needs `logprobs`"),
        (json!({"logprobs": 4, "top_logprobs": 2}), "logprobs", "must be true or false beside"),
        (json!({"cache_salt": ""}), "cache_salt", "must not be empty"),
        (json!({"request_id": "a b"}), "request_id", "visible ASCII"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens", "at least 1"),
        (json!({"top_a": 2.0}), "top_a", "between 0 and 1"),
        (json!({"messages": broken}), "messages.0.tool_calls.0.function.arguments", "must be JSON"),
    ];
    for (extra, param, message) in cases {
        let (status, body) = post(&site.app, CHAT, chat(extra.clone())).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{extra} {body}");
        assert_eq!(body["error"]["param"], param, "{extra} {body}");
        assert!(body["error"]["message"].as_str().unwrap().contains(message), "{extra} {body}");
    }
}

/// What a request finds in the cache, and the root of its proof and its text.
async fn cached(site: &Site, request: Request<Body>) -> (u64, Value) {
    let (status, text) = call(&site.app, request).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let answer: Value = serde_json::from_str(&text).unwrap();
    let found = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let choice = &answer["choices"][0];
    (found, json!([choice["proof_end"]["root"], choice["text"], choice["proof"]]))
}

#[tokio::test]
async fn what_one_caller_sent_does_not_show_to_another() {
    let site = site(common::options());
    let keys = ApiKeys::new(["the-key-of-the-first", "the-key-of-the-second"]);
    site.state.set(Settings { keys, ..Settings::default() });
    let body = |salt: Option<&str>| {
        completion(json!({
            "prompt": "x".repeat(64), "cache_salt": salt,
            "proof": {"scheme": "residue-v1", "nonce": "12".repeat(32)},
        }))
        .to_string()
    };
    let ask = |key: &str, salt| {
        let request = Request::post(COMPLETION).header("authorization", format!("Bearer {key}"));
        request.body(Body::from(body(salt))).unwrap()
    };
    let (first, second) = ("the-key-of-the-first", "the-key-of-the-second");
    let (none, proof) = cached(&site, ask(first, None)).await;
    assert_eq!(none, 0);
    let mut proofs = Vec::new();
    for (key, salt, finds) in [
        (first, None, true),
        (second, None, false),
        (second, None, true),
        (second, Some("a"), false),
        (first, Some("a"), false),
        (first, Some("a"), true),
    ] {
        let (found, proof) = cached(&site, ask(key, salt)).await;
        assert_eq!(found > 0, finds, "{key} {salt:?}");
        proofs.push(proof);
    }
    // Signers are callers of their own, too.
    site.state.set(Settings::default());
    let signed = |seed: u8| {
        let caller = Caller { hotkey: Hotkey([seed; 32]), name: "n".into() };
        Request::post(COMPLETION).extension(caller).body(Body::from(body(None))).unwrap()
    };
    for (seed, finds) in [(1, false), (1, true), (2, false)] {
        let (found, proof) = cached(&site, signed(seed)).await;
        assert_eq!(found > 0, finds, "{seed}");
        proofs.push(proof);
    }
    assert!(proofs.iter().all(|other| *other == proof), "no proof depends on who asks");
    assert!(proof[0].is_string(), "{proof}");
}

#[tokio::test]
async fn what_is_not_built_is_refused_by_name_and_never_ignored() {
    let site = site(common::options());
    let fields = json!({
        "documents": [{"title": "a"}], "chat_template": "{{ 1 }}", "audio": {"voice": "a"},
        "modalities": ["text", "audio"], "regex": "a+", "ebnf": "root ::= a", "grammar": "root",
        "json_schema": {}, "format": "json", "length_penalty": 0.5, "prompt_embeds": "AAAA",
        "stop_regex": "a", "no_stop_trim": true, "input_ids": [1], "lora_path": "a",
        "repeat_penalty": 1.1, "typical_p": 0.9, "mirostat": 2, "min_p": "a", "n_predict": 5,
        "custom_logit_processor": "a", "thinking_token_budget": 5, "return_hidden_states": true,
    });
    for (field, value) in fields.as_object().unwrap() {
        for (path, body) in
            [(CHAT, chat(json!({field: value}))), (COMPLETION, completion(json!({field: value})))]
        {
            let (status, answer) = post(&site.app, path, body).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{field} {answer}");
            assert_eq!(answer["error"]["param"], json!(field), "{answer}");
        }
    }
    let (status, answer) = post(&site.app, CHAT, chat(json!({"echo": true}))).await;
    assert_eq!((status, &answer["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("echo")));
    // What asks for nothing is let go.
    let neutral = json!({
        "documents": [], "chat_template": null, "modalities": ["text"], "length_penalty": 1.0,
        "repeat_penalty": 1, "n_predict": -1, "no_stop_trim": false, "mirostat": 0, "echo": false,
    });
    ok(&site, CHAT, chat(neutral)).await;
}

#[tokio::test]
async fn an_overflow_is_told_in_the_words_that_clients_know() {
    let site = site(common::options());
    let long = "x".repeat(600);
    let messages = json!([{"role": "user", "content": long}]);
    let however = "However, the prompt has 6";
    let cases = [
        (
            COMPLETION,
            completion(json!({"prompt": long})),
            "prompt",
            "However, the prompt has 600 tok",
        ),
        (COMPLETION, completion(json!({"prompt": vec![7; 600]})), "prompt", however),
        (COMPLETION, completion(json!({"prompt": "x".repeat(1 << 20)})), "prompt", "1048576 bytes"),
        (CHAT, chat(json!({"messages": messages})), "messages", however),
        (COMPLETION, completion(json!({"prompt": vec![7; 512]})), "prompt", "leaves no room"),
        (
            COMPLETION,
            completion(json!({"max_tokens": 9000})),
            "max_tokens",
            "requested 9005 tokens",
        ),
        (COMPLETION, completion(json!({"max_tokens": 509})), "max_tokens", "requested 514 tokens"),
        (CHAT, chat(json!({"max_tokens": 9000})), "max_tokens", "(22 in the prompt, 9000 by"),
        (
            CHAT,
            chat(json!({"max_completion_tokens": 9000})),
            "max_completion_tokens",
            "9000 by `max_completion_tokens`",
        ),
    ];
    for (path, body, param, message) in cases {
        let (status, answer) = post(&site.app, path, body).await;
        let error = &answer["error"];
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert_eq!(error["code"], "context_length_exceeded", "{answer}");
        assert_eq!(error["param"], param, "{answer}");
        let text = error["message"].as_str().unwrap();
        let start = "This model's maximum context length is 512 tokens. However, ";
        assert!(text.starts_with(start) && text.contains(message), "{text}");
    }
    ok(&site, COMPLETION, completion(json!({"max_tokens": 508}))).await;
}

#[tokio::test]
async fn a_final_message_is_continued_where_it_ends() {
    let site = site(common::options());
    let messages = json!([
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "so, "},
    ]);
    let asked = json!({
        "messages": messages, "continue_final_message": true, "return_token_ids": true,
    });
    let answer = ok(&site, CHAT, chat(asked.clone())).await;
    let ids: Vec<u8> = "<user>hi<assistant>so, ".into();
    assert_eq!(answer["prompt_token_ids"], json!(ids), "{answer}");
    // The answer is that of the text itself.
    let text = json!({"prompt": "<user>hi<assistant>so, ", "return_token_ids": true});
    let same = ok(&site, COMPLETION, completion(text)).await;
    assert_eq!(answer["choices"][0]["token_ids"], same["choices"][0]["token_ids"]);
    for (extra, message) in [
        (json!({"add_generation_prompt": true}), "cannot be combined"),
        (json!({"messages": [{"role": "assistant", "content": null}]}), "needs text"),
    ] {
        let mut body = chat(asked.clone());
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let (status, answer) = post(&site.app, CHAT, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert_eq!(answer["error"]["param"], "continue_final_message");
        assert!(answer["error"]["message"].as_str().unwrap().contains(message), "{answer}");
    }
}

#[tokio::test]
async fn loose_forms_are_read_as_the_servers_that_clients_know_read_them() {
    let site = site(common::options());
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let messages = json!([{"role": "user", "content": parts}]);
    let extra = json!({"messages": messages, "max_tokens": 3.0, "return_token_ids": true});
    let answer = ok(&site, CHAT, chat(extra)).await;
    let ids: Vec<u8> = "<user>a\nb<assistant>".into();
    assert_eq!(answer["prompt_token_ids"], json!(ids), "parts are joined by newlines");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    let options = json!({"stream": true, "stream_options": {"include_usage": null}});
    stream(&site.app, CHAT, chat(options)).await;
    for (body, param, message) in [
        (json!({"max_tokens": "5"}), "max_tokens", "`max_tokens` must be an integer, got a string"),
        (json!({"top_logprobs": 21, "logprobs": true}), "top_logprobs", "at most 20, got 21"),
        (
            json!({"content": 5, "messages": [{"role": "user", "content": 5}]}),
            "messages.0.content",
            "must be a string or a list of parts, got 5",
        ),
    ] {
        let (status, answer) = post(&site.app, CHAT, chat(body)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert_eq!(answer["error"]["param"], param, "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(message), "{answer}");
    }
}
