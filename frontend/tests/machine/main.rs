//! The keeper and its agent as processes, between a host and programs that this test plays.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod host;

use common::{Program, SOON, pattern, readable, receive, send, tcp_pair, wait_for};
use host::{Caller, Machine, both, has_ended, nudged, pages, pages_of, parcel, ring};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;
use vsocket_channel::Side;
use vsocket_channel::layout::{BELLS, Geometry};
use vsocket_channel::message::{Lane, Message, Segment};
use vsocket_channel::reason::Reason;
use vsocket_frontend::carrier::Carrier;
use vsocket_frontend::endpoint::Endpoint;
use vsocket_frontend::memory::{Bound, Records, Slab};
use vsocket_frontend::record::status;

const TOKEN: u128 = 0x1234_5678_9abc_def0_0fed_cba9_8765_4321;

fn geometry() -> Geometry {
    Geometry::new(2, 1 << 16).unwrap()
}

fn slab_kib() -> usize {
    geometry().slab_len() / 1024
}

fn want(keeper: &mut Caller, slab: u64, program: u64) -> Vec<u64> {
    keeper.say(Message::SlabWanted { slab, program, geometry: geometry() });
    pages(keeper, slab, geometry())
}

/// A connection of a program on a lane to the host, which holds the other side of the segment.
struct Stay {
    a: TcpStream,
    b: TcpStream,
    record: u32,
    conn: u64,
    near: Bound,
    far: Bound,
    peer: Records,
    /// What came beside the question: the memfd, the program's bells, the host's bells.
    fds: Vec<OwnedFd>,
    /// The host's ends of the bells.
    bells: Vec<OwnedFd>,
    /// The pages, as the keeper told them.
    pages: Vec<u64>,
}

impl Stay {
    fn begin(machine: &Machine, keeper: &mut Caller, agent: &mut Caller, program: &Program) -> Self {
        let (mut a, mut b) = tcp_pair();
        a.write_all(&[1; 100]).unwrap();
        b.read_exact(&mut [0; 100]).unwrap();
        let record = program.tracked(&a, 100, 0);
        let Message::Open { conn, program: opener, .. } = agent.message() else { panic!("not opened") };
        assert_eq!(opener, program.id);
        let pages = want(keeper, conn, program.id);
        let bells = machine.bells(TOKEN, program.id);
        let segment = |side| Segment { slab: conn, index: 0, geometry: geometry(), side, lane: Lane::Fabric };
        agent.say(Message::Prepare { conn, generation: 1, segment: segment(Side::Zero) });
        let (asked, fds) = parcel(&program.carrier);
        let prepare = |conn| Message::Prepare { conn, generation: 1, segment: segment(Side::Zero) };
        assert_eq!(asked, prepare(u64::from(record)));
        assert_eq!(fds.len(), 1 + 2 * BELLS);
        let bind = |side| {
            let slab = Arc::new(Slab::map(&fds[0], conn, geometry()).unwrap());
            let far = fds[1 + BELLS..].iter().map(|fd| fd.try_clone().unwrap()).collect::<Vec<_>>();
            Bound::new(1, &segment(side), slab, Arc::new(far)).unwrap()
        };
        let (_, peer) = Records::create().unwrap();
        peer.record(0).unwrap().init(0, 100, false);
        let (near, far) = (bind(Side::Zero), bind(Side::One));
        let stay = Self { a, b, record, conn, near, far, peer, fds, bells, pages };
        stay.near(program).prepare(1).unwrap();
        stay.far().prepare(1).unwrap();
        let prepared = Message::Prepared { conn: u64::from(record), generation: 1 };
        program.carrier.send(&prepared, &[stay.a.as_fd()]).unwrap();
        assert_eq!(agent.message(), Message::Prepared { conn, generation: 1 });
        agent.say(Message::Commit { conn, generation: 1 });
        nudged(&program.carrier, record);
        stay
    }

    fn near<'a>(&'a self, program: &'a Program) -> Endpoint<'a> {
        let watchdog = Some((program.records.header(), program.watchdog.as_fd()));
        let record = program.record(self.record);
        Endpoint { record, anchor: self.a.as_fd(), bound: Some(&self.near), watchdog }
    }

