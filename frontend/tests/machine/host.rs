//! The host of a virtual machine, as this test plays it: what its backend says on streams, which here are UNIX ones.

use crate::common::{SOON, message, readable, wait_for};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::SendFlags;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;
use vsocket_channel::layout::{BELLS, Geometry};
use vsocket_channel::message::{Message, Runs};
use vsocket_frontend::carrier::{Carrier, Stream};

pub const VNI: u32 = 100;

/// One stream, seen from the host.
pub struct Caller(Stream);

impl Caller {
    pub fn say(&mut self, message: Message) {
        self.0.send(&message).unwrap();
    }

    /// The next message; `None` at the stream's end.
    pub fn hear(&mut self) -> Option<Message> {
        let until = Instant::now() + SOON;
        loop {
            match self.0.recv() {
                Ok(said) => return said.map(Result::unwrap),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return None,
            }
            assert!(Instant::now() < until, "no message came");
            readable(&self.0, SOON);
        }
    }

    pub fn message(&mut self) -> Message {
        self.hear().expect("the stream has ended")
    }

    pub fn into_fd(self) -> OwnedFd {
        self.0.into_fd()
    }
}

impl AsFd for Caller {
    fn as_fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A guest: a keeper with its agent, and the host's end of it.
pub struct Machine {
    pub dir: PathBuf,
    pub keeper: Child,
    listener: UnixListener,
}

impl Machine {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("vsocket-machine-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let listener = UnixListener::bind(dir.join("host")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let keeper = start(&dir);
        Self { dir, keeper, listener }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("agent")
    }

    pub fn restart(&mut self) {
        self.keeper = start(&self.dir);
    }

    /// The next stream, and what is said on it first.
    pub fn accept(&self) -> (Caller, Message) {
        loop {
            assert!(readable(&self.listener, SOON), "no stream was opened");
            let Ok((stream, _)) = self.listener.accept() else { continue };
            stream.set_nonblocking(true).unwrap();
            let mut caller = Caller(Stream::new(OwnedFd::from(stream), false));
            // One may have given up meanwhile.
            if let Some(first) = caller.hear() {
                return (caller, first);
            }
        }
    }

    pub fn is_called(&self, within: std::time::Duration) -> bool {
        readable(&self.listener, within)
    }

    /// Lets a keeper register, who must bring `token`, and gives it `next`.
    pub fn register(&self, token: u128, next: u128, boot: u64) -> Caller {
        let mut keeper = self.registering(token);
        keeper.say(Message::Registered { token: next, boot });
        keeper
    }

    /// A keeper that has said who it is. An agent may call earlier, with a token that is not good any more.
    pub fn registering(&self, token: u128) -> Caller {
        loop {
            let (keeper, first) = self.accept();
            if !matches!(first, Message::Present { program: 0, .. }) {
                assert_eq!(first, Message::Register { token, pid: self.keeper.id() });
                return keeper;
            }
        }
    }

    /// Welcomes an agent.
    pub fn welcome(&self, token: u128, boot: u64) -> Caller {
        let (mut agent, mut first) = self.accept();
        while matches!(first, Message::Present { token: old, program: 0, .. } if old != token) {
            (agent, first) = self.accept();
        }
        assert_eq!(first, Message::Present { token, program: 0, bell: 0 });
        assert!(matches!(agent.message(), Message::Hello { .. }));
        agent.say(Message::Welcome { vni: VNI, boot });
        wait_for("the agent's socket", || Carrier::connect(&self.socket()).is_ok());
        agent
    }

    /// The four bells of a program, in their order.
    pub fn bells(&self, token: u128, program: u64) -> Vec<OwnedFd> {
        let one = |n: usize| {
            let (bell, first) = self.accept();
            assert_eq!(first, Message::Present { token, program, bell: n as u32 });
            bell.into_fd()
        };
        (0..BELLS).map(one).collect()
    }

    pub fn ask(&self, command: &str) -> serde_json::Value {
        let mut asked = Command::new(crate::common::VSOCKET);
        let out = asked.args([command, "--json", "--agent"]).arg(self.socket()).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// KiB that the keeper has pinned.
    pub fn pinned(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.keeper.id())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmPin:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// The agent's process.
    pub fn agent(&self) -> i32 {
        let id = self.keeper.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        children.trim().parse().unwrap()
    }

    pub fn signal(&self, pid: i32, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        // The agent ends by itself.
        let until = Instant::now() + SOON;
        while Carrier::connect(&self.socket()).is_ok() && Instant::now() < until {}
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Starts a keeper.
pub fn start(dir: &Path) -> Child {
    let mut command = Command::new(crate::common::VSOCKET);
    command.arg("agent").arg("--socket").arg(dir.join("agent"));
    command.arg("--host").arg(format!("unix-stream:{}", dir.join("host").display()));
    command.env("RUST_LOG", "error").stdin(Stdio::null()).spawn().unwrap()
}

/// The pages of a slab, as its keeper tells them.
pub fn pages(keeper: &mut Caller, slab: u64, geometry: Geometry) -> Vec<u64> {
    let mut pages = Vec::new();
    while pages.len() < geometry.slab_len() / 4096 {
        let Message::SlabPages { slab: of, first, runs } = keeper.message() else { panic!("no pages") };
        assert_eq!((of, first as usize), (slab, pages.len()));
        let all = |runs: &Runs| runs.iter().flat_map(|(at, n)| at..at + n as u64).collect::<Vec<u64>>();
        pages.extend(all(&runs));
    }
    assert_eq!(pages.len(), geometry.slab_len() / 4096);
    pages
}

/// The pages of a file, as the kernel maps them here.
pub fn pages_of(file: &OwnedFd, len: usize) -> Vec<u64> {
    use rustix::mm::{MapFlags, ProtFlags};
    let flags = MapFlags::SHARED | MapFlags::POPULATE;
    // SAFETY: a new mapping of a file that is as long; it is only looked at in the page map, and stays.
    let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, flags, file, 0) };
    vsocket_frontend::keeper::pages::numbers(at.unwrap().addr(), len).unwrap()
}

/// Rings a doorbell, as either side does.
pub fn ring(bell: &OwnedFd) -> usize {
    rustix::net::send(bell, &1u64.to_ne_bytes(), SendFlags::NOSIGNAL).unwrap_or(0)
}

/// Whether a stream has ended, though bytes may lie in it.
pub fn has_ended(stream: &OwnedFd) -> bool {
    let mut scratch = [0; 4096];
    loop {
        match rustix::io::read(stream, &mut scratch[..]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error == rustix::io::Errno::CONNRESET,
        }
    }
}

/// The keeper's stream and the agent's, in whichever order they call.
pub fn both(machine: &Machine, token: u128, next: u128, boot: u64) -> (Caller, Caller) {
    let keeper = machine.register(token, next, boot);
    let agent = machine.welcome(next, boot);
    (keeper, agent)
}

/// What a packet to a program brings beside it.
pub fn parcel(carrier: &Carrier) -> (Message, Vec<OwnedFd>) {
    let packet = crate::common::packet(carrier);
    (packet.message.unwrap(), packet.fds)
}

/// Until the program is told to look again.
pub fn nudged(carrier: &Carrier, record: u32) {
    assert_eq!(message(carrier), Message::Nudge { record });
}
