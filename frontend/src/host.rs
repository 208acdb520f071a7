//! Where a virtual machine's host is, and how streams to it are made.

use crate::carrier::Stream;
use rustix::fd::OwnedFd;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

/// The port on which the host's front hands streams to its vsocketd, where none is named.
pub const PORT: u32 = 7650;
/// The device that says that there is AF_VSOCK.
pub const DEVICE: &str = "/dev/vsock";

/// The last port that only a privileged process may bind.
const LAST_PRIVILEGED: u32 = 1023;

/// The host of this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Host {
    /// Over AF_VSOCK, on this port of it.
    Vsock(u32),
    /// A UNIX stream listener that stands for it: for tests, on machines without the device.
    Unix(PathBuf),
}

/// Neither of the forms that [`Host`] has.
#[derive(Debug, thiserror::Error)]
#[error("want vsock:PORT, as in vsock:{PORT}")]
pub struct NotAHost;

impl FromStr for Host {
    type Err = NotAHost;

    fn from_str(text: &str) -> Result<Self, NotAHost> {
        match text.split_once(':') {
            Some(("vsock", port)) => port.parse().map(Self::Vsock).map_err(|_| NotAHost),
            Some(("unix-stream", path)) => Ok(Self::Unix(path.into())),
            _ => Err(NotAHost),
        }
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock:{port}"),
            Self::Unix(path) => write!(f, "unix-stream:{}", path.display()),
        }
    }
}

impl Host {
    /// Begins a stream to it; `privileged`: from a port that proves that its opener may bind one.
    ///
    /// # Errors
    ///
    /// No such address family or device, no right to a privileged port, or the host refuses at once.
    pub fn connect(&self, privileged: bool) -> io::Result<Stream> {
        let (domain, address) = match self {
            Self::Vsock(port) => (Domain::VSOCK, SockAddr::vsock(libc::VMADDR_CID_HOST, *port)),
            Self::Unix(path) => (Domain::UNIX, SockAddr::unix(path)?),
        };
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        if privileged && domain == Domain::VSOCK {
            bind_privileged(&socket)?;
        }
        let connecting = match socket.connect(&address) {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => true,
            Err(error) => return Err(error),
        };
        Ok(Stream::new(OwnedFd::from(socket), connecting))
    }
}

fn bind_privileged(socket: &Socket) -> io::Result<()> {
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for port in (1..=LAST_PRIVILEGED).rev() {
        result = socket.bind(&SockAddr::vsock(libc::VMADDR_CID_ANY, port));
        if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
    }
    match result {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let what = "a port below 1024, which proves a keeper, needs CAP_NET_BIND_SERVICE";
            Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_named_by_its_port() {
        assert_eq!("vsock:7650".parse::<Host>().unwrap(), Host::Vsock(7650));
        for bad in ["vsock", "vsock:", "vsock:-1", "7650", "tcp:1"] {
            assert!(bad.parse::<Host>().is_err(), "{bad}");
        }
    }
}