    fn far(&self) -> Endpoint<'_> {
        let record = self.peer.record(0).unwrap();
        Endpoint { record, anchor: self.b.as_fd(), bound: Some(&self.far), watchdog: None }
    }
}

/// What an agent says beside pings, which are answered.
fn next(agent: &mut Caller) -> Message {
    loop {
        match agent.message() {
            Message::Ping { n } => agent.say(Message::Pong { n }),
            other => return other,
        }
    }
}

#[test]
fn a_keeper_brings_the_token_that_it_was_given() {
    let mut machine = Machine::new();
    let (keeper, agent) = both(&machine, 0, TOKEN, 1);
    let stat = machine.ask("stat");
    assert_eq!((&stat["keeper"]["registered"], &stat["backend"]["connected"]), (&true.into(), &true.into()));
    // The daemon dies: all streams end.
    drop((keeper, agent));
    let (_keeper, _agent) = both(&machine, TOKEN, TOKEN + 1, 2);
    // And the keeper.
    machine.keeper.kill().unwrap();
    machine.keeper.wait().unwrap();
    wait_for("the agent's end", || Carrier::connect(&machine.socket()).is_err());
    machine.restart();
    both(&machine, TOKEN + 1, TOKEN, 2);
}

#[test]
fn a_second_keeper_does_not_take_the_first_ones_registration() {
    let machine = Machine::new();
    let _host = both(&machine, 0, TOKEN, 1);
    let mut second = host::start(&machine.dir);
    assert_eq!(second.wait().unwrap().code(), Some(1));
    assert!(!machine.is_called(Duration::from_millis(200)));
    assert_eq!(machine.ask("stat")["backend"]["connected"], true);
}

#[test]
fn a_keeper_is_not_chosen_when_memory_is_short() {
    let machine = Machine::new();
    let _host = both(&machine, 0, TOKEN, 1);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let rights = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let of = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    // CAP_SYS_RESOURCE, which a test may not have.
    if u64::from_str_radix(rights.trim(), 16).unwrap() & 1 << 24 != 0 {
        assert_eq!(of(machine.keeper.id()).trim(), "-1000");
    }
    assert_eq!(of(machine.agent() as u32), of(std::process::id()));
}

#[test]
fn a_host_that_speaks_nonsense_is_left_alone_for_a_while() {
    let machine = Machine::new();
    let mut keeper = machine.register(0, TOKEN, 1);
    let _agent = machine.welcome(TOKEN, 1);
    keeper.say(Message::Ping { n: 1 });
    assert_eq!(keeper.hear(), None);
    assert!(!machine.is_called(Duration::from_millis(500)));
    machine.register(TOKEN, TOKEN, 1);
}

#[test]
fn memory_is_pinned_until_the_host_lets_go_of_it() {
    let machine = Machine::new();
    let (mut keeper, agent) = both(&machine, 0, TOKEN, 1);
    let mut told = Vec::new();
    for slab in 1..=3 {
        let pages = want(&mut keeper, slab, 77);
        assert!(!pages.contains(&0));
        told.extend(pages);
        wait_for("word of it", || machine.ask("stat")["keeper"]["slabs"] == slab);
    }
    told.sort_unstable();
    told.dedup();
    assert_eq!((told.len(), machine.pinned()), (3 * slab_kib() / 4, 3 * slab_kib()));
    assert_eq!(machine.ask("stat")["keeper"]["pinned"], 3 * geometry().slab_len());
    keeper.say(Message::SlabRelease { slab: 2 });
    wait_for("its release", || machine.pinned() == 2 * slab_kib());
    wait_for("word of it", || machine.ask("stat")["keeper"]["slabs"] == 2);
    drop((keeper, agent));
    let mut keeper = machine.registering(TOKEN);
    assert_eq!(machine.pinned(), 2 * slab_kib(), "a stream's end frees nothing");
    keeper.say(Message::Registered { token: TOKEN + 1, boot: 2 });
    wait_for("its release", || machine.pinned() == 0);
    machine.welcome(TOKEN + 1, 2);
}

