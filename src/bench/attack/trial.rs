//! Makes the questions and answers of the attack bench, and gives an answer its proof.

use super::tamper::{Tamper, tampered};
use crate::chain::keys::Hotkey;
use crate::clock::Clock;
use crate::engine::output::FinishReason;
use crate::engine::request::Request;
use crate::engine::transcript::Transcript;
use crate::engine::{Engine, Options};
use crate::intake::proof::{ProofHead, Prover};
use crate::models::checkpoint::Checkpoint;
use crate::models::device::Device;
use crate::models::model::DeviceWeights;
use crate::models::{Identity, Model};
use crate::ops::pool::Pool;
use crate::proof::codec::Hash;
use crate::proof::commit::{link, nonce_of};
use crate::proof::{CHUNK_ROWS, Scheme};
use crate::verify::answer::Answer;
use crate::verify::prefill;
use anyhow::{Context, anyhow};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Temperature that every answer is asked for at.
pub(super) const TEMPERATURE: f32 = 0.8;

/// The hidden rows of one answer, as 16-bit patterns.
pub(super) type Rows = Vec<Vec<u16>>;

/// A question.
#[derive(Clone)]
pub(super) struct AttackRequest {
    /// Its number, from which its nonce follows.
    pub(super) index: usize,
    /// What is asked.
    pub(super) request: Request,
    /// Who must sign the answer.
    pub(super) hotkey: Option<Hotkey>,
}

/// A question with its answer.
#[derive(Clone)]
pub(super) struct AttackedAnswer {
    pub(super) ask: AttackRequest,
    pub(super) answer: Answer,
    /// Whether the answer claims that its end token was not sent.
    pub(super) end_is_implied: bool,
}

/// The model under attack, and what everybody knows of it.
pub(super) struct Subject {
    pub(super) model: Arc<Model>,
    /// What proofs are bound to.
    pub(super) identity: Arc<Identity>,
    /// Its honest engine.
    pub(super) engine: Engine,
    /// Compute threads.
    pub(super) pool: Pool,
    path: PathBuf,
    scratch: PathBuf,
}

impl AttackRequest {
    /// The nonce that the verifier sends.
    pub(super) fn nonce(&self) -> Hash {
        nonce_of(&format!("attack-bench {}", self.index))
    }

    /// The key of the noise that an honest answer is drawn with under `nonce`.
    pub(super) fn noise(&self, nonce: &Hash) -> u64 {
        self.request.terms(None, 0).noise_key(nonce)
    }

    /// How an honest answer is proved.
    pub(super) fn prover(&self, scheme: Scheme) -> Prover {
        Prover { scheme, nonce: self.nonce(), signer: None }
    }

    /// The same question to which the answer may end by itself.
    pub(super) fn that_may_end(&self) -> Self {
        let mut ask = self.clone();
        ask.request.stop.ignore_eos = false;
        ask.request.sampling.noise_key = ask.noise(&ask.nonce());
        ask
    }
}

impl Subject {
    /// Loads the model at `path`; `scratch` is where changed weights are written.
    pub(super) fn load(path: &Path, scratch: &Path, pool: &Pool) -> anyhow::Result<Self> {
        let model = Arc::new(Model::load_on(Device::Cpu, path, None, pool, |_, _| {})?);
        let identity = Arc::new(Identity::of(&model, pool)?);
        let engine = start(&model, pool)?;
        let (path, scratch) = (path.to_owned(), scratch.to_owned());
        Ok(Self { model, identity, engine, pool: pool.clone(), path, scratch })
    }

    /// The model with changed weights and its own tokenizer.
    pub(super) fn twin(&self, tamper: Tamper) -> anyhow::Result<Arc<Model>> {
        let checkpoint = Checkpoint::open(&self.path)?;
        let decoder = tampered(&checkpoint, &self.pool, tamper, &self.scratch)?;
        let mut model = Model::load_on(Device::Cpu, &self.path, None, &self.pool, |_, _| {})?;
        model.weights = DeviceWeights::Cpu(Arc::new(decoder));
        Ok(Arc::new(model))
    }

    /// Question `index`: `text`, answered with exactly `tokens` tokens.
    pub(super) fn ask(
        &self,
        index: usize,
        text: &str,
        tokens: usize,
    ) -> anyhow::Result<AttackRequest> {
        let chat = self.model.text.chat.as_ref().context("this model has no chat template")?;
        let variables = serde_json::json!({
            "messages": [{"role": "user", "content": text}], "add_generation_prompt": true,
        });
        let variables = variables.as_object().cloned().unwrap_or_default();
        let text = chat.render(variables, Clock::system().unix_ms())?;
        let prompt = self.model.text.tokenizer.encode(&text, false).map_err(|e| anyhow!(e))?;
        let mut request = Request::greedy(prompt, tokens);
        request.sampling.temperature = TEMPERATURE;
        request.stop.ignore_eos = true;
        let mut ask = AttackRequest { index, request, hotkey: None };
        ask.request.sampling.noise_key = ask.noise(&ask.nonce());
        Ok(ask)
    }

