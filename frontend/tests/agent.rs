//! The agent as a process, between a backend and programs that this test plays, over real sockets and real TCP.
#![allow(missing_docs)]

mod common;

use common::*;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, IoSliceMut};
use rustix::net::SendFlags;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use vsocket_channel::Side;
use vsocket_channel::layout::{BELLS, Geometry, LAYOUT_VERSION, SLAB_MAGIC};
use vsocket_channel::message::{Lane, MESSAGE_LEN, Message, Segment, Tuple};
use vsocket_channel::reason::Reason;
use vsocket_frontend::carrier::Carrier;
use vsocket_frontend::endpoint::Endpoint;
use vsocket_frontend::memory::{Bound, Records, Slab};
use vsocket_frontend::record::status;

/// A directory and the agent that serves in it.
struct Guest {
    dir: PathBuf,
    agent: Child,
}

impl Guest {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("vsocket-agent-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let agent = start(&dir);
        let guest = Self { dir, agent };
        guest.serves();
        guest
    }

    fn serves(&self) {
        wait_for("the agent's socket", || Carrier::connect(&self.socket()).is_ok());
    }

    /// The agent is killed, and another started.
    fn replace_agent(&mut self) {
        self.agent.kill().unwrap();
        self.agent.wait().unwrap();
        self.agent = start(&self.dir);
        self.serves();
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("agent")
    }

    fn vport(&self) -> PathBuf {
        self.dir.join("vport")
    }

    fn ask(&self, command: &str) -> serde_json::Value {
        let out =
            Command::new(VSOCKET).args([command, "--json", "--agent"]).arg(self.socket()).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        serde_json::from_slice(&out.stdout).unwrap()
    }
}

