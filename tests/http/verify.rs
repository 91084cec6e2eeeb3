//! Verification from end to end: what the server answers passes, and what was changed on the way
//! is rejected for the right reason.

use crate::common;
use crate::common::site::{CHAT, COMPLETION, Site, chat, completion, post, site, stream};
use axum::http::StatusCode;
use serde_json::{Value, json};
use std::ops::Range;
use std::sync::Arc;
use targon_engine::chain::keys::{Hotkey, Keypair};
use targon_engine::clock::Clock;
use targon_engine::engine::request::Request;
use targon_engine::intake::translate::Defaults;
use targon_engine::models::Identity;
use targon_engine::models::pass::{RowAsk, RowReport};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::codec::{from_hex, to_hex};
use targon_engine::proof::commit::{end_message, link};
use targon_engine::proof::{CHUNK_ROWS, Scheme};
use targon_engine::server::router;
use targon_engine::server::state::ServerState;
use targon_engine::verify::Challenge;
use targon_engine::verify::answer::Answer;
use targon_engine::verify::prefill::{Prefix, RowSink};
use targon_engine::verify::{
    Claim, Depth, Limits, Profile, Reason, Report, Stop, Verdict, Verifier,
};

pub(super) const NONCE: &str = "2222222222222222222222222222222222222222222222222222222222222222";

pub(super) async fn understood(verifier: &Verifier, body: &Value) -> Request {
    let reader = common::reader(&verifier.model.text);
    let understood = match body.get("messages") {
        Some(_) => reader.chat(&serde_json::from_value(body.clone()).unwrap()).await,
        None => reader.completion(&serde_json::from_value(body.clone()).unwrap()).await,
    };
    understood.unwrap().requests.remove(0)
}

fn asked(body: &Value) -> Option<Challenge> {
    let scheme: Scheme = body["proof"]["scheme"].as_str()?.parse().unwrap();
    Some(Challenge { scheme, nonce: Some(from_hex(NONCE).unwrap()), hotkey: None })
}

pub(super) async fn check(
    verifier: &Verifier,
    body: &Value,
    answer: &Answer,
    profile: Profile,
    depth: Depth,
) -> Report {
    let request = understood(verifier, body).await;
    let seed = body["seed"].as_i64();
    let claim = Claim { seed, proof: asked(body), ..Claim::new(&request, answer) };
    verifier.verify(profile, 7).depth(depth).answer(&claim)
}

fn proved(scheme: &str) -> Value {
    chat(json!({
        "max_tokens": 70, "temperature": 0.8, "logprobs": true,
        "proof": {"scheme": scheme, "nonce": NONCE},
    }))
}

pub(super) async fn answer(site: &Site, body: &Value) -> (Value, Answer) {
    let path = if body.get("messages").is_some() { CHAT } else { COMPLETION };
    let mut body = body.clone();
    body["return_token_ids"] = json!(true);
    let (status, response) = post(&site.app, path, body).await;
    assert_eq!(status, StatusCode::OK, "{response}");
    let answer = Answer::of_response(&response, 0).unwrap();
    (response, answer)
}

