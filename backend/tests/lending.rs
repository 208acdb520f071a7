//! Lanes on memory that a virtual machine lends. The machine is played; another host's guest is a container.
#![cfg(feature = "vm")]

mod common;
#[path = "common/machine.rs"]
mod machine;

use common::{Agent, Dir, End, Prepared, RING, Running, Switch, eventually, soft, two_hosts_of, vport};
use machine::{
    Guest, call, hear, is_hung_up_on, machine_vport, present_agent, present_bells, register, until,
};
use vsocket_channel::message::{Message, Runs};
use vsocket_channel::reason::Reason;

const A: &str = "198.51.100.1:4000";
const B: &str = "198.51.100.2:90";
const B_ADDRESS: &str = "198.51.100.2";
const C: &str = "198.51.100.3:80";

struct Lab {
    h1: Running,
    h2: Running,
    _switch: Switch,
    dir: Dir,
}

impl Lab {
    fn new() -> Self {
        let dir = Dir::new();
        let one = vec![machine_vport(&dir, "a", 100, "198.51.100.1"), vport(&dir, "b", 100, B_ADDRESS)];
        let two = vec![vport(&dir, "c", 100, "198.51.100.3")];
        let (h1, h2, switch) = two_hosts_of(&dir, RING, [soft(), soft()], [one, two]);
        Self { h1, h2, _switch: switch, dir }
    }

    fn guest(&self) -> Guest {
        Guest::new(&self.dir.0.join("a"))
    }

    fn far(&self) -> Agent {
        Agent::new(&self.dir.0.join("c"))
    }

    fn drops(&self, name: &str) -> u64 {
        self.h1.stat()["drops"][name].as_u64().unwrap_or(0)
    }

    fn counts(&self, name: &str) {
        until(name, || (self.drops(name) == 1).then_some(()));
    }

    fn lent(&self) -> u64 {
        self.h1.stat()["vports"][0]["machine"]["slabs"].as_u64().unwrap()
    }
}

fn pair(guest: &mut Guest, far: &Agent, conn: u64, generation: u32) -> (Prepared, Prepared) {
    guest.open(conn, A, C, generation);
    far.open(conn, C, A, generation);
    guest.lend();
    let (ours, theirs) = (guest.prepare(), far.prepare());
    guest.commit(&ours);
    far.commit(&theirs);
    (ours, theirs)
}

fn talk(one: &mut End, two: &mut End) {
    for round in 0..5u8 {
        let sent: Vec<u8> = (0..9000).map(|n| (n % 251) as u8 ^ round).collect();
        one.write(&sent);
        assert_eq!(two.read_exactly(sent.len()), sent);
        std::thread::sleep(std::time::Duration::from_millis(5));
        two.write(&sent[..70]);
        assert_eq!(one.read_exactly(70), sent[..70]);
    }
}

#[test]
fn a_lane_runs_in_the_guests_own_pages_and_they_go_back() {
    let lab = Lab::new();
    let (mut guest, far) = (lab.guest(), lab.far());
    let (ours, theirs) = pair(&mut guest, &far, 1, 1);
    let slab = ours.segment.slab;
    assert_eq!((lab.lent(), ours.segment.geometry.segments()), (1, 2));
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    talk(&mut one, &mut two);
    let rung = rustix::net::recv(&one.prepared.own[0], &mut [0u8; 64], rustix::net::RecvFlags::DONTWAIT);
    assert!(rung.is_err(), "nobody sleeps at the guest");
    guest.left(&one.prepared);
    assert!(matches!(far.hear(), Message::Withdraw { .. }));
    far.say(Message::Left { conn: 1, generation: 1 });
    eventually("the stay is over", || lab.h1.stat()["stays"] == 0);
    assert_eq!(lab.lent(), 1, "an idle slab is kept");
    // The program ends: its memory is its own again.
    guest.bells.clear();
    drop(one);
    assert_eq!(hear(&mut guest.keeper), Message::SlabRelease { slab });
    assert_eq!(lab.lent(), 0);
}

#[test]
fn an_announced_sleeper_is_rung_by_bytes_on_its_stream() {
    let lab = Lab::new();
    let (mut guest, far) = (lab.guest(), lab.far());
    let (ours, theirs) = pair(&mut guest, &far, 1, 1);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    talk(&mut one, &mut two);
    one.prepared.view.header().waiters[0].mask.store(1 << 2, std::sync::atomic::Ordering::SeqCst);
    one.prepared.view.slab().bells[0][2].announce();
    two.write(b"wake up");
    let got = until("no ring", || {
        let mut bytes = [0; 64];
        rustix::net::recv(&one.prepared.own[2], &mut bytes, rustix::net::RecvFlags::DONTWAIT).ok()
    });
    assert_eq!(got.1, 8);
    assert_eq!(one.read_exactly(7), b"wake up");
}