#[test]
fn more_than_there_is_is_refused() {
    let machine = Machine::new();
    let (mut keeper, _agent) = both(&machine, 0, TOKEN, 1);
    let geometry = Geometry::new(1024, 1 << 30).unwrap();
    keeper.say(Message::SlabWanted { slab: 1, program: 1, geometry });
    assert_eq!(keeper.message(), Message::SlabRefused { slab: 1, reason: Reason::NoRingMemory });
    want(&mut keeper, 2, 1);
}

#[test]
fn a_program_has_its_lane_over_memory_of_the_keeper() {
    let machine = Machine::new();
    let (mut keeper, mut agent) = both(&machine, 0, TOKEN, 1);
    let program = Program::attach(&machine.socket(), 0);
    let stay = Stay::begin(&machine, &mut keeper, &mut agent, &program);
    assert_eq!(stay.pages, pages_of(&stay.fds[0], geometry().slab_len()));
    send(stay.near(&program), &pattern(5000));
    assert!(program.record(stay.record).is(status::TX_RING));
    assert_eq!(stay.far.rx().indices.head.head.load(std::sync::atomic::Ordering::Acquire), 5100);
    assert_eq!(receive(stay.far(), 5000).unwrap(), pattern(5000));

    // A program that ends ends its bells.
    assert!(!stay.bells.iter().any(has_ended));
    let Stay { a, b, bells, conn, .. } = stay;
    drop((a, b, program));
    assert_eq!(next(&mut agent), Message::Left { conn, generation: 1 });
    assert_eq!(next(&mut agent), Message::Close { conn });
    wait_for("the bells' end", || bells.iter().all(has_ended));
    keeper.say(Message::SlabRelease { slab: conn });
    wait_for("its release", || machine.pinned() == 0);
}

#[test]
fn bells_are_streams_that_nobody_drains() {
    use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
    let machine = Machine::new();
    let (mut keeper, mut agent) = both(&machine, 0, TOKEN, 1);
    let program = Program::attach(&machine.socket(), 0);
    let stay = Stay::begin(&machine, &mut keeper, &mut agent, &program);
    let (own, far) = stay.fds[1..].split_at(BELLS);
    for (n, bell) in far.iter().enumerate() {
        ring(bell);
        assert!(readable(&stay.bells[0], SOON), "bell {n}");
        assert_eq!(rustix::io::read(&stay.bells[0], &mut [0; 64][..]), Ok(8));
    }
    let set = epoll::create(CreateFlags::CLOEXEC).unwrap();
    for (n, bell) in own.iter().enumerate() {
        epoll::add(&set, bell, EventData::new_u64(n as u64), EventFlags::IN | EventFlags::ET).unwrap();
    }
    let edges = || {
        let mut space = [std::mem::MaybeUninit::uninit(); 8];
        let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let (events, _) = epoll::wait(&set, &mut space, Some(&zero)).unwrap();
        events.iter().map(|e| e.data.u64()).collect::<Vec<_>>()
    };
    assert_eq!(edges(), [] as [u64; 0]);
    for n in [2, 2, 0, 3] {
        assert_eq!(ring(&stay.bells[n]), 8);
        assert_eq!(edges(), [n as u64]);
    }
    // The agent, which holds them too, is not woken by them.
    let switches = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", machine.agent())).unwrap();
        status.lines().filter(|l| l.contains("ctxt_switches")).map(str::to_owned).collect::<Vec<_>>()
    };
    std::thread::sleep(Duration::from_millis(200));
    let before = switches();
    for bell in &stay.bells {
        ring(bell);
        edges();
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(switches(), before);
    // Full: what rings then is heard of all the same, once it was read down.
    while ring(&stay.bells[1]) > 0 {}
    assert_eq!(edges(), [1]);
    agent.say(Message::BellFull { program: program.id, bell: 1 });
    wait_for("room", || ring(&stay.bells[1]) == 8);
    wait_for("the ring", || edges() == [1]);
    assert!(readable(&own[1], Duration::ZERO));
}

