//! Examines model files without loading weights: configuration, memory, tokenizer and chat
//! template.

use super::{Finding, Level};
use crate::engine::plan::{Bytes, MemoryPlan};
use crate::models::chat::ChatTemplate;
use crate::models::checkpoint::Checkpoint;
use crate::models::config;
use crate::models::device::Device;
use crate::models::panics::contained;
use crate::models::spec::Spec;
use crate::models::tokenizer::TextTokenizer;
use serde_json::{Map, Value, json};
use std::path::Path;

const DOWNLOAD_ADVICE: &str = "is this the directory of a whole checkpoint, or a GGUF file?";
const PLAN_ADVICE: &str =
    "lower `context_max` or `sequences_max`, or choose another `device`: `targon-engine plan`";

/// What a model of a shape needs and whether its device has it, or why it cannot be served.
pub type Planning<'a> = dyn FnMut(&Spec) -> anyhow::Result<MemoryPlan> + 'a;

/// Where a model's files are.
pub struct Files<'a> {
    /// What requests call it.
    pub name: &'a str,
    /// A checkpoint directory or a GGUF file.
    pub path: &'a Path,
    /// The device that is to compute it.
    pub device: Device,
}

/// Looks at one model; `plan` keeps account of the memory that the models before it need.
pub fn examine(files: &Files<'_>, plan: &mut Planning<'_>) -> Vec<Finding> {
    let topic = format!("model {}", files.name);
    match contained("reading its files", || look(&topic, files, plan)) {
        Ok(findings) => findings,
        Err(e) => vec![Finding::new(topic, Level::Fault, e.to_string()).hint(DOWNLOAD_ADVICE)],
    }
}

fn look(topic: &str, files: &Files<'_>, plan: &mut Planning<'_>) -> Vec<Finding> {
    let fault = |why: String, hint: &str| Finding::new(topic, Level::Fault, why).hint(hint);
    let checkpoint = match Checkpoint::open(files.path) {
        Ok(checkpoint) => checkpoint,
        Err(e) => return vec![fault(e.to_string(), DOWNLOAD_ADVICE)],
    };
    let mut findings = Vec::new();
    let spec = config::parse(&checkpoint.config_path, &checkpoint.config);
    match spec.map_err(anyhow::Error::from).and_then(|spec| plan(&spec)) {
        Ok(plan) => {
            let fact = format!(
                "{} of memory on {} for {} sequences of {} tokens",
                Bytes(plan.total()),
                files.device.resolved(),
                plan.options.sequences_max,
                plan.options.context_max
            );
            findings.push(Finding::new(topic, Level::Ok, fact));
        }
        Err(why) => {
            let fact = format!("cannot be served on {}: {why}", files.device.resolved());
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
    match template.render(variables) {
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

    #[test]
    fn a_path_with_nothing_is_one_fault() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none");
        let files = Files { name: "m", path: &path, device: Device::Cpu };
        let findings = examine(&files, &mut |_| unreachable!("there is no shape"));
        assert!(findings.len() == 1 && findings[0].level == Level::Fault, "{findings:?}");
        assert_eq!(findings[0].topic, "model m");
        assert!(findings[0].hint.is_some(), "{findings:?}");
    }
}
