//! Control messages over a UNIX SEQPACKET socket: one message per datagram, descriptors beside it. Or over a stream, for
//! an agent in a virtual machine: one message behind another, and no descriptors.
//!
//! A carrier never waits. What the other end does not take at once is kept, up to a bound; who does not read at all is
//! hung up on. What arrives is checked whole before anything of it is used; descriptors that nobody asked for are not
//! accepted.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, recv, recvmsg, sendmsg, socket_with,
};
use vsocket_channel::message::{MAX_FDS, MESSAGE_LEN, Malformed, Message};

/// Messages that may wait for one receiver, besides those that its connections are owed.
const OUTBOX: usize = 4096;

/// Why a carrier is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum Gone {
    /// The other end has closed.
    #[error("closed")]
    Closed,
    /// It said something that is no message.
    #[error("malformed: {0}")]
    Malformed(Malformed),
    /// It does not read what it is sent.
    #[error("not reading")]
    NotReading,
    /// The socket failed.
    #[error("socket")]
    Io(#[source] io::Error),
}

impl Gone {
    /// Its name for the counters; a plain end has none.
    pub fn name(&self) -> Option<&'static str> {
        match self {
            Self::Closed => None,
            Self::Malformed(malformed) => Some(malformed.name()),
            Self::NotReading => Some("agent-not-reading"),
            Self::Io(_) => Some("agent-socket"),
        }
    }
}

/// Descriptors that go beside a message.
pub type Fds = Vec<Arc<OwnedFd>>;

/// One end of a control connection.
#[derive(Debug)]
pub struct Carrier {
    socket: OwnedFd,
    outbox: VecDeque<([u8; MESSAGE_LEN], Fds)>,
    /// How much of the first message in the outbox has been sent: on a stream, perhaps a part.
    sent: usize,
    /// On a stream, the beginning of a message.
    beginning: Option<Vec<u8>>,
    limit: usize,
}

impl From<OwnedFd> for Carrier {
    /// A connected, non-blocking SEQPACKET socket.
    fn from(socket: OwnedFd) -> Self {
        Self { socket, outbox: VecDeque::new(), limit: OUTBOX, sent: 0, beginning: None }
    }
}

fn seqpacket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags | SocketFlags::CLOEXEC, None)?)
}

/// Listens at `path`. A socket that a dead daemon left there is replaced; a live one is an error.
///
/// # Errors
///
/// What the socket calls say.
pub fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let listener = seqpacket(SocketFlags::NONBLOCK)?;
    let address = SocketAddrUnix::new(path)?;
    match bind(&listener, &address) {
        Err(Errno::ADDRINUSE) if is_dead(&address)? => {
            std::fs::remove_file(path)?;
            bind(&listener, &address)?;
        }
        other => other?,
    }
    listen(&listener, 64)?;
    Ok(listener)
}

fn is_dead(address: &SocketAddrUnix) -> io::Result<bool> {
    let probe = seqpacket(SocketFlags::NONBLOCK)?;
    Ok(matches!(connect(&probe, address), Err(Errno::CONNREFUSED)))
}

