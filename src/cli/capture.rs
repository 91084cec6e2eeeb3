//! Opens files of captured answers, and loads the models that check them. `verify` and `calibrate`
//! read such files.

use super::Failure;
use super::progress::Bars;
use super::shared::ModelsArg;
use super::shared::runtime;
use crate::config::models_toml::ModelConfig;
use crate::lifecycle::load;
use crate::models::Identity;
use crate::ops::pool::Pool;
use crate::verify::capture::check_capture;
pub(super) use crate::verify::capture::{Capture, CheckOptions, CheckedChoice};
use crate::verify::scrutiny::WantedScrutiny;
use crate::verify::{Limits, Reason, Rejection, Verifier};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::runtime::Runtime;

/// Bytes of a line: more than `query` keeps of an answer, however it is escaped.
const LINE_BYTES_MAX: usize = 256 << 20;

/// A file of captured answers.
pub(super) struct Captures {
    path: PathBuf,
    file: BufReader<File>,
    number: usize,
}

/// A line, and what was captured in it or why that cannot be read.
pub(super) type Line = (String, Result<Capture, Rejection>);

impl Captures {
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        let file = File::open(path)
            .map_err(|e| Failure::user(format!("{} cannot be read: {e}", path.display())))?;
        Ok(Self { path: path.to_owned(), file: BufReader::new(file), number: 0 })
    }

    /// Every answer with the place it stands at; each line is read when its turn comes. A line that
    /// is none says so, and the next one is read.
    pub(super) fn iter(&mut self) -> impl Iterator<Item = Result<Line, Failure>> {
        std::iter::from_fn(|| self.line().transpose())
    }

    fn line(&mut self) -> Result<Option<Line>, Failure> {
        loop {
            let line = self.read().map_err(|e| {
                Failure::user(format!("{} cannot be read: {e}", self.path.display()))
            })?;
            let Some(line) = line else { return Ok(None) };
            self.number += 1;
            let place = format!("{}:{}", self.path.display(), self.number);
            match line {
                Some(line) if line.trim_ascii().is_empty() => {}
                Some(line) => return Ok(Some((place, Capture::parse(&line)))),
                None => {
                    let what = format!("a line has at most {LINE_BYTES_MAX} bytes, this has more");
                    let rejection = Rejection::new(Reason::BadStream, what);
                    return Ok(Some((place, Err(rejection))));
                }
            }
        }
    }

    /// The next line, if there is one; nothing of it where it is too long.
    fn read(&mut self) -> std::io::Result<Option<Option<Vec<u8>>>> {
        let mut line = Vec::new();
        let limit = LINE_BYTES_MAX as u64 + 1;
        if self.file.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        if line.len() <= LINE_BYTES_MAX || line.ends_with(b"\n") {
            return Ok(Some(Some(line)));
        }
        loop {
            line.clear();
            let read = self.file.by_ref().take(limit).read_until(b'\n', &mut line)?;
            if read == 0 || line.ends_with(b"\n") {
                return Ok(Some(None));
            }
        }
    }
}

/// Loads each model once, when it is first needed.
pub(super) struct Verifiers {
    path: PathBuf,
    models: Vec<ModelConfig>,
    pool: Pool,
    rules: (Limits, WantedScrutiny),
    runtime: Runtime,
    loaded: HashMap<String, Verifier>,
}

impl Verifiers {
    /// With limits, and how closely suspicious answers are looked at.
    pub(super) fn new(
        models: &ModelsArg,
        pool: Pool,
        rules: (Limits, WantedScrutiny),
    ) -> Result<Self, Failure> {
        let (path, models) = (models.path.clone(), models.read(&[])?.models);
        Ok(Self { path, models, pool, rules, runtime: runtime()?, loaded: HashMap::new() })
    }

    /// Checks every choice of a capture from `place`.
    pub(super) fn check(
        &self,
        verifier: &Verifier,
        place: &str,
        capture: &Capture,
        options: CheckOptions,
    ) -> Result<Vec<CheckedChoice>, Failure> {
        let only = self.models.first().map_or("", |model| model.name.as_str());
        let name = capture.model().unwrap_or(only);
        let checked = self.runtime.block_on(check_capture(verifier, name, capture, options));
        checked.map_err(|what| Failure::user(format!("{place}: {what}")))
    }

    /// The verifier of the model that was asked.
    pub(super) fn of(&mut self, capture: &Capture) -> Result<Verifier, Failure> {
        let asked = capture.model();
        let config = match (asked, self.models.as_slice()) {
            (Some(name), models) => models.iter().find(|m| m.name == name),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        let config = config.cloned().ok_or_else(|| {
            let what = format!("{} has no model `{}`", self.path.display(), asked.unwrap_or(""));
            Failure::user(what).with_hint(Some("add a [[model]] entry of that name"))
        })?;
        if let Some(verifier) = self.loaded.get(&config.name) {
            return Ok(verifier.clone());
        }
        let name = config.name.clone();
        let verifier = load_verifier(&self.runtime, config, &self.pool, self.rules)?;
        self.loaded.insert(name, verifier.clone());
        Ok(verifier)
    }
}

/// Loads a model to verify with.
pub(super) fn load_verifier(
    runtime: &Runtime,
    config: ModelConfig,
    pool: &Pool,
    (limits, asked): (Limits, WantedScrutiny),
) -> Result<Verifier, Failure> {
    let name = config.name.clone();
    let refuse = |why: anyhow::Error| Failure::user(format!("{name} cannot be loaded: {why}"));
    let bars = Bars::new();
    let located = runtime.block_on(load::locate(config, &bars)).map_err(refuse)?;
    let plan = load::plan(&located, &mut load::Left::default()).map_err(refuse)?;
    let model = located.load_model(pool, |_, _| {}).map_err(|e| refuse(e.into()))?;
    let scrutiny = asked.on(&model).map_err(|e| refuse(e.into()))?;
    let identity = Identity::of(&model, pool).map_err(|e| refuse(e.into()))?;
    Ok(Verifier {
        model: Arc::new(model),
        identity: Arc::new(identity),
        pool: pool.separate(),
        limits,
        scrutiny,
        context_max: plan.options.context_max,
    })
}