fn start(dir: &Path) -> Child {
    let mut command = Command::new(VSOCKET);
    command.arg("agent").arg("--socket").arg(dir.join("agent")).arg("--vport").arg(dir.join("vport"));
    command.env("RUST_LOG", "warn").stdin(Stdio::null()).spawn().unwrap()
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The host's backend; its process is a `sleep` that can be killed.
struct Backend {
    carrier: Carrier,
    process: Child,
    boot: u64,
}

impl Backend {
    fn serve(guest: &Guest, boot: u64) -> Self {
        let _ = std::fs::remove_file(guest.vport());
        let listener = Carrier::listen(&guest.vport()).unwrap();
        assert!(readable(&listener, SOON), "the agent does not connect");
        let carrier = Carrier::accept(&listener).unwrap();
        assert!(matches!(message(&carrier), Message::Hello { .. }));
        let process = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&process);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        carrier.send(&Message::Welcome { vni: 100, boot }, &[pidfd.as_fd()]).unwrap();
        Self { carrier, process, boot }
    }

    fn message(&self) -> Message {
        message(&self.carrier)
    }

    fn say(&self, message: Message) {
        self.carrier.send(&message, &[]).unwrap();
    }

    fn opened(&self) -> (u64, Tuple, u32) {
        match self.message() {
            Message::Open { conn, tuple, min_generation, .. } => (conn, tuple, min_generation),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A slab as a host makes it.
struct HostSlab {
    memfd: OwnedFd,
    bells: Vec<OwnedFd>,
    geometry: Geometry,
    id: u64,
}

impl HostSlab {
    fn new(id: u64) -> Self {
        let geometry = Geometry::new(2, 1 << 16).unwrap();
        let memfd = rustix::fs::memfd_create("slab", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, geometry.slab_len() as u64).unwrap();
        let mut head = SLAB_MAGIC.to_ne_bytes().to_vec();
        head.extend(LAYOUT_VERSION.to_ne_bytes());
        head.extend(geometry.segments().to_ne_bytes());
        head.extend((geometry.ring_len() as u64).to_ne_bytes());
        rustix::io::pwrite(&memfd, &head, 0).unwrap();
        let bell = |_| rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        Self { memfd, bells: (0..2 * BELLS).map(bell).collect(), geometry, id }
    }

    fn segment(&self, side: Side, lane: Lane) -> Segment {
        Segment { slab: self.id, index: 0, geometry: self.geometry, side, lane }
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        std::iter::once(&self.memfd).chain(&self.bells).map(AsFd::as_fd).collect()
    }

    fn bind(&self, generation: u32, side: Side, lane: Lane) -> Bound {
        let slab = Arc::new(Slab::map(&self.memfd, self.id, self.geometry).unwrap());
        Bound::new(generation, &self.segment(side, lane), slab, Arc::new(Vec::new())).unwrap()
    }
}

/// A connection of `program` on a lane, with generation 1, and the peer's end of the same segment.
struct Stay {
    a: TcpStream,
    b: TcpStream,
    record: u32,
    conn: u64,
    near: Bound,
    far: Bound,
    peer: Records,
    _slab: HostSlab,
}

impl Stay {
    fn begin(program: &Program, backend: &Backend, lane: Lane) -> Self {
        let (mut a, mut b) = tcp_pair();
        a.write_all(&[1; 100]).unwrap();
        b.read_exact(&mut [0; 100]).unwrap();
        let record = program.tracked(&a, 100, 0);
        let (conn, tuple, min_generation) = backend.opened();
        assert_eq!(tuple, Tuple::new(a.local_addr().unwrap(), a.peer_addr().unwrap()));
        assert_eq!(min_generation, 1);
        let slab = HostSlab::new(backend.boot * 1000 + conn);
        let (_, peer) = Records::create().unwrap();
        peer.record(0).unwrap().init(0, 100, false);
        let far = slab.bind(1, Side::One, lane);
        let near = slab.bind(1, Side::Zero, lane);
        let stay = Self { a, b, record, conn, near, far, peer, _slab: slab };
        stay.prepare(program, backend, lane);
        stay
    }

    fn prepare(&self, program: &Program, backend: &Backend, lane: Lane) {
        let segment = self._slab.segment(Side::Zero, lane);
        let prepare = Message::Prepare { conn: self.conn, generation: 1, segment };
        backend.carrier.send(&prepare, &self._slab.fds()).unwrap();
        let asked = packet(&program.carrier);
        let conn = u64::from(self.record);
        assert_eq!(asked.message, Ok(Message::Prepare { conn, generation: 1, segment }));
        assert_eq!(asked.fds.len(), 1 + 2 * BELLS);
        self.near(program).prepare(1).unwrap();
        self.far().prepare(1).unwrap();
        let prepared = Message::Prepared { conn, generation: 1 };
        program.carrier.send(&prepared, &[self.a.as_fd()]).unwrap();
        assert_eq!(backend.message(), Message::Prepared { conn: self.conn, generation: 1 });
        backend.say(Message::Commit { conn: self.conn, generation: 1 });
        program.nudged(self.record);
        assert_eq!(program.record(self.record).ready.load(Ordering::Acquire), 1);
        self.peer.record(0).unwrap().ready.store(1, Ordering::Release);
    }

    fn near<'a>(&'a self, program: &'a Program) -> Endpoint<'a> {
        let watchdog = Some((program.records.header(), program.watchdog.as_fd()));
        Endpoint {
            record: program.record(self.record),
            anchor: self.a.as_fd(),
            bound: Some(&self.near),
            watchdog,
        }
    }

    fn far(&self) -> Endpoint<'_> {
        let record = self.peer.record(0).unwrap();
        Endpoint { record, anchor: self.b.as_fd(), bound: Some(&self.far), watchdog: None }
    }
}

#[test]
fn a_connection_goes_to_its_lane_and_back_and_is_opened_again() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&program, &backend, Lane::Direct);
    send(stay.near(&program), &pattern(5000));
    assert!(program.record(stay.record).is(status::TX_RING));
    assert_eq!(receive(stay.far(), 4000).unwrap(), pattern(5000)[..4000]);
    let ss = guest.ask("ss");
    let line =
        &ss.as_array().unwrap().iter().find(|l| l["local"] == stay.a.local_addr().unwrap().to_string());
    let line = line.unwrap();
    assert_eq!((line["tx_lane"].as_str(), line["rx_lane"].as_str()), (Some("direct"), Some("tcp")));
    assert_eq!((&line["bytes"]["direct"]["tx"], &line["bytes"]["tcp"]["tx"]), (&5000.into(), &100.into()));
    let mail = program.records.header().mail.load(Ordering::Acquire);
    assert_eq!(mail, 4, "attached, tracked, prepare, nudge");

    backend.say(Message::Withdraw { conn: stay.conn, generation: 1, reason: Reason::Drained });
    program.nudged(stay.record);
    assert_eq!(backend.message(), Message::Left { conn: stay.conn, generation: 1 });
    assert_eq!(backend.opened().2, 2);
    send(stay.near(&program), b"raw");
    assert_eq!(receive(stay.far(), 1003).unwrap(), [&pattern(5000)[4000..], b"raw"].concat());

    let stat = guest.ask("stat");
    assert_eq!(stat["connections"]["upgraded_total"], 1);
    assert_eq!(stat["connections"]["direct_total"], 1);
    assert_eq!(stat["connections"]["on_lane"], 0);
    assert_eq!(stat["bytes"]["direct"]["tx"], 5000);
    assert_eq!(stat["backend"]["vni"], 100);
}

