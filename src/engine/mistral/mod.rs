//! Runs the requests of one model on mistral.rs, behind the same commands and events as the native
//! engine.
//!
//! mistral.rs computes rows and schedules them; everything that is said about a row is ours
//! (`tap`). The model is loaded from a [derived checkpoint](crate::models::tapped) whose logits end
//! in the final-norm row.
//!
//! The engine's thread lets requests in one by one: mistral.rs never holds more sequences, nor
//! longer ones, than the memory plan has room for. Its own cache of prefixes is off: it does not
//! tell owners apart.

mod load;
mod state;
mod tap;

pub use load::{LoadedMistral, MistralSettings, VERSION};

use super::backend::{Backend, BackendKind, Command, Submission};
use super::guard::{Stage, Watch};
use super::live::Live;
use super::output::Event;
use super::stats::Stats;
use super::{Engine, Info, Options};
use crate::clock::Clock;
use crate::models::Model;
use crate::ops::lanes::Isa;
use mistralrs::core::MistralRs;
use mistralrs::{Constraint, NormalRequest, Request, RequestMessage, Response, SamplingParams};
use parking_lot::Mutex;
use state::{Held, Shared};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;
use tap::Tap;
use tokio::sync::mpsc;

/// How soon a place that has become free is given away while somebody waits for it.
const ADMIT_EVERY: Duration = Duration::from_millis(5);
/// How often running requests are looked at while nobody waits.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Messages of mistral.rs about one sequence that are not yet read: one a step, and an error.
const RESPONSES_MAX: usize = 4;

/// Starts an engine over a model that mistral.rs has loaded. `model` describes it; its weights are
/// not used.
///
/// # Errors
/// When the system refuses a thread.
pub fn start(
    loaded: LoadedMistral,
    model: Arc<Model>,
    options: Options,
    clock: Clock,
) -> io::Result<Engine> {
    let (text, spec) = (Arc::clone(&model.text), Arc::clone(&model.spec));
    let info = Info { spec, dtype: model.dtype, backend: BackendKind::Mistralrs };
    let stats = Arc::new(Stats::default());
    let LoadedMistral { runner, tapped } = loaded;
    let shared = Arc::new(Shared {
        tapped,
        model,
        options,
        stats: Arc::clone(&stats),
        clock: clock.clone(),
        isa: Isa::best(),
        queue: Mutex::default(),
    });
    shared.record_load();
    let backend = Box::new(MistralBackend { runner, shared, next_id: 1 });
    Engine::over(backend, (text, info), options, stats, clock)
}

/// The engine's thread: takes commands, and lets in those who wait.
struct MistralBackend {
    runner: Arc<MistralRs>,
    shared: Arc<Shared>,
    next_id: usize,
}

impl Backend for MistralBackend {
    /// False when mistral.rs dropped one request after the other.
    fn run(mut self: Box<Self>, commands: Receiver<Command>) -> bool {
        loop {
            let received = match self.look_again() {
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(wait) => commands.recv_timeout(wait),
            };
            match received {
                Ok(Command::Submit(submission)) => self.take(*submission),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.admit();
            if self.shared.is_given_up() {
                return false;
            }
        }
        // No handle is left; what runs goes on to its end.
        while let Some(wait) = self.look_again() {
            std::thread::sleep(wait);
            self.admit();
        }
        true
    }
}

impl MistralBackend {
    /// After what time there may be something to do; `None` where only a command brings it.
    fn look_again(&self) -> Option<Duration> {
        match (self.shared.is_idle(), self.shared.has_waiting()) {
            (true, _) => None,
            (false, true) => Some(ADMIT_EVERY),
            (false, false) => Some(LOOK_EVERY),
        }
    }

    fn take(&self, submission: Submission) {
        let Submission { request, events, place, submitted } = submission;
        let Shared { model, stats, clock, .. } = &*self.shared;
        let failing = events.clone();
        let live = || Ok(Live::new(request, &model.text, events, place, submitted));
        match Watch::default().guard(Stage::Take, live) {
            Ok(live) => {
                if self.shared.is_idle() {
                    stats.record_wake(clock.elapsed());
                }
                self.shared.push(live);
            }
            Err(fault) => {
                stats.record_fault();
                // A request whose receiver is gone need not be told.
                let _ = failing.try_send(Event::Fault(fault));
            }
        }
    }

    /// Starts as many of those who wait as have room.
    fn admit(&mut self) {
        while let Some((live, held)) = self.shared.pop() {
            self.begin(live, held);
        }
        self.shared.record_load();
    }

    /// Hands a request to mistral.rs.
    fn begin(&mut self, mut live: Live, held: Held) {
        live.timeline.schedule(self.shared.clock.elapsed());
        let (response, responses) = mpsc::channel::<Response>(RESPONSES_MAX);
        let prompt = live.request.prompt.clone();
        let tap = Tap::new(Arc::clone(&self.shared), held, live, responses);
        self.next_id += 1;
        let request = NormalRequest {
            messages: RequestMessage::CompletionTokens(prompt),
            // The tap draws, and ends the sequence; the sampler takes the one token that is left.
            sampling_params: SamplingParams::neutral(),
            response,
            return_logprobs: false,
            is_streaming: true,
            id: self.next_id,
            constraint: Constraint::None,
            suffix: None,
            tools: None,
            tool_choice: None,
            logits_processors: Some(vec![Arc::new(tap)]),
            return_raw_logits: false,
            web_search_options: None,
            model_id: None,
            truncate_sequence: false,
        };
        // Where it cannot be sent it is dropped, and its tap says so to who asked.
        match self.runner.get_sender(None) {
            Ok(sender) => drop(sender.try_send(Request::Normal(Box::new(request)))),
            Err(why) => tracing::error!("mistral.rs takes no request: {why}"),
        }
    }
}
