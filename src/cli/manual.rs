//! Runs `completions` and `man`: generates shell completions and manual pages from the command
//! line's own definition.

use super::Failure;
use super::out::write_all;
use clap::{Args, Command};
use clap_complete::Shell;
use std::path::PathBuf;

/// Arguments of `completions`.
#[derive(Args)]
pub(super) struct CompletionsArgs {
    /// The shell that the script is for.
    shell: Shell,
}

/// Arguments of `man`.
#[derive(Args)]
pub(super) struct ManArgs {
    /// The directory that the pages are written into, such as /usr/local/share/man/man1.
    directory: PathBuf,
}

pub(super) fn completions(args: &CompletionsArgs, mut command: Command) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "targon-engine", &mut script);
    write_all(&script);
    Ok(())
}

pub(super) fn pages(args: &ManArgs, command: Command) -> Result<(), Failure> {
    let place = args.directory.display();
    let failed = |e| Failure::user(format!("{place}: manual pages cannot be written: {e}"));
    std::fs::create_dir_all(&args.directory).map_err(failed)?;
    clap_mangen::generate_to(command, &args.directory).map_err(failed)
}