#[test]
fn a_withdrawn_receiver_is_left_when_the_program_says_so() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&program, &backend, Lane::Direct);
    send(stay.far(), &pattern(300));
    assert_eq!(receive(stay.near(&program), 100).unwrap(), pattern(300)[..100]);
    backend.say(Message::Withdraw { conn: stay.conn, generation: 1, reason: Reason::Drained });
    program.nudged(stay.record);
    nothing(&backend.carrier, Duration::from_millis(100));
    assert_eq!(stay.far().leave(1), Ok(true));
    assert_eq!(receive(stay.near(&program), 200).unwrap(), pattern(300)[100..]);
    send(stay.far(), b"after");
    assert_eq!(receive(stay.near(&program), 5).unwrap(), b"after");
    program.say(Message::Left { conn: u64::from(stay.record), generation: 1 });
    assert_eq!(backend.message(), Message::Left { conn: stay.conn, generation: 1 });
    assert_eq!(backend.opened().2, 2);
}

#[test]
fn a_killed_backend_costs_a_fabric_lane_but_no_byte() {
    let guest = Guest::new();
    let mut backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let mut stay = Stay::begin(&program, &backend, Lane::Fabric);
    send(stay.near(&program), &pattern(5000));
    backend.process.kill().unwrap();
    drop(backend);
    program.nudged(stay.record);
    let mut got = vec![0; 5000];
    stay.b.read_exact(&mut got).unwrap();
    assert_eq!(got, pattern(5000));
    assert_eq!(guest.ask("stat")["backend"]["connected"], false);
    let back = Instant::now();
    let backend = Backend::serve(&guest, 2);
    assert_eq!(backend.opened().2, 2);
    assert!(back.elapsed() < Duration::from_millis(300), "{:?}", back.elapsed());
}

#[test]
fn a_direct_lane_goes_on_without_a_backend() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&program, &backend, Lane::Direct);
    send(stay.near(&program), &pattern(10));
    drop(backend);
    let backend = Backend::serve(&guest, 2);
    nothing(&backend.carrier, Duration::from_millis(100));
    nothing(&program.carrier, Duration::ZERO);
    send(stay.near(&program), &pattern(10));
    assert!(program.record(stay.record).is(status::TX_RING));
    // What the new backend does not know is not told to it, but the connection is opened.
    assert_eq!(stay.near(&program).leave(1), Ok(true));
    stay.near(&program).close_unopened(1);
    program.say(Message::Left { conn: u64::from(stay.record), generation: 1 });
    assert_eq!(backend.opened().2, 2);
}

#[test]
fn what_waits_for_a_backend_is_opened_when_it_comes() {
    let guest = Guest::new();
    let program = Program::attach(&guest.socket(), 0);
    let (a, _b) = tcp_pair();
    program.tracked(&a, 0, 0);
    assert_eq!(guest.ask("stat")["declined"]["no-backend"], 1);
    let backend = Backend::serve(&guest, 1);
    let (conn, ..) = backend.opened();
    for _ in 0..2 {
        backend.say(Message::Declined { conn, reason: Reason::PeerNotOpen });
    }
    wait_for("the reason", || guest.ask("stat")["declined"]["peer-not-open"] == 1);
    let ss = guest.ask("ss");
    assert_eq!(ss[0]["reason"], "peer-not-open");
    assert_eq!(ss[0]["tx_lane"], "tcp");
}

#[test]
fn a_program_that_dies_ends_its_connection_with_every_byte_and_fin() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&program, &backend, Lane::Direct);
    send(stay.near(&program), &pattern(60000));
    let Stay { a, b, peer, far, conn, .. } = stay;
    drop((a, program));
    let far =
        Endpoint { record: peer.record(0).unwrap(), anchor: b.as_fd(), bound: Some(&far), watchdog: None };
    assert_eq!(receive(far, usize::MAX).unwrap(), pattern(60000));
    nothing(&backend.carrier, Duration::from_millis(50));
    drop(b);
    assert_eq!(backend.message(), Message::Left { conn, generation: 1 });
    assert_eq!(backend.message(), Message::Close { conn });
    assert!(matches!(backend.message(), Message::Ended { .. }));
    let stat = guest.ask("stat");
    assert_eq!((&stat["connections"]["open"], &stat["programs"]["open"]), (&0.into(), &0.into()));
    assert_eq!(stat["bytes"]["direct"]["tx"], 60000);
}

#[test]
fn a_fabric_end_waits_for_the_peer_to_hold_the_bytes() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let mut stay = Stay::begin(&program, &backend, Lane::Fabric);
    send(stay.near(&program), &pattern(1000));
    program.say(Message::Closed { record: stay.record });
    std::thread::sleep(Duration::from_millis(50));
    // The backend moves the bytes: all are held by the peer, which knows of the stay.
    let ring = stay.far.rx();
    ring.indices.reader.confirmed.store(1, Ordering::Release);
    ring.release(1100);
    let mut rest = Vec::new();
    stay.b.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), 16, "only a REWIND");
    assert_eq!(vsocket_channel::lane::Rewind::decode(&rest.try_into().unwrap(), !0).unwrap().resume, 1100);
}

