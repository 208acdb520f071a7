//! The command line: one file per command. Every error says what was attempted and what to do about it.

mod ask;
mod doctor;
mod elf;
mod guest;
mod run;
mod ss;
mod stat;

use crate::host::Host;
use crate::program::client::{AGENT_DEFAULT, AGENT_VARIABLE, THRESHOLD_BYTES, THRESHOLD_ROUNDS};
use crate::{agent, keeper};
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Socket acceleration for unmodified programs.
#[derive(Debug, Parser)]
#[command(name = "vsocket", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs a program, accelerated.
    Run {
        #[command(flatten)]
        agent: AgentSocket,
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Serves the programs of this guest.
    Agent {
        /// Where programs and tools find the agent.
        #[arg(long, default_value = AGENT_DEFAULT)]
        socket: PathBuf,
        /// In a container: the vport's socket, which the host's vsocketd serves (default: /run/vsocket/vport, if it is there).
        #[arg(long, conflicts_with = "host")]
        vport: Option<PathBuf>,
        /// In a virtual machine: its host, as vsock:PORT (default: vsock:7650, if there is /dev/vsock and no vport).
        #[arg(long)]
        host: Option<Host>,
        /// Standard input is the keeper of this host's memory: said by it to the agent that it starts.
        #[arg(long, hide = true)]
        kept: Option<Host>,
        /// A connection is upgraded once it has moved this many bytes.
        #[arg(long, default_value_t = THRESHOLD_BYTES)]
        threshold_bytes: u64,
        /// Or once its direction of travel has turned so often: twice in a round trip.
        #[arg(long, default_value_t = THRESHOLD_ROUNDS)]
        threshold_rounds: u32,
    },
    /// Lists connections: their lanes, or why they are on TCP.
    Ss {
        #[command(flatten)]
        agent: AgentSocket,
        /// As a JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Shows totals since the agent's start.
    Stat {
        #[command(flatten)]
        agent: AgentSocket,
        /// As a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Says what would stop a program here from being accelerated, and how to mend it.
    Doctor {
        #[command(flatten)]
        agent: AgentSocket,
        /// A program to look at.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

/// Which agent.
#[derive(Debug, Args)]
struct AgentSocket {
    /// The agent's socket (default: $VSOCKET_AGENT, or /run/vsocket/agent.sock).
    #[arg(long = "agent", value_name = "SOCKET")]
    socket: Option<PathBuf>,
}

impl AgentSocket {
    fn path(&self) -> PathBuf {
        let named = self.socket.clone().or_else(|| std::env::var_os(AGENT_VARIABLE).map(PathBuf::from));
        let path = named.unwrap_or_else(|| PathBuf::from(AGENT_DEFAULT));
        std::path::absolute(&path).unwrap_or(path)
    }
}

/// An error and its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

fn done(command: &str, result: Result<(), impl std::error::Error + 'static>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsocket {command}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run { agent, command } => run::run(&agent.path(), &command),
        Command::Agent { socket, vport, host, kept, threshold_bytes, threshold_rounds } => {
            let filter = tracing_subscriber::EnvFilter::try_from_default_env();
            let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
            let socket = std::path::absolute(&socket).unwrap_or(socket);
            let options =
                |way| agent::Options { socket: socket.clone(), way, threshold_bytes, threshold_rounds };
            let found =
                kept.map_or_else(|| guest::find(vport, host), |host| Ok(guest::Neighbour::Keeper(host)));
            match found {
                Ok(guest::Neighbour::Host(host)) => guest::keep(keeper::Options { host, socket }),
                Ok(neighbour) => done("agent", guest::serve(neighbour, options)),
                Err(error) => done("agent", Err::<(), _>(error)),
            }
        }
        Command::Ss { agent, json } => done("ss", ss::ss(&agent.path(), json)),
        Command::Stat { agent, json } => done("stat", stat::stat(&agent.path(), json)),
        Command::Doctor { agent, command } => doctor::doctor(&agent.path(), &command),
    }
}

/// Prints a line; a reader that has gone (`| head`) is no error.
fn print(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_dashes_is_the_program() {
        let cli = Cli::parse_from(["vsocket", "run", "--agent", "/a", "--", "prog", "--agent", "x", "-h"]);
        let Command::Run { agent, command } = cli.command else { panic!("not run") };
        assert_eq!(agent.path(), PathBuf::from("/a"));
        assert_eq!(command, ["prog", "--agent", "x", "-h"]);
    }
}
