//! Makes the answers of every attack in the list, on the same questions.

use super::catalogue::{Attack, Cheat};
use super::lockstep::{self, AnswerJob, Way};
use super::tamper::{Tamper, int8_head};
use super::trial::{AttackRequest, AttackedAnswer, Rows, Subject, start};
use crate::bench::stats::choice;
use crate::chain::keys::Keypair;
use crate::intake::proof::Prover;
use crate::models::Model;
use crate::models::sampler::Sampling;
use crate::proof::commit::{ChunkProof, nonce_of};
use crate::proof::{CHUNK_ROWS, Scheme};
use crate::verify::answer::Answer;
use anyhow::Context;
use std::sync::Arc;

/// How the answer to an ask is proved in a scheme.
type Provers<'a> = &'a dyn Fn(Scheme, &AttackRequest) -> Prover;

/// Tokens of the shortest answer that is cut.
const CUT_MIN: usize = 8;
/// Seeds of the places where answers are cut and where tokens are exchanged.
const CUTS: u64 = 0x6375_7473;
const EXCHANGES: u64 = 0x7377_6170;

/// The answers of one attack, by the scheme that they are proved in.
pub(super) type Proved = Vec<(Scheme, Vec<AttackedAnswer>)>;

/// Makes the answers of cheats.
pub(super) struct AnswerMaker<'a> {
    subject: &'a Subject,
    asks: &'a [AttackRequest],
    honest: (Vec<AttackedAnswer>, Vec<Rows>),
    twin: Option<Twin>,
}

/// Changed weights, and what they answer.
struct Twin {
    tamper: Tamper,
    model: Arc<Model>,
    drawn: Vec<AttackedAnswer>,
}

impl<'a> AnswerMaker<'a> {
    /// On these questions; answers them honestly first.
    pub(super) fn new(subject: &'a Subject, asks: &'a [AttackRequest]) -> anyhow::Result<Self> {
        let honest = subject.answers(&subject.engine, asks, &|_, _| {})?;
        let rows = subject.rows(&subject.model, &honest)?;
        Ok(Self { subject, asks, honest: (honest, rows), twin: None })
    }

    /// The answers of an attack.
    pub(super) fn make(&mut self, attack: &Attack) -> anyhow::Result<Proved> {
        let schemes = attack.schemes();
        match attack.cheat {
            Cheat::Weights(tamper) => {
                let (model, drawn) = self.twin(tamper)?;
                let rows = self.subject.rows(&model, &drawn)?;
                Ok(self.proved(schemes, &drawn, &rows))
            }
            Cheat::Spoof(tamper) => {
                let (_, drawn) = self.twin(tamper)?;
                self.proved_truly(schemes, &drawn)
            }
            Cheat::Draft(tamper) => {
                let (model, _) = self.twin(tamper)?;
                let draft = Some(&*model);
                self.decoded(schemes, Way { draft, cache: None }, |prompt| prompt.to_vec())
            }
            Cheat::Int8Cache => {
                let way = Way { draft: None, cache: Some(int8_head) };
                self.decoded(schemes, way, |prompt| prompt.to_vec())
            }
            Cheat::Prompt(change) => self.decoded(schemes, Way::default(), change),
            Cheat::Sampler(change) => self.proved_truly(schemes, &self.drawn(change)?),
            Cheat::Cut => self.proved_truly(schemes, &self.cut()?),
            Cheat::CutSilently => self.proved_truly(schemes, &self.torn()?),
            Cheat::EndSkipped => self.proved_truly(schemes, &self.end_skipped()?),
            Cheat::Exchanged => Ok(self.proved(schemes, &self.exchanged(), &self.honest.1)),
            Cheat::ExchangedAndProved => self.proved_truly(schemes, &self.exchanged()),
            Cheat::Replayed => self.replayed(schemes, Keep::Root),
            Cheat::ReplayedAndBound => self.replayed(schemes, Keep::Rows),
            Cheat::Copied => self.copied(schemes, Keep::Root),
            Cheat::CopiedAndBound => self.copied(schemes, Keep::Rows),
            Cheat::Stolen => Ok(self.stolen(schemes)),
            Cheat::Forged(forge) => Ok(self.forged(schemes, forge)),
            // What is malformed is made of honest answers.
            Cheat::Malformed => Ok(self.proved(schemes, &self.honest.0, &self.honest.1)),
        }
    }