#[test]
fn unread_bytes_at_the_end_are_a_reset() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&program, &backend, Lane::Direct);
    send(stay.far(), b"never read");
    program.say(Message::Closed { record: stay.record });
    assert_eq!(backend.message(), Message::Left { conn: stay.conn, generation: 1 });
    assert_eq!(backend.message(), Message::Close { conn: stay.conn });
    assert_eq!(receive(stay.far(), 1), Err(Errno::CONNRESET));
    assert_eq!(guest.ask("stat")["drops"]["reset-at-close"], 1);
}

#[test]
fn a_forked_program_ends_with_its_last_process() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let parent = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&parent, &backend, Lane::Direct);
    let child = Program::attach(&guest.socket(), parent.id);
    assert_eq!(child.id, parent.id);
    parent.say(Message::Closed { record: stay.record });
    nothing(&backend.carrier, Duration::from_millis(50));
    send(stay.near(&child), b"from the child");
    drop(parent);
    nothing(&backend.carrier, Duration::from_millis(50));
    drop(child);
    assert_eq!(receive(stay.far(), usize::MAX).unwrap(), b"from the child");
}

#[test]
fn a_fork_that_overtakes_its_attach_loses_nothing() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let parent = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&parent, &backend, Lane::Direct);
    // The agent finds all of this at once, the parent's messages first.
    let pid = rustix::process::Pid::from_child(&guest.agent);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    parent.say(Message::Left { conn: 9999, generation: 1 });
    let carrier = Carrier::connect(&guest.socket()).unwrap();
    carrier.send(&Message::Attach { pid: 0, inherit: parent.id }, &[]).unwrap();
    parent.say(Message::Closed { record: stay.record });
    drop(parent);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    assert!(matches!(message(&carrier), Message::Attached { .. }));
    assert_eq!(guest.ask("ss")[0]["reason"], serde_json::Value::Null, "it is still on its lane");
    nothing(&backend.carrier, Duration::from_millis(50));
    drop(carrier);
    assert_eq!(receive(stay.far(), usize::MAX).unwrap(), b"");
}

#[test]
fn a_connection_is_brought_to_the_next_agent() {
    let mut guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&program, &backend, Lane::Direct);
    send(stay.near(&program), &pattern(5000));
    let (other, _far) = tcp_pair();
    let kept = program.tracked(&other, 0, 0);
    assert_eq!((stay.record, kept), (0, 1));
    guest.replace_agent();
    let backend = Backend::serve(&guest, 2);

    // What the library does.
    send(stay.near(&program), b"without an agent");
    program.record(stay.record).ready.store(0, Ordering::Release);
    stay.near(&program).close_unopened(1);
    assert_eq!(stay.near(&program).leave(1), Ok(true));
    assert!(stay.near(&program).has_left());
    program.records.header().kept.store(2, Ordering::Release);
    for n in [stay.record, kept] {
        program.record(n).kept.store(1, Ordering::Release);
    }
    let next = program.attach_again(&guest.socket());
    assert!(next.has_records_of(&program));
    let generation = stay.near(&next).last_generation().unwrap();
    assert_eq!(generation, 1);
    let resume = Message::Resume { record: stay.record, generation };
    next.carrier.send(&resume, &[stay.a.as_fd()]).unwrap();
    let tuple = Tuple::new(stay.a.local_addr().unwrap(), stay.a.peer_addr().unwrap());
    let (_, opened, min_generation) = backend.opened();
    assert_eq!((opened, min_generation), (tuple, 2));

    // No byte is lost, and none is forgotten.
    send(stay.near(&next), b"raw");
    let sent = [&pattern(5000), &b"without an agent"[..], b"raw"].concat();
    assert_eq!(receive(stay.far(), sent.len()).unwrap(), sent);
    let ss = guest.ask("ss");
    let bytes =
        &ss.as_array().unwrap().iter().find(|l| l["local"] == tuple.local.to_string()).unwrap()["bytes"];
    assert_eq!((&bytes["direct"]["tx"], &bytes["tcp"]["tx"]), (&5016.into(), &103.into()));

    // The other's record is nobody else's until that one is closed.
    let [(c, _d), (e, _f)] = [tcp_pair(), tcp_pair()];
    assert_eq!(next.tracked(&c, 0, 0), 2);
    next.say(Message::Closed { record: kept });
    assert_eq!(next.tracked(&e, 0, 0), kept);
    assert_eq!(guest.ask("stat")["drops"], serde_json::json!({}));
}

