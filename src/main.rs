//! The `targon-engine` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    targon_engine::cli::main()
}
