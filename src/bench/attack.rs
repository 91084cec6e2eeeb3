//! What verification catches: honest answers and cheats on one model, judged side by side.
//!
//! Every attack is run on the same prompts. Attacks on weights prove the rows that their own
//! weights compute over the honest tokens; attacks on sampling and spoofing draw their own tokens
//! and prove them with true rows. Proofs are judged by the fast check. The limits are those of
//! [`Limits`], fixed beforehand.

use super::tamper::{Tamper, tampered};
use crate::clock::Clock;
use crate::engine::request::Request;
use crate::engine::sampler::Sampling;
use crate::engine::{Engine, Options};
use crate::models::decoder::Decoder;
use crate::models::{Identity, Model};
use crate::ops::pool::Pool;
use crate::proof::commit::{Binding, Chain, RowProver, noise_key};
use crate::proof::{CHUNK_ROWS, Scheme};
use crate::verify::answer::{Answer, Chunk};
use crate::verify::proof::{Asked, ChunkEvidence};
use crate::verify::{Claim, Depth, Limits, Profile, Report, Verdict, Verifier, prefill};
use crate::wire::openai::response::ProofEnd;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

/// What prompts are made of: subject and task.
const SUBJECTS: [&str; 16] = [
    "the sea",
    "bread",
    "the Moon",
    "bicycles",
    "winter",
    "a market town",
    "honey bees",
    "maps",
    "volcanoes",
    "music",
    "old trees",
    "trains",
    "glass",
    "the human heart",
    "chess",
    "salt",
];
const TASKS: [&str; 6] = [
    "Explain to a child how this works or where it comes from: ",
    "Write a short story about ",
    "List five facts about ",
    "What would the world be like without ",
    "Write a letter to a friend about ",
    "Describe in plain words ",
];
/// Tokens of an answer: eight chunks.
const TOKENS: usize = 8 * CHUNK_ROWS;
const TEMPERATURE: f32 = 0.8;

/// One line of the table.
#[derive(Clone, Serialize, Debug)]
pub struct Line {
    /// Which cheat; `honest` is none.
    pub name: String,
    /// Which scheme judged.
    pub scheme: &'static str,
    /// Answers.
    pub answers: usize,
    /// Of them, rejected as a whole.
    pub rejected: usize,
    /// Rejected from the first 1, 2, 4 and 8 chunks alone, where chunks are judged.
    pub by_chunks: Option<[usize; 4]>,
    /// Median and extremes of the energy of a chunk.
    pub energy: Option<[f64; 3]>,
    /// Chunks that are equal bit for bit, of all.
    pub exact: Option<(usize, usize)>,
    /// Mean margin of the tokens that were looked at.
    pub margin: Option<f64>,
}

/// The model under attack.
pub struct Bench<'a> {
    model: Arc<Model>,
    identity: Arc<Identity>,
    engine: Engine,
    pool: Pool,
    path: &'a Path,
    scratch: &'a Path,
    prompts: Vec<Vec<u32>>,
}

/// An answer with what it was asked by.
struct Trial {
    request: Request,
    answer: Answer,
}

impl<'a> Bench<'a> {
    /// Loads the model at `path`; `prompts` of at most 96 are asked, `scratch` is written to.
    ///
    /// # Errors
    /// When the model cannot be loaded or has no chat template.
    pub fn new(
        path: &'a Path,
        scratch: &'a Path,
        pool: &Pool,
        prompts: usize,
    ) -> Result<Self, String> {
        let model = Model::load(path, None, pool, |_, _| {}).map_err(|e| e.to_string())?;
        let identity = Identity::of(&model, pool).map_err(|e| e.to_string())?;
        let engine = start(model, pool)?;
        let model = Arc::clone(engine.model());
        let asked = TASKS.iter().flat_map(|task| SUBJECTS.map(|s| format!("{task}{s}.")));
        let prompts = asked.take(prompts).map(|text| prompt(&model, &text));
        let prompts = prompts.collect::<Result<_, _>>()?;
        let identity = Arc::new(identity);
        Ok(Self { model, identity, engine, pool: pool.clone(), path, scratch, prompts })
    }

