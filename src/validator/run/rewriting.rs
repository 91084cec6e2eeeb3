//! Rewrites passages into queries by this validator's own engine (protocol 5.3).

use super::resident::Resident;
use crate::chance::Chance;
use crate::clock::Clock;
use crate::validator::prompt::{Draft, read_query};
use crate::verify::question::understand;
use anyhow::{Context, anyhow};
use serde_json::Value;
use std::time::Duration;

/// How long it may take; what is not written by then is not used.
const TIME: Duration = Duration::from_secs(45);

/// Whether passages are rewritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rewriting {
    /// Never: prompts are about the passages as they are.
    Never,
    /// Where the engine writes a query; else the passage is taken, with a warning.
    OrPassage,
    /// Always: a round whose query is not written has no prompt, and is unscored.
    Always,
}

/// The query of a draft, or nothing where the passage is to be taken as it is.
///
/// # Errors
/// Why it is not written, where it must be.
pub async fn query(
    how: Rewriting,
    resident: &Resident,
    (model, draft): (&str, &Draft),
    chance: &mut Chance,
) -> anyhow::Result<Option<String>> {
    let mut body = match how {
        Rewriting::Never => return Ok(None),
        Rewriting::OrPassage | Rewriting::Always => draft.rewriting(model, chance),
    };
    if resident.verifier.model.text.chat.is_none() {
        // A model without a template goes on with a text.
        let words = |place: usize| body["messages"][place]["content"].as_str().unwrap_or_default();
        let text = format!("{}\n\n{}\n\nSearch query:", words(0), words(1));
        body["prompt"] = text.into();
        if let Some(fields) = body.as_object_mut() {
            fields.remove("messages");
        }
    }
    let writing = tokio::time::timeout(TIME, write(resident, body));
    let late = || Err(anyhow!("the engine has not written a query within {TIME:?}"));
    match (writing.await.unwrap_or_else(|_| late()), how) {
        (Ok(query), _) => Ok(Some(query)),
        (Err(why), Rewriting::Always) => Err(anyhow!("the passage is not rewritten: {why}")),
        (Err(why), _) => {
            tracing::warn!(model, "the passage is used without rewriting: {why}");
            Ok(None)
        }
    }
}

async fn write(resident: &Resident, body: Value) -> anyhow::Result<String> {
    let engine = resident.engine.as_ref().context("no engine runs beside the verifier")?;
    let mut requests =
        understand(&resident.verifier, &body, Clock::system().unix_ms()).await?.requests;
    let request = requests.pop().context("the request has no prompt")?;
    let written = engine.submit(request)?.collect().await?;
    read_query(&written.text())
}
