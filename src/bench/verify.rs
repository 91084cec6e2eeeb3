//! Measures what verifying costs: CPU time of one response against the passes that Targon's
//! verifier (4.4) makes, a fast check, its twin and the naming of cheats against a bare prefill,
//! and the memory that checks need beside a model with a large vocabulary.
//!
//! Every pass of the original runs here on this engine, from an empty cache, as often as the
//! original runs it: nothing is shared between them.

use super::host::{self, Say};
use super::load::{proved, proved_by_a_stack};
use super::stats::median;
use crate::clock::Clock;
use crate::engine::request::Request;
use crate::engine::{Engine, Options};
use crate::models::departure::RECIPES;
use crate::models::pass::{Batch, RowAsk, Scores, Token, blocks_of};
use crate::models::sampler::Sampling;
use crate::models::{Identity, Model};
use crate::ops::lcg::Lcg;
use crate::ops::pool::Pool;
use crate::proof::codec::Hash;
use crate::proof::commit::nonce_of;
use crate::proof::{CHUNK_ROWS, Scheme};
use crate::verify::answer::Answer;
use crate::verify::prefill::steps;
use crate::verify::scrutiny::{Scrutiny, TwinPolicy};
use crate::verify::statistic::ByRows;
use crate::verify::{Challenge, Claim, Depth, Limits, Profile, Report, Verdict, Verifier};
use anyhow::{Context, ensure};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::hint::black_box;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

const PROMPT: usize = 200;
const OUTPUT: usize = 256;
/// Responses that share a prompt, where sharing is measured.
const SHARED: usize = 8;
const ROUNDS: usize = 5;
/// Checks that an early exit is averaged over.
const DRAWS: u64 = 16;
const TEMPERATURE: f32 = 0.7;
/// Entries of the original's table: 10 T + 6.
const TABLE: usize = 13;
const OPTIONS: Options = Options {
    context_max: 512,
    blocks: 256,
    sequences_max: 16,
    waiting_max: 16,
    step_tokens_max: 512,
    drafts_max: 0,
};

/// Measures on the model at `path`, on an otherwise idle machine; `scratch` is an empty directory
/// for a small model with a large vocabulary.
///
/// # Errors
/// When a model cannot be written or loaded, its engine fails, or an honest answer does not pass.
pub fn run(path: &Path, scratch: &Path, say: Say<'_>) -> anyhow::Result<()> {
    let pool = host::pool()?;
    // First, while little memory has been used and freed.
    memory(say, scratch, &pool)?;
    let model = Model::load(path, None, &pool, |_, _| {})?;
    let case = Case::new(model, &pool, (SHARED, PROMPT, OUTPUT))?;
    let threads = pool.threads();
    say(format!("\n{}, {threads} threads, {PROMPT} + {OUTPUT} tokens", path.display()));
    speed(say, &case)?;
    closer(say, &case)
}

/// Honest responses to one prompt, and who verifies them.
struct Case {
    verifier: Verifier,
    trials: Vec<Trial>,
}

/// A request, the nonce of its proof, and the answer.
type Trial = (Request, Hash, Answer);

impl Case {
    fn new(
        model: Model,
        pool: &Pool,
        (count, prompt, output): (usize, usize, usize),
    ) -> anyhow::Result<Self> {
        let identity = Arc::new(Identity::compute(&model, pool)?);
        let model = Arc::new(model);
        let engine = Engine::start(Arc::clone(&model), pool.clone(), OPTIONS, Clock::system())?;
        let ask = |index| respond(&engine, &identity, (index, prompt, output));
        let trials = (0..count).map(ask);
        let trials = trials.collect::<anyhow::Result<_>>()?;
        let verifier = Verifier::new(model, identity, pool.clone(), OPTIONS.context_max);
        Ok(Self { verifier, trials })
    }

