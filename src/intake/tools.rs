//! Finds calls of tools in a model's text, holds them back from the content, and parses them.
//!
//! What looks like a call and cannot be parsed stays content, so nothing a model said is lost.

use crate::entropy::Entropy;
use crate::models::chat::ToolFormat;
use crate::models::tokenizer::TextTokenizer;
use crate::wire::openai::tools::{CalledFunction, ToolCall};
use serde::Deserialize;
use serde_json::Value;

/// Marks of the formats. Some are special tokens, which text leaves out.
const MARKS: [&str; 6] =
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"];
const HERMES_OPEN: &str = "<tool_call>";
const HERMES_CLOSE: &str = "</tool_call>";
const MISTRAL_OPEN: &str = "[TOOL_CALLS]";
const MISTRAL_ARGUMENTS: &str = "[ARGS]";
const MISTRAL_ID: &str = "[CALL_ID]";
const LLAMA_OPEN: &str = "<|python_tag|>";

/// What the text of a choice is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CallStyle {
    /// Content, calls, or both, as the model likes.
    Auto(ToolFormat),
    /// The arguments of this function.
    Named(String),
    /// A JSON list of `{"name": .., "parameters": ..}`.
    Required,
}

/// Content and calls that a piece of text led to.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Parsed {
    /// Text for people.
    pub content: String,
    /// Calls, or parts of calls.
    pub calls: Vec<ToolCall>,
}

/// Splits the text of one choice.
#[derive(Clone, Debug)]
pub struct ToolParser {
    style: CallStyle,
    calls_max: usize,
    held: String,
    is_in_call: bool,
    is_after_call: bool, // Hermes: only blanks have followed a call
    is_content: bool,    // Llama 3: the answer has begun as prose
    calls: usize,
    entropy: Entropy,
}

impl ToolParser {
    /// For a choice of `style` that makes at most `calls_max` calls, named out of `entropy`.
    pub fn new(style: CallStyle, calls_max: usize, entropy: Entropy) -> Self {
        Self {
            style,
            calls_max,
            held: String::new(),
            is_in_call: false,
            is_after_call: false,
            is_content: false,
            calls: 0,
            entropy,
        }
    }

    /// How many calls were found.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Whether the client itself demanded the call of one function.
    pub fn is_named(&self) -> bool {
        matches!(self.style, CallStyle::Named(_))
    }

    /// Takes a token and the text that became visible with it.
    pub fn push(&mut self, tokenizer: &TextTokenizer, token: u32, text: &str) -> Parsed {
        if tokenizer.is_special(token) {
            let name = tokenizer.text_of(token);
            if let Some(mark) = MARKS.into_iter().find(|m| *m == name && !text.contains(m)) {
                return self.push_text(&format!("{mark}{text}"));
            }
        }
        self.push_text(text)
    }

    fn push_text(&mut self, text: &str) -> Parsed {
        match &self.style {
            CallStyle::Named(name) => {
                let name = name.clone();
                self.part(name, text)
            }
            CallStyle::Required => {
                self.held.push_str(text);
                Parsed::default()
            }
            CallStyle::Auto(ToolFormat::Hermes) => {
                self.held.push_str(text);
                self.hermes()
            }
            CallStyle::Auto(ToolFormat::Mistral) => {
                self.held.push_str(text);
                self.mistral()
            }
            CallStyle::Auto(ToolFormat::Llama3) => {
                self.held.push_str(text);
                let begins = self.held.trim_start();
                let may_call = begins.is_empty()
                    || begins.starts_with('{')
                    || LLAMA_OPEN.starts_with(begins)
                    || begins.starts_with(LLAMA_OPEN);
                self.is_content |= !may_call;
                match self.is_content {
                    true => Parsed::content(std::mem::take(&mut self.held)),
                    false => Parsed::default(),
                }
            }
        }
    }

    /// Parses what is still held, at the end of the choice.
    pub fn finish(&mut self) -> Parsed {
        let held = std::mem::take(&mut self.held);
        let found = match &self.style {
            CallStyle::Named(_) => return Parsed::default(),
            CallStyle::Required => required_calls(&held),
            CallStyle::Auto(ToolFormat::Hermes) if self.is_in_call => hermes_call(&held),
            CallStyle::Auto(ToolFormat::Mistral) if self.is_in_call => mistral_calls(&held),
            CallStyle::Auto(ToolFormat::Llama3) => llama_calls(&held),
            CallStyle::Auto(_) => None,
        };
        match found {
            Some(calls) => Parsed { content: String::new(), calls: self.number(calls) },
            None => {
                let open = match &self.style {
                    CallStyle::Auto(ToolFormat::Hermes) if self.is_in_call => HERMES_OPEN,
                    CallStyle::Auto(ToolFormat::Mistral) if self.is_in_call => MISTRAL_OPEN,
                    _ => "",
                };
                Parsed::content(format!("{open}{held}"))
            }
        }
    }

