//! A backend of the test's own, and an agent that does by hand, and badly if it likes, what the frontend's does.

use std::fs;
use std::io;
use std::mem::offset_of;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;
use serde_json::Value;
use vsocket_channel::Side;
use vsocket_channel::layout::{Direction, SegmentHeader, Stay};
use vsocket_channel::message::{Message, Segment, Tuple};
use vsocket_channel::reason::Reason;
use vsocket_frontend::carrier::{Carrier, Packet};

use super::{SOON, profile_dir, wait_until};

/// A built program.
pub fn binary(name: &str) -> PathBuf {
    std::env::var_os("VSOCKET_BIN").map_or_else(profile_dir, PathBuf::from).join(name)
}

/// A directory of the test's own, gone with the value.
pub struct Directory(pub PathBuf);

impl Directory {
    /// An empty one.
    pub fn new() -> Self {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let name = format!("vst-{}-{}", std::process::id(), LAST.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("a directory of our own");
        Self(path)
    }

    /// A file in it.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).expect("a file of our own");
        path
    }

    /// Runs `vsocketd` in it to its end.
    pub fn vsocketd(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(binary("vsocketd"));
        command.args(arguments).current_dir(&self.0).stdin(Stdio::null());
        command.output().expect("vsocketd is built")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A `vsocketd` whose relative paths are in a directory of the test's; killed when it is dropped.
pub struct Backend<'a> {
    directory: &'a Directory,
    name: String,
    child: Child,
}

impl<'a> Backend<'a> {
    /// Starts it and waits until it answers. Its control socket is to be `NAME.ctl`.
    pub fn start(directory: &'a Directory, name: &str, config: &str) -> Self {
        let file = directory.file(&format!("{name}.toml"), config);
        let log = fs::File::create(directory.0.join(format!("{name}.log"))).expect("a file of our own");
        let mut command = Command::new(binary("vsocketd"));
        command.arg("--config").arg(file).current_dir(&directory.0).stdin(Stdio::null()).stderr(log);
        let child = command.spawn().expect("vsocketd is built");
        let backend = Self { directory, name: name.to_owned(), child };
        wait_until(SOON, "vsocketd answers", || backend.try_stat().is_some());
        backend
    }

    fn try_stat(&self) -> Option<Value> {
        let control = format!("{}.ctl", self.name);
        let output = self.directory.vsocketd(&["stat", "--control", &control, "--json"]);
        serde_json::from_slice(&output.stdout).ok()
    }

    /// `vsocketd stat --json`.
    pub fn stat(&self) -> Value {
        self.try_stat().unwrap_or_else(|| panic!("no answer of {}: {}", self.name, self.log()))
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.0.join(format!("{}.log", self.name))).unwrap_or_default()
    }
}

impl Drop for Backend<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An agent, or a program, played by the test.
pub struct Fake(Carrier);

/// What a `Prepare` brought.
pub struct Prepared {
    /// The connection.
    pub conn: u64,
    /// Its generation.
    pub generation: u32,
    segment: Segment,
    slab: OwnedFd,
    far_bells: Vec<OwnedFd>,
}

impl Fake {
    /// Connects and says nothing.
    pub fn silent(socket: &Path) -> Self {
        Self(Carrier::connect(socket).unwrap_or_else(|e| panic!("{}: {e}", socket.display())))
    }

    /// Connects to a vport's socket as an agent.
    pub fn attach(socket: &Path) -> Self {
        let fake = Self::silent(socket);
        fake.say(Message::Hello { pid: std::process::id() });
        let packet = fake.hear().expect("an answer to Hello");
        assert!(matches!(packet.message, Ok(Message::Welcome { .. })), "{packet:?}");
        fake
    }

    /// Sends a message.
    pub fn say(&self, message: Message) {
        self.0.send(&message, &[]).expect("the other end listens");
    }

    /// Sends what may be no message.
    pub fn say_raw(&self, bytes: &[u8]) {
        rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL).expect("the other end listens");
    }

    /// The next packet, or `None` when the other end has hung up.
    pub fn hear(&self) -> Option<Packet> {
        let end = Instant::now() + SOON;
        loop {
            match self.0.recv() {
                Ok(packet) => return packet,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}"),
            }
            assert!(Instant::now() < end, "nothing is said");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The next message.
    pub fn message(&self) -> Message {
        self.hear().expect("it has not hung up").message.expect("a message of ours")
    }

    /// Nothing has been said that is not heard yet: the answer to a question is the next message.
    pub fn has_nothing_to_hear(&self) {
        self.say(Message::Ping { n: 77 });
        assert_eq!(self.message(), Message::Pong { n: 77 });
    }

    /// Opens a connection.
    pub fn open(&self, conn: u64, local: SocketAddr, remote: SocketAddr) {
        self.say(Message::Open { conn, program: 1, tuple: Tuple::new(local, remote), min_generation: 1 });
    }

    /// The answer to `Open` is this reason.
    pub fn is_declined(&self, conn: u64, reason: Reason) {
        assert_eq!(self.message(), Message::Declined { conn, reason });
    }

    /// Hears `Prepare`; what is said of earlier connections is skipped.
    pub fn prepare(&self) -> Prepared {
        loop {
            let mut packet = self.hear().expect("it has not hung up");
            match packet.message {
                Ok(Message::Declined { .. } | Message::Withdraw { .. }) => {}
                Ok(Message::Prepare { conn, generation, segment }) => {
                    assert_eq!(packet.fds.len(), 9, "slab, own bells, far bells");
                    let far_bells = packet.fds.split_off(5);
                    let slab = packet.fds.swap_remove(0);
                    return Prepared { conn, generation, segment, slab, far_bells };
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Answers a `Prepare` and hears `Commit`.
    pub fn commit(&self, prepared: &Prepared) {
        let Prepared { conn, generation, .. } = *prepared;
        self.say(Message::Prepared { conn, generation });
        assert_eq!(self.message(), Message::Commit { conn, generation });
    }
}

/// A mapper of the slab, who writes what it likes.
impl Prepared {
    fn put(&self, direction: Side, at: usize, bytes: &[u8]) {
        let segment = self.segment.geometry.segment_offset(self.segment.index).expect("checked");
        let direction = offset_of!(SegmentHeader, directions) + direction.index() * size_of::<Direction>();
        let at = (segment + direction + at) as u64;
        assert_eq!(rustix::io::pwrite(&self.slab, bytes, at).expect("a slab can be written"), bytes.len());
    }

    /// Opens the stay of what this side sends.
    pub fn publish_stay(&self, start: u64) {
        let side = self.segment.side;
        let stay = offset_of!(Direction, stay);
        self.put(side, stay + offset_of!(Stay, start), &start.to_le_bytes());
        self.put(side, stay + offset_of!(Stay, escape), &7u32.to_le_bytes());
        self.put(side, stay + offset_of!(Stay, generation), &self.generation.to_le_bytes());
    }

    /// Writes the index of what this side has sent.
    pub fn set_head(&self, head: u64) {
        self.put(self.segment.side, offset_of!(Direction, head), &head.to_le_bytes());
    }

    /// Writes the index of what this side has taken.
    pub fn set_tail(&self, tail: u64) {
        self.put(self.segment.side.other(), offset_of!(Direction, tail), &tail.to_le_bytes());
    }

    /// Wakes the other side, whether it sleeps or not.
    pub fn ring(&self) {
        for bell in &self.far_bells {
            let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
        }
    }
}