#[test]
fn memory_that_it_does_not_have_is_refused_by_name() {
    let lab = Lab::new();
    let (mut guest, far) = (lab.guest(), lab.far());
    let pci_hole = machine::RAM / 2 / 4096;
    let bad: [(&str, Vec<u64>); 3] = [
        ("pages-outside", vec![pci_hole]),
        ("pages-outside", vec![pci_hole - 1, pci_hole]),
        ("pages-count", (1..2000).collect()),
    ];
    for (n, (name, pages)) in bad.into_iter().enumerate() {
        let conn = n as u64 + 1;
        let (local, remote) = (format!("198.51.100.1:{}", 4000 + n), C);
        far.open(conn, remote, &local, 1);
        guest.open(conn, &local, remote, 1);
        let Message::SlabWanted { slab, .. } = hear(&mut guest.keeper) else { panic!() };
        let before = lab.drops(name);
        guest.tell_pages(slab, &pages);
        assert_eq!(hear(&mut guest.keeper), Message::SlabRelease { slab });
        assert_eq!(lab.drops(name), before + 1);
        let declined = until("no answer", || match hear(&mut guest.agent) {
            Message::Declined { reason: Reason::PeerNotOpen, .. } => None,
            other => Some(other),
        });
        assert_eq!(declined, Message::Declined { conn, reason: Reason::NoRingMemory });
        // A refusal stands until the next registration.
        let token = guest.token;
        (guest.keeper, _) = register(&mut guest.front, 1000, token);
        is_hung_up_on(&mut guest.agent);
        guest.agent = present_agent(&mut guest.front, token);
        guest.bells = present_bells(&mut guest.front, token);
    }
    // Pages of a slab that nobody asked for.
    let runs = Runs::of(&[7]).unwrap().0;
    guest.keeper.send(&Message::SlabPages { slab: 999, first: 0, runs }, vec![]).unwrap();
    assert_eq!(hear(&mut guest.keeper), Message::SlabRelease { slab: 999 });
    pair(&mut guest, &far, 9, 1);
}

#[test]
fn a_guest_without_memory_says_so() {
    let lab = Lab::new();
    let (mut guest, far) = (lab.guest(), lab.far());
    far.open(1, C, A, 1);
    guest.open(1, A, C, 1);
    let Message::SlabWanted { slab, .. } = hear(&mut guest.keeper) else { panic!() };
    let reason = Reason::NoRingMemory;
    guest.keeper.send(&Message::SlabRefused { slab, reason }, vec![]).unwrap();
    until("no answer", || (hear(&mut guest.agent) == Message::Declined { conn: 1, reason }).then_some(()));
    assert_eq!(lab.h2.stat()["lanes"]["fabric"], 0);
}

#[test]
fn a_registration_is_handed_over_and_its_lanes_end_before() {
    let lab = Lab::new();
    let (mut guest, far) = (lab.guest(), lab.far());
    let (ours, theirs) = pair(&mut guest, &far, 1, 1);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    talk(&mut one, &mut two);
    let token = guest.token;
    let mut stranger = call(&mut guest.front, 1001, machine::PORT);
    stranger.send(&Message::Register { token: 0, pid: 1 }, vec![]).unwrap();
    is_hung_up_on(&mut stranger);
    lab.counts("second-registration");
    talk(&mut one, &mut two);
    let mut next = call(&mut guest.front, 1002, machine::PORT);
    next.send(&Message::Register { token, pid: 8 }, vec![]).unwrap();
    is_hung_up_on(&mut guest.keeper);
    is_hung_up_on(&mut guest.agent);
    assert!(matches!(far.hear(), Message::Withdraw { .. }));
    assert!(matches!(hear(&mut next), Message::Registered { .. }));
    assert_eq!(lab.lent(), 0);
}

#[test]
fn a_guest_that_stands_still_is_not_touched() {
    let lab = Lab::new();
    let (mut guest, far) = (lab.guest(), lab.far());
    let (ours, theirs) = pair(&mut guest, &far, 1, 1);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    talk(&mut one, &mut two);
    guest.front.send(&Message::FrontPaused {}, vec![]).unwrap();
    assert_eq!(hear(&mut guest.front), Message::FrontQuiet {});
    assert!(matches!(far.hear(), Message::Withdraw { reason: Reason::GuestPaused, .. }));
    let head = || one.directions()[1].head.head.load(std::sync::atomic::Ordering::SeqCst);
    let before = head();
    two.write(b"too late");
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(head(), before);
    far.say(Message::Left { conn: 1, generation: 1 });
    guest.front.send(&Message::FrontResumed {}, vec![]).unwrap();
    let reason = Reason::GuestPaused;
    assert_eq!(hear(&mut guest.agent), Message::Withdraw { conn: 0, generation: 0, reason });
    guest.left(&one.prepared);
    guest.open(1, A, C, 2);
    far.open(1, C, A, 2);
    let (ours, theirs) = (guest.prepare(), far.prepare());
    guest.commit(&ours);
    far.commit(&theirs);
    talk(&mut End::new(ours, 5), &mut End::new(theirs, 9));
}

#[test]
fn a_container_of_the_same_host_is_met_in_a_relay() {
    let lab = Lab::new();
    let (mut guest, near) = (lab.guest(), Agent::new(&lab.dir.0.join("b")));
    guest.open(1, A, B, 1);
    near.open(1, B, A, 1);
    guest.lend();
    let (ours, theirs) = (guest.prepare(), near.prepare());
    guest.commit(&ours);
    near.commit(&theirs);
    assert_ne!(ours.segment.slab, theirs.segment.slab);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, u64::from(u32::MAX) - 99));
    talk(&mut one, &mut two);
    assert_eq!(lab.h1.stat()["lanes"]["relay"], 1);
    guest.front.send(&Message::FrontPaused {}, vec![]).unwrap();
    assert_eq!(hear(&mut guest.front), Message::FrontQuiet {});
    let head = one.directions()[1].head.head.load(std::sync::atomic::Ordering::SeqCst);
    two.write(b"too late");
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(one.directions()[1].head.head.load(std::sync::atomic::Ordering::SeqCst), head);
    assert!(matches!(near.hear(), Message::Withdraw { reason: Reason::GuestPaused, .. }));
    near.say(Message::Left { conn: 1, generation: 1 });
    guest.front.send(&Message::FrontResumed {}, vec![]).unwrap();
    guest.left(&one.prepared);
    eventually("the stay is over", || lab.h1.stat()["stays"] == 0);
}
