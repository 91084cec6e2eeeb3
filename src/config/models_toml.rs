//! Reads `models.toml`: one flat `[[model]]` entry for each model that is served, and one
//! `[server]` table.

use super::server_toml::{self, ServerConfig, ServerTable};
use super::{nearest, units};
use crate::engine::backend::{BackendError, BackendKind};
use crate::engine::drafts::STEP_ROWS_MAX;
use crate::engine::plan::{KvMemory, MemoryWanted};
use crate::files::{self, KeyError};
use crate::models::arithmetic::{Arithmetic, ArithmeticError};
use crate::models::device::{Device, DeviceError};
use crate::models::hub;
use crate::ops::dtype::Dtype;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Sequences that run at once where nothing is said.
const SEQUENCES_DEFAULT: usize = 64;
/// Most sequences that a file may ask for.
const SEQUENCES_MAX: usize = 1024;
/// Most tokens that may be guessed for a step: fewer than the rows up to which they are added.
const SPECULATIVE_MAX: usize = STEP_ROWS_MAX - 1;
/// Types that weights can be quantised to on every device.
const ISQ_TYPES: [&str; 9] = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2k", "q3k", "q4k", "q5k"];
/// Why there are no cards.
const NO_CARDS: &str = "must be cpu for engine = \"mistralrs\" in a build without the feature \
    `mistralrs-cuda`";
/// Cards that the layers of one model may be put on.
const DEVICES_MAX: usize = 16;
/// Why there is one process.
const TENSOR_PARALLEL: &str = "must be 1: mistral.rs 0.8.1 runs a process for each part and sends \
    requests to them without our sampler, so that they would go on with other tokens than were \
    sent";
/// What a repository of the Hub is called.
const REPOSITORY: &str = "a repository of the Hub, NAME or OWNER/NAME";
/// What a revision is called, and a file of a repository.
const HUB_NAME: &str = "a name within a repository of the Hub";
const KEYS: [&str; 18] = [
    "name",
    "source",
    "repo",
    "path",
    "file",
    "revision",
    "engine",
    "dtype",
    "device",
    "devices",
    "arithmetic",
    "context_max",
    "kv_memory",
    "sequences_max",
    "speculative_tokens",
    "prefix_cache_file",
    "isq",
    "tensor_parallel",
];

/// Where a model's files come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ModelSource {
    /// A repository of the Hugging Face Hub.
    Hub {
        /// `owner/name`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// One GGUF file of it, instead of the safetensors checkpoint.
        file: Option<String>,
    },
    /// A checkpoint directory or a GGUF file on this machine.
    Path(PathBuf),
}

/// One model to serve.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelConfig {
    /// What requests call it.
    pub name: String,
    /// Where its files come from.
    pub source: ModelSource,
    /// The engine that runs it.
    pub backend: BackendKind,
    /// Where it is computed: one device, or the cards that mistral.rs puts its layers on, in this
    /// order.
    pub devices: Vec<Device>,
    /// How it is computed there; where nothing is said, as is fastest on the device.
    pub arithmetic: Option<Arithmetic>,
    /// Overrides the stored type.
    pub dtype: Option<Dtype>,
    /// What mistral.rs quantises the layers' weights to while it loads them.
    pub isq: Option<String>,
    /// Where prefixes that many requests begin with are kept across restarts.
    pub prefix_cache_file: Option<PathBuf>,
    /// What its memory is planned for: context, KV cache, sequences and drafts.
    pub wanted: MemoryWanted,
}

impl ModelConfig {
    /// The device of a model, or of its first layers.
    pub fn device(&self) -> Device {
        self.devices.first().copied().unwrap_or_default()
    }
}

/// What a models file says, with all defaults filled in.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    /// The models that are served.
    pub models: Vec<ModelConfig>,
    /// What the `[server]` table says.
    pub server: ServerConfig,
}