#[tokio::test]
async fn honest_answers_pass_with_exact_rows_and_no_margin() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let bodies = [
        proved("residue-v1"),
        proved("residue-v1-u4"),
        proved("toploc"),
        chat(json!({"proof": {"scheme": "residue-v1", "nonce": NONCE}, "top_p": 0.7, "top_k": 30,
            "repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {"65": 3},
            "min_tokens": 5, "ignore_eos": false, "max_tokens": 60})),
        chat(json!({"proof": {"scheme": "residue-v1", "nonce": NONCE}, "temperature": 0})),
        chat(json!({"proof": {"scheme": "residue-v1", "nonce": NONCE}, "ignore_eos": false,
            "max_tokens": 90, "structured_outputs": {"regex": "[a-f]{40}x"}})),
        completion(json!({"proof": {"scheme": "residue-v1", "nonce": NONCE}, "max_tokens": 33,
            "stop": ["\u{3}\u{4}"], "logprobs_mode": "scaled", "logprobs": 2})),
    ];
    for body in bodies {
        let (_, whole) = answer(&site, &body).await;
        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        let path = if body.get("messages").is_some() { CHAT } else { COMPLETION };
        let frames = stream(&site.app, path, streamed).await;
        let streamed = Answer::of_stream(&frames, 0).unwrap();
        assert_eq!((&whole.ids, &whole.text), (&streamed.ids, &streamed.text));
        for (answer, depth) in [(&whole, Depth::Slow), (&streamed, Depth::Fast)] {
            let report = check(&verifier, &body, answer, Profile::Proof, depth).await;
            assert_eq!(report.verdict, Verdict::Pass, "{body}");
            assert!(report.chunks.iter().all(|c| c.is_exact));
            assert!(report.rows.iter().all(|r| r.margin == Some(0.0)), "{body}");
            assert_eq!(report.rows.last().unwrap().index, answer.ids.len() - 1);
            for row in &report.rows {
                assert!(row.reported.is_none() || row.reported == Some(row.logprob), "{row:?}");
            }
        }
        let powv = check(&verifier, &body, &streamed, Profile::Powv, Depth::Fast).await;
        assert_eq!(powv.verdict, Verdict::Pass);
    }
}

/// The chain over whatever the chunks hold now: a forger can always make one.
fn rechain(answer: &mut Answer) {
    let mut digest = from_hex(&answer.end.as_ref().unwrap().root).unwrap();
    for (chunk, ids) in answer.chunks.iter_mut().zip(answer.ids.chunks(CHUNK_ROWS)) {
        digest = link(&digest, chunk.index, ids, &chunk.data);
        chunk.digest = digest;
    }
}

#[tokio::test]
async fn whatever_is_changed_is_rejected_for_the_right_reason() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let body = proved("residue-v1");
    let (_, honest) = answer(&site, &body).await;
    type Change = fn(&mut Answer);
    let cases: [(&str, Change, Reason); 20] = [
        ("other canon", |a| a.end.as_mut().unwrap().canon = "canon-1".into(), Reason::WrongRoot),
        ("canon without a name", |a| a.end.as_mut().unwrap().canon.clear(), Reason::BadProof),
        (
            "no canon's name",
            |a| a.end.as_mut().unwrap().canon = "\u{1b}[2J".into(),
            Reason::BadProof,
        ),
        ("no tokens", |a| a.ids.clear(), Reason::TooShort),
        ("one too many", |a| a.ids.push(1), Reason::TooLong),
        ("unknown id", |a| a.ids[3] = 5000, Reason::BadIds),
        ("other text", |a| a.text = Some("hello".into()), Reason::TextMismatch),
        ("cut short", |a| a.ids.truncate(30), Reason::EarlyEnd),
        ("wrong reason", |a| a.finish_reason = Some("stop".into()), Reason::EarlyEnd),
        ("infinite", |a| a.logprobs[0] = Some(f64::INFINITY), Reason::LogprobMismatch),
        ("positive", |a| a.logprobs[0] = Some(1.0), Reason::LogprobMismatch),
        ("powv", |a| a.powv[1] = Some(1), Reason::BadPowv),
        ("no end", |a| a.end = None, Reason::BadProof),
        ("other scheme", |a| a.end.as_mut().unwrap().scheme = "toploc".into(), Reason::BadProof),
        ("other nonce", |a| a.end.as_mut().unwrap().nonce = "11".repeat(32), Reason::WrongRoot),
        ("other model", |a| a.end.as_mut().unwrap().model = "11".repeat(32), Reason::WrongRoot),
        ("other root", |a| a.end.as_mut().unwrap().root = "11".repeat(32), Reason::WrongRoot),
        (
            "unsigned hotkey",
            |a| {
                let hotkey = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY";
                a.end.as_mut().unwrap().hotkey = Some(hotkey.into());
            },
            Reason::WrongRoot,
        ),
        ("chunk dropped", |a| drop(a.chunks.pop()), Reason::BadProof),
        ("chunks swapped", |a| a.chunks.swap(0, 1), Reason::ChainBreak),
    ];
    for (name, change, reason) in cases {
        let mut changed = honest.clone();
        change(&mut changed);
        let report = check(&verifier, &body, &changed, Profile::Proof, Depth::Slow).await;
        let Verdict::Reject(rejection) = &report.verdict else { panic!("{name}: {report:?}") };
        assert_eq!(rejection.reason, reason, "{name}: {rejection}");
    }
}