/// The next connection, if there is one.
///
/// # Errors
///
/// What `accept` says.
pub fn accept(listener: impl AsFd) -> io::Result<Option<Carrier>> {
    match accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
        Ok(socket) => Ok(Some(socket.into())),
        Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Connects to a daemon and waits for each answer: for tools and tests.
///
/// # Errors
///
/// What the socket calls say.
pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket(SocketFlags::empty())?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Connects to a daemon without waiting.
///
/// # Errors
///
/// What the socket calls say, also if the daemon has too many callers at the moment.
pub fn reach(path: &Path) -> io::Result<Carrier> {
    let socket = seqpacket(SocketFlags::NONBLOCK)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

impl AsFd for Carrier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Carrier {
    /// A connected, non-blocking stream socket.
    pub fn stream(socket: OwnedFd) -> Self {
        Self { beginning: Some(Vec::with_capacity(MESSAGE_LEN)), ..socket.into() }
    }

    /// Whether descriptors can go beside messages.
    pub fn passes_descriptors(&self) -> bool {
        self.beginning.is_none()
    }

    /// The socket, without what was still to be sent.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// The receiver has up to so many connections, to each of which something may happen at the same moment.
    #[must_use]
    pub fn for_connections(self, most: u32) -> Self {
        Self { limit: OUTBOX + 2 * most as usize, ..self }
    }

    /// For registration with the event loop.
    pub fn raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The next message, if one is there.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub fn receive(&mut self) -> Result<Option<Message>, Gone> {
        if let Some(beginning) = &mut self.beginning {
            return receive_more(self.socket.as_fd(), beginning);
        }
        let mut image = [0; MESSAGE_LEN];
        // Without room for them the kernel drops descriptors. TRUNC gives the true length of one that is too long.
        let len = match recv(&self.socket, &mut image, RecvFlags::TRUNC | RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => return Err(Gone::Closed),
            Ok((_, len)) => len,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(Gone::Io(error.into())),
        };
        let image = image.get(..len).ok_or(Gone::Malformed(Malformed::Length(len)))?;
        Message::decode(image).map(Some).map_err(Gone::Malformed)
    }

    /// The next message, if one is there, and the descriptor beside it. More than one do not arrive at all.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub fn receive_with(&self) -> Result<Option<(Message, Option<OwnedFd>)>, Gone> {
        let mut image = [0; MESSAGE_LEN];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let len = match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut image)], &mut control, flags) {
            Ok(RecvMsg { bytes: 0, .. }) | Err(Errno::CONNRESET) => return Err(Gone::Closed),
            Ok(received) => received.bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(Gone::Io(error.into())),
        };
        let fds = control.drain().filter_map(|beside| match beside {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fd = fds.flatten().next();
        let image = image.get(..len).ok_or(Gone::Malformed(Malformed::Length(len)))?;
        let message = Message::decode(image).map_err(Gone::Malformed)?;
        Ok(Some((message, fd)))
    }

    /// Sends a message, now or when the other end takes it.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub fn send(&mut self, message: &Message, fds: Fds) -> Result<(), Gone> {
        if !fds.is_empty() && !self.passes_descriptors() {
            return Err(Gone::Io(io::ErrorKind::InvalidInput.into()));
        }
        let image = message.encode();
        if self.outbox.is_empty() {
            self.sent = send_now(self.socket.as_fd(), &image, &fds)?;
            if self.sent == MESSAGE_LEN {
                self.sent = 0;
                return Ok(());
            }
        }
        if self.outbox.len() >= self.limit {
            return Err(Gone::NotReading);
        }
        self.outbox.push_back((image, fds));
        Ok(())
    }

    /// The socket takes more: sends what waits.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub fn flush(&mut self) -> Result<(), Gone> {
        while let Some((image, fds)) = self.outbox.front() {
            self.sent += send_now(self.socket.as_fd(), &image[self.sent..], fds)?;
            if self.sent < MESSAGE_LEN {
                break;
            }
            self.sent = 0;
            self.outbox.pop_front();
        }
        Ok(())
    }
}

/// Reads on from a stream, until a message is whole.
fn receive_more(socket: BorrowedFd<'_>, beginning: &mut Vec<u8>) -> Result<Option<Message>, Gone> {
    loop {
        let mut rest = [0; MESSAGE_LEN];
        let wanted = MESSAGE_LEN - beginning.len();
        match recv(socket, &mut rest[..wanted], RecvFlags::DONTWAIT) {
            Ok((_, 0)) if beginning.is_empty() => return Err(Gone::Closed),
            Ok((_, 0)) => return Err(Gone::Malformed(Malformed::Length(beginning.len()))),
            Ok((_, len)) => beginning.extend_from_slice(&rest[..len]),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(Errno::CONNRESET) => return Err(Gone::Closed),
            Err(error) => return Err(Gone::Io(error.into())),
        }
        if beginning.len() == MESSAGE_LEN {
            let message = Message::decode(beginning).map_err(Gone::Malformed);
            beginning.clear();
            return message.map(Some);
        }
    }
}

