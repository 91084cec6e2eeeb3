//! A miner that is not what it says: the library's own server, door and chain client around an
//! engine that cheats. For demonstrations, and for tests of what catches it.
//!
//! Whatever the way, it claims the true model: its name, its weights root, its calibration.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use targon_engine::bench::attack::tamper::{Tamper, tampered};
use targon_engine::chain::keys::Keypair;
use targon_engine::chain::metagraph::{AXON_PROTOCOL, Axon};
use targon_engine::chain::network::{Endpoints, Network};
use targon_engine::chain::subtensor::Subtensor;
use targon_engine::clock::Clock;
use targon_engine::engine::backend::{Backend, Command, Submission};
use targon_engine::engine::output::{Event, Fault, Step};
use targon_engine::engine::request::Request;
use targon_engine::engine::stats::Stats;
use targon_engine::engine::{Engine, Options};
use targon_engine::intake::translate::Defaults;
use targon_engine::miner::{Miner, MinerOptions};
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::device::Device;
use targon_engine::models::model::DeviceWeights;
use targon_engine::models::pass::{RowAsk, RowReport, Scores, Token};
use targon_engine::models::{Identity, Model};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::commit::ChunkChain;
use targon_engine::server::door::{Gate, Policy};
use targon_engine::server::listen::serve_all;
use targon_engine::server::registry::{ModelState, Registry, Served};
use targon_engine::server::router;
use targon_engine::server::state::ServerState;
use targon_engine::server::subnet;
use targon_engine::verify::Stop;
use targon_engine::verify::prefill::{Prefix, RowSink};
use tokio::net::TcpListener;

const NETUID: u16 = 4;
/// Columns that share a scale in the cheaper weights.
const GROUP: usize = 32;
/// Bits of the weights that draw for a spoofed prefill. Those of four draw what the true ones do in
/// some answers of less than a hundred tokens.
const SPOOF_BITS: u32 = 3;
/// What an old answer was asked for.
const OLD_PROMPT: &str = "The sea is salty because";
const OLD_TOKENS: usize = 96;
/// Over how long it is sent: at once, it would be seen not to be a stream.
const REPLAY_TIME: Duration = Duration::from_secs(1);
const OPTIONS: Options = Options {
    context_max: 2048,
    blocks: 256,
    sequences_max: 4,
    waiting_max: 16,
    step_tokens_max: 512,
    drafts_max: 0,
};

/// In what it is not honest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Tokens and proofs of weights of so many bits.
    Weights(u32),
    /// Honest, with a pause of so many milliseconds before each token.
    Slow(u64),
    /// Prefill spoofing: tokens of weights of so many bits, then one prefill of the true weights
    /// over them, which makes true proofs and log-probabilities of false tokens.
    Spoof(u32),
    /// One old answer to every request, under the root and the signature that are asked for. Its
    /// weight values are those of the old request, and its chain begins at another root.
    Replay,
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("a way is int4, slow=MILLISECONDS, spoof, spoof=BITS or replay, got {text}");
        match text.split_once('=') {
            None if text == "int4" => Ok(Self::Weights(4)),
            None if text == "spoof" => Ok(Self::Spoof(SPOOF_BITS)),
            None if text == "replay" => Ok(Self::Replay),
            Some(("slow", pause)) => pause.parse().map(Self::Slow).map_err(|_| wrong()),
            Some(("spoof", bits)) => match bits.parse() {
                Ok(bits @ 2..=8) => Ok(Self::Spoof(bits)),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }
}

/// Who cheats, with what, and where.
pub struct Setup {
    pub way: Way,
    /// What the model is called.
    pub model: String,
    /// The true weights.
    pub path: PathBuf,
    /// Where changed weights are written.
    pub scratch: PathBuf,
    pub threads: usize,
    pub signer: Keypair,
    /// Where the chain is asked.
    pub chain: String,
    /// The address that is announced; a port is taken that is free.
    pub ip: IpAddr,
}