#[test]
fn records_are_brought_once_and_only_whole() {
    let mut guest = Guest::new();
    let program = Program::attach(&guest.socket(), 0);
    let (a, _b) = tcp_pair();
    let record = program.tracked(&a, 0, 0);
    let drops = |guest: &Guest, name: &str| guest.ask("stat")["drops"][name].as_u64().unwrap_or(0);
    // The agent that has it still does.
    assert!(!program.attach_again(&guest.socket()).has_records_of(&program));
    assert_eq!(drops(&guest, "records-refused"), 1);
    guest.replace_agent();
    // Not said to be in use: it is as if nobody had it.
    let next = program.attach_again(&guest.socket());
    assert!(next.has_records_of(&program));
    assert!(!program.attach_again(&guest.socket()).has_records_of(&program));
    next.carrier.send(&Message::Resume { record, generation: 0 }, &[a.as_fd()]).unwrap();
    assert!(readable(&next.carrier, SOON));
    assert!(matches!(next.carrier.recv(), Ok(None) | Err(_)));
    assert_eq!((drops(&guest, "records-refused"), drops(&guest, "resumed-record")), (1, 1));
    // Something else than records.
    let carrier = Carrier::connect(&guest.socket()).unwrap();
    let (pipe, other) = std::io::pipe().unwrap();
    carrier.send(&Message::Attach { pid: 1, inherit: 0 }, &[pipe.as_fd(), other.as_fd()]).unwrap();
    assert!(matches!(message(&carrier), Message::Attached { .. }));
    assert_eq!(drops(&guest, "records-refused"), 2);
}

#[test]
fn what_does_not_agree_with_the_kernel_is_declined() {
    let guest = Guest::new();
    let program = Program::attach(&guest.socket(), 0);
    let (a, _b) = tcp_pair();
    let declined = |reason| Message::Declined { conn: 77, reason };
    assert_eq!(program.track(&a, 1, 0, true), declined(Reason::Untrackable));
    assert_eq!(program.track(&a, 0, 9, true), declined(Reason::Untrackable));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let not_connected = TcpStream::from(OwnedFd::from(listener));
    assert_eq!(program.track(&not_connected, 0, 0, false), declined(Reason::NotEstablished));
    program.tracked(&a, 0, 0);
    assert_eq!(program.track(&a, 0, 0, true), declined(Reason::TupleTaken));
    assert_eq!(guest.ask("stat")["declined"]["untrackable"], 2);
}

#[test]
fn bad_messages_cost_their_sender_only() {
    let guest = Guest::new();
    let _backend = Backend::serve(&guest, 1);
    let good = Program::attach(&guest.socket(), 0);
    let mut wrong_kind = Message::Ping { n: 0 }.encode();
    wrong_kind[6] = 99;
    let mut wrong_version = Message::Ping { n: 0 }.encode();
    wrong_version[4] = 9;
    for (bytes, name) in [
        (vec![0; 7], "message-length"),
        (vec![0; MESSAGE_LEN], "message-magic"),
        (wrong_version.to_vec(), "message-version"),
        (wrong_kind.to_vec(), "message-kind"),
        (Message::Welcome { vni: 1, boot: 1 }.encode().to_vec(), "unexpected-message"),
        (
            Message::Track { handle: 1, tx: 0, rx: 0, connector: false, found: false }.encode().to_vec(),
            "track-descriptors",
        ),
    ] {
        let bad = Program::attach(&guest.socket(), 0);
        rustix::net::send(&bad.carrier, &bytes, SendFlags::empty()).unwrap();
        assert!(readable(&bad.carrier, SOON));
        assert!(matches!(bad.carrier.recv(), Ok(None) | Err(_)), "{name}");
        assert_eq!(guest.ask("stat")["drops"][name], 1, "{name}");
    }
    good.say(Message::Closed { record: 5 });
    good.say(Message::Left { conn: 1 << 40, generation: 1 });
    let (a, _b) = tcp_pair();
    good.tracked(&a, 0, 0);
    assert_eq!(guest.ask("stat")["drops"]["freed-record"], 2);
}