/// A fault in the file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{path}: {what}")]
pub struct ConfigError {
    /// The models file.
    pub path: PathBuf,
    /// The rule for the entry, and what stands there.
    pub what: String,
    /// Advice, where there is some.
    pub hint: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    model: Vec<Entry>,
    #[serde(default)]
    server: ServerTable,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: Option<String>,
    source: Option<String>,
    repo: Option<String>,
    path: Option<PathBuf>,
    file: Option<String>,
    revision: Option<String>,
    engine: Option<String>,
    dtype: Option<String>,
    device: Option<String>,
    devices: Option<Vec<String>>,
    arithmetic: Option<String>,
    context_max: Option<usize>,
    kv_memory: Option<String>,
    sequences_max: Option<usize>,
    speculative_tokens: Option<usize>,
    prefix_cache_file: Option<PathBuf>,
    isq: Option<String>,
    tensor_parallel: Option<usize>,
}

/// Reads and checks the file; `keys` open the API besides those that it names.
///
/// # Errors
/// When it cannot be read, or an entry is wrong.
pub fn read(path: &Path, keys: &[String]) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|e| ConfigError {
        path: path.to_owned(),
        what: format!("cannot be read: {e}"),
        hint: None,
    })?;
    parse(path, &text, keys)
}

/// Checks the text of the file; relative paths in it start at its directory.
///
/// # Errors
/// When an entry is wrong.
pub fn parse(path: &Path, text: &str, keys: &[String]) -> Result<Config, ConfigError> {
    let error = |what: String, hint: Option<String>| ConfigError { path: path.into(), what, hint };
    let file: File = toml::from_str(text)
        .map_err(|e| error(files::toml_fault(text, &e), unknown_key(e.message())))?;
    if file.model.is_empty() {
        let hint = Some("add a [[model]] entry with a name and a source".to_owned());
        return Err(error("lists no model".into(), hint));
    }
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut models: Vec<ModelConfig> = Vec::new();
    for (index, entry) in file.model.into_iter().enumerate() {
        let label = entry.name.clone().unwrap_or_else(|| format!("number {}", index + 1));
        let model =
            check(entry, directory).map_err(|e| error(format!("model {label}: {e}"), None))?;
        if models.iter().any(|m| m.name == model.name) {
            return Err(error(format!("two models are called {}", model.name), None));
        }
        let file = model.prefix_cache_file.as_ref();
        let twin = models.iter().find(|m| file.is_some() && m.prefix_cache_file.as_ref() == file);
        if let Some(twin) = twin {
            let what = format!("is that of {}; each needs its own", twin.name);
            return Err(error(format!("model {label}: `prefix_cache_file` {what}"), None));
        }
        models.push(model);
    }
    let server = file.server.check(directory, keys);
    let server = server.map_err(|e| error(format!("[server] {e}"), None))?;
    Ok(Config { models, server })
}

/// A hint for "unknown field `x`".
fn unknown_key(message: &str) -> Option<String> {
    let key = message.strip_prefix("unknown field `")?.split('`').next()?;
    let known = KEYS.into_iter().chain(server_toml::KEYS).chain(["server", "model"]);
    nearest(key, known).map(|known| format!("did you mean `{known}`?"))
}

