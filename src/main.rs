//! The `kurir` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    kurir::cli::main()
}