#[test]
fn an_answer_that_comes_too_late_costs_nobody_the_session() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let parent = Program::attach(&guest.socket(), 0);
    let (a, _b) = tcp_pair();
    let record = parent.tracked(&a, 0, 0);
    let conn = backend.opened().0;
    let slab = HostSlab::new(1);
    let ask = |generation| {
        let segment = slab.segment(Side::Zero, Lane::Direct);
        backend.carrier.send(&Message::Prepare { conn, generation, segment }, &slab.fds()).unwrap();
    };
    let prepare = |generation| {
        let bound = slab.bind(generation, Side::Zero, Lane::Direct);
        let (record, anchor) = (parent.record(record), a.as_fd());
        Endpoint { record, anchor, bound: Some(&bound), watchdog: None }.prepare(generation)
    };
    ask(1);
    assert!(matches!(parent.message(), Message::Prepare { generation: 1, .. }));
    let child = Program::attach(&guest.socket(), parent.id);
    prepare(1).unwrap();
    // Who was asked has the connection no longer, and his preparation is given up.
    parent.say(Message::Closed { record });
    assert_eq!(backend.message(), Message::Refused { conn, generation: 1, reason: Reason::Busy });
    child.carrier.send(&Message::Prepared { conn: record.into(), generation: 1 }, &[a.as_fd()]).unwrap();
    wait_for("the late answer", || guest.ask("stat")["drops"]["stale-prepared"] == 1);
    // The session goes on, and the next generation can be prepared.
    ask(2);
    assert!(matches!(child.message(), Message::Prepare { generation: 2, .. }));
    prepare(2).unwrap();
    child.carrier.send(&Message::Prepared { conn: record.into(), generation: 2 }, &[a.as_fd()]).unwrap();
    assert_eq!(backend.message(), Message::Prepared { conn, generation: 2 });
}

/// A stay has ended, bytes of it are unread, and more has come over the anchor. On a fabric lane what was not acknowledged comes
/// there once more. For the application it is one queue: one call counts it, peeks at it or receives it.
#[test]
fn one_call_reads_across_the_end_of_a_stay() {
    for (lane, peeks) in
        [(Lane::Direct, true), (Lane::Direct, false), (Lane::Fabric, true), (Lane::Fabric, false)]
    {
        let guest = Guest::new();
        let backend = Backend::serve(&guest, 1);
        let program = Program::attach(&guest.socket(), 0);
        let stay = Stay::begin(&program, &backend, lane);
        send(stay.far(), &pattern(300)[..200]);
        stay.far.header().directions[1].reader.confirmed.store(1, Ordering::Release);
        assert_eq!(stay.far().leave(1), Ok(true));
        send(stay.far(), &pattern(300)[200..]);
        let near = stay.near(&program);
        wait_for("all bytes", || near.unread() == Some(300));
        let mut room = [0; 400];
        if peeks {
            assert_eq!(near.recv(&mut [IoSliceMut::new(&mut room)], true, false), Ok(300), "{lane:?}");
            assert_eq!(room[..300], pattern(300)[..]);
            assert_eq!(near.unread(), Some(300));
        }
        room = [0; 400];
        let look = lane == Lane::Fabric;
        assert_eq!(near.recv(&mut [IoSliceMut::new(&mut room)], false, look), Ok(300), "{lane:?}");
        assert_eq!(room[..300], pattern(300)[..]);
        assert_eq!(near.unread(), Some(0));
    }
}

/// A fork hands on what is mapped, and no segment of later: so none is prepared while several processes have the connection.
#[test]
fn what_several_processes_have_is_not_prepared() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let parent = Program::attach(&guest.socket(), 0);
    let (a, _b) = tcp_pair();
    let record = parent.tracked(&a, 0, 0);
    let conn = backend.opened().0;
    let slab = HostSlab::new(1);
    let ask = |generation| {
        let segment = slab.segment(Side::Zero, Lane::Direct);
        backend.carrier.send(&Message::Prepare { conn, generation, segment }, &slab.fds()).unwrap();
    };
    let prepared = |generation| {
        let bound = slab.bind(generation, Side::Zero, Lane::Direct);
        let (of, anchor) = (parent.record(record), a.as_fd());
        Endpoint { record: of, anchor, bound: Some(&bound), watchdog: None }.prepare(generation).unwrap();
        let message = Message::Prepared { conn: record.into(), generation };
        parent.carrier.send(&message, &[a.as_fd()]).unwrap();
    };
    let refused = |generation| Message::Refused { conn, generation, reason: Reason::Busy };
    let child = Program::attach(&guest.socket(), parent.id);
    ask(1);
    assert_eq!(backend.message(), refused(1));
    child.say(Message::Closed { record });
    // An answer comes behind what was said before.
    child.carrier.send(&Message::Query { what: 0 }, &[]).unwrap();
    assert!(matches!(child.message(), Message::Reply { .. }));
    drop(child);
    // Forked between the question and the answer: the child has no segment either.
    ask(2);
    assert!(matches!(parent.message(), Message::Prepare { generation: 2, .. }));
    let child = Program::attach(&guest.socket(), parent.id);
    prepared(2);
    assert_eq!(backend.message(), refused(2));
    drop(child);
    wait_for("one process", || guest.ask("stat")["programs"]["processes"] == 1);
    ask(3);
    assert!(matches!(parent.message(), Message::Prepare { generation: 3, .. }));
    prepared(3);
    assert_eq!(backend.message(), Message::Prepared { conn, generation: 3 });
}

