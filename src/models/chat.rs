//! Renders chat templates: Jinja by minijinja, with the helpers that published templates expect.
//!
//! A template is untrusted twice: the publisher wrote it and the client fills it. So rendering has
//! a limit on its steps, on the size of its result, and on what it makes on the way (`bounds.rs`).
//! `python.rs` and `dumps.rs` implement what
//! Python does differently from minijinja, and `source.rs` translates syntax that only Jinja2 has.

mod bounds;
mod dumps;
mod python;
mod source;

use super::checkpoint::Checkpoint;
use super::error::LoadError;
use super::tokenizer::TextTokenizer;
use super::tokenizer_config::TokenizerConfig;
use bounds::TEXT_BYTES_MAX;
use minijinja::{Environment, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::path::Path;

/// Instructions a rendering may take.
const FUEL_MAX: u64 = 5_000_000;
/// Bytes of a template.
const SOURCE_BYTES_MAX: usize = 256 << 10;
/// The stack to compile and render on. Expressions and values nest as deeply as source and fuel
/// allow, and minijinja drops both by recursion. Only what is touched takes memory.
const STACK_BYTES: usize = 512 << 20;
const NAME: &str = "chat_template";
/// The function that prints the time at which a request was read.
const STRFTIME: &str = "strftime_now";
/// How a template names the role `developer`, where it knows it.
const DEVELOPER: [&str; 2] = ["'developer'", "\"developer\""];

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    tool_format: Option<ToolFormat>,
    knows_developer: bool,
    bos_token: String,
    eos_token: String,
}

/// How a family of models writes calls of tools.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ToolFormat {
    /// `<tool_call>{"name": .., "arguments": ..}</tool_call>`: Hermes, Qwen.
    Hermes,
    /// `{"name": .., "parameters": ..}` as the whole answer: Llama 3.
    Llama3,
    /// `[TOOL_CALLS][{"name": .., "arguments": ..}]` or `[TOOL_CALLS]name[ARGS]{..}`: Mistral.
    Mistral,
}

impl ToolFormat {
    /// The format that a template's source speaks of; `None` when it knows no tools.
    fn of(source: &str) -> Option<Self> {
        if !source.contains("tools") {
            return None;
        }
        let marks = [
            ("[TOOL_CALLS]", Self::Mistral),
            ("<tool_call>", Self::Hermes),
            ("python_tag", Self::Llama3),
            ("\"parameters\":", Self::Llama3),
        ];
        marks.into_iter().find(|(mark, _)| source.contains(mark)).map(|(_, format)| format)
    }
}

/// Why a conversation cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template itself refused the conversation.
    #[error("the chat template refused the conversation (line {line}): {message}")]
    Raised {
        /// Line of the template.
        line: usize,
        /// The text that the template gave to `raise_exception`.
        message: String,
    },
    /// The template failed.
    #[error("the chat template failed (line {line}): {message}")]
    Failed {
        /// Line of the template.
        line: usize,
        /// What minijinja says.
        message: String,
    },
}

impl ChatTemplate {
    /// The template of a checkpoint; `None` when it has none.
    ///
    /// # Errors
    /// When a file is malformed or the template does not compile.
    pub fn load(
        checkpoint: &Checkpoint,
        tokenizer: &TextTokenizer,
    ) -> Result<Option<Self>, LoadError> {
        if let Some(gguf) = &checkpoint.gguf {
            let token = |key: &str| {
                let id = gguf.integer(&format!("tokenizer.ggml.{key}")).unwrap_or(u64::MAX);
                u32::try_from(id).ok().and_then(|id| tokenizer.content_of(id)).unwrap_or_default()
            };
            let Some(source) = gguf.string("tokenizer.chat_template") else { return Ok(None) };
            let tokens = (token("bos_token_id"), token("eos_token_id"));
            return Self::compile(&checkpoint.path, source, tokens).map(Some);
        }
        let config = TokenizerConfig::read(&checkpoint.path)?;
        let tokens = (config.bos.unwrap_or_default(), config.eos.unwrap_or_default());
        match config.template {
            Some((path, source)) => Self::compile(&path, &source, tokens).map(Some),
            None => Ok(None),
        }
    }