    /// What `engine` answers, drawn as `change` makes of each question.
    pub(super) fn answers(
        &self,
        engine: &Engine,
        asks: &[AttackRequest],
        change: &dyn Fn(&AttackRequest, &mut Request),
    ) -> anyhow::Result<Vec<AttackedAnswer>> {
        let mut trials = Vec::with_capacity(asks.len());
        for batch in asks.chunks(engine.options().sequences_max) {
            let running = batch.iter().map(|ask| {
                let mut drawn = ask.request.clone();
                change(ask, &mut drawn);
                engine.submit(drawn)
            });
            let running = running.collect::<Result<Vec<_>, _>>()?;
            for (ask, generation) in batch.iter().zip(running) {
                let steps = generation.collect_blocking()?.steps;
                // Weight values are not what attacks are about; the check adds those it needs.
                let answer = Answer { powv: Vec::new(), ..Answer::of_steps(&steps, None) };
                trials.push(AttackedAnswer::new(ask, answer));
            }
        }
        Ok(trials)
    }

    /// Honest answers, with the proofs that the engine made while it drew them.
    pub(super) fn honest(
        &self,
        scheme: Scheme,
        asks: &[AttackRequest],
    ) -> anyhow::Result<Vec<AttackedAnswer>> {
        let mut trials = self.answers(&self.engine, asks, &|ask, request| {
            ask.prover(scheme).bind(request, &self.identity, None, 0);
        })?;
        for AttackedAnswer { ask, answer, .. } in &mut trials {
            self.seal(ask, &ask.prover(scheme), answer);
        }
        Ok(trials)
    }

    /// The hidden rows that `model` computes over each answer.
    pub(super) fn rows(
        &self,
        model: &Model,
        trials: &[AttackedAnswer],
    ) -> anyhow::Result<Vec<Rows>> {
        let of_trial = |trial: &AttackedAnswer| {
            let (prompt, ids) = (&trial.ask.request.prompt, &trial.answer.ids);
            let rows = prefill::hidden_rows(|blocks| model.pass(&self.pool, blocks), prompt, ids);
            rows.map_err(|stop| anyhow!("{stop:?}"))
        };
        trials.iter().map(of_trial).collect()
    }

    /// The same answers with the proofs that `rows` make.
    pub(super) fn proved(
        &self,
        scheme: Scheme,
        trials: &[AttackedAnswer],
        rows: &[Rows],
    ) -> Vec<AttackedAnswer> {
        let prove = |(trial, rows): (&AttackedAnswer, &Rows)| {
            let mut trial = trial.clone();
            let prover = trial.ask.prover(scheme);
            self.prove(&trial.ask, &prover, rows, &mut trial.answer);
            trial
        };
        trials.iter().zip(rows).map(prove).collect()
    }

    /// Gives `answer` the proof that `prover` makes of `rows`.
    pub(super) fn prove(
        &self,
        ask: &AttackRequest,
        prover: &Prover,
        rows: &[Vec<u16>],
        answer: &mut Answer,
    ) {
        let head = self.head(ask, prover);
        let prompt = ask.request.prompt.len();
        answer.chunks = head.chunks(&self.identity, prompt, (&answer.ids, rows));
        self.seal(ask, prover, answer);
    }

    /// Binds the chunks of `answer` as `prover` does, whatever they hold: a forger can always do
    /// that.
    pub(super) fn seal(&self, ask: &AttackRequest, prover: &Prover, answer: &mut Answer) {
        let head = self.head(ask, prover);
        let digest = relink(&head.root, answer);
        answer.end = Some(head.end(Some(digest), answer.ids.len(), &FinishReason::Length));
    }

    fn head(&self, ask: &AttackRequest, prover: &Prover) -> ProofHead {
        prover.head(&ask.request.terms(None, 0), &self.identity)
    }

    /// The text that `ids` spell in answer to `request`.
    pub(super) fn spell(&self, request: &Request, ids: &[u32]) -> String {
        let mut transcript = Transcript::new(request, &self.model.text);
        let mut text = String::new();
        for id in ids {
            let (piece, end) = transcript.push(request, &self.model.text, *id, false);
            text.push_str(&piece);
            if end.is_some() {
                return text;
            }
        }
        text + &transcript.finish()
    }
}

impl AttackedAnswer {
    /// An answer that says how it ends.
    pub(super) fn new(ask: &AttackRequest, answer: Answer) -> Self {
        Self { ask: ask.clone(), answer, end_is_implied: false }
    }

    /// Bytes of all chunks, without base64.
    pub(super) fn proof_bytes(&self) -> usize {
        self.answer.chunks.iter().map(|c| c.data.len()).sum()
    }
}

/// Makes the chain of `answer`'s chunks hold from `root` on; returns its end.
pub(super) fn relink(root: &Hash, answer: &mut Answer) -> Hash {
    let mut digest = *root;
    for (chunk, ids) in answer.chunks.iter_mut().zip(answer.ids.chunks(CHUNK_ROWS)) {
        digest = link(&digest, chunk.index, ids, &chunk.data);
        chunk.digest = digest;
    }
    digest
}

pub(super) fn start(model: &Arc<Model>, pool: &Pool) -> anyhow::Result<Engine> {
    let options = Options {
        context_max: 1024,
        blocks: 512,
        sequences_max: 16,
        waiting_max: 16,
        step_tokens_max: 512,
        drafts_max: 0,
    };
    Ok(Engine::start(Arc::clone(model), pool.clone(), options, Clock::system())?)
}
