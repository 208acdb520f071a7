//! The daemon's side of a virtual machine: a front and its guest's programs, played by hand.
#![cfg(feature = "vm")]

mod common;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Dir, Running, config, vport};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vsocket_backend::carrier::{Carrier, Gone, reach};
use vsocket_backend::config::Machine;
use vsocket_channel::message::{Message, Region, Tuple};
use vsocket_channel::reason::Reason;

const CID: u32 = 9;
const PORT: u32 = 7650;

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct World {
    daemon: Running,
    dir: Dir,
}

impl World {
    fn new() -> Self {
        let dir = Dir::new();
        let mut machine = vport(&dir, "vm", 100, "198.51.100.1");
        machine.machine = Some(Machine { cid: CID, front: dir.0.join("qemu"), port: PORT, max_streams: 8 });
        let daemon = Running::new(config(&dir, "h", vec![machine, vport(&dir, "c", 100, "198.51.100.2")]));
        Self { daemon, dir }
    }

    fn front(&self) -> Carrier {
        let mut front = reach(&self.dir.0.join("vm")).unwrap();
        front.send(&Message::FrontHello { pid: 77, cid: CID.into() }, vec![]).unwrap();
        let (welcome, pidfd) = until("no welcome", || front.receive_with().unwrap());
        assert!(matches!(welcome, Message::FrontWelcome { .. }) && pidfd.is_some());
        front
    }

    fn drops(&self, name: &str) -> u64 {
        self.daemon.stat()["drops"][name].as_u64().unwrap_or(0)
    }

    fn counts(&self, name: &str) {
        until(name, || (self.drops(name) == 1).then_some(()));
    }
}

/// A stream from this port of the guest.
fn call(front: &mut Carrier, guest_port: u32, host_port: u32) -> Carrier {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let message = Message::FrontStream { id: 1, guest_port, host_port };
    front.send(&message, vec![Arc::new(far)]).unwrap();
    Carrier::stream(near)
}

fn hear(carrier: &mut Carrier) -> Message {
    until("nothing is said", || {
        carrier.flush().unwrap();
        carrier.receive().unwrap()
    })
}

fn is_hung_up_on(carrier: &mut Carrier) {
    until("it is heard", || matches!(carrier.receive(), Err(Gone::Closed)).then_some(()));
}

const HELLO: Message = Message::Hello { pid: 5 };

fn register(front: &mut Carrier, guest_port: u32) -> Carrier {
    let mut agent = call(front, guest_port, PORT);
    agent.send(&HELLO, vec![]).unwrap();
    assert!(matches!(hear(&mut agent), Message::Welcome { vni: 100, .. }));
    agent
}

#[test]
fn an_agent_speaks_over_a_stream_of_the_guest() {
    let world = World::new();
    let mut front = world.front();
    let mut agent = register(&mut front, 1023);
    for n in 0..300 {
        agent.send(&Message::Ping { n }, vec![]).unwrap();
    }
    (0..300).for_each(|n| assert_eq!(hear(&mut agent), Message::Pong { n }));
    let tuple = Tuple::new("198.51.100.1:80".parse().unwrap(), "198.51.100.2:90".parse().unwrap());
    agent.send(&Message::Open { conn: 3, program: 1, tuple, min_generation: 0 }, vec![]).unwrap();
    assert_eq!(hear(&mut agent), Message::Declined { conn: 3, reason: Reason::NoRingMemory });
    let stat = world.daemon.stat();
    assert_eq!(
        (&stat["vports"][0]["agent"], &stat["vports"][0]["machine"]["front"]),
        (&true.into(), &true.into())
    );
    assert!(stat["vports"][1]["machine"].is_null());
}

#[test]
fn a_boot_has_one_registration() {
    let world = World::new();
    let mut front = world.front();
    let agent = register(&mut front, 1000);
    let mut second = call(&mut front, 1001, PORT);
    second.send(&HELLO, vec![]).unwrap();
    is_hung_up_on(&mut second);
    world.counts("second-agent");
    // Not even when the first is gone; but in the next boot.
    drop(agent);
    let mut third = call(&mut front, 1002, PORT);
    third.send(&HELLO, vec![]).unwrap();
    is_hung_up_on(&mut third);
    front.send(&Message::FrontReset {}, vec![]).unwrap();
    register(&mut front, 1003);
}

