//! Examines model files without loading weights: configuration, memory, tokenizer and chat
//! template.

use super::{Finding, Level, kept};
use crate::clock::Clock;
use crate::config::models_toml::ModelConfig;
use crate::engine::plan::{Bytes, MemoryPlan};
use crate::models::chat::ChatTemplate;
use crate::models::checkpoint::Checkpoint;
use crate::models::config;
use crate::models::device::names;
use crate::models::hub::Hub;
use crate::models::panics::contained;
use crate::models::spec::Spec;
use crate::models::tokenizer::TextTokenizer;
use serde_json::{Map, Value, json};
use std::path::Path;

const DOWNLOAD_ADVICE: &str = "is this the directory of a whole checkpoint, or a GGUF file?";
const PLAN_ADVICE: &str =
    "lower `context_max` or `sequences_max`, or choose another `device`: `targon-engine plan`";

/// What a model of a shape needs and whether its device has it, or why it cannot be served.
pub type Planning<'a> = dyn FnMut(&ModelConfig, &Spec) -> anyhow::Result<MemoryPlan> + 'a;

/// Looks at all models; `plan` keeps account of the memory that the models before one need. The Hub
/// is asked unless `is_offline`.
pub async fn examine_all(
    models: &[ModelConfig],
    (hub, is_offline): (Option<&Hub>, bool),
    plan: &mut Planning<'_>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for model in models {
        match kept::locate(model, hub, is_offline).await {
            Ok((path, seen)) => {
                findings.extend(seen);
                findings.extend(examine(model, &path, plan));
            }
            Err(finding) => findings.push(finding),
        }
    }
    findings
}

/// Looks at one model, whose checkpoint directory or GGUF file is `path`.
pub fn examine(model: &ModelConfig, path: &Path, plan: &mut Planning<'_>) -> Vec<Finding> {
    let topic = format!("model {}", model.name);
    match contained("reading its files", || look(&topic, (model, path), plan)) {
        Ok(findings) => findings,
        Err(e) => vec![Finding::new(topic, Level::Fault, e.to_string()).hint(DOWNLOAD_ADVICE)],
    }
}

fn look(
    topic: &str,
    (model, path): (&ModelConfig, &Path),
    plan: &mut Planning<'_>,
) -> Vec<Finding> {
    let fault = |why: String, hint: &str| Finding::new(topic, Level::Fault, why).hint(hint);
    let checkpoint = match Checkpoint::open(path) {
        Ok(checkpoint) => checkpoint,
        Err(e) => return vec![fault(e.to_string(), DOWNLOAD_ADVICE)],
    };
    let mut findings = Vec::new();
    let devices = names(model.devices.iter().map(|device| device.resolved()));
    let spec = config::parse(&checkpoint.config_path, &checkpoint.config);
    match spec.map_err(anyhow::Error::from).and_then(|spec| plan(model, &spec)) {
        Ok(plan) => {
            let fact = format!(
                "{} of memory on {} for {} sequences of {} tokens",
                Bytes(plan.total()),
                devices,
                plan.options.sequences_max,
                plan.options.context_max
            );
            findings.push(Finding::new(topic, Level::Ok, fact));
        }
        Err(why) => {
            let fact = format!("cannot be served on {devices}: {why}");
            findings.push(fault(fact, PLAN_ADVICE));
        }
    }
    match TextTokenizer::load(&checkpoint) {
        Ok(tokenizer) => {
            let fact = format!("tokenizer of {} tokens", tokenizer.len());
            findings.push(Finding::new(topic, Level::Ok, fact));
            findings.push(template(topic, &checkpoint, &tokenizer));
        }
        Err(e) => findings.push(fault(e.to_string(), DOWNLOAD_ADVICE)),
    }
    findings
}

/// Renders a small conversation.
fn template(topic: &str, checkpoint: &Checkpoint, tokenizer: &TextTokenizer) -> Finding {
    let template = match ChatTemplate::load(checkpoint, tokenizer) {
        Ok(Some(template)) => template,
        Ok(None) => {
            let fact = "no chat template: only the completions endpoint serves it";
            return Finding::new(topic, Level::Warning, fact)
                .hint("Targon's validators ask both endpoints");
        }
        Err(e) => {
            return Finding::new(topic, Level::Fault, e.to_string()).hint(DOWNLOAD_ADVICE);
        }
    };
    let message = |role: &str| json!({"role": role, "content": "Hello"});
    let mut variables: Map<String, Value> = Map::new();
    variables.insert("messages".into(), json!([message("system"), message("user")]));
    variables.insert("add_generation_prompt".into(), true.into());
    match template.render(variables, Clock::system().unix_ms()) {
        Ok(text) => {
            let ids = tokenizer.encode(&text, false).map_or(0, |ids| ids.len());
            let fact = format!("chat template renders two messages to {ids} tokens");
            Finding::new(topic, Level::Ok, fact)
        }
        Err(e) => {
            let fact = format!("the chat template takes no system message: {e}");
            Finding::new(topic, Level::Warning, fact)
                .hint("Targon's validators send one; such requests are refused")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::models_toml;

    #[tokio::test]
    async fn a_path_with_nothing_is_one_fault() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("models.toml");
        std::fs::write(&file, "[[model]]\nname = \"m\"\npath = \"none\"\n").unwrap();
        let config = models_toml::read(&file, &[]).unwrap();
        let mut plan = |_: &ModelConfig, _: &Spec| unreachable!("there is no shape");
        let findings = examine_all(&config.models, (None, true), &mut plan).await;
        assert!(findings.len() == 1 && findings[0].level == Level::Fault, "{findings:?}");
        assert_eq!(findings[0].topic, "model m");
        assert!(findings[0].hint.is_some(), "{findings:?}");
    }
}