    fn claim(&self, index: usize, profile: Profile) -> Claim<'_> {
        let (request, nonce, answer) = &self.trials[index];
        let asked = Challenge { scheme: Scheme::Residue, nonce: Some(*nonce), hotkey: None };
        Claim { proof: (profile == Profile::Proof).then_some(asked), ..Claim::new(request, answer) }
    }

    fn verify(&self, profile: Profile, depth: Depth) -> anyhow::Result<()> {
        let report = self.verifier.verify(profile, 7).depth(depth).answer(&self.claim(0, profile));
        // Random weights sample tokens that no rule about ranks likes; their cost is the same.
        ensure!(profile == Profile::Ranks || report.verdict == Verdict::Pass, "{report:?}");
        ensure!(!report.rows.is_empty(), "{:?}", report.verdict);
        Ok(())
    }

    fn verify_shared(&self) -> anyhow::Result<()> {
        let claims: Vec<Claim<'_>> =
            (0..self.trials.len()).map(|i| self.claim(i, Profile::Proof)).collect();
        let reports = self.verifier.verify(Profile::Proof, 7).answers(&claims);
        ensure!(reports.iter().all(|r: &Report| r.verdict == Verdict::Pass), "{reports:?}");
        Ok(())
    }

    /// The tokens of response 0: those of the prompt, then all.
    fn ids(&self) -> (usize, Vec<u32>) {
        let (request, _, answer) = &self.trials[0];
        (request.prompt.len(), [request.prompt.as_slice(), &answer.ids].concat())
    }
}

/// Asks the engine for response `index` to the one prompt, with its proof.
fn respond(
    engine: &Engine,
    identity: &Identity,
    (index, prompt, output): (usize, usize, usize),
) -> anyhow::Result<Trial> {
    let vocab = engine.text().vocab as u32;
    let prompt = (0..prompt as u32).map(|i| 3 + i * 7919 % (vocab - 3)).collect();
    let mut request = Request::greedy(prompt, output);
    request.sampling.temperature = TEMPERATURE;
    request.stop.ignore_eos = true;
    let nonce = nonce_of(&format!("bench {index}"));
    let answer = proved(engine, identity, &request, nonce)?;
    Ok((request, nonce, answer))
}

/// Runs the layers over `ids` from an empty cache, and makes the original's table for the rows at
/// the positions `tables`: log-probabilities of the most probable tokens.
fn forward(case: &Case, ids: &[u32], tables: Range<usize>) -> anyhow::Result<()> {
    let Verifier { model, pool, .. } = &case.verifier;
    let mut pass = model.pass(pool, blocks_of(ids.len()))?;
    let sampling = Sampling::greedy();
    for (start, step) in steps(ids, 0) {
        let table = |position: usize| {
            let scores = Scores { top: TABLE, ..Scores::new(Token::Known(0), &sampling) };
            RowAsk { scores: Some(scores), ..RowAsk::new(position - start, position) }
        };
        let rows = tables.start.max(start)..tables.end.min(start + step.len());
        let asks: Vec<RowAsk<'_>> = rows.map(table).collect();
        black_box(pass.step(&Batch::of(step, start), &asks)?);
    }
    Ok(())
}

/// The original's first pass: prompt and output, a table for every row.
fn first_pass(case: &Case) -> anyhow::Result<()> {
    let (_, ids) = case.ids();
    forward(case, &ids, 0..ids.len())
}

/// Its passes for the random check: up to five places of the output, a table for each last row.
fn random_passes(case: &Case) -> anyhow::Result<()> {
    let (prompt, ids) = case.ids();
    for quarter in 0..=4 {
        let length = prompt + (ids.len() - prompt) * quarter / 4;
        forward(case, &ids[..length], length - 1..length)?;
    }
    Ok(())
}

/// Nothing but the layers, over the tokens that a check runs over.
fn bare_prefill(case: &Case) -> anyhow::Result<()> {
    let (_, ids) = case.ids();
    forward(case, &ids[..ids.len() - 1], 0..0)
}

/// Median CPU seconds and wall seconds of each piece of work, taking turns.
fn measure<const N: usize>(
    work: [&dyn Fn() -> anyhow::Result<()>; N],
) -> anyhow::Result<[(f64, f64); N]> {
    let mut times: [(Vec<f64>, Vec<f64>); N] = std::array::from_fn(|_| Default::default());
    for _ in 0..=ROUNDS {
        for (run, times) in work.iter().zip(&mut times) {
            let (cpu, wall) = (host::cpu_seconds(), Clock::system());
            run()?;
            times.0.push(host::cpu_seconds() - cpu);
            times.1.push(wall.elapsed().as_secs_f64());
        }
    }
    // The first round warms caches.
    let middle = |values: &[f64]| median(&values[1..]).unwrap_or(f64::NAN);
    Ok(times.map(|(cpu, wall)| (middle(&cpu), middle(&wall))))
}

