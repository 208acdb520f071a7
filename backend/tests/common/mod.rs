//! A daemon in this process, and an agent that does by hand what the frontend's does.
#![allow(dead_code)] // each test file uses its part

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use vsocket_backend::carrier::connect_to;
use vsocket_backend::config::{self, Backends, Config, Mac, Peer, Tls, Vport};
use vsocket_backend::daemon::{Daemon, Link, LinkEvent, Stop};
use vsocket_backend::directory::{Directory, Place};
use vsocket_backend::fabric::Fabric;
use vsocket_backend::fabric::soft::{Options, Soft};
use vsocket_backend::operator::ask;
use vsocket_backend::peer::message::{HostName, PeerMessage};
use vsocket_backend::slab::{Memory, View};
use vsocket_channel::bell::publish_fence;
use vsocket_channel::lane::Stay;
use vsocket_channel::layout::Direction;
use vsocket_channel::message::{Lane, MAX_FDS, MESSAGE_LEN, Message, Segment, Tuple};
use vsocket_channel::ring::Ring;

pub const RING: u32 = 1 << 16;

/// A directory of its own, gone with the value.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new() -> Self {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let name = format!("vsocketd-{}-{}", std::process::id(), LAST.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn vport(dir: &Dir, name: &str, vni: u32, address: &str) -> Vport {
    let last = name.as_bytes()[0];
    Vport {
        name: name.to_owned(),
        vni,
        mac: Mac([2, 0, 0, 0, (vni % 251) as u8, last]),
        addresses: vec![address.parse::<IpAddr>().unwrap()],
        socket: dir.0.join(name),
        max_connections: 4,
        ring_bytes: RING,
        direct: true,
        machine: None,
    }
}

pub fn config(dir: &Dir, host: &str, vports: Vec<Vport>) -> Config {
    let (host, control) = (HostName::new(host).unwrap(), dir.0.join(format!("{host}.control")));
    Config { host, control, backends: None, vports, directory: Directory::default() }
}

/// A running daemon, ended with the value.
pub struct Running {
    pub control: PathBuf,
    stop: Stop,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Running {
    pub fn new(config: Config) -> Self {
        let control = config.control.clone();
        Self::start(Daemon::new(config).unwrap(), control)
    }

    pub fn start(daemon: Daemon, control: PathBuf) -> Self {
        let stop = daemon.stopper();
        Self { control, stop, thread: Some(std::thread::spawn(move || daemon.run())) }
    }

    pub fn stat(&self) -> serde_json::Value {
        serde_json::from_str(&ask(&self.control, Message::Query { what: 0 }).unwrap()).unwrap()
    }

    pub fn stop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An agent and its one program.
pub struct Agent {
    pub socket: OwnedFd,
    pub boot: u64,
}

/// What a `Prepare` brought.
pub struct Prepared {
    pub conn: u64,
    pub generation: u32,
    pub segment: Segment,
    pub view: View,
    pub own: Vec<OwnedFd>,
    pub far: Vec<OwnedFd>,
}

impl Agent {
    pub fn silent(path: &Path) -> Self {
        let socket = connect_to(path).unwrap();
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(5))).unwrap();
        Self { socket, boot: 0 }
    }

    pub fn new(path: &Path) -> Self {
        let mut agent = Self::silent(path);
        agent.say(Message::Hello { pid: std::process::id() });
        let (message, fds) = agent.hear_all();
        let Message::Welcome { boot, .. } = message else { panic!("{message:?}") };
        assert_eq!(fds.len(), 1, "the backend's pidfd");
        agent.boot = boot;
        agent
    }

    pub fn say(&self, message: Message) {
        send(&self.socket, &message.encode(), SendFlags::NOSIGNAL).unwrap();
    }

    pub fn open(&self, conn: u64, local: &str, remote: &str, min_generation: u32) {
        let tuple = Tuple::new(local.parse().unwrap(), remote.parse().unwrap());
        self.say(Message::Open { conn, program: 1, tuple, min_generation });
    }

