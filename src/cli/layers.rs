//! Reads flags from five places, the strongest first: the command line, the environment, `.env` in
//! the working directory, the YAML file of `--config`, and the defaults. The lower layers become
//! clap's defaults, so that clap checks all of them alike.

use super::Failure;
use super::out::note;
use crate::config::nearest;
use anyhow::{anyhow, bail};
use clap::builder::BoolishValueParser;
use clap::{Arg, ArgAction, Command};
use serde_yaml_ng::Value;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The flag that names the YAML file.
const CONFIG: &str = "config";

/// Values for flags, by the flag's long name.
type Values = BTreeMap<String, Vec<String>>;

/// `command` with the layers below the environment put in, for these arguments.
///
/// # Errors
/// When a file cannot be read or names an unknown flag.
pub(super) fn apply(command: Command, arguments: &[OsString]) -> Result<Command, Failure> {
    let command = spelled(command);
    let mut values = match config_file(arguments) {
        Some(path) => yaml(&command, &path)?,
        None => Values::new(),
    };
    values.extend(dotenv(&command, Path::new(".env"))?);
    Ok(fill(command, &values))
}

/// Every flag may be written with dots, dashes or underscores.
fn spelled(command: Command) -> Command {
    let command = command.mut_args(|arg| {
        let Some(long) = arg.get_long().map(str::to_owned) else { return arg };
        // A switch is on by true, yes, on or 1, wherever it is written.
        let arg = match arg.get_action() {
            ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
            _ => arg,
        };
        let mut known = vec![long.clone()];
        known.extend(arg.get_all_aliases().unwrap_or_default().into_iter().map(str::to_owned));
        let dashed = long.replace(['.', '_'], "-");
        // Names of parts keep their dot where the rest is spelled another way.
        let under = |text: &str| text.replace('-', "_");
        let mut others = vec![
            dashed.clone(),
            under(&dashed),
            under(&long),
            long.replace('_', "-"),
            long.replace('.', "_"),
        ];
        others.sort();
        others.dedup();
        others.retain(|other| !known.contains(other));
        arg.aliases(others)
    });
    command.mut_subcommands(spelled)
}

/// The `--config` of a command line, or of the environment.
fn config_file(arguments: &[OsString]) -> Option<PathBuf> {
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let text = argument.to_string_lossy();
        if text == "--" {
            break;
        }
        if text == "--config" {
            return rest.next().map(PathBuf::from);
        }
        if let Some(path) = text.strip_prefix("--config=") {
            return Some(path.into());
        }
    }
    std::env::var_os("TARGON_CONFIG").map(PathBuf::from)
}

/// All flags of a command and those below it.
fn flags(command: &Command) -> Vec<&Arg> {
    let own = command.get_arguments().filter(|a| a.get_long().is_some());
    own.chain(command.get_subcommands().flat_map(flags)).collect()
}

fn is_called(arg: &Arg, name: &str) -> bool {
    arg.get_long() == Some(name) || arg.get_all_aliases().unwrap_or_default().contains(&name)
}

fn yaml(command: &Command, path: &Path) -> Result<Values, Failure> {
    let place = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::user(format!("--config {place} cannot be read: {e}")))?;
    let tree: Value = serde_yaml_ng::from_str(&text)
        .map_err(|e| Failure::user(format!("--config {place} is not YAML: {e}")))?;
    let mut flat = Vec::new();
    flatten("", &tree, &mut flat).map_err(|what| Failure::user(format!("{place}: {what}")))?;
    let known = flags(command);
    let mut values = Values::new();
    for (key, value) in flat {
        let called: Vec<_> = known.iter().filter(|arg| is_called(arg, &key)).collect();
        let Some(long) = called.first().and_then(|arg| arg.get_long()) else {
            let names = known.iter().filter_map(|arg| arg.get_long());
            let hint = nearest(&key, names).map(|name| format!("did you mean `{name}`?"));
            return Err(Failure::user(format!("{place}: unknown key `{key}`")).with_hint(hint));
        };
        let fault = |what: String| Err(Failure::user(format!("{place}: `{key}` {what}")));
        if long == CONFIG {
            return fault("names a file like this one: only the command line can".into());
        }
        if value.len() > 1 && !called.iter().any(|arg| takes_list(arg)) {
            return fault(format!("must be one value, got a list of {}", value.len()));
        }
        if values.insert(long.to_owned(), value).is_some() {
            return fault(format!("is `{long}`, which is given twice"));
        }
    }
    Ok(values)
}

