//! `vsocket`: the agent of a guest, and what a person asks of it.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    vsocket_frontend::cli::main()
}
