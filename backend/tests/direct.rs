//! One daemon, real sockets, two agents: from `Open` to bytes in a ring shared by both, and every way back.

mod common;

use common::{Agent, Dir, Running, config, eventually, vport};
use rustix::net::{SendFlags, send};
use vsocket_backend::carrier::listen_at;
use vsocket_channel::lane::Stay;
use vsocket_channel::message::{Lane, Message};
use vsocket_channel::reason::Reason;
use vsocket_channel::ring::Ring;

const A: &str = "198.51.100.1:4000";
const B: &str = "198.51.100.2:80";

struct Lab {
    daemon: Running,
    dir: Dir,
}

impl Lab {
    fn new() -> Self {
        let dir = Dir::new();
        let vports = vec![
            vport(&dir, "a", 100, "198.51.100.1"),
            vport(&dir, "b", 100, "198.51.100.2"),
            vport(&dir, "e", 200, "198.51.100.1"),
        ];
        Self { daemon: Running::new(config(&dir, "h1", vports)), dir }
    }

    fn agent(&self, name: &str) -> Agent {
        Agent::new(&self.dir.0.join(name))
    }
}

#[test]
fn two_guests_share_a_ring() {
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    assert_eq!(a.boot, b.boot);
    a.open(7, A, B, 1);
    assert_eq!(a.hear(), Message::Declined { conn: 7, reason: Reason::PeerNotOpen });
    b.open(9, B, A, 5);
    let (ours, theirs) = (a.prepare(), b.prepare());
    a.commit(&ours);
    b.commit(&theirs);
    assert_eq!((ours.conn, theirs.conn, ours.generation, theirs.generation), (7, 9, 5, 5));
    assert_eq!(ours.segment.lane, Lane::Direct);
    assert_eq!((ours.segment.slab, ours.segment.index), (theirs.segment.slab, theirs.segment.index));
    assert_eq!(ours.segment.side, theirs.segment.side.other());

    let at = ours.segment.side.index();
    let stay = Stay { generation: 5, start: 1000, escape: b'!' };
    assert!(ours.view.header().directions[at].publish_stay(stay));
    ours.view.rings[at].put(1000, b"over the ring");
    Ring { indices: &ours.view.header().directions[at], bytes: &ours.view.rings[at] }.publish(1013);
    rustix::io::write(&ours.far[0], &1u64.to_ne_bytes()).unwrap();

    let direction = &theirs.view.header().directions[at];
    assert_eq!(direction.stay(5), Some(stay));
    let ring = Ring { indices: direction, bytes: &theirs.view.rings[at] };
    let mut got = vec![0; ring.available(1000).unwrap()];
    ring.bytes.get(1000, &mut got);
    assert_eq!(got, b"over the ring");
    assert_eq!(rustix::io::read(&theirs.own[0], &mut [0; 8]), Ok(8), "the far bell is ours");
    assert_eq!(lab.daemon.stat()["lanes"]["direct"], 1);

    // The lane goes on without its backend.
    drop(lab);
    ring.release(1013);
    assert_eq!(
        Ring { indices: &ours.view.header().directions[at], bytes: &ours.view.rings[at] }.space(1013),
        Ok(1 << 16)
    );
}

#[test]
fn leaving_frees_the_segment_and_opening_again_pairs_anew() {
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    a.open(1, A, B, 1);
    b.open(1, B, A, 1);
    let (first, _) = (a.prepare(), b.prepare());
    assert_eq!(a.hear(), Message::Commit { conn: 1, generation: 1 });
    assert_eq!(b.hear(), Message::Commit { conn: 1, generation: 1 });
    a.say(Message::Left { conn: 1, generation: 1 });
    assert_eq!(b.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerLeft });
    b.say(Message::Left { conn: 1, generation: 1 });
    a.open(1, A, B, 2);
    b.open(1, B, A, 2);
    let again = a.prepare();
    assert_eq!((again.generation, again.segment), (2, first.segment));
}

#[test]
fn drain_and_back() {
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    a.open(1, A, B, 1);
    b.open(1, B, A, 1);
    let (ours, theirs) = (a.prepare(), b.prepare());
    a.commit(&ours);
    b.commit(&theirs);
    let drain = |on| {
        vsocket_backend::operator::ask(&lab.daemon.control, Message::Drain { vport: 0, on }).unwrap();
    };
    drain(true);
    assert_eq!(a.hear(), Message::Withdraw { conn: 0, generation: 0, reason: Reason::Drained });
    assert_eq!(b.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::Drained });
    for agent in [&a, &b] {
        agent.say(Message::Left { conn: 1, generation: 1 });
    }
    a.open(1, A, B, 2);
    assert_eq!(a.hear(), Message::Declined { conn: 1, reason: Reason::Drained });
    b.open(1, B, A, 2);
    assert_eq!(b.hear(), Message::Declined { conn: 1, reason: Reason::Drained });
    assert_eq!(lab.daemon.stat()["vports"][0]["drained"], true);
    drain(false);
    assert_eq!(a.prepare().generation, 2);
    assert_eq!(b.prepare().generation, 2);
    assert!(
        vsocket_backend::operator::ask(&lab.daemon.control, Message::Drain { vport: 9, on: true }).is_err()
    );
}

