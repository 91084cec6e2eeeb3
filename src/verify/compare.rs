//! Compares a received response with the one that an honest server writes, field by field.
//!
//! A field may be missing only if honest servers leave it out. A field that no honest server writes
//! must be empty, whatever its name.

use super::structure::LOGPROB_MAX;
use super::{Reason, Rejection};
use serde_json::{Map, Value};

/// Characters of a value that are repeated in a rejection.
const SHOWN_MAX: usize = 60;
/// Characters of names that servers choose as they like.
const NAME_CHARS_MAX: usize = 256;

/// How what was written is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Compare<'a> {
    /// The answer has the form of this engine's own: nothing may be missing or differ.
    pub(super) is_own: bool,
    /// The prompt's log-probabilities may be there, and are checked elsewhere.
    pub(super) has_prompt_rows: bool,
    /// Ids of the prompt, which may be repeated.
    pub(super) prompt: &'a [u32],
    /// The end token that the answer ends with, which other servers name as the reason.
    pub(super) end: Option<u32>,
}

/// How one field is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rule {
    Equal,
    /// It is text, and any text will do.
    Name,
    /// Numbers where numbers were written, and null where null was; rows say which.
    Logprobs,
    /// It was compared elsewhere.
    Elsewhere,
    /// Arguments of a call: JSON of the same value.
    Json,
    /// The bytes of a token. Of a part of a character other servers write what they make of it.
    Bytes,
    /// Where texts begin. Other servers count from where a chunk begins, and what they hold back.
    Offsets,
    /// Null, or the end token's id where other servers name it.
    StopReason,
}

/// A field: what is wrong where it differs, whether it may be missing, how it is compared.
struct Field {
    reason: Reason,
    is_optional: bool,
    rule: Rule,
}

/// Where a value stands.
#[derive(Clone, Copy)]
struct Place<'a> {
    name: &'a str,
    /// What is wrong with everything below it.
    reason: Option<Reason>,
    is_call: bool,
}

fn field(key: &str, place: Place<'_>) -> Field {
    let of = |reason, is_optional, rule| Field { reason, is_optional, rule };
    let field = match key {
        "id" if place.is_call => of(Reason::TextMismatch, false, Rule::Name),
        "type" | "index" if place.is_call => of(Reason::TextMismatch, true, Rule::Equal),
        "arguments" => of(Reason::TextMismatch, false, Rule::Json),
        "message" | "delta" | "content" | "text" | "tool_calls" | "function" | "name"
        | "reasoning" | "reasoning_content" | "refusal" => {
            of(Reason::TextMismatch, false, Rule::Equal)
        }
        "role" => of(Reason::BadStream, true, Rule::Equal),
        "finish_reason" => of(Reason::EarlyEnd, false, Rule::Equal),
        "stop_reason" => of(Reason::EarlyEnd, true, Rule::StopReason),
        "token_ids" | "prompt_token_ids" => of(Reason::BadIds, true, Rule::Equal),
        "powv" => of(Reason::BadPowv, true, Rule::Equal),
        "proof" | "proof_end" => of(Reason::BadProof, true, Rule::Equal),
        "logprobs" => of(Reason::LogprobMismatch, false, Rule::Equal),
        "logprob" | "token_logprobs" => of(Reason::LogprobMismatch, false, Rule::Logprobs),
        "top_logprobs" => of(Reason::LogprobMismatch, true, Rule::Elsewhere),
        "bytes" => of(Reason::LogprobMismatch, true, Rule::Bytes),
        "text_offset" => of(Reason::LogprobMismatch, true, Rule::Offsets),
        _ => of(Reason::BadStream, false, Rule::Equal),
    };
    Field { reason: place.reason.unwrap_or(field.reason), ..field }
}