    /// The model with changed weights and its answers; the last one is remembered.
    fn twin(&mut self, tamper: Tamper) -> anyhow::Result<(Arc<Model>, Vec<AttackedAnswer>)> {
        if self.twin.as_ref().is_none_or(|twin| twin.tamper != tamper) {
            self.twin = None; // its memory is needed
            let model = self.subject.twin(tamper)?;
            let engine = start(&model, &self.subject.pool)?;
            let drawn = self.subject.answers(&engine, self.asks, &|_, _| {})?;
            self.twin = Some(Twin { tamper, model, drawn });
        }
        let twin = self.twin.as_ref().context("the changed weights are gone")?;
        Ok((Arc::clone(&twin.model), twin.drawn.clone()))
    }

    fn proved(&self, schemes: &[Scheme], trials: &[AttackedAnswer], rows: &[Rows]) -> Proved {
        schemes.iter().map(|s| (*s, self.subject.proved(*s, trials, rows))).collect()
    }

    /// Proved with the rows that the true weights compute over whatever was answered.
    fn proved_truly(
        &self,
        schemes: &[Scheme],
        trials: &[AttackedAnswer],
    ) -> anyhow::Result<Proved> {
        let rows = self.subject.rows(&self.subject.model, trials)?;
        Ok(self.proved(schemes, trials, &rows))
    }

    /// Decoded outside the engine, after what `change` makes of each prompt.
    fn decoded(
        &self,
        schemes: &[Scheme],
        way: Way<'_>,
        change: impl Fn(&[u32]) -> Vec<u32>,
    ) -> anyhow::Result<Proved> {
        let job = |ask: &'a AttackRequest| AnswerJob { ask, prompt: change(&ask.request.prompt) };
        let jobs: Vec<AnswerJob<'_>> = self.asks.iter().map(job).collect();
        let (trials, rows) = lockstep::run(self.subject, way, &jobs)?;
        Ok(self.proved(schemes, &trials, &rows))
    }

    /// Answers of the honest engine, drawn otherwise than asked.
    fn drawn(&self, change: fn(&mut Sampling)) -> anyhow::Result<Vec<AttackedAnswer>> {
        let subject = self.subject;
        subject.answers(&subject.engine, self.asks, &|_, drawn| change(&mut drawn.sampling))
    }

    /// Honest answers to the same questions, where they may end by themselves.
    fn ending(&self) -> anyhow::Result<Vec<AttackedAnswer>> {
        let asks: Vec<AttackRequest> = self.asks.iter().map(AttackRequest::that_may_end).collect();
        self.subject.answers(&self.subject.engine, &asks, &|_, _| {})
    }

    /// Honest answers that stop somewhere in their middle half, as if an end token had been drawn
    /// and not sent.
    fn torn(&self) -> anyhow::Result<Vec<AttackedAnswer>> {
        let mut trials = self.ending()?;
        trials.retain(|trial| trial.answer.ids.len() >= CUT_MIN);
        for AttackedAnswer { ask, answer, end_is_implied } in &mut trials {
            let count = answer.ids.len();
            let kept = count / 4 + choice(CUTS, ask.index as u32, count / 2);
            answer.ids.truncate(kept);
            answer.logprobs.truncate(kept);
            answer.finish_reason = Some("stop".into());
            answer.text = Some(self.subject.spell(&ask.request, &answer.ids));
            *end_is_implied = true;
        }
        Ok(trials)
    }

    /// The same with an end token that was not drawn.
    fn cut(&self) -> anyhow::Result<Vec<AttackedAnswer>> {
        let end =
            self.subject.model.text.stop_ids.first().context("this model has no end token")?;
        let mut trials = self.torn()?;
        for AttackedAnswer { ask, answer, end_is_implied } in &mut trials {
            answer.ids.push(*end);
            answer.logprobs.push(Some(-0.5));
            answer.text = Some(self.subject.spell(&ask.request, &answer.ids));
            *end_is_implied = false;
        }
        Ok(trials)
    }

    /// Answers of which the honest version ends by itself, and which go on to the limit.
    fn end_skipped(&self) -> anyhow::Result<Vec<AttackedAnswer>> {
        let ends = &self.subject.model.text.stop_ids;
        let ended = |t: &AttackedAnswer| t.answer.ids.last().is_some_and(|id| ends.contains(id));
        let asks: Vec<AttackRequest> =
            self.ending()?.into_iter().filter(ended).map(|trial| trial.ask).collect();
        self.subject.answers(&self.subject.engine, &asks, &|_, drawn| {
            drawn.min_tokens = drawn.max_tokens;
        })
    }

