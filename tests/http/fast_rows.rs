//! Which tokens a fast check looks at: all of a short answer, where its prompt pays for them.

use crate::common;
use crate::common::site::{chat, site};
use crate::verify::{NONCE, answer, understood};
use serde_json::json;
use targon_engine::engine::request::Request;
use targon_engine::proof::Scheme;
use targon_engine::proof::codec::from_hex;
use targon_engine::verify::answer::Answer;
use targon_engine::verify::scrutiny::Scrutiny;
use targon_engine::verify::{
    Challenge, Claim, Depth, FastRows, Limits, Profile, Reason, Report, Verdict, Verifier,
};

/// Tokens of an answer, and the one that is not the sampler's.
const TOKENS: usize = 60;
const FALSE: usize = 41;

fn check(verifier: &Verifier, request: &Request, answer: &Answer, chance: u64) -> Report {
    let proof =
        Challenge { scheme: Scheme::Residue, nonce: Some(from_hex(NONCE).unwrap()), hotkey: None };
    let claim = Claim { seed: Some(5), proof: Some(proof), ..Claim::new(request, answer) };
    verifier.verify(Profile::Proof, chance).depth(Depth::Fast).answer(&claim)
}

/// Tokens whose margin is above its limit, where every row is looked at.
fn far(verifier: &Verifier, request: &Request, answer: &Answer) -> Vec<usize> {
    let scrutiny = Scrutiny { rows: FastRows::Count(usize::MAX), ..Scrutiny::NONE };
    let report = check(&Verifier { scrutiny, ..verifier.clone() }, request, answer, 0);
    assert_eq!(report.rows.len(), TOKENS);
    let limit = verifier.limits.margin;
    report.rows.iter().filter(|r| r.margin.unwrap() > limit).map(|r| r.index).collect()
}

#[tokio::test]
async fn one_false_token_of_a_short_answer_is_found_whichever_rows_are_drawn() {
    let site = site(common::options());
    let base = common::verifier(&site.served);
    let body = chat(json!({
        "messages": [{"role": "user", "content": "a prompt of some length ".repeat(5)}],
        "max_tokens": TOKENS, "temperature": 0.8, "seed": 5,
        "proof": {"scheme": "residue-v1", "nonce": NONCE},
    }));
    let (_, honest) = answer(&site, &body).await;
    let request = understood(&base, &body).await;
    // True rows of tokens of which only one was not drawn.
    let forged = (0..200).find_map(|other| {
        let mut forged = Answer { text: None, powv: Vec::new(), ..honest.clone() };
        forged.logprobs.clear();
        forged.ids[FALSE] = other;
        common::spoof(&base, (&request, &request.prompt), Some(5), NONCE, &mut forged);
        (far(&base, &request, &forged) == [FALSE]).then_some(forged)
    });
    let forged = forged.expect("some token changes no draw after it");
    // The mean stays far from its limit: nothing but that row shows it.
    let by = |rows| Verifier {
        scrutiny: Scrutiny { rows, ..Scrutiny::NONE },
        limits: Limits { margin_mean: 1.0, ..base.limits },
        ..base.clone()
    };
    let found = |rows, answer: &Answer| {
        let verifier = by(rows);
        let is_found = |chance: &u64| {
            let report = check(&verifier, &request, answer, *chance);
            match report.verdict {
                Verdict::Reject(why) => {
                    assert_eq!(why.reason, Reason::SamplerMargin, "{why}");
                    true
                }
                verdict => {
                    assert_eq!(verdict, Verdict::Pass);
                    false
                }
            }
        };
        (0..20).filter(is_found).count()
    };
    assert_eq!(found(FastRows::DEFAULT, &forged), 20);
    assert_eq!(found(FastRows::DEFAULT, &honest), 0);
    // The control: of 59 rows beside the last, 32 are looked at.
    let some = found(FastRows::Count(32), &forged);
    assert!((4..18).contains(&some), "{some} of 20");
}