impl Compare<'_> {
    /// Compares a choice, or a part of one.
    ///
    /// # Errors
    /// The first field that differs.
    pub(super) fn choice(&self, name: &str, want: &Value, sent: &Value) -> Result<(), Rejection> {
        let place = Place { name, reason: None, is_call: false };
        self.equal(place, Reason::BadStream, want, sent)
    }

    fn equal(
        &self,
        place: Place<'_>,
        reason: Reason,
        want: &Value,
        sent: &Value,
    ) -> Result<(), Rejection> {
        match (want, sent) {
            (want, sent) if is_empty(want) && is_empty(sent) => Ok(()),
            (Value::Object(want), Value::Object(sent)) => self.objects(place, want, sent),
            (Value::Array(want), Value::Array(sent)) if want.len() == sent.len() => {
                let pairs = want.iter().zip(sent);
                pairs.into_iter().try_for_each(|(w, s)| self.equal(place, reason, w, s))
            }
            (Value::String(want), Value::String(sent)) if want != sent => {
                let at = want.chars().zip(sent.chars()).take_while(|(a, b)| a == b).count();
                let what = format!("{} is another text, from character {at} on", place.name);
                Err(Rejection::new(reason, what))
            }
            (want, sent) if want == sent => Ok(()),
            (want, sent) => Err(differs(place.name, reason, want, sent)),
        }
    }

    fn objects(
        &self,
        place: Place<'_>,
        want: &Map<String, Value>,
        sent: &Map<String, Value>,
    ) -> Result<(), Rejection> {
        for (key, value) in sent.iter().filter(|(key, _)| !want.contains_key(*key)) {
            self.unwritten(place, key, value)?;
        }
        for (key, want) in want {
            let name = format!("{}.{key}", place.name);
            let field = field(key, place);
            let sent = sent.get(key).unwrap_or(&Value::Null);
            let may_miss = field.is_optional && !self.is_own;
            match (field.rule, is_empty(sent)) {
                (_, true) if may_miss || is_empty(want) => {}
                (_, true) if !want.is_object() => {
                    let lack = if sent.is_null() { "missing" } else { "empty" };
                    let what = format!("{name} is {lack}, it must be {}", short(want));
                    return Err(Rejection::new(field.reason, what));
                }
                (rule, _) => {
                    // What is missing of an object is its fields.
                    let nothing = Value::Object(Map::new());
                    let sent = if sent.is_null() { &nothing } else { sent };
                    let is_below = matches!(key.as_str(), "logprobs" | "proof" | "proof_end");
                    let below = Place {
                        name: &name,
                        reason: place.reason.or(is_below.then_some(field.reason)),
                        is_call: key == "tool_calls",
                    };
                    self.by_rule(rule, below, field.reason, want, sent)?;
                }
            }
        }
        Ok(())
    }

    /// A field that the writer does not write.
    fn unwritten(&self, place: Place<'_>, key: &str, value: &Value) -> Result<(), Rejection> {
        let is_prompt = key == "prompt_token_ids" && *value == Value::from(self.prompt);
        let is_elsewhere = key == "prompt_logprobs" && self.has_prompt_rows;
        if is_empty(value) || is_prompt || is_elsewhere {
            return Ok(());
        }
        let key: String = key.chars().take(NAME_CHARS_MAX).collect();
        let what = format!("{} has {key:?}, which no honest answer has here", place.name);
        Err(Rejection::new(field(&key, place).reason, what))
    }

    fn is_end(&self, sent: &Value) -> bool {
        self.end.is_some_and(|end| *sent == end)
    }

    fn by_rule(
        &self,
        rule: Rule,
        place: Place<'_>,
        reason: Reason,
        want: &Value,
        sent: &Value,
    ) -> Result<(), Rejection> {
        let is_fine = match rule {
            Rule::Equal => return self.equal(place, reason, want, sent),
            Rule::Bytes | Rule::Offsets | Rule::StopReason if self.is_own => want == sent,
            Rule::Bytes => want == sent || (!is_text(want) && bytes(sent).is_some()),
            Rule::Offsets => are_offsets(want, sent),
            Rule::StopReason => want == sent || (is_empty(want) && self.is_end(sent)),
            Rule::Elsewhere => true,
            Rule::Name => is_name(sent),
            Rule::Logprobs => are_logprobs(want, sent),
            Rule::Json if self.is_own => want == sent,
            Rule::Json => want == sent || parsed(want).is_some_and(|w| Some(w) == parsed(sent)),
        };
        if is_fine { Ok(()) } else { Err(differs(place.name, reason, want, sent)) }
    }
}

/// A list of bytes.
fn bytes(value: &Value) -> Option<Vec<u8>> {
    let byte = |value: &Value| u8::try_from(value.as_u64()?).ok();
    value.as_array()?.iter().map(byte).collect()
}

/// Whether bytes are whole characters.
fn is_text(value: &Value) -> bool {
    bytes(value).is_some_and(|bytes| std::str::from_utf8(&bytes).is_ok())
}

fn are_offsets(want: &Value, sent: &Value) -> bool {
    let numbers = |value: &Value| value.as_array().map(|l| (l.len(), l.iter().all(Value::is_u64)));
    matches!((numbers(want), numbers(sent)), (Some((a, _)), Some((b, true))) if a == b)
}