fn check(entry: Entry, directory: &Path) -> Result<ModelConfig, KeyError> {
    let backend = entry.engine.as_deref().map_or(Ok(BackendKind::default()), str::parse);
    let backend = backend.map_err(|e: BackendError| KeyError::new("engine", e))?;
    let devices = devices(&entry, backend)?;
    let arithmetic = arithmetic(&entry, backend, devices[0])?;
    let dtype = match entry.dtype.as_deref() {
        None | Some("auto") => None,
        Some("bf16") => Some(Dtype::Bf16),
        Some("f16") => Some(Dtype::F16),
        Some(other) => {
            return Err(KeyError::new("dtype", format!("must be auto, bf16 or f16, got {other}")));
        }
    };
    let kv_memory = entry.kv_memory.as_deref().map_or(Ok(KvMemory::Auto), units::kv_memory);
    let sequences_max = entry.sequences_max.unwrap_or(SEQUENCES_DEFAULT);
    if !(1..=SEQUENCES_MAX).contains(&sequences_max) {
        let what = format!("must lie in 1..={SEQUENCES_MAX}, got {sequences_max}");
        return Err(KeyError::new("sequences_max", what));
    }
    let drafts_max = entry.speculative_tokens.unwrap_or(0);
    if drafts_max > SPECULATIVE_MAX {
        let what = format!("must lie in 0..={SPECULATIVE_MAX}, got {drafts_max}");
        return Err(KeyError::new("speculative_tokens", what));
    }
    if entry.context_max == Some(0) {
        return Err(KeyError::new("context_max", "must be at least 1, got 0"));
    }
    let wanted = MemoryWanted {
        context_max: entry.context_max,
        kv_memory: kv_memory.map_err(|e| KeyError::new("kv_memory", e))?,
        sequences_max,
        drafts_max,
    };
    let isq = quantisation(&entry, backend)?;
    let prefix_cache_file = entry.prefix_cache_file.as_ref().map(|path| directory.join(path));
    if prefix_cache_file.is_some() && backend == BackendKind::Mistralrs {
        return Err(KeyError::new("prefix_cache_file", "goes only with engine = \"native\""));
    }
    let (source, default_name) = source(&entry, directory)?;
    let name = entry.name.or(default_name).ok_or_else(|| KeyError::new("name", "is missing"))?;
    if name.is_empty() || name.len() > 200 || name.chars().any(char::is_control) {
        return Err(KeyError::new("name", "must have 1 to 200 characters, none of them control"));
    }
    Ok(ModelConfig {
        name,
        source,
        backend,
        devices,
        arithmetic,
        dtype,
        isq,
        prefix_cache_file,
        wanted,
    })
}

/// Where a model is computed; never empty.
fn devices(entry: &Entry, backend: BackendKind) -> Result<Vec<Device>, KeyError> {
    let Some(names) = &entry.devices else {
        let name = entry.device.as_deref().unwrap_or("auto");
        return Ok(vec![device("device", name, backend)?]);
    };
    let fault = |what: String| Err(KeyError::new("devices", what));
    if backend != BackendKind::Mistralrs {
        return fault("goes only with engine = \"mistralrs\"".into());
    }
    if entry.device.is_some() {
        return fault("does not go with `device`".into());
    }
    if !(1..=DEVICES_MAX).contains(&names.len()) {
        return fault(format!("must name 1 to {DEVICES_MAX} cards, got {}", names.len()));
    }
    let mut devices = Vec::new();
    for name in names {
        match device("devices", name, backend)? {
            card @ Device::Cuda(_) if !devices.contains(&card) => devices.push(card),
            card @ Device::Cuda(_) => return fault(format!("names {card} twice")),
            other => return fault(format!("must name cards, got {other}")),
        }
    }
    Ok(devices)
}

/// The device of this name, which `key` says.
fn device(key: &'static str, name: &str, backend: BackendKind) -> Result<Device, KeyError> {
    let is_mistral = backend == BackendKind::Mistralrs;
    if is_mistral && name.starts_with("cuda:") && !cfg!(feature = "mistralrs-cuda") {
        return Err(KeyError::new(key, format!("{NO_CARDS}, got {name}")));
    }
    match name.parse().map_err(|e: DeviceError| KeyError::new(key, e))? {
        // What the native engine finds on a card says nothing of the other one.
        Device::Auto if is_mistral => Ok(Device::Cpu),
        device => Ok(device),
    }
}

/// How a model is computed, where the entry says it.
fn arithmetic(
    entry: &Entry,
    backend: BackendKind,
    device: Device,
) -> Result<Option<Arithmetic>, KeyError> {
    let Some(name) = entry.arithmetic.as_deref() else { return Ok(None) };
    let fault = |what: &str| KeyError::new("arithmetic", what);
    let arithmetic = name.parse().map_err(|e: ArithmeticError| KeyError::new("arithmetic", e))?;
    match (backend, device, arithmetic) {
        (BackendKind::Mistralrs, ..) => Err(fault("goes only with engine = \"native\"")),
        (_, Device::Cpu, Arithmetic::Tensor) => {
            Err(fault("must be portable on the processor, got tensor"))
        }
        _ => Ok(Some(arithmetic)),
    }
}

