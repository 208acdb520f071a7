//! The command line of `vsocketd`.

#![forbid(unsafe_code)]

use std::error::Error as _;
use std::io::IsTerminal;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::capture::FlowFilter;
use crate::config::Config;
#[cfg(feature = "vm")]
use crate::front;
use crate::{capture, certs, config, daemon, operator};

/// What a build without verbs says of itself.
const VERSION: &str = if cfg!(feature = "verbs") {
    concat!(env!("CARGO_PKG_VERSION"), " (fabrics: verbs, soft)")
} else {
    concat!(env!("CARGO_PKG_VERSION"), " (fabrics: soft; built without verbs)")
};

/// The host's daemon: carries accelerated TCP connections between guests, and between hosts.
#[derive(Debug, Parser)]
#[command(name = "vsocketd", version = VERSION, args_conflicts_with_subcommands = true)]
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
    /// List the RDMA devices, ports and addresses that could be used, and why the others cannot.
    Devices {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what a running daemon does.
    Stat {
        #[command(flatten)]
        control: Control,

        /// As JSON, whole.
        #[arg(long)]
        json: bool,

        /// Each connection, instead of the totals.
        #[arg(long)]
        connections: bool,
    },
    /// Move a vport's connections to kernel TCP, and keep them there.
    Drain {
        #[command(flatten)]
        control: Control,

        /// The vport's name.
        vport: String,
    },
    /// Write the segments between this host and others to a pcap file, as VXLAN packets.
    ///
    /// Both directions, until interrupted or a limit is reached. Connections on a direct lane or a relay stay on this host
    /// and are not encapsulated, so they are not captured. Example: vsocketd capture --vport a -w - | tshark -r -
    Capture {
        #[command(flatten)]
        control: Control,

        /// Only this vport, by its name.
        #[arg(long)]
        vport: Option<String>,

        /// Only this tenant network.
        #[arg(long)]
        vni: Option<u32>,

        /// Only these connections, seen from the guest of this host: each end ADDR, ADDR:PORT or [ADDR]:PORT, with *
        /// for any; '*-198.51.100.3:6379'.
        #[arg(long, value_name = "LOCAL-REMOTE", default_value = "*-*", hide_default_value = true)]
        flow: FlowFilter,

        /// Where to; - is standard output.
        #[arg(short = 'w', long = "write", value_name = "FILE")]
        file: PathBuf,

        /// End before the file is longer than that; K, M and G may follow the number.
        #[arg(long, value_name = "MAX", default_value = "64M", value_parser = size)]
        bytes: u64,

        /// Keep at most so many bytes of each packet.
        #[arg(long, value_name = "N", default_value_t = 262_144)]
        snaplen: u32,

        /// End after so many packets.
        #[arg(long, value_name = "N")]
        count: Option<u64>,

        /// What may wait for the file before segments are dropped.
        #[arg(long, value_name = "BYTES", default_value = "32M", value_parser = size)]
        buffer: u64,
    },
    /// Be the vsock device of a virtual machine, for QEMU's vhost-user-vsock-pci; one process per machine.
    ///
    /// The vport is one of the configuration that has cid and front, or is described here. Runs apart from the daemon,
    /// and through its restarts: while there is no daemon, the guest's streams are refused.
    #[cfg(feature = "vm")]
    VmFront(Front),
    /// Let a drained vport's connections return to their lanes.
    Undrain {
        #[command(flatten)]
        control: Control,

        /// The vport's name.
        vport: String,
    },
}

#[cfg(feature = "vm")]
#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("which").required(true).args(["config", "cid"]))]
struct Front {
    /// The daemon's configuration.
    #[arg(long, value_name = "FILE", requires = "vport")]
    config: Option<PathBuf>,

    /// The vport's name in it.
    #[arg(long, value_name = "NAME", requires = "config")]
    vport: Option<String>,

    /// The guest's CID, 3 or more.
    #[arg(long, requires_all = ["socket", "daemon"], value_parser = clap::value_parser!(u32).range(3..4_294_967_295))]
    cid: Option<u32>,

    /// The UNIX socket that QEMU connects to.
    #[arg(long, value_name = "SOCKET", requires = "cid")]
    socket: Option<PathBuf>,

    /// The vport's socket, where the daemon listens.
    #[arg(long, value_name = "SOCKET", requires = "cid")]
    daemon: Option<PathBuf>,

    /// The vsock port on the host that the guest calls.
    #[arg(long, requires = "cid", default_value_t = config::DEFAULT_PORT)]
    port: u32,

    /// How many streams the guest may have at a time.
    #[arg(long, requires = "cid", value_name = "N", default_value_t = config::DEFAULT_MAX_STREAMS)]
    max_streams: u32,
}

#[cfg(feature = "vm")]
impl Front {
    fn options(self) -> Result<front::Options, Error> {
        if let (Some(cid), Some(socket), Some(daemon)) = (self.cid, self.socket, self.daemon) {
            return Ok(front::Options {
                cid,
                socket,
                daemon,
                port: self.port,
                streams: self.max_streams as usize,
            });
        }
        let (Some(file), Some(name)) = (self.config, self.vport) else {
            return Err(Error::NoMachine(String::new()));
        };
        let vport = Config::load(&file)?.vports.into_iter().find(|vport| vport.name == name);
        let Some((config::Machine { cid, front, port, max_streams }, daemon)) =
            vport.and_then(|vport| Some((vport.machine?, vport.socket)))
        else {
            return Err(Error::NoMachine(name));
        };
        Ok(front::Options { cid, socket: front, daemon, port, streams: max_streams as usize })
    }
}