fn speed(say: Say<'_>, case: &Case) -> anyhow::Result<()> {
    let [first, random, fast, slow, ranks, bare, shared] = measure([
        &|| first_pass(case),
        &|| random_passes(case),
        &|| case.verify(Profile::Proof, Depth::Fast),
        &|| case.verify(Profile::Proof, Depth::Slow),
        &|| case.verify(Profile::Ranks, Depth::Slow),
        &|| bare_prefill(case),
        &|| case.verify_shared(),
    ])?;
    let shared = (shared.0 / SHARED as f64, shared.1 / SHARED as f64);
    let ms = |seconds: f64| format!("{:.0} ms", 1e3 * seconds);
    let (hot, cold) = (first.0, first.0 + random.0);
    let mean = first.0 + 0.75 * random.0;
    say("\nCPU time of the original's passes for one response, nothing shared".to_owned());
    say(format!("  T above 0.75: {}; below: {}; T uniform: {}", ms(hot), ms(cold), ms(mean)));
    say("\nCPU time of one check, and how many times less than the original's".to_owned());
    let header = ["CPU", "T uniform", "T <= 0.75", "T > 0.75"].map(|h| format!("{h:>10}"));
    say(format!("{}{}", " ".repeat(26), header.join(" ")));
    let of_a_prompt = format!("proof, fast, {SHARED} of a prompt");
    for (name, (cpu, _)) in [
        ("proof, fast", fast),
        ("proof, slow", slow),
        ("ranks", ranks),
        (of_a_prompt.as_str(), shared),
    ] {
        let ratios = [mean, cold, hot].map(|original| format!("{:10.2}", original / cpu));
        say(format!("{name:26}{:>10} {}", ms(cpu), ratios.join(" ")));
    }
    goal(say, "a fast check costs at least 8 times less (T uniform)", mean / fast.0, |x| x >= 8.0);
    goal(say, "the same, where responses share a prompt", mean / shared.0, |x| x >= 8.0);
    let (cpu, wall) = (fast.0 / bare.0, fast.1 / bare.1);
    say(format!("\nA bare prefill of the same tokens: {} CPU, {} wall", ms(bare.0), ms(bare.1)));
    goal(say, "a fast check costs at most 1.15 times as much CPU time", cpu, |x| x <= 1.15);
    goal(say, "and takes at most 1.15 times as long", wall, |x| x <= 1.15);
    Ok(())
}

fn goal(say: Say<'_>, what: &str, value: f64, is_met: impl Fn(f64) -> bool) {
    let met = if is_met(value) { "met" } else { "missed" };
    say(format!("goal: {what}: {value:.3}, {met}"));
}

/// What closer looks at an answer cost, in bare prefills of the same tokens: its twin, the naming
/// of cheats, and what an early exit leaves. The answer is one of a stack of 16 bits, because rows
/// that are equal bit for bit are never looked at again.
fn closer(say: Say<'_>, case: &Case) -> anyhow::Result<()> {
    let (request, nonce, answer) = &case.trials[0];
    let answer = proved_by_a_stack(&case.verifier, (request, *nonce), answer)?;
    let claim = Claim { answer: &answer, ..case.claim(0, Profile::Proof) };
    let own = case.claim(0, Profile::Proof);
    let [bare, fast, twin, packing, named, whole, part] = measure([
        &|| bare_prefill(case),
        &|| look(case, &claim, Look::Once).map(|_| ()),
        &|| look(case, &claim, Look::Twin).map(|_| ()),
        &|| pack_all(case),
        &|| look(case, &claim, Look::Names).map(|_| ()),
        &|| early_checks(case, &own).map(|_| ()),
        &|| early_checks(case, &claim).map(|_| ()),
    ])?
    .map(|(cpu, _)| cpu);
    let recipes = RECIPES.len() as f64;
    let (naming, packing) = ((named - twin) / recipes, packing / recipes);
    say("\nOf an answer of a stack of 16 bits: CPU time in bare prefills of the tokens".into());
    goal(say, "a fast check costs at most 1.15 without the twin", fast / bare, |x| x <= 1.15);
    goal(say, "and at most 2.2 with it", twin / bare, |x| x <= 2.2);
    goal(say, "naming costs at most 1 for a recipe", naming / bare, |x| x <= 1.0);
    say(format!("of it the packing of a recipe's weights, once a batch: {:.3}", packing / bare));
    for (who, cpu, chunks) in [
        ("this engine's answer", whole, early_checks(case, &own)?),
        ("a stack's answer", part, early_checks(case, &claim)?),
    ] {
        let share = cpu / DRAWS as f64 / fast;
        let all = OUTPUT / CHUNK_ROWS;
        say(format!(
            "with --early-exit {who} costs {share:.3} of a whole fast check, {chunks:.2} of {all} \
             chunks on average of {DRAWS} draws"
        ));
    }
    Ok(())
}

