//! Relays between guests of one host of which at least one is a virtual machine, with rings in the memory that it lends. The
//! machines are played; there is no fabric.
#![cfg(feature = "vm")]

mod common;
#[path = "common/machine.rs"]
mod machine;

use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Agent, Dir, End, Prepared, Running, config, eventually, vport};
use machine::{Guest, hear, machine_vport};
use vsocket_channel::message::{Lane, Message};
use vsocket_channel::reason::Reason;

const A: &str = "198.51.100.1:4000";
const B: &str = "198.51.100.2:80";
const C: &str = "198.51.100.3:80";

struct Lab {
    daemon: Running,
    dir: Dir,
}

impl Lab {
    /// Guests a and b are machines, c is a container that would share memory.
    fn new() -> Self {
        let dir = Dir::new();
        let vports = vec![
            machine_vport(&dir, "a", 100, "198.51.100.1"),
            machine_vport(&dir, "b", 100, "198.51.100.2"),
            vport(&dir, "c", 100, "198.51.100.3"),
        ];
        Self { daemon: Running::new(config(&dir, "h1", vports)), dir }
    }

    fn guest(&self, name: &str) -> Guest {
        Guest::new(&self.dir.0.join(name))
    }

    fn container(&self) -> Agent {
        Agent::new(&self.dir.0.join("c"))
    }

    fn lent(&self, vport: usize) -> u64 {
        self.daemon.stat()["vports"][vport]["machine"]["slabs"].as_u64().unwrap()
    }
}

/// A machine and the container.
fn pair(guest: &mut Guest, far: &Agent, generation: u32) -> (Prepared, Prepared) {
    guest.open(1, A, C, generation);
    far.open(1, C, A, generation);
    if guest.slabs.is_empty() {
        guest.lend();
    }
    let (ours, theirs) = (guest.prepare(), far.prepare());
    guest.commit(&ours);
    far.commit(&theirs);
    for prepared in [&ours, &theirs] {
        assert_eq!((prepared.segment.lane, prepared.segment.side.index()), (Lane::Fabric, 0));
    }
    (ours, theirs)
}

fn talk(one: &mut End, two: &mut End) {
    for round in 0..5u8 {
        let sent: Vec<u8> = (0..9000).map(|n| (n % 251) as u8 ^ round).collect();
        one.write(&sent);
        assert_eq!(two.read_exactly(sent.len()), sent);
        std::thread::sleep(Duration::from_millis(5));
        two.write(&sent[..70]);
        assert_eq!(one.read_exactly(70), sent[..70]);
    }
}

#[test]
fn a_machine_and_a_container() {
    let lab = Lab::new();
    let (mut guest, far) = (lab.guest("a"), lab.container());
    let (ours, theirs) = pair(&mut guest, &far, 1);
    let slab = ours.segment.slab;
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, u64::MAX - 9000));
    talk(&mut one, &mut two);
    let stat = lab.daemon.stat();
    assert_eq!((&stat["lanes"]["relay"], lab.lent(0)), (&1.into(), 1));
    assert_eq!(
        (&stat["vports"][0]["tx_bytes"], &stat["vports"][2]["rx_bytes"]),
        (&45000.into(), &45000.into())
    );
    guest.left(&one.prepared);
    assert_eq!(far.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerLeft });
    far.say(Message::Left { conn: 1, generation: 1 });
    let (ours, theirs) = pair(&mut guest, &far, 2);
    assert_eq!(ours.segment.slab, slab, "its memory was free again");
    talk(&mut End::new(ours, 5), &mut End::new(theirs, 9));
    assert_eq!(lab.daemon.stat()["drops"], serde_json::json!({}));
}

#[test]
fn two_machines() {
    let lab = Lab::new();
    let (mut a, mut b) = (lab.guest("a"), lab.guest("b"));
    a.open(1, A, B, 1);
    b.open(1, B, A, 3);
    // Both are asked at the same time.
    a.lend();
    b.lend();
    let (ours, theirs) = (a.prepare(), b.prepare());
    a.commit(&ours);
    b.commit(&theirs);
    assert_eq!((ours.generation, theirs.generation), (3, 3));
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    talk(&mut one, &mut two);
    // One that has announced its sleep is rung through its stream.
    two.prepared.view.header().waiters[0].mask.store(1 << 2, Ordering::SeqCst);
    two.prepared.view.slab().bells[0][2].announce();
    one.write(b"wake up");
    machine::until("no ring", || {
        let mut bytes = [0; 64];
        rustix::net::recv(&two.prepared.own[2], &mut bytes, rustix::net::RecvFlags::DONTWAIT).ok()
    });
    assert_eq!(two.read_exactly(7), b"wake up");
    assert_eq!([lab.lent(0), lab.lent(1)], [1, 1]);
}

#[test]
fn the_first_ones_memory_waits_for_the_seconds() {
    let lab = Lab::new();
    let (mut a, mut b) = (lab.guest("a"), lab.guest("b"));
    a.open(1, A, B, 1);
    b.open(1, B, A, 1);
    a.lend();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((lab.lent(0), &lab.daemon.stat()["stays"]), (1, &0.into()));
    let Message::SlabWanted { slab, .. } = hear(&mut b.keeper) else { panic!() };
    let reason = Reason::NoRingMemory;
    b.keeper.send(&Message::SlabRefused { slab, reason }, vec![]).unwrap();
    for agent in [&mut a.agent, &mut b.agent] {
        machine::until("no answer", || (hear(agent) == Message::Declined { conn: 1, reason }).then_some(()));
    }
    assert_eq!(lab.lent(0), 1, "kept, for the next");
}

#[test]
fn a_machine_that_stands_still_is_not_touched() {
    let lab = Lab::new();
    let (mut guest, far) = (lab.guest("a"), lab.container());
    let (ours, theirs) = pair(&mut guest, &far, 1);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    talk(&mut one, &mut two);
    guest.front.send(&Message::FrontPaused {}, vec![]).unwrap();
    assert_eq!(hear(&mut guest.front), Message::FrontQuiet {});
    let reason = Reason::GuestPaused;
    assert_eq!(far.hear(), Message::Withdraw { conn: 1, generation: 1, reason });
    let head = || one.directions()[1].head.head.load(Ordering::SeqCst);
    let before = head();
    two.write(b"too late");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(head(), before);
    far.say(Message::Left { conn: 1, generation: 1 });
    guest.front.send(&Message::FrontResumed {}, vec![]).unwrap();
    assert_eq!(hear(&mut guest.agent), Message::Withdraw { conn: 0, generation: 0, reason });
    guest.left(&one.prepared);
    let (ours, theirs) = pair(&mut guest, &far, 2);
    talk(&mut End::new(ours, 5), &mut End::new(theirs, 9));
}

#[test]
fn a_program_that_ends_has_its_pages_back() {
    let lab = Lab::new();
    let (mut guest, far) = (lab.guest("a"), lab.container());
    let (ours, theirs) = pair(&mut guest, &far, 1);
    let slab = ours.segment.slab;
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    talk(&mut one, &mut two);
    guest.bells.clear();
    guest.left(&one.prepared);
    drop(one);
    assert!(matches!(far.hear(), Message::Withdraw { .. }));
    // Whatever the other guest does.
    assert_eq!(hear(&mut guest.keeper), Message::SlabRelease { slab });
    assert_eq!(lab.daemon.stat()["stays"], 1);
    far.say(Message::Left { conn: 1, generation: 1 });
    eventually("the stay is over", || lab.daemon.stat()["stays"] == 0);
    assert_eq!(lab.lent(0), 0);
}
