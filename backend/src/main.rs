//! `vsocketd`, the host's daemon. All sense is in the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vsocket_backend::cli::run()
}
