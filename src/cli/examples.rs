//! Lists the examples that `--help` and the manual pages end with. A test parses each of them.

use clap::Command;

/// Commands by their path, and what to try. Lines have at most 80 columns, and work as they are.
const EXAMPLES: &[(&str, &str)] = &[
    (
        "serve",
        "targon-engine serve --models models.toml
targon-engine serve --models models.toml --netuid 4 \\
    --wallet.name default --wallet.hotkey default --axon.port 8091
targon-engine serve --netuid 4 --wallet.name default --dry-run",
    ),
    ("plan", "targon-engine plan --models models.toml"),
    (
        "calibrate",
        "targon-engine calibrate --models models.toml
targon-engine calibrate --pairs honest.jsonl --limits limits.json
targon-engine calibrate --pairs miner.jsonl --classes a.json --classes b.json
targon-engine calibrate --answers 20",
    ),
    ("verifier", "targon-engine verifier --models models.toml --port 5555"),
    (
        "bench attack",
        "targon-engine bench attack model.gguf --prompts 4 --honest 20
targon-engine bench attack model.gguf --only replay --json",
    ),
    (
        "verify",
        "targon-engine verify capture.jsonl --models models.toml --explain
targon-engine verify capture.jsonl --slow --html answers.html
targon-engine verify capture.jsonl --profile targon-4.4 --json",
    ),
    (
        "query",
        "targon-engine query --uid 7 --wallet.name default \"Why is the sea salty?\"
targon-engine query --address 127.0.0.1:8000 --model M --save c.jsonl \"Hello\"",
    ),
    (
        "export",
        "targon-engine export --what responses --since 24h --uid 7
targon-engine export --what weights --format csv --database.url v.sqlite",
    ),
    ("explain", "targon-engine explain --uid 7 --database.url validator.sqlite"),
    (
        "validate",
        "targon-engine validate --models models.toml --netuid 4 \\
    --wallet.name default --wallet.hotkey validator
targon-engine validate --wallet.name default --once --dry-run",
    ),
    ("status", "targon-engine status --url http://127.0.0.1:8000"),
    ("wallet show", "targon-engine wallet show --wallet.name default --wallet.hotkey default"),
    ("wallet new-hotkey", "targon-engine wallet new-hotkey --wallet.name test --wallet.hotkey h1"),
    (
        "fetch",
        "targon-engine fetch HuggingFaceTB/SmolLM2-135M-Instruct
targon-engine fetch OWNER/NAME --revision main --file model.gguf",
    ),
    (
        "cache list",
        "targon-engine cache list
targon-engine cache list --json | jq '.items[] | select(.held == null)'",
    ),
    (
        "cache clean",
        "targon-engine cache clean --older-than 30d
targon-engine cache clean --only partial --only temporary --yes",
    ),
    (
        "doctor",
        "targon-engine doctor --offline
targon-engine doctor --models models.toml --wallet.name miner --netuid 4
targon-engine doctor --as-validator 127.0.0.1:8000 --max-tokens 64",
    ),
    ("config check", "targon-engine config check --models models.toml"),
    ("completions", "targon-engine completions bash > targon-engine.bash"),
    ("man", "targon-engine man /usr/local/share/man/man1"),
];

pub(super) fn with_examples(command: Command) -> Command {
    add(command, "")
}

fn add(command: Command, above: &str) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_owned()).collect();
    let mut command = command;
    for name in names {
        let path = format!("{above}{name}");
        command = command.mut_subcommand(name, |below| {
            let below = match EXAMPLES.iter().find(|(of, _)| *of == path) {
                Some((_, text)) => below.after_help(format!("Examples:\n{}", indented(text))),
                None => below,
            };
            add(below, &format!("{path} "))
        });
    }
    command
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::super::guides::{commands, parse, shell_lines};
    use super::*;
    use clap::CommandFactory;

    const COLUMNS: usize = 80;

    /// Commands that have none below them, with their paths.
    fn leaves(command: &Command, above: &str) -> Vec<(String, Command)> {
        let mut found = Vec::new();
        for below in command.get_subcommands().filter(|c| !c.is_hide_set()) {
            let path = format!("{above}{}", below.get_name());
            match below.has_subcommands() {
                true => found.extend(leaves(below, &format!("{path} "))),
                false => found.push((path, below.clone())),
            }
        }
        found
    }

    #[test]
    fn every_command_ends_with_examples_that_it_takes() {
        let command = with_examples(Cli::command());
        let all = leaves(&command, "");
        for (path, leaf) in &all {
            let text = leaf.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(text.starts_with("Example"), "{path} has no example");
            let wide = text.lines().find(|line| line.chars().count() > COLUMNS);
            assert_eq!(wide, None, "{path}");
            let shown = shell_lines(&format!("```sh\n{text}\n```"));
            let shown: Vec<_> = shown.iter().flat_map(|line| commands(line)).collect();
            assert!(!shown.is_empty(), "{path}: {text}");
            for words in shown {
                let own = words.iter().skip(1).take(path.split(' ').count());
                assert!(own.eq(path.split(' ')), "{path} shows {words:?}");
                // Completions and manual pages do not depend on an argument.
                let is_card = |e: &clap::Error| {
                    let lacks = e.to_string().contains("needs a build with the feature `cuda`");
                    lacks && !cfg!(feature = "cuda") && words.iter().any(|w| w.starts_with("cuda"))
                };
                match parse(&words) {
                    Ok(()) => {}
                    // An example may name a card, also where this build has none.
                    Err(e) if is_card(&e) => {}
                    Err(e) => panic!("{path}: {words:?}\n{e}"),
                }
            }
        }
        let known = |of: &str| all.iter().any(|(path, _)| path == of);
        assert!(EXAMPLES.iter().all(|(of, _)| known(of)), "an example of no command");
    }

    #[test]
    fn help_fits_a_terminal_of_80_columns() {
        for (path, leaf) in leaves(&with_examples(Cli::command()), "") {
            let mut leaf = leaf.term_width(COLUMNS);
            for help in [leaf.render_help(), leaf.render_long_help()] {
                let text = help.to_string();
                // A word that is longer cannot be cut.
                let wide = text
                    .lines()
                    .find(|line| line.chars().count() > COLUMNS && line.trim_start().contains(' '));
                assert_eq!(wide, None, "{path}:\n{text}");
            }
        }
    }
}
