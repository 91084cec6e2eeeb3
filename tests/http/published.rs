//! The profile of Targon 4.4 reads an answer's rows over the ids that were sent, after the whole
//! prompt. The published verifier reads them over the text, tokenised again, and drops the token
//! that a chat prompt begins with where the tokenizer names it as its first. Either moves its
//! rows away from those that an honest answer was drawn from.

use crate::common;
use crate::common::site::{Site, chat, completion, site};
use crate::verify::{answer, check, understood};
use serde_json::{Value, json};
use std::path::Path;
use targon_engine::models::Model;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::server::registry::Served;
use targon_engine::verify::answer::Answer;
use targon_engine::verify::{Claim, Depth, Profile, Reason, Report, Verdict, Verifier, structure};

/// The END token of the tiny model.
const END: u32 = 260;

/// A greedy answer to `prompt`: every token of it is the most probable one, after this prompt.
async fn greedy(site: &Site, prompt: &[u32]) -> (Value, Answer) {
    let body = completion(json!({
        "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": true,
        "logprobs": 1, "logprobs_mode": "scaled",
    }));
    let (_, answer) = answer(site, &body).await;
    (body, answer)
}

async fn ranks(verifier: &Verifier, body: &Value, answer: &Answer) -> Report {
    check(verifier, body, answer, Profile::Ranks, Depth::Slow).await
}

#[tokio::test]
async fn rows_follow_the_whole_prompt() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let prompt = [17, 90, 200, 31, 77, 8, 140];
    let (mut body, answer) = greedy(&site, &prompt).await;
    let report = ranks(&verifier, &body, &answer).await;
    assert_eq!(report.verdict, Verdict::Pass);
    assert!(report.rows.iter().all(|row| row.rank == 1));
    // The control: without its first token the same answer has other ranks.
    body["prompt"] = json!(prompt[1..]);
    let report = ranks(&verifier, &body, &answer).await;
    assert!(report.rows.is_empty() || report.rows.iter().any(|row| row.rank != 1), "{report:?}");
}

#[tokio::test]
async fn an_answer_need_not_tokenise_to_itself() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let tokenizer = &verifier.model.text.tokenizer;
    let mut others = 0;
    for first in 0..8 {
        let (body, answer) = greedy(&site, &[17, 90, 200, 31, first]).await;
        let again = tokenizer.encode(answer.text.as_deref().unwrap(), false).unwrap();
        others += usize::from(again != answer.ids);
        let report = ranks(&verifier, &body, &answer).await;
        assert_eq!(report.verdict, Verdict::Pass, "{first}");
        assert!(report.rows.iter().all(|row| row.rank == 1), "{first}");
    }
    assert!(others > 0, "all texts tokenise to the same ids again");
}

/// A model with the weights of the others and this changed in its files, and a verifier of it.
fn like_the_tiny_one(config: &[(&str, Value)], tokenizer: Option<Value>) -> (Served, Verifier) {
    let directory = tempfile::tempdir().unwrap();
    let mut whole = common::tiny_config();
    config.iter().for_each(|(key, value)| whole[*key] = value.clone());
    common::write_checkpoint(directory.path(), &whole, 3);
    if let Some(tokenizer) = tokenizer {
        let path = directory.path().join("tokenizer_config.json");
        std::fs::write(path, tokenizer.to_string()).unwrap();
    }
    let pool = Pool::new(2, Isa::best()).unwrap();
    let model = Model::load(directory.path(), None, &pool, |_, _| {}).unwrap();
    let served = common::served(model, common::options());
    let verifier = common::verifier(&served);
    (served, verifier)
}

/// What the engine itself answers to `body`.
async fn drawn(served: &Served, verifier: &Verifier, body: &Value) -> (Vec<u32>, Answer) {
    let request = understood(verifier, body).await;
    let ended = served.engine.submit(request.clone()).unwrap().collect().await.unwrap();
    (request.prompt, Answer::of_steps(&ended.steps, None))
}