/// The prover computes in a canon of another name; here with our bits, so that nothing but the name
/// decides what is compared.
#[tokio::test]
async fn rows_of_another_canon_are_compared_by_energy_and_never_exactly() {
    let site = site(common::options());
    let own = common::verifier(&site.served);
    for (scheme, canon) in
        [("residue-v1", "canon-2"), ("residue-v1", "mma-sm90-1"), ("toploc", "mma-sm90-1")]
    {
        let identity = (*own.identity).clone();
        let model_hash = identity.hash_under(canon);
        let identity = Arc::new(Identity { model_hash, ..identity });
        let theirs = Verifier { identity, ..own.clone() };
        let body = proved(scheme);
        let (_, mut answer) = answer(&site, &body).await;
        let request = understood(&own, &body).await;
        let scheme = scheme.parse().unwrap();
        common::spoof_by(
            scheme,
            &theirs,
            (&request, &request.prompt),
            body["seed"].as_i64(),
            NONCE,
            &mut answer,
        );
        answer.end.as_mut().unwrap().canon = canon.into();
        let is_ours = canon == "canon-2";
        let report = check(&own, &body, &answer, Profile::Proof, Depth::Slow).await;
        assert_eq!(report.verdict, Verdict::Pass, "{canon}");
        assert_eq!(report.other_canon.as_deref(), (!is_ours).then_some(canon));
        for chunk in &report.chunks {
            assert_eq!(chunk.is_exact, is_ours, "{canon} {chunk:?}");
            assert!(chunk.energy.is_none_or(|e| e == 0.0), "{chunk:?}");
        }
        let exact = Verifier { limits: Limits { exact: true, ..own.limits }, ..own.clone() };
        let verdict = check(&exact, &body, &answer, Profile::Proof, Depth::Slow).await.verdict;
        match verdict {
            Verdict::Pass => assert!(is_ours),
            Verdict::Reject(r) => assert!(!is_ours && r.what.contains(canon), "{r}"),
            Verdict::Unscored(why) => panic!("{why}"),
        }
    }
}

#[tokio::test]
async fn forged_rows_have_the_energy_of_noise() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    for scheme in ["residue-v1", "residue-v1-u4", "toploc"] {
        let body = proved(scheme);
        let (_, honest) = answer(&site, &body).await;
        let (_, other) = answer(&site, &{
            let mut other = body.clone();
            other["messages"][0]["content"] = json!("goodbye");
            other
        })
        .await;
        type Forge<'a> = Box<dyn Fn(usize, &mut Vec<u8>) + 'a>;
        let forgeries: [(&str, Forge<'_>); 6] = [
            ("zeros", Box::new(|_, data| data.fill(0))),
            ("constant", Box::new(|_, data| data.fill(0x5a))),
            ("counting", Box::new(|_, data| (0..).zip(data).for_each(|(i, b)| *b = i as u8))),
            ("shifted by a row", Box::new(|_, data| data.rotate_left(4))),
            ("replayed", Box::new(|i, data| data.clone_from(&other.chunks[i].data))),
            ("short", Box::new(|_, data| data.truncate(3))),
        ];
        for (name, forge) in forgeries {
            let mut forged = honest.clone();
            for (i, chunk) in forged.chunks.iter_mut().enumerate() {
                forge(i, &mut chunk.data);
            }
            rechain(&mut forged);
            let report = check(&verifier, &body, &forged, Profile::Proof, Depth::Fast).await;
            let Verdict::Reject(rejection) = &report.verdict else {
                panic!("{scheme} {name}: {:?}", report.chunks)
            };
            let is_right = matches!(rejection.reason, Reason::SketchEnergy | Reason::BadProof);
            assert!(is_right, "{scheme} {name}: {rejection}");
        }
    }
}

