//! One daemon, no fabric, two guests that share no memory: their bytes go through the daemon, which copies.

mod common;

use std::time::{Duration, Instant};

use common::{Agent, Dir, End, Prepared, Running, config, eventually, vport};
use vsocket_channel::message::{Lane, Message};
use vsocket_channel::reason::Reason;

const A: &str = "198.51.100.1:4000";
const B: &str = "198.51.100.2:80";

struct Lab {
    daemon: Running,
    dir: Dir,
}

impl Lab {
    /// Guest a shares no memory; b and c would.
    fn new() -> Self {
        let dir = Dir::new();
        let mut vports = vec![
            vport(&dir, "a", 100, "198.51.100.1"),
            vport(&dir, "b", 100, "198.51.100.2"),
            vport(&dir, "c", 100, "198.51.100.3"),
        ];
        vports[0].direct = false;
        Self { daemon: Running::new(config(&dir, "h1", vports)), dir }
    }

    fn agent(&self, name: &str) -> Agent {
        Agent::new(&self.dir.0.join(name))
    }

    fn traffic(&self, vport: usize) -> [u64; 2] {
        let stat = self.daemon.stat();
        ["tx_bytes", "rx_bytes"].map(|key| stat["vports"][vport][key].as_u64().unwrap())
    }
}

fn pair(a: &Agent, b: &Agent, conn: u64, generation: u32) -> (Prepared, Prepared) {
    common::pair(a, b, conn, [A, B], generation)
}

fn stream(seed: u64, len: usize) -> Vec<u8> {
    (seed..seed + len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

#[test]
fn eight_mebibytes_each_way_without_a_fabric() {
    const TOTAL: usize = 8 << 20;
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    let (ours, theirs) = pair(&a, &b, 1, 3);
    for end in [&ours, &theirs] {
        assert_eq!((end.generation, end.segment.lane, end.segment.side.index()), (3, Lane::Fabric, 0));
    }
    assert_ne!(ours.segment.slab, theirs.segment.slab, "each has memory of its own");
    let pump = |mut end: End, send: Vec<u8>| {
        let (mut sent, mut got) = (0, Vec::with_capacity(TOTAL));
        let end_of_time = Instant::now() + Duration::from_secs(60);
        while sent < TOTAL || got.len() < TOTAL {
            let n = end.write(&send[sent..(sent + 50_000).min(TOTAL)]);
            let more = end.read(70_000);
            if n == 0 && more.is_empty() {
                std::thread::yield_now();
                assert!(Instant::now() < end_of_time, "sent {sent}, got {}", got.len());
            }
            sent += n;
            got.extend(more);
        }
        got
    };
    std::thread::scope(|s| {
        let one = s.spawn(move || pump(End::new(ours, 1000), stream(1, TOTAL)));
        let two = s.spawn(move || pump(End::new(theirs, u64::from(u32::MAX) - 99), stream(2, TOTAL)));
        assert!(two.join().unwrap() == stream(1, TOTAL), "a to b");
        assert!(one.join().unwrap() == stream(2, TOTAL), "b to a");
    });
    let total = TOTAL as u64;
    assert_eq!([lab.traffic(0), lab.traffic(1)], [[total, total]; 2]);
    let stat = lab.daemon.stat();
    assert_eq!(stat["lanes"], serde_json::json!({ "direct": 0, "fabric": 0, "relay": 1 }));
    assert_eq!((&stat["drops"], &stat["fabric"]), (&serde_json::json!({}), &"none".into()));
    let lines = vsocket_backend::operator::ask(&lab.daemon.control, Message::Query { what: 1 }).unwrap();
    let lines: serde_json::Value = serde_json::from_str(&lines).unwrap();
    assert!(lines.as_array().unwrap().iter().all(|line| line["lane"] == "relay"), "{lines}");
}

#[test]
fn an_idle_relay_wakes_up_and_a_stay_is_confirmed() {
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    let (ours, theirs) = pair(&a, &b, 1, 3);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    for round in 0..5u8 {
        std::thread::sleep(Duration::from_millis(5));
        one.write(&[round; 3]);
        assert_eq!(two.read_exactly(3), [round; 3]);
        std::thread::sleep(Duration::from_millis(5));
        two.write(&[round; 9000]);
        assert_eq!(one.read_exactly(9000), [round; 9000]);
    }
    let confirmed =
        |end: &End| end.directions()[0].reader.confirmed.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((confirmed(&one), confirmed(&two)), (3, 3));
    let wakes = || lab.daemon.stat()["passes"].as_u64().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let before = wakes();
    std::thread::sleep(Duration::from_millis(500));
    // The question itself wakes the daemon, which then polls for 50 µs.
    assert!(wakes() - before < 2000, "idle, and not asleep");
}

#[test]
fn who_shares_memory_still_does() {
    let lab = Lab::new();
    let (b, c) = (lab.agent("b"), lab.agent("c"));
    let (ours, theirs) = common::pair(&b, &c, 1, ["198.51.100.2:9", "198.51.100.3:9"], 1);
    assert_eq!((ours.segment.lane, ours.segment.slab), (Lane::Direct, theirs.segment.slab));
    assert_eq!(lab.daemon.stat()["lanes"]["direct"], 1);
}

#[test]
fn leaving_ends_the_relay_and_both_come_back_in_the_same_memory() {
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    let (first, theirs) = pair(&a, &b, 1, 1);
    let (mut one, mut two) = (End::new(first, 5), End::new(theirs, 9));
    one.write(b"before");
    assert_eq!(two.read_exactly(6), b"before");
    a.say(Message::Left { conn: 1, generation: 1 });
    assert_eq!(b.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerLeft });
    two.write(b"nobody takes this");
    b.say(Message::Left { conn: 1, generation: 1 });
    let (again, theirs) = pair(&a, &b, 1, 2);
    assert_eq!(again.segment, one.prepared.segment);
    assert_eq!(theirs.segment, two.prepared.segment);
    let (mut one, mut two) = (End::new(again, 5), End::new(theirs, 9));
    two.write(b"anew");
    assert_eq!(one.read_exactly(4), b"anew");
    eventually("the old stay's bytes are counted, and no more", || {
        (lab.traffic(0), lab.traffic(1)) == ([6, 4], [4, 6])
    });
}

#[test]
fn an_agent_that_dies_takes_only_its_own_memory_with_it() {
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    let (ours, theirs) = pair(&a, &b, 1, 1);
    drop(a);
    assert_eq!(b.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerLeft });
    b.say(Message::Left { conn: 1, generation: 1 });
    eventually("the dead one's slab is gone", || lab.daemon.stat()["slabs"] == 1);
    let a = lab.agent("a");
    let (again, other) = pair(&a, &b, 1, 2);
    assert_ne!(again.segment.slab, ours.segment.slab);
    assert_eq!(other.segment, theirs.segment);
}

