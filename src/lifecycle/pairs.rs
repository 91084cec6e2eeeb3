//! Takes samples from captured honest answers: checks them at every row under no limits, and sorts
//! what was found by miner.

use super::verifiers::{VerifierError, VerifierRules, Verifiers};
use crate::proof::codec::Hash;
use crate::verify::calibrate::HonestSample;
use crate::verify::capture::{Capture, CheckedChoice};
use crate::verify::captures::{CapturedLine, Captures, CapturesError, Place};
use crate::verify::question::QuestionError;
use crate::verify::scrutiny::{TwinPolicy, WantedScrutiny};
use crate::verify::{Depth, Limits, Profile, Rejection};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What verifiers must check with, so that samples show all that honest answers do.
pub const MEASURING: VerifierRules = VerifierRules {
    limits: Some(Limits::NONE),
    exact: false,
    scrutiny: WantedScrutiny { twin: Some(TwinPolicy::Always), ..WantedScrutiny::NOTHING },
};

/// Why captured answers are not samples. Answers that are not honest are none of these: they are
/// left out.
#[derive(Debug, thiserror::Error)]
pub enum PairsError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] CapturesError),
    /// A line holds no captured answer.
    #[error("{place}: {why}")]
    Line {
        /// File and line of the capture.
        place: Place,
        /// What is wrong with it.
        why: Rejection,
    },
    /// There is no verifier for what was asked.
    #[error(transparent)]
    Verifier(#[from] VerifierError),
    /// A request cannot be read.
    #[error("{place}: {why}")]
    Question {
        /// File and line of the capture whose request it is.
        place: Place,
        /// The field, with rule and fact.
        why: QuestionError,
    },
    /// Answers of two models.
    #[error("{place}: limits belong to one model, this is a second one")]
    SecondModel {
        /// The first line of the second model.
        place: Place,
    },
    /// Not one answer was asked of a model that is wanted.
    #[error("{files} hold no answer{}", of_model(.model))]
    Empty {
        /// The files of captures that were read.
        files: String,
        /// The model, where only one counts.
        model: Option<String>,
    },
}

fn of_model(model: &Option<String>) -> String {
    model.as_ref().map_or_else(String::new, |model| format!(" of the model `{model}`"))
}

/// The names of files, for errors.
pub fn names(files: &[PathBuf]) -> String {
    let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}

impl PairsError {
    /// What mends it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::SecondModel { .. } => Some("choose one with --model"),
            Self::Verifier(e) => e.hint(),
            _ => None,
        }
    }
}

/// Which captures count.
#[derive(Clone, Copy, Debug)]
pub struct WantedPairs<'a> {
    /// Only those of this model, where it is named; those that name none count always.
    pub model: Option<&'a str>,
    /// Of each miner, so many of the first answers that can be used.
    pub answers_max: usize,
}

/// Captured answers, checked at every row.
#[derive(Debug, Default)]
pub struct CheckedPairs {
    /// Of each miner, in the order of captures; those without a name are of one.
    pub samples: BTreeMap<Option<String>, Vec<HonestSample>>,
    /// Hash of their model.
    pub model: Hash,
    /// Choices that could not be used; the log says why.
    pub left_out: usize,
}

/// Checks the captures of all files by `verifiers`, which check with [`MEASURING`]. This blocks the
/// thread.
///
/// # Errors
/// The first line that cannot be checked, or that no line is of a model that is wanted.
pub async fn check_pairs(
    files: &[PathBuf],
    verifiers: &mut Verifiers,
    wanted: WantedPairs<'_>,
) -> Result<CheckedPairs, PairsError> {
    let (mut pairs, mut model) = (CheckedPairs::default(), None);
    for path in files {
        for line in Captures::open(path)? {
            let CapturedLine { place, capture } = line?;
            let capture = match capture {
                Ok(capture) => capture,
                Err(why) => return Err(PairsError::Line { place, why }),
            };
            if !wanted.has(&capture) {
                continue;
            }
            let verifier = verifiers.of(&capture).await?;
            let hash = verifier.identity.portable_hash();
            if *model.get_or_insert(hash) != hash {
                return Err(PairsError::SecondModel { place });
            }
            let miner = capture.miner().map(str::to_owned);
            if pairs.samples.entry(miner.clone()).or_default().len() >= wanted.answers_max {
                continue;
            }
            let question = match verifiers.question(&verifier, &capture).await {
                Ok(question) => question,
                Err(why) => return Err(PairsError::Question { place, why }),
            };
            // Every row of the proof that was asked for; nothing is left to chance.
            let verification = verifier.verify(Profile::Proof, 0).depth(Depth::Slow);
            let checked = verification.capture(question, &capture);
            pairs.add(&place, miner, checked, wanted.answers_max);
        }
    }
    let empty =
        || PairsError::Empty { files: names(files), model: wanted.model.map(str::to_owned) };
    let model = model.ok_or_else(empty)?;
    Ok(CheckedPairs { model, ..pairs })
}

impl WantedPairs<'_> {
    fn has(&self, capture: &Capture) -> bool {
        let named = self.model.zip(capture.model());
        named.is_none_or(|(wanted, asked)| wanted == asked)
    }
}

impl CheckedPairs {
    /// Sorts in what was found of the choices of one capture.
    fn add(
        &mut self,
        place: &Place,
        miner: Option<String>,
        checked: Vec<CheckedChoice>,
        answers_max: usize,
    ) {
        let of_miner = self.samples.entry(miner).or_default();
        for checked in checked {
            let choice = checked.choice;
            match HonestSample::of_checked(checked) {
                Ok(sample) if of_miner.len() < answers_max => of_miner.push(sample),
                Ok(_) => {}
                Err(why) => {
                    self.left_out += 1;
                    tracing::warn!(
                        "{place} choice {choice} is not an honest answer to take limits from: {why}"
                    );
                }
            }
        }
    }
}
