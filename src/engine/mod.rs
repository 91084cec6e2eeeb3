//! Runs requests: the engine is a cloneable handle over one owner thread per model.
//!
//! [`Engine::submit`] checks a request and queues it; tokens come back on a [`Generation`]. The
//! owner (`core`) asks the pure [`scheduler`] which rows run next, `asks` says what is to be known
//! of them, a [`Pass`](crate::models::pass::Pass) computes them, and `live` makes tokens and text
//! of the answers. Async stays outside: the owner is a plain thread, and every channel and queue is
//! bounded.

pub mod admission;
mod asks;
pub mod backend;
pub mod blocks;
mod core;
pub mod drafts;
pub mod draw;
pub mod guard;
pub mod hot;
mod live;
pub mod memory;
#[cfg(feature = "mistralrs")]
pub mod mistral;
pub mod output;
pub mod plan;
pub mod request;
pub mod scheduler;
pub mod slice;
mod stage;
pub mod stats;
pub mod stop;
pub mod transcript;

use self::core::Core;
use crate::clock::Clock;
use crate::models::Model;
use crate::models::pass::PassFault;
use crate::models::spec::Spec;
use crate::models::text::Text;
use crate::ops::attention::BLOCK_TOKENS;
use crate::ops::dtype::Dtype;
use crate::ops::pool::Pool;
use backend::{Backend, BackendKind, Command, EnginePermit, Submission};
use guard::Watch;
use output::{Fault, Generation};
use parking_lot::Mutex;
use request::{InvalidRequest, Request};
use scheduler::{Owner, Refusal, Scheduler, SchedulerLimits};
use stats::Stats;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};

/// Sizes of one engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Tokens of one sequence.
    pub context_max: usize,
    /// Blocks of the KV cache, which all sequences share.
    pub blocks: usize,
    /// Sequences that run at once.
    pub sequences_max: usize,
    /// Requests that may wait for a place; further ones are refused.
    pub waiting_max: usize,
    /// Rows of a step that only prefills.
    pub step_tokens_max: usize,
    /// Tokens of one sequence that are guessed for a step (`drafts`); 0 for none.
    pub drafts_max: usize,
}

/// Prefill rows that may join a step in which sequences decode.
const MIXED_PREFILL_TOKENS: usize = 128;
/// One part in this many of all places is kept for other owners.
const LEFT_TO_OTHERS: usize = 4;

impl Options {
    /// Sequences that run and wait.
    fn in_flight_max(&self) -> usize {
        self.sequences_max + self.waiting_max
    }

    /// Sequences of one owner that run and wait: nobody can take all places, however many choices
    /// its requests have. Those who are not told apart have them all.
    fn owner_max(&self, owner: Owner) -> usize {
        match owner == Owner::default() {
            true => self.in_flight_max(),
            false => self.in_flight_max() - self.in_flight_max() / LEFT_TO_OTHERS,
        }
    }

    fn limits(&self) -> SchedulerLimits {
        SchedulerLimits {
            step_tokens_max: self.step_tokens_max,
            mixed_tokens_max: self.sequences_max + MIXED_PREFILL_TOKENS.min(self.step_tokens_max),
            sequences_max: self.sequences_max,
            waiting_max: self.in_flight_max(),
            context_max: self.context_max,
            drafts_max: self.drafts_max,
        }
    }
}

/// Why a request was not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SubmitError {
    /// A field is outside its bounds.
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    /// It cannot fit, or not now.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The engine is gone.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// What an engine runs, as plain data.
#[derive(Clone, Debug)]
pub struct Info {
    /// Shape and options of the model.
    pub spec: Arc<Spec>,
    /// Type of weights, matrix inputs and KV cache.
    pub dtype: Dtype,
    /// The backend that runs it.
    pub backend: BackendKind,
}

/// A handle on a running engine.
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

/// A reference to an engine that ends with its last handle.
#[derive(Clone)]
pub struct WeakEngine(Weak<Shared>);

impl WeakEngine {
    /// The engine, while it runs.
    pub fn upgrade(&self) -> Option<Engine> {
        self.0.upgrade().map(Engine)
    }
}

struct Shared {
    commands: SyncSender<Command>,
    text: Arc<Text>,
    info: Info,
    options: Options,
    permits: Arc<Semaphore>,
    owners: Arc<Mutex<HashMap<Owner, usize>>>, // the places that each has
    stats: Arc<Stats>,
    is_dead: Arc<AtomicBool>,
    clock: Clock,
}

