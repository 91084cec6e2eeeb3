//! Tests that the program accepts every command that the documents show.

#[path = "../../tests/common/shell.rs"]
mod shell;

use super::Cli;
use clap::CommandFactory;
use shell::documents;
pub(super) use shell::{commands, shell_lines};

pub(super) fn parse(words: &[String]) -> Result<(), clap::Error> {
    Cli::command().try_get_matches_from(words).map(drop)
}

#[test]
fn the_documents_show_commands_that_work() {
    let mut count = 0;
    for path in documents() {
        let text = std::fs::read_to_string(&path).unwrap();
        for command in shell_lines(&text).iter().flat_map(|line| commands(line)) {
            count += 1;
            if let Err(e) = parse(&command) {
                panic!("{}: {command:?}\n{e}", path.display());
            }
        }
    }
    assert!(count >= 20, "only {count} commands were found");
}

#[test]
fn a_wrong_command_is_found() {
    let text = "a\n```sh\ncd x && targon-engine doctor --json \\\n  --ofline | less\n```\n";
    let lines = shell_lines(text);
    let found = commands(&lines[0]);
    assert_eq!(found, [["targon-engine", "doctor", "--json", "--ofline"]]);
    assert!(parse(&found[0]).is_err());
    assert!(parse(&found[0][..3]).is_ok());
    assert_eq!(
        shell::words("targon-engine query \"a b\" --uid 7  # c"),
        ["targon-engine", "query", "a b", "--uid", "7"]
    );
}
