//! Examines model files without loading weights: configuration, memory, tokenizer and chat
//! template.

use super::{Finding, Level};
use crate::engine::plan::{Bytes, MemoryPlan, MemoryWanted};
use crate::models::chat::ChatTemplate;
use crate::models::checkpoint::Checkpoint;
use crate::models::config;
use crate::models::panics::contained;
use crate::models::tokenizer::TextTokenizer;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Where a model's files are.
pub struct Files<'a> {
    /// What requests call it.
    pub name: &'a str,
    /// A checkpoint directory or a GGUF file.
    pub path: &'a Path,
    /// The sizes that its entry asks for.
    pub wanted: MemoryWanted,
}

/// Looks at one model; `available` bytes of memory are left, and become less by what it needs.
pub fn examine(files: &Files<'_>, available: &mut u64) -> Vec<Finding> {
    let topic = format!("model {}", files.name);
    match contained("reading its files", || look(&topic, files, *available)) {
        Ok((needed, findings)) => {
            *available = available.saturating_sub(needed);
            findings
        }
        Err(e) => vec![Finding::new(topic, Level::Fault, e.to_string())],
    }
}

fn look(topic: &str, files: &Files<'_>, available: u64) -> (u64, Vec<Finding>) {
    let fault = |why: String| Finding::new(topic, Level::Fault, why);
    let checkpoint = match Checkpoint::open(files.path) {
        Ok(checkpoint) => checkpoint,
        Err(e) => return (0, vec![fault(e.to_string())]),
    };
    let mut findings = Vec::new();
    let mut needed = 0;
    let spec = config::parse(&checkpoint.config_path, &checkpoint.config);
    let plan = spec.map_err(|e| e.to_string()).and_then(|spec| {
        MemoryPlan::new(&spec, files.wanted, available).map_err(|e| e.to_string())
    });
    match plan {
        Ok(plan) => {
            needed = plan.total();
            let fact = format!(
                "{} of memory for {} sequences of {} tokens",
                Bytes(needed),
                plan.options.sequences_max,
                plan.options.context_max
            );
            findings.push(Finding::new(topic, Level::Ok, fact));
        }
        Err(why) => findings.push(fault(why)),
    }
    match TextTokenizer::load(&checkpoint) {
        Ok(tokenizer) => {
            let fact = format!("tokenizer of {} tokens", tokenizer.len());
            findings.push(Finding::new(topic, Level::Ok, fact));
            findings.push(template(topic, &checkpoint, &tokenizer));
        }
        Err(e) => findings.push(fault(e.to_string())),
    }
    (needed, findings)
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
        Err(e) => return Finding::new(topic, Level::Fault, e.to_string()),
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
    use crate::engine::plan::KvMemory;

    #[test]
    fn a_path_with_nothing_is_one_fault() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = MemoryWanted {
            context_max: None,
            kv_memory: KvMemory::Auto,
            sequences_max: 1,
            drafts_max: 0,
        };
        let path = dir.path().join("none");
        let mut available = 1 << 30;
        let files = Files { name: "m", path: &path, wanted };
        let findings = examine(&files, &mut available);
        assert!(findings.len() == 1 && findings[0].level == Level::Fault, "{findings:?}");
        assert_eq!(findings[0].topic, "model m");
        assert_eq!(available, 1 << 30);
    }
}