    /// Honest answers in which one token of each chunk is that of the next answer.
    fn exchanged(&self) -> Vec<AttackedAnswer> {
        let others = self.honest.0.iter().cycle().skip(1);
        let exchange = |(trial, other): (&AttackedAnswer, &AttackedAnswer)| {
            let mut trial = trial.clone();
            let ids = &mut trial.answer.ids;
            for (chunk, start) in (0..ids.len()).step_by(CHUNK_ROWS).enumerate() {
                let counter = (trial.ask.index * 256 + chunk) as u32;
                let place = start + choice(EXCHANGES, counter, CHUNK_ROWS.min(ids.len() - start));
                let donor = other.answer.ids[place];
                ids[place] = if donor == ids[place] { u32::from(donor == 0) } else { donor };
            }
            trial.answer.text = Some(self.subject.spell(&trial.ask.request, &trial.answer.ids));
            trial
        };
        self.honest.0.iter().zip(others).map(exchange).collect()
    }

    /// Answers that were drawn and proved for an older nonce.
    fn replayed(&self, schemes: &[Scheme], keep: Keep) -> anyhow::Result<Proved> {
        let earlier =
            |ask: &AttackRequest| nonce_of(&format!("attack-bench, earlier {}", ask.index));
        let old =
            |scheme, ask: &AttackRequest| Prover { nonce: earlier(ask), ..ask.prover(scheme) };
        let subject = self.subject;
        let trials = subject.answers(&subject.engine, self.asks, &|ask, drawn| {
            drawn.sampling.noise_key = ask.noise(&earlier(ask));
        })?;
        let rows = subject.rows(&subject.model, &trials)?;
        let new = |scheme, ask: &AttackRequest| ask.prover(scheme);
        Ok(self.rebound(schemes, &trials, &rows, (&old, &new), keep))
    }

    /// Honest answers with another miner's proof; this one's own signature is asked for.
    fn copied(&self, schemes: &[Scheme], keep: Keep) -> anyhow::Result<Proved> {
        let pair = |seed| Keypair::from_seed(&[seed; 32]);
        let (victim, thief) = (pair(7)?, pair(8)?);
        let hotkey = Some(thief.hotkey());
        let mut trials = self.honest.0.clone();
        trials.iter_mut().for_each(|trial| trial.ask.hotkey = hotkey);
        let by = |signer: Keypair| {
            let signer = Arc::new(signer);
            move |scheme, ask: &AttackRequest| Prover {
                signer: Some(signer.clone()),
                ..ask.prover(scheme)
            }
        };
        let (old, new) = (by(victim), by(thief));
        Ok(self.rebound(schemes, &trials, &self.honest.1, (&old, &new), keep))
    }

    /// Proved by one prover, and then, if only the rows are kept, bound by another.
    fn rebound(
        &self,
        schemes: &[Scheme],
        trials: &[AttackedAnswer],
        rows: &[Rows],
        (old, new): (Provers<'_>, Provers<'_>),
        keep: Keep,
    ) -> Proved {
        let rebind = |scheme: Scheme, trial: &AttackedAnswer, rows: &Rows| {
            let AttackedAnswer { ask, mut answer, end_is_implied } = trial.clone();
            self.subject.prove(&ask, &old(scheme, &ask), rows, &mut answer);
            if keep == Keep::Rows {
                self.subject.seal(&ask, &new(scheme, &ask), &mut answer);
            }
            AttackedAnswer { ask, answer, end_is_implied }
        };
        let all = |scheme: &Scheme| {
            let rebound = trials.iter().zip(rows).map(|(t, r)| rebind(*scheme, t, r));
            (*scheme, rebound.collect())
        };
        schemes.iter().map(all).collect()
    }

    /// Honest answers with the chunks of the next one.
    fn stolen(&self, schemes: &[Scheme]) -> Proved {
        let mut proved = self.proved(schemes, &self.honest.0, &self.honest.1);
        for (scheme, trials) in &mut proved {
            let all: Vec<Vec<ChunkProof>> =
                trials.iter().map(|t| t.answer.chunks.clone()).collect();
            for (trial, chunks) in trials.iter_mut().zip(all.iter().cycle().skip(1)) {
                trial.answer.chunks.clone_from(chunks);
                self.reseal(*scheme, &trial.ask, &mut trial.answer);
            }
        }
        proved
    }

    /// Honest answers whose chunks were made up.
    fn forged(&self, schemes: &[Scheme], forge: fn(&mut [ChunkProof])) -> Proved {
        let mut proved = self.proved(schemes, &self.honest.0, &self.honest.1);
        for (scheme, trials) in &mut proved {
            for trial in trials {
                forge(&mut trial.answer.chunks);
                self.reseal(*scheme, &trial.ask, &mut trial.answer);
            }
        }
        proved
    }

    fn reseal(&self, scheme: Scheme, ask: &AttackRequest, answer: &mut Answer) {
        self.subject.seal(ask, &ask.prover(scheme), answer);
    }
}

/// What remains of a proof that is used again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// All of it.
    Root,
    /// Its chunks.
    Rows,
}
