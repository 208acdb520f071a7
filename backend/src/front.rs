//! A virtual machine's front: a small process that *is* the guest's vsock device, for stock QEMU and a stock guest kernel.
//!
//! It owns QEMU's vhost-user session and gives the daemon what a container would have given it: a UNIX socket per
//! `AF_VSOCK` stream that the guest opens to the vport's port on the host, and the guest's memory with the table of where
//! it is. So the daemon knows one kind of socket and may be restarted at will; the front may not, for QEMU does not
//! connect to this device again. Hence it is small, holds no policy, and trusts nothing of what the guest's driver does.
//!
//! | module | what it is for |
//! |---|---|
//! | [`packet`] | headers of vsock packets |
//! | [`streams`] | the protocol: packets in, packets, bytes and effects out; sans-IO |
//! | [`vring`] | a virtqueue in memory that is not trusted |
//! | [`session`] | QEMU's requests |
//! | [`link`] | the daemon: found, told, known to be dead |
//! | [`shell`] | the loop around them |
//!
//! One thread, no locks that two could want, no unsafe code.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

pub mod link;
pub mod packet;
pub mod session;
pub mod shell;
pub mod streams;
pub mod vring;

/// What a front has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The guest's CID.
    pub cid: u32,
    /// Where QEMU connects.
    pub socket: PathBuf,
    /// The vport's socket, where the daemon listens.
    pub daemon: PathBuf,
    /// The port that the guest calls.
    pub port: u32,
    /// How many streams the guest may have.
    pub streams: usize,
}

/// Why a front cannot run, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU's socket.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What it needs of the system.
    #[error("cannot set up the event loop")]
    System(#[source] io::Error),
    /// The loop ended without being told to.
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
}

/// Runs until told to stop.
///
/// # Errors
///
/// [`Error`].
pub fn run(options: Options) -> Result<(), Error> {
    // A descriptor per stream.
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "cannot raise the limit of open descriptors");
    }
    tracing::info!(cid = options.cid, port = options.port, socket = %options.socket.display(), "waiting for QEMU");
    let mut front = shell::Front::new(options)?;
    front.watch_signals().map_err(Error::System)?;
    front.run().map_err(Error::Wait)
}