#[tokio::test]
async fn true_rows_of_tokens_that_were_not_drawn_do_not_help() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    // Tokens of another seed or temperature, proved afterwards with the true weights.
    let body = proved("residue-v1");
    let (_, honest) = answer(&site, &body).await;
    for change in [json!({"temperature": 0.2}), json!({"temperature": 0.0}), json!({"seed": 99})] {
        let mut cheap = body.clone();
        cheap["proof"]["nonce"] = json!("77".repeat(32));
        cheap.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let (_, mut spoofed) = answer(&site, &cheap).await;
        assert_ne!(spoofed.ids, honest.ids);
        let request = understood(&verifier, &body).await;
        let seed = body["seed"].as_i64();
        let asked = (&request, request.prompt.as_slice());
        common::spoof(&verifier, asked, seed, NONCE, &mut spoofed);
        let report = check(&verifier, &body, &spoofed, Profile::Proof, Depth::Fast).await;
        let Verdict::Reject(rejection) = &report.verdict else { panic!("{change}: {report:?}") };
        assert_eq!(rejection.reason, Reason::SamplerMargin, "{change}: {rejection}");
        assert!(report.chunks.iter().all(|c| c.is_exact), "the rows themselves are true");
    }
}

#[tokio::test]
async fn rows_of_another_model_or_prompt_are_seen_in_the_first_chunk() {
    let site = site(common::options());
    let other = common::tiny_model(4, &Pool::new(2, Isa::best()).unwrap());
    let verifier = common::verifier(&site.served);
    let body = proved("residue-v1");
    let (_, honest) = answer(&site, &body).await;
    let request = understood(&verifier, &body).await;
    let mut shorter = request.clone();
    shorter.prompt.remove(0);
    let cheap = Verifier { model: Arc::new(other), ..verifier.clone() };
    for (name, computed_by, prompt) in
        [("model", &cheap, &request.prompt), ("prompt", &verifier, &shorter.prompt)]
    {
        let mut forged = honest.clone();
        common::spoof(computed_by, (&request, prompt), body["seed"].as_i64(), NONCE, &mut forged);
        let report = check(&verifier, &body, &forged, Profile::Proof, Depth::Fast).await;
        let Verdict::Reject(rejection) = &report.verdict else { panic!("{name}: {report:?}") };
        assert_eq!(rejection.reason, Reason::SketchEnergy, "{name}: {rejection}");
        assert!(report.chunks[0].energy.unwrap() > Limits::default().energy_u8, "{name}");
    }
}

