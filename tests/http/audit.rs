//! Audits of a server that fails, says nothing or says too much in the middle of one.

use crate::common;
use crate::common::site::{COMPLETION, post_raw, site};
use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use targon_engine::audit::asking::{AuditError, AuditRequests, Findings, audit};
use targon_engine::chance::Chance;
use targon_engine::clock::Clock;
use targon_engine::validator::query::{Size, Target};

/// Tokens that are asked for.
const TOKENS: u32 = 24;
/// The requests of an audit of three answers: the first is asked again twice, to see whether seeds
/// are honoured.
const SECOND_ANSWER: usize = 3;
const REQUESTS: usize = 5;

/// What the server answers instead of the truth.
#[derive(Clone, Copy)]
enum Fault {
    Busy,
    Empty,
    /// More tokens than the context holds.
    Long,
}

impl Fault {
    fn answer(self) -> (StatusCode, String) {
        let ids: Vec<u32> = match self {
            Self::Busy => return (StatusCode::TOO_MANY_REQUESTS, "busy".into()),
            Self::Empty => Vec::new(),
            Self::Long => vec![97; 600],
        };
        let text = "a".repeat(ids.len());
        let body = json!({"choices": [{"index": 0, "text": text, "token_ids": ids}]});
        (StatusCode::OK, body.to_string())
    }
}

/// An audit of three answers by a server that is true but for the request `at`, and how many
/// requests came.
async fn audited(fault: Fault, at: usize) -> (Result<Findings, AuditError>, usize) {
    let site = site(common::options());
    let (app, count) = (site.app.clone(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&count);
    let front = Router::new().fallback(move |body: String| {
        let (app, place) = (app.clone(), counted.fetch_add(1, Ordering::Relaxed));
        // An end token that chance draws would make answers shorter.
        let mut body: Value = serde_json::from_str(&body).unwrap();
        body["ignore_eos"] = json!(true);
        async move {
            match place == at {
                true => fault.answer().into_response(),
                false => post_raw(&app, COMPLETION, body.to_string()).await.into_response(),
            }
        }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, front).await.unwrap() });
    let minute = Duration::from_secs(60);
    let target = Target {
        url,
        hotkey: None,
        signer: None,
        api_key: None,
        read_timeout: minute,
        timeout: minute,
        size: Size::LARGE,
    };
    let requests =
        AuditRequests { model: "tiny".into(), is_chat: false, answers_max: 3, tokens: TOKENS };
    let prompts = ["Write about the sea.".to_owned()];
    let verifier = common::verifier(&site.served);
    let mut chance = Chance::seeded(1);
    let drawn = (prompts.as_slice(), &mut chance, Clock::system());
    let found = audit((target, requests), &verifier, drawn, &|_, _| {}).await;
    (found, count.load(Ordering::Relaxed))
}

#[tokio::test]
async fn a_failing_request_ends_the_asking_and_keeps_what_was_found() {
    for (fault, want) in [
        (Fault::Busy, "429"),
        (Fault::Long, "the answer has 600 tokens, 24 were asked for; after a prompt of"),
    ] {
        for (at, answers) in [(1, 1), (SECOND_ANSWER, 1), (SECOND_ANSWER + 1, 2)] {
            if matches!(fault, Fault::Long) && at == 1 {
                continue; // only its text counts there
            }
            let (found, count) = audited(fault, at).await;
            let Findings { evidence, honours_seeds, broken_off } = found.unwrap();
            assert_eq!((evidence.answers, count), (answers, at + 1));
            assert_eq!(evidence.tokens, answers * TOKENS as usize);
            assert_eq!(honours_seeds, (at > 1).then_some(true));
            let why = broken_off.unwrap().to_string();
            assert!(why.starts_with("http://127.0.0.1:") && why.contains(want), "{why}");
        }
        // Nothing was found before the first answer.
        let why = audited(fault, 0).await.0.unwrap_err();
        assert!(!why.is_ours() && why.to_string().contains(want), "{why}");
    }
}

#[tokio::test]
async fn an_empty_answer_is_counted_and_the_next_is_asked_for() {
    let (found, count) = audited(Fault::Empty, SECOND_ANSWER).await;
    let Findings { evidence, broken_off, .. } = found.unwrap();
    assert!(broken_off.is_none() && count == REQUESTS, "{broken_off:?} {count}");
    assert_eq!((evidence.answers, evidence.without_tokens), (3, 1));
    assert_eq!(evidence.tokens, 2 * TOKENS as usize);
    // An empty first answer says nothing of seeds: the second is asked again.
    let (found, count) = audited(Fault::Empty, 0).await;
    let Findings { evidence, honours_seeds, .. } = found.unwrap();
    assert_eq!((evidence.without_tokens, honours_seeds, count), (1, Some(true), REQUESTS));
}
