//! SmolLM2-135M-Instruct from end to end (`scripts/fetch-model` puts it in place).

use crate::common;
use serde_json::{Value, json};
use std::sync::OnceLock;
use targon_engine::clock::Clock;
use targon_engine::engine::output::{Ended, FinishReason};
use targon_engine::engine::request::Request;
use targon_engine::engine::{Engine, Options};
use targon_engine::models::{Identity, Model};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::verify::rounding_energy;

fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let pool = Pool::new(2, Isa::best()).unwrap();
        let model = Model::load(&common::smollm2(), None, &pool, |_, _| {}).unwrap();
        let options = Options { context_max: 2048, blocks: 256, ..common::options() };
        Engine::start(model, pool, options, Clock::system()).unwrap()
    })
}

fn prompt(question: &str) -> Vec<u32> {
    let model = engine().text();
    let variables = json!({
        "messages": [{"role": "user", "content": question}], "add_generation_prompt": true,
    });
    let Value::Object(variables) = variables else { unreachable!() };
    let text = model.chat.as_ref().unwrap().render(variables, 0).unwrap();
    model.tokenizer.encode(&text, false).unwrap()
}

/// Ids as llama.cpp (b11434) tokenises the same texts with the same file.
const TOKENISED: [(&str, &[u32]); 10] = [
    ("Hello, world!", &[19556, 28, 905, 17]),
    (
        "The year 2024 has 366 days; 12345678.",
        &[
            504, 713, 216, 34, 32, 34, 36, 553, 216, 35, 38, 38, 2009, 43, 216, 33, 34, 35, 36, 37,
            38, 39, 40, 30,
        ],
    ),
    (
        "  leading and   inner spaces\n\n\tTabs",
        &[216, 2899, 284, 256, 6210, 5600, 1116, 197, 68, 7366],
    ),
    (
        "naïve café 日本語 😀 emoji",
        &[3546, 46494, 37366, 17097, 241, 115, 40993, 179, 120, 248, 40303, 218, 649, 33777],
    ),
    ("don't can't I'll we've", &[12420, 982, 416, 982, 339, 3060, 392, 3543]),
    (
        "x=y+1; // comment\nfor(int i=0;i<10;i++){}",
        &[
            104, 45, 105, 27, 33, 43, 13241, 5189, 198, 1710, 24, 591, 2056, 45, 32, 43, 89, 44,
            33, 32, 43, 89, 11444, 25, 6150,
        ],
    ),
    ("<|im_start|>user\nhi<|im_end|>\n", &[1, 4093, 198, 6004, 2, 198]),
    ("1 22 333 4444", &[33, 216, 34, 34, 216, 35, 35, 35, 216, 36, 36, 36, 36]),
    ("\r\n\r\n", &[18682]),
    (
        "Ünïcödé — “quotes” …",
        &[142, 246, 94, 25972, 83, 7466, 84, 2756, 1841, 619, 385, 2346, 573, 5548],
    ),
];

#[test]
fn the_tokenizer_rebuilt_from_gguf_agrees_with_llama_cpp() {
    let tokenizer = &engine().text().tokenizer;
    for (text, want) in TOKENISED {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids, want, "{text:?}");
        if !text.contains("<|") {
            assert_eq!(tokenizer.decode(&ids), text);
        }
    }
}

#[test]
fn it_knows_the_capital_of_france_and_stops() {
    let request = Request::greedy(prompt("What is the capital of France?"), 40);
    let Ended { steps, finish, .. } = engine().submit(request).unwrap().collect_blocking().unwrap();
    let text: String = steps.iter().map(|s| s.text.as_str()).collect();
    assert_eq!(text, "The capital of France is Paris.");
    assert_eq!(finish.reason, FinishReason::EndToken(2));
    let last = steps.last().unwrap();
    assert_eq!((last.token, last.text.as_str(), last.rank), (2, "", 1));
    assert!(steps.iter().all(|s| s.rank == 1 && s.logprob <= 0.0));
}

#[test]
fn scoring_a_text_gives_the_log_probabilities_of_generating_it() {
    let prompt = prompt("Name a colour.");
    let mut generate = Request::greedy(prompt.clone(), 24);
    generate.stop.ignore_eos = true;
    let steps = engine().submit(generate).unwrap().collect_blocking().unwrap().steps;
    let mut whole = prompt.clone();
    whole.extend(steps.iter().map(|s| s.token));
    let mut score = Request::greedy(whole, 0);
    score.prompt_logprobs = Some(2);
    let mut generation = engine().submit(score).unwrap();
    let Some(targon_engine::engine::output::Event::Prompt(rows)) = generation.next_blocking()
    else {
        panic!("no prompt rows")
    };
    for (step, row) in steps.iter().zip(&rows[prompt.len() - 1..]) {
        assert_eq!(step.token, row.token);
        assert_eq!(step.logprob.to_bits(), row.logprob.to_bits(), "prefill and decode agree");
        assert_eq!((row.rank, row.top[0].token, row.top.len()), (step.rank, step.token, 2));
    }
}

#[test]
fn a_long_prompt_is_prefilled_in_chunks_and_answered() {
    let text = "The quick brown fox jumps over the lazy dog. ".repeat(150);
    let ids = engine().text().tokenizer.encode(&text, false).unwrap();
    assert!(ids.len() > 1200, "{}", ids.len());
    let steps = engine().submit(Request::greedy(ids, 9)).unwrap().collect_blocking().unwrap().steps;
    let text: String = steps.iter().map(|s| s.text.as_str()).collect();
    assert!(text.contains("quick brown fox"), "{text}");
}

/// The default limits were measured on answers of this model.
#[test]
fn its_rounding_is_that_of_the_default_limits() {
    let pool = Pool::new(2, Isa::best()).unwrap();
    let model = Model::load(&common::smollm2(), None, &pool, |_, _| {}).unwrap();
    let identity = Identity::compute(&model, &pool).unwrap();
    let energy = rounding_energy::compute(&model, &identity, &pool).unwrap();
    assert_eq!(energy, Some(rounding_energy::MEASURED));
}
