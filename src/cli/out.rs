//! Writes data to stdout and messages to stderr. Writing never panics when the reader is gone, and
//! control characters are escaped, because the text may come from untrusted peers.

use super::printable::printable_lines;
use std::fmt::Arguments;
use std::io::{ErrorKind, IsTerminal, Write};

/// What a shell reports of a program that a closed pipe ended: 128 and the number of SIGPIPE.
const CLOSED_PIPE: i32 = 141;

/// Prints a line of data. A reader that has gone ends the program, quietly.
macro_rules! outln {
    ($($part:tt)*) => { $crate::cli::out::line(format_args!($($part)*)) };
}

/// Prints a line for the person at the terminal, if anybody reads it.
macro_rules! note {
    ($($part:tt)*) => { $crate::cli::out::note_line(format_args!($($part)*)) };
}

/// Prints a line of data that a server goes on without.
macro_rules! announce {
    ($($part:tt)*) => { $crate::cli::out::announce_line(format_args!($($part)*)) };
}

pub(super) use {announce, note, outln};

pub(super) fn line(text: Arguments<'_>) {
    end_on(write(text));
}

/// Prints bytes of our own making as they are. A reader that has gone ends the program, quietly.
pub(super) fn write_all(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    end_on(stdout.write_all(bytes).and_then(|()| stdout.flush()));
}

/// Prints what clap has to say. A reader of help that has gone ends the program, quietly.
pub(super) fn help(e: &clap::Error) {
    if e.use_stderr() {
        // Nobody is left to tell where stderr is gone too.
        let _ = e.print();
        return;
    }
    // Clap's own printing does not say whether anybody reads it.
    let text = e.render();
    let text = match std::io::stdout().is_terminal() {
        true => text.ansi().to_string(),
        false => text.to_string(),
    };
    write_all(text.as_bytes());
}

fn end_on(written: std::io::Result<()>) {
    let Err(e) = written else { return };
    if e.kind() != ErrorKind::BrokenPipe {
        note!("error: stdout cannot be written: {e}");
        std::process::exit(2);
    }
    std::process::exit(CLOSED_PIPE);
}

pub(super) fn announce_line(text: Arguments<'_>) {
    if let Err(e) = write(text) {
        tracing::warn!("stdout cannot be written, so it does not say where this listens: {e}");
    }
}

pub(super) fn note_line(text: Arguments<'_>) {
    // Nobody is left to tell where stderr is gone too.
    let _ = writeln!(std::io::stderr(), "{}", printable_lines(&text.to_string()));
}

fn write(text: Arguments<'_>) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    // At once, so that a full disk or a closed pipe is seen here and not at the program's end.
    writeln!(stdout, "{}", printable_lines(&text.to_string())).and_then(|()| stdout.flush())
}