/// How closely an answer is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    /// One prefill.
    Once,
    /// The twin as well.
    Twin,
    /// Every recipe as well.
    Names,
}

/// A fast check of `claim`, whose answer passes and is looked at as `how` says.
fn look(case: &Case, claim: &Claim<'_>, how: Look) -> anyhow::Result<Report> {
    let twin = if how == Look::Once { TwinPolicy::Never } else { TwinPolicy::Always };
    let names = how == Look::Names;
    // Recipes are tried on what the twin finds too far: here, on everything.
    let twin_u8 = if names { ByRows::all(f64::MIN_POSITIVE) } else { Limits::default().twin_u8 };
    let verifier = Verifier {
        scrutiny: Scrutiny { twin, names, ..Scrutiny::NONE },
        // What a recipe costs does not depend on whether it is found.
        limits: Limits { twin_u8, beta: f64::INFINITY, ..Limits::default() },
        ..case.verifier.clone()
    };
    let report = verifier.verify(Profile::Proof, 7).answer(claim);
    ensure!(report.verdict == Verdict::Pass, "{:?}", report.verdict);
    let is_run = report.twin.is_empty() == (how == Look::Once);
    ensure!(is_run, "the twin has {} rows", report.twin.len());
    let tried = if names { RECIPES.len() } else { 0 };
    ensure!(report.named.len() == tried, "{} recipes were tried", report.named.len());
    Ok(report)
}

/// The weights of every recipe.
fn pack_all(case: &Case) -> anyhow::Result<()> {
    let Verifier { model, pool, .. } = &case.verifier;
    RECIPES.iter().try_for_each(|recipe| {
        black_box(model.coarse(recipe, pool)?);
        Ok(())
    })
}

/// Fast checks that may stop early, each at a chunk of its own; the chunks looked at on average.
fn early_checks(case: &Case, claim: &Claim<'_>) -> anyhow::Result<f64> {
    let scrutiny = Scrutiny { stops_early: true, ..Scrutiny::NONE };
    let verifier = Verifier { scrutiny, ..case.verifier.clone() };
    let mut chunks = 0;
    for chance in 0..DRAWS {
        let report = verifier.verify(Profile::Proof, chance).answer(claim);
        ensure!(report.verdict == Verdict::Pass, "{:?}", report.verdict);
        chunks += report.chunks.len();
    }
    Ok(chunks as f64 / DRAWS as f64)
}

/// The memory that checks take beside a loaded model with 131072 tokens.
fn memory(say: Say<'_>, scratch: &Path, pool: &Pool) -> anyhow::Result<()> {
    write_model(scratch, 131_072)?;
    let model = Model::load(scratch, None, pool, |_, _| {})?;
    let case = Case::new(model, pool, (1, PROMPT, OUTPUT))?;
    say(format!(
        "Peak memory of checks beside a model with 131072 tokens, {PROMPT} + {OUTPUT} tokens"
    ));
    let mut most = 0.0_f64;
    for (name, profile, depth) in [
        ("proof, fast", Profile::Proof, Depth::Fast),
        ("proof, slow", Profile::Proof, Depth::Slow),
        ("ranks", Profile::Ranks, Depth::Slow),
    ] {
        host::trim();
        host::reset_peak()?;
        let before = host::resident_bytes("VmRSS:")?;
        case.verify(profile, depth)?;
        let extra = (host::resident_bytes("VmHWM:")? - before) / 1e6;
        say(format!("  {name:12} {extra:8.1} MB"));
        most = most.max(extra);
    }
    goal(say, "a check takes less than 256 MB", most, |x| x < 256.0);
    Ok(())
}