/// A program is about to be executed that inherits the connection: without its records and rings it finds the rest of the
/// stream in the kernel's socket, and what it does with it is not the agent's.
#[test]
fn an_inherited_connection_comes_back_with_what_was_not_received() {
    for (lane, received) in [(Lane::Direct, 100), (Lane::Direct, 0), (Lane::Fabric, 100), (Lane::Fabric, 0)] {
        let guest = Guest::new();
        let backend = Backend::serve(&guest, 1);
        let program = Program::attach(&guest.socket(), 0);
        let mut stay = Stay::begin(&program, &backend, lane);
        send(stay.far(), &pattern(300));
        assert_eq!(receive(stay.near(&program), received).unwrap(), pattern(300)[..received]);
        send(stay.near(&program), &pattern(50));
        let stranger = Carrier::connect(&guest.socket()).unwrap();
        let (conn, reason) = (stay.conn, Reason::Inherited);
        stranger.send(&Message::Parted { handle: 9, reason }, &[stay.a.as_fd()]).unwrap();
        assert_eq!(backend.message(), Message::Withdraw { conn, generation: 1, reason });
        nothing(&stranger, Duration::from_millis(50));
        // As the far agent does when it hears of it. On a fabric lane the backend has told it what was taken, and that the
        // stay is confirmed.
        let reader = &stay.far.header().directions[1].reader;
        reader.taken.store(received as u64, Ordering::Release);
        reader.confirmed.store(1, Ordering::Release);
        stay.far().record.untaken.store(1, Ordering::Release);
        assert_eq!(stay.far().leave(1), Ok(true));
        assert_eq!(message(&stranger), Message::Declined { conn: 9, reason });
        let left = |m| m == Message::Left { conn, generation: 1 };
        assert!(left(backend.message()), "{lane:?}");
        // From here on as a program without the library.
        let mut rest = vec![0; 300 - received];
        stay.a.read_exact(&mut rest).unwrap();
        assert_eq!(rest, pattern(300)[received..]);
        send(stay.far(), b"after");
        stay.a.read_exact(&mut rest[..5]).unwrap();
        assert_eq!(&rest[..5], b"after");
        stay.a.write_all(b"and back").unwrap();
        assert_eq!(receive(stay.far(), 58).unwrap(), [&pattern(50)[..], b"and back"].concat());
        program.say(Message::Closed { record: stay.record });
        assert_eq!(backend.message(), Message::Close { conn });
        stay.a.write_all(b"still").unwrap();
        assert_eq!(receive(stay.far(), 5).unwrap(), b"still");
        // It is never tracked again.
        let declined = program.track(&stay.a, 0, 0, true);
        assert!(matches!(declined, Message::Nudge { .. } | Message::Declined { .. }), "{declined:?}");
        assert_eq!(guest.ask("stat")["declined"]["inherited"].as_u64().map(|n| n > 0), Some(true));
    }
}

#[test]
fn a_prepare_for_nobody_is_refused() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let slab = HostSlab::new(1);
    let segment = slab.segment(Side::Zero, Lane::Direct);
    backend.say(Message::Prepare { conn: 999, generation: 4, segment });
    let refused = Message::Refused { conn: 999, generation: 4, reason: Reason::Ending };
    assert_eq!(backend.message(), refused);
}

#[test]
fn a_silent_backend_is_left_until_it_answers() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let mut stay = Stay::begin(&program, &backend, Lane::Fabric);
    nothing(&backend.carrier, Duration::from_millis(250));
    let began = Instant::now();
    send(stay.near(&program), &pattern(700));
    assert_eq!(backend.message(), Message::Ping { n: 1 });
    program.nudged(stay.record);
    assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
    let mut got = vec![0; 700];
    stay.b.read_exact(&mut got).unwrap();
    assert_eq!(got, pattern(700));
    assert_eq!(guest.ask("ss")[0]["reason"], "not-answering");
    let mut last = 0;
    while !matches!(backend.message(), Message::Ping { n } if { last = n; n >= 3 }) {}
    backend.say(Message::Pong { n: last });
    let opened = loop {
        match backend.message() {
            Message::Ping { .. } | Message::Left { .. } => {}
            Message::Open { min_generation, .. } => break min_generation,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(opened, 2);
    nothing(&backend.carrier, Duration::from_millis(300));
}

#[test]
fn an_answering_backend_keeps_its_lane_and_an_idle_agent_sleeps() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&program, &backend, Lane::Fabric);
    send(stay.near(&program), &pattern(700));
    for _ in 0..8 {
        match backend.message() {
            Message::Ping { n } => backend.say(Message::Pong { n }),
            other => panic!("{other:?}"),
        }
    }
    assert!(program.record(stay.record).is(status::TX_RING));
    let ring = stay.far.rx();
    ring.indices.reader.confirmed.store(1, Ordering::Release);
    ring.release(800);
    wait_for("the watchdog's sleep", || program.records.header().watchdog.load(Ordering::Acquire) == 1);
    while readable(&backend.carrier, Duration::from_millis(150)) {
        if let Message::Ping { n } = backend.message() {
            backend.say(Message::Pong { n });
        }
    }
    let switches = || {
        let text = std::fs::read_to_string(format!("/proc/{}/status", guest.agent.id())).unwrap();
        text.lines().filter(|l| l.contains("ctxt_switches")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = switches();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(switches(), before, "an idle agent wakes up");
}

#[test]
fn a_stopped_program_does_not_stop_the_agent() {
    let guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&program, &backend, Lane::Direct);
    send(stay.near(&program), b"x");
    let held = program.record(stay.record).tx.lock().unwrap();
    backend.say(Message::Withdraw { conn: stay.conn, generation: 1, reason: Reason::Drained });
    let other = Program::attach(&guest.socket(), 0);
    let (a, _b) = tcp_pair();
    other.tracked(&a, 0, 0);
    assert_eq!(guest.ask("stat")["connections"]["open"], 2);
    drop(held);
    let mut left = false;
    while !left {
        left = matches!(backend.message(), Message::Left { conn, .. } if conn == stay.conn);
    }
}

