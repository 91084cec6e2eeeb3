//! Starts the `targon-engine` program: everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    targon_engine::cli::main()
}