    /// Runs everything; `progress` is told what comes next.
    ///
    /// # Errors
    /// When an engine fails or a file cannot be written.
    pub fn run(&self, progress: impl Fn(&str)) -> Result<Vec<Line>, String> {
        let mut lines = Vec::new();
        progress("honest answers");
        let honest = self.answers(&self.engine, &|_| {})?;
        for scheme in Scheme::ALL {
            let trials = self.proved(scheme, &honest, &self.model.decoder)?;
            lines.push(self.line("honest", scheme, &trials));
        }
        lines.push(self.ranks("honest", &honest));
        for (name, tamper) in self.tampers() {
            progress(name);
            let decoder = self.tampered(tamper)?;
            for scheme in Scheme::ALL {
                let trials = self.proved(scheme, &honest, &decoder)?;
                lines.push(self.line(name, scheme, &trials));
            }
            if matches!(name, "int4 g32" | "int8 per channel" | "int8 g32") {
                let name = format!("spoofed from {name}");
                progress(&name);
                let spoofed = self.answers(&self.stand_in(decoder)?, &|_| {})?;
                lines.extend(self.spoofed(&name, &spoofed)?);
            }
        }
        type Change = fn(&mut Sampling);
        let samplers: [(&str, Change); 5] = [
            ("temperature 0.7 for 0.8", |s| s.temperature = 0.7),
            ("temperature 0.9 for 0.8", |s| s.temperature = 0.9),
            ("top-p 0.95", |s| s.top_p = 0.95),
            ("greedy", |s| s.temperature = 0.0),
            ("another seed", |s| s.noise_key ^= 1),
        ];
        for (name, change) in samplers {
            progress(name);
            let drawn = self.answers(&self.engine, &|r| change(&mut r.sampling))?;
            lines.extend(self.spoofed(name, &drawn)?);
        }
        progress("forged proofs");
        lines.extend(self.forged(&honest)?);
        Ok(lines)
    }

