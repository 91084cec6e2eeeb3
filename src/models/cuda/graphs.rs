//! Records the launches of decode steps: a step that is launched as an earlier one was is one
//! graph.
//!
//! A graph holds every argument and address of its launches. So it stands for a step exactly when
//! the step's launches are equal to them, which is compared each time; what changes from token to
//! token (ids, positions, block tables, keys) lies in memory that the launches read.

use super::error::CudaError;
use super::launch::{Graph, Launch, Stream};

/// Kinds of steps that are remembered; the one that was not needed for longest goes first.
const KINDS_MAX: usize = 32;

/// What was launched before.
#[derive(Default)]
pub(super) struct Graphs {
    known: Vec<Known>, // most recently used last
    has_warned: bool,
}

struct Known {
    launches: Vec<Launch>,
    graph: Option<Graph>,
}

impl Graphs {
    /// Puts launches on the stream; from the second time on as a graph. A capture that fails costs
    /// the step nothing but time: its launches run without one, and the next step tries again.
    pub(super) fn run(&mut self, stream: &Stream, launches: Vec<Launch>) -> Result<(), CudaError> {
        let Some(at) = self.known.iter().position(|known| known.launches == launches) else {
            stream.run(&launches)?;
            if self.known.len() == KINDS_MAX {
                self.known.remove(0);
            }
            self.known.push(Known { launches, graph: None });
            return Ok(());
        };
        let mut known = self.known.remove(at);
        let graph = match &mut known.graph {
            Some(graph) => graph,
            none => match stream.capture(&launches) {
                Ok(graph) => none.insert(graph),
                Err(why) if why.is_of_capture() => {
                    self.warn(&why);
                    self.known.push(known);
                    return stream.run(&launches);
                }
                Err(why) => return Err(why),
            },
        };
        let outcome = graph.launch();
        self.known.push(known);
        outcome
    }

    fn warn(&mut self, why: &CudaError) {
        if !std::mem::replace(&mut self.has_warned, true) {
            tracing::warn!("a step was launched without a graph: {why}");
        }
    }
}
