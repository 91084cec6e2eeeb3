//! A chat template may print the date: an answer is verified with the date on which it was asked.

use crate::common;
use crate::common::site::{CHAT, chat, post, stream};
use axum::http::StatusCode;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use targon_engine::clock::Clock;
use targon_engine::intake::translate::Defaults;
use targon_engine::models::chat::ChatTemplate;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::server::registry::{ModelState, Registry};
use targon_engine::server::router;
use targon_engine::server::state::ServerState;
use targon_engine::verify::capture::Capture;
use targon_engine::verify::question::Question;
use targon_engine::verify::{Depth, Profile, Verdict, Verifier};

/// 31 December 2024, 23:59:59 (UTC).
const ASKED_MS: u64 = 1_735_689_599_000;
const SOURCE: &str = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}";
const NONCE: &str = "2222222222222222222222222222222222222222222222222222222222222222";
const DAY: Duration = Duration::from_secs(86_400);

async fn verdict(verifier: &Verifier, capture: &Capture, asked_ms: u64) -> Verdict {
    let question = Question::read(verifier, "tiny", &capture.request, None, asked_ms).await;
    let verification = verifier.verify(Profile::Proof, 7).depth(Depth::Slow);
    verification.capture(question.unwrap(), capture).remove(0).report.verdict
}

fn parsed(line: &Value) -> Capture {
    Capture::parse(line.to_string().as_bytes()).unwrap()
}

#[tokio::test]
async fn an_answer_before_midnight_passes_after_it_and_on_later_days() {
    let pool = Pool::new(2, Isa::best()).unwrap();
    let mut model = common::tiny_model(3, &pool);
    let tokens = (String::new(), String::new());
    let template = ChatTemplate::compile(Path::new("t"), SOURCE, tokens).unwrap();
    Arc::get_mut(&mut model.text).unwrap().chat = Some(template);
    let served = common::served(model, common::options());
    let verifier = common::verifier(&served);
    let registry = Registry::default();
    registry.announce(["tiny".to_owned()]);
    registry.set("tiny", None, ModelState::Ready(Box::new(served)));
    let clock = Clock::manual(ASKED_MS);
    let app = router(ServerState::new(registry, Defaults::default(), clock.clone()));
    let proof = json!({"scheme": "residue-v1", "nonce": NONCE});
    let body = chat(json!({"max_tokens": 12, "proof": proof, "return_token_ids": true}));
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let chunks = stream(&app, CHAT, streamed.clone()).await;
    let (status, response) = post(&app, CHAT, body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{response}");

    clock.advance(Duration::from_secs(2));
    let soon_ms = clock.unix_ms();
    clock.advance(2 * DAY);
    let late_ms = clock.unix_ms();
    let captures = [
        parsed(&json!({"request": streamed, "chunks": chunks})),
        parsed(&json!({"request": body, "response": response})),
    ];
    for capture in captures {
        // Live: the answer says when it was made, and may say so of one day.
        assert_eq!(capture.asked_ms(soon_ms, DAY), ASKED_MS);
        assert_eq!(verdict(&verifier, &capture, ASKED_MS).await, Verdict::Pass);
        assert_eq!(capture.asked_ms(late_ms, DAY), late_ms);
        assert_eq!(capture.asked_ms(ASKED_MS - 61_000, DAY), ASKED_MS - 61_000);
        // Of a file: at any later time.
        let question = capture.question(&verifier, "tiny", late_ms).await.unwrap();
        let checked = verifier.verify(Profile::Proof, 7).capture(question, &capture);
        assert_eq!(checked[0].report.verdict, Verdict::Pass);
        // The control: with the date of the verification the prompt is another one.
        assert!(verdict(&verifier, &capture, soon_ms).await != Verdict::Pass);
    }
    // What the capture itself says counts before the answer's word.
    let mut lying = response.clone();
    lying["created"] = json!(soon_ms / 1000);
    let line = json!({"request": body, "response": lying, "asked_ms": ASKED_MS});
    assert_eq!(parsed(&line).asked_ms(late_ms, DAY), ASKED_MS);
    lying["created"] = json!(u64::MAX);
    let line = json!({"request": body, "response": lying});
    assert_eq!(parsed(&line).asked_ms(soon_ms, Duration::MAX), soon_ms);
}