/// The keys that are for mistral.rs alone: the type that weights are quantised to.
fn quantisation(entry: &Entry, backend: BackendKind) -> Result<Option<String>, KeyError> {
    let is_mistral = backend == BackendKind::Mistralrs;
    let only = "goes only with engine = \"mistralrs\"";
    match entry.tensor_parallel {
        Some(_) if !is_mistral => return Err(KeyError::new("tensor_parallel", only)),
        None | Some(1) => {}
        Some(count) => {
            return Err(KeyError::new(
                "tensor_parallel",
                format!("{TENSOR_PARALLEL}, got {count}"),
            ));
        }
    }
    if is_mistral && entry.speculative_tokens.is_some_and(|tokens| tokens > 0) {
        return Err(KeyError::new("speculative_tokens", "goes only with engine = \"native\""));
    }
    let Some(isq) = entry.isq.as_deref() else { return Ok(None) };
    if !is_mistral {
        return Err(KeyError::new("isq", only));
    }
    let known = |name: &&&str| name.eq_ignore_ascii_case(isq);
    match ISQ_TYPES.iter().find(known) {
        Some(name) => Ok(Some((*name).to_owned())),
        None => {
            Err(KeyError::new("isq", format!("must be one of {}, got {isq}", ISQ_TYPES.join(", "))))
        }
    }
}

