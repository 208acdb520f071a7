//! What the tests of the agent share: a program that the test plays, and what it does with a connection.
// Each test uses some of it.
#![allow(dead_code)]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::SendFlags;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};
use vsocket_channel::message::Message;
use vsocket_frontend::carrier::{Carrier, Packet};
use vsocket_frontend::endpoint::Endpoint;
use vsocket_frontend::memory::Records;
use vsocket_frontend::record::Record;

pub const VSOCKET: &str = env!("CARGO_BIN_EXE_vsocket");
pub const SOON: Duration = Duration::from_secs(5);

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < until, "in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn readable(fd: impl AsFd, within: Duration) -> bool {
    let limit = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).unwrap() > 0
}

pub fn packet(carrier: &Carrier) -> Packet {
    assert!(readable(carrier, SOON), "no message came");
    carrier.recv().unwrap().expect("the connection was closed")
}

pub fn message(carrier: &Carrier) -> Message {
    packet(carrier).message.unwrap()
}

pub fn nothing(carrier: &Carrier, within: Duration) {
    if readable(carrier, within) {
        panic!("{:?}", carrier.recv());
    }
}

/// A program that was attached.
pub struct Program {
    pub carrier: Carrier,
    pub id: u64,
    pub records: Records,
    pub memory: OwnedFd,
    pub watchdog: OwnedFd,
}

impl Program {
    pub fn attach(socket: &Path, inherit: u64) -> Self {
        Self::attach_with(socket, inherit, &[])
    }

    /// The same program, at another agent.
    pub fn attach_again(&self, socket: &Path) -> Self {
        Self::attach_with(socket, 0, &[self.memory.as_fd(), self.watchdog.as_fd()])
    }

    fn attach_with(socket: &Path, inherit: u64, fds: &[BorrowedFd<'_>]) -> Self {
        let carrier = Carrier::connect(socket).unwrap();
        carrier.send(&Message::Attach { pid: std::process::id(), inherit }, fds).unwrap();
        let mut attached = packet(&carrier);
        let Ok(Message::Attached { program, .. }) = attached.message else { panic!("{attached:?}") };
        let watchdog = attached.fds.pop().unwrap();
        let memory = attached.fds.pop().unwrap();
        let records = Records::map(&memory).unwrap();
        Self { carrier, id: program, records, memory, watchdog }
    }

    /// Whether two have the same records.
    pub fn has_records_of(&self, other: &Self) -> bool {
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        inode(&self.memory) == inode(&other.memory)
    }

    pub fn message(&self) -> Message {
        message(&self.carrier)
    }

    pub fn say(&self, message: Message) {
        self.carrier.send(&message, &[]).unwrap();
    }

    pub fn track(&self, socket: &TcpStream, tx: u64, rx: u64, connector: bool) -> Message {
        let track = Message::Track { handle: 77, tx, rx, connector, found: false };
        self.carrier.send(&track, &[socket.as_fd()]).unwrap();
        self.message()
    }

    pub fn tracked(&self, socket: &TcpStream, tx: u64, rx: u64) -> u32 {
        match self.track(socket, tx, rx, true) {
            Message::Tracked { handle: 77, record, .. } => record,
            other => panic!("{other:?}"),
        }
    }

    pub fn record(&self, record: u32) -> &Record {
        self.records.record(record).unwrap()
    }

    pub fn nudged(&self, record: u32) {
        assert_eq!(self.message(), Message::Nudge { record });
    }
}

pub fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (b, _) = listener.accept().unwrap();
    b.set_read_timeout(Some(SOON)).unwrap();
    (a, b)
}

pub fn send(endpoint: Endpoint<'_>, bytes: &[u8]) {
    assert_eq!(endpoint.send(&[IoSlice::new(bytes)], SendFlags::empty()), Ok(bytes.len()));
}

/// Receives until the end of the stream, or until so many bytes are there.
pub fn receive(endpoint: Endpoint<'_>, most: usize) -> Result<Vec<u8>, Errno> {
    let (mut all, until) = (Vec::new(), Instant::now() + SOON);
    while all.len() < most {
        let mut piece = vec![0; (most - all.len()).min(4096)];
        match endpoint.recv(&mut [IoSliceMut::new(&mut piece)], false, true) {
            Ok(0) => break,
            Ok(n) => all.extend(&piece[..n]),
            Err(Errno::AGAIN) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

pub fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i % 251) as u8).collect()
}
