//! The command line of `vsocketd`.

#![forbid(unsafe_code)]

use std::error::Error as _;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::{certs, config, daemon};

/// The host's daemon: carries accelerated TCP connections between guests, and between hosts.
#[derive(Debug, Parser)]
#[command(name = "vsocketd", version, args_conflicts_with_subcommands = true)]
#[command(group = ArgGroup::new("what").required(true).args(["config"]))]
struct Arguments {
    /// Run with this configuration.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Only check the configuration.
    #[arg(long, requires = "config")]
    check: bool,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a certificate authority and certificates for the hosts of a lab.
    Certs {
        /// The directory they go to; nothing in it is overwritten.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,

        /// Each host's name, as `host` in its configuration.
        #[arg(required = true, value_name = "HOST")]
        hosts: Vec<String>,
    },
}

/// What can go wrong, with its cause.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Certs(#[from] certs::Error),
    #[error(transparent)]
    Daemon(#[from] daemon::Error),
}

/// Does what the arguments say. Errors go to standard error, cause by cause, once.
pub fn run() -> ExitCode {
    match dispatch(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("vsocketd: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: Arguments) -> Result<(), Error> {
    if let Some(Command::Certs { out, hosts }) = arguments.command {
        for file in certs::create(&out, &hosts)? {
            println!("{}", file.display());
        }
        return Ok(());
    }
    let Some(file) = arguments.config else { return Ok(()) };
    let config = Config::load(&file)?;
    if !arguments.check {
        log();
        daemon::run(config)?;
    }
    Ok(())
}

/// Logs to standard error; `VSOCKETD_LOG` chooses levels (`info`; `vsocket_backend::peer=debug`).
fn log() {
    let filter = EnvFilter::try_from_env("VSOCKETD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(["vsocketd"].iter().chain(words))
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn one_thing_at_a_time() {
        assert!(parse(&["--config", "f"]).is_ok_and(|a| a.config.is_some() && !a.check));
        assert!(parse(&["--config", "f", "--check"]).is_ok_and(|a| a.check));
        assert!(parse(&["certs", "--out", "d", "h1", "h2"]).is_ok_and(|a| a.command.is_some()));
        assert!(parse(&[]).is_err());
        assert!(parse(&["--check"]).is_err());
        assert!(parse(&["certs", "--out", "d"]).is_err());
        assert!(parse(&["--config", "f", "certs", "--out", "d", "h1"]).is_err());
    }
}