#[test]
fn tenants_do_not_meet_and_addresses_are_not_borrowed() {
    let lab = Lab::new();
    let (a, b, e) = (lab.agent("a"), lab.agent("b"), lab.agent("e"));
    e.open(1, A, B, 1);
    b.open(1, B, A, 1);
    assert_eq!(e.hear(), Message::Declined { conn: 1, reason: Reason::PeerUnknown });
    assert_eq!(b.hear(), Message::Declined { conn: 1, reason: Reason::PeerNotOpen });
    a.open(2, "198.51.100.2:80", A, 1);
    assert_eq!(a.hear(), Message::Declined { conn: 2, reason: Reason::AddressNotYours });
    b.open(2, B, A, 1);
    assert_eq!(b.hear(), Message::Declined { conn: 2, reason: Reason::TupleTaken });
    for conn in 3..6 {
        b.open(conn, B, &format!("198.51.100.1:{conn}"), 1);
        assert_eq!(b.hear(), Message::Declined { conn, reason: Reason::PeerNotOpen });
    }
    b.open(6, B, "198.51.100.1:6", 1);
    assert_eq!(b.hear(), Message::Declined { conn: 6, reason: Reason::Quota });
    assert_eq!(lab.daemon.stat()["declines"]["address-not-yours"], 1);
}

#[test]
fn an_agent_that_dies_takes_only_its_own_with_it() {
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    a.open(1, A, B, 1);
    b.open(1, B, A, 1);
    let (ours, theirs) = (a.prepare(), b.prepare());
    a.commit(&ours);
    b.commit(&theirs);
    drop(a);
    assert_eq!(b.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerLeft });
    b.say(Message::Left { conn: 1, generation: 1 });
    eventually("the slab is gone", || lab.daemon.stat()["slabs"] == 0);
    let a = lab.agent("a");
    a.open(1, A, B, 1);
    b.open(1, B, A, 2);
    assert_ne!(a.prepare().segment.slab, ours.segment.slab);
}

#[test]
fn a_program_that_has_ended_leaves_no_slab() {
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    a.open(1, A, B, 1);
    b.open(1, B, A, 1);
    let (ours, theirs) = (a.prepare(), b.prepare());
    a.commit(&ours);
    b.commit(&theirs);
    a.say(Message::Left { conn: 1, generation: 1 });
    a.say(Message::Close { conn: 1 });
    a.say(Message::Ended { program: 1 });
    assert_eq!(b.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerLeft });
    assert_eq!(lab.daemon.stat()["slabs"], 1, "the other program is in it");
    b.say(Message::Left { conn: 1, generation: 1 });
    eventually("the slab is gone", || lab.daemon.stat()["slabs"] == 0);
}

#[test]
fn bad_messages_end_their_sender_and_nobody_else() {
    let lab = Lab::new();
    let good = Message::Left { conn: 1, generation: 1 }.encode();
    let with = |at: usize, value: u8| {
        let mut image = good.to_vec();
        image[at] = value;
        image
    };
    let mut bad_field = Message::Drain { vport: 0, on: true }.encode().to_vec();
    bad_field[12] = 7;
    let table: &[(Vec<u8>, &str)] = &[
        (good[..100].to_vec(), "message-length"),
        ([&good[..], &good[..]].concat(), "message-length"),
        (with(3, 9), "message-magic"),
        (with(4, 77), "message-version"),
        (with(6, 200), "message-kind"),
        (bad_field, "message-field"),
        (Message::Commit { conn: 1, generation: 1 }.encode().to_vec(), "message-unexpected"),
        (Message::Hello { pid: 1 }.encode().to_vec(), "message-unexpected"),
    ];
    let b = lab.agent("b");
    for (image, name) in table {
        let before = lab.daemon.stat()["drops"][name].as_u64().unwrap_or(0);
        let a = lab.agent("a");
        send(&a.socket, image, SendFlags::NOSIGNAL).unwrap();
        assert!(a.try_hear().is_none(), "{name}: hung up on");
        eventually(name, || lab.daemon.stat()["drops"][name].as_u64() == Some(before + 1));
    }
    let unannounced = Agent::silent(&lab.dir.0.join("a"));
    unannounced.say(Message::Close { conn: 1 });
    assert!(unannounced.try_hear().is_none(), "no Hello");
    b.say(Message::Ping { n: 42 });
    assert_eq!(b.hear(), Message::Pong { n: 42 });
}

#[test]
fn a_vport_has_one_agent() {
    let lab = Lab::new();
    let first = lab.agent("a");
    assert!(Agent::silent(&lab.dir.0.join("a")).try_hear().is_none());
    assert_eq!(lab.daemon.stat()["drops"]["second-agent"], 1);
    first.say(Message::Ping { n: 1 });
    assert_eq!(first.hear(), Message::Pong { n: 1 });
    drop(first);
    lab.agent("a");
}

#[test]
fn an_end_leaves_no_socket_behind() {
    let mut lab = Lab::new();
    lab.daemon.stop();
    assert_eq!(std::fs::read_dir(&lab.dir.0).unwrap().count(), 0);
    assert!(listen_at(&lab.dir.0.join("a")).is_ok());
}
