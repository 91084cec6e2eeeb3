//! Targon's rules on SmolLM2-135M-Instruct: honest answers pass, and each hole of the original
//! verifier is shown closed; then the same through the container's routes.

use crate::common;
use axum::body::Body;
use axum::http::{Request as HttpRequest, StatusCode};
use serde_json::{Value, json};
use std::sync::OnceLock;
use targon_engine::clock::Clock;
use targon_engine::engine::Options;
use targon_engine::engine::request::Request;
use targon_engine::models::Model;
use targon_engine::models::pass::LogprobMode;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::server::registry::{ModelState, Registry, Served};
use targon_engine::server::settings::Settings;
use targon_engine::verifier::Service;
use targon_engine::verify::answer::Answer;
use targon_engine::verify::{Claim, Depth, Profile, Reason, Verdict, Verifier};
use tower::ServiceExt;

const QUESTION: &str = "What is the capital of France?";

/// A model that answers, and what checks it.
struct Entry {
    served: Served,
    verifier: Verifier,
}

fn entry() -> &'static Entry {
    static ENTRY: OnceLock<Entry> = OnceLock::new();
    ENTRY.get_or_init(|| {
        let pool = Pool::new(2, Isa::best()).unwrap();
        let model = Model::load(&common::smollm2(), None, &pool, |_, _| {}).unwrap();
        let options = Options { context_max: 1024, blocks: 128, ..common::options() };
        let served = common::served(model, options);
        let verifier = common::verifier(&served);
        Entry { served, verifier }
    })
}

fn request(question: &str, temperature: f32, max_tokens: usize) -> Request {
    let model = entry().served.engine.text();
    let variables = json!({
        "messages": [{"role": "user", "content": question}], "add_generation_prompt": true,
    });
    let Value::Object(variables) = variables else { unreachable!() };
    let text = model.chat.as_ref().unwrap().render(variables, 0).unwrap();
    let ids = model.tokenizer.encode(&text, false).unwrap();
    let mut request = Request::greedy(ids, max_tokens);
    request.sampling.temperature = temperature;
    request.sampling.noise_key = 5;
    request.logprob_mode = LogprobMode::Scaled;
    request
}

fn answered(request: &Request) -> Answer {
    let answer = entry().served.engine.submit(request.clone()).unwrap();
    let steps = answer.collect_blocking().unwrap().steps;
    Answer {
        ids: steps.iter().map(|s| s.token).collect(),
        text: Some(steps.iter().map(|s| s.text.as_str()).collect()),
        logprobs: steps.iter().map(|s| Some(s.logprob)).collect(),
        powv: steps.iter().map(|s| Some(s.powv)).collect(),
        ..Answer::default()
    }
}

fn verdict(request: &Request, answer: &Answer, end_is_implied: bool) -> Verdict {
    let claim = Claim { end_is_implied, ..Claim::new(request, answer) };
    entry().verifier.verify(Profile::Ranks, 3).depth(Depth::Slow).answer(&claim).verdict
}

fn reason(verdict: Verdict) -> Option<Reason> {
    match verdict {
        Verdict::Reject(rejection) => Some(rejection.reason),
        Verdict::Pass => None,
        Verdict::Unscored(why) => panic!("{why}"),
    }
}

#[test]
fn honest_answers_pass_targons_rules() {
    for (question, temperature, max_tokens) in [
        (QUESTION, 0.0, 60),
        (QUESTION, 0.3, 60),
        ("Write one sentence about the sea.", 0.5, 80),
        ("Count from one to ten.", 0.2, 40),
    ] {
        let request = request(question, temperature, max_tokens);
        let answer = answered(&request);
        assert_eq!(verdict(&request, &answer, false), Verdict::Pass, "{question} {temperature}");
        // Stacks that do not send the end token are understood too.
        let mut unsent = answer.clone();
        if unsent.ids.len() < max_tokens {
            unsent.ids.pop();
            unsent.logprobs.pop();
            unsent.powv.pop();
            assert_eq!(verdict(&request, &unsent, true), Verdict::Pass, "{question}");
            assert_eq!(reason(verdict(&request, &unsent, false)), Some(Reason::EarlyEnd));
        }
    }
}