/// Loads, listens, announces and serves until the chain or the listener fails; `listening` is told
/// where the open routes are.
pub async fn run(setup: Setup, listening: impl FnOnce(&str)) -> Result<(), String> {
    let words = |e: &dyn std::fmt::Display| e.to_string();
    let pool = Pool::new(setup.threads, Isa::best()).map_err(|e| words(&e))?;
    let (way, path, scratch) = (setup.way, setup.path, setup.scratch);
    let loading = move || served(way, &path, &scratch, &pool);
    let served = tokio::task::spawn_blocking(loading).await.map_err(|e| words(&e))??;
    let registry = Registry::default();
    registry.announce([setup.model.clone()]);
    registry.set(&setup.model, None, ModelState::Ready(Box::new(served)));
    let (signer, clock) = (Arc::new(setup.signer), Clock::system());
    let policy = Policy { slots: OPTIONS.sequences_max, ..Policy::default() };
    let gate = Gate::new(signer.hotkey(), policy, clock.clone());
    let state = ServerState::new(registry, Defaults::TARGON, clock);
    let state = state.signed_by(Arc::clone(&signer)).behind(gate.clone());
    let bind = async |ip: IpAddr| TcpListener::bind(SocketAddr::new(ip, 0)).await;
    let open = bind([127, 0, 0, 1].into()).await.map_err(|e| words(&e))?;
    let signed = bind(setup.ip).await.map_err(|e| words(&e))?;
    let address = signed.local_addr().map_err(|e| words(&e))?;
    listening(&format!("http://{}", open.local_addr().map_err(|e| words(&e))?));
    let routes =
        vec![(open, router(state.clone())), (signed, subnet::router(state.clone(), gate.clone()))];
    let never = std::future::pending();
    tokio::spawn(serve_all(routes, state, never, Duration::ZERO));
    let options = MinerOptions {
        netuid: NETUID,
        epoch_length: 360,
        axon: Axon { address, version: 1, protocol: AXON_PROTOCOL },
    };
    let endpoints = Endpoints::new(Network::Local, &[setup.chain]).map_err(|e| words(&e))?;
    let miner = Miner::new(Subtensor::new(endpoints), gate, signer, options);
    miner.join().await.map_err(|e| words(&e))?;
    miner.announce(&|_| true).await.map_err(|e| words(&e))?;
    miner.follow().await.map_err(|e| words(&e))
}

/// The model as it is claimed, behind an engine that goes its way.
fn served(way: Way, path: &Path, scratch: &Path, pool: &Pool) -> Result<Served, String> {
    let load = || {
        let model = Model::load_on(Device::Cpu, path, None, pool, |_, _| {});
        model.map_err(|e| format!("{}: {e}", path.display()))
    };
    let model = Arc::new(load()?);
    let identity = Arc::new(Identity::of(&model, pool).map_err(|e| e.to_string())?);
    let drawing = match way {
        Way::Weights(bits) | Way::Spoof(bits) => {
            let mut cheaper = load()?;
            let coarse = Tamper::Integers { bits, group: GROUP };
            let checkpoint = Checkpoint::open(path).map_err(|e| e.to_string())?;
            let decoder = tampered(&checkpoint, pool, coarse, scratch);
            let decoder = decoder.map_err(|e| format!("{e:#}"))?;
            cheaper.weights = DeviceWeights::Cpu(Arc::new(decoder));
            Arc::new(cheaper)
        }
        Way::Slow(_) | Way::Replay => Arc::clone(&model),
    };
    let engine = Engine::start(drawing, pool.clone(), OPTIONS, Clock::system());
    let engine = engine.map_err(|e| e.to_string())?;
    let trick = match way {
        Way::Weights(_) => None,
        Way::Slow(pause) => Some(Trick::Slow(Duration::from_millis(pause))),
        Way::Spoof(_) => Some(Trick::Spoof(Arc::clone(&model), pool.separate())),
        Way::Replay => Some(Trick::Replay(old_answer(&engine, &model, &identity)?)),
    };
    let engine = match trick {
        Some(trick) => Relay { engine, trick }.start()?,
        None => engine,
    };
    Ok(Served { engine, model, fingerprint: "dishonest".into(), identity })
}

/// What is done with the answers of an engine before they are sent.
enum Trick {
    Slow(Duration),
    Spoof(Arc<Model>, Pool),
    Replay(Vec<Step>),
}

/// Stands between the handle that a server has and an engine.
struct Relay {
    engine: Engine,
    trick: Trick,
}

impl Backend for Relay {
    fn run(self: Box<Self>, commands: Receiver<Command>) -> bool {
        let relay: Arc<Self> = Arc::from(self);
        for Command::Submit(submission) in commands {
            let relay = Arc::clone(&relay);
            std::thread::spawn(move || relay.answer(*submission));
        }
        true
    }
}

impl Relay {
    fn start(self) -> Result<Engine, String> {
        let text = (Arc::clone(self.engine.text()), self.engine.info().clone());
        let options = self.engine.options();
        let stats = Arc::new(Stats::default());
        Engine::over(Box::new(self), text, options, stats, Clock::system())
            .map_err(|e| e.to_string())
    }

    /// Answers one request, on a thread of its own. Who does not listen any more is not told.
    fn answer(&self, submission: Submission) {
        let Submission { request, events, place, .. } = submission;
        let pause = match &self.trick {
            Trick::Slow(pause) => *pause,
            Trick::Spoof(..) | Trick::Replay(_) => Duration::ZERO,
        };
        let steps = match &self.trick {
            Trick::Slow(_) => self.drawn(request),
            Trick::Spoof(truth, pool) => self.spoofed(request, truth, pool),
            Trick::Replay(old) => Ok((replayed(&request, old), REPLAY_TIME)),
        };
        match steps {
            Ok((steps, spread)) => {
                let pause = pause + spread / steps.len().max(1) as u32;
                for step in steps {
                    std::thread::sleep(pause);
                    let _ = events.try_send(Event::Step(step));
                }
            }
            Err(fault) => drop(events.try_send(Event::Fault(fault))),
        }
        drop(place);
    }