    pub fn try_hear(&self) -> Option<(Message, Vec<OwnedFd>)> {
        let mut image = [0; MESSAGE_LEN];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut image)];
        let got = recvmsg(&self.socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC).ok()?;
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        (got.bytes > 0).then(|| (Message::decode(&image).unwrap(), fds))
    }

    pub fn hear_all(&self) -> (Message, Vec<OwnedFd>) {
        self.try_hear().expect("a message")
    }

    pub fn hear(&self) -> Message {
        self.hear_all().0
    }

    /// Hears a `Prepare`, maps its slab, and does not answer yet. Declines on the way are skipped.
    pub fn hear_prepare(&self) -> Prepared {
        let (message, mut fds) = loop {
            match self.hear_all() {
                (Message::Declined { .. }, _) => {}
                other => break other,
            }
        };
        let Message::Prepare { conn, generation, segment } = message else { panic!("{message:?}") };
        assert_eq!(fds.len(), 9);
        let far = fds.split_off(5);
        let own = fds.split_off(1);
        let memory = Arc::new(Memory::map(&fds[0], segment.geometry).unwrap());
        let view = View::new(&memory, segment.index).unwrap();
        Prepared { conn, generation, segment, view, own, far }
    }

    /// Hears a `Prepare`, answers, and hears the `Commit`.
    pub fn prepare(&self) -> Prepared {
        let prepared = self.hear_prepare();
        self.say(Message::Prepared { conn: prepared.conn, generation: prepared.generation });
        prepared
    }

    pub fn commit(&self, prepared: &Prepared) {
        let Prepared { conn, generation, .. } = *prepared;
        assert_eq!(self.hear(), Message::Commit { conn, generation });
    }
}

/// Waits until it holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One guest's end of a fabric lane, as its program would use it.
pub struct End {
    pub prepared: Prepared,
    head: u64,
    tail: Option<u64>,
}

impl End {
    pub fn new(prepared: Prepared, start: u64) -> Self {
        assert_eq!(prepared.segment.lane, Lane::Fabric);
        assert_eq!(prepared.segment.side.index(), 0);
        let generation = prepared.generation;
        let end = Self { prepared, head: start, tail: None };
        assert!(end.directions()[0].publish_stay(Stay { generation, start, escape: 7 }));
        end.ring_backend();
        end
    }

    pub fn directions(&self) -> &[Direction; 2] {
        &self.prepared.view.header().directions
    }

    pub fn ring_backend(&self) {
        publish_fence();
        assert_eq!(self.prepared.view.header().waiters[1].mask.load(Ordering::Relaxed), 1);
        if self.prepared.view.slab().bells[1][0].take() {
            rustix::io::write(&self.prepared.far[0], &1u64.to_ne_bytes()).unwrap();
        }
    }

    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let ring = Ring { indices: &self.directions()[0], bytes: &self.prepared.view.rings[0] };
        let n = ring.space(self.head).unwrap().min(bytes.len());
        if n > 0 {
            ring.bytes.put(self.head, &bytes[..n]);
            ring.publish(self.head + n as u64);
            self.head += n as u64;
            self.ring_backend();
        }
        n
    }

    pub fn read(&mut self, most: usize) -> Vec<u8> {
        let mut got = vec![0; most];
        let n = self.read_into(&mut got);
        got.truncate(n);
        got
    }

    pub fn read_into(&mut self, into: &mut [u8]) -> usize {
        let direction = &self.directions()[1];
        let Some(stay) = direction.stay(self.prepared.generation) else { return 0 };
        let tail = self.tail.unwrap_or(stay.start);
        let ring = Ring { indices: direction, bytes: &self.prepared.view.rings[1] };
        let n = ring.available(tail).unwrap().min(into.len());
        if n == 0 {
            self.tail = Some(tail);
            return 0;
        }
        ring.bytes.get(tail, &mut into[..n]);
        ring.release(tail + n as u64);
        publish_fence();
        let want = &direction.stay.want_space;
        if want.load(Ordering::Relaxed) != 0 && want.swap(0, Ordering::AcqRel) != 0 {
            self.ring_backend();
        }
        self.tail = Some(tail + n as u64);
        n
    }

    pub fn read_exactly(&mut self, len: usize) -> Vec<u8> {
        let mut got = vec![];
        eventually("the bytes", || {
            got.extend(self.read(len - got.len()));
            got.len() == len
        });
        got
    }
}

/// Opens both ends, and answers until both may switch.
pub fn pair(a: &Agent, c: &Agent, conn: u64, ends: [&str; 2], generation: u32) -> (Prepared, Prepared) {
    a.open(conn, ends[0], ends[1], generation);
    c.open(conn, ends[1], ends[0], generation);
    let (ours, theirs) = (a.prepare(), c.prepare());
    a.commit(&ours);
    c.commit(&theirs);
    (ours, theirs)
}

/// A control connection between two daemons of one process.
pub struct Wire {
    waker: Arc<mio::Waker>,
    far_waker: Arc<mio::Waker>,
    inbox: crossbeam_channel::Receiver<LinkEvent>,
    own: crossbeam_channel::Sender<LinkEvent>,
    far: crossbeam_channel::Sender<LinkEvent>,
    frozen: Arc<AtomicBool>,
}

/// Stops the second daemon as SIGSTOP does, and lets it go on.
pub struct Switch {
    frozen: Arc<AtomicBool>,
    waker: Arc<mio::Waker>,
}

impl Switch {
    pub fn freeze(&self, on: bool) {
        self.frozen.store(on, Ordering::SeqCst);
        self.waker.wake().unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.frozen.store(false, Ordering::SeqCst);
    }
}

