//! The profile of Targon 4.4 reads an answer's rows over the ids that were sent, after the whole
//! prompt. The published verifier reads them over the text, tokenised again, and drops the token
//! that a chat prompt begins with where the tokenizer names it as its first. Either moves its
//! rows away from those that an honest answer was drawn from.

use crate::common;
use crate::common::site::{Site, completion, site};
use crate::verify::{answer, judge};
use serde_json::{Value, json};
use targon_engine::verify::answer::Answer;
use targon_engine::verify::{Depth, Profile, Report, Verdict, Verifier};

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
    judge(verifier, body, answer, Profile::Ranks, Depth::Slow).await
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