    fn tampers(&self) -> [(&'static str, Tamper); 9] {
        let middle = self.model.decoder.spec.layers / 2;
        let integers = |bits, group| Tamper::Integers { bits, group };
        [
            ("int4 g32", integers(4, 32)),
            ("int4 g64", integers(4, 64)),
            ("int4 per channel", integers(4, 0)),
            ("int8 per channel", integers(8, 0)),
            ("int8 g32", integers(8, 32)),
            ("fp8 e4m3", Tamper::Fp8),
            ("int4 last 3 layers", Tamper::LastLayers { layers: 3, bits: 4 }),
            ("one layer skipped", Tamper::SkippedLayer(middle)),
            ("rank-4 update of 1 %", Tamper::LowRank(0.01)),
        ]
    }

    fn tampered(&self, tamper: Tamper) -> Result<Decoder, String> {
        let checkpoint = crate::models::checkpoint::Checkpoint::open(self.path);
        let checkpoint = checkpoint.map_err(|e| e.to_string())?;
        tampered(&checkpoint, &self.pool, tamper, self.scratch)
    }

    /// An engine over another decoder with the model's own tokenizer.
    fn stand_in(&self, decoder: Decoder) -> Result<Engine, String> {
        let model = Model::load(self.path, None, &self.pool, |_, _| {});
        let mut model = model.map_err(|e| e.to_string())?;
        model.decoder = decoder;
        start(model, &self.pool)
    }

    fn request(&self, index: usize) -> Request {
        let mut request = Request::greedy(self.prompts[index].clone(), TOKENS);
        request.sampling.temperature = TEMPERATURE;
        request.stop.ignore_eos = true;
        let terms = request.terms(None, 0).hash();
        request.sampling.noise_key = noise_key(&nonce(index), &terms);
        request
    }

    /// Answers of `engine` to all prompts, drawn as `change` says.
    fn answers(
        &self,
        engine: &Engine,
        change: &dyn Fn(&mut Request),
    ) -> Result<Vec<Trial>, String> {
        let indices: Vec<usize> = (0..self.prompts.len()).collect();
        let mut trials = Vec::new();
        for batch in indices.chunks(engine.options().sequences_max) {
            let running = batch.iter().map(|index| {
                let mut drawn = self.request(*index);
                change(&mut drawn);
                engine.submit(drawn).map_err(|e| e.to_string())
            });
            let running = running.collect::<Result<Vec<_>, _>>()?;
            for (index, generation) in batch.iter().zip(running) {
                let (steps, _) = generation.collect_blocking().map_err(|e| e.to_string())?;
                let answer = Answer {
                    ids: steps.iter().map(|s| s.token).collect(),
                    text: Some(steps.iter().map(|s| s.text.as_str()).collect()),
                    logprobs: steps.iter().map(|s| Some(s.logprob)).collect(),
                    ..Answer::default()
                };
                trials.push(Trial { request: self.request(*index), answer });
            }
        }
        Ok(trials)
    }

    /// The same tokens, proved with the rows of `decoder`.
    fn proved(
        &self,
        scheme: Scheme,
        trials: &[Trial],
        decoder: &Decoder,
    ) -> Result<Vec<Trial>, String> {
        let prove = |(index, trial): (usize, &Trial)| {
            let answer = self.prove(scheme, index, trial, decoder)?;
            Ok(Trial { request: trial.request.clone(), answer })
        };
        trials.iter().enumerate().map(prove).collect()
    }

    fn prove(
        &self,
        scheme: Scheme,
        index: usize,
        trial: &Trial,
        decoder: &Decoder,
    ) -> Result<Answer, String> {
        let (request, nonce) = (trial.request.terms(None, 0).hash(), nonce(index));
        let model = self.identity.model_hash;
        let root = Binding { scheme, nonce, request, model, hotkey: [0; 32] }.root();
        let prover = RowProver::new(scheme, &root, Arc::clone(&self.identity.calibration));
        let (mut chain, mut chunks) = (Chain::new(root), Vec::new());
        let (prompt, ids) = (&trial.request.prompt, &trial.answer.ids);
        prefill::run(decoder, &self.pool, prompt, ids, &BTreeSet::new(), |row| {
            let data = prover.prove(row.position, row.bits, row.values);
            chunks.extend(chain.push(ids[row.index], data));
            Ok(())
        })
        .map_err(|stop| format!("{stop:?}"))?;
        chunks.extend(chain.close());
        let chunks = chunks.into_iter();
        let hex = crate::proof::codec::to_hex;
        let end = ProofEnd {
            scheme: scheme.name().into(),
            nonce: hex(&nonce),
            model: hex(&model),
            root: hex(&root),
            tokens: ids.len(),
            hotkey: None,
            signature: None,
        };
        Ok(Answer {
            chunks: chunks
                .map(|c| Chunk { index: c.index, data: c.data, digest: c.digest })
                .collect(),
            end: Some(end),
            ..trial.answer.clone()
        })
    }

    fn verifier(&self) -> Verifier {
        Verifier {
            model: Arc::clone(&self.model),
            identity: Arc::clone(&self.identity),
            pool: self.pool.clone(),
            limits: Limits::default(),
            context_max: self.engine.options().context_max,
        }
    }

    fn judge(&self, trials: &[Trial], scheme: Option<Scheme>) -> Vec<Report> {
        let verifier = self.verifier();
        let judge = |(index, trial): (usize, &Trial)| {
            let asked = |scheme| Asked { scheme, nonce: Some(nonce(index)), hotkey: None };
            let claim = Claim {
                request: &trial.request,
                seed: None,
                choice: 0,
                proof: scheme.map(asked),
                answer: &trial.answer,
                end_is_implied: false,
            };
            let profile = if scheme.is_some() { Profile::Proof } else { Profile::Ranks };
            verifier.verify(&claim, profile, Depth::Fast, index as u64)
        };
        trials.iter().enumerate().map(judge).collect()
    }

    fn line(&self, name: &str, scheme: Scheme, trials: &[Trial]) -> Line {
        let reports = self.judge(trials, Some(scheme));
        let chunks = || reports.iter().flat_map(|r| &r.chunks);
        let mut energies: Vec<f64> = chunks().filter_map(|c| c.energy).collect();
        energies.sort_by(f64::total_cmp);
        let margins: Vec<f64> =
            reports.iter().flat_map(|r| &r.rows).filter_map(|r| r.margin).collect();
        Line {
            name: name.into(),
            scheme: scheme.name(),
            answers: reports.len(),
            rejected: rejected(&reports),
            by_chunks: Some([1, 2, 4, 8].map(|n| {
                let limits = Limits::default();
                let is_caught =
                    |r: &&Report| fails(&r.chunks[..n.min(r.chunks.len())], scheme, &limits);
                reports.iter().filter(is_caught).count()
            })),
            energy: (!energies.is_empty())
                .then(|| [energies[energies.len() / 2], energies[0], energies[energies.len() - 1]]),
            exact: Some((chunks().filter(|c| c.is_exact).count(), chunks().count())),
            margin: (!margins.is_empty())
                .then(|| margins.iter().sum::<f64>() / margins.len() as f64),
        }
    }

    fn ranks(&self, name: &str, trials: &[Trial]) -> Line {
        let reports = self.judge(trials, None);
        Line {
            name: name.into(),
            scheme: "targon-4.4",
            answers: reports.len(),
            rejected: rejected(&reports),
            by_chunks: None,
            energy: None,
            exact: None,
            margin: None,
        }
    }

    /// Tokens that were not drawn as they should be, with true rows, and the log-probabilities of
    /// whoever drew them.
    fn spoofed(&self, name: &str, trials: &[Trial]) -> Result<[Line; 2], String> {
        let proved = self.proved(Scheme::Residue, trials, &self.model.decoder)?;
        Ok([self.line(name, Scheme::Residue, &proved), self.ranks(name, trials)])
    }

    /// Proofs that were not computed at all.
    fn forged(&self, honest: &[Trial]) -> Result<Vec<Line>, String> {
        type Forge = fn(usize, &mut [u8]);
        let forgeries: [(&str, Forge); 4] = [
            ("proof of zeros", |_, data| data.fill(0)),
            ("constant proof", |_, data| data.fill(0x5a)),
            ("random proof", |i, data| {
                let random = |(j, b): (usize, &mut u8)| *b = ((i * 31 + j) * 2_654_435_761) as u8;
                data.iter_mut().enumerate().for_each(random);
            }),
            ("proof shifted by a row", |_, data| data.rotate_left(4)),
        ];
        let mut lines = Vec::new();
        for (name, forge) in forgeries {
            for scheme in Scheme::ALL {
                let mut trials = self.proved(scheme, honest, &self.model.decoder)?;
                for trial in &mut trials {
                    for (i, chunk) in trial.answer.chunks.iter_mut().enumerate() {
                        forge(i, &mut chunk.data);
                    }
                    rechain(&mut trial.answer);
                }
                lines.push(self.line(name, scheme, &trials));
            }
        }
        // Another answer's chunks under this one's root.
        let mut trials = self.proved(Scheme::Residue, honest, &self.model.decoder)?;
        let stolen: Vec<Vec<Chunk>> = trials.iter().map(|t| t.answer.chunks.clone()).collect();
        for (trial, chunks) in trials.iter_mut().zip(stolen.iter().cycle().skip(1)) {
            trial.answer.chunks.clone_from(chunks);
            rechain(&mut trial.answer);
        }
        lines.push(self.line("proof of another answer", Scheme::Residue, &trials));
        Ok(lines)
    }
}

/// A chain over whatever the chunks hold: a forger can always make one.
fn rechain(answer: &mut Answer) {
    let root = answer.end.as_ref().map(|end| crate::proof::codec::from_hex(&end.root));
    let Some(Ok(mut digest)) = root else { return };
    for (chunk, ids) in answer.chunks.iter_mut().zip(answer.ids.chunks(CHUNK_ROWS)) {
        digest = crate::proof::commit::link(&digest, chunk.index, ids, &chunk.data);
        chunk.digest = digest;
    }
}

fn fails(chunks: &[ChunkEvidence], scheme: Scheme, limits: &Limits) -> bool {
    crate::verify::proof::judge(chunks, scheme, limits).is_err()
}

/// Answers that were judged and found wanting. What could not be scored counts as neither.
fn rejected(reports: &[Report]) -> usize {
    reports.iter().filter(|r| matches!(r.verdict, Verdict::Reject(_))).count()
}

fn start(model: Model, pool: &Pool) -> Result<Engine, String> {
    let options = Options {
        context_max: 1024,
        blocks: 512,
        sequences_max: 16,
        waiting_max: 16,
        step_tokens_max: 512,
    };
    Engine::start(model, pool.clone(), options, Clock::system()).map_err(|e| e.to_string())
}

fn nonce(index: usize) -> [u8; 32] {
    crate::proof::commit::nonce_of(&format!("attack-bench {index}"))
}

fn prompt(model: &Model, text: &str) -> Result<Vec<u32>, String> {
    let chat = model.chat.as_ref().ok_or("this model has no chat template")?;
    let variables = serde_json::json!({
        "messages": [{"role": "user", "content": text}], "add_generation_prompt": true,
    });
    let variables = variables.as_object().cloned().unwrap_or_default();
    let text = chat.render(variables).map_err(|e| e.to_string())?;
    model.tokenizer.encode(&text, false).map_err(|e| e.to_string())
}
