//! Reads what `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` add to
//! `tokenizer.json`, as the transformers library reads them.

use super::error::{LoadError, read_json, read_text};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";
/// Classes that add the beginning and end tokens by their own flags, whatever the post-processor
/// of `tokenizer.json` says.
/// With their default beginning and end.
const FLAGGED: [(&str, &str, &str); 3] = [
    ("LlamaTokenizer", "<s>", "</s>"),
    ("CodeLlamaTokenizer", "<s>", "</s>"),
    ("GemmaTokenizer", "<bos>", "<eos>"),
];
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];
const ADDITIONAL: &str = "additional_special_tokens";

/// What the files say beside the tokenizer itself.
#[derive(Clone, PartialEq, Default, Debug)]
pub(super) struct TokenizerConfig {
    /// The text of the token that a prompt begins with.
    pub(super) bos: Option<String>,
    /// The text of the token that ends an output.
    pub(super) eos: Option<String>,
    /// Whether encoding adds them; `None` where the tokenizer's own post-processor decides.
    pub(super) adds: Option<Adds>,
    /// All tokens that are special by name.
    pub(super) special: Vec<String>,
    /// The chat template and the file that it stands in.
    pub(super) template: Option<(PathBuf, String)>,
}

/// Which tokens encoding adds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Adds {
    pub(super) bos: bool,
    pub(super) eos: bool,
}

impl TokenizerConfig {
    /// Reads the files of `dir`; each may be absent.
    ///
    /// # Errors
    /// When one is malformed.
    pub(super) fn read(dir: &Path) -> Result<Self, LoadError> {
        let path = dir.join(CONFIG);
        let mut config = optional_json(dir, CONFIG)?.unwrap_or_default();
        // The map counts for files of before `added_tokens_decoder`, and there above all.
        if config.get("added_tokens_decoder").is_none()
            && let Some(map) = optional_json(dir, MAP)?
        {
            for key in SPECIAL.into_iter().chain([ADDITIONAL]) {
                if let (Some(value), Some(config)) = (map.get(key), config_object(&mut config)) {
                    config.insert(key.to_owned(), value.clone());
                }
            }
        }
        let class = config["tokenizer_class"].as_str().unwrap_or_default();
        let class = class.strip_suffix("Fast").unwrap_or(class).to_owned();
        let flagged = FLAGGED.iter().find(|(name, ..)| *name == class);
        if let (Some((_, bos, eos)), Some(config)) = (flagged, config_object(&mut config)) {
            for (key, token) in [("bos_token", bos), ("eos_token", eos)] {
                config.entry(key).or_insert_with(|| (*token).into());
            }
        }
        let reader = Reader { path: &path, config: &config };
        let mut special = Vec::new();
        for key in SPECIAL {
            special.extend(reader.token(key, &config[key])?);
        }
        for token in config[ADDITIONAL].as_array().into_iter().flatten() {
            special.extend(reader.token(ADDITIONAL, token)?);
        }
        let adds = Adds {
            bos: reader.flag("add_bos_token", true)?,
            eos: reader.flag("add_eos_token", false)?,
        };
        Ok(Self {
            bos: reader.token("bos_token", &config["bos_token"])?,
            eos: reader.token("eos_token", &config["eos_token"])?,
            adds: flagged.map(|_| adds),
            special,
            template: reader.template(dir)?,
        })
    }

    /// Gives a tokenizer the special tokens and, where flags decide, the beginning and the end.
    ///
    /// # Errors
    /// When a token that encoding should add is not in the vocabulary.
    pub(super) fn apply(&self, path: &Path, inner: &mut Tokenizer) -> Result<(), LoadError> {
        let known = self.special.iter().filter(|t| inner.token_to_id(t).is_some());
        let special: Vec<AddedToken> =
            known.map(|t| AddedToken::from(t.clone(), true).normalized(false)).collect();
        inner.add_special_tokens(&special);
        let Some(adds) = self.adds else { return Ok(()) };
        let mut tokens = serde_json::Map::new();
        let mut marker = |flag: &str, token: Option<&String>| {
            let token = token.filter(|t| inner.token_to_id(t).is_some());
            let Some(token) = token else {
                let what = "is true, but the token that it adds is not in the vocabulary";
                return Err(LoadError::Key {
                    path: path.with_file_name(CONFIG),
                    key: flag.to_owned(),
                    what: what.to_owned(),
                });
            };
            let id = inner.token_to_id(token);
            tokens.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
            Ok(json!({"SpecialToken": {"id": token, "type_id": 0}}))
        };
        let mut single = Vec::new();
        if adds.bos {
            single.push(marker("add_bos_token", self.bos.as_ref())?);
        }
        single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
        if adds.eos {
            single.push(marker("add_eos_token", self.eos.as_ref())?);
        }
        let processor = json!({"type": "TemplateProcessing", "single": single, "pair": single,
            "special_tokens": tokens});
        let processor = serde_json::from_value::<PostProcessorWrapper>(processor)
            .map_err(|e| LoadError::invalid(path, format!("post-processor: {e}")))?;
        inner.with_post_processor(Some(processor));
        Ok(())
    }
}