    fn collected(&self, request: Request) -> Result<Vec<Step>, Fault> {
        let generation = self.engine.submit(request);
        let generation = generation.map_err(|e| Fault::Refused(e.to_string()))?;
        generation.collect_blocking().map(|ended| ended.steps)
    }

    fn drawn(&self, request: Request) -> Result<(Vec<Step>, Duration), Fault> {
        self.collected(request).map(|steps| (steps, Duration::ZERO))
    }

    /// The answer of the cheaper weights with proofs and log-probabilities of the true ones, and
    /// over how long it is sent: an answer that comes at once would be seen not to be a stream.
    fn spoofed(
        &self,
        request: Request,
        truth: &Model,
        pool: &Pool,
    ) -> Result<(Vec<Step>, Duration), Fault> {
        let begun = Instant::now();
        let mut steps = self.collected(Request { proof: None, ..request.clone() })?;
        let ids: Vec<u32> = steps.iter().map(|step| step.token).collect();
        let chain = request.proof.as_ref().map(|proof| ChunkChain::new(proof.root));
        let mut told = Told { request: &request, steps: &mut steps, chain };
        let device = |stop: Stop| Fault::Device(format!("{stop:?}"));
        let pass = |blocks| truth.pass(pool, blocks);
        Prefix::new(pass, &request.prompt, ids.len())
            .and_then(|mut prefix| prefix.run(&ids, &mut told))
            .map_err(device)?;
        told.end();
        Ok((steps, begun.elapsed() / 2))
    }
}

/// What the true model says of tokens that it did not draw.
struct Told<'a> {
    request: &'a Request,
    steps: &'a mut [Step],
    chain: Option<ChunkChain>,
}

impl RowSink for Told<'_> {
    fn ask(
        &mut self,
        indices: std::ops::Range<usize>,
        position: usize,
    ) -> Result<Vec<RowAsk<'_>>, Stop> {
        let request = self.request;
        let ask = |(index, position): (usize, usize)| {
            let token = Token::Known(self.steps[index].token);
            let scores = Scores {
                mode: request.logprob_mode,
                top: request.top_logprobs,
                ..Scores::new(token, &request.sampling)
            };
            let prover = request.proof.as_ref().map(|proof| &proof.prover);
            RowAsk { prover, scores: Some(scores), ..RowAsk::new(0, position) }
        };
        Ok(indices.zip(position..).map(ask).collect())
    }

    fn take(&mut self, index: usize, report: RowReport) -> Result<(), Stop> {
        let step = &mut self.steps[index];
        if let Some(scored) = report.scores {
            (step.logprob, step.rank) = (scored.token.logprob, scored.token.rank);
            step.top = scored.top;
        }
        if let Some((chain, row)) = self.chain.as_mut().zip(report.proof) {
            step.proof = chain.push(step.token, row);
        }
        Ok(())
    }
}

impl Told<'_> {
    /// Closes the chain, and lets the last token say where it ends.
    fn end(&mut self) {
        let (Some(chain), Some(last)) = (&mut self.chain, self.steps.last_mut()) else { return };
        if let Some(chunk) = chain.close() {
            last.proof = Some(chunk);
        }
        if let Some(finish) = &mut last.finish {
            finish.digest = Some(*chain.digest());
        }
    }
}

/// An answer to a question of one's own, proved for nobody.
fn old_answer(engine: &Engine, model: &Model, identity: &Identity) -> Result<Vec<Step>, String> {
    use targon_engine::intake::proof::Prover;
    use targon_engine::proof::{Scheme, commit::nonce_of};
    let prompt = model.text.tokenizer.encode(OLD_PROMPT, false).map_err(|e| e.to_string())?;
    let mut request = Request::greedy(prompt, OLD_TOKENS);
    request.min_tokens = OLD_TOKENS;
    let prover = Prover { scheme: Scheme::Residue, nonce: nonce_of("old"), signer: None };
    prover.bind(&mut request, identity, None, 0);
    let generation = engine.submit(request).map_err(|e| e.to_string())?;
    generation.collect_blocking().map(|ended| ended.steps).map_err(|e| e.to_string())
}

/// The old answer, as long as it was asked for.
fn replayed(request: &Request, old: &[Step]) -> Vec<Step> {
    let mut steps = old[..old.len().min(request.max_tokens)].to_vec();
    let finish = old.last().and_then(|last| last.finish.clone());
    if let Some(last) = steps.last_mut() {
        last.finish = finish;
    }
    let tokens = steps.len();
    if let Some(finish) = steps.last_mut().and_then(|last| last.finish.as_mut()) {
        finish.completion_tokens = tokens;
        finish.prompt_tokens = request.prompt.len();
    }
    steps
}
