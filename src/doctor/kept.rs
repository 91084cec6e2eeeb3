//! Finds a model's files on this machine, and compares them with the Hub. Nothing is downloaded.

use super::{Finding, Level};
use crate::config::models_toml::{ModelConfig, ModelSource};
use crate::models::hub::{Hub, WantedFiles};
use std::path::PathBuf;

/// The path of a model's files with what is to be said of them, or why they are not here.
pub(super) async fn locate(
    model: &ModelConfig,
    hub: Option<&Hub>,
    is_offline: bool,
) -> Result<(PathBuf, Option<Finding>), Finding> {
    let topic = format!("model {}", model.name);
    let (repo, revision, file) = match &model.source {
        ModelSource::Path(path) => return Ok((path.clone(), None)),
        ModelSource::Hub { repo, revision, file } => (repo, revision, file.as_deref()),
    };
    let Some(hub) = hub else {
        let fact = format!("{repo} was not looked for: the Hub cannot be used");
        return Err(Finding::new(topic, Level::Fault, fact).hint("see the finding of the Hub"));
    };
    let now = match is_offline {
        true => None,
        false => Some(hub.commit(repo, revision).await),
    };
    let kept = hub.kept(repo, revision, file.map_or(WantedFiles::Checkpoint, WantedFiles::File));
    let finding = match (&kept, now) {
        (Ok(_), Some(Err(e))) => {
            let fact = format!("the Hub cannot be asked: {e}");
            let hint = "the kept files are served; see the finding of the Hub";
            Some(Finding::new(&topic, Level::Warning, fact).hint(hint))
        }
        (Ok(kept), Some(Ok(commit))) if kept.commit != commit => {
            let fact = format!("kept at {}, but {revision} is {commit} now", kept.commit);
            let hint = "the next start downloads it; a fixed `revision` keeps this one";
            Some(Finding::new(&topic, Level::Note, fact).hint(hint))
        }
        (Ok(_), _) => None,
        (Err(_), Some(Ok(commit))) => {
            let fact = format!("{repo} at {commit} is on the Hub and not kept here yet");
            return Err(Finding::new(topic, Level::Note, fact).hint(format!(
                "targon-engine fetch {repo}; before that, `targon-engine plan` says whether it \
                     fits"
            )));
        }
        (Err(why), None) => {
            let hint = format!("with a network: targon-engine fetch {repo}");
            return Err(Finding::new(topic, Level::Fault, why.to_string()).hint(hint));
        }
        (Err(_), Some(Err(e))) => {
            let hint =
                "check the repository's name and `revision`, HF_TOKEN, and the Hub's finding";
            return Err(Finding::new(topic, Level::Fault, e.to_string()).hint(hint));
        }
    };
    let directory = kept.map(|kept| kept.directory).unwrap_or_default();
    Ok((file.map_or(directory.clone(), |file| directory.join(file)), finding))
}