#[test]
fn who_is_not_the_agent_gets_nowhere() {
    let world = World::new();
    let mut front = world.front();
    let mut unprivileged = call(&mut front, 1024, PORT);
    unprivileged.send(&HELLO, vec![]).unwrap();
    is_hung_up_on(&mut unprivileged);
    world.counts("agent-unprivileged");
    let mut elsewhere = call(&mut front, 1, PORT + 1);
    is_hung_up_on(&mut elsewhere);
    world.counts("caller-port");
    let mut confused = call(&mut front, 1, PORT);
    confused.send(&Message::Ping { n: 1 }, vec![]).unwrap();
    is_hung_up_on(&mut confused);
    world.counts("message-unexpected");
    // Silent ones are in nobody's way.
    let _silent: Vec<_> = (0..20).map(|n| call(&mut front, n, PORT)).collect();
    register(&mut front, 1000);
}

#[test]
fn who_is_not_the_front_gets_nowhere() {
    let world = World::new();
    let path = world.dir.0.join("vm");
    let mut wrong = reach(&path).unwrap();
    wrong.send(&Message::FrontHello { pid: 1, cid: 10 }, vec![]).unwrap();
    is_hung_up_on(&mut wrong);
    world.counts("front-cid");
    let mut container = reach(&path).unwrap();
    container.send(&HELLO, vec![]).unwrap();
    is_hung_up_on(&mut container);
    let mut machine = reach(&world.dir.0.join("c")).unwrap();
    machine.send(&Message::FrontHello { pid: 1, cid: CID.into() }, vec![]).unwrap();
    is_hung_up_on(&mut machine);
    let mut front = world.front();
    let mut second = reach(&path).unwrap();
    is_hung_up_on(&mut second);
    world.counts("second-front");
    // The first one's streams do not end with its link, and it may come back.
    let mut agent = register(&mut front, 1000);
    drop(front);
    let mut front = world.front();
    agent.send(&Message::Ping { n: 1 }, vec![]).unwrap();
    assert_eq!(hear(&mut agent), Message::Pong { n: 1 });
    front.send(&Message::Ping { n: 1 }, vec![]).unwrap();
    is_hung_up_on(&mut front);
}

#[test]
fn the_guests_memory_comes_region_by_region() {
    let world = World::new();
    let mut front = world.front();
    let memory = |want: u64| {
        let bytes = || world.daemon.stat()["vports"][0]["machine"]["memory_bytes"].as_u64();
        until("the memory is another", || (bytes() == Some(want)).then_some(()));
    };
    let memfd = |seals| -> Arc<OwnedFd> {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 1 << 20).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        Arc::new(fd)
    };
    let sealed = memfd(SealFlags::SHRINK);
    let region =
        |index, count| Region { index, count, address: u64::from(index) << 32, size: 1 << 20, offset: 0 };
    for index in 0..2 {
        let message = Message::FrontRegion { table: 1, region: region(index, 2) };
        front.send(&message, vec![sealed.clone()]).unwrap();
    }
    memory(2 << 20);
    let message = Message::FrontRegion { table: 2, region: region(0, 1) };
    front.send(&message, vec![memfd(SealFlags::GROW)]).unwrap();
    memory(0);
    world.counts("memory-unsealed");
    front.send(&message, vec![sealed.clone()]).unwrap();
    memory(1 << 20);
    let paused = || world.daemon.stat()["vports"][0]["machine"]["paused"] == true;
    front.send(&Message::FrontPaused {}, vec![]).unwrap();
    assert_eq!(hear(&mut front), Message::FrontQuiet {});
    assert!(paused());
    front.send(&Message::FrontResumed {}, vec![]).unwrap();
    until("it is not resumed", || (!paused()).then_some(()));
    front.send(&Message::FrontGone {}, vec![]).unwrap();
    memory(0);
}

#[test]
fn a_guest_that_is_gone_takes_its_agent_along() {
    let world = World::new();
    let mut front = world.front();
    let agent = register(&mut front, 1000);
    drop(agent);
    front.send(&Message::FrontGone {}, vec![]).unwrap();
    until("the agent stays", || (world.daemon.stat()["vports"][0]["agent"] == false).then_some(()));
    register(&mut front, 1000);
}
