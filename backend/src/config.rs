//! The daemon's configuration: first exactly what the operator wrote ([`raw`]), then what it means ([`Config`]).
//!
//! Everything is checked before anything starts, and every error names file, line and key. Paths are taken as they are,
//! relative to the daemon's working directory; whether files can be read is found out by those who read them.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use crate::directory::Directory;
use crate::peer::message::HostName;

mod check;
pub mod raw;

/// A vport may have this many accelerated connections unless it says otherwise: with the default ring, 2 GiB of ring
/// memory, twice what the largest workload of the demo opens.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 1024;

/// One ring: holds 8 × 128 KiB, so that sender and receiver work apart, and a few of them still fit a cache.
pub const DEFAULT_RING_BYTES: u32 = 256 << 10;

/// Smaller rings cannot hold a segment and its successor.
pub const MIN_RING_BYTES: u32 = 16 << 10;

/// Larger rings gain nothing and cost memory per connection.
pub const MAX_RING_BYTES: u32 = 64 << 20;

/// The vsock port on the host that guests call, unless the vport says otherwise.
pub const DEFAULT_PORT: u32 = 7650;

/// A guest may have this many vsock streams unless its vport says otherwise: the agent's, and doorbells of many programs.
pub const DEFAULT_MAX_STREAMS: u32 = 1024;

/// The configuration as the daemon means it.
#[derive(Debug, Clone)]
pub struct Config {
    /// This host's name, as peers know it.
    pub host: HostName,
    /// The operator's UNIX socket.
    pub control: PathBuf,
    /// How backends meet; `None` on a host that stands alone.
    pub backends: Option<Backends>,
    /// The guests.
    pub vports: Vec<Vport>,
    /// Who is where, other hosts' guests only.
    pub directory: Directory,
}

/// Everything between hosts.
#[derive(Debug, Clone)]
pub struct Backends {
    /// Certificates.
    pub tls: Tls,
    /// Where other backends' control connections arrive.
    pub listen: SocketAddr,
    /// What carries data.
    pub fabric: Fabric,
    /// The other backends.
    pub peers: Vec<Peer>,
}

/// Paths of PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The authority both ends must be signed by.
    pub ca: PathBuf,
    /// This host's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// The fabric of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fabric {
    /// Verbs in user space over TCP.
    Soft {
        /// Where queue pairs are dialled.
        listen: SocketAddr,
    },
    /// An RDMA device, also while there is none.
    Verbs(Device),
    /// An RDMA device if there is one at the start, else as `Soft`.
    Auto {
        /// Where queue pairs are dialled without a device.
        listen: SocketAddr,
        /// Which device.
        device: Device,
    },
}

impl Fabric {
    /// This host's address in the underlay, if it is known.
    pub fn underlay(&self) -> Option<IpAddr> {
        match self {
            Self::Soft { listen } | Self::Auto { listen, .. } => Some(listen.ip()),
            Self::Verbs(device) => device.underlay.or(device.address),
        }
    }
}

/// Which RDMA device is meant; what is absent may be anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// Its name, such as `mlx5_0`.
    pub name: Option<String>,
    /// The network interface under it.
    pub netdev: Option<String>,
    /// The address that its GID holds.
    pub address: Option<IpAddr>,
    /// The underlay's address, of which a GID is preferred.
    pub underlay: Option<IpAddr>,
}

/// Another backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name, which its certificate must bear.
    pub host: HostName,
    /// Its end of the overlay.
    pub vtep: IpAddr,
    /// Where its control connection listens.
    pub control: SocketAddr,
}

/// One guest's attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vport {
    /// Its name, for the operator.
    pub name: String,
    /// Its tenant network.
    pub vni: u32,
    /// Its inner MAC.
    pub mac: Mac,
    /// Its inner addresses.
    pub addresses: Vec<IpAddr>,
    /// The UNIX socket its agent connects to.
    pub socket: PathBuf,
    /// How many connections may be accelerated at a time.
    pub max_connections: u32,
    /// The size of each ring, a power of two.
    pub ring_bytes: u32,
    /// Whether its connections on this host may share memory with the other guest. If not, they go through the backend,
    /// which copies: for isolation, as what two guests map neither can be kept from writing. A virtual machine shares none
    /// anyhow.
    pub direct: bool,
    /// What a guest that is a virtual machine has instead of a mounted socket.
    pub machine: Option<Machine>,
}

/// The vsock device of a virtual machine, which `vsocketd vm-front` is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The guest's CID.
    pub cid: u32,
    /// The UNIX socket that QEMU connects to.
    pub front: PathBuf,
    /// The vsock port on the host that the guest's agent calls.
    pub port: u32,
    /// How many streams the guest may have at a time.
    pub max_streams: u32,
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Reads `02:00:00:64:00:01`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next()?;
            let hex = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            *octet = u8::from_str_radix(part, 16).ok().filter(|_| hex)?;
        }
        parts.next().is_none().then_some(Self(octets))
    }

    /// Whether it names one station.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file itself.
    #[error("cannot read {}", file.display())]
    Read {
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something in it.
    #[error("{}:{line}: {key}: {what}", file.display())]
    Invalid {
        /// Which file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The key, with its table.
        key: String,
        /// What is wrong, and what would be right.
        what: String,
    },
}

impl Config {
    /// Reads and checks a file.
    pub fn load(file: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(file).map_err(|source| Error::Read { file: file.to_owned(), source })?;
        Self::parse(file, &text)
    }

    /// Checks a text; `file` is for the error messages.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Error> {
        let raw = raw::Config::parse(text);
        raw.and_then(check::check).map_err(|raw::Fault { at, key, what }| {
            let before = text.get(..at.start.min(text.len())).unwrap_or(text);
            let line = before.bytes().filter(|&b| b == b'\n').count() + 1;
            Error::Invalid { file: file.to_owned(), line, key, what }
        })
    }

    /// The peer of that name.
    pub fn peer(&self, host: &HostName) -> Option<&Peer> {
        self.backends.as_ref()?.peers.iter().find(|peer| peer.host == *host)
    }
}

#[cfg(test)]
mod tests;