/// Its processes share the memory in which it says so, and any of them may be the one.
#[test]
fn a_program_that_has_more_to_say_than_the_socket_takes_is_told_when_it_takes_more() {
    let guest = Guest::new();
    let _backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let child = Program::attach(&guest.socket(), program.id);
    program.records.header().behind.store(1, Ordering::SeqCst);
    program.say(Message::Closed { record: 9 });
    program.nudged(u32::MAX);
    child.nudged(u32::MAX);
    assert_eq!(program.records.header().behind.load(Ordering::SeqCst), 0);
    program.say(Message::Closed { record: 9 });
    nothing(&program.carrier, Duration::from_millis(50));
}

#[test]
fn sigterm_leaves_the_lanes_and_removes_the_socket() {
    let mut guest = Guest::new();
    let backend = Backend::serve(&guest, 1);
    let program = Program::attach(&guest.socket(), 0);
    let stay = Stay::begin(&program, &backend, Lane::Direct);
    send(stay.near(&program), &pattern(4000));
    let pid = rustix::process::Pid::from_child(&guest.agent);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    program.nudged(stay.record);
    assert!(guest.agent.wait().unwrap().success());
    assert!(!guest.socket().exists());
    send(stay.near(&program), b"tcp");
    assert_eq!(receive(stay.far(), 4003).unwrap(), [&pattern(4000)[..], b"tcp"].concat());
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let mut guest = Guest::new();
    let mut second = start(&guest.dir);
    assert_eq!(second.wait().unwrap().code(), Some(1));
    guest.agent.kill().unwrap();
    guest.agent.wait().unwrap();
    assert!(guest.socket().exists());
    guest.agent = start(&guest.dir);
    wait_for("the agent's socket", || Carrier::connect(&guest.socket()).is_ok());
    guest.ask("stat");
}

#[test]
fn the_command_line_says_what_is_wrong() {
    let run = |args: &[&str]| {
        let out = Command::new(VSOCKET).args(args).env_remove("VSOCKET_AGENT").output().unwrap();
        let text = [out.stdout, out.stderr].concat();
        (out.status.code(), String::from_utf8_lossy(&text).into_owned())
    };
    let (code, text) = run(&["ss", "--agent", "/nonexistent/agent"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("/nonexistent/agent") && text.contains("vsocket agent"), "{text}");
    let (code, text) = run(&["doctor", "--agent", "/nonexistent/agent", "--", "no-such-command"]);
    assert_eq!(code, Some(1));
    assert!(text.matches("STOP").count() >= 2, "{text}");
    assert_eq!(run(&["run", "--", "no-such-command"]).0, Some(127));
    assert_eq!(run(&["run", "--", "/etc/passwd"]).0, Some(126));
}

#[test]
fn run_preloads_and_passes_the_status_on() {
    // Any library will do.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let library = maps.lines().filter_map(|l| l.split_whitespace().nth(5)).find(|p| p.contains("/libc.so"));
    let Some(library) = library else { return };
    let mut command = Command::new(VSOCKET);
    command.args([
        "run",
        "--agent",
        "rel/agent",
        "--",
        "sh",
        "-c",
        "echo $LD_PRELOAD $VSOCKET_AGENT; exit 3",
    ]);
    let out = command.env("VSOCKET_LIB", library).current_dir("/").output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{out:?}");
    assert_eq!(String::from_utf8_lossy(&out.stdout), format!("{library} /rel/agent\n"));
}