#[test]
fn the_holes_of_the_original_are_closed() {
    let request = request("Explain how rain forms, in a few sentences.", 0.3, 60);
    let honest = answered(&request);
    assert_eq!(verdict(&request, &honest, false), Verdict::Pass);
    let count = honest.ids.len();
    type Change = Box<dyn Fn(&mut Answer)>;
    let other = answered(&self::request("Tell me about the history of Rome.", 0.3, 60));
    let cases: [(&str, Change, Reason); 8] = [
        (
            "the mean agreement was not enforced",
            Box::new(|a| a.logprobs.fill(Some(-100.0))),
            Reason::LogprobMismatch,
        ),
        (
            "text and ids were never tied together",
            Box::new(|a| a.text = Some("Paris!".into())),
            Reason::TextMismatch,
        ),
        (
            "empty text skipped every check",
            Box::new(|a| a.text = Some(String::new())),
            Reason::TextMismatch,
        ),
        (
            "no log-probabilities at all",
            Box::new(|a| a.logprobs.fill(None)),
            Reason::LogprobMismatch,
        ),
        (
            "zeros are too good to be true, also when slightly below zero",
            Box::new(|a| a.logprobs.fill(Some(-1e-9))),
            Reason::Overfit,
        ),
        (
            "a short answer crashed the verifier",
            Box::new(|a| {
                a.ids.truncate(2);
                a.logprobs.truncate(2);
            }),
            Reason::EarlyEnd,
        ),
        (
            "the model's own end token was unknown to it",
            Box::new(move |a| a.ids[count / 2] = 2),
            Reason::SkippedEosEot,
        ),
        (
            "another answer to another question",
            Box::new(move |a| *a = Answer { powv: Vec::new(), ..other.clone() }),
            Reason::UnlikelyToken,
        ),
    ];
    for (hole, change, want) in cases {
        let mut changed = honest.clone();
        change(&mut changed);
        assert_eq!(reason(verdict(&request, &changed, false)), Some(want), "{hole}");
    }
}

fn service() -> &'static Service {
    static SERVICE: OnceLock<Service> = OnceLock::new();
    SERVICE.get_or_init(|| {
        let registry = Registry::default();
        registry.announce(["smollm2".to_owned()]);
        let Entry { served, verifier } = entry();
        registry.set("smollm2", None, ModelState::Ready(Box::new(served.clone())));
        Service::new(registry, &Settings::default(), Clock::system(), &verifier.pool)
    })
}

async fn call(method: &str, path: &str, body: Value) -> (StatusCode, Value) {
    let app = service().router();
    let request = HttpRequest::builder().method(method).uri(path);
    let response = app.oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
    let status = response.status();
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap())
}

#[tokio::test]
async fn the_containers_routes_answer_in_its_words() {
    assert_eq!(call("GET", "/", json!({})).await, (StatusCode::OK, json!(["", 200])));
    assert_eq!(call("GET", "/endpoints", json!({})).await.1, json!(["completion", "chat"]));
    let metadata = call("GET", "/metadata", json!({})).await.1;
    assert_eq!(metadata, json!({"endpoints": ["completion", "chat"]}));
    let messages = json!([{"role": "user", "content": QUESTION}]);
    let body =
        json!({"messages": messages, "sampling_params": {"temperature": 0, "max_tokens": 9}});
    let (_, generated) = call("POST", "/generate", body).await;
    assert!(generated["text"].as_str().unwrap().contains("Paris"), "{generated}");
    assert_eq!(call("POST", "/generate", json!(3)).await.0, StatusCode::UNPROCESSABLE_ENTITY);

    let request = request(QUESTION, 0.0, 40);
    let answer = tokio::task::spawn_blocking(move || answered(&request)).await.unwrap();
    let model = entry().served.engine.text();
    let items: Vec<Value> = answer
        .ids
        .iter()
        .zip(&answer.logprobs)
        .map(|(id, logprob)| {
            let text = if *id == 2 { String::new() } else { model.tokenizer.text_of(*id) };
            json!({"text": text, "logprob": logprob, "token_id": id, "powv": 3})
        })
        .collect();
    let body = |items: &[Value]| {
        json!({
            "model": "smollm2", "request_type": "CHAT", "output_sequence": items,
            "request_params": {"messages": messages, "max_tokens": 40, "stream": true},
        })
    };
    let (status, verified) = call("POST", "/verify", body(&items)).await;
    assert_eq!((status, &verified), (StatusCode::OK, &json!({"verified": true})));
    let mut lies = items.clone();
    lies.iter_mut().for_each(|item| item["logprob"] = json!(-50.0));
    let (status, rejected) = call("POST", "/verify", body(&lies)).await;
    assert_eq!((status, &rejected["verified"]), (StatusCode::OK, &json!(false)));
    assert_eq!(rejected["cause"], "UNLIKELY_TOKENS");
    let mut unknown = items.clone();
    unknown[1]["token_id"] = json!(-1);
    assert_eq!(call("POST", "/verify", body(&unknown)).await.1["cause"], "BAD_STREAM");
    assert_eq!(call("POST", "/verify", body(&[])).await.1["cause"], "TOO_SHORT");
    let mut absent = body(&items);
    absent["model"] = json!("absent");
    let (status, unscored) = call("POST", "/verify", absent).await;
    assert_eq!((status, &unscored["cause"]), (StatusCode::OK, &json!("INTERNAL_ERROR")));
    assert!(unscored.get("verified").is_none(), "{unscored}");
    let malformed = call("POST", "/verify", json!({"a": 1})).await.0;
    assert_eq!(malformed, StatusCode::UNPROCESSABLE_ENTITY);
}
