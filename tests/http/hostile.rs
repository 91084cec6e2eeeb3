//! Bytes of strangers: whatever arrives, the answer is a 2xx or a 4xx with an error object, within
//! a budget of time, memory and threads.

use crate::common;
use crate::common::budget::Budget;
use crate::common::site::{CHAT, COMPLETION, chat, completion, post_raw, site};
use axum::Router;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use std::path::Path;
use targon_engine::models::chat::ChatTemplate;

/// Any JSON of moderate size.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3_i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("[a-z_]{1,10}", inner), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

const FIELDS: [&str; 43] = [
    "messages",
    "prompt",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_a",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "n",
    "best_of",
    "stop",
    "stop_token_ids",
    "logprobs",
    "top_logprobs",
    "logprobs_mode",
    "prompt_logprobs",
    "logprob_token_ids",
    "response_format",
    "structured_outputs",
    "truncate_prompt_tokens",
    "cache_salt",
    "request_id",
    "stream",
    "stream_options",
    "proof",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "echo",
    "suffix",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
    "add_special_tokens",
    "skip_special_tokens",
];

fn check(runtime: &tokio::runtime::Runtime, app: &Router, path: &str, body: Vec<u8>) {
    let shown = String::from_utf8_lossy(&body).into_owned();
    let budget = Budget::start();
    let (status, text) = runtime.block_on(post_raw(app, path, body));
    budget.check(&format!("{path} {}", shown.chars().take(500).collect::<String>()));
    assert!(status.is_success() || status.is_client_error(), "{path} {shown}: {status} {text}");
    if status.is_client_error() {
        let error: Value = serde_json::from_str(&text).unwrap();
        assert!(error["error"]["message"].is_string() && text.len() < 4096, "{shown}: {text}");
    }
}

#[test]
fn any_field_may_hold_anything() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let site = runtime.block_on(async { site(common::options()) });
    let field = prop::sample::select(&FIELDS[..]);
    let strategy = (prop::collection::vec((field, any_json()), 1..3), any::<bool>());
    let mut runner = TestRunner::new(Config { cases: 600, ..Config::default() });
    runner
        .run(&strategy, |(changes, is_chat)| {
            let small = json!({"max_tokens": 2});
            let (path, mut body) =
                if is_chat { (CHAT, chat(small)) } else { (COMPLETION, completion(small)) };
            for (name, value) in changes {
                body[name] = value;
            }
            check(&runtime, &site.app, path, body.to_string().into_bytes());
            Ok(())
        })
        .unwrap();
}

#[test]
fn any_bytes_may_be_a_body() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let site = runtime.block_on(async { site(common::options()) });
    let routes = prop::sample::select(&[CHAT, COMPLETION, "/tokenize", "/detokenize"][..]);
    let bytes = prop::collection::vec(any::<u8>(), 0..200);
    let body = prop_oneof![bytes, any_json().prop_map(|v| v.to_string().into_bytes())];
    let mut runner = TestRunner::new(Config { cases: 600, ..Config::default() });
    runner
        .run(&(routes, body), |(path, body)| {
            check(&runtime, &site.app, path, body);
            Ok(())
        })
        .unwrap();
    check(&runtime, &site.app, CHAT, "[".repeat(1 << 20).into_bytes());
}

proptest! {
    #[test]
    fn any_template_renders_or_says_why(
        parts in prop::collection::vec(prop::sample::select(&[
            "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['x'].y }}", "{%",
            "{% if tools %}", "{% else %}", "{% endif %}", "{{ raise_exception('no') }}", "}}",
            "{% set ns = namespace(a=1) %}", "{{ messages | tojson }}", "{{ 'a' * 1000 }}", "\n",
            "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}", "{{ messages[-1:0:-1] }}", "text",
            "{{ strftime_now('%Q%') }}", "{% for i in range(9999999999) %}", "{{ 1 // 0 }}",
        ][..]), 0..12),
        content in any_json(),
    ) {
        let tokens = (String::new(), String::new());
        let compiled = ChatTemplate::compile(Path::new("t"), &parts.concat(), tokens);
        if let Ok(template) = compiled {
            let variables = json!({"messages": [{"role": "user", "content": content}]});
            let Value::Object(variables) = variables else { unreachable!() };
            // Nothing to compare with: it must come back, and soon.
            let budget = Budget::start();
            let _ = template.render(variables, 0);
            budget.check(&parts.concat());
        }
    }
}