#[test]
fn a_bell_that_the_host_ends_takes_the_lanes_along() {
    let machine = Machine::new();
    let (mut keeper, mut agent) = both(&machine, 0, TOKEN, 1);
    let program = Program::attach(&machine.socket(), 0);
    let mut stay = Stay::begin(&machine, &mut keeper, &mut agent, &program);
    send(stay.near(&program), &pattern(3000));
    stay.bells.pop();
    nudged(&program.carrier, stay.record);
    assert!(matches!(next(&mut agent), Message::Left { generation: 1, .. }));
    let mut got = vec![0; 3000];
    stay.b.read_exact(&mut got).unwrap();
    assert_eq!(got, pattern(3000));
    // And ringing those that are left kills nobody.
    stay.near.ring_far();
    assert!(matches!(next(&mut agent), Message::Open { min_generation: 2, .. }));
    // The slab is still there, so its bells come again.
    let _bells = machine.bells(TOKEN, program.id);
    let segment =
        Segment { slab: stay.conn, index: 1, geometry: geometry(), side: Side::Zero, lane: Lane::Fabric };
    agent.say(Message::Prepare { conn: stay.conn, generation: 2, segment });
    assert_eq!(parcel(&program.carrier).1.len(), 1 + 2 * BELLS);
}

#[test]
fn an_agent_that_is_killed_is_followed_by_another() {
    let machine = Machine::new();
    let (mut keeper, mut agent) = both(&machine, 0, TOKEN, 1);
    let program = Program::attach(&machine.socket(), 0);
    let stay = Stay::begin(&machine, &mut keeper, &mut agent, &program);
    send(stay.near(&program), &pattern(100));
    machine.signal(machine.agent(), Signal::KILL);
    assert_eq!(agent.hear(), None);
    // The memory stays where it is: the host has not said anything.
    let agent = machine.welcome(TOKEN, 1);
    assert_eq!(machine.pinned(), slab_kib());
    assert_eq!(receive(stay.far(), 100).unwrap(), pattern(100));
    let (before, again) = (program.id, Program::attach(&machine.socket(), 0));
    assert_ne!(again.id, before, "the host may still know it");
    keeper.say(Message::SlabRelease { slab: stay.conn });
    wait_for("its release", || machine.pinned() == 0);
    drop(agent);
}

#[test]
fn sigterm_lets_the_host_let_go_first() {
    let mut machine = Machine::new();
    let (mut keeper, mut agent) = both(&machine, 0, TOKEN, 1);
    let program = Program::attach(&machine.socket(), 0);
    let stay = Stay::begin(&machine, &mut keeper, &mut agent, &program);
    send(stay.near(&program), &pattern(100));
    machine.signal(machine.keeper.id() as i32, Signal::TERM);
    nudged(&program.carrier, stay.record);
    assert!(matches!(next(&mut agent), Message::Left { generation: 1, .. }));
    assert_eq!(agent.hear(), None, "the agent has ended");
    assert_eq!((machine.pinned(), machine.keeper.try_wait().unwrap()), (slab_kib(), None));
    keeper.say(Message::SlabRelease { slab: stay.conn });
    assert!(machine.keeper.wait().unwrap().success());
    assert!(!machine.socket().exists());
}

#[test]
fn doctor_names_what_keeps_the_keeper_from_registering() {
    let machine = Machine::new();
    wait_for("the agent's socket", || Carrier::connect(&machine.socket()).is_ok());
    let doctor = || {
        let mut asked = std::process::Command::new(common::VSOCKET);
        let out = asked.args(["doctor", "--agent"]).arg(machine.socket()).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    let said = doctor();
    assert!(said.contains("the keeper is not registered at unix-stream:"), "{said}");
    assert!(said.contains("does not let the keeper register"), "{said}");
    let (_keeper, _agent) = both(&machine, 0, TOKEN, 1);
    wait_for("the registration", || doctor().contains("ok    keeper registered at"));
}
