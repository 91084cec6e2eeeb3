//! Verification across arithmetics and devices: bit for bit where the verifier's device computes in
//! the canon of the proof, whatever it computes otherwise; by energies where it does not.

use crate::common::{options, served, tiny_config, verifier, write_checkpoint};
use crate::engine::model_by;
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use targon_engine::engine::output::Event;
use targon_engine::intake::proof::Prover;
use targon_engine::models::arithmetic::Arithmetic;
use targon_engine::models::device::Device;
use targon_engine::proof::Scheme;
use targon_engine::proof::commit::nonce_of;
use targon_engine::server::registry::Served;
use targon_engine::verify::answer::Answer;
use targon_engine::verify::{
    Challenge, Claim, Depth, Limits, Profile, Report, Verdict, Verifier, question,
};

/// A model behind an engine.
fn site((arithmetic, device): (Arithmetic, Device), path: &Path) -> Served {
    let (model, _) = model_by(arithmetic, device, path);
    served(Arc::into_inner(model).unwrap(), options())
}

/// An answer of `prover`, checked by `verifier`.
async fn checked(prover: &Served, verifier: &Verifier) -> Report {
    let body = json!({"prompt": "the rows of two canons", "temperature": 0.8, "max_tokens": 100});
    let understood = question::understand(verifier, &body, 0).await.unwrap();
    let mut request = understood.requests.into_iter().next().unwrap();
    request.stop.ignore_eos = true;
    let (scheme, nonce) = (Scheme::Residue, nonce_of("tensor"));
    let proof = Prover { scheme, nonce, signer: None };
    let head = proof.bind(&mut request, &prover.identity, None, 0);
    let mut generation = prover.engine.submit(request.clone()).unwrap();
    let mut steps = Vec::new();
    while let Some(event) = generation.next().await {
        let Event::Step(step) = event else { panic!("{event:?}") };
        steps.push(step);
    }
    let finish = steps.last().and_then(|step| step.finish.clone());
    let end = finish.map(|f| head.end(f.digest, f.completion_tokens, &f.reason));
    let answer = Answer::of_steps(&steps, end);
    assert_eq!(answer.canon(), Some(&*prover.identity.canon));
    let claim = Claim {
        proof: Some(Challenge { scheme, nonce: Some(nonce), hotkey: None }),
        ..Claim::new(&request, &answer)
    };
    verifier.verify(Profile::Proof, 0).depth(Depth::Slow).answer(&claim)
}

#[tokio::test]
async fn rows_are_compared_bit_for_bit_where_the_canon_fits() {
    use Arithmetic::{Portable, Tensor};
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 8);
    let [card, older] = [Device::Cuda(1), Device::Cuda(6)];
    for (prover, checker, fits) in [
        ((Tensor, card), (Tensor, card), true),
        // The verifier's own arithmetic does not matter, only what its device can compute.
        ((Tensor, card), (Portable, card), true),
        ((Portable, Device::Cpu), (Tensor, card), true),
        ((Portable, card), (Portable, Device::Cpu), true),
        ((Tensor, card), (Portable, Device::Cpu), false),
        ((Tensor, older), (Tensor, card), false),
    ] {
        let place = format!("{prover:?} {checker:?}");
        let prover = site(prover, dir.path());
        let verifier = verifier(&site(checker, dir.path()));
        let report = checked(&prover, &verifier).await;
        assert_eq!(report.verdict, Verdict::Pass, "{place}");
        assert!(!report.chunks.is_empty());
        let canon = &*prover.identity.canon;
        assert_eq!(report.other_canon.as_deref(), (!fits).then_some(canon), "{place}");
        for chunk in &report.chunks {
            assert_eq!(chunk.is_exact, fits, "{place}: {chunk:?}");
        }
        let limits = Limits { exact: true, ..verifier.limits };
        match checked(&prover, &Verifier { limits, ..verifier }).await.verdict {
            Verdict::Pass => assert!(fits, "{place}"),
            Verdict::Reject(why) => assert!(!fits && why.what.contains(canon), "{place}: {why}"),
            Verdict::Unscored(why) => panic!("{place}: {why}"),
        }
    }
}