#[tokio::test]
async fn a_chat_keeps_the_token_that_its_prompt_begins_with() {
    let template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\
        {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let tokenizer = json!({"bos_token": "<|end|>", "chat_template": template});
    let (served, verifier) = like_the_tiny_one(&[], Some(tokenizer));
    let body = chat(json!({
        "max_tokens": 40, "temperature": 0, "logprobs": true, "logprobs_mode": "scaled",
    }));
    let (prompt, answer) = drawn(&served, &verifier, &body).await;
    assert_eq!(prompt[0], END);
    let report = ranks(&verifier, &body, &answer).await;
    assert_eq!(report.verdict, Verdict::Pass);
    assert!(report.rows.iter().all(|row| row.rank == 1));
    // The published verifier's prompt: without it the same answer has other ranks.
    let lost = completion(json!({
        "prompt": prompt[1..], "max_tokens": 40, "temperature": 0, "ignore_eos": true,
        "logprobs": 1, "logprobs_mode": "scaled",
    }));
    let answer = Answer { powv: Vec::new(), ..answer };
    let report = ranks(&verifier, &lost, &answer).await;
    assert!(report.rows.iter().any(|row| row.rank != 1), "{report:?}");
}

#[tokio::test]
async fn leading_tokens_without_text_count() {
    let site = site(common::options());
    let verifier = common::verifier(&site.served);
    let prompt = [17, 90, 200, 31];
    let mut worst = 0;
    // Bytes that a character begins with: its text comes with its last byte.
    for lead in 0xe1..=0xec {
        let (rest_body, rest) = greedy(&site, &[&prompt[..], &[lead]].concat()).await;
        let mut body = rest_body.clone();
        (body["prompt"], body["max_tokens"]) = (json!(prompt), json!(41));
        let mut whole = Answer { text: None, ..rest.clone() };
        whole.ids.insert(0, lead);
        [&mut whole.logprobs].into_iter().for_each(|list| list.insert(0, Some(-0.5)));
        whole.tops.insert(0, Vec::new());
        whole.powv.insert(0, None);
        let request = understood(&verifier, &body).await;
        let claim = Claim::new(&request, &whole);
        let walk = structure::check(&claim, &verifier.model.text, 512).unwrap();
        assert_eq!(walk.pieces[0], "", "{lead}");
        let report = ranks(&verifier, &body, &whole).await;
        let rank = report.rows[0].rank;
        worst = worst.max(rank);
        if rank < 75 {
            continue;
        }
        let Verdict::Reject(why) = &report.verdict else { panic!("rank {rank}: {report:?}") };
        assert_eq!(why.reason, Reason::UnlikelyToken, "{why}");
        assert!(why.what.contains("token 0 has rank"), "{why}");
        // The published verifier drops it: what is left passes, here too.
        let report = ranks(&verifier, &rest_body, &rest).await;
        assert_eq!(report.verdict, Verdict::Pass, "{lead}");
        return;
    }
    panic!("no such token has a rank of 75 or more, only up to {worst}");
}

#[tokio::test]
async fn every_end_token_of_the_model_ends_an_answer() {
    let site = site(common::options());
    let (_, long) = greedy(&site, &[17, 90, 200, 31, 77, 8, 140]).await;
    let place = (8..30).find(|at| !long.ids[..*at].contains(&long.ids[*at])).unwrap();
    let other = long.ids[place];
    let (served, verifier) = like_the_tiny_one(&[("eos_token_id", json!([END, other]))], None);
    let body = completion(json!({
        "prompt": [17, 90, 200, 31, 77, 8, 140], "max_tokens": 40, "temperature": 0,
        "ignore_eos": false, "logprobs": 1, "logprobs_mode": "scaled",
    }));
    let (_, short) = drawn(&served, &verifier, &body).await;
    assert_eq!((short.ids.len(), short.ids.last()), (place + 1, Some(&other)));
    assert_eq!(ranks(&verifier, &body, &short).await.verdict, Verdict::Pass);
    // Where it is no end, as for the published verifier, the same answer ends too early.
    let report = ranks(&common::verifier(&site.served), &body, &short).await;
    let Verdict::Reject(why) = &report.verdict else { panic!("{report:?}") };
    assert_eq!(why.reason, Reason::EarlyEnd, "{why}");
}

/// Each intended difference of the table names the test that shows it, and there is one.
#[test]
fn every_row_of_the_table_of_differences_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let tests = ["tests/http/published.rs", "src/bench/attack/published.rs"].map(read).concat();
    let guide = read("docs/verification.md");
    let table = guide.split("| published | here |").nth(1).unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 15);
    for row in rows {
        let name = row.trim_end_matches([' ', '|']).rsplit('`').nth(1).unwrap();
        let is_test = tests.split("#[test]").chain(tests.split("#[tokio::test]")).any(|after| {
            let head = after.lines().find(|line| line.contains("fn ")).unwrap_or_default();
            head.contains(&format!("fn {name}("))
        });
        assert!(is_test, "{row}: no test `{name}`");
    }
}
