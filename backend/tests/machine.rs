//! The daemon's side of a virtual machine: a front and its guest's programs, played by hand.
#![cfg(feature = "vm")]

mod common;
#[path = "common/machine.rs"]
mod machine;

use common::{Dir, Running, config, vport};
use machine::{
    Guest, PORT, call, front, hear, is_hung_up_on, machine_vport, memfd, present_agent, register, until,
};
use rustix::fs::SealFlags;
use std::sync::Arc;
use vsocket_backend::carrier::{Carrier, reach};
use vsocket_channel::message::{Message, Region};

struct World {
    daemon: Running,
    dir: Dir,
}

impl World {
    fn new() -> Self {
        let dir = Dir::new();
        let machine = machine_vport(&dir, "vm", 100, "198.51.100.1");
        let daemon = Running::new(config(&dir, "h", vec![machine, vport(&dir, "c", 100, "198.51.100.2")]));
        Self { daemon, dir }
    }

    fn front(&self) -> Carrier {
        front(&self.dir.0.join("vm"))
    }

    fn guest(&self) -> Guest {
        Guest::new(&self.dir.0.join("vm"))
    }

    fn drops(&self, name: &str) -> u64 {
        self.daemon.stat()["drops"][name].as_u64().unwrap_or(0)
    }

    fn counts(&self, name: &str) {
        until(name, || (self.drops(name) == 1).then_some(()));
    }
}

const HELLO: Message = Message::Hello { pid: 5 };

#[test]
fn a_keeper_registers_and_an_agent_presents_itself() {
    let world = World::new();
    let mut guest = world.guest();
    for n in 0..300 {
        guest.agent.send(&Message::Ping { n }, vec![]).unwrap();
    }
    (0..300).for_each(|n| assert_eq!(hear(&mut guest.agent), Message::Pong { n }));
    let stat = world.daemon.stat();
    let machine = &stat["vports"][0]["machine"];
    assert_eq!(
        (&stat["vports"][0]["agent"], &machine["front"], &machine["registered"]),
        (&true.into(), &true.into(), &true.into())
    );
    assert!(stat["vports"][1]["machine"].is_null());
    // An agent that has died is followed by another.
    drop(guest.agent);
    guest.agent = present_agent(&mut guest.front, guest.token);
}

#[test]
fn a_boot_has_one_registration() {
    let world = World::new();
    let mut guest = world.guest();
    let refused = |guest: &mut Guest, token, times| {
        let mut second = call(&mut guest.front, 1001, PORT);
        second.send(&Message::Register { token, pid: 1 }, vec![]).unwrap();
        is_hung_up_on(&mut second);
        until("it is counted", || (world.drops("second-registration") == times).then_some(()));
    };
    refused(&mut guest, 0, 1);
    let wrong = guest.token ^ 1;
    refused(&mut guest, wrong, 2);
    // Not even when the first is gone; but with its token, and in the next boot.
    let Guest { front: mut guest_front, ram, token, keeper, .. } = guest;
    drop(keeper);
    let mut third = call(&mut guest_front, 1002, PORT);
    third.send(&Message::Register { token: 0, pid: 1 }, vec![]).unwrap();
    is_hung_up_on(&mut third);
    assert_eq!(register(&mut guest_front, 1003, token).1, token);
    guest_front.send(&Message::FrontReset {}, vec![]).unwrap();
    assert_ne!(register(&mut guest_front, 1003, 0).1, token);
    drop(guest_front);
    // Another daemon knows what the front has kept.
    let mut again = Guest::with(&world.dir.0.join("vm"), ram, 7, Some(7));
    assert_eq!(again.token, 7);
    let mut stranger = call(&mut again.front, 1001, PORT);
    stranger.send(&Message::Register { token: 0, pid: 1 }, vec![]).unwrap();
    is_hung_up_on(&mut stranger);
}

#[test]
fn who_is_not_the_agent_gets_nowhere() {
    let world = World::new();
    let mut front = world.front();
    let mut early = call(&mut front, 1000, PORT);
    early.send(&Message::Register { token: 0, pid: 1 }, vec![]).unwrap();
    is_hung_up_on(&mut early);
    world.counts("registration-early");
    drop(front);
    let Guest { mut front, token, agent: _agent, keeper: _keeper, .. } = world.guest();
    let mut refused = |guest_port, host_port, message, name| {
        let mut caller = call(&mut front, guest_port, host_port);
        caller.send(&message, vec![]).unwrap();
        is_hung_up_on(&mut caller);
        world.counts(name);
    };
    refused(1024, PORT, Message::Register { token, pid: 1 }, "registration-unprivileged");
    refused(1000, PORT, Message::Present { token: token ^ 1, program: 0, bell: 0 }, "present-token");
    refused(1000, PORT, Message::Present { token, program: 1, bell: 4 }, "bell-number");
    refused(1, PORT, HELLO, "message-unexpected");
    refused(1, PORT, Message::Present { token, program: 0, bell: 0 }, "second-agent");
    let mut elsewhere = call(&mut front, 1, PORT + 1);
    is_hung_up_on(&mut elsewhere);
    world.counts("caller-port");
    // Silent ones are in nobody's way.
    let _silent: Vec<_> = (0..20).map(|n| call(&mut front, n, PORT)).collect();
    register(&mut front, 1000, token);
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
    let mut other = reach(&world.dir.0.join("c")).unwrap();
    other.send(&Message::FrontHello { pid: 1, cid: machine::CID.into() }, vec![]).unwrap();
    is_hung_up_on(&mut other);
    let mut front = world.front();
    let mut second = reach(&path).unwrap();
    is_hung_up_on(&mut second);
    world.counts("second-front");
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
    let memfd = |seals| Arc::new(memfd(1 << 20, seals));
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
    let Guest { mut front, mut agent, mut keeper, ram, .. } = world.guest();
    front.send(&Message::FrontGone {}, vec![]).unwrap();
    is_hung_up_on(&mut agent);
    is_hung_up_on(&mut keeper);
    assert_eq!(world.daemon.stat()["vports"][0]["machine"]["registered"], false);
    machine::tell_memory(&mut front, 2, &ram);
    register(&mut front, 1000, 0);
}