fn differs(name: &str, reason: Reason, want: &Value, sent: &Value) -> Rejection {
    let what = format!("{name} must be {}, got {}", short(want), short(sent));
    Rejection::new(reason, what)
}

/// Whether a value says nothing.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(is_empty),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Whether a value is a name that a server may choose.
pub(super) fn is_name(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.len() <= NAME_CHARS_MAX)
}

/// A value as a rejection repeats it.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_MAX) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

fn are_logprobs(want: &Value, sent: &Value) -> bool {
    match (want, sent) {
        (Value::Array(want), Value::Array(sent)) => {
            want.len() == sent.len() && want.iter().zip(sent).all(|(w, s)| are_logprobs(w, s))
        }
        (Value::Null, sent) => sent.is_null(),
        (_, sent) => sent.as_f64().is_some_and(|l| l.is_finite() && l <= LOGPROB_MAX),
    }
}

fn parsed(text: &Value) -> Option<Value> {
    serde_json::from_str(text.as_str()?).ok()
}

/// Chunks of one choice as one: texts and lists add up, everything else is said once.
///
/// # Errors
/// A field that is said twice, differently.
pub(super) fn merge<'a>(parts: impl Iterator<Item = &'a Value>) -> Result<Value, Rejection> {
    let mut whole = Map::new();
    for part in parts {
        if let Some(part) = part.as_object() {
            fold(&mut whole, part)?;
        }
    }
    Ok(Value::Object(whole))
}

fn fold(whole: &mut Map<String, Value>, part: &Map<String, Value>) -> Result<(), Rejection> {
    for (key, value) in part.iter().filter(|(_, value)| !is_empty(value)) {
        match (key.as_str(), whole.get_mut(key), value) {
            // Each belongs to its token, and is checked there.
            ("powv", _, Value::Number(_)) => {}
            ("tool_calls", old, Value::Array(parts)) => {
                let mut calls = old.map(Value::take).unwrap_or_else(|| Value::Array(Vec::new()));
                calls.as_array_mut().map_or(Ok(()), |calls| fold_calls(calls, parts))?;
                whole.insert(key.clone(), calls);
            }
            ("proof", None, Value::Object(_)) => {
                whole.insert(key.clone(), Value::Array(vec![value.clone()]));
            }
            ("proof", Some(Value::Array(all)), Value::Object(_)) => all.push(value.clone()),
            ("content" | "text" | "arguments", Some(Value::String(all)), Value::String(more)) => {
                all.push_str(more);
            }
            (_, None, Value::Object(part)) => {
                let mut object = Map::new();
                fold(&mut object, part)?;
                whole.insert(key.clone(), object.into());
            }
            (_, None, value) => drop(whole.insert(key.clone(), value.clone())),
            (_, Some(Value::Array(all)), Value::Array(more)) => all.extend(more.iter().cloned()),
            (_, Some(Value::Object(all)), Value::Object(more)) => fold(all, more)?,
            (_, Some(old), value) if old == value => {}
            (_, Some(old), value) => {
                let place = Place { name: "", reason: None, is_call: false };
                let what = format!("{key:?} is said twice: {} and {}", short(old), short(value));
                return Err(Rejection::new(field(key, place).reason, what));
            }
        }
    }
    Ok(())
}