#[derive(Debug, clap::Args)]
struct Control {
    /// The daemon's control socket; without it VSOCKETD_CONTROL, or /run/vsocket/vsocketd.sock.
    #[arg(long = "control", value_name = "SOCKET")]
    path: Option<PathBuf>,
}

impl Control {
    fn path(self) -> PathBuf {
        let named = self.path.or_else(|| std::env::var_os("VSOCKETD_CONTROL").map(PathBuf::from));
        named.unwrap_or_else(|| PathBuf::from("/run/vsocket/vsocketd.sock"))
    }
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
    #[error(transparent)]
    Tool(#[from] operator::ToolError),
    #[error(transparent)]
    Capture(#[from] capture::Error),
    #[cfg(feature = "vm")]
    #[error(transparent)]
    Front(#[from] front::Error),
    #[cfg(feature = "vm")]
    #[error("no vport '{0}' with cid and front in the configuration")]
    NoMachine(String),
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
    if let Some(command) = arguments.command {
        return obey(command);
    }
    let Some(file) = arguments.config else { return Ok(()) };
    let config = Config::load(&file)?;
    if !arguments.check {
        log();
        daemon::run(config)?;
    }
    Ok(())
}

/// Prints a line; a reader that has gone (`| head`) is no error.
macro_rules! say {
    ($($what:tt)*) => { { let _ = writeln!(std::io::stdout(), $($what)*); } };
}

fn obey(command: Command) -> Result<(), Error> {
    match command {
        Command::Certs { out, hosts } => {
            for file in certs::create(&out, &hosts)? {
                say!("{}", file.display());
            }
        }
        Command::Stat { control, json, connections } => {
            let answer = operator::stat(&control.path(), connections)?;
            say!("{}", if json { answer.to_string() } else { operator::as_text(&answer) });
        }
        Command::Devices { json } => devices(json),
        Command::Drain { control, vport } => operator::drain(&control.path(), &vport, true)?,
        Command::Capture { control, vport, vni, flow, file, bytes, snaplen, count, buffer } => {
            let count = count.unwrap_or(u64::MAX);
            let options = capture::Options { vport, vni, flow, file, bytes, snaplen, count, buffer };
            capture::run(&control.path(), &options)?;
        }
        #[cfg(feature = "vm")]
        Command::VmFront(front) => {
            let options = front.options()?;
            log();
            front::run(options)?;
        }
        Command::Undrain { control, vport } => operator::drain(&control.path(), &vport, false)?,
    }
    Ok(())
}

/// A number of bytes: `65536`, `64K`, `64M`, `1G`.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    number.ok_or_else(|| format!("'{text}' is no number of bytes: want digits, and K, M or G after them"))
}

/// Lists what there is, the device that would be chosen first among what is usable.
#[cfg(feature = "verbs")]
fn devices(json: bool) {
    use crate::fabric::verbs::{select::Wanted, station};
    use serde_json::{Value, json};

    let (all, chosen) = station::survey(&Wanted::default());
    let row = |candidate: &crate::fabric::verbs::select::Candidate| {
        let usable = candidate.unusable.clone().unwrap_or_else(|| "usable".to_owned());
        let chosen = chosen.as_ref() == Some(candidate);
        json!({
            "device": candidate.device,
            "port": candidate.port,
            "index": candidate.index,
            "kind": candidate.transport(),
            "netdev": candidate.netdev,
            "address": candidate.address().to_string(),
            "state": if chosen { "chosen".to_owned() } else { usable },
        })
    };
    let rows: Value = all.iter().map(row).collect();
    if json {
        say!("{rows}");
    } else if all.is_empty() {
        say!("There is no RDMA device; the fabric is soft. Soft-RoCE makes one of a network interface:");
        say!("    modprobe rdma_rxe && rdma link add rxe0 type rxe netdev eth0");
    } else {
        say!("{}", operator::as_text(&rows));
    }
}

#[cfg(not(feature = "verbs"))]
fn devices(json: bool) {
    say!("{}", if json { "[]" } else { "This vsocketd is built without verbs; the fabric is soft." });
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
        assert!(parse(&["stat", "--control", "s", "--json"]).is_ok_and(|a| a.command.is_some()));
        assert!(parse(&["stat", "--connections"]).is_ok());
        assert!(parse(&["drain", "--control", "s", "a"]).is_ok());
        assert!(parse(&["undrain", "a"]).is_ok());
        assert!(parse(&["drain"]).is_err());
        assert!(parse(&["capture", "--vport", "a", "--flow", "*-*:80", "-w", "-", "--bytes", "1G"]).is_ok());
        assert!(parse(&["capture"]).is_err());
        if cfg!(feature = "vm") {
            assert!(parse(&["vm-front", "--config", "f", "--vport", "a"]).is_ok());
            assert!(
                parse(&["vm-front", "--cid", "3", "--socket", "s", "--daemon", "d", "--port", "9"]).is_ok()
            );
            assert!(parse(&["vm-front", "--cid", "2", "--socket", "s", "--daemon", "d"]).is_err());
            assert!(parse(&["vm-front", "--cid", "3", "--socket", "s"]).is_err());
            assert!(parse(&["vm-front", "--config", "f"]).is_err());
            assert!(parse(&["vm-front"]).is_err());
        }
        assert!(parse(&["capture", "-w", "f", "--flow", "80"]).is_err());
        assert!(parse(&["capture", "-w", "f", "--bytes", "64MB"]).is_err());
        assert!(parse(&["--config", "f", "certs", "--out", "d", "h1"]).is_err());
    }
}