    fn hermes(&mut self) -> Parsed {
        let mut parsed = Parsed::default();
        loop {
            if self.is_after_call {
                // Models put calls on lines of their own.
                let blank = self.held.len() - self.held.trim_start().len();
                self.held.drain(..blank);
                self.is_after_call = self.held.is_empty();
            }
            let mark = if self.is_in_call { HERMES_CLOSE } else { HERMES_OPEN };
            let Some(at) = self.held.find(mark) else { break };
            let before = self.held[..at].to_owned();
            self.held.drain(..at + mark.len());
            if !self.is_in_call {
                parsed.content.push_str(&before);
            } else if let Some(calls) = hermes_call(&before) {
                parsed.calls.extend(self.number(calls));
                self.is_after_call = true;
            } else {
                parsed.content.push_str(&format!("{HERMES_OPEN}{before}{HERMES_CLOSE}"));
            }
            self.is_in_call = !self.is_in_call;
        }
        if !self.is_in_call {
            let shown = self.held.len() - overlap(&self.held, HERMES_OPEN);
            parsed.content.extend(self.held.drain(..shown));
        }
        parsed
    }

    fn mistral(&mut self) -> Parsed {
        if self.is_in_call {
            return Parsed::default();
        }
        if let Some(at) = self.held.find(MISTRAL_OPEN) {
            let content = self.held[..at].to_owned();
            self.held.drain(..at + MISTRAL_OPEN.len());
            self.is_in_call = true;
            return Parsed::content(content);
        }
        let shown = self.held.len() - overlap(&self.held, MISTRAL_OPEN);
        Parsed::content(self.held.drain(..shown).collect())
    }

    /// A part of the one call of a named function.
    fn part(&mut self, name: String, text: &str) -> Parsed {
        let is_first = self.calls == 0;
        if text.is_empty() && !is_first {
            return Parsed::default();
        }
        self.calls = 1;
        let function = CalledFunction { name: is_first.then_some(name), arguments: text.into() };
        let id = is_first.then(|| self.new_id());
        let kind = is_first.then_some("function");
        let call = ToolCall { index: Some(0), id, kind, function };
        Parsed { content: String::new(), calls: vec![call] }
    }

    fn number(&mut self, calls: Vec<CalledFunction>) -> Vec<ToolCall> {
        let room = self.calls_max - self.calls.min(self.calls_max);
        let first = self.calls;
        let numbered = calls.into_iter().take(room).enumerate().map(|(i, function)| ToolCall {
            index: Some(first + i),
            id: Some(self.new_id()),
            kind: Some("function"),
            function,
        });
        let numbered: Vec<ToolCall> = numbered.collect();
        self.calls += numbered.len();
        numbered
    }

    fn new_id(&self) -> String {
        let random = self.entropy.uuid().simple().to_string();
        match self.style {
            // Mistral's templates insist on nine letters or digits.
            CallStyle::Auto(ToolFormat::Mistral) => random[..9].to_owned(),
            _ => format!("call_{}", &random[..24]),
        }
    }
}

impl Parsed {
    fn content(content: String) -> Self {
        Self { content, calls: Vec::new() }
    }
}

/// Parts of a stream as whole calls.
pub fn merge(parts: Vec<ToolCall>) -> Vec<ToolCall> {
    let mut calls: Vec<ToolCall> = Vec::new();
    for mut part in parts {
        let index = part.index.take().unwrap_or(calls.len());
        match calls.get_mut(index) {
            Some(call) => call.function.arguments.push_str(&part.function.arguments),
            None => calls.push(part),
        }
    }
    calls
}

/// Bytes at the end of `text` that may be the beginning of `mark`.
fn overlap(text: &str, mark: &str) -> usize {
    let longest = text.len().min(mark.len() - 1);
    let ends_with = |n: &usize| text.as_bytes().ends_with(&mark.as_bytes()[..*n]);
    (1..=longest).rev().find(ends_with).unwrap_or(0)
}

#[derive(Deserialize)]
struct Call {
    name: String,
    #[serde(alias = "parameters")]
    arguments: Value,
}

impl Call {
    fn function(self) -> CalledFunction {
        let arguments = match self.arguments {
            Value::String(text) => text,
            value => value.to_string(),
        };
        CalledFunction { name: Some(self.name), arguments }
    }
}

fn required_calls(text: &str) -> Option<Vec<CalledFunction>> {
    let calls: Vec<Call> = serde_json::from_str(text).ok()?;
    Some(calls.into_iter().map(Call::function).collect())
}

fn hermes_call(text: &str) -> Option<Vec<CalledFunction>> {
    let call: Call = serde_json::from_str(text).ok()?;
    Some(vec![call.function()])
}