fn takes_list(arg: &Arg) -> bool {
    arg.get_value_delimiter().is_some() || matches!(arg.get_action(), ArgAction::Append)
}

/// Nested keys become dotted ones.
fn flatten(
    prefix: &str,
    value: &Value,
    flat: &mut Vec<(String, Vec<String>)>,
) -> anyhow::Result<()> {
    let rule = |what: &str| anyhow!("`{prefix}` must be {what}");
    let scalar = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(on) => Ok(on.to_string()),
        _ => Err(rule("a word, a number, true or false, or a list of them")),
    };
    match value {
        Value::Null if prefix.is_empty() => Ok(()),
        Value::Mapping(map) => map.iter().try_for_each(|(key, value)| {
            let key = key.as_str().ok_or_else(|| rule("a map with words for keys"))?;
            let key = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
            flatten(&key, value, flat)
        }),
        _ if prefix.is_empty() => bail!("must be a map of flags"),
        Value::Null => Ok(()),
        Value::Sequence(list) => {
            flat.push((prefix.into(), list.iter().map(scalar).collect::<Result<_, _>>()?));
            Ok(())
        }
        value => {
            flat.push((prefix.into(), vec![scalar(value)?]));
            Ok(())
        }
    }
}

/// Variables of the file that are twins of flags; it may hold others.
fn dotenv(command: &Command, path: &Path) -> Result<Values, Failure> {
    if !path.exists() {
        return Ok(Values::new());
    }
    let place = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::user(format!("{place} cannot be read: {e}")))?;
    let known = flags(command);
    let mut values = Values::new();
    for (number, pair) in dotenvy::from_read_iter(text.as_bytes()).enumerate() {
        // It may be another program's file. Its lines may hold secrets and are not repeated.
        let Ok((name, value)) = pair else {
            note!("warning: entry {} of {place} cannot be read, nor what follows", number + 1);
            break;
        };
        let twin = known.iter().find(|arg| arg.get_env().is_some_and(|e| *e == *name));
        if let Some(long) = twin.and_then(|arg| arg.get_long()) {
            let is_list = twin.is_some_and(|arg| arg.get_value_delimiter().is_some());
            let parts =
                if is_list { value.split(',').map(str::to_owned).collect() } else { vec![value] };
            values.insert(long.to_owned(), parts);
        }
    }
    Ok(values)
}