    /// Compiles `source`; `path` is named in errors, tokens are (beginning, end).
    ///
    /// # Errors
    /// When it is not a valid template.
    pub fn compile(
        path: &Path,
        source: &str,
        (bos_token, eos_token): (String, String),
    ) -> Result<Self, LoadError> {
        if source.len() > SOURCE_BYTES_MAX {
            let what = format!(
                "chat template: must be at most {SOURCE_BYTES_MAX} bytes, got {}",
                source.len()
            );
            return Err(LoadError::invalid(path, what));
        }
        let wrong = |what: String| LoadError::invalid(path, format!("chat template: {what}"));
        let environment = on_large_stack(|| environment(source))
            .map_err(|e| wrong(e.to_string()))?
            .map_err(|e| wrong(format!("{e:#}")))?;
        Ok(Self {
            environment,
            tool_format: ToolFormat::of(source),
            knows_developer: DEVELOPER.iter().any(|word| source.contains(word)),
            source: source.to_owned(),
            bos_token,
            eos_token,
        })
    }

    /// The template's text, as it was published.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Beginning and end of a text; empty where the model has none.
    pub fn special_tokens(&self) -> (&str, &str) {
        (&self.bos_token, &self.eos_token)
    }

    /// How the model writes calls of tools; `None` when its template knows no tools.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format
    }

    /// The prompt text of a conversation. `variables` are the template's inputs: `messages`,
    /// `tools`, `add_generation_prompt`, and whatever the client adds. The role `developer` is
    /// `system` to a template that does not know it. `now_ms`, in milliseconds since 1970, is the
    /// time that a template may print: who renders a prompt again gives the time of the first.
    ///
    /// # Errors
    /// When the template raises, fails or runs too long.
    pub fn render(
        &self,
        mut variables: Map<String, Value>,
        now_ms: u64,
    ) -> Result<String, TemplateError> {
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            variables.entry(name).or_insert_with(|| token.clone().into());
        }
        if let Some(Value::Array(messages)) = variables.get_mut("messages")
            && !self.knows_developer
        {
            messages.iter_mut().for_each(developer_is_system);
        }
        let rendered = on_large_stack(|| self.write(variables, now_ms));
        rendered.unwrap_or_else(|e| Err(TemplateError::Failed { line: 0, message: e.to_string() }))
    }

    fn write(&self, variables: Map<String, Value>, now_ms: u64) -> Result<String, TemplateError> {
        let mut environment = Cow::Borrowed(&self.environment);
        if self.source.contains(STRFTIME) {
            let format = move |format: String| strftime(&format, now_ms);
            environment.to_mut().add_function(STRFTIME, format);
        }
        let rendered = environment.get_template(NAME).and_then(|t| {
            let mut text = Bounded(Vec::new());
            t.render_captured_to(minijinja::Value::from_serialize(&variables), &mut text)?;
            Ok(String::from_utf8_lossy(&text.0).into_owned())
        });
        rendered.map_err(|e| {
            let line = e.line().unwrap_or(0);
            let detail = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
            match detail.strip_prefix(RAISED) {
                Some(message) => TemplateError::Raised { line, message: message.to_owned() },
                None if e.kind() == ErrorKind::OutOfFuel => {
                    TemplateError::Failed { line, message: "took too many steps".into() }
                }
                None if e.kind() == ErrorKind::WriteFailure => {
                    let message = format!("wrote more than {TEXT_BYTES_MAX} bytes");
                    TemplateError::Failed { line, message }
                }
                None => TemplateError::Failed { line, message: detail },
            }
        })
    }
}

/// What the template `source` is rendered in.
fn environment(source: &str) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_fuel(Some(FUEL_MAX));
    environment.set_formatter(python::write_value);
    environment.set_unknown_method_callback(python::method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function(source::MODULO, python::modulo);
    environment.add_function(source::TEXT, python::counted_text);
    environment.add_function(source::OPERAND, bounds::operand);
    environment.add_function(source::PRODUCT, bounds::product);
    environment.add_filter("string", python::counted_text);
    environment.add_filter("list", bounds::list);
    environment.add_filter("replace", python::replace);
    environment.add_filter("batch", bounds::limited(minijinja::filters::batch));
    environment.add_filter("slice", bounds::limited(minijinja::filters::slice));
    environment.add_filter("format", bounds::format);
    environment.add_filter("indent", bounds::indent);
    environment.add_filter(bounds::INDENT, minijinja::filters::indent);
    environment.add_filter("join", python::join);
    environment.add_filter("tojson", dumps::to_json);
    environment.add_template_owned(NAME, source::rewrite(source))?;
    Ok(environment)
}

