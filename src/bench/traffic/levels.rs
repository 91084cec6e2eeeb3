//! Puts a server under one level of load after another, into a report.

use super::drive::{Load, LoadStop, drive};
use super::heard::Transport;
use super::questions::{LoadShape, Questions};
use super::tally::{self, Promise};
use super::vllm;
use crate::bench::conditions::{Conditions, Mark, MarkKind, Moment};
use crate::bench::report::schema::BenchReport;
use crate::clock::Clock;
use anyhow::bail;
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;

/// How a server is loaded.
pub struct LoadSetup {
    /// What errors call the server.
    pub place: String,
    /// The levels, in order.
    pub loads: Vec<Load>,
    /// Requests of each level.
    pub requests: u64,
    /// What a request must keep to count as good.
    pub promise: Promise,
    /// Threads that the client has.
    pub threads: usize,
    /// The server runs on this machine, and is meant to use it.
    pub is_here: bool,
}

/// Takes the report as it is after a level, and that level as vLLM's result file.
pub type KeepLevel<'a> = dyn FnMut(&BenchReport, &Map<String, Value>) -> anyhow::Result<()> + 'a;

/// Who follows a measurement.
pub struct LoadWatch<'a> {
    /// Whether it should go on.
    pub is_wanted: &'a (dyn Fn() -> bool + Sync),
    /// Keeps each level.
    pub keep: &'a mut KeepLevel<'a>,
}

/// A server, what it is asked, and how it is loaded.
pub struct LevelsRun<'a> {
    /// The server.
    pub server: &'a Arc<dyn Transport>,
    /// The requests.
    pub questions: &'a Questions,
    /// Levels and conditions.
    pub setup: &'a LoadSetup,
}

impl LevelsRun<'_> {
    /// Measures the server into `report`; what is there stays, whatever happens later.
    ///
    /// # Errors
    /// When the server fails too often in a row, or a level cannot be kept.
    pub async fn run(
        &self,
        report: &mut BenchReport,
        watch: &mut LoadWatch<'_>,
    ) -> anyhow::Result<()> {
        let (clock, root) = (Clock::system(), Path::new("/"));
        let before = Moment::now(root, &clock);
        let outcome = self.levels(report, watch).await;
        let conditions = Conditions { before, after: Moment::now(root, &clock) };
        report.seconds = conditions.after.elapsed - conditions.before.elapsed;
        let is_own = |mark: &Mark| mark.kind == MarkKind::Busy && self.setup.is_here;
        report.marks.extend(conditions.marks().into_iter().filter(|mark| !is_own(mark)));
        report.conditions = Some(conditions);
        outcome
    }

    async fn levels(
        &self,
        report: &mut BenchReport,
        watch: &mut LoadWatch<'_>,
    ) -> anyhow::Result<()> {
        let Self { server, questions, setup } = *self;
        let is_long = questions.shape == LoadShape::Fixed && questions.ignores_eos;
        let length = is_long.then_some(u64::from(questions.tokens));
        for (load, number) in setup.loads.iter().zip(0..) {
            // Request 0 is the first one, which is not measured.
            let first = 1 + number * setup.requests;
            let asked = (first..first + setup.requests).map(|i| questions.ask(i));
            let seed = questions.seed ^ first;
            let driven = drive(server, asked, *load, (seed, setup.threads), watch.is_wanted).await;
            let level = tally::level(&driven, *load, setup.promise, &questions.model);
            report.marks.extend(tally::marks(&level, driven.stop, length, questions.is_repeated));
            let file = vllm::file(&level, &driven);
            report.levels.push(level);
            (watch.keep)(report, &file)?;
            match driven.stop {
                Some(LoadStop::Unwanted) => return Ok(()),
                Some(LoadStop::ServerFailed) => {
                    bail!("{} failed too often in a row and was given up", setup.place)
                }
                None => {}
            }
        }
        report.is_partial = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::facts::{Machine, ModelFacts};
    use crate::bench::report::schema::ReportKind;
    use crate::bench::traffic::heard::{Answering, Chunk, Heard, LoadRequest};

    /// Answers at once; the model `broken` never.
    struct Server;

    impl Transport for Server {
        fn ask(&self, asked: LoadRequest) -> Answering {
            let failure = (asked.body["model"] == "broken").then(|| "status 500".to_owned());
            let chunks = vec![Chunk { at: 0.001, has_choice: true, has_text: true }];
            let heard = Heard { chunks, ended: 0.002, failure, ..Heard::default() };
            Box::pin(std::future::ready(heard))
        }
    }

    /// The report of two levels of 20 requests each, and the files that were kept.
    async fn measured(model: &str) -> (anyhow::Result<()>, BenchReport, usize) {
        let questions = Questions {
            shape: LoadShape::Fixed,
            model: model.into(),
            is_completion: false,
            words: 9,
            tokens: 8,
            ignores_eos: false,
            is_repeated: false,
            seed: 1,
            date: "2026-01-31".into(),
        };
        let setup = LoadSetup {
            place: "http://server".into(),
            loads: vec![Load::Concurrency(1), Load::Rate(1e4)],
            requests: 20,
            promise: Promise { first_token: 1.0, per_token: 1.0 },
            threads: 1,
            is_here: true,
        };
        let facts =
            ModelFacts { name: model.into(), weights_root: None, dtype: None, weights_bytes: None };
        let machine = Machine::this(Path::new("/nowhere"));
        let mut report = BenchReport::new(ReportKind::Serve, 0, machine, facts);
        let mut files = 0;
        let mut keep = |report: &BenchReport, file: &Map<String, Value>| {
            files += 1;
            assert_eq!(report.levels.len(), files);
            assert_eq!(
                file["errors"].as_array().map(Vec::len),
                Some(report.levels[files - 1].sent)
            );
            Ok(())
        };
        let mut watch = LoadWatch { is_wanted: &|| true, keep: &mut keep };
        let server: Arc<dyn Transport> = Arc::new(Server);
        let run = LevelsRun { server: &server, questions: &questions, setup: &setup };
        let outcome = run.run(&mut report, &mut watch).await;
        (outcome, report, files)
    }

    #[tokio::test]
    async fn levels_follow_each_other_until_the_server_fails() {
        let (outcome, report, files) = measured("m").await;
        outcome.unwrap();
        assert!(!report.is_partial && report.conditions.is_some());
        let all: Vec<_> = report.levels.iter().map(|l| (l.completed, l.concurrency)).collect();
        assert_eq!((all, files), (vec![(20, Some(1)), (20, None)], 2));

        let (outcome, report, files) = measured("broken").await;
        assert!(outcome.unwrap_err().to_string().contains("http://server failed too often"));
        assert!(report.is_partial && files == 1 && report.levels[0].completed == 0);
    }
}