impl Link for Wire {
    fn send(&mut self, _peer: u32, message: PeerMessage) {
        let _ = self.far.send(LinkEvent::Message(0, message));
        let _ = self.far_waker.wake();
    }

    fn reset(&mut self, _peer: u32) {
        for end in [&self.own, &self.far] {
            let _ = end.send(LinkEvent::Down(0));
            let _ = end.send(LinkEvent::Up(0));
        }
        let _ = self.waker.wake();
        let _ = self.far_waker.wake();
    }

    fn poll(&mut self) -> Option<LinkEvent> {
        while self.frozen.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.inbox.try_recv().ok()
    }
}

/// The soft fabric on loopback.
pub fn soft() -> Box<dyn Fabric> {
    Box::new(Soft::new("127.0.0.1:0".parse().unwrap(), Options::default()).unwrap())
}

/// Joins two daemons over these fabrics.
pub fn join(a: &mut Daemon, b: &mut Daemon, hosts: [&str; 2], fabrics: [Box<dyn Fabric>; 2]) -> Switch {
    let (to_a, inbox_a) = crossbeam_channel::unbounded();
    let (to_b, inbox_b) = crossbeam_channel::unbounded();
    let frozen = Arc::new(AtomicBool::new(false));
    let (waker_a, waker_b) = (a.waker(), b.waker());
    let wire_a = Wire {
        waker: waker_a.clone(),
        far_waker: waker_b.clone(),
        inbox: inbox_a,
        own: to_a.clone(),
        far: to_b.clone(),
        frozen: Arc::default(),
    };
    let wire_b = Wire {
        waker: waker_b.clone(),
        far_waker: waker_a.clone(),
        inbox: inbox_b,
        own: to_b.clone(),
        far: to_a.clone(),
        frozen: frozen.clone(),
    };
    let [fabric_a, fabric_b] = fabrics;
    a.join(fabric_a, Box::new(wire_a), vec![hosts[1].to_owned()]).unwrap();
    b.join(fabric_b, Box::new(wire_b), vec![hosts[0].to_owned()]).unwrap();
    to_a.send(LinkEvent::Up(0)).unwrap();
    to_b.send(LinkEvent::Up(0)).unwrap();
    waker_a.wake().unwrap();
    waker_b.wake().unwrap();
    Switch { frozen, waker: waker_b }
}

/// Two hosts with a guest each in VNI 100 and in VNI 200, where addresses coincide.
pub fn two_hosts(dir: &Dir) -> (Running, Running, Switch) {
    two_hosts_with(dir, RING, [soft(), soft()])
}

/// The same with rings of this length and these fabrics.
pub fn two_hosts_with(dir: &Dir, ring: u32, fabrics: [Box<dyn Fabric>; 2]) -> (Running, Running, Switch) {
    let vports = [
        vec![vport(dir, "a", 100, "198.51.100.1"), vport(dir, "e", 200, "198.51.100.3")],
        vec![vport(dir, "c", 100, "198.51.100.3"), vport(dir, "d", 200, "198.51.100.1")],
    ];
    two_hosts_of(dir, ring, fabrics, vports)
}

/// The same with these guests.
pub fn two_hosts_of(
    dir: &Dir,
    ring: u32,
    fabrics: [Box<dyn Fabric>; 2],
    [one, two]: [Vec<Vport>; 2],
) -> (Running, Running, Switch) {
    let mut configs = [config(dir, "h1", one), config(dir, "h2", two)];
    configs.iter_mut().flat_map(|c| &mut c.vports).for_each(|vport| vport.ring_bytes = ring);
    let far = [configs[1].vports.clone(), configs[0].vports.clone()];
    for (n, (config, far)) in configs.iter_mut().zip(&far).enumerate() {
        let host = HostName::new(["h2", "h1"][n]).unwrap();
        for vport in far {
            let vtep = "127.0.0.1".parse().unwrap();
            let place = Place { host: host.clone(), vtep, mac: vport.mac };
            assert!(config.directory.insert(vport.vni, vport.addresses[0], place));
        }
        let address = "127.0.0.1:1".parse().unwrap();
        config.backends = Some(Backends {
            tls: Tls { ca: PathBuf::new(), cert: PathBuf::new(), key: PathBuf::new() },
            listen: address,
            fabric: config::Fabric::Soft { listen: address },
            peers: vec![Peer { host, vtep: "127.0.0.1".parse().unwrap(), control: address }],
        });
    }
    let controls = configs.each_ref().map(|c| c.control.clone());
    let [mut a, mut b] = configs.map(|c| Daemon::new(c).unwrap());
    let switch = join(&mut a, &mut b, ["h1", "h2"], fabrics);
    let [control_a, control_b] = controls;
    (Running::start(a, control_a), Running::start(b, control_b), switch)
}