#[test]
fn a_bad_index_ends_its_own_relay_only() {
    let lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    let (ours, theirs) = pair(&a, &b, 1, 1);
    let (other, far) = common::pair(&a, &b, 2, ["198.51.100.1:5", "198.51.100.2:5"], 1);
    let bad = End::new(ours, 5);
    let _far_of_bad = End::new(theirs, 5);
    bad.directions()[0].head.head.store(u64::MAX / 2, std::sync::atomic::Ordering::Release);
    bad.ring_backend();
    for agent in [&a, &b] {
        assert_eq!(agent.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::Violation });
    }
    let (mut one, mut two) = (End::new(other, 5), End::new(far, 9));
    one.write(b"unharmed");
    assert_eq!(two.read_exactly(8), b"unharmed");
    assert_eq!(lab.daemon.stat()["drops"]["ring-index"], 1);
}

#[test]
fn a_drain_and_an_end_of_the_daemon_send_the_guests_home() {
    let mut lab = Lab::new();
    let (a, b) = (lab.agent("a"), lab.agent("b"));
    pair(&a, &b, 1, 1);
    let drain = |on| {
        vsocket_backend::operator::ask(&lab.daemon.control, Message::Drain { vport: 1, on }).unwrap();
    };
    drain(true);
    assert_eq!(a.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::Drained });
    assert_eq!(b.hear(), Message::Withdraw { conn: 0, generation: 0, reason: Reason::Drained });
    for agent in [&a, &b] {
        agent.say(Message::Left { conn: 1, generation: 1 });
    }
    drain(false);
    pair(&a, &b, 1, 2);
    let begin = Instant::now();
    lab.daemon.stop();
    for agent in [&a, &b] {
        assert_eq!(agent.hear(), Message::Withdraw { conn: 1, generation: 2, reason: Reason::BackendGone });
    }
    assert!(begin.elapsed() >= Duration::from_secs(1), "nobody said Left");
}