fn fill(command: Command, values: &Values) -> Command {
    let command = command.mut_args(|arg| {
        let Some(list) = arg.get_long().and_then(|long| values.get(long)).cloned() else {
            return arg;
        };
        // What is hidden in the environment is hidden here, too.
        let is_secret = arg.is_hide_env_values_set();
        arg.default_values(list).hide_default_value(is_secret).required(false)
    });
    command.mut_subcommands(|sub| fill(sub, values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, FromArgMatches};

    fn parsed(
        directory: &Path,
        config: &str,
        arguments: &[&str],
    ) -> Result<super::super::serve::ServeArgs, String> {
        let path = directory.join("miner.yaml");
        std::fs::write(&path, config).unwrap();
        let path = path.display().to_string();
        let mut all: Vec<OsString> = ["x", "serve", "--config", &path].map(OsString::from).into();
        all.extend(arguments.iter().map(OsString::from));
        let command = apply(super::super::Cli::command(), &all)
            .map_err(|f| format!("{} {}", f.message, f.hint.unwrap_or_default()))?;
        let matches = command.try_get_matches_from(all).map_err(|e| e.to_string())?;
        let cli = super::super::Cli::from_arg_matches(&matches).map_err(|e| e.to_string())?;
        match cli.command {
            super::super::Command::Serve(args) => Ok(*args),
            _ => Err("another command".into()),
        }
    }

    #[test]
    fn every_flag_of_what_runs_as_a_service_has_a_variable() {
        let command = super::super::Cli::command();
        for name in ["serve", "validate", "verifier"] {
            let service = command.find_subcommand(name).unwrap();
            // Hidden flags are the original's, which this program names and ignores or refuses.
            let shown = service.get_arguments().filter(|arg| !arg.is_hide_set());
            let bare = shown.filter(|arg| arg.get_env().is_none());
            let bare: Vec<&str> = bare.map(|arg| arg.get_id().as_str()).collect();
            // These choose what one call does, and the file has a variable of another kind.
            let of_one_call = ["config", "help", "dry_run", "once", "rounds", "yes", "json"];
            let unnamed: Vec<_> = bare.iter().filter(|id| !of_one_call.contains(id)).collect();
            assert!(unnamed.is_empty(), "{name}: {unnamed:?}");
        }
    }

    #[test]
    fn every_spelling_is_one_flag() {
        let directory = tempfile::tempdir().unwrap();
        for spelling in [
            ["--wallet.name", "--subtensor.chain_endpoint", "--axon.external_ip"],
            ["--wallet-name", "--subtensor.chain-endpoint", "--axon.external-ip"],
            ["--wallet_name", "--subtensor-chain-endpoint", "--axon_external_ip"],
        ] {
            let values = ["w", "ws://127.0.0.1:1", "127.0.0.2"];
            let arguments: Vec<&str> =
                spelling.iter().zip(values).flat_map(|(flag, value)| [*flag, value]).collect();
            let args = parsed(directory.path(), "", &arguments).unwrap();
            assert_eq!(args.wallet.name.as_deref(), Some("w"), "{spelling:?}");
        }
        let key = ["--api_key", "sixteen-characters"];
        assert_eq!(parsed(directory.path(), "", &key).unwrap().api_key, ["sixteen-characters"]);
        let error = parsed(directory.path(), "", &["--wallet.nam", "w"]).err().unwrap();
        assert!(error.contains("--wallet.name"), "{error}");
    }

    #[test]
    fn the_command_line_beats_the_file_and_the_file_beats_defaults() {
        let directory = tempfile::tempdir().unwrap();
        let config = "wallet:\n  name: from-file\nnetuid: 40\naxon.port: 9000\ndry_run: on\n\
                      subtensor:\n  chain_endpoint: ['ws://a', 'ws://b']\n";
        let args = parsed(directory.path(), config, &["--wallet.name", "mine"]).unwrap();
        assert_eq!(args.wallet.name.as_deref(), Some("mine"));
        assert_eq!((args.chain.netuid(), args.axon.port, args.axon.dry_run), (40, 9000, true));
        assert_eq!(args.chain.endpoints().unwrap().urls, ["ws://a", "ws://b"]);
    }

    #[test]
    fn faults_in_the_file_are_named() {
        let directory = tempfile::tempdir().unwrap();
        for (config, want) in [
            ("walet:\n  name: x", "unknown key `walet.name` did you mean `wallet.name`?"),
            ("- a", "must be a map of flags"),
            ("netuid: {", "is not YAML"),
            ("netuid: four", "invalid value 'four'"),
            ("dry_run: ture", "invalid value 'ture'"),
            ("netuid: [[1]]", "`netuid` must be a word, a number"),
            ("models: [a, b]", "`models` must be one value, got a list of 2"),
            ("config: other.yaml", "`config` names a file like this one"),
            (
                "wallet.name: a\nwallet_name: b",
                "`wallet_name` is `wallet.name`, which is given twice",
            ),
        ] {
            let error = parsed(directory.path(), config, &[]).err().unwrap();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn an_env_file_fills_the_twins_of_flags() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("env");
        std::fs::write(&path, "# mine\nBT_AXON_PORT=9001\nOTHER=1\na broken line\n").unwrap();
        let values = dotenv(&spelled(super::super::Cli::command()), &path).unwrap();
        assert_eq!(
            values.into_iter().collect::<Vec<_>>(),
            [("axon.port".to_owned(), vec!["9001".to_owned()])]
        );
    }
}