/// Why an engine cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The device has no room for its cache, or does not work.
    #[error(transparent)]
    Pass(#[from] PassFault),
    /// The system refuses a thread.
    #[error("no thread for it: {0}")]
    Thread(#[from] io::Error),
}

impl Engine {
    /// Starts the owner thread for `model` on the shared `pool`.
    ///
    /// # Errors
    /// When the system refuses memory or a thread.
    pub fn start(
        model: impl Into<Arc<Model>>,
        pool: Pool,
        options: Options,
        clock: Clock,
    ) -> Result<Self, StartError> {
        Self::start_watched(model, pool, options, clock, Watch::default())
    }

    /// Like [`start`](Self::start); `watch` is told of every stage of the owner's work.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn start_watched(
        model: impl Into<Arc<Model>>,
        pool: Pool,
        options: Options,
        clock: Clock,
        watch: Watch,
    ) -> Result<Self, StartError> {
        let model = model.into();
        let text = Arc::clone(&model.text);
        let backend = BackendKind::Native;
        let info = Info { spec: Arc::clone(&model.spec), dtype: model.dtype, backend };
        let stats = Arc::new(Stats::default());
        let pool = pool.separate();
        let core = Core {
            pass: model.pass(&pool, options.blocks)?,
            scheduler: Scheduler::new(options.limits(), options.blocks),
            model,
            pool,
            stats: Arc::clone(&stats),
            clock: clock.clone(),
            live: HashMap::new(),
            next_id: 0,
            watch,
            panics: 0,
            is_lost: false,
        };
        stats.record_load(core.scheduler.load());
        Ok(Self::over(Box::new(core), (text, info), options, stats, clock)?)
    }

    /// A handle over any backend, which runs on a thread of its own from now on and counts what it
    /// does in `stats`. The handle checks requests against the text, the shape and the sizes that
    /// are given here; the backend must keep to them.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn over(
        backend: Box<dyn Backend>,
        (text, info): (Arc<Text>, Info),
        options: Options,
        stats: Arc<Stats>,
        clock: Clock,
    ) -> io::Result<Self> {
        let in_flight_max = options.in_flight_max();
        let (commands, receiver) = sync_channel(in_flight_max);
        let is_dead = Arc::new(AtomicBool::new(false));
        let alarm = Arc::clone(&is_dead);
        std::thread::Builder::new().name("engine".into()).spawn(move || {
            // Waiters learn of the end by their channels closing; handles by this flag.
            let outcome =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| backend.run(receiver)));
            alarm.store(!matches!(outcome, Ok(true)), Ordering::SeqCst);
        })?;
        let permits = Arc::new(Semaphore::new(in_flight_max));
        let owners = Arc::default();
        let shared =
            Shared { commands, text, info, options, permits, owners, stats, is_dead, clock };
        Ok(Self(Arc::new(shared)))
    }

    /// Checks and queues a request; never waits.
    ///
    /// # Errors
    /// When a field is out of bounds, the request cannot fit, or the queue is full.
    pub fn submit(&self, request: Request) -> Result<Generation, SubmitError> {
        request.validate(self.0.text.vocab)?;
        self.0.info.backend.check(&request)?;
        self.check_size(&request)?;
        let place = self.place(request.owner)?;
        // One event for each token, the prompt's rows, and the end.
        let (sender, events) = mpsc::channel(request.max_tokens + 2);
        let submitted = self.0.clock.elapsed();
        let submission = Submission { request, events: sender, place, submitted };
        let command = Command::Submit(Box::new(submission));
        self.0.commands.try_send(command).map_err(|_| Fault::Stopped)?;
        Ok(Generation { events })
    }

    /// A place among those that run and wait.
    fn place(&self, owner: Owner) -> Result<EnginePermit, Refusal> {
        let Shared { options, permits, owners, .. } = &*self.0;
        let permit = Arc::clone(permits).try_acquire_owned();
        let permit = permit.map_err(|_| Refusal::EngineFull { most: options.in_flight_max() })?;
        let limit = options.owner_max(owner);
        let mut held = owners.lock();
        let count = held.entry(owner).or_default();
        if *count >= limit {
            return Err(Refusal::OwnerFull { most: limit });
        }
        *count += 1;
        Ok(EnginePermit { owner, owners: Arc::clone(owners), _permit: permit })
    }

    fn check_size(&self, request: &Request) -> Result<(), Refusal> {
        if request.prompt.is_empty() {
            return Err(Refusal::Empty);
        }
        let tokens = request.prompt.len() + request.max_tokens.saturating_sub(1);
        let Options { context_max, blocks, .. } = self.0.options;
        if tokens > context_max {
            return Err(Refusal::Context { tokens, limit: context_max });
        }
        let limit = blocks * BLOCK_TOKENS;
        if tokens > limit {
            return Err(Refusal::Memory { tokens, limit });
        }
        Ok(())
    }

    /// A reference that does not keep the engine running.
    pub fn downgrade(&self) -> WeakEngine {
        WeakEngine(Arc::downgrade(&self.0))
    }

    /// What reading and writing text needs of its model.
    pub fn text(&self) -> &Arc<Text> {
        &self.0.text
    }

    /// Shape and type of the model.
    pub fn info(&self) -> &Info {
        &self.0.info
    }

    /// The sizes it was started with.
    pub fn options(&self) -> Options {
        self.0.options
    }

    /// What the engine counts while it runs.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    /// How long sequences have waited for a step to finish; `None` while there is nothing to do.
    pub fn stalled_for(&self) -> Option<Duration> {
        let s = self.0.stats.snapshot();
        let has_work = s.load.running + s.load.waiting > 0;
        let since = s.last_step_at.max(s.busy_since);
        has_work.then(|| self.0.clock.elapsed().saturating_sub(since))
    }

    /// Whether the engine was given up after panics.
    pub fn is_dead(&self) -> bool {
        self.0.is_dead.load(Ordering::SeqCst)
    }
}
