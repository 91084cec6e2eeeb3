//! Defines the error of a command, and whether the user or the program caused it. The exit code
//! follows from that.

use crate::doctor::{Finding, Level};
use crate::lifecycle::watch::describe_failures;
use crate::server::registry::Registry;
use std::fmt;

/// A failure of a command.
#[derive(Debug)]
pub struct Failure {
    pub(super) message: String,
    pub(super) hint: Option<String>,
    pub(super) is_ours: bool,
}

impl Failure {
    /// Something the user can mend.
    pub(super) fn user(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), hint: None, is_ours: false }
    }

    /// A failure of this program: exit code 2.
    pub(super) fn ours(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), hint: None, is_ours: true }
    }

    /// Models that cannot be served: ours where a new start may do, as after an outage of the Hub.
    pub(super) fn of_models(registry: &Registry) -> Self {
        let is_ours = registry.entries().iter().any(|entry| entry.may_pass);
        Self { is_ours, ..Self::user(describe_failures(registry)) }
    }

    /// The message without hint and exit code.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// What `doctor` says of a part that could not be looked at; `advice` where there is no hint.
    pub(super) fn fault(self, topic: &str, advice: &str) -> Finding {
        let hint = self.hint.unwrap_or_else(|| advice.into());
        Finding::new(topic, Level::Fault, self.message).hint(hint)
    }

    pub(super) fn with_hint(self, hint: Option<impl Into<String>>) -> Self {
        Self { hint: hint.map(Into::into), ..self }
    }
}