#[tokio::test]
async fn only_the_hotkeys_own_signature_over_this_end_counts() {
    let alice = || Keypair::from_seed(&[7; 32]).unwrap();
    let unsigned = site(common::options());
    let verifier = common::verifier(&unsigned.served);
    let registry = unsigned.state.registry().clone();
    let state = ServerState::new(registry, Defaults::default(), Clock::manual(1_000_000));
    let state = state.signed_by(Arc::new(alice()));
    let signed = Site { app: router(state.clone()), state, ..unsigned };
    let body = proved("residue-v1");
    let (_, honest) = answer(&signed, &body).await;
    let request = understood(&verifier, &body).await;
    let seed = body["seed"].as_i64();
    let check = |answer: &Answer, hotkey: Option<Hotkey>| {
        let proof = asked(&body).map(|a| Challenge { hotkey, ..a });
        let end_is_implied = false;
        let claim = Claim { seed, proof, end_is_implied, ..Claim::new(&request, answer) };
        verifier.verify(Profile::Proof, 7).answer(&claim).verdict
    };
    let reason = |verdict: Verdict| match verdict {
        Verdict::Reject(rejection) => rejection.reason,
        other => panic!("{other}"),
    };
    assert_eq!(check(&honest, None), Verdict::Pass);
    assert_eq!(check(&honest, Some(alice().hotkey())), Verdict::Pass);
    let bob = Keypair::from_seed(&[8; 32]).unwrap();
    assert_eq!(reason(check(&honest, Some(bob.hotkey()))), Reason::BadSignature);
    let resigned = |by: &Keypair, tag: u8| {
        let mut changed = honest.clone();
        let message = end_message(&honest.chunks.last().unwrap().digest, 70, tag);
        changed.end.as_mut().unwrap().signature = Some(to_hex(&by.sign(&message)));
        changed
    };
    assert_eq!(check(&resigned(&alice(), 4), None), Verdict::Pass, "4 stands for the limit");
    assert_eq!(reason(check(&resigned(&bob, 4), None)), Reason::BadSignature);
    assert_eq!(reason(check(&resigned(&alice(), 1), None)), Reason::BadSignature);
    let mut missing = honest.clone();
    missing.end.as_mut().unwrap().signature = None;
    assert_eq!(reason(check(&missing, None)), Reason::BadSignature);
}

#[tokio::test]
async fn any_response_ends_in_a_rejection_not_a_panic() {
    for response in [
        json!(null),
        json!([]),
        json!({"choices": 3}),
        json!({"choices": []}),
        json!({"choices": [{"index": 0}]}),
        json!({"choices": [{"index": 0, "token_ids": [-1]}]}),
        json!({"choices": [{"index": 0, "token_ids": [1e30]}]}),
        json!({"choices": [{"index": 0, "token_ids": ["1"]}]}),
        json!({"choices": [{"index": 0, "token_ids": [1], "logprobs": {"content": []},
            "proof": [{"index": 0, "data": "%%", "digest": ""}]}]}),
        json!({"choices": [{"index": 0, "token_ids": [1],
            "logprobs": {"content": [{}, {}]}}]}),
        json!({"choices": [{"index": 0, "token_ids": [1], "proof_end": 4}]}),
        json!({"error": {"message": "boo"}}),
    ] {
        let whole = Answer::of_response(&response, 0);
        let streamed = Answer::of_stream(std::slice::from_ref(&response), 0);
        assert!(whole.is_err() && streamed.is_err(), "{response}");
    }
}

#[tokio::test]
async fn choices_of_one_prompt_are_checked_together_as_they_are_one_by_one() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let mut body = proved("residue-v1");
    body["n"] = json!(4);
    body["return_token_ids"] = json!(true);
    let (status, response) = post(&site.app, CHAT, body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{response}");
    let answers = (0..4).map(|choice| Answer::of_response(&response, choice).unwrap());
    let mut answers: Vec<Answer> = answers.collect();
    answers[1].text = Some("hello".into());
    answers[2].chunks[1].data.fill(0);
    rechain(&mut answers[2]);
    let reader = common::reader(&verifier.model.text);
    let understood = reader.chat(&serde_json::from_value(body.clone()).unwrap()).await.unwrap();
    let (seed, proof) = (body["seed"].as_i64(), asked(&body));
    let claims: Vec<Claim<'_>> = (0..)
        .zip(understood.requests.iter().zip(&answers))
        .map(|(choice, (request, answer))| Claim {
            seed,
            choice,
            proof,
            ..Claim::new(request, answer)
        })
        .collect();
    assert_eq!(claims.len(), 4);
    for (profile, depth) in [
        (Profile::Proof, Depth::Fast),
        (Profile::Proof, Depth::Slow),
        (Profile::Ranks, Depth::Slow),
        (Profile::Powv, Depth::Fast),
    ] {
        let together = verifier.verify(profile, 7).depth(depth).answers(&claims);
        let alone =
            claims.iter().map(|claim| verifier.verify(profile, 7).depth(depth).answer(claim));
        assert_eq!(together, alone.collect::<Vec<Report>>(), "{profile:?} {depth:?}");
    }
    let reports = verifier.verify(Profile::Proof, 7).depth(Depth::Slow).answers(&claims);
    let reasons = reports.iter().map(|report| match &report.verdict {
        Verdict::Reject(rejection) => Some(rejection.reason),
        Verdict::Pass => None,
        Verdict::Unscored(why) => panic!("{why}"),
    });
    let want = [None, Some(Reason::TextMismatch), Some(Reason::SketchEnergy), None];
    assert_eq!(reasons.collect::<Vec<_>>(), want);
    assert_eq!(reports[3].rows.len(), 70);
    assert!(verifier.verify(Profile::Proof, 7).depth(Depth::Slow).answers(&[]).is_empty());
}

