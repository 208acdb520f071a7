//! What this guest is: a container, which finds its backend by the vport's socket, or a virtual machine, which finds it by
//! streams to its host and has a keeper.

use super::chain;
use crate::agent::{self, Way};
use crate::host::{self, Host};
use crate::keeper;
use rustix::fd::OwnedFd;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Where a container's vport is looked for, if none is named.
const VPORT: &str = "/run/vsocket/vport";

/// How the backend is reached.
#[derive(Debug)]
pub enum Neighbour {
    /// The vport's socket.
    Vport(PathBuf),
    /// A virtual machine's host.
    Host(Host),
    /// The same, by way of a keeper on standard input.
    Keeper(Host),
}

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing is named, and nothing is found.
    #[error(
        "no way to a vsocketd: there is neither {VPORT} (in a container: mount the vport's socket there, or name it by \
         --vport) nor {} (in a virtual machine: give it a vsock device, or load its driver; --host names a port)",
        host::DEVICE
    )]
    Nowhere,
    /// The keeper's socket.
    #[error("cannot take the keeper's socket from standard input")]
    Keeper(#[source] io::Error),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] agent::Error),
}

/// What was named, or what is there.
pub fn find(vport: Option<PathBuf>, host: Option<Host>) -> Result<Neighbour, Error> {
    match (vport, host) {
        (Some(path), _) => Ok(Neighbour::Vport(path)),
        (None, Some(host)) => Ok(Neighbour::Host(host)),
        (None, None) if Path::new(VPORT).exists() => Ok(Neighbour::Vport(VPORT.into())),
        (None, None) if Path::new(host::DEVICE).exists() => Ok(Neighbour::Host(Host::Vsock(host::PORT))),
        (None, None) => Err(Error::Nowhere),
    }
}

/// Runs the keeper, which runs the agent.
pub fn keep(options: keeper::Options) -> ExitCode {
    match keeper::run(options) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("vsocket agent: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Runs an agent.
pub fn serve(neighbour: Neighbour, options: impl FnOnce(Way) -> agent::Options) -> Result<(), Error> {
    let way = match neighbour {
        Neighbour::Vport(path) => Way::Vport(path),
        Neighbour::Host(host) | Neighbour::Keeper(host) => {
            Way::Machine { host, keeper: keeper_socket().map_err(Error::Keeper)? }
        }
    };
    Ok(agent::run(options(way))?)
}

/// Takes the keeper's socket from where it was inherited, and leaves nothing there.
fn keeper_socket() -> io::Result<OwnedFd> {
    // This process was started by a name that says nothing.
    let _ = rustix::thread::set_name(c"vsocket");
    let keeper = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let nothing = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nothing)?;
    Ok(keeper)
}