/// One call or several, with semicolons between them.
fn llama_calls(text: &str) -> Option<Vec<CalledFunction>> {
    let mut rest = text.trim_start();
    rest = rest.strip_prefix(LLAMA_OPEN).unwrap_or(rest);
    let mut calls = Vec::new();
    while !rest.trim().is_empty() {
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<Call>();
        calls.push(stream.next()?.ok()?.function());
        rest = rest[stream.byte_offset()..].trim_start().trim_start_matches(';');
    }
    (!calls.is_empty()).then_some(calls)
}

/// A list of calls, or names and arguments with marks between them.
fn mistral_calls(text: &str) -> Option<Vec<CalledFunction>> {
    if text.trim_start().starts_with('[') {
        return required_calls(text);
    }
    let call = |part: &str| {
        let (name, arguments) = part.split_once(MISTRAL_ARGUMENTS)?;
        let name = name.split(MISTRAL_ID).next()?.trim();
        let value: Value = serde_json::from_str(arguments).ok()?;
        Some(CalledFunction { name: Some(name.to_owned()), arguments: value.to_string() })
    };
    text.split(MISTRAL_OPEN).map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Content and (name, arguments) of `text` that comes in pieces of `size` characters.
    fn parse(style: CallStyle, text: &str, size: usize) -> (String, Vec<(String, String)>) {
        let mut parser = ToolParser::new(style, 9, Entropy::seeded(1));
        let (mut content, mut parts) = (String::new(), Vec::new());
        let letters: Vec<char> = text.chars().collect();
        for piece in letters.chunks(size) {
            let parsed = parser.push_text(&piece.iter().collect::<String>());
            content.push_str(&parsed.content);
            parts.extend(parsed.calls);
        }
        let last = parser.finish();
        content.push_str(&last.content);
        parts.extend(last.calls);
        let calls = merge(parts).into_iter();
        (content, calls.map(|c| (c.function.name.unwrap(), c.function.arguments)).collect())
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn every_format_is_understood_however_the_text_is_cut() {
        use ToolFormat::{Hermes, Llama3, Mistral};
        let two = vec![call("f", r#"{"a":1}"#), call("g", "{}")];
        let cases = [
            (
                Hermes,
                "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n\
                </tool_call>\n<tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>",
                "Let me see.\n",
                two.clone(),
            ),
            (Hermes, "a < b and <tool", "a < b and <tool", vec![]),
            (
                Hermes,
                "<tool_call>no json</tool_call> x",
                "<tool_call>no json</tool_call> x",
                vec![],
            ),
            (Hermes, r#"<tool_call>{"name": "f", "arguments": {"a":1}}"#, "", two[..1].to_vec()),
            (Hermes, "<tool_call>{", "<tool_call>{", vec![]),
            (
                Llama3,
                r#" {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}"#,
                "",
                two.clone(),
            ),
            (
                Llama3,
                r#"<|python_tag|>{"name": "f", "parameters": {"a": 1}}"#,
                "",
                two[..1].to_vec(),
            ),
            (Llama3, "no { call }", "no { call }", vec![]),
            (Llama3, "{ broken", "{ broken", vec![]),
            (
                Mistral,
                r#"Sure.[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}},
                {"name": "g", "arguments": {}}]"#,
                "Sure.",
                two.clone(),
            ),
            (
                Mistral,
                r#"[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}"#,
                "",
                two.clone(),
            ),
            (Mistral, "[TOOL_CALLS]f", "[TOOL_CALLS]f", vec![]),
            (Mistral, "[TOOL", "[TOOL", vec![]),
        ];
        for (format, text, content, calls) in cases {
            for size in [1, 2, 3, 7, 1000] {
                let got = parse(CallStyle::Auto(format), text, size);
                assert_eq!(got, (content.to_owned(), calls.clone()), "{text} by {size}");
            }
        }
    }

    #[test]
    fn demanded_calls_are_the_whole_text() {
        let text = r#"[{"name": "f", "parameters": {"a":1}}]"#;
        let one = vec![call("f", r#"{"a":1}"#)];
        assert_eq!(parse(CallStyle::Required, text, 5), (String::new(), one.clone()));
        assert_eq!(parse(CallStyle::Named("f".into()), r#"{"a":1}"#, 2), (String::new(), one));
    }

    #[test]
    fn further_calls_are_left_out_where_only_one_is_wanted() {
        let mut parser = ToolParser::new(CallStyle::Required, 1, Entropy::seeded(1));
        let call = r#"{"name":"f","parameters":{}}"#;
        parser.push_text(&format!("[{call},{call}]"));
        assert_eq!(parser.finish().calls.len(), 1);
    }

    proptest! {
        #[test]
        fn text_without_calls_comes_back_whole(
            text in "(<tool|_call>|\\[TOOL|_CALLS|a|<|\\{|é){0,12}", size in 1..9_usize,
        ) {
            for format in [ToolFormat::Hermes, ToolFormat::Llama3, ToolFormat::Mistral] {
                let (content, calls) = parse(CallStyle::Auto(format), &text, size);
                prop_assert_eq!(&content, &text);
                prop_assert!(calls.is_empty());
            }
        }
    }
}