/// The source, and the name it suggests.
fn source(entry: &Entry, directory: &Path) -> Result<(ModelSource, Option<String>), KeyError> {
    let hub = |file: Option<String>| {
        let named = entry.repo.clone().map(|repo| ("repo", repo));
        let named = named.or_else(|| entry.name.clone().map(|name| ("name", name)));
        let (key, repo) = named.ok_or_else(|| KeyError::new("repo", "is missing"))?;
        if !hub::is_repository(&repo) {
            let what = format!("must be {REPOSITORY}, or there must be a `path`, got {repo:?}");
            return Err(KeyError::new(key, what));
        }
        let revision = entry.revision.clone().unwrap_or_else(|| "main".into());
        for (key, text) in [("revision", Some(&revision)), ("file", file.as_ref())] {
            if let Some(text) = text.filter(|text| !hub::is_name(text)) {
                return Err(KeyError::new(key, format!("must be {HUB_NAME}, got {text:?}")));
            }
        }
        Ok((ModelSource::Hub { repo: repo.clone(), revision, file }, Some(repo)))
    };
    let local = |path: &Path| {
        let name = path.file_stem().map(|s| s.to_string_lossy().into_owned());
        (ModelSource::Path(directory.join(path)), name)
    };
    let kind = entry.source.as_deref();
    match (kind, &entry.path) {
        (Some("hf") | None, None) => hub(entry.file.clone()),
        (Some("hf"), Some(_)) => Err(KeyError::new("path", "does not go with source = \"hf\"")),
        (Some("path" | "gguf") | None, Some(path)) => {
            let of_hub =
                [("repo", &entry.repo), ("file", &entry.file), ("revision", &entry.revision)];
            if let Some(key) =
                of_hub.into_iter().find_map(|(key, value)| value.is_some().then_some(key))
            {
                return Err(KeyError::new(key, "does not go with `path`"));
            }
            Ok(local(path))
        }
        (Some("gguf"), None) => match &entry.file {
            Some(file) => hub(Some(file.clone())),
            None => Err(KeyError::new("path", "is missing (or `repo` and `file`)")),
        },
        (Some("path"), None) => Err(KeyError::new("path", "is missing")),
        (Some(other), _) => {
            Err(KeyError::new("source", format!("must be hf, path or gguf, got {other}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config, (String, Option<String>)> {
        parse(Path::new("/etc/models.toml"), text, &[]).map_err(|e| (e.to_string(), e.hint))
    }

    #[test]
    fn entries_are_read_with_their_defaults() {
        let text = r#"
            [[model]]
            name = "HuggingFaceTB/SmolLM2-135M-Instruct"
            [[model]]
            name = "small"
            source = "gguf"
            path = "weights/m.gguf"
            engine = "native"
            device = "cpu"
            arithmetic = "portable"
            dtype = "f16"
            context_max = 2048
            kv_memory = "1 GiB"
            sequences_max = 4
            prefix_cache_file = "small.prefixes.json"
        "#;
        let models = parsed(text).unwrap().models;
        assert_eq!(
            models[0].source,
            ModelSource::Hub {
                repo: "HuggingFaceTB/SmolLM2-135M-Instruct".into(),
                revision: "main".into(),
                file: None
            }
        );
        assert_eq!(models[0].wanted.sequences_max, SEQUENCES_DEFAULT);
        assert_eq!(models[0].prefix_cache_file, None);
        let file = PathBuf::from("/etc/small.prefixes.json");
        assert_eq!(models[1].prefix_cache_file, Some(file));
        assert_eq!(models[1].source, ModelSource::Path("/etc/weights/m.gguf".into()));
        assert_eq!((models[0].device(), models[0].arithmetic), (Device::Auto, None));
        assert_eq!(models[1].arithmetic, Some(Arithmetic::Portable));
        assert_eq!((models[1].backend, models[1].device()), (BackendKind::Native, Device::Cpu));
        assert_eq!(models[1].dtype, Some(Dtype::F16));
        assert_eq!(models[1].wanted.kv_memory, KvMemory::Bytes(1 << 30));
    }

    #[test]
    fn the_other_engine_is_refused_where_it_is_not_built_and_read_where_it_is() {
        let entry =
            |more: &str| parsed(&format!("[[model]]\nname=\"a\"\nengine=\"mistralrs\"\n{more}"));
        if !cfg!(feature = "mistralrs") {
            let (error, _) = entry("").unwrap_err();
            let want = "`engine` = mistralrs needs a build with the feature `mistralrs`";
            assert!(error.contains(want), "{error}");
            return;
        }
        let models = entry("isq=\"Q8_0\"").unwrap().models;
        assert_eq!(models[0].backend, BackendKind::Mistralrs);
        assert_eq!(models[0].isq.as_deref(), Some("q8_0"));
        for (more, want) in [
            ("isq=\"int4\"", "`isq` must be one of q4_0"),
            ("tensor_parallel=2", "`tensor_parallel` must be 1: mistral.rs"),
            ("tensor_parallel=0", "`tensor_parallel` must be 1: mistral.rs"),
            ("devices=[]", "`devices` must name 1 to 16 cards, got 0"),
            ("devices=[\"cpu\", \"cpu\"]", "`devices` must name cards, got cpu"),
            ("device=\"cpu\"\ndevices=[\"cpu\"]", "`devices` does not go with `device`"),
            ("device=\"cuda:x\"", "`device` must be"),
            ("arithmetic=\"portable\"", "`arithmetic` goes only with engine"),
            ("speculative_tokens=4", "`speculative_tokens` goes only with engine"),
            ("prefix_cache_file=\"p\"", "`prefix_cache_file` goes only with engine"),
            ("device=\"auto\"\nisq=\"\"", "`isq` must be one of"),
        ] {
            let (error, _) = entry(more).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
        let cards = entry("devices=[\"cuda:1\", \"cuda:0\"]");
        if cfg!(feature = "mistralrs-cuda") {
            let devices = cards.unwrap().models.remove(0).devices;
            assert_eq!(devices, [Device::Cuda(1), Device::Cuda(0)]);
            let (error, _) = entry("devices=[\"cuda:1\", \"cuda:1\"]").unwrap_err();
            assert!(error.contains("`devices` names cuda:1 twice"), "{error}");
        } else {
            let (error, _) = cards.unwrap_err();
            assert!(error.contains("`mistralrs-cuda`, got cuda:1"), "{error}");
            let (error, _) = entry("device=\"cuda:0\"").unwrap_err();
            assert!(error.contains("`device` must be cpu for engine"), "{error}");
        }
    }

    #[test]
    fn faults_name_the_line_or_the_key() {
        for (text, want, hint) in [
            (
                "[[model]]\nname = \"a\"\ncontxt_max = 3",
                "line 3: unknown field `contxt_max`",
                Some("did you mean `context_max`?"),
            ),
            ("", "lists no model", Some("add a [[model]] entry with a name and a source")),
            ("[[model]]\nsource = \"path\"", "model number 1: `path` is missing", None),
            ("[[model]]\nname=\"a\"\ndtype=\"int8\"", "model a: `dtype` must be auto, bf16", None),
            ("[[model]]\nname=\"a\"\ndevice=\"cuda\"", "`device` must be auto, cpu or", None),
            (
                "[[model]]\nname=\"a\"\narithmetic=\"fast\"",
                "`arithmetic` must be portable or tensor, got fast",
                None,
            ),
            (
                "[[model]]\nname=\"a\"\ndevice=\"cpu\"\narithmetic=\"tensor\"",
                "`arithmetic` must be portable on the processor, got tensor",
                None,
            ),
            (
                "[[model]]\nname=\"a\"\nengine=\"vllm\"",
                "`engine` must be native or mistralrs",
                None,
            ),
            ("[[model]]\nname=\"a\"\ndevices=[\"cuda:0\"]", "`devices` goes only with", None),
            ("[[model]]\nname=\"a\"\nisq=\"q8_0\"", "`isq` goes only with engine", None),
            ("[[model]]\nname=\"a\"\ntensor_parallel=2", "`tensor_parallel` goes only with", None),
            ("[[model]]\nname=\"a\"\nkv_memory=\"4\"", "`kv_memory` must be a size", None),
            ("[[model]]\nname=\"a\"\nsequences_max=0", "`sequences_max` must lie in 1..=", None),
            (
                "[[model]]\nname=\"a\"\nspeculative_tokens=16",
                "`speculative_tokens` must lie in 0..=15, got 16",
                None,
            ),
            (
                "[[model]]\nname=\"a\"\nprefix_cache_file=\"p\"\n\
                 [[model]]\nname=\"b\"\nprefix_cache_file=\"p\"",
                "model b: `prefix_cache_file` is that of a; each needs its own",
                None,
            ),
            ("[[model]]\nname=\"a\"\n[[model]]\nname=\"a\"", "two models are called a", None),
            (
                "[[model]]\nname=\"a\"\ncontext_max = \"big\"",
                "line 3: `context_max`: invalid type: string \"big\", expected usize",
                None,
            ),
            (
                "[[model]]\ndevice = [\"cuda:0\", \"cuda:1\"]",
                "line 2: `device`: invalid type: sequence, expected a string",
                None,
            ),
            ("[server]\napi_keys = [\n\"a=b\", 1]", "line 3: invalid type: integer `1`", None),
            ("[[model\n", "line 1:", None),
            (
                "[server]\napi_key = [\"x\"]",
                "line 2: unknown field `api_key`",
                Some("did you mean `api_keys`?"),
            ),
            (
                "[[model]]\nname=\"a\"\n[server]\napi_keys=[\"short\"]",
                "[server] `api_keys` must have at least 16 characters each, one has 5",
                None,
            ),
            (
                "[[model]]\nname=\"a\"\n[server]\napi_keys=[\"0123456789abcdef\\n\"]",
                "[server] `api_keys` must have no control characters",
                None,
            ),
            (
                "[[model]]\nname=\"a\"\npath=\"p\"\nrevision=\"main\"",
                "model a: `revision` does not go with `path`",
                None,
            ),
            ("[[model]]\nname=\"a\"\nrevision=\"\"", "`revision` must be a name within", None),
            ("[[model]]\nrepo=\"../x\"", "`repo` must be a repository of the Hub", None),
            ("[[model]]\nname=\"not a repo\"", "`name` must be a repository of the Hub", None),
            (
                "[[model]]\nname=\"a\"\nfile=\"../../m.gguf\"",
                "`file` must be a name within a repository of the Hub, got \"../../m.gguf\"",
                None,
            ),
            ("[[model]]\nname=\"a\"\n[server]\nbody_seconds=0", "must lie in 1..=86400", None),
            ("[[model]]\nname=\"a\"\n[server]\nbody_max=\"8\"", "must be a size such as", None),
            (
                "[[model]]\nname=\"a\"\n[server]\nlog=\"engine=foo\"",
                "[server] `log` must be error, warn, info,",
                None,
            ),
        ] {
            let (error, got_hint) = parsed(text).unwrap_err();
            assert!(error.starts_with("/etc/models.toml: ") && error.contains(want), "{error}");
            assert_eq!(got_hint.as_deref(), hint, "{text}");
        }
    }
}