/// The object to fill; an absent file is an empty one.
fn config_object(config: &mut Value) -> Option<&mut serde_json::Map<String, Value>> {
    if config.is_null() {
        *config = Value::Object(serde_json::Map::new());
    }
    config.as_object_mut()
}

/// A file of the checkpoint directory as a JSON object, where it exists.
fn optional_json(dir: &Path, name: &str) -> Result<Option<Value>, LoadError> {
    let path = dir.join(name);
    if !path.exists() {
        return Ok(None);
    }
    let json = read_json(&path)?;
    if json.is_object() {
        Ok(Some(json))
    } else {
        Err(LoadError::invalid(&path, "must be an object"))
    }
}

struct Reader<'a> {
    path: &'a Path,
    config: &'a Value,
}

impl Reader<'_> {
    fn error(&self, key: &str, what: String) -> LoadError {
        LoadError::Key { path: self.path.to_owned(), key: key.to_owned(), what }
    }

    /// A special token's text: a string, or an object with `content`.
    fn token(&self, key: &str, value: &Value) -> Result<Option<String>, LoadError> {
        if value.is_null() {
            return Ok(None);
        }
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        let wrong =
            || self.error(key, format!("must be text or an object with `content`, got {value}"));
        text.map(|t| Some(t.to_owned())).ok_or_else(wrong)
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, LoadError> {
        match &self.config[key] {
            Value::Null => Ok(default),
            Value::Bool(flag) => Ok(*flag),
            other => Err(self.error(key, format!("must be true or false, got {other}"))),
        }
    }

    /// The chat template: a file of its own, or a string, or a list of named ones of which
    /// `default` counts.
    fn template(&self, dir: &Path) -> Result<Option<(PathBuf, String)>, LoadError> {
        let file = dir.join(TEMPLATE);
        if file.exists() {
            return Ok(Some((file.clone(), read_text(&file)?)));
        }
        let template = &self.config["chat_template"];
        let named = || {
            let list = template.as_array()?;
            list.iter().find(|t| t["name"] == "default")?["template"].as_str()
        };
        let source = template.as_str().or_else(named);
        Ok(source.map(|source| (self.path.to_owned(), source.to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[(&str, Value)]) -> Result<TokenizerConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, json) in files {
            std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
        TokenizerConfig::read(dir.path()).map_err(|e| e.to_string())
    }

    #[test]
    fn the_map_counts_where_the_configuration_is_an_old_one() {
        let map = json!({"bos_token": {"content": "<b>"}, "additional_special_tokens": ["<x>"]});
        let old = json!({"bos_token": "<s>", "eos_token": "</s>"});
        let got = read(&[(CONFIG, old.clone()), (MAP, map.clone())]).unwrap();
        assert_eq!((got.bos.as_deref(), got.eos.as_deref()), (Some("<b>"), Some("</s>")));
        assert_eq!(got.special, ["<b>", "</s>", "<x>"]);
        let got = read(&[(MAP, map.clone())]).unwrap();
        assert_eq!(got.bos.as_deref(), Some("<b>"));
        let mut new = old;
        new["added_tokens_decoder"] = json!({});
        let got = read(&[(CONFIG, new), (MAP, map)]).unwrap();
        assert_eq!((got.bos.as_deref(), got.special.len()), (Some("<s>"), 2));
    }

    #[test]
    fn flags_count_for_the_classes_that_read_them() {
        for (config, want) in [
            (json!({"add_eos_token": true}), None),
            (json!({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": false}), None),
            (json!({"tokenizer_class": "LlamaTokenizer"}), Some(Adds { bos: true, eos: false })),
            (
                json!({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": false,
                    "add_eos_token": true}),
                Some(Adds { bos: false, eos: true }),
            ),
        ] {
            assert_eq!(read(&[(CONFIG, config.clone())]).unwrap().adds, want, "{config}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_key() {
        for (config, want) in [
            (
                json!({"bos_token": 5}),
                "`bos_token` must be text or an object with `content`, got 5",
            ),
            (json!({"add_bos_token": "yes"}), "`add_bos_token` must be true or false, got \"yes\""),
            (json!([]), "tokenizer_config.json: must be an object"),
        ] {
            let error = read(&[(CONFIG, config)]).unwrap_err();
            assert!(error.contains(want), "expected `{want}` in `{error}`");
        }
    }
}
