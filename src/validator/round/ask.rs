//! Makes the request that all miners of a round get: sampling parameters, prompt, and proof.

use crate::chance::Chance;
pub use crate::intake::Endpoint;
use crate::proof::Scheme;
use anyhow::bail;
use serde_json::{Value, json};
use std::ops::RangeInclusive;

/// Seeds that are drawn (protocol 5.3).
const SEEDS: RangeInclusive<u64> = 10_000..=10_000_000;
/// Tokens of the shortest answer that is worth asking for.
const TOKENS_MIN: u32 = 8;

/// The prompt of a round.
#[derive(Clone, PartialEq, Debug)]
pub struct QueryPrompt {
    /// The conversation or the text.
    pub content: QueryContent,
    /// Tokens that the model sees of it.
    pub tokens: usize,
}

/// A conversation or a text, as the endpoint wants it.
#[derive(Clone, PartialEq, Debug)]
pub enum QueryContent {
    /// The list of messages, as JSON.
    Messages(Value),
    /// The prompt of a completion.
    Text(String),
}

impl QueryContent {
    fn fits(&self, endpoint: Endpoint) -> bool {
        matches!(
            (self, endpoint),
            (QueryContent::Messages(_), Endpoint::Chat)
                | (QueryContent::Text(_), Endpoint::Completion)
        )
    }
}

/// How a miner must draw its tokens.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct QuerySampling {
    /// The request's `seed`.
    pub seed: u64,
    /// The temperature, below 1.
    pub temperature: f64,
    /// Tokens that the answer may have.
    pub max_tokens: u32,
}

impl QuerySampling {
    /// Draws one as the protocol does, with `lengths` for the most tokens.
    pub fn draw(chance: &mut Chance, lengths: &RangeInclusive<u32>) -> Self {
        let mut among = |range: RangeInclusive<u64>| {
            range.start() + chance.below(range.end().saturating_sub(*range.start()) + 1)
        };
        let seed = among(SEEDS);
        let lengths = u64::from(*lengths.start())..=u64::from(*lengths.end());
        let max_tokens = u32::try_from(among(lengths)).unwrap_or(u32::MAX);
        Self { seed, temperature: chance.share(), max_tokens }
    }
}

/// The body that all miners get; the nonce of each goes in by [`with_nonce`].
///
/// # Errors
/// When the prompt leaves no room for an answer in a context of `context_max` tokens, or is not
/// what the endpoint wants.
pub fn body(
    model: &str,
    endpoint: Endpoint,
    mut sampling: QuerySampling,
    prompt: QueryPrompt,
    context_max: usize,
) -> anyhow::Result<(Value, QuerySampling)> {
    let room = context_max.saturating_sub(prompt.tokens);
    sampling.max_tokens = sampling.max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX));
    if sampling.max_tokens < TOKENS_MIN {
        bail!(
            "a prompt of {} tokens leaves no room for {TOKENS_MIN} in a context of {context_max}",
            prompt.tokens
        );
    }
    if !prompt.content.fits(endpoint) {
        bail!("the prompt is not what {} wants", endpoint.path());
    }
    Ok((unchecked_body(model, sampling, prompt.content), sampling))
}

/// The same body, whether or not there is room for an answer.
pub fn unchecked_body(model: &str, sampling: QuerySampling, content: QueryContent) -> Value {
    let QuerySampling { seed, temperature, max_tokens } = sampling;
    let mut body = json!({
        "seed": seed, "max_tokens": max_tokens, "temperature": temperature, "model": model,
        "stream": true, "logprobs": true,
    });
    match content {
        QueryContent::Messages(messages) => body["messages"] = messages,
        QueryContent::Text(text) => body["prompt"] = text.into(),
    }
    body
}

/// The same body with what asks for a proof, and says which distribution log-probabilities
/// describe: both are this program's own.
pub fn with_proof(mut body: Value, scheme: Scheme) -> Value {
    body["logprobs_mode"] = "scaled".into();
    body["proof"] = json!({"scheme": scheme.name()});
    body
}

/// The body that one miner gets.
pub fn with_nonce(body: &Value, chance: &mut Chance) -> Value {
    let mut body = body.clone();
    if body["proof"].is_object() {
        body["proof"]["nonce"] = chance.hex::<32>().into();
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(tokens: usize) -> QueryPrompt {
        QueryPrompt { content: QueryContent::Text("hello".into()), tokens }
    }

    #[test]
    fn parameters_lie_where_the_protocol_wants_them() {
        let mut chance = Chance::seeded(1);
        for _ in 0..2_000 {
            let sampling = QuerySampling::draw(&mut chance, &(512..=1920));
            assert!(SEEDS.contains(&sampling.seed), "{sampling:?}");
            assert!((0.0..1.0).contains(&sampling.temperature), "{sampling:?}");
            assert!((512..=1920).contains(&sampling.max_tokens), "{sampling:?}");
            assert_eq!(f64::from(sampling.temperature as f32), sampling.temperature);
        }
        assert_eq!(QuerySampling::draw(&mut chance, &(7..=7)).max_tokens, 7);
    }

    #[test]
    fn a_body_has_the_fields_of_the_original_and_each_miner_its_nonce() {
        let sampling = QuerySampling { seed: 12_345, temperature: 0.5, max_tokens: 600 };
        let (plain, _) = body("m", Endpoint::Completion, sampling, text(10), 4096).unwrap();
        let fields =
            r#"{"seed":12345,"max_tokens":600,"temperature":0.5,"model":"m","stream":true,"#;
        assert_eq!(plain.to_string(), format!("{fields}\"logprobs\":true,\"prompt\":\"hello\"}}"));
        let mut chance = Chance::seeded(2);
        assert_eq!(with_nonce(&plain, &mut chance), plain);
        let proved = with_proof(plain, Scheme::Residue);
        let nonces = [with_nonce(&proved, &mut chance), with_nonce(&proved, &mut chance)];
        let nonces = nonces.map(|body| body["proof"]["nonce"].as_str().unwrap().to_owned());
        assert_ne!(nonces[0], nonces[1]);
        assert_eq!((nonces[0].len(), proved["proof"]["scheme"].as_str()), (64, Some("residue-v1")));
    }

    #[test]
    fn an_answer_fits_into_the_context_or_is_not_asked_for() {
        let sampling = QuerySampling { seed: 1, temperature: 0.0, max_tokens: 600 };
        let (body, fitted) =
            super::body("m", Endpoint::Completion, sampling, text(300), 512).unwrap();
        assert_eq!((body["max_tokens"].as_u64(), fitted.max_tokens), (Some(212), 212));
        let error = super::body("m", Endpoint::Completion, sampling, text(505), 512).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("leaves no room for 8 in a context of 512"), "{error}");
        let error =
            super::body("m", Endpoint::Chat, sampling, text(5), 512).unwrap_err().to_string();
        assert!(error.contains("not what /v1/chat/completions wants"), "{error}");
    }
}