/// Sends one datagram, or what a stream takes of it; says how much that was.
fn send_now(socket: BorrowedFd<'_>, image: &[u8], fds: &[Arc<OwnedFd>]) -> Result<usize, Gone> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(Gone::Io(io::ErrorKind::InvalidInput.into()));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match sendmsg(socket, &[IoSlice::new(image)], &mut control, flags) {
        Ok(len) => Ok(len),
        // TOOMANYREFS: the receiver has too many descriptors under way; it must read first.
        Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::TOOMANYREFS) => Ok(0),
        Err(Errno::PIPE | Errno::CONNRESET) => Err(Gone::Closed),
        Err(error) => Err(Gone::Io(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{send, socketpair};

    fn pair() -> (Carrier, Carrier) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (a.into(), b.into())
    }

    #[test]
    fn what_is_not_taken_at_once_comes_later() {
        let (mut a, mut b) = pair();
        for n in 0..1000 {
            a.send(&Message::Ping { n }, vec![]).unwrap();
        }
        let mut seen = 0;
        while seen < 1000 {
            a.flush().unwrap();
            while let Some(message) = b.receive().unwrap() {
                assert_eq!(message, Message::Ping { n: seen });
                seen += 1;
            }
        }
    }

    #[test]
    fn who_does_not_read_is_hung_up_on() {
        let (mut a, _b) = pair();
        let result = (0..2 * OUTBOX as u64).try_for_each(|n| a.send(&Message::Ping { n }, vec![]));
        assert!(matches!(result, Err(Gone::NotReading)));
    }

    #[test]
    fn all_connections_of_a_guest_may_be_withdrawn_at_once() {
        let (a, _b) = pair();
        let mut a = a.for_connections(10_000);
        for n in 0..20_000 {
            a.send(&Message::Ping { n }, vec![]).unwrap();
        }
    }

    #[test]
    fn malformed_images_have_names() {
        let good = Message::Ping { n: 1 }.encode();
        let with = |at: usize, value: u8| {
            let mut image = good.to_vec();
            image[at] = value;
            image
        };
        let table = [
            (good[..127].to_vec(), "message-length"),
            ([&good[..], &[0]].concat(), "message-length"),
            (vec![1], "message-length"),
            (with(0, 0), "message-magic"),
            (with(4, 9), "message-version"),
            (with(7, 1), "message-kind"),
        ];
        for (image, name) in table {
            let (a, mut b) = pair();
            send(&a.socket, &image, SendFlags::empty()).unwrap();
            assert_eq!(b.receive().unwrap_err().name(), Some(name));
        }
    }

    #[test]
    fn a_descriptor_comes_along() {
        let (mut a, b) = pair();
        let (fd, other) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let message = Message::FrontWelcome { boot: 3 };
        a.send(&message, vec![Arc::new(fd)]).unwrap();
        a.send(&message, vec![]).unwrap();
        let (first, fd) = b.receive_with().unwrap().unwrap();
        assert_eq!(first, message);
        send(fd.unwrap(), b"x", SendFlags::empty()).unwrap();
        assert_eq!(recv(other, &mut [0; 2], RecvFlags::empty()).unwrap().1, 1);
        assert!(matches!(b.receive_with(), Ok(Some((_, None)))));
        assert!(matches!(b.receive_with(), Ok(None)));
        drop(a);
        assert!(matches!(b.receive_with(), Err(Gone::Closed)));
    }

    #[test]
    fn an_end_is_no_fault() {
        let (a, mut b) = pair();
        drop(a);
        assert!(matches!(b.receive(), Err(Gone::Closed)));
        assert!(matches!(b.send(&Message::Ping { n: 1 }, vec![]), Err(Gone::Closed)));
    }

    #[test]
    fn a_stream_cuts_messages_anywhere() {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let mut b = Carrier::stream(far);
        let (one, two) = (Message::Ping { n: 1 }, Message::Hello { pid: 2 });
        let bytes = [one.encode(), two.encode()].concat();
        for part in bytes[..250].chunks(50) {
            send(&near, part, SendFlags::empty()).unwrap();
        }
        assert_eq!(b.receive().unwrap(), Some(one));
        assert_eq!(b.receive().unwrap(), None);
        send(&near, &bytes[250..], SendFlags::empty()).unwrap();
        assert_eq!(b.receive().unwrap(), Some(two));
        assert!(b.send(&one, vec![Arc::new(near.try_clone().unwrap())]).is_err(), "no descriptors");
        let mut a = Carrier::stream(near);
        // Far more than a socket holds.
        for n in 0..3000 {
            b.send(&Message::Ping { n }, vec![]).unwrap();
        }
        let mut seen = 0;
        while seen < 3000 {
            b.flush().unwrap();
            while let Some(message) = a.receive().unwrap() {
                assert_eq!(message, Message::Ping { n: seen });
                seen += 1;
            }
        }
        send(&a.socket, &bytes[..7], SendFlags::empty()).unwrap();
        drop(a);
        assert!(matches!(b.receive(), Err(Gone::Malformed(Malformed::Length(7)))));
    }

    #[test]
    fn a_dead_daemons_socket_is_replaced_and_a_live_ones_not() {
        let dir = std::env::temp_dir().join(format!("vsocket-carrier-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("socket");
        let first = listen_at(&path).unwrap();
        assert!(listen_at(&path).is_err());
        drop(first);
        assert!(listen_at(&path).is_ok());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