/// Why work on a large stack has no result.
#[derive(Debug, thiserror::Error)]
enum NotComputed {
    /// The system gives no thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// The template's compiler or renderer panicked.
    #[error("it cannot be computed")]
    Panicked,
}

/// Runs `work` on a thread with [`STACK_BYTES`].
fn on_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, NotComputed> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
        let thread = thread.map_err(NotComputed::Thread)?;
        thread.join().map_err(|_| NotComputed::Panicked)
    })
}

/// A text that may only grow so far.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > TEXT_BYTES_MAX {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Marks errors that the template raised itself.
const RAISED: &str = "\u{1}raised:";

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

/// Renames the role of a message for templates made before `developer`, which would drop it.
fn developer_is_system(message: &mut Value) {
    if let Some(role) = message.get_mut("role").filter(|role| *role == "developer") {
        *role = "system".into();
    }
}

/// A time in the given format (UTC).
fn strftime(format: &str, unix_ms: u64) -> Result<String, minijinja::Error> {
    let wrong = |e: String| minijinja::Error::new(ErrorKind::InvalidOperation, e);
    let time = i64::try_from(unix_ms).map_err(|e| wrong(e.to_string()))?;
    let time = jiff::Timestamp::from_millisecond(time).map_err(|e| wrong(e.to_string()))?;
    let time = time.to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &time).map_err(|e| wrong(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NOW_MS: u64 = 1_735_689_599_999;

    fn render(source: &str, variables: Value) -> Result<String, String> {
        let tokens = ("<s>".to_owned(), "</s>".to_owned());
        let template = ChatTemplate::compile(Path::new("t.jinja"), source, tokens);
        let template = template.map_err(|e| e.to_string())?;
        let Value::Object(variables) = variables else { unreachable!() };
        template.render(variables, NOW_MS).map_err(|e| e.to_string())
    }

    #[test]
    fn a_conversation_is_rendered_with_python_habits() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\nU: \
            {{ m['content'].strip() | upper }}{% endif %}\n{% endfor %}{{ tools | tojson }}";
        let got = render(
            source,
            json!({
                "messages": [{"role": "user", "content": " hi "}],
                "tools": [{"b": 1, "a": "é<"}],
            }),
        );
        assert_eq!(got.unwrap(), "<s>U: HI[{\"b\": 1, \"a\": \"é<\"}]");
    }

    #[test]
    fn failures_name_the_line() {
        for (source, want) in [
            (
                "\n{{ raise_exception('no system role') }}",
                "refused the conversation (line 2): no s",
            ),
            ("\n\n{{ messages.missing.field }}", "failed (line 3)"),
            (
                "{% for a in range(9000) %}{% for b in range(9000) %}{% endfor %}{% endfor %}",
                "took too many steps",
            ),
            (
                "{% set t = 'a' * 1000000 %}{% for a in range(90) %}{{ t }}{% endfor %}",
                "wrote more than 33554432 bytes",
            ),
        ] {
            let error = render(source, json!({"messages": []})).unwrap_err();
            assert!(error.contains(want), "{source}: {error}");
        }
        assert!(render("{% if %}", json!({})).unwrap_err().starts_with("t.jinja: chat template:"));
    }

    #[test]
    fn nothing_nests_so_deeply_that_the_stack_ends() {
        let nest = "{% set ns = namespace(x=[]) %}{% for a in range(900) %}{% for b in \
            range(500) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
        assert_eq!(render(&format!("{nest}done"), json!({})).unwrap(), "done");
        for end in ["{{ ns.x }}", "{{ ns.x ~ '' }}", "{{ ns.x | tojson }}", "{{ ns.x | string }}"] {
            let error = render(&format!("{nest}{end}"), json!({})).unwrap_err();
            assert!(error.contains("values may be nested 128 deep"), "{end}: {error}");
        }
        let chain = format!("{{{{ 1{} }}}}", "+1".repeat(100_000));
        assert_eq!(render(&chain, json!({})).unwrap(), "100001");
        let chain = format!("{{{{ ''{} }}}}", "|e".repeat(100_000));
        assert_eq!(render(&chain, json!({})).unwrap(), "");
        let brackets = format!("{{{{ {}{} }}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(render(&brackets, json!({})).is_err());
        let long = " ".repeat(SOURCE_BYTES_MAX + 1);
        assert!(render(&long, json!({})).unwrap_err().contains("must be at most 262144 bytes"));
    }

    #[test]
    fn no_text_or_list_takes_all_memory() {
        let grown = |expression: &str| {
            format!(
                "{{% set ns = namespace(x='aaaaaaaa', l=[1]) %}}{{% for i in range(60) %}}\
                 {{% set ns.x = {expression} %}}{{% endfor %}}"
            )
        };
        let many = "(['a'] * 900000)";
        for source in [
            grown("ns.x ~ ns.x"),
            grown("ns.x + ns.x"),
            grown("ns.x * 9"),
            grown("(ns.x, ns.x) | join"),
            grown("ns.x | replace('a', 'aa')"),
            grown("ns.x.replace('a', 'aa')"),
            grown("[ns.x + '\\\\'] | string"),
            grown("(ns.x ~ '\\\\') | tojson"),
            grown("'%s%s' % (ns.x, ns.x)"),
            grown("'%s%s' | format(ns.x, ns.x)"),
            grown("ns.x.join([ns.x, ns.x])"),
            grown("(ns.l + ns.l) * 2").replace("ns.x =", "ns.l ="),
            "{{ (['a'] * 1000000000000) | join }}".into(),
            "{{ ([0] * 10000000000000) | list }}".into(),
            "{{ 10000000000000 * [0] }}".into(),
            format!("{{{{ {many} | join('a' * 1000) }}}}"),
            format!("{{{{ {many} + {many} + {many} + {many} | list }}}}{{{{ {many} * 2 }}}}"),
            format!("{{{{ (['a' * 1000] * 900000) | tojson }}}}{{{{ {many} * 2 }}}}"),
            "{{ [1] | batch(1000000000000) }}".into(),
            "{{ [1] | slice(1000000000000) | list }}".into(),
            "{{ 'a' | indent(1000000000000) }}".into(),
            "{{ 'a' | indent(width=1000000000000) }}".into(),
            "{{ '%1000000000000d' % 1 }}".into(),
            "{{ '%*d' | format(1000000000000, 1) }}".into(),
            "{{ '{:>1000000000000}'.format(1) }}".into(),
            "{{ ('a,' * 2000000).split(',') | length }}".into(),
            "{{ ('a' * 2000000) | list | length }}".into(),
        ] {
            let error = render(&source, json!({})).unwrap_err();
            let is_bound = ["at most", "wrote more than"].iter().any(|w| error.contains(w));
            assert!(is_bound, "{source}: {error}");
        }
        // The control: what a conversation needs is made as before.
        let honest = "{% set ns = namespace(x='', l=[]) %}{% for i in range(2000) %}\
            {% set ns.x = ns.x + 'word ' * 2 ~ i %}{% set ns.l = ns.l + [i] %}{% endfor %}\
            {{ ns.x | length }} {{ ns.l | length }} {{ 'a\nb' | indent(2) }} {{ 1 + 2 * 3 }} \
            {{ [1] * 2 + [3] }} {{ 'xyx' | replace('x', 'ab') }} {{ [1, 2, 3] | batch(2) | list }}";
        let want = "26890 2000 a\n  b 7 [1, 1, 3] abyab [[1, 2], [3]]";
        assert_eq!(render(honest, json!({})).unwrap(), want);
    }

    #[test]
    fn dates_follow_strftime() {
        let source = "{% macro d() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ d() }} \
            {{ strftime_now('%H:%M:%S') }}";
        assert_eq!(render(source, json!({})).unwrap(), "31 Dec 2024 23:59:59");
    }
}
