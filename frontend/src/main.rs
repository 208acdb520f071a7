//! `vsocket`: the agent of a guest, and what a person asks of it.

fn main() -> std::process::ExitCode {
    vsocket_frontend::cli::main()
}
