//! Checks the form of reported alternatives: their number and their names. Rows show whether they
//! are true.

use super::{Mirror, Told};
use crate::engine::output::Step;
use crate::intake::Endpoint;
use crate::verify::answer::{Top, id_of_name};
use crate::verify::compare::is_empty;
use crate::verify::structure::LOGPROB_MAX;
use crate::verify::{Reason, Rejection};
use serde_json::Value;

impl Mirror<'_> {
    /// The form of the alternatives: as many as were asked for, and named as they must be.
    pub(super) fn check_tops(&self, index: usize, told: &Told) -> Result<(), Rejection> {
        let report = &self.question.understood.report;
        let Some(count) = report.logprobs else { return Ok(()) };
        let ids = &self.question.requests()[index].logprob_ids;
        let count = if ids.is_empty() { count.min(self.model.vocab) } else { ids.len() };
        let is_chat = self.endpoint() == Endpoint::Chat;
        let own = |step: &Step| (!is_chat).then_some((step.token, step.logprob));
        let output = told.steps.iter().zip(&told.tops).map(|(step, top)| (own(step), top));
        let prompt = &self.question.requests()[index].prompt;
        let echoed = told.prompt.iter().filter(|r| r.ranks.is_empty());
        let echoed = echoed.filter_map(|r| {
            Some((Some((*prompt.get(r.place + 1)?, r.logprob.unwrap_or_default())), &r.top))
        });
        for (place, (own, top)) in echoed.chain(output).enumerate() {
            if !self.is_list(own, top, count) {
                let got = top.len();
                let what = format!("token {place} must have {count} alternatives, each a token");
                return Err(Rejection::new(Reason::LogprobMismatch, format!("{what}, got {got}")));
            }
        }
        Ok(())
    }

    /// Whether `top` has the form of `count` alternatives. In completions the token itself, `own`,
    /// stands among them, and of names that are texts some are equal.
    fn is_list(&self, own: Option<(u32, f64)>, top: &[Top], count: usize) -> bool {
        let as_ids = self.question.understood.report.tokens_as_ids;
        let is_complete = match own {
            None => top.len() == count && are_distinct(as_ids, top),
            Some(_) if top.is_empty() => count == 0,
            Some((token, logprob)) => {
                let least = if as_ids { count.max(1) } else { 1 };
                let is_own = |t: &Top| t.logprob == logprob && self.is_named(t, token);
                (least..=count + 1).contains(&top.len()) && top.iter().any(is_own)
            }
        };
        is_complete && top.iter().all(|top| self.is_top(top))
    }

    fn is_named(&self, top: &Top, token: u32) -> bool {
        match self.question.understood.report.tokens_as_ids {
            true => top.name == format!("token_id:{token}"),
            false => top.name == self.model.tokenizer.text_of(token),
        }
    }

    /// Whether an alternative has the form of one.
    fn is_top(&self, top: &Top) -> bool {
        let is_logprob = top.logprob.is_finite() && top.logprob <= LOGPROB_MAX;
        let bytes = top.bytes.as_deref();
        let is_named = match self.question.understood.report.tokens_as_ids {
            true => id_of_name(&top.name).is_some_and(|id| {
                let is_known = (id as usize) < self.model.vocab;
                let own = self.model.tokenizer.bytes_of(id);
                // Of a part of a character other servers write what they make of it.
                let are_fine = |b: &[u8]| b == own || std::str::from_utf8(own).is_err();
                is_known && self.is_named(top, id) && bytes.is_none_or(are_fine)
            }),
            false => bytes.is_none_or(|b| top.name == String::from_utf8_lossy(b)),
        };
        is_logprob && is_named
    }

    /// The form of the prompt's log-probabilities, where they were asked for.
    pub(super) fn check_prompt_logprobs(
        &self,
        index: usize,
        sent: &Value,
    ) -> Result<(), Rejection> {
        let wrong = |what: String| Err(Rejection::new(Reason::LogprobMismatch, what));
        let Some(count) = self.question.understood.report.prompt_logprobs else {
            return match is_empty(sent) {
                true => Ok(()),
                false => wrong("prompt_logprobs were not asked for".into()),
            };
        };
        let prompt = self.question.prompts.of(index);
        let list = sent.as_array().map(Vec::as_slice).unwrap_or_default();
        if list.len() != prompt.len() || !list[0].is_null() {
            let (want, got) = (prompt.len(), list.len());
            return wrong(format!(
                "prompt_logprobs must have {want} places, null first, got {got}"
            ));
        }
        let count = count.min(self.model.vocab);
        for (place, (token, sent)) in prompt.iter().zip(list).enumerate().skip(1) {
            let own = token.to_string();
            let is_place = sent.as_object().is_some_and(|map| {
                let is_complete = (count.max(1)..=count + 1).contains(&map.len());
                let is_right = map.iter().all(|(id, entry)| self.is_prompt_entry(id, entry));
                is_complete && map.contains_key(&own) && is_right
            });
            if !is_place {
                return wrong(format!(
                    "prompt_logprobs of token {place} are not {count} and its own"
                ));
            }
        }
        Ok(())
    }

    fn is_prompt_entry(&self, id: &str, entry: &Value) -> bool {
        let vocab = self.model.vocab;
        let known = id.parse::<u32>().ok().filter(|n| (*n as usize) < vocab);
        let Some(number) = known.filter(|n| n.to_string() == id) else { return false };
        let text = self.model.tokenizer.text_of(number);
        let is_known = |key: &String| ["logprob", "rank", "decoded_token"].contains(&key.as_str());
        entry.as_object().is_some_and(|map| map.keys().all(is_known))
            && entry["decoded_token"] == text
            && entry["rank"].as_u64().is_some_and(|r| r >= 1 && r <= vocab as u64)
            && entry["logprob"].as_f64().is_some_and(|l| l.is_finite() && l <= LOGPROB_MAX)
    }
}

/// Names that are ids are those of one token each.
fn are_distinct(as_ids: bool, top: &[Top]) -> bool {
    !as_ids || (1..top.len()).all(|i| top[..i].iter().all(|other| other.name != top[i].name))
}