/// Every row of an output, the logits of every third, and where it is.
#[derive(Default)]
struct Seen(Vec<(usize, Vec<u16>, Option<Vec<u32>>)>);

impl RowSink for Seen {
    fn ask(&mut self, indices: Range<usize>, position: usize) -> Result<Vec<RowAsk<'_>>, Stop> {
        let ask = |(index, position): (usize, usize)| RowAsk {
            hidden: true,
            logits: index % 3 == 0,
            ..RowAsk::new(0, position)
        };
        Ok(indices.zip(position..).map(ask).collect())
    }

    fn take(&mut self, index: usize, report: RowReport) -> Result<(), Stop> {
        let logits = report.logits.map(|all| all.iter().map(|x| x.to_bits()).collect());
        self.0.push((index, report.hidden.unwrap(), logits));
        Ok(())
    }
}

/// Stops at the first row.
struct Stopping(Stop);

impl RowSink for Stopping {
    fn ask(&mut self, indices: Range<usize>, position: usize) -> Result<Vec<RowAsk<'_>>, Stop> {
        Ok(indices.zip(position..).map(|(_, position)| RowAsk::new(0, position)).collect())
    }

    fn take(&mut self, _: usize, _: RowReport) -> Result<(), Stop> {
        Err(self.0.clone())
    }
}

#[test]
fn outputs_that_share_a_prompt_have_the_rows_of_a_pass_of_their_own() {
    let pool = Pool::new(2, Isa::best()).unwrap();
    let model = common::tiny_model(3, &pool);
    let pass = |blocks| model.pass(&pool, blocks);
    // The last row of the second prompt is the first of a block.
    for tokens in [45, 33] {
        let prompt: Vec<u32> = (0..tokens).map(|i| i * 7 % 256).collect();
        let mut prefix = Prefix::new(pass, &prompt, 300).unwrap();
        // Someone who stops in the middle leaves nothing behind for those after him.
        let stop = Stop::Fault("enough".into());
        assert_eq!(prefix.run(&[1; 200], &mut Stopping(stop.clone())), Err(stop));
        for length in [90_u32, 5, 300, 1, 40] {
            let output: Vec<u32> = (0..length).map(|i| (i * length + 11) % 256).collect();
            let (mut shared, mut alone) = (Seen::default(), Seen::default());
            prefix.run(&output, &mut shared).unwrap();
            let mut own = Prefix::new(pass, &prompt, output.len()).unwrap();
            own.run(&output, &mut alone).unwrap();
            assert_eq!(shared.0.len(), length as usize);
            assert!(shared.0 == alone.0, "{tokens} and {length} tokens");
        }
    }
    assert!(Prefix::new(pass, &[], 3).is_err());
}

#[tokio::test]
async fn work_that_nobody_waits_for_is_given_up_unscored() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let body = proved("residue-v1");
    let (_, honest) = answer(&site, &body).await;
    let request = understood(&verifier, &body).await;
    let claim =
        Claim { seed: body["seed"].as_i64(), proof: asked(&body), ..Claim::new(&request, &honest) };
    let report = verifier.verify(Profile::Proof, 7).while_wanted(&|| false).answer(&claim);
    assert!(matches!(report.verdict, Verdict::Unscored(_)), "{report:?}");
}
