//! The control protocol's carrier in a guest: a UNIX SEQPACKET socket, one message a packet, descriptors beside it.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::io;
use std::mem::MaybeUninit;
use std::path::Path;
#[cfg(feature = "daemon")]
pub use stream::Stream;
use vsocket_channel::message::{MAX_FDS, MESSAGE_LEN, Malformed, Message};

#[cfg(feature = "daemon")]
mod stream;

/// How many may wait to be accepted.
pub const BACKLOG: i32 = 1024;

/// One end of a control connection. Never blocks.
#[derive(Debug)]
pub struct Carrier(OwnedFd);

/// What arrived.
#[derive(Debug)]
pub struct Packet {
    /// The message, or what is wrong with it.
    pub message: Result<Message, Malformed>,
    /// The descriptors beside it, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

impl Carrier {
    /// Connects to the listener at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = socket()?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(Self(fd))
    }

    /// The same connection under a high number: the low ones are the application's.
    #[must_use]
    pub fn lifted(self) -> Self {
        Self(crate::program::descriptors::lift(self.0))
    }

    /// A listener at `path`, which must not exist.
    pub fn listen(path: &Path) -> io::Result<OwnedFd> {
        let fd = socket()?;
        rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&fd, BACKLOG)?;
        Ok(fd)
    }

    /// The next connection of a listener.
    pub fn accept(listener: impl AsFd) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(Self(rustix::net::accept_with(listener, flags)?))
    }

    /// Two ends of one connection.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(a), Self(b)))
    }

    /// Sends a message and descriptors.
    pub fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(rustix::io::Errno::INVAL.into());
        }
        let image = message.encode();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&self.0, &[io::IoSlice::new(&image)], &mut control, flags)?;
        Ok(())
    }

    /// The next packet; `None` at the end of the connection. `WouldBlock` when none is there.
    pub fn recv(&self) -> io::Result<Option<Packet>> {
        let mut image = [0; MESSAGE_LEN + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got =
            rustix::net::recvmsg(&self.0, &mut [io::IoSliceMut::new(&mut image)], &mut control, flags)?.bytes;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got == 0 {
            return Ok(None);
        }
        Ok(Some(Packet { message: Message::decode(&image[..got]), fds }))
    }
}

impl From<OwnedFd> for Carrier {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Carrier> for OwnedFd {
    fn from(carrier: Carrier) -> Self {
        carrier.0
    }
}

impl AsFd for Carrier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_together() {
        let path = std::env::temp_dir().join(format!("vsocket-carrier-{}", std::process::id()));
        let listener = Carrier::listen(&path).unwrap();
        let a = Carrier::connect(&path).unwrap();
        let b = Carrier::accept(&listener).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(b.recv().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        a.send(&Message::Ping { n: 3 }, &[listener.as_fd(), listener.as_fd()]).unwrap();
        rustix::net::send(&a, b"short", SendFlags::empty()).unwrap();
        let first = b.recv().unwrap().unwrap();
        assert_eq!((first.message, first.fds.len()), (Ok(Message::Ping { n: 3 }), 2));
        assert_eq!(b.recv().unwrap().unwrap().message, Err(Malformed::Length(5)));
        drop(a);
        assert!(b.recv().unwrap().is_none());
    }
}