/// A checkpoint of a small Llama with a vocabulary of so many tokens and seeded random weights.
pub(super) fn write_model(directory: &Path, vocab: usize) -> anyhow::Result<()> {
    let (hidden, inter, layers) = (256, 512, 2);
    let config = json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "intermediate_size": inter, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "eos_token_id": 2,
    });
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..layers {
        shapes.extend(
            [
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![hidden / 2, hidden]),
                ("self_attn.v_proj", vec![hidden / 2, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![inter, hidden]),
                ("mlp.up_proj", vec![inter, hidden]),
                ("mlp.down_proj", vec![hidden, inter]),
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
            ]
            .map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)),
        );
    }
    let mut noise = Lcg::new(11);
    let tensors = shapes.into_iter().map(|(name, shape)| {
        let bytes = values(&shape, &mut noise).flat_map(bf16::to_le_bytes).collect::<Vec<u8>>();
        (name, shape, bytes)
    });
    let tensors: Vec<_> = tensors.collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        Ok((name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes)?))
    });
    let views = views.collect::<anyhow::Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors"))?;
    let write = |name: &str, value: Value| {
        let path = directory.join(name);
        std::fs::write(&path, value.to_string())
            .with_context(|| format!("{} cannot be written", path.display()))
    };
    write("config.json", config)?;
    write("tokenizer.json", tokenizer())
}

/// Random numbers of a size that keeps rows at the scale of one; norms are about one.
fn values<'a>(shape: &[usize], noise: &'a mut Lcg) -> impl Iterator<Item = bf16> + use<'a> {
    let count: usize = shape.iter().product();
    let (middle, spread) = match shape {
        [_] => (1.0, 0.3),
        _ => (0.0, 4.0 / (shape[1] as f32).sqrt()),
    };
    (0..count).map(move |_| {
        let bits = noise.bits();
        let uniform = (bits ^ (bits >> 15)) as f32 / u32::MAX as f32 - 0.5;
        bf16::from_f32(middle + spread * uniform)
    })
}

/// A byte-level tokenizer of single bytes.
fn tokenizer() -> Value {
    let mut extra = 256;
    let mut vocab = serde_json::Map::new();
    for byte in 0..256_u32 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if printable { byte } else { extra };
        extra += u32::from(!printable);
        // Each of these 256 numbers is a character.
        let symbol = char::from_u32(code).unwrap_or_default();
        vocab.insert(symbol.to_string(), byte.into());
    }
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": bytes, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_look_at_an_answer_of_a_stack_is_taken() {
        let scratch = tempfile::tempdir().unwrap();
        write_model(scratch.path(), 512).unwrap();
        let pool = host::pool().unwrap();
        let model = Model::load(scratch.path(), None, &pool, |_, _| {}).unwrap();
        let case = Case::new(model, &pool, (1, 4, 40)).unwrap();
        let (request, nonce, own) = &case.trials[0];
        let answer = proved_by_a_stack(&case.verifier, (request, *nonce), own).unwrap();
        let claim = Claim { answer: &answer, ..case.claim(0, Profile::Proof) };
        let once = look(&case, &claim, Look::Once).unwrap();
        assert!(once.chunks.iter().all(|c| !c.is_exact && c.energy.is_some_and(|e| e > 0.0)));
        // The twin goes all of the way that this answer goes.
        let twin = look(&case, &claim, Look::Twin).unwrap();
        assert!(twin.twin_share.is_some_and(|share| share > 0.9), "{:?}", twin.twin_share);
        look(&case, &claim, Look::Names).unwrap();
        pack_all(&case).unwrap();
        let chunks = early_checks(&case, &case.claim(0, Profile::Proof)).unwrap();
        assert!(chunks > 1.0 && chunks < 2.0, "{chunks}");
        // The control: rows that are equal bit for bit are not looked at again.
        assert!(look(&case, &case.claim(0, Profile::Proof), Look::Twin).is_err());
    }
}