/// Parts of calls belong to the call of their number.
fn fold_calls(calls: &mut Vec<Value>, parts: &[Value]) -> Result<(), Rejection> {
    for part in parts {
        let index = part["index"].as_u64().and_then(|i| usize::try_from(i).ok());
        let known = calls.len();
        match (index.filter(|i| *i <= known), part.as_object()) {
            (Some(index), Some(part)) => {
                if index == known {
                    calls.push(Value::Object(Map::new()));
                }
                if let Some(call) = calls[index].as_object_mut() {
                    fold(call, part)?;
                }
            }
            _ => {
                let what = format!("a part of a call belongs to none: {}", short(part));
                return Err(Rejection::new(Reason::TextMismatch, what));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compare(is_own: bool, want: Value, sent: Value) -> Option<Reason> {
        let compare = Compare { is_own, has_prompt_rows: false, prompt: &[1, 2], end: Some(9) };
        compare.choice("choice 0", &want, &sent).err().map(|r| r.reason)
    }

    #[test]
    fn what_was_not_written_must_be_empty() {
        let want = json!({"index": 0, "text": "a", "finish_reason": null});
        let with = |key: &str, value: Value| {
            let mut sent = want.clone();
            sent[key] = value;
            compare(false, want.clone(), sent)
        };
        for empty in [json!(null), json!(""), json!([]), json!({})] {
            assert_eq!(with("other", empty), None);
        }
        assert_eq!(with("other", json!(false)), Some(Reason::BadStream));
        assert_eq!(with("reasoning_content", json!("x")), Some(Reason::TextMismatch));
        assert_eq!(with("prompt_token_ids", json!([1, 2])), None);
        assert_eq!(with("prompt_token_ids", json!([1, 3])), Some(Reason::BadIds));
        assert_eq!(with("finish_reason", json!("stop")), Some(Reason::EarlyEnd));
        assert_eq!(with("text", json!(7)), Some(Reason::TextMismatch));
    }

    #[test]
    fn what_is_empty_is_not_called_missing() {
        let compare = Compare { is_own: false, has_prompt_rows: false, prompt: &[], end: None };
        let want = json!({"index": 0, "text": "a"});
        for (sent, lack) in
            [(json!({"index": 0}), "missing"), (json!({"index": 0, "text": ""}), "empty")]
        {
            let rejection = compare.choice("choice 0", &want, &sent).unwrap_err();
            assert_eq!(rejection.what, format!("choice 0.text is {lack}, it must be \"a\""));
        }
    }

    #[test]
    fn only_what_honest_servers_leave_out_may_be_missing() {
        let want = json!({"index": 0, "text": "a", "powv": 5, "token_ids": [1]});
        assert_eq!(compare(false, want.clone(), json!({"index": 0, "text": "a"})), None);
        let own = compare(true, want.clone(), json!({"index": 0, "text": "a", "powv": 5}));
        assert_eq!(own, Some(Reason::BadIds));
        assert_eq!(compare(false, want, json!({"index": 0})), Some(Reason::TextMismatch));
    }

    #[test]
    fn other_servers_describe_tokens_and_ends_in_their_own_way() {
        let replaced = json!([239, 191, 189]); // U+FFFD
        for (key, want, sent, own, other) in [
            ("bytes", json!([240, 159]), replaced.clone(), false, true),
            ("bytes", json!([240, 159]), json!([]), false, true),
            ("bytes", json!([240, 159]), json!([300]), false, false),
            ("bytes", json!([97]), replaced, false, false),
            // What is not own may be left out.
            ("bytes", json!([97]), json!([]), false, true),
            ("text_offset", json!([3, 5]), json!([3, 14]), false, true),
            ("text_offset", json!([3, 5]), json!([3]), false, false),
            ("text_offset", json!([3, 5]), json!([3, -1]), false, false),
            ("stop_reason", json!(null), json!(9), false, true),
            ("stop_reason", json!(null), json!(8), false, false),
            ("stop_reason", json!("x"), json!("y"), false, false),
            ("stop_reason", json!("x"), json!("x"), true, true),
        ] {
            for (is_own, fine) in [(true, own), (false, other)] {
                let (want, sent) = (json!({key: want}), json!({key: sent}));
                let found = compare(is_own, want.clone(), sent.clone());
                assert_eq!(found.is_none(), fine, "{is_own} {want} {sent}");
            }
        }
    }

    #[test]
    fn parts_add_up_and_do_not_contradict() {
        let parts = [
            json!({"index": 0, "delta": {"role": "assistant", "content": ""}}),
            json!({"index": 0, "delta": {"content": "a", "tool_calls": [
                {"index": 0, "id": "x", "function": {"name": "f", "arguments": "{"}}]}}),
            json!({"index": 0, "delta": {"content": "b", "tool_calls": [
                {"index": 0, "function": {"arguments": "}"}}]}, "finish_reason": "stop"}),
        ];
        let want = json!({"index": 0, "delta": {"role": "assistant", "content": "ab", "tool_calls":
            [{"index": 0, "id": "x", "function": {"name": "f", "arguments": "{}"}}]},
            "finish_reason": "stop"});
        assert_eq!(merge(parts.iter()).unwrap(), want);
        let twice = [json!({"finish_reason": "stop"}), json!({"finish_reason": "length"})];
        assert_eq!(merge(twice.iter()).unwrap_err().reason, Reason::EarlyEnd);
        let stray = [json!({"delta": {"tool_calls": [{"index": 7, "id": "x"}]}})];
        assert_eq!(merge(stray.iter()).unwrap_err().reason, Reason::TextMismatch);
    }
}
